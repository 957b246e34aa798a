"""The C loops by other compilers and for other processors: they build, and compute what gcc's compute here.

Each test looks for a compiler: `clang`, `zig` (which is clang, with every system's headers) or a cross gcc; for aarch64
also for qemu's user mode. What is missing is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from domino_spec.ops.native import build

DRIVER = Path(__file__).with_name("every_loop.c")
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-I", str(build._SOURCES[0].parent)]
OTHERS = [str(source) for source in build._SOURCES if source.name != "rollout.c"]  # the driver includes that one
GCC, CLANG, ZIG = (shutil.which(name) for name in ("gcc", "clang", "zig"))
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def compiled(command: list[str], program: Path, *options: str) -> Path:
    subprocess.run([*command, *FLAGS, *options, str(DRIVER), *OTHERS, "-lm", "-o", str(program)], check=True)
    return program


def results(*command: str | Path) -> list[tuple[str, list[float]]]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, [float(value) for value in values]) for name, *values in lines]


def assert_same(found: list[tuple[str, list[float]]], expected: list[tuple[str, list[float]]]) -> None:
    assert len(expected) > 30 and expected[-1] == ("status", [0])
    for (name, values), (other, truth) in zip(found, expected, strict=True):
        assert name == other and values == pytest.approx(truth, rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def by_gcc(tmp_path_factory):
    """What gcc makes of the loops for this processor."""
    if GCC is None:
        pytest.skip("no gcc here")
    program = tmp_path_factory.mktemp("gcc") / "program"
    return results(compiled([GCC], program, *(flag for flag in build._FLAGS if flag.startswith("-m"))))


@pytest.mark.slow
@pytest.mark.skipif(build.platform.machine() != "x86_64", reason="these are widths of x86-64's vectors")
@pytest.mark.parametrize("processor", ["x86-64-v3", "native"])
@pytest.mark.parametrize("command", [["clang"], ["zig", "cc"], ["gcc", "-fopenmp"]], ids=lambda command: command[0])
def test_every_compiler_and_width_of_vectors_gives_the_same(by_gcc, tmp_path, command, processor):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    name = processor.replace("-", "_") if command[0] == "zig" else processor
    assert_same(results(compiled(command, tmp_path / "program", f"-march={name}", "-Werror=vla")), by_gcc)


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 here")
@pytest.mark.parametrize(
    "command",
    [["aarch64-linux-gnu-gcc", "-fopenmp"], ["zig", "cc", "-target", "aarch64-linux-musl"]],
    ids=["gcc", "zig"],
)
def test_aarch64_computes_the_same(by_gcc, tmp_path, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    assert QEMU is not None
    assert_same(results(QEMU, compiled(command, tmp_path / "program", "-static")), by_gcc)


@pytest.mark.slow
@pytest.mark.skipif(ZIG is None, reason="no zig here")
@pytest.mark.parametrize("machine", ["aarch64-macos", "x86_64-macos"])
def test_a_library_for_macos_needs_nothing_but_the_system(tmp_path, machine):
    """Linked as build.py links it, without OpenMP; what it leaves undefined is the C library's."""
    vectors = ["-mcpu=haswell"] if machine.startswith("x86_64") else []
    sources = [str(source) for source in build._SOURCES]
    command = [str(ZIG), "cc", "-target", machine, *FLAGS, *vectors, "-shared", *sources, "-lm"]
    library = tmp_path / "kernels.dylib"
    subprocess.run([*command, "-o", str(library)], check=True)
    content = library.read_bytes()
    assert content[:4] == bytes.fromhex("cffaedfe") and b"GOMP" not in content and b"__kmpc" not in content
    assert all(
        f"_{name}\0".encode() in content for name in ("linear", "head_rollout", "decoder_layers", "blended_rows")
    )
