"""The one door to the native loops (`native.py`): every entry of C, as a function of tensors.

C reads and writes where it is told to, so nothing else in the package calls it, and nothing gets past these functions
that does not fit: types, devices, strides and shapes are compared here, with each other and with the processor's
vectors; numbers that stand in tensors (rows of a cache, labels, tokens) are compared by C itself, which reads them
anyway, and reports. What does not fit is a ValueError that names function and argument, what is expected and what was
found; without memory for scratch there is a MemoryError. Weights of decoder layers are compared once, when they are
described; a call compares only what it brings, which takes microseconds.

Arguments are those of the functions that call these: `cpu.py`, `layers_cpu.py`, `context.py`, `rollout_cpu.py` and
`blended.py` say what they mean, allocate results and lay out what is not contiguous. All tensors are float32 unless
something else is said.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from domino_spec.ops.native import build as native

if TYPE_CHECKING:
    from domino_spec.ops.blended import Terms
    from domino_spec.ops.native.layers import Layer, Norm, Product

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
    """`struct pass`, of layers.c too."""

    _fields_ = (
        *((name, _INTEGER) for name in ("requests", "tokens", "extent", "capacity", "rotary")),
        *((name, _INTEGER) for name in ("layer_stride", "request_stride", "head_stride")),
        *((name, _POINTER) for name in ("cos", "sin", "rows", "seen", "keys", "values", "x")),
        ("taps", _INTEGER),
        *((name, _POINTER) for name in ("tapped", "features")),
    )


class _Rollout(ctypes.Structure):
    """`struct rollout`, whose members rollout.c explains."""

    _fields_ = (
        *((name, _INTEGER) for name in ("requests", "depths", "hidden", "state", "low_rank", "vocabulary")),
        *((name, _INTEGER) for name in ("candidates", "pure_prefix")),
        *((name, _POINTER) for name in ("input_gates", "state_gates", "to_low_rank", "correction")),
        *((name, _POINTER) for name in ("slots", "logits", "anchors")),
        ("tokens", _INTEGER),
        *((name, _POINTER) for name in ("embeddings", "token_ids")),
        *((name, _REAL) for name in ("scale", "threshold")),
        *((name, _POINTER) for name in ("widths", "temperatures", "uniform", "kept")),
        ("room", _INTEGER),
        *((name, _POINTER) for name in ("choices", "parents", "scores")),
        ("budget", _INTEGER),
        *((name, _POINTER) for name in ("num_drafts", "ids", "probs")),
    )


_MIRRORS: dict[str, type[ctypes.Structure]] = {"layer": _Layer, "pass": _Pass, "rollout": _Rollout}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where there are none, which is said once."""
    loaded = native.load()
    if loaded is None:
        return None
    strange = next((name for name, mirror in _MIRRORS.items() if _layout(mirror) != _layout_in_c(loaded, name)), None)
    if strange is not None:
        _log.warning(
            "decoding and training on this CPU are slow: the native loops are not used, as the compiler lays out their "
            "struct %s in another way than this package expects; set CC to a plain gcc, without options",
            strange,
        )
        return None
    loaded.panel_width.restype = loaded.lanes.restype = _INTEGER
    for name, arguments in _ENTRIES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INTEGER if name in _CAN_FAIL else None
    return loaded


class _Member(ctypes.Structure):
    """`struct member` of cpu.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", _INTEGER))


def _layout(mirror: type[ctypes.Structure]) -> dict[str, int]:
    """The size of a struct, under no name, and where each member begins."""
    return {"": ctypes.sizeof(mirror), **{name: getattr(mirror, name).offset for name, *_ in mirror._fields_}}


def _layout_in_c(loaded: ctypes.CDLL, name: str) -> dict[str, int]:
    """The same as C has it."""
    first = ctypes.addressof(_Member.in_dll(loaded, f"{name}_layout"))
    members = (_Member.from_address(first + i * ctypes.sizeof(_Member)) for i in itertools.count())
    return {
        member.name.decode(): member.offset for member in itertools.takewhile(lambda m: m.name is not None, members)
    }


def _loops() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("there are no native loops here; ask cpu.is_available first")
    return found


@functools.cache
def lanes() -> int:
    """Values of a vector of the processor. Norms, SwiGLU and attention go over whole vectors."""
    return _loops().lanes()


@functools.cache
def panel_width() -> int:
    """Outputs that stand side by side in a packed weight."""
    return _loops().panel_width()


# ---- what is compared ----


def _expect(
    function: str, name: str, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Refuse what is not a contiguous tensor of this shape and type on the CPU."""
    if isinstance(x, Tensor) and x.dtype is dtype and x.shape == shape and x.is_cpu and x.is_contiguous():
        return
    raise _unfit(function, name, x, f"contiguous {dtype} {list(shape)} on cpu")


