"""How many drafts pay: chosen every cycle, by what passes cost and by what was accepted lately.

A draft costs a row of the verify pass, for every request of the batch, whether it is accepted or not. With few requests
a pass waits for the weights and rows are cheap; with many they are not, and at some number no draft pays. The policy
expects every draft to be accepted as often as drafts of its confidence were, and takes the number of drafts per request
that gives the most tokens per second; if none does, it stops drafting and looks again now and then. It chooses twice:
how many to ask the drafter for, by what was expected lately, and how many of those to verify, by how sure they are.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.costs import CostModel, sizes_up_to
from domino_spec.decoding.state import Proposal, Verdict

BINS = 16
"""Classes of confidence: (1/2, 1] ... in equal steps of its square root."""
PRIOR = 8.0
"""Drafts' worth of trust in the draft's own confidence before any was seen."""
MEMORY = 2000.0
"""Drafts of a class after which old ones fade."""
DRIFT = 0.005
"""What a cycle adds to the variance of what is expected, in variances of what one request is expected to accept."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 64
"""Cycles without drafts before it looks again; the pause doubles while drafts do not pay."""
RECHECKED, RECHECKED_SOON = 128, 16
"""Cycles that draft after which one is plain, so that it stays known what that takes; and the same where drafting
hardly pays: there a plain cycle loses as little, and says what has to be known."""
HARDLY = 1.2
"""Tokens per second over those of plain decoding below which drafting hardly pays."""
PACE = 0.3
"""Share of the newest cycle in how fast the machine is."""
MOST_WEIGHT, OFFSET_PRIOR = 40.0, 20.0
"""Cycles over which it is averaged how far a kind's seconds are off the cost model's; and the weight, in cycles, of
how far kinds like it are off."""
FARTHEST_OFF = math.log(4)
"""A machine may also stand still for a while."""
TAKEN_UP, GIVEN_UP = 1.05, 1.03
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

    def look(self, proposal: Proposal) -> None:
        """See what would be drafted; it is not proposed."""
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
        self._requests = 0
        """Of the newest cycle."""
        self._asked = 0
        """Drafts that were `wanted` last, where any were."""
        self._drafting = False
        """Whether the newest cycle drafts."""
        self._pays = False
        """Whether drafting was found to pay; a plain cycle between does not change that."""
        self._idle, self._pause = 0, FIRST_PAUSE
        self._acceptance = _Acceptance()
        self._expected = _Expected()
        self._clock = _Clock()
        self._since_plain: dict[int, int] = {}
        """Cycles that drafted since the last plain one, by number of requests; absent where there was none yet."""

    def wanted(self, requests: int, most: int) -> int:
        """The number that pays best lately, to be cut, or none where even that would lose."""
        self._expected.age()
        self._requests = requests
        self._drafting, self.curious = False, False
        since_plain, known = self._since_plain.get(requests), self._expected.gains is not None
        if since_plain is None or since_plain >= RECHECKED:
            self.curious = since_plain is not None or not known
            return 0
        if self.costs.draft(requests, most) < FREE * self.costs.verify(requests, 1):
            return self._draft(most)
        if not known:
            self.curious = True
            return 0
        rate, number = self._best_number(requests, most)
        plain = self._plain(requests)
        if rate < HARDLY * plain and since_plain >= RECHECKED_SOON:
            return 0
        if rate > plain * (GIVEN_UP if self._pays else TAKEN_UP):
            self._pays = True
            self._idle, self._pause = 0, FIRST_PAUSE
            return self._draft(number)
        self._pays = False
        self._idle += 1
        if self._idle > self._pause:
            self._idle, self._pause = 0, min(2 * self._pause, LONGEST_PAUSE)
            self.curious = True
        return 0

    def _draft(self, number: int) -> int:
        self._drafting, self._asked = True, number
        return number

    def cut(self, proposal: Proposal) -> Proposal:
        """The best n drafts of every request, for the n that pays most; n may be 0."""
        requests, num_drafts = proposal.tokens.shape
        asked = max(self._asked, num_drafts)
        order, gains = self._best_first(proposal)
        self._expected.see(gains, requests, asked)
        best = int(self._rates(gains, requests, asked).argmax())
        return proposal if best == num_drafts else keep_drafts(proposal, order[:, :best])

    def look(self, proposal: Proposal) -> None:
        """What few requests would be drafted says what all of them would; if it is good, it looks again soon."""
        requests, number = proposal.tokens.shape
        gains = self._best_first(proposal)[1]
        self._expected.see(gains, requests, number)
        if float(self._rates(gains, self._requests, number).max()) > self._plain(self._requests):
            self._pause = FIRST_PAUSE

    def observe(self, proposal: Proposal, verdict: Verdict, seconds: float, drafted: bool | None = None) -> None:
        """Count how often drafts of each confidence were accepted, and keep the cost model true."""
        requests, num_drafts = proposal.tokens.shape
        drafted = self._drafting if drafted is None else drafted
        asked = max(self._asked, num_drafts) if drafted else 0
        self._clock.observe(requests, num_drafts, drafted, self._modelled(requests, num_drafts, asked), seconds)
        self._since_plain[requests] = self._since_plain.get(requests, 0) + 1 if drafted else 0
        if num_drafts:
            self._acceptance.count(proposal, verdict)

    def _best_number(self, requests: int, most: int) -> tuple[float, int]:
        """Tokens per second that can be expected, and the number of drafts to ask for."""
        gains = self._expected.gains
        assert gains is not None
        found = []
        for number in sizes_up_to(most):
            found.append((float(self._rates(gains[: number + 1], requests, number).max()), number))
        best = max(rate for rate, _ in found)
        return best, max(number for rate, number in found if rate >= SLACK * best)

    def _best_first(self, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """Drafts of each request from the best on [R, N], and expected accepted ones of the n best [N + 1]."""
        meant = torch.arange(proposal.tokens.shape[1], device=proposal.tokens.device) < proposal.num_drafts[:, None]
        chances = self._acceptance.chances(proposal) * meant
        order = best_first(proposal)
        gains = chances.gather(1, order).cumsum(1).mean(0)  # of the n best drafts of a request
        return order, torch.cat((gains.new_zeros(1), gains)).cpu()

    def _rates(self, gains: Tensor, requests: int, asked: int) -> Tensor:
        """Tokens per second of cycles with 0, 1, .. drafts per request of those asked for, which are paid for."""
        seconds = [self._seconds(requests, n, asked) for n in range(len(gains))]
        return requests * (1 + gains) / torch.tensor(seconds, dtype=torch.double)

    def _plain(self, requests: int) -> float:
        """Tokens per second without drafts."""
        return requests / self._seconds(requests, 0, 0)

    def _modelled(self, requests: int, num_drafts: int, asked: int) -> float:
        drafting = self.costs.draft(requests, asked) if asked else 0.0
        return self.costs.verify(requests, num_drafts + 1) + drafting

    def _seconds(self, requests: int, num_drafts: int, asked: int) -> float:
        modelled = self._modelled(requests, num_drafts, asked)
        return self._clock.seconds(requests, num_drafts, asked > 0, modelled)


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
        self.gains: Tensor | None = None
        """[N + 1], for n = 0, 1, ..; None before anything was seen."""
        self._added = torch.zeros(0, dtype=torch.double)
        """[N]."""
        self._variance = torch.zeros(0, dtype=torch.double)
        """[N], in variances of what one request promises."""

    def age(self) -> None:
        """A cycle goes by."""
        self._variance += DRIFT

    def see(self, gains: Tensor, requests: int, asked: int) -> None:
        """Take in what was promised to so many requests, of whom each was to have as many drafts as `asked`."""
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
        self.gains = F.pad(self._added.cumsum(0), (1, 0))


class _Clock:
    """What kinds of cycles take, by the cost model and by how far each kind was off lately.

    How fast the machine is changes for all kinds alike, and is told apart from what is wrong with the model: else
    drafting would look cheap whenever a machine slows down while nothing is drafted.
    """

    def __init__(self) -> None:
        self._pace: float | None = None
        """Natural logarithm of seconds over the cost model's, lately."""
        self._offsets: dict[tuple[int, bool], dict[int, tuple[float, float]]] = {}
        """By requests and whether it drafted, then drafts verified per request: the same beyond the pace, and the
        weight of what was seen."""

    def observe(self, requests: int, num_drafts: int, drafted: bool, modelled: float, seconds: float) -> None:
        """A cycle took so long."""
        off = math.log(seconds / modelled)
        if self._pace is None:
            self._pace = off
        expected = self._offset(requests, num_drafts, drafted)
        surprise = min(max(off - self._pace - expected, -FARTHEST_OFF), FARTHEST_OFF)
        kinds = self._offsets.setdefault((requests, drafted), {})
        offset, weight = kinds.get(num_drafts, (0.0, 0.0))
        weight = min(weight + 1, MOST_WEIGHT)
        kinds[num_drafts] = offset + (expected + surprise - offset) / weight, weight
        self._pace += (
            PACE * (weight - 1) / (weight + OFFSET_PRIOR) * surprise
        )  # what surprises in a new kind is its own

    def seconds(self, requests: int, num_drafts: int, drafted: bool, modelled: float) -> float:
        """That a cycle will take."""
        return modelled * math.exp((self._pace or 0.0) + self._offset(requests, num_drafts, drafted))

    def _offset(self, requests: int, num_drafts: int, drafted: bool) -> float:
        """Of a kind; as long as little was seen of it, mostly what those like it have in common."""
        near = min(
            (r for r, d in self._offsets if d == drafted), key=lambda r: abs(math.log(r / requests)), default=None
        )
        if near is None:
            return 0.0
        kinds = self._offsets[near, drafted]
        common = sum(offset * weight for offset, weight in kinds.values()) / sum(w for _, w in kinds.values())
        offset, weight = kinds.get(num_drafts, (0.0, 0.0)) if near == requests else (0.0, 0.0)
        return (offset * weight + common * OFFSET_PRIOR) / (weight + OFFSET_PRIOR)


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
