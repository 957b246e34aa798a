"""How many drafts pay: chosen for every cycle, from what passes cost and from what was accepted lately.

Every draft costs a row of the verify pass, whether it is accepted or not. With few requests a pass waits for the
weights, and rows are cheap; with many requests rows are expensive, and at some number of requests no draft pays. The
policy takes the number of drafts with the most expected tokens per second, or none. It learns three running averages:

- `_Acceptance`: how often drafts of a confidence are accepted;
- `_Gains`: how many of a request's n best drafts will be accepted, for every n;
- `_Excess`: by how much drafted cycles are slower than the cost model says, compared with plain ones.

While it drafts, a plain cycle now and then shows what plain decoding takes. While it does not, a *trial* now and then
drafts for a few requests, without verifying, and shows whether drafting would pay. Both are paid from one budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import DraftPlan, ObservedCycle, Proposal, Verdict, best_drafts, best_first
from domino_spec.decoding.policy.costs import CostModel, sizes_up_to

BUDGET = 0.005
"""Share of the time that may be lost to plain cycles and trials which only serve to learn."""
SAVED = 0.5
"""Most unused budget that is kept, and most debt, in plain cycles."""
BUDGET_AT_START = 0.25
"""In plain cycles: half of `SAVED`, since many batches last for forty cycles only."""
START_DRAFTING = 1.10
"""Drafting starts when it promises this many times the tokens per second of plain decoding. It stops below 1."""
CLEARLY = 1.2
"""If drafting promises less than this and was compared with plain decoding too seldom, every other cycle is plain."""
COMPARISONS = 8
"""Changes between plain and drafted cycles, with about as many requests, after which they were compared enough."""
FREE = 0.01
"""If drafting takes less than this share of a plain cycle, it is always tried: a look-up costs nothing."""
NEARLY_BEST = 0.99
"""More drafts are asked for if they promise this share of the best rate, since some cycles are better than others."""
FADE = 0.96
"""Weight that an earlier cycle keeps, per cycle, in the expected number of accepted drafts."""
DOUBT = 0.5
"""Requests without accepted drafts that are added to that average, so that one lucky request decides nothing. For R
requests it begins with the square root of R times as many: a first trial sees few of them."""
CLASSES = 16
"""Classes of confidence (equal steps of its square root), and of places if a draft has no confidence."""
PRIOR = 3.0
"""Drafts of a class, accepted as often as the draft's confidence says, that are added to those counted."""
MEMORY = 0.99
"""Weight that earlier counts of accepted drafts keep, per cycle that verifies drafts."""
FIRST_STEP = 0.5
"""How far the first comparison moves the excess; the n-th moves it n times less, and the k-th cycle of a run of drafted
(or plain) cycles k**2 times less than its first."""
LEAST_STEP = 0.1
"""How far a comparison moves the excess at least."""
LARGEST_STEP = 0.4
"""Largest difference that one cycle can show, in logarithms of seconds: the machine may have stood still meanwhile."""
RUN = 8
"""Cycles over which the seconds of a run are averaged."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePlan(DraftPlan):
    """A plan that chooses which of the offered drafts to verify."""

    policy: AdaptivePolicy

    def cut(self, proposal: Proposal) -> Proposal:
        """The best n drafts of every request, for the n that pays most; n may be 0."""
        return best_drafts(proposal, self.policy.number_that_pays(self, proposal))


class AdaptivePolicy:
    """The number of drafts with the most expected tokens per second; a `DraftPolicy`.

    Args:
        costs: seconds of passes and of drafting.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self._acceptance, self._gains, self._excess = _Acceptance(), _Gains(), _Excess()
        self._most = 0
        """Drafts of each request that a trial asks for."""
        self._drafting = False
        """Whether drafting pays; a plain cycle in between does not change that."""
        self._budget = BUDGET_AT_START
        """Plain cycles that may still be lost on learning."""
        self._promise: tuple[Proposal, list[float]] | None = None
        """The newest proposal and what it promises, which `cut` and `observe` both ask for."""
        self._verify_seconds, self._draft_seconds = lru_cache(4096)(costs.verify), lru_cache(4096)(costs.draft)

    def plan(self, requests: int, most: int) -> DraftPlan:
        """Choose the number of drafts per request, at most `most`."""
        self._most = most
        self._gains.fade()
        self._budget = min(self._budget + BUDGET, SAVED)
        gains = self._gains.expected(requests, most)
        rates = {n: self._rates(gains[: n + 1], requests, n) for n in sizes_up_to(most)}
        best = max(map(max, rates.values()))
        drafts = max(n for n, rate in rates.items() if max(rate) >= NEARLY_BEST * best)
        draft = AdaptivePlan(requests, drafts, rates[drafts].index(max(rates[drafts])), policy=self)
        if self._draft_seconds(requests, drafts) < FREE * self._verify_seconds(requests, 1):
            return draft
        over_plain = best / self._rates([0.0], requests, 0)[0]
        self._drafting = over_plain > (1 if self._drafting else START_DRAFTING)
        learn, plain = self._budget > 0, DraftPlan(requests, 0, 0)
        if not self._drafting and over_plain * math.exp(self._excess.of(requests)) < START_DRAFTING:
            return replace(plain, trial=learn)
        if self._drafting and over_plain < CLEARLY and self._excess.comparisons(requests) < COMPARISONS:
            return plain if self._excess.drafted else draft
        # Either drafting pays, or it would if it were as fast as the cost model says. Only the other kind of cycle
        # shows how fast it is, and costs what it loses.
        if learn:
            self._pay(max(abs(1 - over_plain), START_DRAFTING - 1))
        return draft if self._drafting != learn else plain

    def observe(self, cycle: ObservedCycle) -> None:
        """Learn from what a cycle promised, what it accepted and how long it took."""
        plan, num_drafts = cycle.plan, cycle.proposal.tokens.shape[1]
        requests, offered = cycle.offered.tokens.shape
        if plan.drafts or plan.trial:
            self._gains.add(self._promised(cycle.offered), requests, max(plan.drafts or self._most, offered))
        if plan.trial:
            spent = cycle.trial_seconds or self._draft_seconds(requests, max(offered, 1))
            self._pay(spent / (cycle.seconds or self._verify_seconds(plan.requests, 1)))
        if num_drafts:
            self._acceptance.count(cycle.proposal, cycle.verdict)
        if cycle.seconds is not None:
            modelled = self._modelled(plan.requests, num_drafts, plan.drafts)
            self._excess.observe(plan.requests, plan.drafts > 0, math.log(cycle.seconds / modelled))

    def number_that_pays(self, plan: DraftPlan, proposal: Proposal) -> int:
        """How many of the proposed drafts of each request to verify."""
        rates = self._rates(self._promised(proposal), plan.requests, plan.drafts)
        return rates.index(max(rates))

    def _pay(self, plain_cycles: float) -> None:
        self._budget = max(self._budget - plain_cycles, -SAVED)  # one slow cycle does not end all learning

    def _promised(self, proposal: Proposal) -> list[float]:
        """Expected accepted ones of a request's n best drafts, for n = 0, 1, .., N."""
        if self._promise is None or self._promise[0] is not proposal:
            added = self._acceptance.chances(proposal).gather(1, best_first(proposal)).mean(0)
            self._promise = proposal, [0.0, *added.cumsum(0).tolist()]
        return self._promise[1]

    def _rates(self, gains: list[float], requests: int, asked: int) -> list[float]:
        """Tokens per second of cycles that ask for `asked` drafts and verify the best 0, 1, .. of them."""
        slower = math.exp(self._excess.of(requests)) if asked else 1.0
        seconds = [self._modelled(requests, n, asked) * slower for n in range(len(gains))]
        return [requests * (1 + gained) / spent for gained, spent in zip(gains, seconds, strict=True)]

    def _modelled(self, requests: int, num_drafts: int, asked: int) -> float:
        drafting = self._draft_seconds(requests, asked) if asked else 0.0
        return self._verify_seconds(requests, num_drafts + 1) + drafting


