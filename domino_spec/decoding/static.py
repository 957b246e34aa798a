"""The static cycle: propose, verify, commit and advance, without a look at the device and in memory allocated before.

Every shape in it depends on a `Shape` alone: how many slots, how many rows of context (the *extent*: a bucket that
holds the longest text, whose further rows are masked), how many drafts, and what the requests' settings need. So the
function that runs eagerly on a CPU is, on CUDA, captured as one graph per shape and replayed; what changes between
cycles, the settings, limits and stop tokens of those being decoded, lies in tensors that are filled in place.

The host hears of a cycle while the next one runs. So the device itself decides when a request has ended (a stop token,
its limit, values that are not finite): it is no longer *active*, and commits nothing more. A cycle with nobody active
changes nothing. What only the host can see, stop strings and cancelled requests, costs one cycle for nothing.

Shapes: R requests, N drafts that are verified, O drafts that are offered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from domino_spec.decoding.drafter import Cycle, Drafter, DraftPlan
from domino_spec.decoding.slots import Slot
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.decoding.static_graphs import Graphs
from domino_spec.decoding.static_sampling import Kind, SettingsTable
from domino_spec.decoding.tree import best_drafts
from domino_spec.decoding.verify import commit, verify
from domino_spec.target.model import Target

STEP = 256
"""Least distance of two extents, in rows."""
MOST_STOPS = 16
"""Stop tokens of a request that the device looks for; the host sees the others, a cycle late."""
_ACCEPTED, _DRAFTS, _OFFERED, _SOUND, _ENDED, _TOKENS = range(6)
"""Columns of what a cycle decided; tokens are followed by the path."""


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
    """The best of them, which the target verifies."""
    kind: Kind
    """Of the requests' settings."""


@dataclass(frozen=True)
class Heard:
    """What a cycle decided, on the host; a list has an entry for each of R requests."""

    accepted: list[int]
    """Accepted drafts, without the bonus; -1 for those that had ended before."""
    num_drafts: list[int]
    num_offered: list[int]
    sound: list[bool]
    ended: list[bool]
    """Whether the device has seen a request's end in this cycle."""
    tokens: list[list[int]]
    """As `Verdict.tokens`."""
    confidence: Tensor | None
    """[R, O], of what was offered; see `Proposal`."""
    path: Tensor | None
    """[R, N + 1], see `Verdict`."""
    seconds: float
    """Of the cycle, on its device."""


