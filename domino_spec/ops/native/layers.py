"""All layers of a decoder in one call of layers.c: Python between the steps of a few rows is dear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from domino_spec.ops.native import bindings


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
    """Layers whose weights stay where they are.

    Raises:
        ValueError: some weight does not have the size that others ask of it (`bindings.Described`).
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.kinds = tuple(sorted({layer.kind for layer in layers}))
        """Of the masks that a pass needs."""
        self._described = bindings.Described(layers, self.kinds)

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
            masks: of each of `kinds`, [R, 1, N, T] bool, True where seen; T <= capacity.
            tapped: layers whose outputs are wanted, counted from 0.

        Returns:
            The last layer's output [R, N, H], in the memory of `x` where that is contiguous, and the tapped layers'
            outputs side by side, [R, N, len(tapped) * H]; None where none is.

        Raises:
            ValueError: an argument does not fit, or a row is negative.
        """
        x, rows = x.contiguous(), rows.contiguous()
        requests, tokens = rows.shape
        cos, sin = (
            bindings.spread("decoder_layers", name, part, (requests, tokens, part.shape[-1]))
            for name, part in (("cos", cos), ("sin", sin))
        )
        seen = [
            bindings.spread("decoder_layers", "masks", masks[kind], (requests, 1, tokens, masks[kind].shape[-1]))
            for kind in self.kinds
        ]
        features = x.new_empty(requests, tokens, len(tapped) * x.shape[-1]) if tapped else None
        bindings.decoder_layers(self._described, x, cos, sin, keys, values, rows, seen, tapped, features)
        return x, features
