"""The one door to the C loops: every entry of the library, as a function of tensors or a module.

C reads and writes where it is told to. So nothing else in the package calls it, and nothing gets past these functions
that does not fit: types, devices, strides and shapes are compared here, with each other and with the processor's
vectors. Numbers inside tensors (rows of a cache, labels, tokens) are compared by C, which reads them anyway, and
reports. What does not fit is a ValueError (a TypeError if it is no tensor) that names function and argument, what is
expected and what was found; without memory for scratch there is a MemoryError. What a function takes is written in one
line above it (`_Arguments`). Weights are compared once, when a `DecoderLayers` or a `Head` is made; a call compares
only what it brings.

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
from torch import Tensor, nn

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

_TYPES = {"int64": torch.int64, "float64": torch.float64, "bfloat16": torch.bfloat16, "bool": torch.bool}
_MARKS = ("optional", "cut", "spread", "rows_of")


class _Expected(NamedTuple):
    """What one tensor of a call must be."""

    name: str
    sizes: tuple[str, ...]
    """Names of its sizes, and numbers."""
    dtype: torch.dtype
    optional: bool
    """None, which is NULL in C, is allowed."""
    cut: bool
    """It need not be contiguous."""
    spread: bool
    """It is expanded, in all dimensions but the last, to sizes that are known, and made contiguous."""
    rows: bool
    """It has rows of one width, 1 or more, in any number of dimensions before the last."""


class _Arguments:
    """What the tensors of a function must be: the first that has a size sets it, the others must have the same.

    Args:
        function: named in errors.
        whole: sizes that must be multiples of the processor's vectors, and what errors call them.
        shapes: of each argument, in the order of a call: a word or a number for each of its sizes. Before them may
            stand a type (float32 if there is none) and marks, see `_Expected`.
    """

    def __init__(self, function: str, whole: dict[str, str] | None = None, **shapes: str) -> None:
        self.function, self._whole = function, whole or {}
        self._expected = [self._parse(name, shape.split()) for name, shape in shapes.items()]
        sizes = {size for expected in self._expected for size in expected.sizes}
        assert not sizes & shapes.keys(), "a call gives sizes and addresses by name"
        self._numbers = {size: int(size) for size in sizes if size.isdigit()}

    @staticmethod
    def _parse(name: str, words: list[str]) -> _Expected:
        dtype = next((_TYPES[word] for word in words if word in _TYPES), torch.float32)
        sizes = tuple(word for word in words if word not in _TYPES and word not in _MARKS)
        return _Expected(name, sizes, dtype, *(mark in words for mark in _MARKS))

    def __call__(self, *given: Tensor | None, **known: int) -> dict[str, Any]:
        """Compare the tensors of one call with what is expected, and with sizes that are known.

        Returns:
            Sizes and addresses by name, and "kept", what lies at the addresses: it must live as long as the call.
        """
        kept: list[Tensor] = []
        found: dict[str, Any] = {**self._numbers, **known, "kept": kept}
        for expected, x in zip(self._expected, given, strict=True):
            name, sizes, dtype, optional, cut, spread, rows = expected
            if x is None and optional:
                found[name] = None
                continue
            if spread:
                x = self._spread(expected, x, found)
            if not isinstance(x, Tensor) or x.dtype is not dtype or not x.is_cpu or not (cut or x.is_contiguous()):
                raise self._unfit(expected, x, found)
            shape = x.shape[-1:] if rows else x.shape
            if len(shape) != len(sizes) or (rows and shape[0] == 0):
                raise self._unfit(expected, x, found)
            for size, number in zip(sizes, shape, strict=True):
                if found.setdefault(size, number) != number:
                    raise self._unfit(expected, x, found)
            found[name] = x.data_ptr()
            kept.append(x)
        for size, described in self._whole.items():
            if found[size] < 1 or found[size] % lanes():
                raise _not_whole(self.function, described, found[size])
        return found

    def _spread(self, expected: _Expected, x: Tensor | None, found: dict[str, Any]) -> Tensor:
        sizes = expected.sizes
        if not isinstance(x, Tensor) or x.dim() != len(sizes):
            raise _unfit(self.function, expected.name, x, f"{expected.dtype} [{', '.join(sizes)}] on cpu")
        wanted = [found.get(size, number) for size, number in zip(sizes[:-1], x.shape, strict=False)]
        try:
            return (x if list(x.shape[:-1]) == wanted else x.expand(*wanted, x.shape[-1])).contiguous()
        except RuntimeError:
            shape = [*wanted, x.shape[-1]]
            raise _unfit(self.function, expected.name, x, f"{shape}, or expand to it") from None

    def _unfit(self, expected: _Expected, x: object, found: dict[str, Any]) -> ValueError | TypeError:
        sizes = ", ".join(str(found.get(size, size)) for size in expected.sizes)
        layout = "" if expected.cut else "contiguous "
        return _unfit(self.function, expected.name, x, f"{layout}{expected.dtype} [{sizes}] on cpu")


def _not_whole(function: str, described: str, size: int) -> ValueError:
    vectors = f"a multiple of {lanes()}, this processor's vectors"
    return ValueError(f"{function}: the {described} must be {vectors}, got {size}")


def _check_groups(function: str, heads: int, kv_heads: int) -> None:
    """Refuse heads of queries that cannot share heads of keys evenly."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{function}: {heads} heads cannot share {kv_heads} heads of keys and values evenly")


