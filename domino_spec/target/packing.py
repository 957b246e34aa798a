"""Linear layers whose weights are laid out once for products with few rows, on CPU.

A verify pass multiplies 2 to 17 rows by every weight, and the stock product is slow at that size. In float32 the
native loops (`kernels.cpu`) hold one layout that serves every number of rows. Without them, and in bfloat16, oneDNN's
packed product is used beside the stock one, which is faster for the single row of plain decoding in float32: the number
of rows decides, so the baseline gets the better one too.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.kernels import cpu

_log = logging.getLogger(__name__)

PACK_ROWS = 8
"""Rows the packed layout is tuned for: a typical verify pass."""
STOCK_ROWS = 3
"""Up to this many rows oneDNN's packed product is slower than the stock one (docs/log.md)."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self.panels: Tensor | None = None
        if cpu.is_available(weight.device, weight.dtype):
            self.panels = cpu.pack(weight)
            self.bias = None if bias is None else cpu.pack_bias(bias)
        else:
            self._given, self.bias = weight, bias
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)

    @property
    def weight(self) -> Tensor:
        """[out, in], as it was given; from panels a copy. Some models read it (routers of experts)."""
        if self.panels is None:
            return self._given
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        if self.panels is not None:
            return cpu.linear(x, self.panels, self.out_features, self.bias)
        if x.numel() <= STOCK_ROWS * self.in_features:
            return F.linear(x, self._given, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and device have packed products for `dtype`; says once where they are missing."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if cpu.is_available(device, dtype):
        return True
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not available:
        _log.warning("this PyTorch build has no packed linear products; decoding on CPU will be slower")
    return available


def pack_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` below `module` by its packed form; returns how many there were.

    Only for frozen modules that are used for inference. oneDNN's form takes twice the memory, the native one no more.
    """
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(child.weight, bias))
                replaced += 1
    return replaced
