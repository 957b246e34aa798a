"""Static cycles: propose, verify, commit and advance in memory allocated before, while the host never waits inside.

Every tensor shape in a cycle depends on its `Shape` alone: how many slots, how many rows of context (the *extent*: a
bucket that holds the longest text, whose further rows are masked), how many drafts, and which warpers the requests'
settings need. So on CUDA each shape becomes one CUDA graph, which is captured once and replayed; the CPU version runs
the same function eagerly and exists for tests. What changes between cycles (settings, limits and stop tokens of the
requests) lies in tensors that are filled in place.

The host reads what a cycle decided while the next one runs. So the device itself decides whether a request has ended (a
stop token, its limit, values that are not finite): it is no longer *active*, and commits nothing more. A cycle without
active requests changes nothing. Stop strings and cancelled requests, which only the host can see, cost one cycle.

The engine reaches all of this through `static_cycles` and `StaticCycles.step`.

Shapes: R requests, N drafts that are verified, O drafts that are offered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from domino_spec.decoding.cycle import (
    Drafter,
    DraftPlan,
    DraftPolicy,
    ObservedCycle,
    Proposal,
    State,
    Verdict,
    best_drafts,
    commit,
    verify,
)
from domino_spec.decoding.graphs.capture import Graphs
from domino_spec.decoding.request import CycleResult, Slot
from domino_spec.decoding.sampling import Sampling, SamplingSettings, Warpers
from domino_spec.target.cache import RowCache
from domino_spec.target.model import Target

_log = logging.getLogger(__name__)

STEP = 256
"""Least distance of two extents, in rows."""
MOST_STOPS = 16
"""Stop tokens of a request that the device checks; the host sees the others, a cycle late."""
_ACCEPTED, _DRAFTS, _OFFERED, _FINITE, _ENDED, _TOKENS = range(6)
"""Columns of `StaticCycles.decided`; the path follows the tokens."""


@dataclass(frozen=True)
class Shape:
    """What all shapes in a cycle depend on."""

    requests: int
    """Slots, the first ones."""
    extent: int
    """Rows of context."""
    offered: int
    """Drafts that the drafter is asked for; 0 skips drafting."""
    verified: int
    """How many of the best of them the target verifies."""
    warpers: Warpers
    """Those that the requests' settings need."""


@dataclass(frozen=True)
class StaticResult(CycleResult):
    """The decisions of a static cycle, and the figures that the policy learns from."""

    num_offered: list[int] = ()  # type: ignore[assignment]
    ended: list[bool] = ()  # type: ignore[assignment]
    """Whether the device has seen a request's end in this cycle."""
    confidence: Tensor | None = None
    """[R, O], of the offered drafts; see `Proposal`."""
    path: Tensor | None = None
    """[R, N + 1], see `Verdict`."""
    seconds: float = 0.0
    """Seconds of the cycle on its device."""


