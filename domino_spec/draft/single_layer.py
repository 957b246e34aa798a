"""The draft of EAGLE-3 and DART: one decoder layer over pairs of a token's embedding and a feature of the target.

Both fuse three of the target's hidden states into one feature (`fc`), pair the feature of position t with the token at
t + 1, and read from such pairs what comes at t + 2. EAGLE-3 (arXiv 2503.01840) goes on token by token: its own output
takes the place of the feature that does not exist yet. DART (arXiv 2601.19278) appends masked positions and predicts
all of them in one causal pass. Parameter names are those of published checkpoints.

Shapes: R requests, n new pairs, T cached pairs, H hidden, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.draft.backbone import (
    MLP,
    Attend,
    RMSNorm,
    Rotary,
    RotaryEmbedding,
    grouped_attention,
    output_rows,
    rotary_config,
    rotate,
)
from domino_spec.draft.config import SingleLayerConfig, feature_levels
from domino_spec.draft.domino import BaseDraft
from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import PackedLinear
from domino_spec.settings import UserError
from domino_spec.target.native import FusedProjection, NotFusible, fuse, pack_linears

if TYPE_CHECKING:
    from typing_extensions import Self

    from domino_spec.target.model import Target


class PairKV(NamedTuple):
    """Rotated keys and values of pairs, each [R, kv_heads, n, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class TensorLayout:
    """Names and types of tensors in a checkpoint file, if they differ from the draft's; saving keeps them."""

    layer: str = "midlayer"
    """What the layer's tensors are called: `midlayer`, or `layers.0`."""
    d2t: torch.dtype = torch.int64
    t2d: torch.dtype | None = torch.bool
    """None if the file has none."""


class PairAttention(nn.Module):
    """Attention of the layer: projections read a normed embedding and a normed feature side by side."""

    def __init__(self, config: SingleLayerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(2 * config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> PairKV:
        """Keys and values of pairs `x` [R, n, 2H]."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        keys = rotate(self.k_proj(x).view(shape).transpose(1, 2), rotary)
        values = self.v_proj(x).view(shape).transpose(1, 2)
        return PairKV(keys.to(values.dtype), values)

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries of pairs `x` [R, n, 2H], rotated: [R, heads, n, D]."""
        query = self.q_proj(x)
        return rotate(query.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2), rotary).to(query.dtype)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, PairKV]:
        """Queries, keys and values of pairs `x` [R, n, 2H]."""
        return self.queries(x, rotary), self.keys_values(x, rotary)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[R, heads, n, D] over keys and values [R, kv_heads, m, D] where `mask` [R, 1, n, m] is True: [R, n, H]."""
        return self.merge(grouped_attention(query.to(keys.dtype), keys, values, mask))

    def merge(self, out: Tensor) -> Tensor:
        """What attention gave, [R, heads, n, D], to [R, n, H]."""
        requests, _, rows, _ = out.shape
        return self.o_proj(out.transpose(1, 2).reshape(requests, rows, self.heads * self.head_dim))


class FusedPairAttention(nn.Module):
    """`PairAttention` for inference on CPU, in a few native steps."""

    def __init__(self, attention: PairAttention) -> None:
        super().__init__()
        self.joined = FusedProjection(attention)
        self.o_proj = PackedLinear(attention.o_proj.weight)
        # Of most of a prompt's pairs only keys and values are needed.
        self.context = PackedLinear(torch.cat((attention.k_proj.weight, attention.v_proj.weight)))
        self.kv_heads, self.head_dim = attention.kv_heads, attention.head_dim

    def keys_values(self, x: Tensor, rotary: Rotary) -> PairKV:
        """As `PairAttention.keys_values`."""
        joined = self.context(x)
        cpu.rotate_(joined, self.kv_heads, self.head_dim, rotary.cos, rotary.sin)
        keys, values = joined.view(*x.shape[:2], 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        return PairKV(keys, values)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, PairKV]:
        """As `PairAttention.project`."""
        query, key, value = (part.transpose(1, 2) for part in self.joined(x, rotary.cos, rotary.sin))
        return query, PairKV(key, value)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """As `PairAttention.attend`; every pair must attend to something."""
        out = cpu.attend(query.transpose(1, 2), keys, values, mask, self.head_dim**-0.5)
        return self.o_proj(out.flatten(2))


class PairLayer(nn.Module):
    """A Llama layer whose attention reads pairs, and whose residual is the feature before its norm."""

    def __init__(self, config: SingleLayerConfig) -> None:
        super().__init__()
        self.self_attn: PairAttention | FusedPairAttention = PairAttention(config)
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def pair(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Embeddings and features, each [..., H], normed and side by side: [..., 2H]."""
        return torch.cat((self.input_layernorm(embeddings), self.hidden_norm(features)), dim=-1)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """From attention's output and the residual, each [R, n, H], to the layer's output."""
        x = residual + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class SingleLayerDraft(BaseDraft):
    """An EAGLE-3 or DART draft.

    Args:
        config: its shape.
        draft_vocab_ids: as in `BaseDraft`, in the order of the LM head's rows. Checkpoints hold it as the offsets
            `d2t`.
    """

    config: SingleLayerConfig
    borrows_lm_head = False
    head: None = None
    """No Domino head: the logits are final."""
    embed_tokens: Tensor | None
    """[V, H], the checkpoint's embedding; None uses the target's."""

    def __init__(self, config: SingleLayerConfig, draft_vocab_ids: Tensor | None = None) -> None:
        super().__init__(config, draft_vocab_ids)
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=False)
        self.midlayer = PairLayer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.logits_size, bias=False)
        # DART's masked position: it replaces the normed pair; the first half is its residual as well.
        self.mask_rep = nn.Parameter(torch.zeros(2 * config.hidden_size)) if config.kind == "dart" else None
        self.rotary_emb = RotaryEmbedding(rotary_config(config))
        self.register_buffer("embed_tokens", None, persistent=False)
        self.layout = TensorLayout()
        self.stop_token_ids: frozenset[int] = frozenset()
        """The target's: DART's search extends prefixes that end in one of them last."""

    def bind(self, target: Target) -> Self:
        """As of any draft; learns the target's depth if the checkpoint does not say it. The LM head only teaches.

        Raises:
            UserError: as of any draft; or it is not as wide as the target, and its checkpoint has no embedding.
        """
        config = self.config
        if self.embed_tokens is None and config.hidden_size != target.hidden_size:
            raise UserError(
                f"the draft's hidden size is {config.hidden_size}, that of {target.name} {target.hidden_size}: it must "
                "hold an embedding of its own (embed_tokens.weight)"
            )
        layers = config.target_layer_ids or feature_levels(target.num_layers)
        self.config = replace(config, target_layer_ids=layers, num_target_layers=target.num_layers)
        self.stop_token_ids = target.stop_token_ids
        return super().bind(target)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the draft's parameters are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Type of the draft's parameters."""
        return self.norm.weight.dtype

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H]."""
        return self.lm_head.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] to embeddings [..., H], in the draft's dtype."""
        if self.embed_tokens is not None:
            return F.embedding(token_ids, self.embed_tokens).to(self.dtype)
        return super().embed(token_ids)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's hidden states [..., 3 * target H] to one feature [..., H]; not for the draft's outputs."""
        return self.fc(self.read_features(features))

    def rotary(self, positions: Tensor) -> Rotary:
        """RoPE factors in float32 for `positions` [R, n]; a pair has its feature's position."""
        cos, sin = self.rotary_emb(torch.empty((), dtype=torch.float32, device=positions.device), positions)
        return Rotary(cos, sin)

    def pair(self, token_ids: Tensor, features: Tensor) -> Tensor:
        """Tokens [R, n] and the features of the positions before them [R, n, H] to what attention reads [R, n, 2H]."""
        return self.midlayer.pair(self.embed(token_ids), features)

    def keys_values(self, pairs: Tensor, positions: Tensor) -> PairKV:
        """Keys and values of `pairs` [R, n, 2H] at `positions` [R, n], to be cached."""
        return self.midlayer.self_attn.keys_values(pairs, self.rotary(positions))

    def forward(
        self, pairs: Tensor, residual: Tensor, positions: Tensor, cached: PairKV, mask: Tensor | Attend
    ) -> tuple[Tensor, PairKV]:
        """The layer over new pairs.

        Args:
            pairs: [R, n, 2H], of `pair`, or DART's masks.
            residual: [R, n, H], the pairs' features before their norm.
            positions: [R, n].
            cached: keys and values of T earlier pairs, [R, kv_heads, T, D].
            mask: [R, 1, n, T + n], True where a pair may attend: cached ones first, then new ones; or the attention.

        Returns:
            The layer's output [R, n, H], before the final norm: what EAGLE-3 takes for the next feature, and what
            `logits` reads; and the keys and values of the new pairs.
        """
        attention = self.midlayer.self_attn
        query, new = attention.project(pairs, self.rotary(positions))
        keys = torch.cat((cached.keys, new.keys.to(cached.keys.dtype)), dim=2)
        values = torch.cat((cached.values, new.values.to(cached.values.dtype)), dim=2)
        if isinstance(mask, Tensor):
            return self.midlayer.finish(attention.attend(query, keys, values, mask), residual), new
        assert isinstance(attention, PairAttention), "a draft packed for decoding is not trained"
        attended = attention.merge(mask(query.to(keys.dtype), keys, values))
        return self.midlayer.finish(attended, residual), new

    def extend(
        self, pairs: Tensor, residual: Tensor, positions: Tensor, write: Callable[[PairKV], PairKV], mask: Tensor
    ) -> Tensor:
        """`forward` for a caller that stores keys and values itself, so that no pass copies them.

        Args:
            pairs: as in `forward`, and so are `residual` and `positions`.
            write: stores the keys and values of the new pairs, and returns all that attention reads, m of them.
            mask: [R, 1, n, m], True where a pair may attend.

        Returns:
            The layer's output [R, n, H].
        """
        attention = self.midlayer.self_attn
        query, new = attention.project(pairs, self.rotary(positions))
        keys, values = write(new)
        return self.midlayer.finish(attention.attend(query, keys, values, mask), residual)

    def mask_pairs(self, requests: int, count: int) -> tuple[Tensor, Tensor]:
        """DART's masked positions: pairs [R, count, 2H] and their residual [R, count, H]."""
        assert self.mask_rep is not None
        pairs = self.mask_rep.expand(requests, count, -1)
        return pairs, pairs[..., : self.config.hidden_size]

    def final_hidden(self, out: Tensor) -> Tensor:
        """What the LM head reads, from the layer's output [..., H].

        DART's released code applies the norm twice, so released weights need it twice.
        """
        hidden = self.norm(out)
        return self.norm(hidden) if self.config.kind == "dart" else hidden

    def base_logits(self, hidden: Tensor) -> Tensor:
        """`final_hidden`'s [..., H] to logits [..., V or draft vocabulary]."""
        return self.lm_head(hidden)

    def logits(self, out: Tensor) -> Tensor:
        """The layer's output [..., H] to logits [..., V or draft vocabulary]."""
        return self.base_logits(self.final_hidden(out))

    def pack(self) -> Self:
        """Prepare for inference on CPU: weights laid out for few rows, small steps joined; the draft can no longer be
        saved. Returns self."""
        attention = self.midlayer.self_attn
        if cpu.is_available(self.device, self.dtype):
            with suppress(NotFusible):
                assert isinstance(attention, PairAttention)
                self.midlayer.self_attn = FusedPairAttention(attention)
            fuse(self)
        pack_linears(self)
        self.packed = True
        return self

    def trial_logits(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Logits [1, n, V] after tokens [1, n] with features [1, n, F], to see whether they are finite."""
        count = tokens.shape[1]
        positions = torch.arange(count, device=tokens.device)[None]
        fused = self.fuse(features.to(self.dtype))
        pairs = self.pair(tokens, fused)
        causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        cached = PairKV(*(part[:, :, :0] for part in self.keys_values(pairs, positions)))
        return self.logits(self(pairs, fused, positions, cached, causal[None, None])[0])

    def keep_outputs(self, choices: Tensor) -> None:
        """Keep only these outputs [n], in a new LM head; call `bind` next."""
        self.lm_head = output_rows(self.lm_head, choices)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of fc, layer (the norms and DART's mask included), lm_head, and embed_tokens if it has one."""
        parts = {"fc": self.fc.weight.numel(), "layer": 0, "lm_head": self.lm_head.weight.numel()}
        parts["layer"] = sum(p.numel() for p in self.parameters()) - sum(parts.values())
        return parts if self.embed_tokens is None else {**parts, "embed_tokens": self.embed_tokens.numel()}
