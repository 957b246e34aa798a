"""Runs tests with the native loops built by GCC's sanitizers: `make test-sanitized`, or

    python -m tests.sanitized [arguments of pytest, other files of tests too]

AddressSanitizer ends the process at the first read or write beside a tensor, UndefinedBehaviorSanitizer at an overflow
of integers and at a misaligned or a null pointer. Python and PyTorch are not built with them, so their libraries are
loaded first; from then on every block of memory, PyTorch's tensors included, has forbidden ground around it.
"""

from __future__ import annotations

import os
import subprocess
import sys

TESTS = [
    *(f"tests/ops/test_{name}.py" for name in ("bindings", "steps", "context", "heads_in_c", "blended")),
    *("tests/target/test_fusing.py", "tests/target/test_packing.py"),
    *("tests/draft/test_backbone.py", "tests/draft/test_single_layer.py"),
    "tests/sweep/test_sweep.py",
]
"""Where native loops run, and what they are given in use."""
LEFT_OUT = "not triton"
"""Triton's interpreter runs none of the loops, and takes minutes here."""


def environment() -> dict[str, str] | None:
    """The environment in which Python runs with the sanitizers; None where GCC or its libraries are missing."""
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if None in libraries:
        return None
    return {
        **os.environ,
        # libstdc++, which Python itself does not load, so that AddressSanitizer sees PyTorch's exceptions.
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        # What Python never frees is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "DOMINO_SPEC_NATIVE_SANITIZE": "1",
    }


def _library(name: str) -> str | None:
    """The path of one of GCC's libraries."""
    try:
        asked = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    path = os.path.realpath(asked.stdout.strip())
    return path if os.path.isabs(asked.stdout.strip()) and os.path.exists(path) else None


def main() -> int:
    """Runs pytest so; returns its exit status."""
    variables = environment()
    if variables is None:
        print("test-sanitized needs gcc and its libasan and libubsan (Debian: apt install gcc)", file=sys.stderr)
        return 2
    files = any(os.path.exists(argument.split("::")[0]) for argument in sys.argv[1:])
    arguments = ["-k", LEFT_OUT, *([] if files else TESTS), *sys.argv[1:]]
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
