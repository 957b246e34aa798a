"""Requests held at one point of their texts: where every measurement of a cycle starts, and is put back to.

What measurements must know of the loop's caches stands here. A text is read for real, or its keys and values are
random: they cost a pass the same, and thousands of tokens are there at once.

Shapes: R requests, T committed tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import Drafter, State, start
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.settings import UserError
from domino_spec.target.model import PREFILL_CHUNK, Target


def synthetic_text(target: Target, length: int, requests: int = 1, seed: int = 0) -> Tensor:
    """Random tokens [R, T], for timings that need no real text.

    The last token occurred before, and no longer n-gram did: look-up has something to copy, and long copies do not take
    the place of a draft.

    Raises:
        UserError: a length that the target has no room for.
    """
    if not 2 <= length < target.max_length:
        raise UserError(f"context must be between 2 and {target.max_length - 1} tokens, got {length}")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, target.vocab_size, (requests, length), generator=generator)
    tokens[:, -1] = tokens[:, (length - 1) // 2]
    return tokens.to(target.device)


def new_state(target: Target, tokens: Tensor, room: int) -> State:
    """Requests with committed tokens [R, T], nothing of them read yet, and room for so many more; decoded greedily."""
    requests, length = tokens.shape
    lengths = torch.full((requests,), length, device=tokens.device)
    return State(
        F.pad(tokens, (0, room)),
        lengths,
        lengths.clone(),
        torch.ones_like(lengths, dtype=torch.bool),
        target.new_cache(requests, length + room),
        Sampling.alike(SamplingSettings(), requests, tokens.device),
    )


def read_state(target: Target, drafter: Drafter, state: State) -> Any:
    """Let the target and a drafter read the texts; returns the drafter's caches."""
    tokens, lengths = state.tokens[:, : int(state.lengths.max()) - 1], state.lengths - 1
    state.features = target.prefill(tokens, lengths, state.cache, drafter.feature_layers)
    return start(drafter, state)


def fill_state(state: State) -> None:
    """Random keys and values in place of those of the texts."""
    state.cache.keys.normal_()
    state.cache.values.normal_()
    state.cache.lengths.copy_(state.lengths - 1)


def filled_caches(target: Target, drafter: Drafter, state: State) -> Any:
    """A drafter's caches that have read random features in place of the target's."""
    requests, capacity = state.tokens.shape
    own, rows = drafter.allocate(requests, capacity), int(state.lengths.max()) - 1
    width = len(drafter.feature_layers) * target.hidden_size
    for first in range(0, rows, PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, rows - first)
        features = None
        if width:
            features = torch.randn(requests, count, width, dtype=target.dtype, device=target.device)
        following = state.tokens[:, first + 1 : first + count + 1]
        drafter.read(own, following, features, torch.full_like(state.lengths, count))
    return own


def hold_state(state: State) -> Callable[[], None]:
    """What puts the texts back to where they are now: lengths do; rows behind them may hold anything."""
    lengths = state.lengths.clone()

    def put_back() -> None:
        state.lengths.copy_(lengths)
        state.cache.lengths.copy_(lengths - 1)

    return put_back


def hold_caches(own: Any) -> Callable[[], None]:
    """What puts a drafter's caches back to what they are now, keys and values aside."""
    steps: list[Callable[[], None]] = []
    for name, value in vars(own).items():
        if name in ("keys", "values"):
            continue
        if isinstance(value, Tensor):
            steps.append(functools.partial(_refill, own, name, value.clone()))
        elif isinstance(value, list):
            steps.append(functools.partial(_replace_items, value, copy.deepcopy(value)))
        elif hasattr(value, "__dict__"):
            steps.append(hold_caches(value))

    def put_back() -> None:
        for step in steps:
            step()

    return put_back


def _refill(own: Any, name: str, saved: Tensor) -> None:
    getattr(own, name).copy_(saved)


def _replace_items(items: list[Any], saved: list[Any]) -> None:
    items[:] = copy.deepcopy(saved)
