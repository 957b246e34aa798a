"""Linear layers with weights packed once for the CPU's matrix library.

A verify pass multiplies 2 to 17 rows by every weight. The stock product re-arranges the weight on each call, which at
that size costs more than the product itself; oneDNN can keep the arranged copy. For the single row of plain decoding
the stock product is faster, so both forms are kept and the number of rows decides: the baseline gets the better one.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_log = logging.getLogger(__name__)

PACK_ROWS = 8
"""Rows the packed layout is tuned for: a typical verify pass."""
STOCK_ROWS = 3
"""Up to this many rows the stock product is the faster one (docs/log.md); plain decoding multiplies a single row."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on CPU: its weight as it is for a few rows, and packed for more."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight.detach(), bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        if x.numel() <= STOCK_ROWS * self.in_features:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and device have packed products for `dtype`; says once where they are missing."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not available:
        _log.warning("this PyTorch build has no packed linear products; decoding on CPU will be slower")
    return available


def pack_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` below `module` by its packed form; returns how many there were.

    Only for frozen modules that are used for inference. Weights then take twice their memory.
    """
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(child.weight, bias))
                replaced += 1
    return replaced