def _check_rotary(function: str, cos: Tensor, head_dim: int) -> None:
    """Refuse angles for more values than a head has, or for an odd number."""
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise _unfit(function, "cos", cos, f"of an even width up to {head_dim}, a head's")


def _cache_strides(function: str, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Strides of the layers, requests and heads of a cache [layers, R, kv_heads, capacity, D]; it may be cut out."""
    strides, sizes = keys.stride(), keys.shape
    nested = all(strides[i] >= sizes[i + 1] * strides[i + 1] for i in range(3))
    for name, x in (("keys", keys), ("values", values)):
        if strides[3:] != (sizes[4], 1) or not nested or x.stride() != strides:
            raise _unfit(function, name, x, f"cut from a contiguous cache, and of keys' strides, {strides}")
    return strides[:3]


def _unfit(function: str, name: str, x: object, expected: str) -> ValueError | TypeError:
    if not isinstance(x, Tensor):
        return TypeError(f"{function}: {name} must be {expected}, got {type(x).__name__}")
    layout = f" of strides {x.stride()}" if x.layout is torch.strided else f" ({x.layout})"
    return ValueError(f"{function}: {name} must be {expected}, got {x.dtype} {list(x.shape)} on {x.device}{layout}")


def _failure(status: int, function: str, name: str = "", indices: Tensor | None = None, wanted: str = "") -> Exception:
    """What C returned, as an exception: no memory, or an index inside a tensor that does not fit."""
    if status == _NO_MEMORY:
        return MemoryError(f"{function}: no memory is left for its scratch")
    assert status == _BAD_INDEX and indices is not None
    return ValueError(f"{function}: {name} must be {wanted}, got {int(indices.min())} to {int(indices.max())}")


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


_LINEAR = _Arguments("linear", x="rows_of inputs", panels="count inputs width", bias="optional padded")


def linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs] and a packed weight (and bias) to [..., outputs]."""
    width, x = panel_width(), x.contiguous()
    count = -(-outputs // width)
    at = _LINEAR(x, panels, bias, count=count, width=width, padded=count * width)
    rows, inputs = x.numel() // at["inputs"], at["inputs"]
    transposed, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], outputs)
    _loops().linear(at["x"], rows, inputs, at["panels"], at["bias"], outputs, transposed.data_ptr(), y.data_ptr())
    return y


