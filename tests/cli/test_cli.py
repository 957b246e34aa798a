"""Every command does what its help says, on tiny models and without the network."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from domino_spec.cli import cli
from domino_spec.cli.options import DEFAULT_DRAFT, DEFAULT_TARGET, Machine
from domino_spec.draft.checkpoint import read_draft
from domino_spec.draft.load import EMBEDDED_DRAFT
from domino_spec.drafters.methods import METHODS
from domino_spec.files import load_tensors, read_jsonl
from domino_spec.target.embedded import EMBEDDED_TARGET
from tests.cli_fixtures import (  # noqa: F401
    PROMPT,
    fail,
    make_draft_dir,
    make_target_dir,
    make_trained_run,
    run,
    save_target,
    succeed,
    succeed_json,
    write_jsonl,
    write_prompts,
    write_recipe,
)

ROOT = Path(__file__).parent.parent
TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
"""Makes rich take standard output for a terminal."""
COMMANDS = sorted(cli.commands)
GENERATE_FIELDS = {
    "text": str,
    "token_ids": list,
    "num_tokens": int,
    "num_verify_passes": int,
    "acceptance_length": float,
    "tokens_per_second": float,
    "seconds": float,
    "method": str,
    "target": str,
    "draft": str,
    "device": str,
    "dtype": str,
    "seed": int,
}


def test_every_verb_of_the_first_release_is_there():
    assert set(COMMANDS) >= {"generate", "demo", "regenerate", "train", "export", "inspect", "bench"}


def test_names_repeated_for_a_fast_start_are_those_of_the_library():
    assert (DEFAULT_TARGET, DEFAULT_DRAFT) == (EMBEDDED_TARGET, EMBEDDED_DRAFT)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    assert re.search(rf"^  domino-spec {command}( |$)", succeed(command, "--help"), re.MULTILINE)


def test_without_a_command_the_help_is_shown():
    assert succeed() == succeed("--help")


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, domino_spec.cli as c; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


# generate


def test_generate_prints_the_text_that_its_json_holds(target_dir, draft_dir):
    arguments = ("generate", PROMPT, "--target", target_dir, "--draft", draft_dir, "--max-new-tokens", 20)
    record = succeed_json(*arguments)
    assert {name: type(record[name]) for name in GENERATE_FIELDS} == GENERATE_FIELDS
    assert record["num_tokens"] == len(record["token_ids"]) == 20
    assert record["method"] == "domino-tree"
    assert sum(record["acceptance_lengths"]) / record["num_verify_passes"] == record["acceptance_length"]
    assert record["num_tokens"] / record["seconds"] == pytest.approx(record["tokens_per_second"])
    assert succeed(*arguments) == record["text"] + "\n"


SERVED = [name for name, method in METHODS.items() if not method.kinds or "domino" in method.kinds]
"""Methods that a Domino draft serves, or that need none."""


@pytest.mark.parametrize("method", SERVED)
def test_every_method_writes_the_same_greedy_text(target_dir, draft_dir, method):
    options = ("--target", target_dir, "--max-new-tokens", 30)
    plain = succeed_json("generate", PROMPT, *options, "--method", "none")
    drafted = succeed_json("generate", PROMPT, *options, "--draft", draft_dir, "--method", method)
    assert plain["method"] == "none"
    assert drafted["token_ids"] == plain["token_ids"]
    assert (drafted["draft"] is None) == (method in ("none", "ngram"))


def test_drafting_that_is_off_is_said_and_recorded_with_the_reason(target_dir, draft_dir):
    options = ("generate", PROMPT, "--target", target_dir, "--max-new-tokens", 4, "--json")
    result = run(*options)
    (line,) = result.stderr.splitlines()
    assert line.startswith("domino-spec: warning: nothing is drafted: no draft was given; --draft names one")
    record = json.loads(result.stdout)
    assert (record["method"], record["drafting"], record["reason"]) == ("none", False, "no draft was given")
    record = json.loads(succeed(*options, "--method", "none"))  # without a warning: it was asked for
    assert (record["drafting"], record["reason"]) == (False, "method none was asked for")
    assert "nothing is drafted: method none was asked for" in run(*options, "--method", "none", "--verbose").stderr
    record = json.loads(succeed(*options, "--draft", draft_dir, "--num-drafts", 0))
    assert (record["drafting"], record["reason"]) == (False, "num_drafts is 0")
    record = json.loads(succeed(*options, "--draft", draft_dir))
    assert (record["drafting"], record["reason"]) == (True, None)


def test_a_seed_repeats_a_sampled_text(target_dir, draft_dir):
    def sample(seed: int, *more: str) -> list[int]:
        options = ("--temperature", 3, "--top-p", 0.95, "--top-k", 30, "--seed", seed, "--max-new-tokens", 20, *more)
        pair = ("--target", target_dir, "--draft", draft_dir, "--method", "domino", "--min-confidence", 0)
        return succeed_json("generate", PROMPT, *pair, *options)["token_ids"]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1) == sample(1, "--sample-drafts"), "the default above temperature 0"
    assert sample(1, "--argmax-drafts") == sample(1, "--argmax-drafts") != sample(1)


@pytest.fixture(scope="session")
def repetitive(tmp_path_factory):
    """A command whose target, small weights at random, repeats itself, so that look-up is right now and then."""
    target = save_target(tmp_path_factory.mktemp("repetitive"), initializer_range=0.05)
    return ("generate", PROMPT, "--target", target, "--method", "ngram", "--max-new-tokens", 40)


def test_show_drafts_sets_accepted_text_apart_and_changes_nothing_else(repetitive):
    record = succeed_json(*repetitive)
    legend, text, figures = re.split(r"\n\n", succeed(*repetitive, "--show-drafts").strip())
    assert legend.startswith("[Drafted and accepted]")
    assert text.replace("[", "").replace("]", "") == record["text"]
    marked = " ".join(re.findall(r"\[(.*?)\]", text)).split()
    assert len(marked) == sum(record["drafted"]) > 0
    assert f"tau {record['acceptance_length']:.2f}" in figures


def test_show_drafts_uses_colour_on_a_terminal(repetitive):
    coloured = run(*repetitive, "--show-drafts", env=TERMINAL).stdout
    assert coloured.count("\x1b[1;32m") > 1
    assert succeed_json(*repetitive)["text"] in re.sub(r"\x1b\[[0-9;]*m", "", coloured)


def test_a_dash_reads_the_prompt_from_standard_input(target_dir):
    arguments = ("--target", target_dir, "--method", "none", "--max-new-tokens", 8)
    assert succeed("generate", "-", *arguments, input=PROMPT) == succeed("generate", PROMPT, *arguments)


def test_a_stop_string_and_what_follows_it_are_not_printed(target_dir):
    arguments = ("generate", PROMPT, "--target", target_dir, "--method", "none", "--max-new-tokens", 20)
    words = succeed(*arguments).split()
    assert succeed(*arguments, "--stop", words[5]).split() == words[: words.index(words[5])]


def test_raw_leaves_the_chat_template_out(target_dir):
    arguments = ("generate", PROMPT, "--target", target_dir, "--method", "none", "--max-new-tokens", 2)
    assert succeed_json(*arguments)["prompt_tokens"] == 6  # the template adds a word on either side
    assert succeed_json(*arguments, "--raw")["prompt_tokens"] == 4


def test_the_number_of_drafts_can_be_chosen(target_dir, draft_dir):
    pair = ("--target", target_dir, "--draft", draft_dir, "--max-new-tokens", 20)
    options = ("--num-drafts", 2, "--candidates", 0, "--min-confidence", 0)
    assert set(succeed_json("generate", PROMPT, *pair, *options)["num_drafts"]) == {2}


@pytest.mark.slow
def test_ctrl_c_leaves_the_text_so_far_and_says_nothing(tmp_path):
    target = save_target(tmp_path / "target", max_position_embeddings=100_000)
    arguments = ["generate", PROMPT, "--target", str(target), "--method", "none", "--max-new-tokens", "90000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "domino_spec", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where the tests run in a shell's background, children inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = process.stdout.read(10)  # waits until text arrives
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first.startswith(b"w") and errors == b"\n"
    assert re.fullmatch(rb"[w0-9 ]+", first + rest)


# demo


def test_demo_compares_the_texts_and_gives_the_speed_up(target_dir, draft_dir):
    arguments = ("demo", "--target", target_dir, "--draft", draft_dir, "--prompt", PROMPT, "--max-new-tokens", 12)
    record = succeed_json(*arguments)
    (race,) = record["races"]
    assert record["equal"] and race["none"]["token_ids"] == race["domino-tree"]["token_ids"]
    expected = race["domino-tree"]["tokens_per_second"] / race["none"]["tokens_per_second"]
    assert race["speed_up"] == pytest.approx(expected) == pytest.approx(record["speed_up"])
    lines = succeed(*arguments)
    assert "The two texts are equal: the same 12 tokens." in lines
    assert lines.count(race["none"]["text"]) == 2
    assert re.search(r"Speed-up \d+\.\d\d", lines)


def test_demo_fills_two_panels_on_a_terminal(target_dir):
    arguments = ("demo", "--target", target_dir, "--method", "ngram", "--max-new-tokens", 8)
    screen = run(*arguments, env=TERMINAL).stdout
    assert "the target alone" in screen and "prompt look-up" in screen
    assert "tokens/s, tau" in screen and "Over all prompts: " in screen


# regenerate, train, export


def test_regenerate_answers_every_prompt_once_and_resumes(tmp_path, target_dir, draft_dir):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    recipe, out = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts)), tmp_path / "out.jsonl"
    first = succeed_json("regenerate", recipe, "--out", out)
    assert (first["answered"], first["already_answered"]) == (6, 0)
    rows = {row["id"]: row for row in read_jsonl(out, {"id": str})}
    assert rows.keys() == {f"p{i}" for i in range(6)}
    assert set(rows["p0"]) == {"id", "category", "temperature", "prompt_ids", "response_ids"}
    for prompt in read_jsonl(prompts, {}):
        options = ("--target", target_dir, "--method", "none", "--max-new-tokens", 24)
        alone = succeed_json("generate", prompt["turns"][0], *options)
        assert rows[prompt["id"]]["response_ids"] == alone["token_ids"]

    # Killed while writing the fourth row: that row and the ones after it are answered again.
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:30])
    result = run("regenerate", recipe, "--out", out, "--draft", draft_dir, "--json")
    (said,) = result.stderr.splitlines()
    assert result.exit_code == 0 and "warning" in said and f"{out} ended in the middle of a line" in said
    second = json.loads(result.stdout)
    assert (second["answered"], second["already_answered"]) == (3, 3)
    assert {row["id"]: row for row in read_jsonl(out, {"id": str})} == rows
    assert succeed_json("regenerate", recipe, "--out", out)["new_tokens"] == 0


def test_regenerate_answers_a_conversation_turn_by_turn(tmp_path, target_dir):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"id": "c", "turns": ["w3 w4", "w5"], "category": "chat"}])
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts), max_new_tokens=5)
    succeed("regenerate", recipe, "--out", tmp_path / "out.jsonl")
    first, second = read_jsonl(tmp_path / "out.jsonl", {"id": str})
    assert (first["id"], second["id"], second["category"]) == ("c#1", "c#2", "chat")
    # The template puts w1 before and w2 after every message.
    answer = first["response_ids"]
    assert second["prompt_ids"] == [1, 3, 4, 2, 1, *answer, 2, 1, 5, 2]


def test_prompts_that_exceed_the_context_are_left_out_with_a_word(tmp_path, target_dir):
    rows = [{"id": "long", "turns": ["w3 " * 300]}, {"id": "short", "turns": ["w3"]}]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts))
    result = run("regenerate", recipe, "--out", tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 0 and "1 prompts are left out" in result.stderr
    assert json.loads(result.stdout)["too_long"] == 1
    assert [row["id"] for row in read_jsonl(tmp_path / "out.jsonl", {})] == ["short"]


def test_a_trained_draft_can_be_exported_inspected_and_used(tmp_path, target_dir, trained_run):
    directory, _ = trained_run
    for name in ("state.safetensors", "metrics.jsonl", "recipe.yaml", "draft/config.json"):
        assert (directory / name).is_file()
    assert (directory / "training.png").read_bytes().startswith(b"\x89PNG")
    succeed("export", directory, "--out", tmp_path / "draft")
    assert succeed_json("inspect", tmp_path / "draft", "--target", target_dir)["fits"] is True
    options = ("--target", target_dir, "--draft", tmp_path / "draft", "--max-new-tokens", 5)
    assert succeed_json("generate", PROMPT, *options)["method"] == "domino-tree"


def test_training_again_resumes_a_finished_run(trained_run):
    directory, recipe = trained_run
    before = (directory / "state.safetensors").read_bytes()
    record = succeed_json("train", recipe, "--out", directory)
    assert record["step"] == 4 and record["tau"] >= 1 and record["draft"] == str(directory / "draft")
    assert (record["candidates"], record["candidate_recall"]) == (128, 1)
    assert (directory / "state.safetensors").read_bytes() == before


def test_an_export_in_fp32_holds_the_master_weights(tmp_path, trained_run):
    directory, _ = trained_run
    succeed("export", directory, "--out", tmp_path / "bf16")
    succeed("export", directory, "--out", tmp_path / "fp32", "--dtype", "fp32")
    master, _ = load_tensors(directory / "state.safetensors")
    full, low = (dict(read_draft(tmp_path / name).named_parameters()) for name in ("fp32", "bf16"))
    for name, parameter in full.items():
        scale = master["feature_scale"] if name == "backbone.fc.weight" else 1.0  # trained on scaled features
        assert torch.equal(parameter, master[f"weight/{name}"] * scale)
        assert torch.equal(parameter.bfloat16(), low[name])
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"


# inspect, bench


def test_inspect_counts_parameters_and_names_conventions(draft_dir, target_dir):
    record = succeed_json("inspect", draft_dir)
    parts = record["parameters"]
    tensors, _ = load_tensors(draft_dir / "model.safetensors")
    assert parts["total"] == sum(t.numel() for t in tensors.values())
    assert parts["total"] == parts["backbone"] + parts["gru"] + parts["w1"] + parts["w2"]
    assert (parts["gru"], parts["w1"], parts["w2"]) == (3 * 16 * (32 + 16), (32 + 16) * 16, 16 * 60)
    assert (record["method"], record["block_size"], record["max_drafts"]) == ("domino", 5, 5)
    assert record["fits"] is None and record["dtypes"] == ["bfloat16"]
    text = succeed("inspect", draft_dir, "--target", target_dir)
    assert "shifted" in text and "same shape, same weights" in text and record["target_fingerprint"] in text


def test_inspect_says_what_does_not_fit_and_exits_with_2(tmp_path, draft_dir):
    other = save_target(tmp_path / "other", num_hidden_layers=5)
    result = run("inspect", draft_dir, "--target", other, "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["fits"] is False
    assert "4, the target has 5" in result.stderr and len(result.stderr.splitlines()) == 1


def test_bench_writes_raw_rows_and_a_report(tmp_path, target_dir, draft_dir):
    suite = write_prompts(tmp_path / "suite.jsonl", 3)
    options = ("--target", target_dir, "--draft", draft_dir, "--methods", "none,domino", "--limit", 2)
    result = run("bench", "--suite", suite, *options, "--max-new-tokens", 6, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    rows = read_jsonl(tmp_path / "out" / "raw.jsonl", {"suite": str, "method": str})
    assert {(row["id"], row["method"]) for row in rows} == {(p, m) for p in ("p0", "p1") for m in ("none", "domino")}
    assert all((tmp_path / "out" / name).is_file() for name in ("report.md", "report.html", "speedup.png"))


@pytest.fixture
def asked_for(monkeypatch) -> dict:
    """What `bench` would have measured."""
    arguments: dict = {}
    monkeypatch.setattr("domino_spec.bench.run.run_bench", lambda **given: arguments.update(given) or {})
    return arguments


def test_bench_takes_a_draft_of_every_kind_and_what_else_a_comparison_needs(asked_for):
    options = ("--methods", "none,domino,eagle3", "--thinking", "--assistant", "small-model", "--threads", 1)
    succeed("bench", "--suite", "a.jsonl,b.jsonl", "--draft", "one", "--draft", "two", *options, "--out", "out")
    assert (asked_for["drafts"], asked_for["suites"]) == (["one", "two"], ["a.jsonl", "b.jsonl"])
    assert (asked_for["enable_thinking"], asked_for["assistant"]) == (True, "small-model")


@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        (["--methods", "none,domino"], [DEFAULT_DRAFT]),
        (["--methods", "none,ngram,transformers,transformers-lookup,transformers-assisted"], []),
        (["--methods", "none,ngram", "--target", "another"], []),
        (["--methods", "transformers-dflash", "--target", "another", "--draft", "mine"], ["mine"]),
        (["--methods", "domino", "--draft", "mine", "--draft", "mine"], ["mine"]),
    ],
)
def test_bench_loads_the_drafts_that_its_methods_need(asked_for, options, drafts):
    succeed("bench", "--suite", "a.jsonl", *options, "--out", "out")
    assert asked_for["drafts"] == drafts
    assert (asked_for["enable_thinking"], asked_for["assistant"]) == (False, None)


@pytest.mark.slow
def test_bench_sets_two_runs_side_by_side(tmp_path, target_dir, draft_dir):
    suite = write_prompts(tmp_path / "suite.jsonl", 2)
    methods = ("--methods", "none,domino,ngram", "--target", target_dir, "--draft", draft_dir)
    runs = [tmp_path / "a", tmp_path / "b"]
    for out, budget in zip(runs, (2, 3), strict=True):
        options = ("--max-new-tokens", 4, "--num-drafts", budget, "--out", out)
        assert run("bench", "--suite", suite, *methods, *options).exit_code == 0
    same = succeed_json("bench", "--compare", runs[0], runs[0])
    assert [entry["tau_ratio"] for entry in same["pooled"]] == [1, 1, 1]
    (entry,) = succeed_json("bench", "--compare", *runs)["pooled"]
    assert (entry["method"], entry["texts"], entry["equal_texts"]) == ("none", 2, 2)
    table = succeed("bench", "--compare", *runs)
    assert "| num_drafts | 2 | 3 |" in table and "Only in B: domino (3) at temperature 0" in table
    assert "comparison.md" in succeed("bench", "--compare", *runs, "--out", tmp_path / "c")
    assert (tmp_path / "c" / "comparison.md").read_text() + "\n" == table


def test_numbers_in_lists_are_checked_by_name(target_dir):
    line = fail("bench", "--suite", "x.jsonl", "--methods", "none", "--temperatures", "0,warm", "--out", "out")
    assert "--temperatures" in line and "0,warm" in line


@pytest.mark.parametrize("command", ["generate", "demo", "bench", "serve", "train", "profile", "regenerate"])
def test_every_command_that_runs_a_target_can_skip_its_check(command):
    assert "no_check" in {parameter.name for parameter in cli.commands[command].params}


@pytest.mark.parametrize("no_check", [False, True])
def test_no_check_reaches_the_loading_of_the_target(no_check, monkeypatch):
    given = []
    monkeypatch.setattr("domino_spec.target.load.load_target", lambda target, **options: given.append(options["check"]))
    Machine("cpu", "auto", None, verbose=False, no_check=no_check).load("somewhere", None)
    assert given == [not no_check]
