"""Attention of the target over our cache: the mask of a pass, and the function that transformers modules call.

Queries that share a key/value head are folded into rows of that head, so keys and values are read once and never
repeated in memory. Plain decoding and verification use the same function, so a ratio between them is fair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from domino_spec.config import UserError

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


_HARMLESS = frozenset(
    (
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
"""Arguments that reach attention because transformers hands them on to every module: they do not change its result.
`is_causal` is among them because every mask says what is seen; where there is none, `folded_attention` reads it."""

_watchers: list[list[dict[str, Any]]] = []


@contextmanager
def watch_attention() -> Iterator[list[dict[str, Any]]]:
    """Of every call of `folded_attention` meanwhile, the arguments that change a result: scaling, softcap, s_aux."""
    calls: list[dict[str, Any]] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.pop()


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over grouped heads.

    Args:
        module: the attention module that calls; errors name its class.
        query: [R, heads, N, D].
        key: [R, kv_heads, T, D].
        value: [R, kv_heads, T, D'].
        attention_mask: [R or 1, 1, N, T], bool (True where seen) or what is added to scores; None is causal.
        scaling: of the products of queries and keys; None is 1 / sqrt(D).
        dropout: must be 0.
        softcap: scores are `softcap * tanh(scores / softcap)`.
        s_aux: [heads], attention sinks: a score each that takes its share of the softmax and gives no value.
        sliding_window: tokens seen, itself included, where there is no mask; a mask holds it already.
        others: may be what does not change the result.

    Returns:
        [R, N, heads, D'], and None for the attention weights.

    Raises:
        UserError: an argument that this function does not know, which would change the result.
    """
    family = type(module).__name__
    if dropout:
        raise UserError(f"{family} drops {dropout} of its attention at random: only dropout 0 gives one text")
    for name, given in others.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise UserError(f"{family} gives its attention an argument that is not supported: {name}")
    for calls in _watchers:
        calls.append({"scaling": scaling, "softcap": softcap, "s_aux": s_aux})
    requests, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if attention_mask is None and others.get("is_causal", True) is not False:
        # transformers leaves out a purely causal mask; folded rows need it spelled out.
        attention_mask = _causal_mask(tokens, key.shape[2], sliding_window, key.device)
    if attention_mask is not None and groups > 1 and tokens > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    query = query.reshape(requests, kv_heads, groups * tokens, head_dim)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.reshape(kv_heads, groups).repeat_interleave(tokens, dim=1)
        out = _spelled_out(query, key, value, attention_mask, scaling or head_dim**-0.5, softcap, sinks)
    return out.reshape(requests, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


def _causal_mask(tokens: int, extent: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, N, T], the last N of T tokens attending to themselves and what is before; None where that is all."""
    if tokens == 1 and (window is None or window >= extent):
        return None
    seen = torch.ones(tokens, extent, dtype=torch.bool, device=device).tril(extent - tokens)
    return (seen if window is None else seen.triu(extent - tokens - window + 1))[None, None]


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what PyTorch's own function lacks: a cap on scores, and sinks [kv_heads, rows of `query`]."""
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, :, None].expand(len(scores), -1, -1, 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


AttentionInterface.register(ATTENTION_NAME, folded_attention)
# Without a mask function of the same name, transformers' own `generate` would pass no mask at all to our attention.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