_RMS_NORM = _Arguments("rms_norm", {"width": "width of x"}, x="rows_of width", weight="width")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x [..., width]."""
    x = x.contiguous()
    at, y = _RMS_NORM(x, weight), torch.empty_like(x)
    width = at["width"]
    _loops().rms_norm(at["x"], x.numel() // width, width, 1, width, at["weight"], eps, y.data_ptr())
    return y


_RMS_NORM_HEADS = _Arguments("rms_norm_heads_", {"head_dim": "width of weight"}, weight="head_dim", x="rows_of row")


def rms_norm_heads_(x: Tensor, first: int, heads: int, weight: Tensor, eps: float) -> None:
    """Norm, in place, `heads` heads of contiguous x [..., row] from the head numbered `first` on, weight [head_dim]."""
    at = _RMS_NORM_HEADS(weight, x)
    width, row = at["head_dim"], at["row"]
    if first < 0 or heads < 0 or (first + heads) * width > row:
        raise ValueError(
            f"rms_norm_heads_: weight must be as wide as a head, of which {heads} from number {first} on "
            f"stand in a row of {row} values, got {width}"
        )
    start = at["x"] + 4 * first * width
    _loops().rms_norm(start, x.numel() // row, row, heads, width, at["weight"], eps, start)


_ANGLES = "spread requests tokens rotary"
_ROTATE = _Arguments("rotate_", x="requests tokens row", cos=_ANGLES, sin=_ANGLES)


def rotate_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE (half-split form), in place, to the first `heads` heads of x [R, N, row].

    Args:
        x: contiguous; a row holds heads of `head_dim` values.
        heads: how many of them are rotated.
        head_dim: D.
        cos: [R or 1, N, rotary], rotary <= D and even: the values of a head past `rotary` stay.
        sin: as cos.
    """
    at = _ROTATE(x, cos, sin)
    requests, tokens, row = x.shape
    if heads < 0 or not 1 <= head_dim <= row or heads * head_dim > row:
        raise ValueError(f"rotate_: {heads} heads of {head_dim} values must fit a row of x, which has {row}")
    _check_rotary("rotate_", cos, head_dim)
    _loops().rotate(at["x"], requests * tokens, row, heads, head_dim, at["rotary"], at["cos"], at["sin"])


_SILU_MUL = _Arguments("silu_mul", {"joined": "width of x"}, x="rows_of joined")


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's product, silu(gate) * up, of a joined x [..., 2 * width]: gate first."""
    x = x.contiguous()
    at, width = _SILU_MUL(x), x.shape[-1] // 2
    if not fits(width):
        raise _not_whole("silu_mul", "half of the width of x", width)
    y = x.new_empty(*x.shape[:-1], width)
    _loops().silu_mul(at["x"], y.numel() // width, width, y.data_ptr())
    return y


_ATTEND = _Arguments(
    "attend",
    {"head_dim": "width of a head"},
    query="cut requests tokens heads head_dim",
    keys="cut requests kv_heads extent head_dim",
    values="cut requests kv_heads extent head_dim",
    mask="spread bool requests 1 tokens extent",
)


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
    at = _ATTEND(query, keys, values, mask)
    requests, tokens, heads, width = query.shape
    kv_heads, extent = at["kv_heads"], at["extent"]
    if extent < 1:
        raise _unfit("attend", "keys", keys, "of 1 row or more")
    _check_groups("attend", heads, kv_heads)
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
        at["query"], between, at["keys"], at["values"], *apart, at["mask"],
        requests, tokens, heads, kv_heads, extent, width, scale, y.data_ptr(),
    )  # fmt: skip
    if status:
        raise _failure(status, "attend")
    return y


# ---- the same as modules, which keep their weights ----

