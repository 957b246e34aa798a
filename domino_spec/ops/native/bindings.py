"""The one door to the C loops: every entry of the library, as a function of tensors.

C reads and writes where it is told to. So nothing else in the package calls it, and nothing gets past these functions
that does not fit: types, devices, strides and shapes are compared here, with each other and with the processor's
vectors. Numbers inside tensors (rows of a cache, labels, tokens) are compared by C, which reads them anyway, and
reports. What does not fit is a ValueError (a TypeError if it is no tensor) that names function and argument, what is
expected and what was found; without memory for scratch there is a MemoryError. Weights are compared once, when a
`DecoderLayers` or a `Head` is made; a call compares only what it brings.

Two properties matter for decoding: a pass over a dozen rows costs hardly more than a pass over one, and every row of a
result has the same bits whatever the number of rows. All tensors are float32 on the CPU unless something else is said.
If `is_available` says no, callers keep PyTorch's functions.

Shapes: R requests, N tokens, D head_dim.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.native import build

if TYPE_CHECKING:
    from domino_spec.ops.blended import Terms
    from domino_spec.ops.heads import Draw, HeadInputs, HeadWeights

_log = logging.getLogger(__name__)

# ---- the library ----

_INTEGER, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_ENTRIES = {
    "linear": [_POINTER, *[_INTEGER] * 2, *[_POINTER] * 2, _INTEGER, *[_POINTER] * 2],
    "rms_norm": [_POINTER, *[_INTEGER] * 4, _POINTER, _REAL, _POINTER],
    "rotate": [_POINTER, *[_INTEGER] * 5, *[_POINTER] * 2],
    "silu_mul": [_POINTER, *[_INTEGER] * 2, _POINTER],
    "attend": [_POINTER, _INTEGER, *[_POINTER] * 2, *[_INTEGER] * 2, _POINTER, *[_INTEGER] * 6, _REAL, _POINTER],
    "write_context": [_POINTER, *[_INTEGER] * 5, _POINTER, _REAL, *[_POINTER] * 3, *[_INTEGER] * 4, *[_POINTER] * 2],
    "decoder_layers": [_POINTER, _INTEGER, _POINTER],
    "head_rollout": [_POINTER],
    "blended_rows": [
        *[_INTEGER, _POINTER, _POINTER, _INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER],
        *[_REAL] * 6,
        *[_POINTER] * 2,
    ],
}
_NO_MEMORY, _BAD_INDEX = 1, 2
"""`enum status` of cpu.h, of the entries that can fail."""
_CAN_FAIL = ("attend", "write_context", "decoder_layers", "head_rollout", "blended_rows")


class _Layer(ctypes.Structure):
    """`struct layer`; layers.c explains its members."""

    _fields_ = (
        *((name, _INTEGER) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner")),
        *((name, _POINTER) for name in ("input_norm", "joined", "joined_bias", "query_norm", "key_norm")),
        *((name, _POINTER) for name in ("output", "output_bias", "post_norm", "gate_up", "gate_up_bias")),
        *((name, _POINTER) for name in ("down", "down_bias")),
        *((name, _REAL) for name in ("input_eps", "query_eps", "key_eps", "post_eps", "scale")),
        ("kind", _INTEGER),
    )


class _Pass(ctypes.Structure):
    """`struct pass`, of layers.c too."""

    _fields_ = (
        *((name, _INTEGER) for name in ("requests", "tokens", "extent", "capacity", "rotary")),
        *((name, _INTEGER) for name in ("layer_stride", "request_stride", "head_stride")),
        *((name, _POINTER) for name in ("cos", "sin", "rows", "seen", "keys", "values", "x")),
        ("taps", _INTEGER),
        *((name, _POINTER) for name in ("tapped", "features")),
    )


class _Head(ctypes.Structure):
    """`struct head`; rollout.c explains its members."""

    _fields_ = (
        *((name, _INTEGER) for name in ("hidden", "state", "low_rank", "pure_prefix", "tokens")),
        *((name, _POINTER) for name in ("input_gates", "state_gates", "to_low_rank", "correction")),
        *((name, _POINTER) for name in ("embeddings", "token_ids")),
        ("scale", _REAL),
    )


class _Rollout(ctypes.Structure):
    """`struct rollout`, of rollout.c too."""

    _fields_ = (
        *((name, _POINTER) for name in ("head", "slots", "logits", "anchors")),
        *((name, _INTEGER) for name in ("requests", "depths", "vocabulary", "candidates")),
        ("threshold", _REAL),
        *((name, _POINTER) for name in ("widths", "temperatures", "uniform", "kept")),
        ("room", _INTEGER),
        *((name, _POINTER) for name in ("choices", "parents", "scores")),
        ("budget", _INTEGER),
        *((name, _POINTER) for name in ("num_drafts", "ids", "probs")),
    )


_MIRRORS: dict[str, type[ctypes.Structure]] = {"layer": _Layer, "pass": _Pass, "head": _Head, "rollout": _Rollout}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None if there are none, which is logged once."""
    loaded = build.load()
    if loaded is None:
        return None
    strange = next((name for name, mirror in _MIRRORS.items() if _layout(mirror) != _layout_in_c(loaded, name)), None)
    if strange is not None:
        _log.warning(
            "decoding and training on this CPU are slow: the native loops are not used, as the compiler lays out their "
            "struct %s in another way than this package expects; set CC to a plain gcc or clang, without options",
            strange,
        )
        return None
    loaded.panel_width.restype = loaded.lanes.restype = loaded.uses_threads.restype = _INTEGER
    for name, arguments in _ENTRIES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INTEGER if name in _CAN_FAIL else None
    if not loaded.uses_threads() and torch.get_num_threads() > 1:
        _log.warning("the native loops use one thread only, as the compiler built them without OpenMP; gcc would not")
    return loaded


