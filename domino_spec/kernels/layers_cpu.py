"""All layers of a decoder in one call of layers.c: Python between the steps of a few rows is dear."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.kernels.cpu import address, loaded

_INTEGER, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Layer(ctypes.Structure):
    """`struct layer`, whose members layers.c explains."""

    _fields_ = (
        *((name, _INTEGER) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner")),
        *((name, _POINTER) for name in ("input_norm", "joined", "joined_bias", "query_norm", "key_norm")),
        *((name, _POINTER) for name in ("output", "output_bias", "post_norm", "gate_up", "gate_up_bias")),
        *((name, _POINTER) for name in ("down", "down_bias")),
        *((name, _REAL) for name in ("input_eps", "query_eps", "key_eps", "post_eps", "scale")),
        ("kind", _INTEGER),
    )


class _Pass(ctypes.Structure):
    """`struct pass`."""

    _fields_ = (
        *((name, _INTEGER) for name in ("requests", "tokens", "extent", "capacity", "rotary")),
        *((name, _INTEGER) for name in ("layer_stride", "request_stride", "head_stride")),
        *((name, _POINTER) for name in ("cos", "sin", "rows", "seen", "keys", "values", "x")),
        ("taps", _INTEGER),
        *((name, _POINTER) for name in ("tapped", "features")),
    )


@dataclass(frozen=True)
class Norm:
    """RMS norm: gain [width] and what is added to the mean square."""

    gain: Tensor
    eps: float


@dataclass(frozen=True)
class Product:
    """A packed weight and its bias (`cpu.pack`, `cpu.pack_bias`)."""

    panels: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights, float32 on CPU. Its widths are whole vectors (`cpu.fits`)."""

    input_norm: Norm
    joined: Product
    """Queries, keys and values: `heads` and twice `kv_heads` heads of `head_dim`."""
    query_norm: Norm | None
    """Of every head of queries, where the model has one."""
    key_norm: Norm | None
    output: Product
    """Of attention."""
    post_norm: Norm
    """Before the MLP."""
    gate_up: Product
    """Gate and up, `inner` outputs each."""
    down: Product
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    scale: float
    """Of the products of queries and keys."""
    kind: str
    """Of attention: names the mask."""


class DecoderLayers:
    """Layers whose weights stay where they are."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = tuple(layers)  # the memory that the addresses point to
        self.kinds = tuple(sorted({layer.kind for layer in layers}))
        """Of the masks that a pass needs."""
        self._in_c = (_Layer * len(layers))(*map(self._described, layers))

    def _described(self, layer: Layer) -> _Layer:
        described = _Layer(
            hidden=len(layer.input_norm.gain), heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim,
            inner=layer.inner, scale=layer.scale, kind=self.kinds.index(layer.kind),
        )  # fmt: skip
        for name in ("input", "query", "key", "post"):
            norm: Norm | None = getattr(layer, f"{name}_norm")
            if norm is not None:
                setattr(described, f"{name}_norm", norm.gain.data_ptr())
                setattr(described, f"{name}_eps", norm.eps)
        for name in ("joined", "output", "gate_up", "down"):
            product: Product = getattr(layer, name)
            setattr(described, name, product.panels.data_ptr())
            setattr(described, f"{name}_bias", address(product.bias))
        return described

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        masks: dict[str, Tensor],
        tapped: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Run N tokens of R requests through all layers; writes their keys and values.

        Args:
            x: [R, N, H], float32; what is in it is lost.
            cos: [R or 1, N, rotary], see `cpu.rotate_`.
            sin: as cos.
            keys: [layers, R, kv_heads, capacity, D], capacity and D contiguous.
            values: as keys, with the same strides.
            rows: [R, N] int64, where keys and values of each token go; those beyond the capacity are dropped.
            masks: of each of `kinds`, [R, 1, N, T] bool, True where seen; T <= capacity, every token sees something.
            tapped: layers whose outputs are wanted, counted from 0.

        Returns:
            The last layer's output [R, N, H], in the memory of `x` where that is contiguous, and the tapped layers'
            outputs side by side, [R, N, len(tapped) * H]; None where none is.
        """
        requests, tokens, width = x.shape
        x, rows = x.contiguous(), rows.contiguous()
        cos, sin = (part.expand(requests, -1, -1).contiguous() for part in (cos, sin))
        seen = [masks[kind].expand(requests, 1, tokens, -1).contiguous() for kind in self.kinds]
        features = x.new_empty(requests, tokens, len(tapped) * width) if tapped else None
        in_c = (_INTEGER * len(tapped))(*tapped)
        of_kinds = (_POINTER * len(seen))(*(mask.data_ptr() for mask in seen))
        stride = keys.stride()
        assert values.stride() == stride and rows.dtype == torch.int64
        assert all(0 <= layer < len(self._layers) for layer in tapped)
        described = _Pass(
            requests=requests, tokens=tokens, extent=seen[0].shape[3], capacity=keys.shape[3], rotary=cos.shape[-1],
            layer_stride=stride[0], request_stride=stride[1], head_stride=stride[2],
            cos=cos.data_ptr(), sin=sin.data_ptr(), rows=rows.data_ptr(), seen=ctypes.addressof(of_kinds),
            keys=keys.data_ptr(), values=values.data_ptr(), x=x.data_ptr(), taps=len(tapped),
            tapped=ctypes.addressof(in_c), features=address(features),
        )  # fmt: skip
        loaded().decoder_layers(self._in_c, len(self._layers), ctypes.byref(described))
        return x, features
