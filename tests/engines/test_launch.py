"""`serve --engine`: the command line of another engine, built from the same options."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from domino_spec.engines import launch
from tests.cli_fixtures import fail, make_draft_dir, make_target_dir, succeed  # noqa: F401


def printed(engine: str, *arguments: object) -> tuple[dict[str, str], list[str]]:
    """Variables and words of the command line that `--print` shows."""
    words = shlex.split(succeed("serve", "--engine", engine, "--print", "--device", "cpu", *arguments))
    start = words.index(sys.executable)
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_vllm_is_told_of_the_draft_and_what_the_user_asked_for(target_dir, draft_dir):
    pair = ("--target", target_dir, "--draft", draft_dir)
    options = ("--port", 9, "--slots", 3, "--capacity", 64, "--served-model-name", "mine", "--num-drafts", 2)
    environment, words = printed("vllm", *pair, *options, "--", "--enforce-eager", "--seed", 1)
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(words, "--model") == str(target_dir)
    assert json.loads(value(words, "--speculative-config")) == {
        "method": "dflash",
        "model": str(draft_dir),
        "num_speculative_tokens": 2,
        "draft_sample_method": "probabilistic",
    }
    assert (value(words, "--port"), value(words, "--max-num-seqs"), value(words, "--max-model-len")) == ("9", "3", "64")
    assert value(words, "--served-model-name") == "mine"
    assert words[-3:] == ["--enforce-eager", "--seed", "1"]
    assert environment.get("DOMINO_SPEC_CANDIDATES") is None


def test_sglang_is_told_of_the_draft(target_dir, draft_dir):
    _, words = printed("sglang", "--target", target_dir, "--draft", draft_dir)
    assert words[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert value(words, "--speculative-algorithm") == "DFLASH"
    assert value(words, "--speculative-draft-model-path") == str(draft_dir)


def test_sglang_always_drafts_a_whole_block(target_dir, draft_dir):
    _, words = printed("sglang", "--target", target_dir, "--draft", draft_dir, "--num-drafts", 4, "--candidates", 9)
    assert "--speculative-num-draft-tokens" not in words
    assert value(words, "--speculative-domino-candidate-pool-size") == "9"
    line = fail(
        "serve", "--engine", "sglang", "--print", "--target", target_dir, "--draft", draft_dir, "--num-drafts", 5
    )
    assert "SGLang drafts 4 tokens" in line


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_what_is_left_open_is_the_engines_own_choice(engine, target_dir, draft_dir):
    _, words = printed(engine, "--target", target_dir, "--draft", draft_dir)
    for option in ("--max-num-seqs", "--max-running-requests", "--max-model-len", "--context-length"):
        assert option not in words
    assert value(words, "--dtype") == "float32"  # on a CPU


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_without_a_draft_nothing_is_said_of_drafting(engine, target_dir):
    _, words = printed(engine, "--target", target_dir, "--draft", "none")
    assert not any("speculative" in word for word in words)


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_plug_ins_are_told_by_the_environment(engine, target_dir, draft_dir):
    pair = ("--target", target_dir, "--draft", draft_dir)
    environment, _ = printed(engine, *pair, "--candidates", 0, "--allow-other-target", "--threads", 2)
    wanted = {"DOMINO_SPEC_CANDIDATES": "0", "DOMINO_SPEC_ALLOW_OTHER_TARGET": "1", "OMP_NUM_THREADS": "2"}
    assert wanted.items() <= environment.items()


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_a_key_is_never_shown(engine, target_dir):
    out = succeed(
        "serve", "--engine", engine, "--print", "--target", target_dir, "--draft", "none", "--api-key", "hush"
    )
    assert "hush" not in out


def test_what_would_be_ignored_is_refused(target_dir, draft_dir, monkeypatch):
    pair = ("--target", target_dir, "--draft", draft_dir)
    assert "--timeout is for this package's engine" in fail("serve", "--engine", "vllm", *pair, "--timeout", 3)
    assert "--cors-origin is for" in fail("serve", "--engine", "vllm", *pair, "--cors-origin", "*")
    assert "unexpected argument --x" in fail("serve", *pair, "--", "--x")
    assert "give --engine" in fail("serve", *pair, "--print")
    assert "--graphs captures CUDA graphs" in fail("serve", *pair, "--graphs", "--device", "cpu", "--port", 0)
    assert "--json goes with --check" in fail("serve", *pair, "--json")
    assert "two things" in fail("serve", *pair, "--engine", "vllm", "--check", "--print")
    assert "between 1 and the 5" in fail("serve", *pair, "--engine", "vllm", "--print", "--num-drafts", 9)
    assert "is reached from other machines" in fail("serve", *pair, "--engine", "vllm", "--print", "--host", "0.0.0.0")


def test_an_engine_that_is_missing_is_said_before_anything_is_started(target_dir, draft_dir, monkeypatch):
    monkeypatch.setattr(launch, "DISTRIBUTIONS", {"vllm": ("no-such-engine",)})
    line = fail("serve", "--engine", "vllm", "--target", target_dir, "--draft", draft_dir)
    assert "vllm is not installed in this environment" in line


def test_the_process_is_replaced_by_the_engine(target_dir, draft_dir, monkeypatch):
    started = {}

    def become(file: str, arguments: list[str], environment: dict[str, str]) -> None:
        started.update(file=file, arguments=arguments, environment=environment)

    monkeypatch.setattr(launch.os, "execvpe", become)
    monkeypatch.setattr(launch, "installed_version", lambda engine: "0.32.0")
    pair = ("--target", target_dir, "--draft", draft_dir)
    line = succeed("serve", "--engine", "vllm", *pair, "--api-key", "hush", "--device", "cpu").strip()
    assert started["file"] == sys.executable
    assert shlex.join(started["arguments"]) == line
    assert started["environment"]["VLLM_API_KEY"] == "hush" and "PATH" in started["environment"]


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_a_server_that_others_reach_gets_its_key(engine, target_dir, monkeypatch):
    started = {}

    def become(file: str, arguments: list[str], environment: dict[str, str]) -> None:
        started.update(arguments=arguments, environment=environment)

    monkeypatch.setattr(launch.os, "execvpe", become)
    monkeypatch.setattr(launch, "installed_version", lambda name: "1")
    pair = ("--target", target_dir, "--draft", "none", "--device", "cpu")
    out = succeed("serve", "--engine", engine, *pair, "--host", "0.0.0.0", "--api-key", "hush")
    assert "hush" not in out
    if engine == "vllm":
        assert started["environment"]["VLLM_API_KEY"] == "hush"
    else:
        assert value(started["arguments"], "--api-key") == "hush"
