"""What a cycle does to tensors, watched: whether the host looks at the device, and which shapes there are.

A CUDA graph cannot hold a look at the device, nor shapes that change. Both can be seen on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKING = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",  # torch.tensor of what the host knows: a copy to the device that waits
    "masked_select",
    "nonzero",
    "unique",
)
"""Operations whose result, or the shape of whose result, the host has to wait for."""


class Looked(RuntimeError):
    """The host looked at the device."""


class NoLooks(TorchDispatchMode):
    """Raises `Looked` where the host would have to wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name == n or (n in ("unique", "nonzero") and n in name) for n in LOOKING):
            raise Looked(f"aten.{name} is a look at the device")
        if name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1:2])
        ):
            raise Looked(f"aten.{name} by a mask is a look at the device")
        parts = self._parts(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        given = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        done = func(*args, **(kwargs or {}))
        made = {t.device for t in tree_leaves(done) if isinstance(t, Tensor)}
        if given and not made <= given:
            raise Looked(f"aten.{name} copies to another device")
        return done

    def _parts(self, func, args, kwargs):
        """Run the operations that an operation is made of, watched too: inference mode does not take them apart."""
        with self:
            return func.decompose(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """Notes every operation with the shapes of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        done = func(*args, **(kwargs or {}))
        shapes = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves((args, kwargs, done))]
        self.steps.append((str(func), tuple(shapes)))
        return done


def forbid_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, `tolist` and `numpy` read memory without an operation: they raise `Looked` instead."""

    def look(self, *args, **kwargs):
        raise Looked("a list of a tensor is a look at the device")

    for name in ("tolist", "numpy", "cpu", "__array__"):
        monkeypatch.setattr(Tensor, name, look)
