"""What passes cost on this machine, by which the policy chooses the number of drafts.

A verify pass over R requests of n rows each, and drafting for R requests, are timed at a few sizes and interpolated
between them.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, commit, cycle_room, verify
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.files import atomic_path, read_json
from domino_spec.settings import Settings, UserError, parse_settings
from domino_spec.target.model import Target

CONTEXT = 256
"""Committed tokens of each request at which costs are measured."""
REPEATS = 5
_COMMITTED = 2
"""Tokens that a synthetic cycle commits: one draft and the bonus token."""


@dataclass(frozen=True)
class CostModel(Settings):
    """Seconds of the parts of a cycle. The fields are the keys of its JSON file."""

    requests: tuple[int, ...]
    """R, ascending."""
    rows: tuple[int, ...]
    """n, rows of each request in a verify pass, ascending."""
    verify_seconds: tuple[tuple[float, ...], ...]
    """For every R and n."""
    drafts: tuple[int, ...]
    """n, drafts asked for, ascending; none if the drafter makes none."""
    draft_seconds: tuple[tuple[float, ...], ...]
    """Seconds of drafting, for every R and n: of the proposal, and of `Drafter.advance`."""

    def __post_init__(self) -> None:
        for name, sizes in (("requests", self.requests), ("rows", self.rows), ("drafts", self.drafts)):
            if (not sizes and name != "drafts") or list(sizes) != sorted(set(sizes)) or min(sizes, default=1) < 1:
                raise UserError(f"costs: {name} must be ascending numbers from 1 on, got {list(sizes)}")
        for seconds, sizes in ((self.verify_seconds, self.rows), (self.draft_seconds, self.drafts)):
            if [len(row) for row in seconds] != [len(sizes)] * len(self.requests):
                raise UserError("costs: there must be seconds for every number of requests, of rows and of drafts")
            if not all(s > 0 or (s == 0 and sizes is self.drafts) for row in seconds for s in row):
                raise UserError("costs: seconds must be positive numbers (of drafting also 0); measure them again")

    def verify(self, requests: int, rows: int) -> float:
        """Seconds of one verify pass over `rows` rows of each request."""
        return self._at(requests, self.rows, self.verify_seconds, rows)

    def draft(self, requests: int, num_drafts: int) -> float:
        """Seconds of drafting `num_drafts` drafts for each request."""
        return self._at(requests, self.drafts, self.draft_seconds, num_drafts) if self.drafts else 0.0

    def _at(self, requests: int, sizes: Sequence[int], seconds: Sequence[Sequence[float]], size: int) -> float:
        return _interpolate(self.requests, [_interpolate(sizes, row, size) for row in seconds], requests)

    def save(self, path: Path) -> None:
        """Write a JSON file, atomically."""
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> CostModel:
        """Read a JSON file.

        Raises:
            UserError: it is not one that `save` wrote.
        """
        return parse_settings(CostModel, read_json(path), str(path))


def _interpolate(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """Linear between the sizes and, with the last slope, beyond them."""
    if len(sizes) == 1:
        return seconds[0] * max(1.0, size / sizes[0])
    right = min(max(bisect_right(sizes, size), 1), len(sizes) - 1)
    share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return seconds[right - 1] + max(share, 0.0) * (seconds[right] - seconds[right - 1])


def sizes_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 4, ..., and `most` itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return (*powers, most)


def rows_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, ..., and `most` itself.

    Passes have steps: on a CPU twelve rows cost little more than one, and a thirteenth begins another tile. With sizes
    half-way between the powers of two, 12 rows of one request, 6 of two and 3 of four are all measured.
    """
    between = [3 * 2**i for i in range(most.bit_length()) if 3 * 2**i < most]
    return tuple(sorted({*sizes_up_to(most), *between}))


