"""The DFlash backbone: one parallel pass from the target's features and a masked block to a hidden state per slot.

First half of a draft (the Domino head is the second). Every layer attends, without a causal mask, to the context that
was projected from the target's features, and to the block itself (paper 4.1.1; docs/design.md, section 4). The context
is the same tensor for every layer and is never updated, so its keys and values are projected for all layers in one
product and cached.

Shapes: R requests, B slots, T context rows, H hidden, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from domino_spec.draft.config import AnyConfig, DraftConfig
from domino_spec.ops.context import context_writer
from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import DecoderLayers, PackedLinear
from domino_spec.target.native import (
    FusedProjection,
    NotFusible,
    fuse,
    fused_layers,
    fused_norm,
    pack_linears,
)


class Rotary(NamedTuple):
    """Cosines and sines for a set of absolute positions, each [R, n, D]."""

    cos: Tensor
    sin: Tensor


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query [R, heads, n, D], keys and values [R, kv_heads, T + n, D] to [R, heads, n, D]."""


class ContextKV(NamedTuple):
    """Keys (rotated) and values of the context for every layer, each [layers, R, kv_heads, T, D]."""

    keys: Tensor
    values: Tensor


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply RoPE (half-split form, as Qwen3 and Llama) to `x` [R, heads, n, D]."""
    cos, sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of query [R, heads, n, D] to keys and values [R, kv_heads, m, D] where `mask` [R, 1, n, m] is True."""
    return folded_attention(query, key, value, fold_mask(mask, query, key))


def fold_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """`mask` [R, 1, n, m] for `folded_attention`, which reads it once for each query of a group."""
    return mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)