class _Member(ctypes.Structure):
    """`struct member` of cpu.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", _INTEGER))


def _layout(mirror: type[ctypes.Structure]) -> dict[str, int]:
    """The size of a struct, under an empty name, and where each member begins."""
    return {"": ctypes.sizeof(mirror), **{name: getattr(mirror, name).offset for name, *_ in mirror._fields_}}


def _layout_in_c(loaded: ctypes.CDLL, name: str) -> dict[str, int]:
    """The same, as C has it."""
    first = ctypes.addressof(_Member.in_dll(loaded, f"{name}_layout"))
    members = (_Member.from_address(first + i * ctypes.sizeof(_Member)) for i in itertools.count())
    return {
        member.name.decode(): member.offset for member in itertools.takewhile(lambda m: m.name is not None, members)
    }


@functools.cache
def _loops() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("there are no native loops here; ask is_available first")
    return found


@functools.cache
def lanes() -> int:
    """Values in a vector of the processor. Norms, SwiGLU and attention go over whole vectors."""
    return _loops().lanes()


@functools.cache
def panel_width() -> int:
    """Outputs that stand side by side in a packed weight."""
    return _loops().panel_width()


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the functions of this module work on tensors of `device` and `dtype`."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


def fits(width: int) -> bool:
    """Whether rows of `width` values can be cut into whole vectors, as norms, SwiGLU and attention ask."""
    return width > 0 and width % lanes() == 0


# ---- what is compared ----


@functools.cache
def _words(shape: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """The words of a shape, and those of them that are numbers."""
    words = tuple(shape.split())
    return words, {word: int(word) for word in words if word.isdigit()}


class _Fit:
    """Compares the tensors of one call: the first tensor that has a size sets it, the others must have the same.

    It must live as long as the call: addresses that `spread` returns are of tensors that only it keeps.

    Args:
        function: named in errors.
        sizes: known beforehand.
    """

    def __init__(self, function: str, **sizes: int) -> None:
        self.function, self.sizes = function, sizes
        self._held: list[Tensor] = []

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    def __call__(self, name: str, x: Tensor | None, shape: str, dtype: torch.dtype = torch.float32) -> int:
        """The address of a contiguous tensor whose sizes are named by `shape`, a word or a number for each."""
        sizes, (words, numbers) = self.sizes, _words(shape)
        sizes.update(numbers)
        if isinstance(x, Tensor) and x.dtype is dtype and x.is_cpu and x.dim() == len(words) and x.is_contiguous():
            for word, size in zip(words, x.shape, strict=True):
                if sizes.setdefault(word, size) != size:
                    break
            else:
                return x.data_ptr()
        expected = ", ".join(str(sizes.get(word, word)) for word in words)
        raise _unfit(self.function, name, x, f"contiguous {dtype} [{expected}] on cpu")

    def optional(self, name: str, x: Tensor | None, shape: str, dtype: torch.dtype = torch.float32) -> int | None:
        """The same; None, which is NULL, if there is no tensor."""
        return None if x is None else self(name, x, shape, dtype)

    def spread(self, name: str, x: Tensor, shape: str, dtype: torch.dtype = torch.float32) -> int:
        """The same of `x` expanded, in all dimensions but the last, to sizes that are known, and made contiguous."""
        words = _words(shape)[0]
        if not isinstance(x, Tensor) or x.dim() != len(words):
            raise _unfit(self.function, name, x, f"{dtype} [{', '.join(words)}] on cpu")
        wanted = [self.sizes.get(word, size) for word, size in zip(words[:-1], x.shape, strict=False)]
        try:
            x = (x if list(x.shape[:-1]) == wanted else x.expand(*wanted, x.shape[-1])).contiguous()
        except RuntimeError:
            raise _unfit(self.function, name, x, f"{[*wanted, x.shape[-1]]}, or expand to it") from None
        self._held.append(x)
        return self(name, x, shape, dtype)

    def whole_vectors(self, **sizes: int) -> None:
        """Refuse a size that is not a multiple of the processor's vectors."""
        for name, size in sizes.items():
            if size < 1 or size % lanes():
                described = f"{name.replace('_', ' ')} must be a multiple of {lanes()}, this processor's vectors"
                raise ValueError(f"{self.function}: the {described}, got {size}")

    def grouped(self, heads: int, kv_heads: int) -> None:
        """Refuse heads of queries that cannot share heads of keys evenly."""
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"{self.function}: {heads} heads cannot share {kv_heads} heads of keys and values evenly")

    def rotary(self, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[int, int]:
        """The addresses of cos and sin [requests or 1, tokens, rotary], spread."""
        addresses = (
            self.spread("cos", cos, "requests tokens rotary"),
            self.spread("sin", sin, "requests tokens rotary"),
        )
        if self["rotary"] % 2 or self["rotary"] > head_dim:
            raise _unfit(self.function, "cos", cos, f"of an even width up to {head_dim}, a head's")
        return addresses

    def cache(self, keys: Tensor, values: Tensor, layers: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """A cache's capacity, and the strides of its layers, requests and heads; it may be cut from a larger one."""
        for name, x in (("keys", keys), ("values", values)):
            is_cache = isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_cpu and x.dim() == 5
            capacity = self.sizes.setdefault("capacity", x.shape[3] if is_cache else 0)
            sizes = (layers, self["requests"], kv_heads, capacity, head_dim)
            if not is_cache or x.shape != sizes:
                raise _unfit(self.function, name, x, f"torch.float32 {list(sizes)} on cpu")
            strides = keys.stride()
            nested = all(strides[i] >= sizes[i + 1] * strides[i + 1] for i in range(3))
            if strides[3:] != (head_dim, 1) or not nested or x.stride() != strides:
                raise _unfit(self.function, name, x, f"cut from a contiguous cache, and of keys' strides, {strides}")
        return capacity, *strides[:3]


def _as_rows(function: str, name: str, x: Tensor) -> Tensor:
    """x [..., width] as contiguous rows."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
        raise _unfit(function, name, x, "torch.float32 [..., width] on cpu, of a width of 1 or more")
    return x.contiguous().view(-1, x.shape[-1])


def _unfit(function: str, name: str, x: object, expected: str) -> ValueError | TypeError:
    if not isinstance(x, Tensor):
        return TypeError(f"{function}: {name} must be {expected}, got {type(x).__name__}")
    layout = f" of strides {x.stride()}" if x.layout is torch.strided else f" ({x.layout})"
    return ValueError(f"{function}: {name} must be {expected}, got {x.dtype} {list(x.shape)} on {x.device}{layout}")


def _raise_for(function: str, status: int, name: str = "", indices: Tensor | None = None, expected: str = "") -> None:
    """Make an exception of what C returned."""
    if status == _NO_MEMORY:
        raise MemoryError(f"{function}: no memory is left for its scratch")
    if status == _BAD_INDEX:
        assert indices is not None
        raise ValueError(f"{function}: {name} must be {expected}, got {int(indices.min())} to {int(indices.max())}")


# ---- steps of a decoder pass ----


def pack(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] in panels of neighbouring outputs, [panels, inputs, width], padded with zeros."""
    width = panel_width()
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % width))
    return padded.view(-1, width, inputs).transpose(1, 2).contiguous()


