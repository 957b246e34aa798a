"""The programs of `benchmarks/`, at small size, with the demo pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ("What is 2 + 3?", "Write a line about the sea.", "Count to five.")
    path.write_text("".join(json.dumps({"id": str(i), "turns": [text]}) + "\n" for i, text in enumerate(texts)))
    return path


def test_the_batch_sweep_compares_texts_and_counts_what_it_did(tmp_path, prompts):
    out = tmp_path / "sweep.json"
    done = run(
        "batch_sweep.py", "--prompts", prompts, "--batch", "1,2", "--fixed", "3", "--groups", "2",
        "--max-new-tokens", "8", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [(e["batch"], e["method"]) for e in record["summary"]] == [
        (b, m) for b in (1, 2) for m in ("none", "adaptive", "3")
    ]
    for entry in record["summary"]:
        equal, _, all_texts = entry["equal_texts"].split()
        assert equal == all_texts, "the native loops give a token the same bits in every pass"
        assert (entry["drafts_per_pass"] == 0) == (entry["method"] == "none") or entry["method"] == "adaptive"
    assert len(record["runs"]) == 2 * 2 * 3 and done.stdout.count("\n| ") == 7


def test_one_command_runs_what_the_machine_can_and_goes_on_where_it_was(tmp_path):
    options = (
        "--drafts",
        "2",
        "--contexts",
        "64,9000",
        "--batches",
        "2",
        "--repeats",
        "1",
        "--out",
        tmp_path / "speed",
    )
    done = run("speed.py", *options)
    assert done.returncode == 0, done.stderr
    for part in ("drafts", "contexts", "batches"):
        profiles = json.loads((tmp_path / "speed" / f"{part}.json").read_text())["profiles"]
        assert len(profiles) == 1, "a context that the target does not know is left out"
    assert (tmp_path / "speed" / "rollout.json").exists() and "| domino (2) | 256 | 1 |" in done.stdout
    assert "is there already" in run("speed.py", *options).stderr


def test_a_shape_knows_contexts_as_long_as_are_asked_for(tmp_path):
    out = tmp_path / "speed"
    done = run(
        "speed.py", "--shape", "tiny", "--drafts", "2", "--contexts", "64,3000", "--batches", "1", "--repeats", "1",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    profiles = json.loads((out / "contexts.json").read_text())["profiles"]
    assert [profile["context"] for profile in profiles] == [64, 3000], "beyond what its configuration says"
    refused = run("speed.py", "--shape", "tiny", "--prompts", "x.jsonl", "--out", out)
    assert refused.returncode == 2 and "leave out --shape or --prompts" in refused.stderr


@pytest.mark.parametrize("program, option", [("batch_sweep.py", "--batch"), ("speed.py", "--contexts")])
def test_nonsense_says_what_was_expected(tmp_path, prompts, program, option):
    done = run(program, "--prompts", prompts, option, "2,x", "--out", tmp_path / "x")
    assert done.returncode == 2 and "whole numbers from 1 on" in done.stderr and "Traceback" not in done.stderr