def _shape(function: str, name: str, x: Tensor | None, letters: str, dtype: torch.dtype = torch.float32) -> torch.Size:
    """The shape of a tensor whose sizes are free, named by `letters`; refuses other types, devices and ranks."""
    if isinstance(x, Tensor) and x.dtype is dtype and x.is_cpu and x.dim() == letters.count(",") + 1:
        return x.shape
    raise _unfit(function, name, x, f"{dtype} [{letters}] on cpu")


def _rows(function: str, name: str, x: Tensor) -> tuple[int, int]:
    """How many rows x [..., width] has, and the width."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
        raise _unfit(function, name, x, "torch.float32 [..., width] on cpu, of a width of 1 or more")
    _expect(function, name, x, x.shape)
    return x.numel() // x.shape[-1], x.shape[-1]


def _whole_vectors(function: str, name: str, width: int) -> None:
    if width < 1 or width % lanes():
        raise ValueError(f"{function}: {name} must be a multiple of {lanes()}, this processor's vectors, got {width}")


def _grouped(function: str, heads: int, kv_heads: int) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{function}: {heads} heads cannot share {kv_heads} heads of keys and values evenly")


def _rotary(function: str, cos: Tensor, sin: Tensor, requests: int, tokens: int, head_dim: int) -> int:
    """How many values of a head turn."""
    width = cos.shape[-1] if isinstance(cos, Tensor) and cos.dim() else -1
    if width % 2 or not 0 <= width <= head_dim:
        raise ValueError(f"{function}: cos must be of an even width up to {head_dim}, a head's, {_found(cos)}")
    for name, x in (("cos", cos), ("sin", sin)):
        _expect(function, name, x, (requests, tokens, width))
    return width


def _cache(
    function: str, keys: Tensor, values: Tensor, layers: int, requests: int, kv_heads: int, head_dim: int
) -> tuple[int, ...]:
    """A cache's capacity, and the strides of its layers, requests and heads; it may be cut from a larger one."""
    letters = "layers, requests, kv_heads, capacity, head_dim"
    capacity, strides = _shape(function, "keys", keys, letters)[3], keys.stride()
    sizes = (layers, requests, kv_heads, capacity, head_dim)
    nested = all(strides[i] >= sizes[i + 1] * strides[i + 1] for i in range(3))
    for name, x in (("keys", keys), ("values", values)):
        if _shape(function, name, x, letters) != sizes:
            raise _unfit(function, name, x, f"torch.float32 {list(sizes)} on cpu")
        if strides[3:] != (head_dim, 1) or not nested or x.stride() != strides:
            raise _unfit(function, name, x, f"cut from a contiguous cache, and of keys' strides, {strides}")
    return capacity, *strides[:3]


def _rows_side_by_side(function: str, name: str, x: Tensor, dim: int) -> None:
    """Refuse unless the last dimension, and `dim` before it, stand one behind another."""
    width = x.shape[-1]
    if (width > 1 and x.stride(-1) != 1) or (x.shape[dim] > 1 and x.stride(dim) != width):
        raise _unfit(function, name, x, f"of strides {width} and 1 in dimensions {dim} and -1")