def pack_bias(bias: Tensor) -> Tensor:
    """A bias [outputs], padded as `pack` pads."""
    return F.pad(bias.detach(), (0, -len(bias) % panel_width())).contiguous()


def linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs] and a packed weight (and bias) to [..., outputs]."""
    rows = _as_rows("linear", "x", x)
    count = -(-outputs // panel_width())
    fit = _Fit("linear", panels=count, width=panel_width(), padded=count * panel_width())
    at = fit("x", rows, "rows inputs")
    weight, added = fit("panels", panels, "panels inputs width"), fit.optional("bias", bias, "padded")
    transposed, y = torch.empty_like(rows), rows.new_empty(len(rows), outputs)
    _loops().linear(at, *rows.shape, weight, added, outputs, transposed.data_ptr(), y.data_ptr())
    return y.view(*x.shape[:-1], outputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x [..., width]."""
    rows = _as_rows("rms_norm", "x", x)
    fit, y = _Fit("rms_norm"), torch.empty_like(rows)
    at = fit("x", rows, "rows width")
    fit.whole_vectors(width_of_x=fit["width"])
    _loops().rms_norm(at, *rows.shape, 1, fit["width"], fit("weight", weight, "width"), eps, y.data_ptr())
    return y.view(x.shape)


def rms_norm_heads_(x: Tensor, first: int, heads: int, weight: Tensor, eps: float) -> None:
    """Norm, in place, `heads` heads of contiguous x [..., row] from the head numbered `first` on, weight [head_dim]."""
    fit = _Fit("rms_norm_heads_")
    norm = fit("weight", weight, "head_dim")
    width = fit["head_dim"]
    fit.whole_vectors(width_of_weight=width)
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0 or not x.is_contiguous():
        raise _unfit("rms_norm_heads_", "x", x, "contiguous torch.float32 [..., row] on cpu")
    rows = x.view(-1, x.shape[-1])
    at = fit("x", rows, "rows row")
    if first < 0 or heads < 0 or (first + heads) * width > fit["row"]:
        raise ValueError(
            f"rms_norm_heads_: weight must be as wide as a head, of which {heads} from number {first} on "
            f"stand in a row of {fit['row']} values, got {width}"
        )
    start = at + 4 * first * width
    _loops().rms_norm(start, *rows.shape, heads, width, norm, eps, start)


