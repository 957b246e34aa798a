"""How many drafts pay: chosen every cycle, by what passes cost and by what was accepted lately.

A draft costs a row of the verify pass, for every request of the batch, whether it is accepted or not. With few requests
a pass waits for the weights and rows are cheap; with many they are not, and at some number no draft pays. The policy
expects every draft to be accepted as often as drafts of its confidence were, and takes the number of drafts per request
that gives the most tokens per second (the cost model's seconds); if none does, it stops drafting and looks again now
and then.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from domino_spec.decoding.costs import CostModel
from domino_spec.decoding.state import Proposal, Verdict

BINS = 16
"""Classes of confidence: (1/2, 1] ... in equal steps of its square root."""
PRIOR = 8.0
"""Drafts' worth of trust in the draft's own confidence before any was seen."""
MEMORY = 2000.0
"""Drafts of a class after which old ones fade."""
FADE = 0.05
"""Share of the newest cycle in what is expected of the next."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 64
"""Cycles without drafts before it looks again; the pause doubles while drafts do not pay."""


class DraftPolicy(Protocol):
    """Decides how many drafts a cycle has."""

    def wanted(self, requests: int, most: int) -> int:
        """Drafts to ask the drafter for, at most `most`; 0 skips drafting."""
        ...

    def cut(self, proposal: Proposal) -> Proposal:
        """The proposal with the drafts that pay."""
        ...

    def observe(self, proposal: Proposal, verdict: Verdict) -> None:
        """Learn from what a cycle accepted."""
        ...


class AdaptivePolicy:
    """The number of drafts with the most expected tokens per second.

    Args:
        costs: seconds of passes and of drafting.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        centres = ((torch.arange(BINS) + 0.5) / BINS) ** 2
        self._seen = torch.full((BINS,), PRIOR, dtype=torch.double)
        self._accepted = PRIOR * centres.double()
        self._by_place: dict[int, list[float]] = {}
        self._expected: Tensor | None = None
        """[N + 1], accepted drafts of a request that has its n best drafts, lately."""
        self._idle, self._pause = 0, FIRST_PAUSE

    def wanted(self, requests: int, most: int) -> int:
        """All of them, to be cut, or none where even the best number would lose."""
        if self._expected is None:
            return most
        plain = requests / self.costs.verify(requests, 1)
        if float(self._rates(self._expected, requests).max()) > plain:
            self._idle, self._pause = 0, FIRST_PAUSE
            return most
        self._idle += 1
        if self._idle <= self._pause:
            return 0
        self._idle, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
        return most

    def cut(self, proposal: Proposal) -> Proposal:
        """The best n drafts of every request, for the n that pays most; n may be 0."""
        requests, num_drafts = proposal.tokens.shape
        if num_drafts == 0:
            return proposal
        meant = torch.arange(num_drafts, device=proposal.tokens.device) < proposal.num_drafts[:, None]
        chances = self._chances(proposal) * meant
        if proposal.confidence is None:
            order = torch.arange(num_drafts, device=meant.device).expand(requests, -1)
        else:
            # Stable: a parent is never less probable than its child, and comes first where both are equal.
            order = (proposal.confidence * meant).sort(dim=1, descending=True, stable=True).indices
        gains = chances.gather(1, order).cumsum(1).mean(0)  # of the n best drafts of a request
        gains = torch.cat((gains.new_zeros(1), gains)).cpu()
        self._expect(gains)
        best = int(self._rates(gains, requests).argmax())
        return proposal if best == num_drafts else keep_drafts(proposal, order[:, :best])

    def observe(self, proposal: Proposal, verdict: Verdict) -> None:
        """Count how often drafts of each confidence were accepted."""
        requests, num_drafts = proposal.tokens.shape
        if num_drafts == 0:
            return
        places = torch.arange(num_drafts, device=proposal.tokens.device)
        meant = places < proposal.num_drafts[:, None]
        if verdict.path is None:
            accepted = places < verdict.num_accepted[:, None]
        else:
            on_path = torch.arange(num_drafts, device=places.device) < verdict.num_accepted[:, None]
            rows = torch.where(on_path, verdict.path[:, 1:], 0)  # row 0 is the anchor's
            accepted = torch.zeros(requests, num_drafts + 1, dtype=torch.bool, device=places.device)
            accepted = accepted.scatter(1, rows, True)[:, 1:]
        accepted &= meant
        if proposal.confidence is None:
            for place in range(num_drafts):
                seen, hits = self._by_place.setdefault(place, [PRIOR, PRIOR / (place + 2)])
                kept = min(1.0, MEMORY / seen)
                self._by_place[place] = [
                    seen * kept + int(meant[:, place].sum()),
                    hits * kept + int(accepted[:, place].sum()),
                ]
            return
        bins = _bins(proposal.confidence)[meant].cpu()
        fade = (MEMORY / self._seen).clamp(max=1.0)
        self._seen = self._seen * fade + bins.bincount(minlength=BINS)
        self._accepted = self._accepted * fade + bins[accepted[meant].cpu()].bincount(minlength=BINS)

    def _chances(self, proposal: Proposal) -> Tensor:
        """How often drafts like each of these were accepted, [R, N]."""
        if proposal.confidence is None:
            known = [
                self._by_place.get(place, [PRIOR, PRIOR / (place + 2)]) for place in range(proposal.tokens.shape[1])
            ]
            rates = torch.tensor([hits / seen for seen, hits in known], dtype=torch.double)
            return rates.to(proposal.tokens.device).expand(proposal.tokens.shape)
        rates = (self._accepted / self._seen).to(proposal.confidence.device)
        return rates[_bins(proposal.confidence)]

    def _expect(self, gains: Tensor) -> None:
        if self._expected is None or len(self._expected) != len(gains):
            if self._expected is not None:  # a drafter that leaves out what it doubts proposes fewer at times
                longest = max(len(gains), len(self._expected))
                gains, old = (torch.cat((g, g[-1:].expand(longest - len(g)))) for g in (gains, self._expected))
                self._expected = old
            else:
                self._expected = gains
                return
        self._expected = (1 - FADE) * self._expected + FADE * gains

    def _rates(self, gains: Tensor, requests: int) -> Tensor:
        """Tokens per second of cycles with 0, 1, .. drafts per request, drafting paid for in all of them."""
        drafting = self.costs.draft(requests)
        seconds = [self.costs.verify(requests, n + 1) + drafting for n in range(len(gains))]
        return requests * (1 + gains) / torch.tensor(seconds, dtype=torch.double)


def _bins(confidence: Tensor) -> Tensor:
    return (confidence.clamp(0, 1).sqrt() * BINS).long().clamp(max=BINS - 1)


def keep_drafts(proposal: Proposal, kept: Tensor) -> Proposal:
    """A proposal with only the drafts `kept` [R, n] of each request, distinct, no draft without its parent.

    Drafts past a request's own number may be among them and stay unmeant.
    """
    if kept.shape[1] == 0:
        return Proposal.empty(len(proposal.tokens), proposal.tokens.device)
    assert proposal.draft_probs is None, "which of sampled drafts are proposed must not depend on anything"
    kept = kept.sort(dim=1).values  # parents first, and what is meant before what is not
    parents = proposal.parents
    if parents is not None:
        above = parents.gather(1, kept)
        parents = torch.where(above < 0, -1, torch.searchsorted(kept, above.clamp(min=0)))
    return Proposal(
        proposal.tokens.gather(1, kept),
        (kept < proposal.num_drafts[:, None]).sum(1),
        parents,
        confidence=None if proposal.confidence is None else proposal.confidence.gather(1, kept),
    )