class Flight:
    """A cycle that was started and not yet heard of.

    Args:
        shape: of the cycle.
        slots: whom it decodes, in the order of its rows.
        plan: of the policy; None if it had no say.
        buffers: where it tells what it decided: [slots, columns] int64 and [slots, O] float32.
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
        """Drafts of a request, at most, that the drafter came up with."""
        return self._layout[0]

    def hear(self) -> Heard:
        """Wait until the cycle has told what it decided."""
        seconds = self._timer.wait()
        count, (offered, verified, has_confidence, is_tree) = len(self.slots), self._layout
        decided, confidence = (b[:count] for b in self._buffers)
        columns = decided[:, :_TOKENS].T.tolist()
        most = (decided.shape[1] - _TOKENS) // 2
        return Heard(
            accepted=columns[_ACCEPTED],
            num_drafts=columns[_DRAFTS],
            num_offered=columns[_OFFERED],
            sound=[bool(s) for s in columns[_SOUND]],
            ended=[bool(e) for e in columns[_ENDED]],
            tokens=decided[:, _TOKENS : _TOKENS + verified + 1].tolist(),
            confidence=confidence[:, :offered].clone() if has_confidence else None,
            path=decided[:, _TOKENS + most :][:, : verified + 1].clone() if is_tree else None,
            seconds=seconds,
        )

    def cycle(self, heard: Heard, rows: list[int]) -> Cycle:
        """What the policy is told: what was offered to the requests in these rows, and accepted."""
        assert self.plan is not None
        tokens = torch.zeros(len(rows), self.offered, dtype=torch.long)
        counts = torch.tensor([heard.num_offered[r] for r in rows])
        confidence = None if heard.confidence is None else heard.confidence[rows]
        offered = Proposal(tokens, counts, confidence=confidence)
        proposal = best_drafts(offered, self.shape.verified)
        accepted = torch.tensor([heard.accepted[r] for r in rows])
        tokens = torch.zeros(len(rows), proposal.tokens.shape[1] + 1, dtype=torch.long)
        path = None if heard.path is None else heard.path[rows]
        verdict = Verdict(tokens, accepted, None, torch.zeros_like(accepted), accepted >= 0, path)
        return Cycle(self.plan, offered, proposal, verdict, None if self.plan.trial else heard.seconds)


class StaticCycles:
    """Runs static cycles over an engine's slots.

    Args:
        target: the frozen model.
        drafter: one that `is_static`.
        state: of all slots.
        own: the drafter's caches for all slots.
        num_drafts: offered in a cycle at most.
        matching_rule: see `verify`.
    """

    def __init__(
        self, target: Target, drafter: Drafter, state: State, own: Any, num_drafts: int, matching_rule: bool = False
    ) -> None:
        self.target, self.drafter, self.matching_rule = target, drafter, matching_rule
        self.num_drafts = num_drafts
        slots, device = len(state.tokens), target.device
        self._state, self._own = state, own
        self._table = SettingsTable(slots, target.vocab_size, device)
        self._limits = torch.ones(slots, dtype=torch.long, device=device)
        self._stops = torch.full((slots, MOST_STOPS), -1, device=device)
        columns = _TOKENS + 2 * (num_drafts + 1)
        self._decided = torch.zeros(slots, columns, dtype=torch.long, device=device)
        self._confidence = torch.zeros(slots, num_drafts, device=device)
        pinned = device.type == "cuda"
        # Two, filled in turn: the host reads one while a cycle tells the other.
        self._told = [(_on_host(self._decided, pinned), _on_host(self._confidence, pinned)) for _ in range(2)]
        self._layouts: dict[Shape, tuple[int, int, bool, bool]] = {}
        self._loaded: list[Slot] = []
        self._kind = Kind()
        self._flights = 0
        self.rest(0, slots)
        self.graphs = Graphs(target, state.active)

    def rest(self, first: int, last: int) -> None:
        """Give slots that nobody has, `first .. last - 1`, something harmless to decode: a cycle may look at them."""
        state = self._state
        state.active[first:last] = False
        state.tokens[first:last, 0] = 0
        state.lengths[first:last] = 1
        state.cache.lengths[first:last] = 0
        for place in range(first, last):
            self._own.clear(place)

    def load(self, slots: list[Slot]) -> Kind:
        """Make the settings and limits of the first slots those of these requests; returns what they need."""
        if slots != self._loaded:
            self._loaded, settings = list(slots), [slot.request.settings for slot in slots]
            self._kind = Kind.of(settings)
            self._table.load(settings)
            limits = [slot.request.limits.max_new_tokens for slot in slots]
            self._limits[: len(slots)].copy_(torch.tensor(limits))
            stops = torch.full((len(slots), MOST_STOPS), -1)
            for row, slot in zip(stops, slots, strict=True):
                ids = sorted(slot.ending.stop_token_ids)[:MOST_STOPS]
                row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
            self._stops[: len(slots)].copy_(stops)
        return self._kind

    def launch(self, slots: list[Slot], late: Flight | None, plan: DraftPlan | None) -> Flight:
        """Start a cycle of the first slots.

        Args:
            slots: whom it decodes.
            late: the cycle before, if nobody has heard of it yet.
            plan: of the policy; None for all drafts. Numbers are rounded up to powers of two, since each has a graph.
        """
        kind = self.load(slots)
        offered = verified = self.num_drafts
        if plan is not None:
            offered = self.num_drafts if plan.trial else min(_power_of_two(plan.drafts), self.num_drafts)
            verified = min(_power_of_two(plan.verified), offered)
        unheard = 0 if late is None else late.shape.verified + 1
        rows = max(slot.length for slot in slots) + unheard + verified
        shape = Shape(
            min(_power_of_two(len(slots)), len(self._limits)),
            min(extent_of(rows), self._state.cache.capacity),
            offered,
            verified,
            kind,
        )
        buffers = self._told[self._flights % 2]
        self._flights += 1
        run = self.graphs.runner(shape, partial(self.cycle, shape))
        timer = _Timer(self.target.device)
        run()
        timer.stop()
        for told, own in zip(buffers, (self._decided, self._confidence), strict=True):
            told.copy_(own, non_blocking=True)
        timer.told()
        return Flight(shape, list(slots), plan, buffers, self._layouts[shape], timer)

    def cycle(self, shape: Shape) -> None:
        """Decode the first slots that are active by one cycle; this is what is captured."""
        sampling = self._table.view(shape.requests, shape.kind)
        state = self._state.view(0, shape.requests, sampling, shape.extent)
        own = self._own.view(0, shape.requests, shape.extent)
        offer = proposal = Proposal.empty(shape.requests, state.tokens.device)
        if shape.offered > 0:
            offer = self.drafter.propose(state, own, shape.offered)
            proposal = best_drafts(offer, shape.verified)
        verdict = verify(self.target, state, proposal, self.drafter.feature_layers, self.matching_rule)
        verdict = replace(verdict, num_accepted=torch.where(state.active, verdict.num_accepted, -1))
        commit(state, verdict)
        self.drafter.advance(own, verdict)
        self._tell(shape, offer, proposal, verdict, self._end(state, verdict))

    def _end(self, state: State, verdict: Verdict) -> Tensor:
        """Who ended in this cycle, [R]; they are active no longer."""
        requests, width = verdict.tokens.shape
        fresh = torch.arange(width, device=verdict.tokens.device) <= verdict.num_accepted[:, None]
        stops = (verdict.tokens[..., None] == self._stops[:requests, None]).any(-1)
        full = state.lengths - state.prompt_lengths >= self._limits[:requests]
        ended = state.active & ((stops & fresh).any(1) | full | ~verdict.sound)
        state.active &= ~ended
        return ended

    def _tell(self, shape: Shape, offer: Proposal, proposal: Proposal, verdict: Verdict, ended: Tensor) -> None:
        """Write down what was decided, for the host."""
        decided = self._decided[: shape.requests]
        for column, values in (
            (_ACCEPTED, verdict.num_accepted),
            (_DRAFTS, proposal.num_drafts),
            (_OFFERED, offer.num_drafts),
            (_SOUND, verdict.sound),
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
    """The bucket that holds so many rows: a multiple of 256, and of a quarter of the largest power of two below.

    A cycle reads at most a quarter more than it needs to, beyond 1024 rows, and there are few buckets.
    """
    step = max(STEP, (1 << (max(rows - 1, 1).bit_length() - 1)) // 4)
    return -(-rows // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _on_host(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)


class _Timer:
    """Measures a cycle on its device, and waits for what it tells."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        if self._cuda:
            self._started, self._stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._told = torch.cuda.Event()
            self._started.record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """The cycle is on its way."""
        if self._cuda:
            self._stopped.record()
        else:
            self._seconds = time.perf_counter() - self._began

    def told(self) -> None:
        """So are the copies of what it decided."""
        if self._cuda:
            self._told.record()

    def wait(self) -> float:
        """Wait for the copies; seconds of the cycle."""
        if self._cuda:
            self._told.synchronize()
            return self._started.elapsed_time(self._stopped) / 1000
        return self._seconds