def rotate_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE (half-split form), in place, to the first `heads` heads of x [R, N, row].

    Args:
        x: contiguous; a row holds heads of `head_dim` values.
        heads: how many of them are rotated.
        head_dim: D.
        cos: [R or 1, N, rotary], rotary <= D and even: the values of a head past `rotary` stay.
        sin: as cos.
    """
    fit = _Fit("rotate_")
    at = fit("x", x, "requests tokens row")
    requests, tokens, row = x.shape
    if heads < 0 or not 1 <= head_dim <= row or heads * head_dim > row:
        raise ValueError(f"rotate_: {heads} heads of {head_dim} values must fit a row of x, which has {row}")
    angles = fit.rotary(cos, sin, head_dim)
    _loops().rotate(at, requests * tokens, row, heads, head_dim, fit["rotary"], *angles)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's product, silu(gate) * up, of a joined x [..., 2 * width]: gate first."""
    rows, fit = _as_rows("silu_mul", "x", x), _Fit("silu_mul")
    at = fit("x", rows, "rows joined")
    width = fit["joined"] // 2
    fit.whole_vectors(half_of_the_width_of_x=width, width_of_x=fit["joined"])
    y = rows.new_empty(len(rows), width)
    _loops().silu_mul(at, len(rows), width, y.data_ptr())
    return y.view(*x.shape[:-1], width)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`F.scaled_dot_product_attention` with grouped heads, over rows of a cache.

    Args:
        query: [R, N, heads, D], heads and D contiguous, the same distance between all tokens.
        keys: [R, kv_heads, T, D], T and D contiguous; T may be cut from a larger cache.
        values: as keys, with the same strides.
        mask: [R or 1, 1, N or 1, T] bool, True where seen; a token that sees nothing gets zeros.
        scale: of the products of queries and keys.

    Returns:
        [R, N, heads, D].
    """
    letters = ("requests, tokens, heads, head_dim", "requests, kv_heads, extent, head_dim")
    for name, x, shape in (("query", query, letters[0]), ("keys", keys, letters[1]), ("values", values, letters[1])):
        if not (isinstance(x, Tensor) and x.dtype is torch.float32 and x.is_cpu and x.dim() == 4):
            raise _unfit("attend", name, x, f"torch.float32 [{shape}] on cpu")
    (requests, tokens, heads, width), (_, kv_heads, extent, _) = query.shape, keys.shape
    if keys.shape != (requests, kv_heads, extent, width) or extent < 1:
        raise _unfit("attend", "keys", keys, f"[{requests}, kv_heads, 1 or more, {width}], as query is")
    if values.shape != keys.shape:
        raise _unfit("attend", "values", values, f"{list(keys.shape)}, as keys are")
    fit = _Fit("attend", requests=requests, tokens=tokens, extent=extent)
    fit.grouped(heads, kv_heads)
    fit.whole_vectors(width_of_a_head=width)
    seen = fit.spread("mask", mask, "requests 1 tokens extent", torch.bool)
    for name, x in (("query", query), ("keys", keys), ("values", values)):
        if (width > 1 and x.stride(-1) != 1) or (x.shape[-2] > 1 and x.stride(-2) != width):
            raise _unfit("attend", name, x, f"of strides {width} and 1 in dimensions -2 and -1")
    between = query.stride(1 if tokens > 1 else 0)
    if min(requests, tokens) > 1 and query.stride(0) != tokens * between:
        raise _unfit("attend", "query", query, "cut from a tensor of as many tokens, the same distance between all")
    apart = [keys.stride(i) if keys.shape[i] > 1 else 0 for i in (0, 1)]
    if apart != [values.stride(i) if values.shape[i] > 1 else 0 for i in (0, 1)]:
        raise _unfit("attend", "values", values, f"of keys' strides, {keys.stride()}")
    y = query.new_empty(query.shape)
    status = _loops().attend(
        query.data_ptr(), between, keys.data_ptr(), values.data_ptr(), *apart, seen,
        requests, tokens, heads, kv_heads, extent, width, scale, y.data_ptr(),
    )  # fmt: skip
    _raise_for("attend", status)
    return y


# ---- all layers of a decoder in one call: Python between the steps of a few rows costs more than the steps ----


@dataclass(frozen=True)
class Norm:
    """RMS norm: gain [width], and what is added to the mean square."""

    gain: Tensor
    eps: float


@dataclass(frozen=True)
class Product:
    """A packed weight and its bias (`pack`, `pack_bias`)."""

    panels: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights. Its widths are whole vectors (`fits`)."""

    input_norm: Norm
    joined: Product
    """Queries, keys and values: `heads` and twice `kv_heads` heads of `head_dim`."""
    query_norm: Norm | None
    """Of every head of queries, if the model has one."""
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
        ValueError: a weight does not fit, or layers differ in what one cache asks of all of them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        if not layers:
            raise ValueError("decoder_layers: there are no layers")
        self.kinds = tuple(sorted({layer.kind for layer in layers}))
        """Of the masks that a pass needs."""
        self._weights = tuple(layers)  # the memory that the addresses point to
        self._hidden = len(layers[0].input_norm.gain)
        self._kv_heads, self._head_dim = layers[0].kv_heads, layers[0].head_dim
        self._in_c = (_Layer * len(layers))(*(self._one(i, layer) for i, layer in enumerate(layers)))

    def _one(self, number: int, layer: Layer) -> _Layer:
        heads, kv_heads, width, inner = layer.heads, layer.kv_heads, layer.head_dim, layer.inner
        widths = dict(hidden=self._hidden, head_dim=width, inner=inner)
        widths |= dict(mixed=heads * width, row=(heads + 2 * kv_heads) * width, gate_up=2 * inner)
        fit = _Fit(f"decoder_layers: layer {number}", panel=panel_width(), **widths)
        fit.whole_vectors(hidden_size=self._hidden, head_dim=width, inner=inner)
        fit.grouped(heads, kv_heads)
        if (kv_heads, width) != (self._kv_heads, self._head_dim):
            raise ValueError(
                f"{fit.function}: one cache holds {self._kv_heads} heads of {self._head_dim} values for every layer, "
                f"got {kv_heads} of {width}"
            )
        described = _Layer(
            hidden=self._hidden, heads=heads, kv_heads=kv_heads, head_dim=width, inner=inner, scale=layer.scale,
            kind=self.kinds.index(layer.kind),
        )  # fmt: skip
        for name, size in {"input": "hidden", "query": "head_dim", "key": "head_dim", "post": "hidden"}.items():
            norm: Norm | None = getattr(layer, f"{name}_norm")
            if norm is not None:
                setattr(described, f"{name}_norm", fit(f"{name}_norm", norm.gain, size))
                setattr(described, f"{name}_eps", norm.eps)
        products = {"joined": ("hidden", "row"), "output": ("mixed", "hidden")}
        for name, (inputs, outputs) in {
            **products,
            "gate_up": ("hidden", "gate_up"),
            "down": ("inner", "hidden"),
        }.items():
            product: Product = getattr(layer, name)
            count = -(-fit[outputs] // panel_width())
            setattr(described, name, fit(name, product.panels, f"{count} {inputs} panel"))
            setattr(described, f"{name}_bias", fit.optional(f"{name}'s bias", product.bias, f"{count * panel_width()}"))
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
            x: [R, N, H]; its content is lost.
            cos: [R or 1, N, rotary], see `rotate_`.
            sin: as cos.
            keys: [layers, R, kv_heads, capacity, D], capacity and D contiguous.
            values: as keys, with the same strides.
            rows: [R, N] int64, where keys and values of each token go; those beyond the capacity are dropped.
            masks: of each of `kinds`, [R, 1, N, T] bool, True where seen; T <= capacity.
            tapped: layers whose outputs are wanted, counted from 0.

        Returns:
            The last layer's output [R, N, H], in the memory of `x` if that is contiguous, and the tapped layers'
            outputs side by side, [R, N, len(tapped) * H]; None if none is tapped.

        Raises:
            ValueError: an argument does not fit, or a row is negative.
        """
        number = len(self._weights)
        if not all(0 <= layer < number for layer in tapped):
            raise ValueError(f"decoder_layers: tapped must be layers from 0 to {number - 1}, got {list(tapped)}")
        fit, x, rows = _Fit("decoder_layers", hidden=self._hidden), x.contiguous(), rows.contiguous()
        at_x, at_rows = fit("x", x, "requests tokens hidden"), fit("rows", rows, "requests tokens", torch.int64)
        angles = fit.rotary(cos, sin, self._head_dim)
        capacity, *strides = fit.cache(keys, values, number, self._kv_heads, self._head_dim)
        shape = "requests 1 tokens extent"
        seen = [fit.spread(f"the mask of {kind}", masks[kind], shape, torch.bool) for kind in self.kinds]
        if not 1 <= fit["extent"] <= capacity:
            raise ValueError(f"decoder_layers: masks must show 1 to {capacity} rows, the cache's, got {fit['extent']}")
        features = x.new_empty(*rows.shape, len(tapped) * self._hidden) if tapped else None
        taps, pointers = (_INTEGER * len(tapped))(*tapped), (_POINTER * len(seen))(*seen)
        described = _Pass(
            *rows.shape, fit["extent"], capacity, fit["rotary"], *strides, *angles, at_rows,
            ctypes.addressof(pointers), keys.data_ptr(), values.data_ptr(), at_x, len(tapped), ctypes.addressof(taps),
            None if features is None else features.data_ptr(),
        )  # fmt: skip
        status = _loops().decoder_layers(self._in_c, number, ctypes.byref(described))
        _raise_for("decoder_layers", status, "rows", rows, "0 or more")
        return x, features


# ---- a draft's context: context.py ----


def write_context(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    projected: Tensor,
    norms: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """`context.write_context_`: projected [R, T, layers, 2, kv_heads, D], which is lost, behind `lengths` [R] rows."""
    fit, projected, norms = _Fit("write_context_"), projected.contiguous(), norms.contiguous()
    new = fit("projected", projected, "requests tokens layers 2 kv_heads head_dim")
    requests, tokens, layers, _, kv_heads, width = projected.shape
    fit.whole_vectors(width_of_a_head=width)
    weights, angles = fit("norm_weights", norms, "layers head_dim"), fit.rotary(cos, sin, width)
    if fit["rotary"] != width:
        raise _unfit("write_context_", "cos", cos, f"of a width of {width}, a head's")
    fit("lengths", lengths.contiguous(), "requests", torch.int64)
    rows = lengths[:, None] + torch.arange(tokens)
    capacity, *strides = fit.cache(keys, values, layers, kv_heads, width)
    status = _loops().write_context(
        new, requests, tokens, layers, kv_heads, width, weights, eps, *angles, rows.data_ptr(), capacity, *strides,
        keys.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    _raise_for("write_context_", status, "rows", rows, "0 or more")


# ---- the head's drafts: heads.py ----


class Head:
    """A Domino head whose weights stay where they are.

    Args:
        head: its `embed_choice` is an `EmbeddingTable`.

    Raises:
        ValueError: a weight does not fit.
    """

    def __init__(self, head: HeadWeights) -> None:
        table: Any = head.embed_choice
        given = (head.input_gates, head.state_gates, head.to_low_rank, head.correction, table.weight, table.token_ids)
        # Detached: a parameter whose data is replaced would leave the addresses behind.
        self._weights = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
        input_gates, state_gates, to_low_rank, correction, embeddings, self.token_ids = self._weights
        fit = _Fit("head_rollout")
        at = {"state_gates": fit("state_gates", state_gates, "any state")}
        at["correction"] = fit("correction", correction, "vocabulary low_rank")
        at["embeddings"] = fit("embeddings", embeddings, "tokens hidden")
        fit.sizes |= {"gates": 3 * fit["state"], "joined": fit["hidden"] + fit["state"]}
        fit("state_gates", state_gates, "gates state")  # again, now that the number of gates is known
        at["input_gates"] = fit("input_gates", input_gates, "gates hidden")
        at["to_low_rank"] = fit("to_low_rank", to_low_rank, "low_rank joined")
        self.vocabulary, self.tokens, self.hidden = fit["vocabulary"], fit["tokens"], fit["hidden"]
        fit.whole_vectors(hidden_size=self.hidden, width_of_the_state=fit["state"], low_rank=fit["low_rank"])
        if self.token_ids is None and self.tokens < self.vocabulary:
            raise ValueError(
                f"head_rollout: embeddings must have a row for each of {self.vocabulary} logits, got {self.tokens}"
            )
        if head.pure_draft_prefix_len < 0:
            raise ValueError(f"head_rollout: pure_prefix must be 0 or more, got {head.pure_draft_prefix_len}")
        self.in_c = _Head(
            self.hidden, fit["state"], fit["low_rank"], min(head.pure_draft_prefix_len, 2**31), self.tokens,
            scale=table.scale, token_ids=fit.optional("token_ids", self.token_ids, "vocabulary", torch.int64), **at,
        )  # fmt: skip


class Grown(NamedTuple):
    """Prefixes of all depths, M for each request, and what sampled chains were drawn from."""

    choices: Tensor
    """[R, M], indices into the logits, depth by depth."""
    parents: Tensor
    """[R, M], indices into the same prefixes; -1 for a child of the anchor."""
    scores: Tensor
    """[R, M], log probabilities; those of the most probable tokens if chains are sampled."""
    num_drafts: Tensor
    """[R], how many of the M are left if there is a budget."""
    ids: Tensor | None
    """[R, N, K], candidates; None if all logits are."""
    probs: Tensor | None
    """[R, N, K]; None if nothing is sampled."""


def head_rollout(
    head: Head | None,
    block: HeadInputs,
    widths: Sequence[int],
    how: Draw,
    temperatures: Tensor | None = None,
    budget: int = 0,
) -> Grown:
    """A chain or a tree for every request, in one call.

    Args:
        head: without it, hidden states and anchors are not read.
        block: of N slots.
        widths: prefixes of each depth, N numbers; all are 1 if drafts are sampled.
        how: candidates, least confidence and, for sampled chains, random numbers.
        temperatures: [R], of sampled chains.
        budget: only so many prefixes are kept of a request, the best; 0 keeps all.
    """
    known = {} if head is None else {"vocabulary": head.vocabulary, "hidden": head.hidden}
    function, fit = "head_rollout", _Fit("head_rollout", **known)
    hidden, logits, anchors = (x.contiguous() for x in (block.hidden, block.base_logits, block.anchor_embedding))
    at_logits = fit("logits", logits, "requests depths vocabulary")
    requests, depths, vocabulary = logits.shape
    candidates = vocabulary if how.candidates is None else min(how.candidates, vocabulary)
    if candidates < 1:
        raise ValueError(f"{function}: candidates must be 1 to {vocabulary}, all logits, got {candidates}")
    if len(widths) != depths or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(f"{function}: widths must be {depths} numbers of 1 or more, got {list(widths)}")
    if budget < 0:
        raise ValueError(f"{function}: budget must be 0 or more, got {budget}")
    room = sum(widths)
    choices, parents = torch.empty(2, requests, room, dtype=torch.long).unbind()
    scores, num_drafts = torch.empty(requests, room), torch.zeros(requests, dtype=torch.long)
    ids = torch.empty(requests, depths, candidates, dtype=torch.long) if candidates < vocabulary else None
    in_c, kept = (_INTEGER * depths)(*widths), (_INTEGER * depths)()
    arguments = _Rollout(
        requests=requests, depths=depths, vocabulary=vocabulary, candidates=candidates, logits=at_logits,
        threshold=how.threshold, widths=ctypes.addressof(in_c), kept=ctypes.addressof(kept), room=room,
        choices=choices.data_ptr(), parents=parents.data_ptr(), scores=scores.data_ptr(), budget=min(budget, room),
        num_drafts=num_drafts.data_ptr(), ids=None if ids is None else ids.data_ptr(),
    )  # fmt: skip
    if head is not None:
        arguments.head = ctypes.addressof(head.in_c)
        arguments.slots = fit("slots", hidden, "requests depths hidden")
        arguments.anchors = fit("anchors", anchors, "requests hidden")
    uniform, probs = how.uniform, None
    if uniform is not None:
        if room != depths:
            raise ValueError(f"{function}: widths must be 1 if drafts are sampled, got {list(widths)}")
        uniform = uniform.contiguous()
        arguments.uniform = fit("uniform", uniform, "requests depths", torch.float64)
        temperatures = None if temperatures is None else temperatures.contiguous()
        arguments.temperatures = fit("temperatures", temperatures, "requests")
        probs = torch.empty(requests, depths, candidates)
        arguments.probs = probs.data_ptr()
    status = _loops().head_rollout(ctypes.byref(arguments))
    ids_given, tokens = (None, 0) if head is None else (head.token_ids, head.tokens)
    _raise_for(function, status, "token_ids", ids_given, f"rows of the embeddings, 0 to {tokens - 1}")
    total = sum(kept)
    return Grown(choices[:, :total], parents[:, :total], scores[:, :total], num_drafts, ids, probs)


# ---- losses and gradients of training: blended.py ----


def blended_rows(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """Logits [M, V] of float32 or bfloat16, which become gradients, and labels [M] int64, to two losses [M]."""
    fit, halves = _Fit("blended_rows_"), []
    for x in (base, target):
        halves.append(isinstance(x, Tensor) and x.dtype is torch.bfloat16)
    types = [torch.bfloat16 if half else torch.float32 for half in halves]
    if target is None and terms.needs_target:
        raise TypeError("blended_rows_: target must be logits, which the objective compares with, got None")
    at_base = fit("base", base, "rows logits", types[0])
    at_correction = fit.optional("correction", correction, "rows logits", types[0])
    at_target = fit.optional("target", target, "rows logits", types[1])
    rows, width = base.shape
    if not 1 <= width < 2**31:  # lanes count in 32 bits
        raise ValueError(f"blended_rows_: base must have 1 to 2^31 - 1 logits in a row, got {width}")
    at_labels, at_weights = fit("labels", labels, "rows", torch.int64), fit("weights", weights, "rows")
    base_losses = torch.empty(rows)
    final_losses = base_losses if correction is None else torch.empty(rows)
    eta = math.nan if terms.adaptive_eta is None else terms.adaptive_eta
    status = _loops().blended_rows(
        halves[0], at_base, at_correction, halves[1], at_target, at_labels, at_weights, rows, width, lambda_base,
        terms.cross_entropy, terms.kl, terms.total_variation, terms.log_acceptance, eta,
        base_losses.data_ptr(), final_losses.data_ptr(),
    )  # fmt: skip
    _raise_for("blended_rows_", status, "labels", labels, f"0 to {width - 1}")
    return base_losses, final_losses
