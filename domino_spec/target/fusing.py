"""Modules of a target replaced by ones that do the same in fewer, native steps (`kernels.cpu`).

Half of a small model's pass on CPU goes into the dozens of small PyTorch calls of every layer, not into its products.
Families of models differ in details (a scale here, a norm there), so nothing is assumed about a module that only looks
familiar: it is replaced where the replacement gives the same output on random input, and stays where it does not.
Where all layers of a model consist of such modules, `fused_layers` runs them in one step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domino_spec.kernels import cpu
from domino_spec.kernels.layers_cpu import DecoderLayers, Layer, Norm, Product
from domino_spec.target.attention import folded_attention
from domino_spec.target.packing import PackedLinear

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Relative to the largest output: float32 products in another order differ by far less, another formula by far more."""


class FusedNorm(nn.Module):
    """RMS norm in one step.

    Args:
        gain: [H], what the normed values are multiplied with.
        eps: added to the mean square.
    """

    weight: Tensor

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", gain.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to the same."""
        return cpu.rms_norm(x, self.weight, self.eps)


class FusedMLP(nn.Module):
    """SwiGLU with gate and up projected by one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        if not cpu.fits(mlp.gate_proj.out_features):
            raise NotFusible
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj.weight, mlp.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to the same."""
        return self.down(cpu.silu_mul(self.gate_up(x)))


class FusedProjection(nn.Module):
    """Queries, keys and values by one product, normed where the model norms heads, and rotated in place.

    Args:
        attention: has q_proj, k_proj, v_proj, `head_dim`, and maybe q_norm and k_norm.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim: int = attention.head_dim
        if not cpu.fits(self.head_dim):
            raise NotFusible
        self.joined = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.head_norms: list[tuple[int, int, FusedNorm]] = []
        for first, count, name in ((0, self.heads, "q_norm"), (self.heads, self.kv_heads, "k_norm")):
            norm = getattr(attention, name, None)
            if norm is not None:
                fused = fused_norm(norm)
                if fused is None or len(fused.weight) != self.head_dim:  # MiniMax-M2 norms all heads as one
                    raise NotFusible
                self.head_norms.append((first, count, fused))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R, N, H] to query [R, N, heads, D], key and value [R, N, kv_heads, D]; cos and sin are [R or 1, N, D]."""
        joined = self.joined(x)  # [R, N, (heads + 2 kv_heads) * D]
        for first, count, norm in self.head_norms:
            cpu.rms_norm_heads_(joined, first, count, norm.weight, norm.eps)
        cpu.rotate_(joined, self.heads + self.kv_heads, self.head_dim, cos, sin)
        by_head = joined.view(*x.shape[:2], -1, self.head_dim)
        query, key, value = by_head.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        return query, key, value


class FusedAttention(nn.Module):
    """A target's grouped-query attention, called as transformers calls its own."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.project = FusedProjection(attention)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.layer_idx, self.scaling = attention.layer_idx, attention.scaling

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """[R, N, H] to the same."""
        query, key, value = self.project(hidden_states, *position_embeddings)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        if attention_mask is None or attention_mask.dtype != torch.bool:
            out, _ = folded_attention(self, query.transpose(1, 2), keys, values, attention_mask, self.scaling)
        else:
            if past_key_values is None:
                keys, values = keys.contiguous(), values.contiguous()
            out = cpu.attend(query, keys, values, attention_mask, self.scaling)
        return self.output(out.reshape(*hidden_states.shape[:2], -1)), None


class NotFusible(Exception):
    """A part of the module has no fused form."""


def fuse(model: nn.Module) -> int:
    """Replace what can be replaced below `model`; returns how many modules were.

    Args:
        model: frozen, float32, on CPU; before its linear layers are packed.
    """
    replaced = 0
    for name, child in list(model.named_children()):
        fused = _fused(child)
        if fused is None:
            replaced += fuse(child)
        else:
            setattr(model, name, fused)
            replaced += 1
    return replaced


def fused_layers(layers: Sequence[nn.Module], kinds: Sequence[str]) -> DecoderLayers | None:
    """All layers of a decoder as one step; None where one has a part that is not fused, or parts of other names.

    That nothing else happens in them (a scaled sum, say) is for the caller to try.

    Args:
        layers: after `fuse`; their attention has `project`, `output` and `scaling`, as `FusedAttention` has.
        kinds: each layer's mask.
    """
    try:
        return DecoderLayers([_described(layer, kind) for layer, kind in zip(layers, kinds, strict=True)])
    except (NotFusible, AttributeError) as error:
        _log.debug("layers run one after another: %r", error)
        return None


def fused_norm(norm: Any) -> FusedNorm | None:
    """The fused form of an RMS norm whose gain is its weight (Llama) or one plus its weight (Gemma); else None."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or not cpu.fits(len(weight)):
        return None
    x = _noise(3, len(weight))
    return next((f for f in (FusedNorm(weight, eps), FusedNorm(1 + weight, eps)) if _agree(norm, f, x)), None)


