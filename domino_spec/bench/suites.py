"""Suites of prompts: a JSONL file of the user's own, or a public benchmark by its name.

First step of a bench. The public benchmarks come through the optional `datasets` library and take the wording that
published speculative-decoding results use, so that acceptance lengths can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from domino_spec.config import UserError
from domino_spec.files import read_jsonl


@dataclass(frozen=True)
class Prompt:
    """One conversation of a suite."""

    suite: str
    id: str
    """Unique within its suite."""
    turns: tuple[str, ...]
    """What the user says, turn by turn."""


@dataclass(frozen=True)
class Benchmark:
    """Where a public benchmark lies and how its rows become prompts."""

    path: str
    """Name of the data set on the hub, or of a file format."""
    turns: Callable[[Mapping[str, Any]], Sequence[str]]
    name: str | None = None
    """Its configuration, for data sets that have several."""
    split: str = "test"
    data_files: tuple[str, ...] | None = None
    streaming: bool = False
    """Read only the rows that are used; for data sets of gigabytes."""


def _step_by_step(problem: str) -> list[str]:
    return [f"{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."]


def _complete_function(prompt: str) -> list[str]:
    return [
        f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
    ]


def _instruction(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]]


def _contest_problem(row: Mapping[str, Any]) -> list[str]:
    if row.get("starter_code"):
        form = f"### Format: Use the following code structure:\n```python\n{row['starter_code']}\n```"
    else:
        form = "### Format: Write your code in the following format:\n```python\n# YOUR CODE HERE\n```"
    return [
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
        "correct Python program that matches the specification and passes all tests. You will NOT return anything "
        f"except for the program\n\n### Question:\n{row['question_content']}\n\n{form}\n\n"
        "### Answer: (use the provided format with backticks)"
    ]


_LIVECODEBENCH = "hf://datasets/livecodebench/code_generation_lite/"

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("openai/gsm8k", lambda row: _step_by_step(row["question"]), name="main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", lambda row: _step_by_step(row["problem"])),
    "aime25": Benchmark("MathArena/aime_2025", lambda row: _step_by_step(row["problem"]), split="train"),
    "humaneval": Benchmark("openai/openai_humaneval", lambda row: _complete_function(row["prompt"])),
    "mbpp": Benchmark("google-research-datasets/mbpp", lambda row: [row["prompt"]], name="sanitized"),
    "livecodebench": Benchmark(
        "json",
        _contest_problem,
        split="train",
        # The data set's own loader is a script, which is never run: its files are read as what they are.
        data_files=tuple(f"{_LIVECODEBENCH}test{number}.jsonl" for number in ("", "2", "3", "4", "5", "6")),
        streaming=True,
    ),
    "mt-bench": Benchmark("HuggingFaceH4/mt_bench_prompts", lambda row: row["prompt"], split="train"),
    "alpaca": Benchmark("tatsu-lab/alpaca", _instruction, split="train"),
}
"""Public benchmarks by name."""


def load_suite(name_or_path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first prompts of a suite, in its own order.

    Args:
        name_or_path: a name in `BENCHMARKS`, or the path of a JSONL file with {"id", "turns"} a line, whose stem then
            names the suite.
        limit: at most this many prompts; None for all.

    Raises:
        UserError: an unknown name, a missing or malformed file (naming the line), the `datasets` library or the
            network missing for a benchmark's name.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 prompt a suite, got {limit}")
    name = str(name_or_path)
    if name in BENCHMARKS:
        return _load_benchmark(name, BENCHMARKS[name], limit)
    path = Path(name)
    if not path.exists() and path.suffix == "" and path.name == name:
        raise UserError(
            f"unknown suite {name!r}: give the path of a JSONL file of prompts, or one of {', '.join(BENCHMARKS)}"
        )
    return _load_file(path, limit)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """A short name for exactly these prompts, so that a changed suite file is noticed."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.suite, prompt.id, prompt.turns]).encode())
    return digest.hexdigest()[:16]


def _load_file(path: Path, limit: int | None) -> list[Prompt]:
    seen: set[str] = set()

    def fault(row: dict[str, Any]) -> str | None:
        turns = row["turns"]
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            return "key 'turns' must be a list of non-empty texts"
        if row["id"] in seen:
            return f"id {row['id']!r} occurs twice"
        seen.add(row["id"])
        return None

    rows = read_jsonl(path, {"id": str, "turns": list}, fault=fault)
    return [Prompt(path.stem, row["id"], tuple(row["turns"])) for row in rows[:limit]]


def _load_benchmark(name: str, benchmark: Benchmark, limit: int | None) -> list[Prompt]:
    own_file = f"give the path of a JSONL file of prompts instead of {name}"
    try:
        import datasets
    except ImportError:
        raise UserError(f"suite {name} needs the datasets library: pip install datasets, or {own_file}") from None
    from huggingface_hub.errors import HfHubHTTPError

    # What `datasets` raises without a network depends on where it notices. These are the bases of all of it: beside
    # Python's own, the base error of whichever HTTP client this version of the hub's library uses.
    client_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *client_errors)
    try:
        rows = datasets.load_dataset(
            benchmark.path,
            benchmark.name,
            split=benchmark.split,
            data_files=list(benchmark.data_files) if benchmark.data_files else None,
            streaming=benchmark.streaming,
        )
        taken = list(islice(rows, limit))
    except failures as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot get suite {name} from the hub: check the network, or {own_file} ({type(error).__name__}: {reason})"
        ) from None
    try:
        return [Prompt(name, f"{name}/{index}", tuple(benchmark.turns(row))) for index, row in enumerate(taken)]
    except KeyError as error:
        raise UserError(f"the data set of suite {name} has changed: it has no column {error}; {own_file}") from None
