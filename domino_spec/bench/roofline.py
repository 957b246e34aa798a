"""The bytes that each stage of a cycle must move at least, and the point of a text at which a cycle is measured.

Bytes are counted from the weights as they are held and from what the cycle did, with W for the bytes of weights, e for
those of a value, n for rows of the verify pass over all requests, c for committed tokens, T for a request's cached
rows, and kv = 2 * layers * kv_heads * D for the values of one cached row:

    verify            W(layers, final norm) + e kv (R T + n)          cached rows read, those of the pass written
    verify LM head    W(LM head) + e n V                              logits written
    context           W(fc, norm, key and value projections) + e c (F + kv)     features read, rows written
    backbone          passes * (W(layers, norm) + e kv R T)
    LM head           passes * W(rows of the draft vocabulary) + e logits       logits written
    head rollout      e logits + W(GRU, W1) + W(rows of W2)           logits read; K rows per corrected slot, V at most
    accept, commit    e n V                                           logits read

Weights are read once per pass, whatever the number of rows. Activations, embeddings of single tokens and masks are left
out, so this is a lower bound. Of a mixture of experts, as many experts count as one token takes. If everything fits
into a processor's caches, a stage can be faster than its bound.

Shapes: R requests, V vocabulary, F feature width, K candidates, D head_dim, T committed tokens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.decoding.cycle import Drafter, State, start
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.draft.config import DraftConfig, SingleLayerConfig
from domino_spec.draft.domino import Draft
from domino_spec.drafters.block import BlockDrafter
from domino_spec.ops.native.bindings import PackedLinear
from domino_spec.settings import UserError
from domino_spec.target.model import PREFILL_CHUNK, Target


@dataclass(frozen=True)
class Work:
    """How much a cycle did: what the bytes that it must move are worked out from."""

    rows: int
    """Of the verify pass, over all requests."""
    committed: int
    """Accepted drafts and bonus tokens, over all requests."""
    draft_passes: int
    """Passes of the draft's layers."""
    lm_head_passes: int
    """Products with the draft's LM head."""
    logits: int
    """Values of all draft logits."""


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights below some modules, packed ones too, without what packing pads; each counted once."""
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    total, seen = 0, set()
    for part in parts:
        if isinstance(part, PackedLinear):
            held = [v for v in (*vars(part).values(), *part.buffers(recurse=False)) if isinstance(v, Tensor)]
            largest = max(held, key=Tensor.numel)
            total += part.out_features * part.in_features * largest.element_size()
            continue
        gains = [buffer for name, buffer in part.named_buffers(recurse=False) if name == "weight"]
        for weight in (*part.parameters(recurse=False), *gains):
            if id(weight) not in seen:
                seen.add(id(weight))
                total += weight.numel() * weight.element_size()
    return total


def target_bytes(target: Target, work: Work, requests: int, context: int) -> dict[str, int]:
    """Of the stages that the target has.

    Args:
        target: the model served.
        work: what the cycle did.
        requests: R.
        context: committed tokens of each, of which all but the last are cached.
    """
    config, size = target.config, target.dtype.itemsize
    row = 2 * _kv_width(config) * size  # of one layer
    seen = sum(_rows_seen(config, target.num_layers, context - 1))
    cached = row * (requests * seen + work.rows * target.num_layers)
    head = target.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    logits = work.rows * target.vocab_size * size
    layers = sum(_layer_bytes(layer, config) for layer in target.layers)
    return {
        "verify": layers + weight_bytes(target.final_norm) + cached,
        "verify_lm_head": weight_bytes(head) + logits,
        "accept_commit": logits,
    }


def draft_bytes(draft: Any, drafter: Drafter, work: Work, requests: int, context: int) -> dict[str, int]:
    """Of the stages that a draft has; none without one. Arguments as in `target_bytes`."""
    if draft is None:
        return {}
    config, size = draft.config, draft.dtype.itemsize
    layers = config.num_hidden_layers
    row = 2 * layers * config.num_key_value_heads * config.head_dim * size
    context_row = (config.feature_size + row // size) * size
    logits = work.logits * size
    reads: tuple[nn.Module, ...]
    into_context: tuple[nn.Module, ...]
    if draft.borrows_lm_head:
        reads = (draft.backbone.layers, draft.backbone.norm)
        into_context = (draft.backbone.fc, draft.backbone.hidden_norm)
        head = draft.config.logits_size * config.hidden_size * size
        keys_values = row * config.hidden_size  # as many outputs as a row has values
    else:
        reads = (draft.midlayer, draft.norm)
        into_context = (draft.fc, draft.midlayer.hidden_norm, draft.midlayer.input_layernorm)
        head = weight_bytes(draft.lm_head)
        keys_values = row * 2 * config.hidden_size
    return {
        "context": weight_bytes(*into_context) + keys_values + work.committed * context_row,
        "backbone": work.draft_passes * (weight_bytes(*reads) + requests * (context - 1) * row),
        "lm_head": work.lm_head_passes * head + logits,
        "rollout": logits + (_head_bytes(draft, drafter, work, requests) if draft.borrows_lm_head else 0),
    }


def _head_bytes(draft: Draft, drafter: Drafter, work: Work, requests: int) -> int:
    """GRU, W1, and the rows of W2 that correct the candidates of each slot; 0 if the head is left off."""
    block: Any = drafter
    while not isinstance(block, BlockDrafter):  # one that looks up first
        block = block.inner
    head, size = block.head, draft.dtype.itemsize
    if head is None or work.logits == 0:
        return 0
    slots = work.logits // draft.config.logits_size  # over all requests
    corrected = slots - requests * head.config.pure_draft_prefix_len
    rows = draft.config.logits_size
    if block.candidates is not None:
        rows = min(rows, max(0, corrected) * block.candidates)
    w2 = rows * head.config.low_rank * size if corrected > 0 else 0
    return weight_bytes(head) - weight_bytes(head.embed_proj[2]) + w2


def _layer_bytes(layer: nn.Module, config: Any) -> int:
    """A decoder layer's weights; of its experts, those that one token takes."""
    experts = [module for name, module in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    held = weight_bytes(layer)
    if not experts:
        return held
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    return held - round(weight_bytes(*experts) * (1 - getattr(config, "num_experts_per_tok", count) / count))


def _kv_width(config: Any) -> int:
    """Values of the keys of one row of one layer of a target."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rows_seen(config: Any, num_layers: int, rows: int) -> list[int]:
    """Cached rows that each layer attends to: all, or those inside its window."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return [rows] * num_layers
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        sliding = getattr(config, "use_sliding_window", True)
        return [min(rows, window) if sliding else rows] * num_layers
    return [min(rows, window) if kind == "sliding_attention" else rows for kind in kinds]


def cache_bytes(config: Any, drafts: list[DraftConfig | SingleLayerConfig], dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens: a target's, and one cache for each of some drafts.

    Args:
        config: text configuration of the target (transformers).
        drafts: one for every method that drafts with it.
        dtype: of target and drafts.
        tokens: over all requests, room for what a cycle adds included.
    """
    values = config.num_hidden_layers * _kv_width(config)
    for draft in drafts:
        layers = draft.num_hidden_layers
        values += layers * draft.num_key_value_heads * draft.head_dim
    return 2 * values * tokens * dtype.itemsize


# A point of R texts, from which a cycle starts and to which it is reset. A text is read by the target, or its keys
# and values are random: a pass costs the same, and thousands of tokens are there at once.


def synthetic_text(target: Target, length: int, requests: int = 1, seed: int = 0) -> Tensor:
    """Random tokens [R, T], for timings that need no real text.

    The last token occurred before, but no longer n-gram did: look-up has something to copy, and long copies do not
    replace a draft.

    Raises:
        UserError: a length that the target has no room for.
    """
    if not 2 <= length < target.max_length:
        raise UserError(f"context must be between 2 and {target.max_length - 1} tokens, got {length}")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, target.vocab_size, (requests, length), generator=generator)
    tokens[:, -1] = tokens[:, (length - 1) // 2]
    return tokens.to(target.device)


def new_state(target: Target, tokens: Tensor, room: int) -> State:
    """Requests with committed tokens [R, T], nothing of them read yet, and room for `room` more; decoded greedily."""
    requests, length = tokens.shape
    lengths = torch.full((requests,), length, device=tokens.device)
    return State(
        F.pad(tokens, (0, room)),
        lengths,
        lengths.clone(),
        torch.ones_like(lengths, dtype=torch.bool),
        target.new_cache(requests, length + room),
        Sampling.alike(SamplingSettings(), requests, tokens.device),
    )


def read_state(target: Target, drafter: Drafter, state: State) -> Any:
    """Let the target and a drafter read the texts; returns the drafter's caches."""
    tokens, lengths = state.tokens[:, : int(state.lengths.max()) - 1], state.lengths - 1
    state.features = target.prefill(tokens, lengths, state.cache, drafter.feature_layers)
    return start(drafter, state)


def fill_state(state: State) -> None:
    """Random keys and values in place of those of the texts."""
    state.cache.keys.normal_()
    state.cache.values.normal_()
    state.cache.lengths.copy_(state.lengths - 1)


def filled_caches(target: Target, drafter: Drafter, state: State) -> Any:
    """A drafter's caches that have read random features in place of the target's."""
    requests, capacity = state.tokens.shape
    cache, rows = drafter.allocate(requests, capacity), int(state.lengths.max()) - 1
    width = len(drafter.feature_layers) * target.hidden_size
    for first in range(0, rows, PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, rows - first)
        features = None
        if width:
            features = torch.randn(requests, count, width, dtype=target.dtype, device=target.device)
        following = state.tokens[:, first + 1 : first + count + 1]
        drafter.read(cache, following, features, torch.full_like(state.lengths, count))
    return cache


def hold_state(state: State) -> Callable[[], None]:
    """A function that puts the texts back to their present lengths; rows after them may hold anything."""
    lengths = state.lengths.clone()

    def put_back() -> None:
        state.lengths.copy_(lengths)
        state.cache.lengths.copy_(lengths - 1)

    return put_back


def hold_caches(cache: Any) -> Callable[[], None]:
    """A function that puts a drafter's caches back to their present contents, except keys and values."""
    steps: list[Callable[[], None]] = []
    for name, value in vars(cache).items():
        if name in ("keys", "values"):
            continue
        if isinstance(value, Tensor):
            steps.append(functools.partial(_refill, cache, name, value.clone()))
        elif isinstance(value, list):
            steps.append(functools.partial(_replace_items, value, copy.deepcopy(value)))
        elif hasattr(value, "__dict__"):
            steps.append(hold_caches(value))

    def put_back() -> None:
        for step in steps:
            step()

    return put_back


def _refill(cache: Any, name: str, saved: Tensor) -> None:
    getattr(cache, name).copy_(saved)


def _replace_items(items: list[Any], saved: list[Any]) -> None:
    items[:] = copy.deepcopy(saved)
