"""How many drafts pay: chosen every cycle, by what passes cost and by what was accepted lately.

A draft costs a row of the verify pass, for every request of the batch, whether it is accepted or not. With few requests
a pass waits for the weights and rows are cheap; with many they are not, and at some number no draft pays. The policy
expects every draft to be accepted as often as drafts of its confidence were, and takes the number of drafts per request
that gives the most tokens per second; if none does, it stops drafting and looks again now and then. It chooses twice:
how many to ask the drafter for, by what was expected lately, and how many of those to verify, by how sure they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.clock import Clock
from domino_spec.decoding.costs import CostModel, sizes_up_to
from domino_spec.decoding.cycle import Proposal, Verdict

BINS = 16
"""Classes of confidence: (1/2, 1] ... in equal steps of its square root."""
PRIOR = 8.0
"""Drafts' worth of trust in the draft's own confidence before any was seen."""
MEMORY = 2000.0
"""Drafts of a class after which old ones fade."""
DRIFT = 0.01
"""What a cycle of one request adds to the variance of what is expected, in variances of what one request is expected to
accept; a cycle of R adds the square root of R times less: some of what changes is each one's own."""
LOOKING_SOON, LOOKING = 0.04, 0.005
"""Share of the seconds of plain cycles that is spent on looking whether drafts would pay: of one request, after cycles
that drafted, and the least. It halves with every look. For R requests it begins with the square root of R times less:
the more they are, the less is new, and the more looks, the more of them promise too much."""
SEEN_ENOUGH = 4
"""Requests that must have been looked at to say anything."""
RECHECKED, RECHECKED_SOON = 128, 16
"""Cycles that draft after which one is plain, so that it stays known what that takes; and the same where drafting
hardly pays: there a plain cycle loses as little, and says what has to be known."""
HARDLY = 1.2
"""Tokens per second over those of plain decoding below which drafting hardly pays."""
TAKEN_UP, GIVEN_UP = 1.10, 1.00
"""Tokens per second over those of plain decoding that drafting must promise to be taken up, and to go on: what is
expected is the best of several guesses, and so a little too much."""
FREE = 0.01
"""Drafting that takes less of a plain cycle than this is always asked for, and cut: a look-up costs nothing."""
SLACK = 0.99
"""A larger number is asked for where it promises this share of the best number's rate: some cycles are surer."""


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

    def look(self, proposal: Proposal, seconds: float | None = None) -> None:
        """See what would be drafted; it is not proposed.

        Args:
            proposal: for the first of the requests.
            seconds: that it took; None where nobody knows.
        """
        ...

    def observe(self, proposal: Proposal, verdict: Verdict, seconds: float, drafted: bool | None = None) -> None:
        """Learn from what a cycle accepted and how long it took.

        Args:
            proposal: what was verified.
            verdict: its tokens and features are not asked for.
            seconds: of the cycle, without those of looking.
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
        self.curious = False
        self._requests = 1
        """Of the newest cycle."""
        self._asked = 0
        """Drafts that were `wanted` last, where any were."""
        self._drafting = False
        """Whether the newest cycle drafts."""
        self._pays = False
        """Whether drafting was found to pay; a plain cycle between does not change that."""
        self._settled: tuple[int, int] | None = None
        """Requests and most drafts for which it was found that none pay, as long as it saw nothing new."""
        self._looking: dict[int, float] = {}
        """The share that looking has, by number of requests."""
        self._idle_seconds, self._look_seconds = 0.0, 0.0
        """Of plain cycles since it looked last; and of a look."""
        self._acceptance = _Acceptance()
        self._expected = _Expected()
        self._clock = Clock()
        self._since_plain: dict[int, int] = {}
        """Cycles that drafted since the last plain one, by number of requests; absent where there was none yet."""
        # Asked for dozens of times a cycle.
        self._verify_seconds, self._draft_seconds = lru_cache(4096)(costs.verify), lru_cache(4096)(costs.draft)

    def wanted(self, requests: int, most: int) -> int:
        """The number that pays best lately, to be cut, or none where even that would lose."""
        self._expected.age(requests)
        self._requests = requests
        self._drafting, self.curious = False, False
        since_plain, known = self._since_plain.get(requests), self._expected.seen >= SEEN_ENOUGH
        if since_plain is None or since_plain >= RECHECKED:
            self.curious = since_plain is not None or not known
            return 0
        if self._draft_seconds(requests, most) < FREE * self._verify_seconds(requests, 1):
            return self._draft(most)
        if not known:
            self.curious = True
            return 0
        if self._settled == (requests, most):
            return self._idle()
        rate, number = self._best_number(requests, most)
        plain = self._plain(requests)
        if rate < HARDLY * plain and since_plain >= RECHECKED_SOON:
            return 0
        if rate > plain * (GIVEN_UP if self._pays else TAKEN_UP):
            self._pays = True
            return self._draft(number)
        self._pays = False
        self._settled = requests, most
        return self._idle()

    def _idle(self) -> int:
        self.curious = self._share() * self._idle_seconds >= self._look_seconds
        return 0

    def _share(self) -> float:
        return self._looking.get(self._requests, LOOKING_SOON / math.sqrt(self._requests))

    def _draft(self, number: int) -> int:
        self._drafting, self._asked, self._settled = True, number, None
        self._looking.pop(self._requests, None)
        return number

    def cut(self, proposal: Proposal) -> Proposal:
        """The best n drafts of every request, for the n that pays most; n may be 0."""
        requests, num_drafts = proposal.tokens.shape
        asked = max(self._asked, num_drafts)
        order, gains = self._best_first(proposal)
        self._expected.see(gains, requests, asked)
        rates = self._rates(gains.tolist(), requests, asked)
        best = rates.index(max(rates))
        return proposal if best == num_drafts else keep_drafts(proposal, order[:, :best])

    def look(self, proposal: Proposal, seconds: float | None = None) -> None:
        """What few requests would be drafted says what all of them would; the longer it takes, the rarer it is."""
        requests, number = proposal.tokens.shape
        self._expected.see(self._best_first(proposal)[1], requests, number)
        if seconds is None:
            seconds = self._draft_seconds(requests, number)
        # One look that took very long was a bad moment.
        self._look_seconds = min(seconds, 2 * self._look_seconds) if self._look_seconds else seconds
        self._looking[self._requests] = max(self._share() / 2, LOOKING)
        self._idle_seconds, self._settled = 0.0, None

    def observe(self, proposal: Proposal, verdict: Verdict, seconds: float, drafted: bool | None = None) -> None:
        """Count how often drafts of each confidence were accepted, and keep the cost model true."""
        requests, num_drafts = proposal.tokens.shape
        drafted = self._drafting if drafted is None else drafted
        asked = max(self._asked, num_drafts) if drafted else 0
        self._clock.observe(requests, num_drafts, drafted, self._modelled(requests, num_drafts, asked), seconds)
        self._since_plain[requests] = self._since_plain.get(requests, 0) + 1 if drafted else 0
        self._idle_seconds += 0.0 if drafted else seconds
        if num_drafts:
            self._acceptance.count(proposal, verdict)

    def _best_number(self, requests: int, most: int) -> tuple[float, int]:
        """Tokens per second that can be expected, and the number of drafts to ask for."""
        gains = self._expected.gains
        assert gains is not None
        rates = {n: max(self._rates(gains[: n + 1], requests, n)) for n in sizes_up_to(most)}
        best = max(rates.values())
        return best, max(number for number, rate in rates.items() if rate >= SLACK * best)

    def _best_first(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """Drafts of each request from the best on [R, N], and expected accepted ones of the n best [N + 1]."""
        meant = torch.arange(proposal.tokens.shape[1], device=proposal.tokens.device) < proposal.num_drafts[:, None]
        chances = self._acceptance.chances(proposal) * meant
        order = best_first(proposal)
        gains = chances.gather(1, order).cumsum(1).mean(0)  # of the n best drafts of a request
        return order, torch.cat((gains.new_zeros(1), gains)).cpu()

    def _rates(self, gains: Sequence[float], requests: int, asked: int) -> list[float]:
        """Tokens per second of cycles with 0, 1, .. drafts per request of those asked for, which are paid for."""
        modelled = [self._modelled(requests, n, asked) for n in range(len(gains))]
        seconds = self._clock.seconds(requests, asked > 0, modelled)
        return [requests * (1 + gained) / spent for gained, spent in zip(gains, seconds, strict=True)]

    def _plain(self, requests: int) -> float:
        """Tokens per second without drafts."""
        return self._rates([0.0], requests, 0)[0]

    def _modelled(self, requests: int, num_drafts: int, asked: int) -> float:
        drafting = self._draft_seconds(requests, asked) if asked else 0.0
        return self._verify_seconds(requests, num_drafts + 1) + drafting


class _Acceptance:
    """How often drafts like a given one were accepted: by their confidence, or by their place where they have none."""

    def __init__(self) -> None:
        centres = ((torch.arange(BINS) + 0.5) / BINS) ** 2
        self._seen = torch.full((BINS,), PRIOR, dtype=torch.double)
        self._accepted = PRIOR * centres.double()
        self._by_place: dict[int, list[float]] = {}

    def chances(self, proposal: Proposal) -> Tensor:
        """Of each draft, [R, N]."""
        if proposal.confidence is None:
            known = [
                self._by_place.get(place, [PRIOR, PRIOR / (place + 2)]) for place in range(proposal.tokens.shape[1])
            ]
            rates = torch.tensor([hits / seen for seen, hits in known], dtype=torch.double)
            return rates.to(proposal.tokens.device).expand(proposal.tokens.shape)
        rates = (self._accepted / self._seen).to(proposal.confidence.device)
        return rates[_bins(proposal.confidence)]

    def count(self, proposal: Proposal, verdict: Verdict) -> None:
        """Take in one cycle."""
        requests, num_drafts = proposal.tokens.shape
        places = torch.arange(num_drafts, device=proposal.tokens.device)
        meant = places < proposal.num_drafts[:, None]
        if verdict.path is None:
            accepted = places < verdict.num_accepted[:, None]
        else:
            on_path = places < verdict.num_accepted[:, None]
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


class _Expected:
    """How many of a request's n best drafts will be accepted: a Kalman filter of what the n-th one adds.

    What few requests promise says less than what many do, and what was seen long ago less than what was seen just now.
    """

    def __init__(self) -> None:
        self.seen = 0
        """Requests."""
        self.gains: list[float] | None = None
        """N + 1 of them, for n = 0, 1, ..; None before anything was seen."""
        self._added = torch.zeros(0, dtype=torch.double)
        """[N]."""
        self._variance = torch.zeros(0, dtype=torch.double)
        """[N], in variances of what one request promises."""

    def age(self, requests: int) -> None:
        """A cycle goes by."""
        self._variance += DRIFT / math.sqrt(requests)

    def see(self, gains: Tensor, requests: int, asked: int) -> None:
        """Take in what was promised to so many requests, of whom each was to have as many drafts as `asked`."""
        self.seen += requests
        added = gains.double().diff()
        added = F.pad(added, (0, max(0, asked - len(added))))  # a drafter may leave out what it doubts
        new = len(added) - len(self._added)
        if new > 0:
            self._added = F.pad(self._added, (0, new))
            self._variance = F.pad(self._variance, (0, new), value=math.inf)
        variance, noise = self._variance[: len(added)], 1 / requests
        share = 1 / (1 + noise / variance)
        self._added[: len(added)] += share * (added - self._added[: len(added)])
        self._variance[: len(added)] = share * noise
        self.gains = [0.0, *self._added.cumsum(0).tolist()]


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
