"""Steps of a decoder pass on a CPU, in float32: what PyTorch's functions do, by native loops.

They do what the functions named in their docstrings do, with two properties that decoding wants: a pass over a dozen
rows costs hardly more than over one, and every row of a result has the same bits whatever the number of rows. Where
`is_available` says no, callers keep PyTorch's own functions. What does not fit is a ValueError (`bindings.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.native import bindings
from domino_spec.ops.native.bindings import library


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the functions of this module work on tensors of `device` and `dtype`."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


def fits(width: int) -> bool:
    """Whether rows of `width` values can be cut into the processor's vectors, as norms, SwiGLU and attention ask."""
    return width > 0 and width % bindings.lanes() == 0


def pack(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] in panels of neighbouring outputs, [panels, inputs, width], padded with zeros."""
    width = bindings.panel_width()
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % width))
    return padded.view(-1, width, inputs).transpose(1, 2).contiguous()


def pack_bias(bias: Tensor) -> Tensor:
    """A bias [outputs], padded as `pack` pads."""
    return F.pad(bias.detach(), (0, -len(bias) % bindings.panel_width())).contiguous()


def linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs] and a packed weight (and bias) to [..., outputs]."""
    x = x.contiguous()
    turned, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], outputs)
    bindings.linear(x, panels, bias, turned, y)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x [..., width]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    bindings.rms_norm(x, weight, eps, y)
    return y


def rms_norm_heads_(x: Tensor, first: int, heads: int, weight: Tensor, eps: float) -> None:
    """Norm, in place, `heads` heads of contiguous x [..., row] from the head numbered `first` on, weight [head_dim]."""
    bindings.rms_norm_heads(x, first, heads, weight, eps)


def rotate_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE (half-split form), in place, to the first `heads` heads of x [R, N, row].

    Args:
        x: contiguous; a row holds heads of `head_dim` values.
        heads: how many of them turn.
        head_dim: D.
        cos: [R or 1, N, rotary], rotary <= D and even: the values of a head past `rotary` stay.
        sin: as cos.
    """
    shape = (*x.shape[:2], cos.shape[-1])
    bindings.rotate(
        x,
        heads,
        head_dim,
        bindings.spread("rotate_", "cos", cos, shape),
        bindings.spread("rotate_", "sin", sin, shape),
    )


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's product, silu(gate) * up, of a joined x [..., 2 * width]: gate first."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    bindings.silu_mul(x, y)
    return y


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`F.scaled_dot_product_attention` with grouped heads, over rows of a cache.

    Args:
        query: [R, N, heads, D], heads and D contiguous, the same distance between all tokens.
        keys: [R, kv_heads, T, D], T and D contiguous; T may be cut from a larger cache.
        values: as keys, with the same strides.
        mask: [R or 1, 1, N or 1, T] bool, True where seen; a token that sees nothing gets zeros.
        scale: of the products of queries and keys.

    Returns:
        [R, N, heads, D].
    """
    seen = bindings.spread("attend", "mask", mask, (*query.shape[:1], 1, *query.shape[1:2], keys.shape[-2]))
    y = query.new_empty(query.shape)
    bindings.attend(query, keys, values, seen, scale, y)
    return y
