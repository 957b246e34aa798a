"""Builds the C loops: float32 decoding and the losses of training on a CPU.

The machine's gcc or clang compiles them at first use, for this machine's processor, into a shared library that is
cached. If that fails, a warning says so once, with the remedy, and PyTorch's functions do the same work more slowly.
`bindings.py` is the only module that calls what is built here.

Threads need OpenMP, and only gcc's calls find the OpenMP that PyTorch brings on Linux. What clang builds, on macOS too,
uses one thread.

Loading a library runs its code, so it is loaded only from a directory that nobody else can write to; otherwise the
loops are compiled anew for this process, which is logged.

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
_FLAGS = (
    "-std=gnu11",
    "-O3",
    *(("-march=native",) if platform.machine() == "x86_64" else ()),
    "-ffp-contract=off",
    "-fPIC",
)
"""Every aarch64 processor has the vectors that the loops use; an x86-64 one has them or not."""
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
_log = logging.getLogger(__name__)


class _Missing(Exception):
    """Why there are no loops; what to do."""


def load() -> ctypes.CDLL | None:
    """The library, built unless it is cached; None without one, and a warning that says why."""
    if os.environ.get("DOMINO_SPEC_NATIVE") == "0":
        return None
    try:
        return _load(_compiler())
    except (_Missing, OSError) as why:
        _log.warning(
            "decoding and training on this CPU are slow, as the native loops are missing: %s. "
            "DOMINO_SPEC_NATIVE=0 says that this is wanted",
            why,
        )
        return None


def _compiler() -> list[str]:
    """The command that compiles, with its options."""
    if not sys.platform.startswith(("linux", "darwin")):
        raise _Missing(f"they are built on Linux and macOS only, and this is {platform.system()}; run on one of them")
    # gcc first: cc may be clang, whose loops use one thread.
    named = os.environ.get("CC", "").strip() or next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if named is None:
        raise _Missing("there is no C compiler; install gcc")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise _Missing(f"CC is {named!r} ({error}); set it to a gcc or clang, or unset it") from error
    if shutil.which(command[0]) is None:
        raise _Missing(f"CC names {command[0]}, which is no program here; set it to a gcc or clang, or unset it")
    return command


def _load(compiler: list[str]) -> ctypes.CDLL:
    """The library for these sources, compiler and processor, compiled unless it is cached."""
    flags = [*_FLAGS, *(_SANITIZE if os.environ.get("DOMINO_SPEC_NATIVE_SANITIZE") == "1" else ())]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS)))
    key.update(" ".join((*compiler, *flags, platform.machine(), _processor())).encode())
    suffix = "dylib" if sys.platform == "darwin" else "so"
    cached = cache_directory() / "native" / f"kernels-{key.hexdigest()[:16]}.{suffix}"
    try:
        cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unsafe = _unsafe(cached)
        if unsafe is None and cached.exists():
            return _open(cached)
        with tempfile.TemporaryDirectory() as private:
            linked = Path(private, cached.name)
            _compile(compiler, flags, linked)
            if unsafe is not None:
                _log.warning("the native loops are compiled anew at every start, as %s", unsafe)
                return _open(linked)
            with atomic_path(cached) as written:
                shutil.copyfile(linked, written)
    except subprocess.CalledProcessError as error:
        reason = _first_error(error)
        raise _Missing(f"{compiler[0]} does not build them ({reason}); install gcc, and set CC to it") from error
    except (OSError, UserError) as error:
        raise _Missing(f"what {compiler[0]} builds cannot be kept ({error}); set DOMINO_SPEC_CACHE") from error
    return _open(cached)


def _unsafe(cached: Path) -> str | None:
    """Why a cached library must not be loaded: someone else may have written it."""
    for path in (cached.parent, cached):
        if not path.exists():
            continue
        found = path.stat()
        if found.st_uid not in (os.getuid(), 0):
            return f"{path} belongs to another user; set DOMINO_SPEC_CACHE"
        if path.is_dir() and found.st_mode & 0o022:
            return f"others may write to {path}; take that right away from them (chmod go-w), or set DOMINO_SPEC_CACHE"
    return None


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


def _compile(compiler: list[str], flags: list[str], linked: Path) -> None:
    """All sources, into one shared library beside their objects."""
    is_clang = "__clang__" in _run([*compiler, "-dM", "-E", "-x", "c", os.devnull])
    threads = [] if is_clang or not sys.platform.startswith("linux") else ["-fopenmp"]
    objects = []
    for source in _SOURCES:
        objects.append(str(linked.with_name(source.stem + ".o")))
        _run([*compiler, *flags, *threads, "-c", str(source), "-o", objects[-1]])
    # Linked without -fopenmp: its calls then find the threads of the OpenMP that PyTorch has loaded, where a second
    # OpenMP would bring more threads, which compete for the same cores.
    _run([*compiler, *flags, "-shared", *objects, "-lm", "-o", str(linked)])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _processor() -> str:
    """What the processor can do: a cache directory may be shared by different machines."""
    if sys.platform == "darwin":
        return _run(["sysctl", "-n", "machdep.cpu"])
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
