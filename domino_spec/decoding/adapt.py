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
FADE, FADE_LOOKED = 0.05, 0.5
"""Share of the newest cycle in what is expected of the next; the same of one that was only looked at, which is rare."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 64
"""Cycles without drafts before it looks again; the pause doubles while drafts do not pay."""
RECHECKED = 128
"""Cycles that draft after which one is plain, so that it stays known what that takes."""
TRUST = 0.1
"""Share of the newest cycle in how far its kind's seconds are from the cost model's."""


class DraftPolicy(Protocol):
    """Decides how many drafts a cycle has."""

    curious: bool
    """Where none are wanted: whether to `look` at what a few requests would be drafted."""

    def wanted(self, requests: int, most: int) -> int:
        """Drafts to ask the drafter for, at most `most`; 0 skips drafting."""
        ...

    def cut(self, proposal: Proposal) -> Proposal:
        """The proposal with the drafts that pay."""
        ...

    def look(self, proposal: Proposal) -> None:
        """See what would be drafted; it is not proposed."""
        ...

    def observe(self, proposal: Proposal, verdict: Verdict, seconds: float, drafted: bool | None = None) -> None:
        """Learn from what a cycle accepted and how long it took.

        Args:
            proposal: what was verified.
            verdict: its tokens and features are not asked for.
            seconds: of the cycle.
            drafted: whether drafting was a part of it; None where it is the cycle that was `wanted` last, since only
                a cycle that is heard of late says it (`decoding.static`).
        """
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
        self.curious = self._drafted = False
        self._factors: dict[tuple[int, int, bool], float] = {}
        """Seconds of cycles over the cost model's, by number of requests, drafts per request, whether it drafted."""
        self._since_plain: dict[int, int] = {}
        """Cycles that drafted since the last plain one, by number of requests; absent where there was none yet."""

    def wanted(self, requests: int, most: int) -> int:
        """All of them, to be cut, or none where even the best number would lose."""
        self._drafted, self.curious = False, False
        if self._since_plain.get(requests, RECHECKED) >= RECHECKED:
            return 0
        self._drafted = True
        if self._expected is None:
            return most
        plain = requests / self._seconds(requests, 0, drafted=False)
        if float(self._rates(self._expected, requests).max()) > plain:
            self._idle, self._pause = 0, FIRST_PAUSE
            return most
        self._drafted, self._idle = False, self._idle + 1
        if self._idle > self._pause:
            self._idle, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
            self.curious = True
        return 0

    def cut(self, proposal: Proposal) -> Proposal:
        """The best n drafts of every request, for the n that pays most; n may be 0."""
        requests, num_drafts = proposal.tokens.shape
        if num_drafts == 0:
            return proposal
        order, gains = self._best_first(proposal)
        self._expect(gains)
        best = int(self._rates(gains, requests).argmax())
        return proposal if best == num_drafts else keep_drafts(proposal, order[:, :best])

    def look(self, proposal: Proposal) -> None:
        """What few requests would be drafted says what all of them would."""
        if proposal.tokens.shape[1]:
            self._expect(self._best_first(proposal)[1], FADE_LOOKED)

    def _best_first(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """Drafts of each request from the best on [R, N], and expected accepted ones of the n best [N + 1]."""
        meant = torch.arange(proposal.tokens.shape[1], device=proposal.tokens.device) < proposal.num_drafts[:, None]
        chances = self._chances(proposal) * meant
        order = best_first(proposal)
        gains = chances.gather(1, order).cumsum(1).mean(0)  # of the n best drafts of a request
        return order, torch.cat((gains.new_zeros(1), gains)).cpu()

    def observe(self, proposal: Proposal, verdict: Verdict, seconds: float, drafted: bool | None = None) -> None:
        """Count how often drafts of each confidence were accepted, and keep the cost model true."""
        requests, num_drafts = proposal.tokens.shape
        if drafted is not None or not self.curious:  # looking is not a part of any kind of cycle
            drafted = self._drafted if drafted is None else drafted
            key = (requests, num_drafts, drafted)
            off = min(max(seconds / self._modelled(*key), 1 / 4), 4.0)  # a machine may also stand still for a while
            self._factors[key] = (1 - TRUST) * self._factors.get(key, off) + TRUST * off
            self._since_plain[requests] = self._since_plain.get(requests, 0) + 1 if drafted else 0
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

    def _expect(self, gains: Tensor, share: float = FADE) -> None:
        if self._expected is None or len(self._expected) != len(gains):
            if self._expected is not None:  # a drafter that leaves out what it doubts proposes fewer at times
                longest = max(len(gains), len(self._expected))
                gains, old = (torch.cat((g, g[-1:].expand(longest - len(g)))) for g in (gains, self._expected))
                self._expected = old
            else:
                self._expected = gains
                return
        self._expected = (1 - share) * self._expected + share * gains

    def _rates(self, gains: Tensor, requests: int) -> Tensor:
        """Tokens per second of cycles with 0, 1, .. drafts per request, drafting paid for in all of them."""
        seconds = [self._seconds(requests, n, drafted=True) for n in range(len(gains))]
        return requests * (1 + gains) / torch.tensor(seconds, dtype=torch.double)

    def _modelled(self, requests: int, num_drafts: int, drafted: bool) -> float:
        drafting = self.costs.draft(requests) if drafted else 0.0
        return self.costs.verify(requests, num_drafts + 1) + drafting

    def _seconds(self, requests: int, num_drafts: int, drafted: bool) -> float:
        """Of a cycle: the cost model's, times how far it was off lately, for this kind of cycle or those like it."""
        modelled = self._modelled(requests, num_drafts, drafted)
        known = self._factors.get((requests, num_drafts, drafted))
        if known is None:
            alike = [f for (r, _, d), f in self._factors.items() if (r, d) == (requests, drafted)]
            alike = alike or [f for (r, _, _), f in self._factors.items() if r == requests]
            known = sum(alike) / len(alike) if alike else 1.0
        return modelled * known


def _bins(confidence: Tensor) -> Tensor:
    return (confidence.clamp(0, 1).sqrt() * BINS).long().clamp(max=BINS - 1)


def best_first(proposal: Proposal) -> Tensor:
    """Drafts of each request from the best on, [R, N]; without confidences, as they come."""
    requests, num_drafts = proposal.tokens.shape
    places = torch.arange(num_drafts, device=proposal.tokens.device)
    if proposal.confidence is None:
        return places.expand(requests, -1)
    # Stable: a parent is never less probable than its child, and comes first where both are equal.
    believed = proposal.confidence * (places < proposal.num_drafts[:, None])
    return believed.sort(dim=1, descending=True, stable=True).indices


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