def _fused(module: Any) -> nn.Module | None:
    """The fused form of a module, if it has one that agrees with it."""
    try:
        if _has_linears(module, "gate_proj", "up_proj", "down_proj"):
            mlp, x = FusedMLP(module), _noise(3, module.gate_proj.in_features)
            return mlp if _agree(module, mlp, x) else None
        if _has_linears(module, "q_proj", "k_proj", "v_proj", "o_proj"):
            attention, x = FusedAttention(module), _noise(2, 3, module.q_proj.in_features)
            rotary = (_noise(2, 3, attention.project.head_dim), _noise(2, 3, attention.project.head_dim))
            mask = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 1, 3, 3)
            return attention if _agree(module, attention, x, position_embeddings=rotary, attention_mask=mask) else None
        return fused_norm(module)
    except (NotFusible, AttributeError, TypeError, ValueError, RuntimeError) as error:
        _log.debug("%s stays as it is: %r", type(module).__name__, error)
        return None


def _agree(module: nn.Module, fused: nn.Module, x: Tensor, **arguments) -> bool:
    """Whether both give the same output, on input of the scale that norms leave."""
    with torch.no_grad():
        expected, got = module(x, **arguments), fused(x, **arguments)
    if isinstance(expected, tuple):
        expected, got = expected[0], got[0]
    return near(expected, got)


def near(expected: Tensor, got: Tensor) -> bool:
    """Whether two results differ by no more than float32 products in another order do."""
    return bool((expected - got).abs().max() <= _TOLERANCE * expected.abs().max())


def _has_linears(module: nn.Module, *names: str) -> bool:
    linears = [getattr(module, name, None) for name in names]
    return all(type(linear) is nn.Linear for linear in linears)


def _described(layer: Any, kind: str) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    project = attention.project
    if not isinstance(project, FusedProjection) or not isinstance(mlp, FusedMLP):
        raise NotFusible
    of_heads = {first: _norm(norm) for first, _, norm in project.head_norms}
    return Layer(
        input_norm=_norm(layer.input_layernorm),
        joined=_product(project.joined),
        query_norm=of_heads.get(0),
        key_norm=of_heads.get(project.heads),
        output=_product(attention.output),
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up=_product(mlp.gate_up),
        down=_product(mlp.down),
        heads=project.heads,
        kv_heads=project.kv_heads,
        head_dim=project.head_dim,
        inner=mlp.down.in_features,
        scale=attention.scaling,
        kind=kind,
    )


def _norm(norm: Any) -> Norm:
    if not isinstance(norm, FusedNorm):
        raise NotFusible
    return Norm(norm.weight, norm.eps)


def _product(linear: PackedLinear) -> Product:
    if linear.panels is None:
        raise NotFusible
    return Product(linear.panels, linear.bias)


def _joined(*linears: nn.Linear) -> PackedLinear:
    """Several projections of the same input as one product, outputs side by side."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise NotFusible
    return PackedLinear(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
