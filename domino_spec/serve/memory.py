"""How much memory a server's caches take, and whether a device has it: known before anything large is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Drafter, cycle_room
from domino_spec.devices import free_memory
from domino_spec.settings import UserError
from domino_spec.target.model import Target

GIB = 2**30
MOST_SLOTS = 1024
"""Even for a tiny target, it takes minutes to measure what passes of more requests cost."""
ROOM = 0.9
"""The part of what is available that weights and caches may take; activations need the rest."""


def cache_needs(target: Target, drafter: Drafter, slots: int, capacity: int, prefix_bytes: int) -> dict[str, int]:
    """Bytes by purpose of what an engine keeps of its requests, from the caches of one slot."""
    rows = capacity + cycle_room(drafter)
    one = bytes_of((target.new_cache(1, rows), drafter.allocate(1, rows)))
    needs = {f"caches of {slots} slots of {capacity:,} tokens": slots * one}
    return needs | ({"earlier turns": prefix_bytes} if prefix_bytes else {})


def check_slots(slots: int) -> None:
    """Refuse a number of slots that makes no sense.

    Raises:
        UserError: saying what does.
    """
    if not 1 <= slots <= MOST_SLOTS:
        raise UserError(f"slots must be between 1 and {MOST_SLOTS:,}, got {slots}")


def check_room(target: Target, drafter: Drafter, slots: int, capacity: int, prefix_bytes: int) -> None:
    """Refuse what the target's device cannot hold.

    Raises:
        UserError: saying what is needed, what there is, and which options ask for less.
    """
    needs = cache_needs(target, drafter, slots, capacity, prefix_bytes)
    if not fits(needs, target.device):
        raise UserError(
            f"{memory_sentence(needs, target.device)}: ask for fewer --slots, less --capacity or less --prefix-cache"
        )


def memory_sentence(needs: Mapping[str, int], device: torch.device) -> str:
    """What is needed, in bytes by purpose, and what the device has left."""
    total, available = sum(needs.values()), free_memory(device)
    parts = ", ".join(f"{purpose} {_gib(count)}" for purpose, count in needs.items())
    sentence = f"{_gib(total)} GiB needed ({parts})"
    if available is None:
        return f"{sentence}; how much is available is not known on this system"
    sentence += f", {_gib(available)} available"
    return sentence if fits(needs, device) else f"{sentence}: too little"


def fits(needs: Mapping[str, int], device: torch.device) -> bool:
    """Whether a device has room for it, and some to spare; true if nobody says how much there is."""
    available = free_memory(device)
    return available is None or sum(needs.values()) <= ROOM * available


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in caches of any kind."""
    return sum(tensor.nbytes for tensor in _tensors(value))


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}" if count >= 0.05 * GIB else f"{count / GIB:.2f}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors(item)
