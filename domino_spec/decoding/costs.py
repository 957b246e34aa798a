"""What passes cost on this machine: the measure by which the number of drafts is chosen.

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

from domino_spec.config import UserError, parse_settings
from domino_spec.decoding.drafter import Drafter, cycle_room
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.decoding.state import State, Verdict
from domino_spec.files import atomic_path, read_json
from domino_spec.target.model import Target

CONTEXT = 256
"""Committed tokens of each request at which costs are measured."""
REPEATS = 5


@dataclass(frozen=True)
class CostModel:
    """Seconds of the parts of a cycle; the fields are the keys of its JSON file."""

    requests: tuple[int, ...]
    """R, ascending."""
    rows: tuple[int, ...]
    """n, rows of each request in a verify pass, ascending."""
    verify_seconds: tuple[tuple[float, ...], ...]
    """For every R and n."""
    draft_seconds: tuple[float, ...]
    """Of drafting, for every R: the proposal, and taking in what was committed."""

    def __post_init__(self) -> None:
        for name, sizes in (("requests", self.requests), ("rows", self.rows)):
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise UserError(f"costs: {name} must be ascending numbers from 1 on, got {list(sizes)}")
        shape = [len(row) for row in self.verify_seconds]
        if shape != [len(self.rows)] * len(self.requests) or len(self.draft_seconds) != len(self.requests):
            raise UserError("costs: there must be seconds for every number of requests and of rows")
        if not all(s > 0 for row in self.verify_seconds for s in row) or not all(s >= 0 for s in self.draft_seconds):
            raise UserError("costs: seconds must be positive numbers (those of drafting may be 0); measure them again")

    def verify(self, requests: int, rows: int) -> float:
        """Seconds of one verify pass over `rows` rows of each of so many requests."""
        return _interpolate(self.requests, [_interpolate(self.rows, s, rows) for s in self.verify_seconds], requests)

    def draft(self, requests: int) -> float:
        """Seconds of drafting for so many requests."""
        return _interpolate(self.requests, self.draft_seconds, requests)

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
    widths = sizes_up_to(drafter.max_drafts + 1)
    context = max(2, min(context, target.max_length - cycle_room(drafter)))
    whole = _synthetic_state(target, drafter, slots, context)
    own = drafter.allocate(slots, whole.tokens.shape[1])
    rows = context - 1
    width = len(drafter.feature_layers) * target.hidden_size
    features = torch.randn(slots, rows, width, device=target.device, dtype=target.dtype) if width else None
    drafter.read(own, whole.tokens[:, 1:context], features, torch.full_like(whole.lengths, rows))

    verify_seconds, draft_seconds = [], []
    for requests in sizes_up_to(slots):
        state = whole.view(0, requests, Sampling.alike(SamplingSettings(), requests, target.device))
        view = own.view(0, requests)

        verify_seconds.append(tuple(_seconds(partial(_pass, target, drafter, state, n), repeats) for n in widths))
        spent = []
        for _ in range(repeats + 1):
            for request in range(requests):
                own.clear(request)
            drafter.read(view, state.tokens[:, 1:context], _first(features, requests), state.lengths - 1)
            accepted = _one_accepted(state, None if features is None else features[:requests, :2])
            spent.append(_seconds(partial(_draft, drafter, state, view, accepted), 0))
        draft_seconds.append(min(spent[1:]) if drafter.max_drafts else 0.0)
        report(f"costs of {requests} request{'s' * (requests > 1)} measured")
    return CostModel(sizes_up_to(slots), widths, _rising(verify_seconds), tuple(draft_seconds))


def _pass(target: Target, drafter: Drafter, state: State, rows: int) -> None:
    target.lm_head(target.forward(state.tokens[:, :rows], state.cache, drafter.feature_layers).hidden)


def _draft(drafter: Drafter, state: State, own: Any, verdict: Verdict) -> None:
    drafter.propose(state, own, drafter.max_drafts)
    drafter.advance(own, verdict)


def _first(features: torch.Tensor | None, requests: int) -> torch.Tensor | None:
    return None if features is None else features[:requests]


def _synthetic_state(target: Target, drafter: Drafter, slots: int, context: int) -> State:
    """Requests of random tokens, as if prefilled."""
    capacity = context + cycle_room(drafter)
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
    return Verdict(state.tokens[:, :2], ones, features, state.lengths - 1, ones.bool())


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Least seconds of a call, after one that is not counted; of one call alone where `repeats` is 0.

    On a machine that others use too, what is added is noise, and nothing is ever taken away.
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
    """More requests or rows never cost less: where they seem to, what fewer cost was measured at a bad moment."""
    rising: list[tuple[float, ...]] = []
    for row in reversed(seconds):
        most, kept = math.inf, []
        for n in reversed(range(len(row))):
            most = min(most, row[n], rising[-1][n] if rising else math.inf)
            kept.append(most)
        rising.append(tuple(reversed(kept)))
    return tuple(reversed(rising))
