"""The Triton twin of `context`: one program per new row and layer, which reads its keys and values once.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from domino_spec.ops.triton.grid import rounded


def write_context_triton_(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    projected: Tensor,
    norm_weights: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """`context.write_context_torch_` on a GPU; numbers of one head must be neighbours, and D even."""
    requests, new, layers, _, heads, head_dim = projected.shape
    assert head_dim % 2 == 0 and keys.stride() == values.stride() and keys.stride(4) == 1
    assert keys.dtype == values.dtype == projected.dtype and keys.shape == values.shape
    if projected.numel() == 0:
        return
    with torch.cuda.device_of(keys):
        _context_kernel[(requests * new * layers,)](
            keys, values, lengths.contiguous(), projected.contiguous(), norm_weights.contiguous(), cos.contiguous(),
            sin.contiguous(), float(eps), *keys.stride()[:4], keys.shape[3], new,
            LAYERS=layers, HEADS=heads, D=head_dim, HEAD_BLOCK=triton.next_power_of_2(heads),
            D_BLOCK=triton.next_power_of_2(head_dim), BFLOAT16=projected.dtype == torch.bfloat16, num_warps=4,
        )  # fmt: skip


@triton.jit
def _context_kernel(
    keys_ptr, values_ptr, lengths_ptr, projected_ptr, weights_ptr, cos_ptr, sin_ptr, eps, layer_stride, request_stride,
    head_stride, row_stride, capacity, new, LAYERS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    layer, slot = item % LAYERS, item // LAYERS  # slot: request and new row
    request = slot // new
    heads, columns = tl.arange(0, HEAD_BLOCK), tl.arange(0, D_BLOCK)
    partners = (columns + D // 2) % D  # what a number is rotated with
    inside = (heads < HEADS)[:, None] & (columns < D)[None, :]
    far = tl.full((), 0, tl.int64)
    at_keys = projected_ptr + ((far + slot) * LAYERS + layer) * 2 * HEADS * D + heads[:, None] * D
    key = tl.load(at_keys + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(at_keys + partners[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.load(at_keys + HEADS * D + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weights_ptr + layer * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    partner_weight = tl.load(weights_ptr + layer * D + partners, mask=columns < D, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(key * key, 1) / D + eps)
    key = rounded(key * scale[:, None] * rounded(weight, BFLOAT16)[None, :], BFLOAT16)
    partner = rounded(partner * scale[:, None] * rounded(partner_weight, BFLOAT16)[None, :], BFLOAT16)
    cos = tl.load(cos_ptr + (far + slot) * D + columns, mask=columns < D, other=0.0)[None, :]
    sin = tl.load(sin_ptr + (far + slot) * D + columns, mask=columns < D, other=0.0)[None, :]
    rotated = rounded(key * cos + tl.where((columns < D // 2)[None, :], -partner, partner) * sin, BFLOAT16)
    row = tl.load(lengths_ptr + request) + slot % new
    at = layer * layer_stride + (far + request) * request_stride + row * row_stride
    at = at + heads[:, None] * head_stride + columns[None, :]
    stored = inside & (heads * 0 + row < capacity)[:, None]
    tl.store(keys_ptr + at, rotated.to(keys_ptr.dtype.element_ty), mask=stored)
    tl.store(values_ptr + at, value, mask=stored)
