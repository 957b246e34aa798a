"""Replaces a model's modules by faster ones for inference on CPU: packed linear layers, fused norms, MLPs, attention.

Half of a small model's pass on CPU goes into the dozens of small PyTorch calls of every layer, not into its products.
Families differ in details (a scale here, a norm there), so a module is replaced only if the replacement gives the same
output. Norms and MLPs are tried on random input, attention on the arguments of a real call, because transformers
renames those. The check at load (`check.py`) then compares the whole target with the model's own modules. If all layers
of a model consist of such modules, `fused_layers` runs them in one step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import DecoderLayers, FusedNorm, Layer, Norm, PackedLinear, Product
from domino_spec.target.cache import folded_attention, watch_attention

_log = logging.getLogger(__name__)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and device have packed products for `dtype`; warns if they are missing."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if cpu.is_available(device, dtype):
        return True
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not available:
        _log.warning("this PyTorch build has no packed linear products; decoding on CPU will be slower")
    return available


def pack_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` below `module` by its packed form; returns how many there were.

    Only for frozen modules that are used for inference. oneDNN's form takes twice the memory, the native one no more.
    """
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(child.weight, bias))
                replaced += 1
    return replaced


_TOLERANCE = 1e-4
"""Relative to the largest output: float32 products in another order differ by far less, another formula by far more."""


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
    """Queries, keys and values by one product, normed if the model norms heads, and rotated in place.

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
                if fused is None or len(fused.weight) != self.head_dim:  # a norm over all heads (MiniMax-M2)
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
    """A target's grouped-query attention, called as transformers calls its own.

    It takes what it needs out of the call by its type, because the names of arguments differ between versions.

    Args:
        attention: has q_proj, k_proj, v_proj, o_proj, `head_dim`, `layer_idx`, and maybe q_norm and k_norm.
        scaling: of the products of queries and keys; None reads it from `attention`.
    """

    def __init__(self, attention: Any, scaling: float | None = None) -> None:
        super().__init__()
        self.project = FusedProjection(attention)
        self.output = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self.layer_idx = attention.layer_idx
        self.scaling: float = attention.scaling if scaling is None else scaling

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, None]:
        """[R, N, H] to the same.

        Args:
            hidden_states: [R, N, H].
            arguments: among these and `named`, a pair of tensors (cos and sin of RoPE, [R or 1, N, D]), a tensor of
                four dimensions (the mask, [R or 1, 1, N, T]; none is causal), and a cache.
            named: as `arguments`.
        """
        given = (*arguments, *named.values())
        cos, sin = next(argument for argument in given if _is_pair(argument))
        mask = next((x for x in given if isinstance(x, Tensor) and x.dim() == 4), None)
        cache = next((argument for argument in given if isinstance(argument, Cache)), None)
        query, key, value = self.project(hidden_states, cos, sin)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        if mask is None or mask.dtype != torch.bool:
            out, _ = folded_attention(self, query.transpose(1, 2), keys, values, mask, self.scaling)
        else:
            if cache is None:
                keys, values = keys.contiguous(), values.contiguous()
            out = cpu.attend(query, keys, values, mask, self.scaling)
        return self.output(out.reshape(*hidden_states.shape[:2], -1)), None


def _is_pair(argument: Any) -> bool:
    return isinstance(argument, (tuple, list)) and len(argument) == 2 and all(isinstance(x, Tensor) for x in argument)


@dataclass(frozen=True)
class Call:
    """How a model called one of its attention modules."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def repeat(self, module: nn.Module) -> Any:
        """What `module` gives for these arguments; keys and values go to the same rows of the cache again."""
        return module(*self.arguments, **self.named)


@contextmanager
def attention_calls(model: nn.Module) -> Iterator[dict[nn.Module, Call]]:
    """Record the last call of every attention module below `model` that has the usual projections."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[module] = Call(arguments, named)

    with ExitStack() as hooks:
        for module in model.modules():
            if _is_attention(module):
                hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield calls


class NotFusible(Exception):
    """A part of the module has no fused form."""


def fuse(model: nn.Module, calls: Mapping[nn.Module, Call] | None = None) -> int:
    """Replace what can be replaced below `model`; returns how many modules were.

    Args:
        model: frozen, float32, on CPU; before its linear layers are packed.
        calls: from `attention_calls`; attention without a call stays.
    """
    replaced = 0
    for name, child in list(model.named_children()):
        fused = _fused(child, calls or {})
        if fused is None:
            replaced += fuse(child, calls)
        else:
            setattr(model, name, fused)
            replaced += 1
    return replaced


def fused_layers(layers: Sequence[nn.Module], kinds: Sequence[str]) -> DecoderLayers | None:
    """All layers of a decoder as one step; None if one has a part that is not fused, or parts of other names.

    The caller must try whether the layers do nothing else (a scaled sum, say).

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


def _fused(module: Any, calls: Mapping[nn.Module, Call]) -> nn.Module | None:
    """The fused form of a module, if it has one that agrees with it."""
    try:
        if _has_linears(module, "gate_proj", "up_proj", "down_proj"):
            mlp, x = FusedMLP(module), _noise(3, module.gate_proj.in_features)
            return mlp if _agree(module, mlp, x) else None
        if _is_attention(module):
            return _fused_attention(module, calls[module])
        return fused_norm(module)
    except (NotFusible, AttributeError, KeyError, StopIteration, TypeError, ValueError, RuntimeError) as error:
        _log.debug("%s stays as it is: %r", type(module).__name__, error)
        return None


def _fused_attention(attention: Any, call: Call) -> FusedAttention | None:
    with torch.no_grad():
        with watch_attention() as watched:
            expected = call.repeat(attention)
        (asked,) = watched
        if asked["softcap"] is not None or asked["s_aux"] is not None:  # a random call may not show their effect
            raise NotFusible
        fused = FusedAttention(attention, asked["scaling"] or attention.head_dim**-0.5)
        got = call.repeat(fused)
    if not isinstance(expected, tuple) or len(expected) != len(got):
        return None
    return fused if near(expected[0], got[0]) else None


def _agree(module: nn.Module, fused: nn.Module, x: Tensor) -> bool:
    """Whether both give the same output, on input of the scale that norms leave."""
    with torch.no_grad():
        return near(module(x), fused(x))


def near(expected: Tensor, got: Tensor) -> bool:
    """Whether two results differ by no more than float32 products in another order do."""
    same_shape = expected.shape == got.shape
    return same_shape and bool((expected - got).abs().max() <= _TOLERANCE * expected.abs().max())


def _is_attention(module: nn.Module) -> bool:
    return _has_linears(module, "q_proj", "k_proj", "v_proj", "o_proj")


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
