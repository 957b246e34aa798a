"""Public data sets by name: benchmarks to measure on, and conversations to train on.

Both come through the optional `datasets` library. The benchmarks take the wording that published
speculative-decoding results use, so that acceptance lengths can be compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from domino_spec.settings import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PublicData:
    """Where a public data set is."""

    path: str
    """Name of the data set on the hub, or of a file format."""
    name: str | None = None
    """Its configuration, for data sets that have several."""
    split: str = "test"
    data_files: tuple[str, ...] | None = None
    streaming: bool = False
    """Read only the rows that are used; for data sets of gigabytes."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(PublicData):
    """A public benchmark, and how its rows become prompts."""

    turns: Callable[[Row], Sequence[str]]
    """What the user says, turn by turn."""


STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
COMPLETE_FUNCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n",
    "\n```",
)
"""What stands before and after the problem."""


def _step_by_step(problem: str) -> list[str]:
    return [problem + STEP_BY_STEP]


def _complete_function(prompt: str) -> list[str]:
    before, after = COMPLETE_FUNCTION
    return [before + prompt + after]


def _instruction(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]]


def _contest_problem(row: Row) -> list[str]:
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
    "gsm8k": Benchmark("openai/gsm8k", name="main", turns=lambda row: _step_by_step(row["question"])),
    "math500": Benchmark("HuggingFaceH4/MATH-500", turns=lambda row: _step_by_step(row["problem"])),
    "aime25": Benchmark("MathArena/aime_2025", split="train", turns=lambda row: _step_by_step(row["problem"])),
    "humaneval": Benchmark("openai/openai_humaneval", turns=lambda row: _complete_function(row["prompt"])),
    "mbpp": Benchmark("google-research-datasets/mbpp", name="sanitized", turns=lambda row: [row["prompt"]]),
    "livecodebench": Benchmark(
        "json",
        split="train",
        # The data set's own loader is a script, which is never run: its files are read as what they are.
        data_files=tuple(f"{_LIVECODEBENCH}test{number}.jsonl" for number in ("", "2", "3", "4", "5", "6")),
        streaming=True,
        turns=_contest_problem,
    ),
    "mt-bench": Benchmark("HuggingFaceH4/mt_bench_prompts", split="train", turns=lambda row: row["prompt"]),
    "alpaca": Benchmark("tatsu-lab/alpaca", split="train", turns=_instruction),
}
"""Public benchmarks by name."""

CONVERSATIONS: dict[str, PublicData] = {
    "open-perfectblend": PublicData("mlabonne/open-perfectblend", split="train", streaming=True),
    "sharegpt": PublicData(
        "Aeala/ShareGPT_Vicuna_unfiltered",
        split="train",
        data_files=("ShareGPT_V4.3_unfiltered_cleaned_split.json",),  # the repository holds other files too
        streaming=True,
    ),
    "ultrachat": PublicData("HuggingFaceH4/ultrachat_200k", split="train_sft", streaming=True),
}
"""Public conversations by name; their rows are in a chat format."""


def public_rows(what: str, data: PublicData, instead: str) -> Iterator[Row]:
    """The rows of a public data set, in its own order.

    Args:
        what: how messages call it, such as "suite gsm8k".
        data: where it is.
        instead: how messages say what else the user can do.

    Raises:
        UserError: the `datasets` library or the network is missing.
    """
    os.environ["HF_DATASETS_TRUST_REMOTE_CODE"] = "0"  # `datasets` below 4 asks on standard input whether to run code
    try:
        import datasets
    except ImportError:
        raise UserError(f"{what} needs the datasets library: pip install datasets, or {instead}") from None
    from huggingface_hub.errors import HfHubHTTPError

    # What `datasets` raises without a network depends on where it notices. These are the bases of all of it: beside
    # Python's own, the base error of whichever HTTP client this version of the hub's library uses.
    client_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *client_errors)
    try:
        yield from datasets.load_dataset(
            data.path,
            data.name,
            split=data.split,
            data_files=list(data.data_files) if data.data_files else None,
            streaming=data.streaming,
        )
    except failures as error:
        reason = " ".join(str(error).split())[:200]
        # What is streamed is never cached.
        cache = "" if data.streaming else "; HF_HOME names a cache that holds it, filled where there is a network"
        raise UserError(
            f"cannot get {what} from the hub: check the network, or {instead}{cache} ({type(error).__name__}: {reason})"
        ) from None


def benchmark_turns(name: str) -> Iterator[list[str]]:
    """What the user says in each conversation of a public benchmark.

    Args:
        name: one of `BENCHMARKS`.

    Raises:
        UserError: it cannot be had (`public_rows`), or its columns have changed.
    """
    benchmark = BENCHMARKS[name]
    instead = f"give the path of a JSONL file of prompts instead of {name}"
    for row in public_rows(f"suite {name}", benchmark, instead):
        try:
            yield list(benchmark.turns(row))
        except KeyError as error:
            raise UserError(f"the data set of suite {name} has changed: it has no column {error}; {instead}") from None
