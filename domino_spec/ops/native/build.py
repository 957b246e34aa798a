"""Builds the native loops: float32 decoding and the losses of training on a CPU, in C.

The machine's GCC compiles them at first use, for this machine's processor, into a shared object that is cached. Where
that cannot be done, a warning says so once, with the remedy, and PyTorch's own functions do the same more slowly.
`bindings.py` is the only module that calls what is built here.

Environment: `CC` names the compiler and its options; `DOMINO_SPEC_NATIVE=0` keeps to PyTorch's functions, without a
warning; `DOMINO_SPEC_NATIVE_SANITIZE=1` builds the loops with AddressSanitizer and UndefinedBehaviorSanitizer, whose
libraries then have to be loaded before Python (`make test-sanitized`).
"""

from __future__ import annotations

import ctypes
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

from domino_spec.files import atomic_path
from domino_spec.settings import UserError, cache_directory

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu.c", "layers.c", "rollout.c", "blended.c"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "cpu.h", "selection.h"))
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
_log = logging.getLogger(__name__)


class _Missing(Exception):
    """Why there are no loops; what to do."""


def load() -> ctypes.CDLL | None:
    """The shared object, built unless it is there already; None without one, and a warning that says why."""
    if os.environ.get("DOMINO_SPEC_NATIVE") == "0":
        return None
    try:
        return _open(_build(_compiler()))
    except (_Missing, OSError) as why:
        _log.warning(
            "decoding and training on this CPU are slow, as the native loops are missing: %s. "
            "DOMINO_SPEC_NATIVE=0 says that this is wanted",
            why,
        )
        return None


def _compiler() -> list[str]:
    """The command that compiles, with its options."""
    if not sys.platform.startswith("linux"):
        raise _Missing(f"they are built on Linux only, and this is {platform.system()}; run on Linux")
    # gcc first: cc may be clang, which cannot build them.
    named = os.environ.get("CC", "").strip() or shutil.which("gcc") or shutil.which("cc")
    if named is None:
        raise _Missing("there is no C compiler; install gcc")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise _Missing(f"CC is {named!r} ({error}); set it to a GCC, or unset it") from error
    if shutil.which(command[0]) is None:
        raise _Missing(f"CC names {command[0]}, which is no program here; set it to a GCC, or unset it")
    return command


def _open(built: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise _Missing(f"{built} cannot be loaded ({error}); remove it, or set DOMINO_SPEC_CACHE") from error


def _first_error(failed: subprocess.CalledProcessError) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in failed.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines or [f"exit status {failed.returncode}"])[0]


def _build(compiler: list[str]) -> Path:
    """The shared object for these sources, compiler and processor, compiled unless it is there already."""
    flags = [*_FLAGS, *(_SANITIZE if os.environ.get("DOMINO_SPEC_NATIVE_SANITIZE") == "1" else ())]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS)))
    key.update(" ".join((*compiler, *flags, platform.machine(), _processor())).encode())
    built = cache_directory() / f"kernels-{key.hexdigest()[:16]}.so"
    if built.exists():
        return built
    try:
        with tempfile.TemporaryDirectory() as scratch:
            linked = Path(scratch, built.name)
            _compile(compiler, flags, linked)
            with atomic_path(built) as written:
                shutil.copyfile(linked, written)
    except subprocess.CalledProcessError as error:
        reason = _first_error(error)
        raise _Missing(f"{compiler[0]} does not build them ({reason}); install gcc, and set CC to it") from error
    except (OSError, UserError) as error:
        raise _Missing(f"what {compiler[0]} builds cannot be kept ({error}); set DOMINO_SPEC_CACHE") from error
    return built


def _compile(compiler: list[str], flags: list[str], linked: Path) -> None:
    """All sources, into one shared object beside their own objects."""
    objects = []
    for source in _SOURCES:
        objects.append(str(linked.with_name(source.stem + ".o")))
        _run([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
    # Linked without -fopenmp: its calls then find the threads of the OpenMP that PyTorch has loaded, where a second
    # OpenMP would bring threads of its own that fight for the same cores.
    _run([*compiler, *(flag for flag in flags if flag != "-fopenmp"), "-shared", *objects, "-lm", "-o", str(linked)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _processor() -> str:
    """What the processor can do: a cache directory may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