class _Acceptance:
    """How often drafts like a given one were accepted: by their confidence, or by their place if they have none."""

    def __init__(self) -> None:
        classes = torch.arange(CLASSES, dtype=torch.double)
        self._believed = torch.cat((((classes + 0.5) / CLASSES) ** 2, 1 / (classes + 2)))
        self._seen = self._accepted = torch.zeros_like(self._believed)

    def chances(self, proposal: Proposal) -> Tensor:
        """Expected share of acceptance of each draft, [R, N]; 0 for entries that are no drafts."""
        rates = (self._accepted + PRIOR * self._believed) / (self._seen + PRIOR)
        return rates.to(proposal.tokens.device)[_classes(proposal)] * _valid(proposal)

    def count(self, proposal: Proposal, verdict: Verdict) -> None:
        """Count what a cycle accepted."""
        requests, num_drafts = proposal.tokens.shape
        valid = _valid(proposal)
        on_path = torch.arange(num_drafts, device=valid.device) < verdict.num_accepted[:, None]
        if verdict.path is None:
            accepted = on_path
        else:
            rows = torch.where(on_path, verdict.path[:, 1:], 0)  # row 0 is the anchor's
            accepted = torch.zeros(requests, num_drafts + 1, dtype=torch.bool, device=valid.device)
            accepted = accepted.scatter(1, rows, True)[:, 1:]
        classes = _classes(proposal)
        seen, hits = (classes[which].cpu().bincount(minlength=2 * CLASSES) for which in (valid, accepted & valid))
        self._seen, self._accepted = self._seen * MEMORY + seen, self._accepted * MEMORY + hits


