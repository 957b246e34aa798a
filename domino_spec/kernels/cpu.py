"""Float32 loops for decoding on CPU, written in C: built by the machine's compiler at first use, and cached.

They do what the PyTorch functions named in their docstrings do, with two properties that decoding wants: a pass over
a dozen rows costs hardly more than over one, and every row of a result has the same bits whatever the number of rows.
Where there is no compiler, callers keep PyTorch's own functions. The same library holds all layers of a decoder in one
call, for `layers_cpu`, the rollout of the head (`rollout_cpu`), and the loop that training spends its time in besides
products (`blended_cpu`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.config import UserError, cache_directory
from domino_spec.files import atomic_path

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.c", "layers.c", "rollout.c", "blended.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "cpu.h", "selection.h"))
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they cannot be built, which is said once."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if os.environ.get("DOMINO_SPEC_NATIVE") == "0" or not sys.platform.startswith("linux") or compiler is None:
        _log.info("no native loops on this machine; PyTorch's own functions are used")
        return None
    try:
        return _declare(ctypes.CDLL(str(_build(compiler))))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning(
            "could not build the native loops with %s, decoding and training will be slower: %s", compiler, reason
        )
        return None


def _build(compiler: str) -> Path:
    """The shared object for these sources, compiler and processor, compiled unless it is there already."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS)))
    key.update(" ".join((compiler, *_FLAGS, platform.machine(), _processor())).encode())
    built = cache_directory() / f"kernels-{key.hexdigest()[:16]}.so"
    if not built.exists():
        with atomic_path(built) as linked, tempfile.TemporaryDirectory() as scratch:
            compiled = [str(Path(scratch, source.stem + ".o")) for source in _SOURCES]
            # Linked without -fopenmp: its calls then find the threads of the OpenMP that PyTorch has loaded, where a
            # second OpenMP would bring threads of its own that fight for the same cores.
            for arguments in (
                *([*_FLAGS, "-c", str(source), "-o", to] for source, to in zip(_SOURCES, compiled, strict=True)),
                ["-shared", *compiled, "-lm", "-o", str(linked)],
            ):
                subprocess.run([*shlex.split(compiler), *arguments], check=True, capture_output=True, text=True)
    return built


def _processor() -> str:
    """What the processor can do: a cache directory may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    loaded.panel_width.restype = loaded.lanes.restype = integer
    for name, arguments in {
        "linear": [pointer, integer, integer, pointer, pointer, integer, pointer, pointer],
        "rms_norm": [pointer, integer, integer, integer, integer, pointer, real, pointer],
        "rotate": [pointer, *[integer] * 5, pointer, pointer],
        "silu_mul": [pointer, integer, integer, pointer],
        "attend": [pointer, integer, pointer, pointer, *[integer] * 2, pointer, *[integer] * 6, real, pointer],
        "write_context": [
            pointer,
            *[integer] * 5,
            pointer,
            real,
            *[pointer] * 3,
            *[integer] * 4,
            *[pointer] * 2,
        ],
        "decoder_layers": [pointer, integer, pointer],
        "head_rollout": [pointer],
        "blended_rows": [
            integer,
            pointer,
            pointer,
            integer,
            *[pointer] * 3,
            *[integer] * 2,
            *[real] * 6,
            *[pointer] * 2,
        ],
    }.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the functions of this module work on tensors of `device` and `dtype`."""
    return device.type == "cpu" and dtype == torch.float32 and library() is not None


def fits(width: int) -> bool:
    """Whether rows of `width` values can be cut into the processor's vectors, as norms, SwiGLU and attention ask."""
    return width % loaded().lanes() == 0


def loaded() -> ctypes.CDLL:
    """`library`, where `is_available` has said that there is one."""
    found = library()
    assert found is not None, "ask is_available first"
    return found


def address(x: Tensor | None) -> int | None:
    """Where a tensor's values begin, as C takes it; None is NULL."""
    return None if x is None else x.data_ptr()


def pack(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] in panels of neighbouring outputs, [panels, inputs, width], padded with zeros."""
    width = loaded().panel_width()
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % width))
    return padded.view(-1, width, inputs).transpose(1, 2).contiguous()


def pack_bias(bias: Tensor) -> Tensor:
    """A bias [outputs], padded as `pack` pads."""
    return F.pad(bias.detach(), (0, -len(bias) % loaded().panel_width())).contiguous()


def linear(x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., inputs] and a packed weight (and bias) to [..., outputs]."""
    x = x.contiguous()
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    turned, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], outputs)
    loaded().linear(
        x.data_ptr(), rows, inputs, panels.data_ptr(), address(bias), outputs, turned.data_ptr(), y.data_ptr()
    )
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension of x [..., width]."""
    x = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    loaded().rms_norm(x.data_ptr(), x.numel() // width, width, 1, width, weight.data_ptr(), eps, y.data_ptr())
    return y


def rms_norm_heads_(x: Tensor, first: int, heads: int, weight: Tensor, eps: float) -> None:
    """Norm, in place, `heads` heads of x [..., row] from the head numbered `first` on; `weight` is [head width]."""
    row, width = x.shape[-1], len(weight)
    start = x.data_ptr() + 4 * first * width
    loaded().rms_norm(start, x.numel() // row, row, heads, width, weight.data_ptr(), eps, start)


def rotate_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE (half-split form), in place, to the first `heads` heads of x [R, N, row].

    Args:
        x: contiguous; a row holds heads of `head_dim` values.
        heads: how many of them turn.
        head_dim: D.
        cos: [R or 1, N, rotary], rotary <= D: the values of a head past `rotary` stay.
        sin: as cos.
    """
    requests, tokens, row = x.shape
    cos, sin = (t.expand(requests, -1, -1).contiguous() for t in (cos, sin))
    loaded().rotate(
        x.data_ptr(), requests * tokens, row, heads, head_dim, cos.shape[-1], cos.data_ptr(), sin.data_ptr()
    )


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's product, silu(gate) * up, of a joined x [..., 2 * width]: gate first."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    loaded().silu_mul(x.data_ptr(), x.numel() // (2 * width), width, y.data_ptr())
    return y


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`F.scaled_dot_product_attention` with grouped heads, over rows of a cache.

    Args:
        query: [R, N, heads, D], heads and D contiguous.
        keys: [R, kv_heads, T, D], T and D contiguous; T may be cut from a larger cache.
        values: as keys.
        mask: [R, 1, N, T] bool, True where seen; every row sees something.
        scale: of the products of queries and keys.

    Returns:
        [R, N, heads, D].
    """
    requests, tokens, heads, width = query.shape
    kv_heads, extent = keys.shape[1:3]
    mask = mask.expand(requests, 1, tokens, extent).contiguous()
    y = query.new_empty(requests, tokens, heads, width)
    loaded().attend(
        query.data_ptr(), query.stride(1), keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1),
        mask.data_ptr(), requests, tokens, heads, kv_heads, extent, width, scale, y.data_ptr(),
    )  # fmt: skip
    return y
