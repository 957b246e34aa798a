"""New context rows into the draft's cache: the last step of `Backbone.project_context`, for all layers at once.

After the two products (features to context, context to keys and values of all layers) keys are normed per head and
rotated, and both are written after the rows that each request already has. The PyTorch version is here; on CUDA a
Triton kernel does it in one launch, on a CPU a C loop, without the copies in between.

Shapes: R requests, T new rows, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.native import bindings
from domino_spec.ops.triton import has_triton


@functools.cache
def context_writer(device: str, types: tuple[torch.dtype, ...], head_dim: int) -> Callable[..., None]:
    """The fastest function that does what `write_context_torch_` does.

    Those in C and Triton leave out rows that a request has no room for. In C, a negative length is a ValueError.

    Args:
        device: its type.
        types: of the cache, of what is projected and of the norms' weights.
        head_dim: D.
    """
    if device == "cuda" and types[1] in (torch.float32, torch.bfloat16) and has_triton("a draft's context"):
        from domino_spec.ops.triton.context import write_context_triton_

        return write_context_triton_
    native = set(types) == {torch.float32} and bindings.is_available(torch.device(device), torch.float32)
    return bindings.write_context if native and bindings.fits(head_dim) else write_context_torch_


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
    """Norm, rotate (half-split RoPE) and write, on any device.

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