class _Gains:
    """How many of a request's n best drafts will be accepted: a running average of what the n-th one adds."""

    def __init__(self) -> None:
        self._sums = self._weights = torch.zeros(0, dtype=torch.double)  # [N] each
        self._newness = 1.0
        """Fades from 1 to 0."""

    def fade(self) -> None:
        """Reduce the weight of earlier cycles; called once in every cycle."""
        self._sums, self._weights, self._newness = self._sums * FADE, self._weights * FADE, self._newness * FADE

    def add(self, promised: list[float], requests: int, asked: int) -> None:
        """Add what `requests` requests were promised, when each was asked for `asked` drafts."""
        added = torch.tensor(promised, dtype=torch.double).diff()
        missing = max(asked - len(self._sums), 0)
        self._sums, self._weights = F.pad(self._sums, (0, missing)), F.pad(self._weights, (0, missing))
        self._sums[: len(added)] += requests * added
        self._weights[:asked] += requests  # a drafter may leave out drafts that it doubts

    def expected(self, requests: int, most: int) -> list[float]:
        """For n = 0, 1, .., most."""
        doubt = DOUBT * (1 + self._newness * (math.sqrt(requests) - 1))
        gains = (self._sums / (self._weights + doubt)).cumsum(0).tolist()[:most]
        last = gains[-1] if gains else 0.0
        return [0.0, *gains, *[last] * (most - len(gains))]


class _Excess:
    """By how much drafted cycles are slower than the cost model says, relative to plain ones: logarithms of seconds.

    The speed of the machine changes for all cycles alike. So a cycle is only compared with the cycles of the other kind
    just before it, and says nothing if there were none. One of them may have been slow by chance, so the more
    comparisons there were, the less each of them changes.
    """

    def __init__(self) -> None:
        self._excess: dict[int, float] = {}
        """By number of requests."""
        self._comparisons: dict[int, int] = {}
        """Changes from plain to drafted cycles or back, by number of requests."""
        self._averages, self._lengths = [0.0, 0.0], [0, 0]
        """Mean of `over_model` and number of cycles, of the newest run of plain cycles and of drafted ones."""
        self.drafted = False
        """Whether the newest cycle drafted."""

    def of(self, requests: int) -> float:
        """The excess for this number of requests, or for the nearest number that was seen."""
        return self._excess.get(self._nearest(requests), 0.0)

    def comparisons(self, requests: int) -> int:
        """Comparisons for this number of requests, or for the nearest one if it is at most twice or half as large."""
        nearest = self._nearest(requests)
        return self._comparisons.get(nearest, 0) if max(nearest, requests) <= 2 * min(nearest, requests) else 0

    def _nearest(self, requests: int) -> int:
        return min(self._excess, key=lambda seen: abs(math.log(seen / requests)), default=requests)

    def observe(self, requests: int, drafted: bool, over_model: float) -> None:
        """Learn from one cycle; `over_model` is the logarithm of its seconds over those of the cost model."""
        changed = drafted != self.drafted
        if changed:
            self.drafted, self._lengths[drafted] = drafted, 0
        self._lengths[drafted] += 1
        length = self._lengths[drafted]
        self._averages[drafted] += (over_model - self._averages[drafted]) / min(length, RUN)
        if self._lengths[not drafted]:
            difference = over_model - self._averages[not drafted]
            surprise = (difference if drafted else -difference) - self.of(requests)
            count = self.comparisons(requests) + changed
            step = max(FIRST_STEP / max(count, 1), LEAST_STEP) / length**2
            excess = self.of(requests) + step * min(max(surprise, -LARGEST_STEP), LARGEST_STEP)
            self._excess[requests], self._comparisons[requests] = excess, count


def _valid(proposal: Proposal) -> Tensor:
    """Which of the entries are drafts, [R, N] bool."""
    return torch.arange(proposal.tokens.shape[1], device=proposal.tokens.device) < proposal.num_drafts[:, None]


def _classes(proposal: Proposal) -> Tensor:
    """Class of each draft, [R, N]."""
    if proposal.confidence is None:
        places = torch.arange(proposal.tokens.shape[1], device=proposal.tokens.device)
        return (CLASSES + places).clamp(max=2 * CLASSES - 1).expand(proposal.tokens.shape)
    return (proposal.confidence.clamp(0, 1).sqrt() * CLASSES).long().clamp(max=CLASSES - 1)