PACK_ROWS = 8
"""Rows the packed layout is tuned for: a typical verify pass."""
STOCK_ROWS = 3
"""Up to this many rows oneDNN's packed product is slower than the stock one (docs/log.md)."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference on CPU.

    A verify pass multiplies 2 to 17 rows by every weight, and the stock product is slow at that size. The native layout
    serves every number of rows. In bfloat16, and without the loops, it is oneDNN's packed product; for the single row
    of plain decoding the stock one is faster, so the number of rows decides, and the baseline gets the better one too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self.panels: Tensor | None = None
        if is_available(weight.device, weight.dtype):
            self.panels = pack(weight)
            self.bias = None if bias is None else pack_bias(bias)
        else:
            self._given, self.bias = weight, bias
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)

    @property
    def weight(self) -> Tensor:
        """[out, in], as it was given; from panels a copy. Some models read it (routers of experts)."""
        if self.panels is None:
            return self._given
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        if self.panels is not None:
            return linear(x, self.panels, self.out_features, self.bias)
        if x.numel() <= STOCK_ROWS * self.in_features:
            return F.linear(x, self._given, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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
        return rms_norm(x, self.weight, self.eps)


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
        cache = f"cut {len(layers)} requests {self._kv_heads} capacity {self._head_dim}"
        masks = {f"the mask of {kind}": "spread bool requests 1 tokens extent" for kind in self.kinds}
        self._arguments = _Arguments(
            "decoder_layers", None, x=f"requests tokens {self._hidden}", rows="int64 requests tokens", cos=_ANGLES,
            sin=_ANGLES, keys=cache, values=cache, **masks,
        )  # fmt: skip

    def _one(self, number: int, layer: Layer) -> _Layer:
        heads, kv_heads, width, inner, panel = layer.heads, layer.kv_heads, layer.head_dim, layer.inner, panel_width()
        function, sizes = f"decoder_layers: layer {number}", dict(hidden=self._hidden, head_dim=width, inner=inner)
        for name, size in sizes.items():
            if not fits(size):
                raise _not_whole(function, "hidden size" if name == "hidden" else name, size)
        _check_groups(function, heads, kv_heads)
        if (kv_heads, width) != (self._kv_heads, self._head_dim):
            raise ValueError(
                f"{function}: one cache holds {self._kv_heads} heads of {self._head_dim} values for every layer, "
                f"got {kv_heads} of {width}"
            )
        norms = {"input_norm": "hidden", "query_norm": "head_dim", "key_norm": "head_dim", "post_norm": "hidden"}
        products = {
            "joined": ("hidden", (heads + 2 * kv_heads) * width),
            "output": (heads * width, self._hidden),
            "gate_up": ("hidden", 2 * inner),
            "down": ("inner", self._hidden),
        }
        shapes, given = {}, []
        for name, shape in norms.items():
            norm: Norm | None = getattr(layer, name)
            shapes[name] = f"optional {shape}" if name in ("query_norm", "key_norm") else shape
            given.append(None if norm is None else norm.gain)
        for name, (inputs, outputs) in products.items():
            product: Product = getattr(layer, name)
            count = -(-outputs // panel)
            shapes |= {name: f"{count} {inputs} {panel}", f"{name}_bias": f"optional {count * panel}"}
            given += [product.panels, product.bias]
        at = _Arguments(function, None, **shapes)(*given, **sizes)
        eps = {f"{name.removesuffix('norm')}eps": norm.eps for name in norms if (norm := getattr(layer, name))}
        weights = {name: at[name] for name in shapes}
        described = dict(heads=heads, kv_heads=kv_heads, scale=layer.scale, kind=self.kinds.index(layer.kind))
        return _Layer(**sizes, **weights, **eps, **described)

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
        number, x, rows = len(self._weights), x.contiguous(), rows.contiguous()
        at = self._arguments(x, rows, cos, sin, keys, values, *(masks[kind] for kind in self.kinds))
        _check_rotary("decoder_layers", cos, self._head_dim)
        if not 1 <= at["extent"] <= at["capacity"]:
            shown = f"1 to {at['capacity']} rows, the cache's, got {at['extent']}"
            raise ValueError(f"decoder_layers: masks must show {shown}")
        taps = _taps(number, tuple(tapped))
        features = x.new_empty(*rows.shape, len(tapped) * self._hidden) if tapped else None
        seen = (_POINTER * len(self.kinds))(*(at[f"the mask of {kind}"] for kind in self.kinds))
        described = _Pass(
            *rows.shape, at["extent"], at["capacity"], at["rotary"], *_cache_strides("decoder_layers", keys, values),
            at["cos"], at["sin"], at["rows"], ctypes.addressof(seen), at["keys"], at["values"], at["x"],
            len(tapped), ctypes.addressof(taps), None if features is None else features.data_ptr(),
        )  # fmt: skip
        status = _loops().decoder_layers(self._in_c, number, ctypes.byref(described))
        if status:
            raise _failure(status, "decoder_layers", "rows", rows, "0 or more")
        return x, features


@functools.lru_cache(maxsize=64)
def _taps(number: int, tapped: tuple[int, ...]) -> ctypes.Array:
    """Numbers of tapped layers in C, of `number` layers. A drafter taps the same in every pass."""
    if not all(0 <= layer < number for layer in tapped):
        raise ValueError(f"decoder_layers: tapped must be layers from 0 to {number - 1}, got {list(tapped)}")
    return (_INTEGER * len(tapped))(*tapped)


# ---- a draft's context: context.py ----


_WRITE_CONTEXT = _Arguments(
    "write_context_",
    {"head_dim": "width of a head"},
    projected="requests tokens layers 2 kv_heads head_dim",
    norm_weights="layers head_dim",
    cos="spread requests tokens head_dim",
    sin="spread requests tokens head_dim",
    lengths="int64 requests",
    keys="cut layers requests kv_heads capacity head_dim",
    values="cut layers requests kv_heads capacity head_dim",
)


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
    """`context.write_context_torch_`; what `projected` held is lost."""
    projected, lengths = projected.contiguous(), lengths.contiguous()
    at = _WRITE_CONTEXT(projected, norms.contiguous(), cos, sin, lengths, keys, values)
    requests, tokens, layers, _, kv_heads, width = projected.shape
    rows = lengths[:, None] + torch.arange(tokens)
    status = _loops().write_context(
        at["projected"], requests, tokens, layers, kv_heads, width, at["norm_weights"], eps, at["cos"], at["sin"],
        rows.data_ptr(), at["capacity"], *_cache_strides("write_context_", keys, values), at["keys"], at["values"],
    )  # fmt: skip
    if status:
        raise _failure(status, "write_context_", "rows", rows, "0 or more")


# ---- the head's drafts: heads.py ----


_HEAD = _Arguments(
    "head_rollout", state_gates="any state", correction="vocabulary low_rank", embeddings="tokens hidden"
)
_HEAD_AGAIN = _Arguments(  # once the number of gates is known
    "head_rollout",
    {"hidden": "hidden size", "state": "width of the state", "low_rank": "low rank"},
    state_gates="gates state",
    input_gates="gates hidden",
    to_low_rank="low_rank joined",
    token_ids="optional int64 vocabulary",
)


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
        at = _HEAD(state_gates, correction, embeddings)
        self.vocabulary, self.tokens, self.hidden = at["vocabulary"], at["tokens"], at["hidden"]
        at |= _HEAD_AGAIN(
            state_gates, input_gates, to_low_rank, self.token_ids, vocabulary=self.vocabulary, hidden=self.hidden,
            low_rank=at["low_rank"], state=at["state"], gates=3 * at["state"], joined=self.hidden + at["state"],
        )  # fmt: skip
        if self.token_ids is None and self.tokens < self.vocabulary:
            raise ValueError(
                f"head_rollout: embeddings must have a row for each of {self.vocabulary} logits, got {self.tokens}"
            )
        if head.pure_draft_prefix_len < 0:
            raise ValueError(f"head_rollout: pure_prefix must be 0 or more, got {head.pure_draft_prefix_len}")
        same = {name: at[name] for name, *_ in _Head._fields_ if name in at}
        self.in_c = _Head(pure_prefix=min(head.pure_draft_prefix_len, 2**31), scale=table.scale, **same)


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


_ROLLOUT = _Arguments(
    "head_rollout",
    logits="requests depths vocabulary",
    slots="optional requests depths hidden",
    anchors="optional requests hidden",
    uniform="optional float64 requests depths",
    temperatures="optional requests",
)


@functools.lru_cache(maxsize=256)
def _widths_in_c(depths: int, vocabulary: int, candidates: int, widths: tuple[int, ...], budget: int) -> ctypes.Array:
    """Prefixes of each depth in C. A drafter asks for the same in every cycle."""
    if not 1 <= candidates <= vocabulary:
        raise ValueError(f"head_rollout: candidates must be 1 to {vocabulary}, all logits, got {candidates}")
    if len(widths) != depths or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(f"head_rollout: widths must be {depths} numbers of 1 or more, got {list(widths)}")
    if budget < 0:
        raise ValueError(f"head_rollout: budget must be 0 or more, got {budget}")
    return (_INTEGER * depths)(*widths)


def _sampled(how: Draw, temperatures: Tensor | None, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random numbers and temperatures of sampled chains."""
    if max(widths, default=1) > 1:
        raise ValueError(f"head_rollout: widths must be 1 if drafts are sampled, got {list(widths)}")
    if temperatures is None:
        raise TypeError("head_rollout: temperatures must be given if drafts are sampled, got None")
    assert how.uniform is not None
    return how.uniform.contiguous(), temperatures.contiguous()


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
    if block.base_logits.dim() != 3:
        raise _unfit("head_rollout", "logits", block.base_logits, "torch.float32 [requests, depths, vocabulary] on cpu")
    requests, depths, vocabulary = block.base_logits.shape
    candidates = vocabulary if how.candidates is None else min(how.candidates, vocabulary)
    widths_in_c, room = _widths_in_c(depths, vocabulary, candidates, tuple(widths), budget), sum(widths)
    uniform, temperatures = (None, None) if how.uniform is None else _sampled(how, temperatures, widths)
    slots, anchors, known, tokens = None, None, {}, 0
    if head is not None:
        slots, anchors = block.hidden.contiguous(), block.anchor_embedding.contiguous()
        known, tokens = {"vocabulary": head.vocabulary, "hidden": head.hidden}, head.tokens
    at = _ROLLOUT(block.base_logits.contiguous(), slots, anchors, uniform, temperatures, **known)
    choices, parents = torch.empty(2, requests, room, dtype=torch.long).unbind()
    scores, num_drafts = torch.empty(requests, room), torch.zeros(requests, dtype=torch.long)
    ids = torch.empty(requests, depths, candidates, dtype=torch.long) if candidates < vocabulary else None
    probs = None if uniform is None else torch.empty(requests, depths, candidates)
    kept = (_INTEGER * depths)()
    arguments = _Rollout(
        None if head is None else ctypes.addressof(head.in_c), at["slots"], at["logits"], at["anchors"],
        requests, depths, vocabulary, candidates, how.threshold, ctypes.addressof(widths_in_c), at["temperatures"],
        at["uniform"], ctypes.addressof(kept), room, choices.data_ptr(), parents.data_ptr(), scores.data_ptr(),
        min(budget, room), num_drafts.data_ptr(), *(None if x is None else x.data_ptr() for x in (ids, probs)),
    )  # fmt: skip
    status = _loops().head_rollout(ctypes.byref(arguments))
    if status:
        token_ids, rows = None if head is None else head.token_ids, f"rows of the embeddings, 0 to {tokens - 1}"
        raise _failure(status, "head_rollout", "token_ids", token_ids, rows)
    total = sum(kept)
    return Grown(choices[:, :total], parents[:, :total], scores[:, :total], num_drafts, ids, probs)