@torch.inference_mode()
def measure_costs(
    target: Target,
    drafter: Drafter,
    slots: int,
    *,
    context: int = CONTEXT,
    repeats: int = REPEATS,
    report: Callable[[str], None] = lambda line: None,
) -> CostModel:
    """Time verify passes and drafting on random text.

    Args:
        target: the model served.
        drafter: whose proposals are timed, with the most drafts it makes.
        slots: requests that are decoded together at most.
        context: committed tokens of each request.
        repeats: of each size; the least counts.
        report: called with a line for each number of requests.
    """
    widths = rows_up_to(drafter.max_drafts + 1)
    numbers = sizes_up_to(drafter.max_drafts) if drafter.max_drafts else ()
    growth = _COMMITTED * len(numbers) * (repeats + 1)
    context = max(2, min(context, target.max_length - cycle_room(drafter) - growth))
    whole = _synthetic_state(target, slots, context, context + growth + cycle_room(drafter))
    cache = drafter.allocate(slots, whole.tokens.shape[1])
    rows = context - 1
    width = len(drafter.feature_layers) * target.hidden_size
    features = torch.randn(slots, rows, width, device=target.device, dtype=target.dtype) if width else None

    verify_seconds, draft_seconds = [], []
    for requests in sizes_up_to(slots):
        state = whole.view(0, requests, Sampling.alike(SamplingSettings(), requests, target.device))
        view = cache.view(0, requests)
        request_features = None if features is None else features[:requests]
        verify_seconds.append(tuple(_seconds(partial(_verify, target, drafter, state, n), repeats) for n in widths))
        for request in range(requests):
            cache.clear(request)
        drafter.read(view, state.tokens[:, 1:context], request_features, state.lengths - 1)
        spent: list[list[float]] = [[] for _ in numbers]
        for _ in range(repeats + 1):  # in turn, so that a slow moment of the machine hits all numbers
            for number, seconds in zip(numbers, spent, strict=True):
                verdict = _one_accepted(state, request_features)
                seconds.append(_seconds(partial(_draft, drafter, state, view, verdict, number), 0))
                state.lengths += _COMMITTED
        state.lengths.fill_(context)
        draft_seconds.append(tuple(min(seconds[1:]) for seconds in spent))
        report(f"costs of {requests} request{'s' * (requests > 1)} measured")
    return CostModel(sizes_up_to(slots), widths, _rising(verify_seconds), numbers, _rising(draft_seconds))


def _verify(target: Target, drafter: Drafter, state: State, rows: int) -> None:
    """A pass, what it decides and its commit; the state is restored."""
    drafts = Proposal(state.tokens[:, 1:rows], torch.full_like(state.lengths, rows - 1))
    lengths, cached = state.lengths.clone(), state.cache.lengths.clone()
    commit(state, verify(target, state, drafts, drafter.feature_layers))
    state.lengths.copy_(lengths)
    state.cache.lengths.copy_(cached)


def _draft(drafter: Drafter, state: State, cache: Any, verdict: Verdict, num_drafts: int) -> None:
    drafter.propose(state, cache, num_drafts)
    drafter.advance(cache, verdict)


def _synthetic_state(target: Target, slots: int, context: int, capacity: int) -> State:
    """Requests of random tokens, as if prefilled."""
    device = target.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (slots, capacity), generator=generator).to(device)
    lengths = torch.full((slots,), context, device=device)
    cache = target.new_cache(slots, capacity)
    cache.keys.normal_()
    cache.values.normal_()
    cache.lengths.fill_(context - 1)
    active = torch.ones_like(lengths, dtype=torch.bool)
    return State(tokens, lengths, lengths.clone(), active, cache, Sampling([], device))


def _one_accepted(state: State, features: torch.Tensor | None) -> Verdict:
    """A verdict that kept one draft of each request."""
    ones = torch.ones_like(state.lengths)
    tokens = state.tokens[:, :_COMMITTED]
    return Verdict(tokens, ones, None if features is None else features[:, :_COMMITTED], state.lengths - 1, ones.bool())


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Least seconds of a call, after one that is not counted; of one call alone if `repeats` is 0.

    Other users of the machine only ever add to the seconds.
    """
    spent = []
    for _ in range(repeats + 1):
        _synchronise()
        started = time.perf_counter()
        call()
        _synchronise()
        spent.append(time.perf_counter() - started)
    return min(spent[1:] or spent)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rising(seconds: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """More requests or rows never cost less: if they seem to, the machine was slow when fewer were measured."""
    rising: list[tuple[float, ...]] = []
    for row in reversed(seconds):
        most, kept = math.inf, []
        for n in reversed(range(len(row))):
            most = min(most, row[n], rising[-1][n] if rising else math.inf)
            kept.append(most)
        rising.append(tuple(reversed(kept)))
    return tuple(reversed(rising))
