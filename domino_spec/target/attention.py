"""Attention of the target over our cache: the mask of a pass, and the function that transformers modules call.

Queries that share a key/value head are folded into rows of that head, so keys and values are read once and never
repeated in memory. Plain decoding and verification use the same function, so a ratio between them is fair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "domino_spec"


def pass_mask(
    lengths: Tensor, num_tokens: int, extent: int, ancestors: Tensor | None = None, window: int | None = None
) -> Tensor:
    """What each token of a pass may attend to.

    Args:
        lengths: [R], cached rows before the pass.
        num_tokens: N, tokens in the pass, written to rows `lengths[r] + i`.
        extent: rows of the cache that attention reads.
        ancestors: [R, N, N], True where token i of the pass descends from token j or is it; None for a chain.
        window: tokens further back than this are hidden (sliding-window layers).

    Returns:
        [R, 1, N, extent] bool, True where seen.
    """
    rows = torch.arange(extent, device=lengths.device)
    offset = torch.arange(num_tokens, device=lengths.device)
    relative = rows - lengths[:, None, None]  # [R, 1, extent]: 0 is the first token of the pass
    if ancestors is None:
        seen = relative <= offset[:, None]
        depth = offset[None, :]
    else:
        in_pass = relative.clamp(0, num_tokens - 1)
        seen = (relative < 0) | ((relative < num_tokens) & ancestors.gather(2, in_pass.expand(-1, num_tokens, -1)))
        depth = ancestors.sum(-1) - 1  # [R, N]
        # A window counts positions, and a tree's rows stand at their depth, not at their row number.
        relative = torch.where(relative < 0, relative, depth.gather(1, in_pass[:, 0])[:, None])
    if window is not None:
        seen = seen & (relative > depth[..., None] - window)
    return seen[:, None]


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention: query [R, heads, N, D], key and value [R, kv_heads, T, D] to [R, N, heads, D]."""
    if kwargs.get("softcap") is not None:
        raise ValueError("attention with a soft cap (Gemma 2) is not supported")
    requests, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if attention_mask is None and tokens > 1:
        # transformers leaves out a purely causal mask; folded rows need it spelled out.
        attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=key.device)
        attention_mask = attention_mask.tril(key.shape[2] - tokens)[None, None]
    if attention_mask is not None and groups > 1 and tokens > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(
        query.reshape(requests, kv_heads, groups * tokens, head_dim),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return out.reshape(requests, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, folded_attention)
# Without a mask function of the same name, transformers' own `generate` would pass no mask at all to our attention.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
