"""The shape of the package: rooms, and the direction of imports between them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests import sanitized

PACKAGE = Path(__file__).parent.parent / "domino_spec"
ROOMS = [
    {"settings", "files", "public_data", "devices"},
    {"ops"},
    {"target"},
    {"draft", "recipe"},
    {"decoding"},
    {"drafters"},
    {"integrations"},
    {"api"},
    {"clients"},
    {"training"},
    {"bench"},
    {"engines"},
    {"serve"},
    {"demo", "cli"},
    {"__init__", "__main__"},
]
"""docs/architecture.md, top first: a module imports from its own room and from rooms above it."""
FILES = sorted(PACKAGE.rglob("*.py"))


def _level(room: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def _room(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, whose imports never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from _run_time_nodes(node)


def _imports(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a source imports when it runs, functions' bodies included."""
    names: set[str] = set()
    for node in _run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _file_imports(file: Path) -> set[str]:
    return _imports(file.read_text("utf-8"), ".".join(["domino_spec", *file.relative_to(PACKAGE).parts[:-1]]))


def _rooms_imported(names: set[str]) -> set[str]:
    parts = [n.split(".") for n in names]
    known = set().union(*ROOMS)
    return {p[1] for p in parts if p[0] == "domino_spec" and len(p) > 1 and p[1] in known}


def test_every_module_belongs_to_a_room():
    assert FILES
    known = set().union(*ROOMS)
    assert {_room(f) for f in FILES} <= known


def test_imports_point_only_to_rooms_above():
    wrong = []
    for file in FILES:
        level = _level(_room(file))
        below = {room for room in _rooms_imported(_file_imports(file)) if _level(room) > level}
        wrong += [f"{file.relative_to(PACKAGE)} imports from {room}, which stands below it" for room in sorted(below)]
    assert not wrong


def test_the_import_check_sees_every_form_of_import():
    source = (
        "import domino_spec.cli\nfrom domino_spec import bench\nfrom ..drafters import ngram\n"
        "def f():\n    from domino_spec.training.loop import train\n"
        "if TYPE_CHECKING:\n    from domino_spec.serve import x\n"
    )
    assert _rooms_imported(_imports(source, "domino_spec.target")) == {"cli", "bench", "drafters", "training"}


def test_only_ops_import_triton():
    users = {_room(f) for f in FILES if any(n.split(".")[0] == "triton" for n in _file_imports(f))}
    assert users <= {"ops"}


def test_decoding_by_default_imports_no_optional_machinery():
    """The policy, static cycles and the engines' plug-ins stand behind doors that `generate` does not open."""
    script = (
        "import sys\nfrom domino_spec import generate\nfrom tests import tiny\n"
        "target = tiny.tiny_target()\n"
        "(result,) = generate(target, tiny.tiny_draft(target), [[1, 2, 3]], max_new_tokens=4)\n"
        "assert result.num_drafts[0] > 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('domino_spec.')))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    imported = told.stdout.split()
    assert "domino_spec.decoding.engine" in imported and "domino_spec.drafters.block" in imported
    optional = ("decoding.policy", "decoding.graphs", "engines", "serve")
    assert not [name for name in imported if name.removeprefix("domino_spec.").startswith(optional)]


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count: they only hide a circle. Of a package, only its modules that are named count."""
    modules = {_module(file): file for file in FILES}
    left = {name: _modules_imported(file, modules) - {name} for name, file in modules.items()}
    while free := [n for n in left if not left[n] & left.keys() or not any(n in left[other] for other in left)]:
        for name in free:
            del left[name]
    assert not left, f"these files import each other: {', '.join(sorted(left))}"


def _modules_imported(file: Path, modules: Iterable[str]) -> set[str]:
    found = _file_imports(file) & set(modules)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def _module(file: Path) -> str:
    return ".".join(("domino_spec", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def test_the_tests_that_make_and_the_sanitizers_name_exist():
    root = Path(__file__).parent.parent
    named = re.search(
        r"CALL_TRANSFORMERS := \$\(addprefix tests/, (.*?)\)", (root / "Makefile").read_text("utf-8"), re.DOTALL
    )
    assert named is not None
    paths = [f"tests/{name}" for name in named[1].replace("\\\n", " ").split()] + sanitized.TESTS
    assert [path for path in paths if not (root / path).exists()] == []