class PendingCycle:
    """A cycle that was started and whose result the host has not read yet.

    Args:
        shape: of the cycle.
        slots: its requests, in the order of its rows.
        plan: of the policy; None if it did not decide.
        buffers: on the host, for what it decided: [slots, columns] int64 and [slots, O] float32.
        layout: drafts that it offered and verified, whether with confidences, whether trees.
        timer: of the cycle.
    """

    def __init__(
        self,
        shape: Shape,
        slots: list[Slot],
        plan: DraftPlan | None,
        buffers: tuple[Tensor, Tensor],
        layout: tuple[int, int, bool, bool],
        timer: _Timer,
    ) -> None:
        self.shape, self.slots, self.plan = shape, slots, plan
        self._buffers, self._layout, self._timer = buffers, layout, timer

    @property
    def offered(self) -> int:
        """The most drafts of a request that the drafter proposed."""
        return self._layout[0]

    def wait(self) -> StaticResult:
        """Wait for the cycle's result."""
        seconds = self._timer.wait()
        count, (offered, verified, has_confidence, is_tree) = len(self.slots), self._layout
        decided, confidence = (b[:count] for b in self._buffers)
        columns = decided[:, :_TOKENS].T.tolist()
        most = (decided.shape[1] - _TOKENS) // 2
        return StaticResult(
            slots=self.slots,
            tokens=decided[:, _TOKENS : _TOKENS + verified + 1].tolist(),
            num_accepted=columns[_ACCEPTED],
            num_drafts=columns[_DRAFTS],
            finite=[bool(value) for value in columns[_FINITE]],
            num_offered=columns[_OFFERED],
            ended=[bool(value) for value in columns[_ENDED]],
            confidence=confidence[:, :offered].clone() if has_confidence else None,
            path=decided[:, _TOKENS + most :][:, : verified + 1].clone() if is_tree else None,
            seconds=seconds,
        )

    def observed(self, result: StaticResult) -> ObservedCycle | None:
        """What the policy learns from; None if it did not decide, or no request was active."""
        rows = [row for row, accepted in enumerate(result.num_accepted) if accepted >= 0]
        if self.plan is None or not rows:
            return None
        tokens = torch.zeros(len(rows), self.offered, dtype=torch.long)
        counts = torch.tensor([result.num_offered[row] for row in rows])
        confidence = None if result.confidence is None else result.confidence[rows]
        offered = Proposal(tokens, counts, confidence=confidence)
        proposal = best_drafts(offered, self.shape.verified)
        accepted = torch.tensor([result.num_accepted[row] for row in rows])
        tokens = torch.zeros(len(rows), proposal.tokens.shape[1] + 1, dtype=torch.long)
        path = None if result.path is None else result.path[rows]
        verdict = Verdict(tokens, accepted, None, torch.zeros_like(accepted), accepted >= 0, path)
        return ObservedCycle(self.plan, offered, proposal, verdict, None if self.plan.trial else result.seconds)


def is_static(drafter: Drafter) -> bool:
    """Whether a drafter can be part of a static cycle; one without an attribute `static` cannot.

    Its `propose` and `advance` then never wait for the device, and what they allocate has shapes that depend on the
    number of requests, the extent and `num_drafts` alone. Requests with `num_accepted` -1 have ended: `advance` leaves
    theirs alone.
    """
    return bool(getattr(drafter, "static", False))


def static_cycles(
    target: Target,
    drafter: Drafter,
    state: State,
    cache: RowCache,
    num_drafts: int,
    matching_rule: bool = False,
    policy: DraftPolicy | None = None,
) -> StaticCycles | None:
    """The static cycles of an engine; None, and a warning, if its drafter cannot be part of one. See `StaticCycles`."""
    if not is_static(drafter):
        _log.warning("cycles are ordinary ones, which wait for the host: the drafter works there in part")
        return None
    return StaticCycles(target, drafter, state, cache, num_drafts, matching_rule, policy)