# ---- losses and gradients of training: blended.py ----


_BLENDED = {
    (half, half_target): _Arguments(
        "blended_rows_",
        base=f"{'bfloat16 ' * half}rows logits",
        correction=f"optional {'bfloat16 ' * half}rows logits",
        target=f"optional {'bfloat16 ' * half_target}rows logits",
        labels="int64 rows",
        weights="rows",
    )
    for half in (False, True)
    for half_target in (False, True)
}
"""By whether the draft's logits, and the target's, are bfloat16."""


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
    if target is None and terms.needs_target:
        raise TypeError("blended_rows_: target must be logits, which the objective compares with, got None")
    halves = [isinstance(x, Tensor) and x.dtype is torch.bfloat16 for x in (base, target)]
    at = _BLENDED[halves[0], halves[1]](base, correction, target, labels, weights)
    rows, width = base.shape
    if not 1 <= width < 2**31:  # lanes count in 32 bits
        raise ValueError(f"blended_rows_: base must have 1 to 2^31 - 1 logits in a row, got {width}")
    base_losses = torch.empty(rows)
    final_losses = base_losses if correction is None else torch.empty(rows)
    eta = math.nan if terms.adaptive_eta is None else terms.adaptive_eta
    status = _loops().blended_rows(
        halves[0], at["base"], at["correction"], halves[1], at["target"], at["labels"], at["weights"], rows, width,
        lambda_base,
        terms.cross_entropy, terms.kl, terms.total_variation, terms.log_acceptance, eta,
        base_losses.data_ptr(), final_losses.data_ptr(),
    )  # fmt: skip
    if status:
        raise _failure(status, "blended_rows_", "labels", labels, f"0 to {width - 1}")
    return base_losses, final_losses
