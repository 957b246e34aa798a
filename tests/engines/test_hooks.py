"""A plug-in's table of what it relies on inside an engine, checked against what is installed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import domino_spec
from domino_spec.engines.hooks import Hook, check_hook, check_hooks, known_release
from domino_spec.settings import UserError

GOOD = Hook("json:JSONDecoder.decode", "self, s, _w")


def test_an_engine_as_expected_is_let_through() -> None:
    check_hooks("json", "2.0.9", {"2.0": [GOOD, Hook("json:loads"), Hook("json.decoder:NaN")]})


@pytest.mark.parametrize(
    ("hook", "phrase"),
    [
        (Hook("json.gone:loads"), "json.gone.loads is missing"),
        (Hook("json:JSONDecoder.gone"), "json.JSONDecoder.gone is missing"),
        (
            Hook("json:JSONDecoder.decode", "self, text"),
            "json.JSONDecoder.decode takes (self, s, _w), not (self, text)",
        ),
        (Hook("json.decoder:NaN", "self"), "json.decoder.NaN can no longer be called"),
    ],
)
def test_what_moved_is_named(hook: Hook, phrase: str) -> None:
    assert check_hook(hook) == phrase
    with pytest.raises(UserError) as caught:
        check_hooks("json", "2.0.9", {"2.0": [GOOD, hook]})
    assert phrase in str(caught.value)
    assert "json 2.0.9" in str(caught.value)


def test_an_unknown_release_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"json 3\.1\.0 is not supported.*json 2\.0, 2\.1"):
        check_hooks("json", "3.1.0", {"2.0": [], "2.1": []})


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.32.0", "0.32"),
        ("0.32.1.post1", "0.32"),
        ("0.5.23", "0.5.23"),
        ("0.5.23+cpu", "0.5.23"),
        ("0.320.0", None),
        ("0.5.230", None),
        ("1.0", None),
    ],
)
def test_the_release_of_a_version(version: str, expected: str | None) -> None:
    assert known_release(version, ["0.32", "0.5.23"]) == expected


def test_only_serve_imports_plug_ins_and_only_when_an_engine_is_asked_for() -> None:
    package, users = Path(domino_spec.__file__).parent, set()
    for file in package.rglob("*.py"):
        name = str(file.relative_to(package))
        if not name.startswith("engines"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("domino_spec.engines"):
                    assert node.col_offset, f"{name} imports {node.module} when it is imported"
                    users.add(name)
    assert users == {"cli/serve.py", "serve/preflight.py"}