def spread(function: str, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` expanded to this shape and contiguous, as C takes it.

    Raises:
        ValueError: it cannot be expanded so.
    """
    try:
        return (x if x.shape == shape else x.expand(shape)).contiguous()
    except RuntimeError:
        raise _unfit(function, name, x, f"{list(shape)}, or expand to it") from None


def _unfit(function: str, name: str, x: object, expected: str) -> ValueError | TypeError:
    kind = ValueError if isinstance(x, Tensor) else TypeError
    return kind(f"{function}: {name} must be {expected}, {_found(x)}")


def _found(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"got {type(x).__name__}"
    layout = f" of strides {x.stride()}" if x.layout is torch.strided else f" ({x.layout})"
    return f"got {x.dtype} {list(x.shape)} on {x.device}{layout}"


def _settle(function: str, status: int, name: str = "", indices: Tensor | None = None, expected: str = "") -> None:
    """Make an exception of what C returned."""
    if status == _NO_MEMORY:
        raise MemoryError(f"{function}: no memory is left for its scratch")
    if status == _BAD_INDEX:
        assert indices is not None
        raise ValueError(f"{function}: {name} must be {expected}, got {int(indices.min())} to {int(indices.max())}")


def _address(x: Tensor | None) -> int | None:
    """Where a tensor's values begin, as C takes it; None is NULL."""
    return None if x is None else x.data_ptr()


# ---- steps of a decoder pass: cpu.py ----


def linear(x: Tensor, panels: Tensor, bias: Tensor | None, turned: Tensor, y: Tensor) -> None:
    """x [..., inputs] times a packed weight, plus a packed bias, to y [..., outputs]; `turned` is room for x."""
    rows, inputs = _rows("linear", "x", x)
    outputs, width = _rows("linear", "y", y)[1], panel_width()
    count = -(-outputs // width)
    _expect("linear", "panels", panels, (count, inputs, width))
    if bias is not None:
        _expect("linear", "bias", bias, (count * width,))
    _expect("linear", "turned", turned, x.shape)
    _expect("linear", "y", y, (*x.shape[:-1], outputs))
    _loops().linear(
        x.data_ptr(), rows, inputs, panels.data_ptr(), _address(bias), outputs, turned.data_ptr(), y.data_ptr()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None:
    """x [..., width] to y."""
    rows, width = _rows("rms_norm", "x", x)
    _whole_vectors("rms_norm", "the width of x", width)
    _expect("rms_norm", "weight", weight, (width,))
    _expect("rms_norm", "y", y, x.shape)
    _loops().rms_norm(x.data_ptr(), rows, width, 1, width, weight.data_ptr(), eps, y.data_ptr())


def rms_norm_heads(x: Tensor, first: int, heads: int, weight: Tensor, eps: float) -> None:
    """Heads `first` to `first + heads` of x [..., row], in place; a head is as wide as the weight."""
    rows, row = _rows("rms_norm_heads_", "x", x)
    (width,) = _shape("rms_norm_heads_", "weight", weight, "head_dim")
    _expect("rms_norm_heads_", "weight", weight, (width,))
    _whole_vectors("rms_norm_heads_", "the width of weight", width)
    if first < 0 or heads < 0 or (first + heads) * width > row:
        raise ValueError(
            f"rms_norm_heads_: weight must be as wide as a head, of which {heads} from number {first} on "
            f"stand in a row of {row} values, got {width}"
        )
    start = x.data_ptr() + 4 * first * width
    _loops().rms_norm(start, rows, row, heads, width, weight.data_ptr(), eps, start)


def rotate(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """The first `heads` heads of x [R, N, row], in place; cos and sin [R, N, rotary]."""
    requests, tokens, row = _shape("rotate_", "x", x, "requests, tokens, row")
    _expect("rotate_", "x", x, x.shape)
    if heads < 0 or not 1 <= head_dim <= row or heads * head_dim > row:
        raise ValueError(f"rotate_: {heads} heads of {head_dim} values must fit a row of x, which has {row}")
    width = _rotary("rotate_", cos, sin, requests, tokens, head_dim)
    _loops().rotate(x.data_ptr(), requests * tokens, row, heads, head_dim, width, cos.data_ptr(), sin.data_ptr())


def silu_mul(x: Tensor, y: Tensor) -> None:
    """Gate and up, x [..., 2 * width], to y [..., width]."""
    rows, width = _rows("silu_mul", "y", y)
    _whole_vectors("silu_mul", "half of the width of x", width)
    _expect("silu_mul", "x", x, (*y.shape[:-1], 2 * width))
    _loops().silu_mul(x.data_ptr(), rows, width, y.data_ptr())


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, y: Tensor) -> None:
    """Queries [R, N, heads, D] over keys and values [R, kv_heads, T, D], where mask [R, 1, N, T] is True, to y."""
    requests, tokens, heads, width = _shape("attend", "query", query, "requests, tokens, heads, head_dim")
    _, kv_heads, extent, _ = _shape("attend", "keys", keys, "requests, kv_heads, extent, head_dim")
    if keys.shape != (requests, kv_heads, extent, width) or extent < 1:
        raise _unfit("attend", "keys", keys, f"[{requests}, kv_heads, 1 or more, {width}], as query is")
    if _shape("attend", "values", values, "requests, kv_heads, extent, head_dim") != keys.shape:
        raise _unfit("attend", "values", values, f"{list(keys.shape)}, as keys are")
    _grouped("attend", heads, kv_heads)
    _whole_vectors("attend", "the width of a head", width)
    _expect("attend", "mask", mask, (requests, 1, tokens, extent), torch.bool)
    _expect("attend", "y", y, query.shape)
    _rows_side_by_side("attend", "query", query, -2)
    between = query.stride(1 if tokens > 1 else 0)
    if min(requests, tokens) > 1 and query.stride(0) != tokens * between:
        raise _unfit("attend", "query", query, "cut from a tensor of as many tokens, the same distance between all")
    for name, x in (("keys", keys), ("values", values)):
        _rows_side_by_side("attend", name, x, -2)
    apart = [keys.stride(i) if keys.shape[i] > 1 else 0 for i in (0, 1)]
    if apart != [values.stride(i) if values.shape[i] > 1 else 0 for i in (0, 1)]:
        raise _unfit("attend", "values", values, f"of keys' strides, {keys.stride()}")
    status = _loops().attend(
        query.data_ptr(), between, keys.data_ptr(), values.data_ptr(), *apart, mask.data_ptr(),
        requests, tokens, heads, kv_heads, extent, width, scale, y.data_ptr(),
    )  # fmt: skip
    _settle("attend", status)


# ---- a draft's context: context.py ----


def write_context(
    projected: Tensor,
    norms: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """projected [R, T, layers, 2, kv_heads, D], which is lost, to rows [R, T] int64 of a cache."""
    letters = "requests, tokens, layers, 2, kv_heads, head_dim"
    requests, tokens, layers, _, kv_heads, width = _shape("write_context_", "projected", projected, letters)
    _expect("write_context_", "projected", projected, (requests, tokens, layers, 2, kv_heads, width))
    _whole_vectors("write_context_", "the width of a head", width)
    _expect("write_context_", "norm_weights", norms, (layers, width))
    if _rotary("write_context_", cos, sin, requests, tokens, width) != width:
        raise _unfit("write_context_", "cos", cos, f"[{requests}, {tokens}, {width}]")
    _expect("write_context_", "rows", rows, (requests, tokens), torch.int64)
    capacity, *strides = _cache("write_context_", keys, values, layers, requests, kv_heads, width)
    status = _loops().write_context(
        projected.data_ptr(), requests, tokens, layers, kv_heads, width, norms.data_ptr(), eps, cos.data_ptr(),
        sin.data_ptr(), rows.data_ptr(), capacity, *strides, keys.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    _settle("write_context_", status, "rows", rows, "0 or more")


# ---- all layers of a decoder: layers_cpu.py ----


class Described:
    """Decoder layers as C reads them: their weights have been compared with their sizes.

    Raises:
        ValueError: a weight does not fit, or layers differ in what one cache asks of all of them.
    """

    def __init__(self, layers: Sequence[Layer], kinds: Sequence[str]) -> None:
        if not layers:
            raise ValueError("decoder_layers: there are no layers")
        self._weights = tuple(layers)  # the memory that the addresses point to
        self.hidden = len(layers[0].input_norm.gain)
        self.kv_heads, self.head_dim = layers[0].kv_heads, layers[0].head_dim
        self.kinds = tuple(kinds)
        self.in_c = (_Layer * len(layers))(*(self._one(i, layer) for i, layer in enumerate(layers)))

    def __len__(self) -> int:
        return len(self._weights)

    def _one(self, number: int, layer: Layer) -> _Layer:
        function = f"decoder_layers: layer {number}"
        hidden, inner, width = self.hidden, layer.inner, layer.head_dim
        own, row = layer.heads * width, (layer.heads + 2 * layer.kv_heads) * width
        for name, size in (("hidden size", hidden), ("head_dim", width), ("inner", inner)):
            _whole_vectors(function, name, size)
        _grouped(function, layer.heads, layer.kv_heads)
        if (layer.kv_heads, width) != (self.kv_heads, self.head_dim):
            raise ValueError(
                f"{function}: one cache holds {self.kv_heads} heads of {self.head_dim} values for every layer, "
                f"got {layer.kv_heads} of {width}"
            )
        described = _Layer(
            hidden=hidden, heads=layer.heads, kv_heads=layer.kv_heads, head_dim=width, inner=inner, scale=layer.scale,
            kind=self.kinds.index(layer.kind),
        )  # fmt: skip
        norms = {"input": hidden, "query": width, "key": width, "post": hidden}
        for name, size in norms.items():
            norm: Norm | None = getattr(layer, f"{name}_norm")
            if norm is not None:
                _expect(function, f"{name}_norm", norm.gain, (size,))
                setattr(described, f"{name}_norm", norm.gain.data_ptr())
                setattr(described, f"{name}_eps", norm.eps)
        products = {"joined": (hidden, row), "output": (own, hidden), "gate_up": (hidden, 2 * inner)}
        for name, (inputs, outputs) in {**products, "down": (inner, hidden)}.items():
            product: Product = getattr(layer, name)
            count = -(-outputs // panel_width())
            _expect(function, name, product.panels, (count, inputs, panel_width()))
            if product.bias is not None:
                _expect(function, f"{name}'s bias", product.bias, (count * panel_width(),))
            setattr(described, name, product.panels.data_ptr())
            setattr(described, f"{name}_bias", _address(product.bias))
        return described


def decoder_layers(
    layers: Described,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    masks: Sequence[Tensor],
    tapped: Sequence[int],
    features: Tensor | None,
) -> None:
    """x [R, N, H] through all layers, in place; masks [R, 1, N, T] bool, one for each kind."""
    requests, tokens, hidden = _shape("decoder_layers", "x", x, "requests, tokens, hidden")
    _expect("decoder_layers", "x", x, (requests, tokens, layers.hidden))
    rotary = _rotary("decoder_layers", cos, sin, requests, tokens, layers.head_dim)
    _expect("decoder_layers", "rows", rows, (requests, tokens), torch.int64)
    capacity, *strides = _cache("decoder_layers", keys, values, len(layers), requests, layers.kv_heads, layers.head_dim)
    if len(masks) != len(layers.kinds):
        raise ValueError(f"decoder_layers: masks must be one for each of {layers.kinds}, got {len(masks)}")
    letters = "requests, 1, tokens, extent"
    extent = _shape("decoder_layers", f"the mask of {layers.kinds[0]}", masks[0], letters, torch.bool)[-1]
    if not 1 <= extent <= capacity:
        raise ValueError(f"decoder_layers: masks must show 1 to {capacity} rows, the cache's, got {extent}")
    for kind, mask in zip(layers.kinds, masks, strict=True):
        _expect("decoder_layers", f"the mask of {kind}", mask, (requests, 1, tokens, extent), torch.bool)
    if not all(0 <= layer < len(layers) for layer in tapped):
        raise ValueError(f"decoder_layers: tapped must be layers from 0 to {len(layers) - 1}, got {list(tapped)}")
    if features is not None:
        _expect("decoder_layers", "features", features, (requests, tokens, len(tapped) * hidden))
    elif tapped:
        raise TypeError("decoder_layers: features must be a tensor for what is tapped, got None")
    taps = (_INTEGER * len(tapped))(*tapped)
    seen = (_POINTER * len(masks))(*(mask.data_ptr() for mask in masks))
    described = _Pass(
        requests=requests, tokens=tokens, extent=extent, capacity=capacity, rotary=rotary,
        layer_stride=strides[0], request_stride=strides[1], head_stride=strides[2],
        cos=cos.data_ptr(), sin=sin.data_ptr(), rows=rows.data_ptr(), seen=ctypes.addressof(seen),
        keys=keys.data_ptr(), values=values.data_ptr(), x=x.data_ptr(), taps=len(tapped),
        tapped=ctypes.addressof(taps), features=_address(features),
    )  # fmt: skip
    status = _loops().decoder_layers(layers.in_c, len(layers), ctypes.byref(described))
    _settle("decoder_layers", status, "rows", rows, "0 or more")


# ---- the head's drafts: rollout_cpu.py ----


def head_rollout(
    *,
    slots: Tensor,
    logits: Tensor,
    anchors: Tensor,
    head: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    embeddings: Tensor | None,
    token_ids: Tensor | None,
    scale: float,
    pure_prefix: int,
    threshold: float,
    widths: Sequence[int],
    temperatures: Tensor | None,
    uniform: Tensor | None,
    choices: Tensor,
    parents: Tensor,
    scores: Tensor,
    budget: int,
    num_drafts: Tensor,
    ids: Tensor | None,
    probs: Tensor | None,
) -> list[int]:
    """A chain or a tree for every request; returns how many prefixes each depth has.

    `head` are the weights of its input gates, state gates, low-rank layer and correction; without it, `slots`,
    `anchors` and `embeddings` are not read. Shapes are those of `struct rollout` in rollout.c.
    """
    function = "head_rollout"
    requests, depths, vocabulary = _shape(function, "logits", logits, "requests, depths, vocabulary")
    _expect(function, "logits", logits, (requests, depths, vocabulary))
    candidates = vocabulary if ids is None else ids.shape[-1]
    if not 1 <= candidates <= vocabulary:
        raise ValueError(f"{function}: candidates must be 1 to {vocabulary}, all logits, got {candidates}")
    if len(widths) != depths or not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ValueError(f"{function}: widths must be {depths} numbers of 1 or more, got {list(widths)}")
    room = sum(widths)
    for name, x in (("choices", choices), ("parents", parents)):
        _expect(function, name, x, (requests, room), torch.int64)
    _expect(function, "scores", scores, (requests, room))
    _expect(function, "num_drafts", num_drafts, (requests,), torch.int64)
    if ids is not None:
        _expect(function, "ids", ids, (requests, depths, candidates), torch.int64)
    if budget < 0:
        raise ValueError(f"{function}: budget must be 0 or more, got {budget}")
    arguments = _Rollout(
        requests=requests, depths=depths, vocabulary=vocabulary, candidates=candidates, pure_prefix=depths,
        logits=logits.data_ptr(), scale=scale, threshold=threshold, room=room, choices=choices.data_ptr(),
        parents=parents.data_ptr(), scores=scores.data_ptr(), budget=min(budget, room),
        num_drafts=num_drafts.data_ptr(), ids=_address(ids),
    )  # fmt: skip
    if temperatures is not None or uniform is not None or probs is not None:
        _expect(function, "temperatures", temperatures, (requests,))
        _expect(function, "uniform", uniform, (requests, depths), torch.float64)
        _expect(function, "probs", probs, (requests, depths, candidates))
        if room != depths:
            raise ValueError(f"{function}: widths must be 1 where drafts are sampled, got {list(widths)}")
        arguments.temperatures, arguments.uniform = _address(temperatures), _address(uniform)
        arguments.probs = _address(probs)
    if head is not None:
        _add_head(arguments, head, slots, anchors, embeddings, token_ids)
        if pure_prefix < 0:
            raise ValueError(f"{function}: pure_prefix must be 0 or more, got {pure_prefix}")
        arguments.pure_prefix = min(pure_prefix, depths)
    in_c, kept = (_INTEGER * depths)(*widths), (_INTEGER * depths)()
    arguments.widths, arguments.kept = ctypes.addressof(in_c), ctypes.addressof(kept)
    status = _loops().head_rollout(ctypes.byref(arguments))
    _settle(function, status, "token_ids", token_ids, f"rows of the embeddings, 0 to {arguments.tokens - 1}")
    return list(kept)


def _add_head(
    arguments: _Rollout,
    head: tuple[Tensor, Tensor, Tensor, Tensor],
    slots: Tensor,
    anchors: Tensor,
    embeddings: Tensor | None,
    token_ids: Tensor | None,
) -> None:
    """What a rollout reads where there is a head."""
    function, requests, depths, vocabulary = "head_rollout", arguments.requests, arguments.depths, arguments.vocabulary
    hidden = _shape(function, "slots", slots, "requests, depths, hidden")[-1]
    state = _shape(function, "state_gates", head[1], "gates, state")[-1]
    low_rank = _shape(function, "correction", head[3], "vocabulary, low_rank")[-1]
    tokens = _shape(function, "embeddings", embeddings, "tokens, hidden")[0]
    for size, name in ((hidden, "hidden size"), (state, "width of the state"), (low_rank, "low rank")):
        _whole_vectors(function, f"the {name}", size)
    given: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "input_gates": (head[0], (3 * state, hidden)),
        "state_gates": (head[1], (3 * state, state)),
        "to_low_rank": (head[2], (low_rank, hidden + state)),
        "correction": (head[3], (vocabulary, low_rank)),
        "slots": (slots, (requests, depths, hidden)),
        "anchors": (anchors, (requests, hidden)),
        "embeddings": (embeddings, (tokens, hidden)),
    }
    for name, (x, shape) in given.items():
        _expect(function, name, x, shape)
        setattr(arguments, name, _address(x))
    if token_ids is not None:
        _expect(function, "token_ids", token_ids, (vocabulary,), torch.int64)
        arguments.token_ids = token_ids.data_ptr()
    elif tokens < vocabulary:
        raise ValueError(f"{function}: embeddings must have a row for each of {vocabulary} logits, got {tokens}")
    arguments.hidden, arguments.state, arguments.low_rank, arguments.tokens = hidden, state, low_rank, tokens


# ---- losses and gradients of training: blended_cpu.py ----


def blended_rows(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
    adaptive_eta: float,
    base_losses: Tensor,
    final_losses: Tensor,
) -> None:
    """Logits [M, V] of float32 or bfloat16, which become gradients, and labels [M] int64, to losses [M]."""
    function = "blended_rows_"
    half = isinstance(base, Tensor) and base.dtype is torch.bfloat16
    rows, width = _shape(function, "base", base, "rows, logits", torch.bfloat16 if half else torch.float32)
    if not 1 <= width < 2**31:  # lanes count in 32 bits
        raise ValueError(f"{function}: base must have 1 to 2^31 - 1 logits in a row, got {width}")
    _expect(function, "base", base, (rows, width), base.dtype)
    if correction is not None:
        _expect(function, "correction", correction, (rows, width), base.dtype)
    target_half = target is not None and target.dtype is torch.bfloat16
    if target is not None:
        _expect(function, "target", target, (rows, width), torch.bfloat16 if target_half else torch.float32)
    elif terms.needs_target:
        raise TypeError(f"{function}: target must be logits, which the objective compares with, got None")
    _expect(function, "labels", labels, (rows,), torch.int64)
    for name, x in (("weights", weights), ("base_losses", base_losses), ("final_losses", final_losses)):
        _expect(function, name, x, (rows,))
    status = _loops().blended_rows(
        half, base.data_ptr(), _address(correction), target_half, _address(target), labels.data_ptr(),
        weights.data_ptr(), rows, width, lambda_base, terms.cross_entropy, terms.kl, terms.total_variation,
        terms.log_acceptance, adaptive_eta, base_losses.data_ptr(), final_losses.data_ptr(),
    )  # fmt: skip
    _settle(function, status, "labels", labels, f"0 to {width - 1}")
