"""The one table of methods: each works, or is refused by one line, wherever a method can be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from domino_spec.bench.methods import METHODS as OF_BENCH
from domino_spec.cli import cli
from domino_spec.cli.options import DEFAULT_DRAFT
from domino_spec.draft.single_layer_checkpoint import save_single_layer
from domino_spec.drafters.methods import METHODS
from domino_spec.target.load import load_target
from tests import tiny
from tests.cli_fixtures import (  # noqa: F401
    PROMPT,
    fail,
    make_draft_dir,
    make_target_dir,
    run,
    succeed_json,
    write_prompts,
)

WITH_DOMINO = [name for name, method in METHODS.items() if not method.kinds or "domino" in method.kinds]
OTHERS = [name for name in METHODS if name not in WITH_DOMINO]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, target_dir, draft_dir) -> dict[str, Path]:
    """A draft for every method that needs one."""
    target = load_target(target_dir, pack=False)
    made = {}
    for kind in OTHERS:
        made[kind] = tmp_path_factory.mktemp(kind)
        save_single_layer(tiny.tiny_single_layer(target, kind), made[kind])
    return {name: made.get(name, draft_dir) for name, method in METHODS.items() if method.kinds}


@pytest.fixture
def served(monkeypatch) -> list:
    """The engines that `serve` would have served with."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    engines: list = []

    class NoServer:
        def __init__(self, service, **options):
            engines.append(service.engine)

        def serve_forever(self, bound):
            bound.close()

    monkeypatch.setattr("domino_spec.serve.server.Server", NoServer)
    return engines


def options_for(method: str, drafts: dict[str, Path]) -> tuple:
    return ("--draft", drafts[method]) if method in drafts else ()


def test_every_command_offers_the_methods_of_the_table():
    for command, left_out in (("generate", set()), ("serve", set()), ("demo", {"none"})):
        (option,) = [p for p in cli.commands[command].params if p.name == "method"]
        assert set(option.type.choices) == {*METHODS} - left_out
    assert {*METHODS} <= {*OF_BENCH}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_asked_for_everywhere(tmp_path, target_dir, drafts, served, method):
    pair = ("--target", target_dir, *options_for(method, drafts))
    record = succeed_json("generate", PROMPT, *pair, "--method", method, "--max-new-tokens", 6)
    assert (record["method"], record["num_tokens"]) == (method, 6)

    asked = ("demo", *pair, "--method", method, "--prompt", PROMPT, "--max-new-tokens", 6)
    if method == "none":
        assert "'none' is not one of" in fail(*asked)
    else:
        result = run(*asked)
        assert result.exit_code == 0 and METHODS[method].title in result.stdout.replace("\nWith", "\nwith")

    result = run("serve", *pair, "--method", method, "--slots", 1, "--capacity", 64, "--port", 0, "--num-drafts", 2)
    if method == "none":
        assert result.exit_code == 2 and "--num-drafts means nothing to method none" in result.stderr
        assert run("serve", *pair, "--method", method, "--slots", 1, "--port", 0).exit_code == 0
    else:
        assert result.exit_code == 0
    (engine,) = served
    assert engine.drafter.max_drafts >= engine.num_drafts == (0 if method == "none" else 2)

    suite, out = write_prompts(tmp_path / "suite.jsonl", 1), tmp_path / "bench"
    measured = ("--methods", f"none,{method}" if method != "none" else method, "--max-new-tokens", 4)
    assert run("bench", "--suite", suite, *pair, *measured, "--out", out).exit_code == 0
    assert method in {json.loads(line)["method"] for line in (out / "raw.jsonl").read_text().splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kinds])
def test_a_method_with_a_draft_of_another_kind_is_refused_everywhere(tmp_path, target_dir, drafts, served, method):
    other = next(d for name, d in drafts.items() if not {*METHODS[name].kinds} & {*METHODS[method].kinds})
    pair, suite = ("--target", target_dir, "--draft", other), write_prompts(tmp_path / "suite.jsonl", 1)
    for command in (
        ("generate", PROMPT, *pair, "--method", method),
        ("demo", *pair, "--method", method),
        ("profile", *pair, "--method", method, "--out", tmp_path / "profile"),
        ("bench", "--suite", suite, *pair, "--methods", method, "--out", tmp_path / "bench"),
    ):
        assert f"method {method} needs a" in fail(*command)
    result = run("serve", *pair, "--method", method, "--slots", 1, "--port", 0)
    assert result.exit_code == 2 and f"method {method} needs a" in result.stderr.splitlines()[-1]
    assert not served


def test_a_method_that_does_not_exist_is_refused_everywhere(tmp_path, target_dir):
    suite = write_prompts(tmp_path / "suite.jsonl", 1)
    for command in (
        ("generate", PROMPT, "--method", "guess"),
        ("demo", "--method", "guess"),
        ("serve", "--method", "guess"),
        ("profile", "--method", "guess", "--out", tmp_path / "profile"),
        ("bench", "--suite", suite, "--methods", "none,guess", "--out", tmp_path / "bench"),
    ):
        assert "guess" in fail(*command)
    assert DEFAULT_DRAFT not in fail("profile", "--method", "guess", "--out", tmp_path / "profile")


def settings_refused(method: str) -> list[tuple]:
    values = {"num_drafts": 3, "candidates": 8, "min_confidence": 0.1, "sample_drafts": None}
    options = {name: "--" + name.replace("_", "-") for name in values}
    return [
        (options[name],) if value is None else (options[name], value)
        for name, value in values.items()
        if name not in METHODS[method].settings
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_a_method_does_not_read_is_refused_by_name(target_dir, drafts, method):
    pair = ("--target", target_dir, *options_for(method, drafts))
    for option in settings_refused(method):
        line = fail("generate", PROMPT, *pair, "--method", method, *option)
        assert f"{option[0]} means nothing to method {method}" in line and "leave it out" in line