class StaticCycles:
    """Runs static cycles over an engine's slots.

    Args:
        target: the frozen model.
        drafter: one that `is_static`.
        state: of all slots.
        cache: the drafter's, for all slots.
        num_drafts: offered in a cycle at most.
        matching_rule: see `verify`.
        policy: see `Engine`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        state: State,
        cache: RowCache,
        num_drafts: int,
        matching_rule: bool = False,
        policy: DraftPolicy | None = None,
    ) -> None:
        self.target, self.drafter, self.matching_rule = target, drafter, matching_rule
        self.policy, self.num_drafts = policy, num_drafts
        slots, device = len(state.tokens), target.device
        self.state, self.cache = state, cache
        self.sampling = Sampling([SamplingSettings()] * slots, device)
        """A row of settings for each slot, filled in place."""
        self._limits = torch.ones(slots, dtype=torch.long, device=device)
        self._stops = torch.full((slots, MOST_STOPS), -1, device=device)
        columns = _TOKENS + 2 * (num_drafts + 1)
        self.decided = torch.zeros(slots, columns, dtype=torch.long, device=device)
        """What a cycle decided, in columns."""
        self._confidence = torch.zeros(slots, num_drafts, device=device)
        pinned = device.type == "cuda"
        # Two, filled in turn: the host reads one while a cycle fills the other.
        self._on_host = [(_on_host(self.decided, pinned), _on_host(self._confidence, pinned)) for _ in range(2)]
        self._layouts: dict[Shape, tuple[int, int, bool, bool]] = {}
        self._loaded: list[Slot] = []
        self._warpers = Warpers()
        self.launched = 0
        """Cycles so far."""
        self.pending: PendingCycle | None = None
        self._last: StaticResult | None = None
        for place in range(slots):
            self.park(place)
        self.graphs = Graphs(target, state.active)

    def takes(self, slots: Sequence[Slot]) -> bool:
        """Whether these requests take static cycles: none of them wants log-probabilities, or a cycle is pending."""
        return self.pending is not None or all(slot.request.top_logprobs is None for slot in slots)

    def step(self, slots: Sequence[Slot]) -> StaticResult | None:
        """Start a cycle of the first slots; returns the result of the cycle before, None if there is none.

        If one of them wants log-probabilities, the cycle before is only waited for.
        """
        before, self.pending = self.pending, None
        if self._last is not None:
            for slot, accepted, ended in zip(self._last.slots, self._last.num_accepted, self._last.ended, strict=True):
                assert slot.generation.finish_reason or (accepted >= 0 and not ended), "it would stand still for ever"
        if all(slot.request.top_logprobs is None for slot in slots):
            # The policy does not decide if a request samples its drafts: their number would decide its text.
            samples = self.drafter.samples and any(not slot.request.settings.greedy for slot in slots)
            asked = self.policy is not None and self.num_drafts > 0 and not samples
            plan = self.policy.plan(len(slots), self.num_drafts) if self.policy is not None and asked else None
            self.pending = self.launch(list(slots), before, plan)
        if before is None:
            return None
        self._last = before.wait()
        observed = before.observed(self._last)
        if self.policy is not None and observed is not None:
            self.policy.observe(observed)
        return self._last

    def park(self, place: int) -> None:
        """Give a slot without a request something harmless to decode: a cycle may read it."""
        state = self.state
        state.active[place] = False
        state.tokens[place, 0] = 0
        state.lengths[place] = 1
        state.cache.lengths[place] = 0
        self.cache.clear(place)

    def launch(self, slots: list[Slot], before: PendingCycle | None, plan: DraftPlan | None) -> PendingCycle:
        """Start a cycle of the first slots.

        Args:
            slots: its requests.
            before: the cycle before, if its result was not read yet.
            plan: of the policy; None for all drafts. Numbers are rounded up to powers of two, since each has a graph.
        """
        offered = verified = self.num_drafts
        if plan is not None:
            offered = self.num_drafts if plan.trial else min(_power_of_two(plan.drafts), self.num_drafts)
            verified = min(_power_of_two(plan.verified), offered)
        warpers = self._load(slots)
        not_read = 0 if before is None else before.shape.verified + 1
        rows = max(slot.length for slot in slots) + not_read + verified
        shape = Shape(
            min(_power_of_two(len(slots)), len(self._limits)),
            min(extent_of(rows), self.state.cache.capacity),
            offered,
            verified,
            warpers,
        )
        buffers = self._on_host[self.launched % 2]
        self.launched += 1
        run = self.graphs.runner(shape, partial(self.cycle, shape))
        timer = _Timer(self.target.device)
        run()
        timer.stop()
        for on_host, on_device in zip(buffers, (self.decided, self._confidence), strict=True):
            on_host.copy_(on_device, non_blocking=True)
        timer.copied()
        return PendingCycle(shape, slots, plan, buffers, self._layouts[shape], timer)

    def _load(self, slots: list[Slot]) -> Warpers:
        """Make the settings and limits of the first slots those of these requests; returns the warpers they need."""
        if slots != self._loaded:
            self._loaded, count = slots, len(slots)
            self._warpers = self.sampling.load([slot.request.settings for slot in slots], self.target.vocab_size)
            self._limits[:count].copy_(torch.tensor([slot.request.limits.max_new_tokens for slot in slots]))
            stops = torch.full((count, MOST_STOPS), -1)
            for row, slot in zip(stops, slots, strict=True):
                ids = sorted(slot.ending.stop_token_ids)[:MOST_STOPS]
                row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
            self._stops[:count].copy_(stops)
        return self._warpers

    def cycle(self, shape: Shape) -> None:
        """Decode the active ones of the first slots by one cycle; this is what is captured."""
        sampling = self.sampling.view(shape.requests, shape.warpers)
        state = self.state.view(0, shape.requests, sampling, shape.extent)
        cache = self.cache.view(0, shape.requests, shape.extent)
        offer = proposal = Proposal.empty(shape.requests, state.tokens.device)
        if shape.offered > 0:
            offer = self.drafter.propose(state, cache, shape.offered)
            proposal = best_drafts(offer, shape.verified)
        verdict = verify(self.target, state, proposal, self.drafter.feature_layers, self.matching_rule)
        verdict = replace(verdict, num_accepted=torch.where(state.active, verdict.num_accepted, -1))
        commit(state, verdict)
        self.drafter.advance(cache, verdict)
        self._record(shape, offer, proposal, verdict, self._end(state, verdict))

    def _end(self, state: State, verdict: Verdict) -> Tensor:
        """Which requests ended in this cycle, [R]; they are no longer active."""
        requests, width = verdict.tokens.shape
        fresh = torch.arange(width, device=verdict.tokens.device) <= verdict.num_accepted[:, None]
        stops = (verdict.tokens[..., None] == self._stops[:requests, None]).any(-1)
        full = state.lengths - state.prompt_lengths >= self._limits[:requests]
        ended = state.active & ((stops & fresh).any(1) | full | ~verdict.finite)
        state.active &= ~ended
        return ended

    def _record(self, shape: Shape, offer: Proposal, proposal: Proposal, verdict: Verdict, ended: Tensor) -> None:
        """Write what was decided into the tensors that are copied to the host."""
        decided = self.decided[: shape.requests]
        for column, values in (
            (_ACCEPTED, verdict.num_accepted),
            (_DRAFTS, proposal.num_drafts),
            (_OFFERED, offer.num_drafts),
            (_FINITE, verdict.finite),
            (_ENDED, ended),
        ):
            decided[:, column].copy_(values)
        width, most = verdict.tokens.shape[1], (decided.shape[1] - _TOKENS) // 2
        decided[:, _TOKENS : _TOKENS + width].copy_(verdict.tokens)
        if verdict.path is not None:
            decided[:, _TOKENS + most :][:, :width].copy_(verdict.path)
        if offer.confidence is not None:
            self._confidence[: shape.requests, : offer.confidence.shape[1]].copy_(offer.confidence)
        offered, is_tree = offer.tokens.shape[1], verdict.path is not None
        self._layouts[shape] = (offered, width - 1, offer.confidence is not None, is_tree)


def extent_of(rows: int) -> int:
    """The bucket that holds `rows` rows: a multiple of 256, and of a quarter of the largest power of two below.

    Beyond 1024 rows a cycle reads at most a quarter more than it needs to, and there are few buckets.
    """
    step = max(STEP, (1 << (max(rows - 1, 1).bit_length() - 1)) // 4)
    return -(-rows // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _on_host(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


class _Timer:
    """Measures a cycle on its device, and waits for the copies of its result."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        if self._cuda:
            self._started, self._stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._copied = torch.cuda.Event()
            self._started.record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """To be called once the cycle is launched."""
        if self._cuda:
            self._stopped.record()
        else:
            self._seconds = time.perf_counter() - self._began

    def copied(self) -> None:
        """To be called once the copies of its result are launched."""
        if self._cuda:
            self._copied.record()

    def wait(self) -> float:
        """Wait for the copies; seconds of the cycle."""
        if self._cuda:
            self._copied.synchronize()
            return self._started.elapsed_time(self._stopped) / 1000
        return self._seconds