def folded_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """`grouped_attention` with a folded mask, of bools or of floats that are added to the scores.

    Grouped queries are folded into rows of their key/value head, so keys and values are never repeated.
    """
    requests, heads, slots, head_dim = query.shape
    folded = query.reshape(requests, key.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return out.reshape(requests, heads, slots, head_dim)


class RMSNorm(nn.RMSNorm):
    """RMS norm whose float32 master weight meets lower-precision activations under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., n] to [..., n], same dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries from the block; keys and values from the context and the block (DFlash)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, context_keys: Tensor, context_values: Tensor, mask: Tensor | Attend
    ) -> Tensor:
        """Attend from `x` [R, n, H] to context [R, kv_heads, T, D] and itself; `mask` is [R, 1, n, T + n].

        Training passes a function instead of a mask, since a mask for all of its blocks would be huge.
        """
        requests, slots, _ = x.shape
        query = self.q_proj(x).view(requests, slots, self.heads, self.head_dim)
        key = self.k_proj(x).view(requests, slots, self.kv_heads, self.head_dim)
        value = self.v_proj(x).view(requests, slots, self.kv_heads, self.head_dim)
        query = rotate(self.q_norm(query).transpose(1, 2), rotary)
        key = rotate(self.k_norm(key).transpose(1, 2), rotary).to(context_keys.dtype)
        key = torch.cat((context_keys, key), dim=2)  # [R, kv_heads, T + n, D]
        value = torch.cat((context_values, value.transpose(1, 2).to(context_values.dtype)), dim=2)
        query = query.to(key.dtype)
        out = grouped_attention(query, key, value, mask) if isinstance(mask, Tensor) else mask(query, key, value)
        out = out.transpose(1, 2)
        return self.o_proj(out.reshape(requests, slots, self.heads * self.head_dim))


class FusedBlockAttention(nn.Module):
    """`Attention` for inference on CPU, in a few native steps."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.project = FusedProjection(attention)
        self.output = PackedLinear(attention.o_proj.weight)
        self.k_norm = fused_norm(attention.k_norm)  # for the context's keys
        self.scaling = attention.head_dim**-0.5

    def forward(self, x: Tensor, rotary: Rotary, context_keys: Tensor, context_values: Tensor, mask: Tensor) -> Tensor:
        """As `Attention.forward`."""
        query, key, value = self.project(x, rotary.cos, rotary.sin)
        keys = torch.cat((context_keys, key.transpose(1, 2)), dim=2)
        values = torch.cat((context_values, value.transpose(1, 2)), dim=2)
        return self.output(cpu.attend(query, keys, values, mask, self.scaling).flatten(2))


class MLP(nn.Module):
    """SwiGLU, as in Qwen3."""

    def __init__(self, config: AnyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., H] to [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm layer over the block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, context_keys: Tensor, context_values: Tensor, mask: Tensor | Attend
    ) -> Tensor:
        """`x` [R, n, H] to [R, n, H]; arguments as in `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, context_keys, context_values, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class RotaryEmbedding(Qwen3RotaryEmbedding):
    """Frequencies stay float32 in every precision: rounded ones give wrong angles at far positions."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class Backbone(nn.Module):
    """`fc` and `hidden_norm` make the context; `layers` and `norm` map a block to hidden states.

    The parameter names are those of published checkpoints.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(rotary_config(config))
        self._context_projection: PackedLinear | None = None
        self._context_norms: Tensor | None = None
        self._write_context: Callable[..., None] | None = None
        """Of a packed backbone; else `append_context` asks `context_writer`."""
        self.joined_layers: DecoderLayers | None = None
        """All layers as one native step; None if they run one after another."""
        self.recompute_layers = False
        """Whether training computes the layers anew in the backward pass instead of keeping their activations."""

    def _context_weight(self) -> Tensor:
        """Projections to keys and values of all layers, concatenated."""
        return torch.cat([w for a in self._attentions for w in (a.k_proj.weight, a.v_proj.weight)])

    def _key_norms(self) -> Tensor:
        """[layers, D], gains of the norms of the context's keys."""
        return torch.stack([a.k_norm.weight for a in self._attentions]).detach()

    @property
    def _attentions(self) -> list[Attention]:
        return [layer.self_attn for layer in self.layers]  # type: ignore[misc]

    def pack(self) -> None:
        """Prepare for inference on CPU: weights laid out for few rows, small steps joined."""
        self._context_projection = PackedLinear(self._context_weight())
        norms = self._context_norms = self._key_norms()
        self._write_context = context_writer(norms.device.type, (norms.dtype,) * 3, norms.shape[-1])
        if cpu.is_available(self.fc.weight.device, self.fc.weight.dtype):
            for layer, attention in zip(self.layers, self._attentions, strict=True):
                with suppress(NotFusible):
                    layer.self_attn = FusedBlockAttention(attention)
            fuse(self)
            self.joined_layers = fused_layers(list(self.layers), ["block"] * len(self.layers))
        pack_linears(self)

    def rotary(self, positions: Tensor) -> Rotary:
        """RoPE factors in float32 for absolute `positions` [R, n]."""
        cos, sin = self.rotary_emb(torch.empty((), dtype=torch.float32, device=positions.device), positions)
        return Rotary(cos, sin)

    def project_context(self, features: Tensor, positions: Tensor) -> ContextKV:
        """Keys and values of all layers for new context rows, in one product.

        Args:
            features: [R, T, len(target_layer_ids) * H], the target's hidden states at the tapped layers.
            positions: [R, T], absolute positions of those tokens.
        """
        # [layers, 2, R, kv_heads, T, D]
        projected = self._project(features).permute(2, 3, 0, 4, 1, 5)
        rotary = self.rotary(positions)
        keys = torch.stack([rotate(a.k_norm(projected[i, 0]), rotary) for i, a in enumerate(self._attentions)])
        return ContextKV(keys.to(projected.dtype), projected[:, 1])

    def append_context(self, features: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """`project_context` for decoding: the new rows go straight into a cache, in place.

        Args:
            features: [R, T, len(target_layer_ids) * H].
            keys: [layers, R, kv_heads, capacity, D].
            values: as keys.
            lengths: [R], rows before, and so the position of the first new one; not changed here.
        """
        norms = self._key_norms() if self._context_norms is None else self._context_norms
        cos, sin = self.rotary(lengths[:, None] + torch.arange(features.shape[1], device=lengths.device))
        projected = self._project(features)
        types = (keys.dtype, projected.dtype, norms.dtype)
        write = self._write_context or context_writer(keys.device.type, types, keys.shape[-1])
        write(keys, values, lengths, projected, norms, self.config.rms_norm_eps, cos, sin)

    def _project(self, features: Tensor) -> Tensor:
        """Features to keys and values of all layers, neither normed nor rotated: [R, T, layers, 2, kv_heads, D]."""
        context = self.hidden_norm(self.fc(features))  # [R, T, H]
        if self._context_projection is not None:
            projected = self._context_projection(context)
        else:
            projected = F.linear(context, self._context_weight())
        return projected.unflatten(-1, (len(self.layers), 2, self.config.num_key_value_heads, self.config.head_dim))

    def forward(self, block: Tensor, positions: Tensor, context: ContextKV, mask: Tensor | Attend) -> Tensor:
        """Hidden state of every slot.

        Args:
            block: [R, n, H], embeddings of anchor and mask tokens; n may hold several blocks side by side.
            positions: [R, n], absolute positions of the slots.
            context: keys and values of T context rows.
            mask: [R, 1, n, T + n], True where a slot may attend: context first, then the block; or the attention.

        Returns:
            [R, n, H], after the final norm: `lm_head` of it gives the base logits.
        """
        rotary = self.rotary(positions)
        for layer, keys, values in zip(self.layers, context.keys, context.values, strict=True):
            if self.recompute_layers and torch.is_grad_enabled():
                block = checkpoint(layer, block, rotary, keys, values, mask, use_reentrant=False)
            else:
                block = layer(block, rotary, keys, values, mask)
        return self.norm(block)

    @property
    def rows_behind(self) -> int:
        """Rows past a request's context that `over_cache` writes."""
        return 0 if self.joined_layers is None else self.config.block_size

    def over_cache(
        self, block: Tensor, positions: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, extent: int
    ) -> Tensor:
        """`forward` for decoding: one block for each request, which sees all of itself and its request's context.

        Args:
            block: [R, n, H]; overwritten.
            positions: [R, n].
            keys: [layers, R, kv_heads, capacity, D]; `rows_behind` past a request's rows are overwritten.
            values: as keys.
            lengths: [R], rows of context.
            extent: rows of context that are read, at least the longest of `lengths`; `rows_behind` more exist.

        Returns:
            [R, n, H].
        """
        if self.joined_layers is None:
            context = ContextKV(keys[:, :, :, :extent], values[:, :, :, :extent])
            return self._over_context(block, positions, context, lengths)
        slots = block.shape[1]
        index = torch.arange(extent + slots, device=lengths.device)
        mask = (index < lengths[:, None] + slots)[:, None, None].expand(-1, -1, slots, -1)
        rows, rotary = lengths[:, None] + index[:slots], self.rotary(positions)
        hidden, _ = self.joined_layers(block, rotary.cos, rotary.sin, keys, values, rows, {"block": mask})
        return self.norm(hidden)

    def _over_context(self, block: Tensor, positions: Tensor, context: ContextKV, lengths: Tensor) -> Tensor:
        """`over_cache` layer by layer."""
        requests, slots = positions.shape
        seen = torch.arange(context.keys.shape[3], device=lengths.device) < lengths[:, None]
        mask = torch.cat((seen, seen.new_ones(requests, slots)), dim=1)  # [R, T + n]
        return self(block, positions, context, mask[:, None, None].expand(-1, -1, slots, -1))


Module = TypeVar("Module", bound=nn.Module)


def sharing_copy(module: Module) -> Module:
    """Another module with the same parts, which can be exchanged one by one."""
    copy = module.__new__(type(module))
    copy.__dict__ = {
        name: dict(value) if name in ("_modules", "_parameters", "_buffers") else value
        for name, value in module.__dict__.items()
    }
    return copy


def output_rows(linear: Any, choices: Tensor) -> Any:
    """A linear layer without a bias that gives the chosen outputs [n] only; packed if `linear` is."""
    weight = linear.weight[choices]
    if isinstance(linear, PackedLinear):
        return PackedLinear(weight)
    smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    smaller.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    return smaller.train(linear.training)


def rotary_config(config: AnyConfig) -> Qwen3Config:
    """The configuration of a draft's rotary embedding, in transformers' form."""
    parameters = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    return Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=parameters,
    )
