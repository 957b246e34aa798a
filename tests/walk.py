"""What a reader must open to follow a path through the package: files entered, and lines of the functions entered.

A path is recorded by Python's profiling hook. A function's lines are those between its `def` and its end, both
included, without its docstring: what a reader has on the screen. Functions inside functions count once.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

PACKAGE = Path(__file__).parent.parent / "domino_spec"


@dataclass
class Walk:
    """The functions of the package that ran while `recording` was open."""

    codes: set[CodeType] = field(default_factory=set)

    @property
    def files(self) -> list[str]:
        """Paths inside the package, sorted."""
        return sorted(self.lines_by_file)

    @property
    def lines(self) -> int:
        """Lines of all functions that were entered."""
        return sum(self.lines_by_file.values())

    @property
    def lines_by_file(self) -> dict[str, int]:
        """For each file, the lines of its functions that were entered."""
        entered: dict[Path, set[int]] = {}
        for code in self.codes:
            file = Path(code.co_filename)
            entered.setdefault(file, set()).update(_body_lines(file).get(code.co_firstlineno, ()))
        return {str(file.relative_to(PACKAGE)): len(lines) for file, lines in entered.items() if lines}


@contextlib.contextmanager
def recording() -> Iterator[Walk]:
    """Record what this thread enters, and every thread that starts while this is open."""
    walk, package = Walk(), str(PACKAGE)

    def entered(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            walk.codes.add(frame.f_code)

    before = sys.getprofile()
    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        yield walk
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


@functools.cache
def _body_lines(file: Path) -> dict[int, frozenset[int]]:
    """The lines of every function of a file by the line it begins on (its first decorator's, where it has one)."""
    bodies: dict[int, frozenset[int]] = {}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        assert node.end_lineno is not None
        lines = set(range(node.lineno, node.end_lineno + 1))
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        bodies[first] = frozenset(lines)
    return bodies
