"""How many drafts a static cycle verifies: chosen on the host, from the last cycle whose result it has read.

An ordinary cycle is cut between drafting and verification, for which the host must see what was drafted. A static one
verifies the best few of its drafts, as many as would have paid one cycle earlier, and its result says how confident the
draft was of them all. Numbers come from a small set, because each has a graph of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from domino_spec.decoding.adapt import DraftPolicy, best_first, keep_drafts
from domino_spec.decoding.costs import sizes_up_to
from domino_spec.decoding.cycle import Proposal, Verdict

if TYPE_CHECKING:
    from domino_spec.decoding.graphs.cycles import PendingCycle, StaticResult


@dataclass(frozen=True)
class Choice:
    """What one cycle does; see `StaticCycles.launch`."""

    offered: int
    verified: int
    drafted: bool


class LateChoice:
    """Chooses by a policy, or always the same.

    Args:
        policy: None for always all drafts.
        most: drafts of a cycle.
    """

    def __init__(self, policy: DraftPolicy | None, most: int) -> None:
        self._policy, self._most = policy, most
        self._sizes = (0, *sizes_up_to(most)) if most else (0,)
        self._best = most

    def choose(self, requests: int, asked: bool) -> Choice:
        """For the next cycle of so many requests; `asked` is False where the policy has no say."""
        if self._policy is None or not asked or self._most == 0:
            return Choice(self._most, self._most, self._most > 0)
        wanted = self._policy.wanted(requests, self._most)
        if wanted == 0:
            return Choice(self._most if self._policy.curious else 0, 0, False)
        offered = self._size(wanted)
        return Choice(offered, min(self._best, offered), True)

    def learn(self, cycle: PendingCycle, result: StaticResult) -> None:
        """Take in what a cycle offered, what of it was accepted, and how long it took."""
        rows = [r for r, accepted in enumerate(result.num_accepted) if accepted >= 0]
        if self._policy is None or not rows:
            return
        offer = self._offer(cycle, result, rows)
        if not cycle.drafted and cycle.shape.offered > 0:
            self._policy.look(offer)
            return
        proposal = best_drafts(offer, cycle.shape.verified)
        if cycle.drafted and offer.draft_probs is None and not cycle.shape.warpers.samples:
            self._best = self._size(self._policy.cut(offer).tokens.shape[1])
        accepted = torch.tensor([result.num_accepted[r] for r in rows])
        tokens = torch.zeros(len(rows), proposal.tokens.shape[1] + 1, dtype=torch.long)
        path = None if result.path is None else result.path[rows]
        verdict = Verdict(tokens, accepted, None, torch.zeros_like(accepted), accepted >= 0, path)
        self._policy.observe(proposal, verdict, result.seconds, drafted=cycle.drafted)

    def _offer(self, cycle: PendingCycle, result: StaticResult, rows: list[int]) -> Proposal:
        counts = torch.tensor([result.num_offered[r] for r in rows])
        tokens = torch.zeros(len(rows), cycle.offered, dtype=torch.long)
        return Proposal(tokens, counts, confidence=None if result.confidence is None else result.confidence[rows])

    def _size(self, count: int) -> int:
        """The least of the numbers in use that holds so many drafts."""
        return self._sizes[min(bisect_left(self._sizes, count), len(self._sizes) - 1)]


def best_drafts(proposal: Proposal, count: int) -> Proposal:
    """The `count` best drafts of every request."""
    if proposal.tokens.shape[1] <= count:
        return proposal
    return keep_drafts(proposal, best_first(proposal)[:, :count])
