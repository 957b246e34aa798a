"""New context rows into the draft's cache: the last step of `Backbone.project_context`, for all layers at once.

After the two products (features to context, context to keys and values of all layers) keys are normed per head and
rotated, and both are written behind the rows that each request already has. PyTorch's truth is here; on CUDA a Triton
twin does it in one launch, on a CPU a loop in C, without the copies in between.

Shapes: R requests, T new rows, D head_dim.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.native import bindings
from domino_spec.ops.native import steps as cpu


def write_context_(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    projected: Tensor,
    norm_weights: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Norm, rotate (half-split RoPE) and write; rows that a request has no room for are left out by the fast twins.

    On a CPU what does not fit, a negative length too, is a ValueError.

    Args:
        keys: [layers, R, kv_heads, capacity, D]; rows `lengths[r] .. lengths[r] + T - 1` of request r are written.
        values: the same shape.
        lengths: [R] int64, rows before; not changed here.
        projected: [R, T, layers, 2, kv_heads, D], keys and values of every layer, of the cache's type; may be lost.
        norm_weights: [layers, D], of the keys' RMS norm.
        eps: of that norm.
        cos: [R, T, D] float32, for the rows' absolute positions.
        sin: [R, T, D] float32.
    """
    given = (keys, values, lengths, projected, norm_weights, eps, cos, sin)
    if keys.is_cuda and projected.dtype in (torch.float32, torch.bfloat16) and find_spec("triton") is not None:
        from domino_spec.ops.triton.context import write_context_triton_

        write_context_triton_(*given)
    elif _suits_cpu(keys, projected, norm_weights):
        _write_context_cpu_(*given)
    else:
        write_context_torch_(*given)


def write_context_torch_(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    projected: Tensor,
    norm_weights: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """`write_context_` in PyTorch, on any device."""
    requests, new = projected.shape[:2]
    layers, head_dim = norm_weights.shape
    weights = norm_weights.to(projected.dtype)
    normed = torch.stack([F.rms_norm(projected[:, :, i, 0], (head_dim,), weights[i], eps) for i in range(layers)], 2)
    left, right = normed.chunk(2, dim=-1)  # [R, T, layers, kv_heads, D / 2]
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    rotated = (normed * cos + torch.cat((-right, left), dim=-1) * sin).to(keys.dtype)
    rows = lengths[:, None] + torch.arange(new, device=keys.device)  # [R, T]
    of = torch.arange(requests, device=keys.device)[:, None]
    # Advanced indices around a slice put R and T first: [R, T, layers, kv_heads, D].
    keys[:, of, :, rows] = rotated
    values[:, of, :, rows] = projected[:, :, :, 1].to(values.dtype)


def _suits_cpu(keys: Tensor, projected: Tensor, norm_weights: Tensor) -> bool:
    floats = all(x.dtype == torch.float32 for x in (keys, projected, norm_weights))
    return floats and cpu.is_available(keys.device, keys.dtype) and cpu.fits(keys.shape[-1])


def _write_context_cpu_(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    projected: Tensor,
    norm_weights: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    new = projected.shape[1]
    cos, sin = (
        bindings.spread("write_context_", name, part, (len(lengths), new, part.shape[-1]))
        for name, part in (("cos", cos), ("sin", sin))
    )
    rows = lengths[:, None] + torch.arange(new)
    bindings.write_context(projected.contiguous(), norm_weights.contiguous(), eps, cos, sin, rows, keys, values)
