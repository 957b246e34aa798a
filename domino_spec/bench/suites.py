"""Suites of prompts: a JSONL file of the user's own, or a public benchmark by its name.

First step of a bench.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from domino_spec.files import read_jsonl
from domino_spec.public_data import BENCHMARKS, benchmark_turns
from domino_spec.settings import UserError


@dataclass(frozen=True)
class Prompt:
    """One conversation of a suite."""

    suite: str
    id: str
    """Unique within its suite."""
    turns: tuple[str, ...]
    """What the user says, turn by turn."""


def load_suite(name_or_path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first prompts of a suite, in its own order.

    Args:
        name_or_path: a name in `BENCHMARKS`, or the path of a JSONL file with {"id", "turns"} a line, whose stem then
            names the suite.
        limit: at most this many prompts, each with all its turns; None for all.

    Raises:
        UserError: an unknown name, a missing or malformed file (naming the line), no prompts in it, or the `datasets`
            library or the network missing for a benchmark's name.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 prompt a suite, got {limit}")
    name = str(name_or_path)
    if name in BENCHMARKS:
        return _load_benchmark(name, limit)
    path = Path(name)
    if not path.exists() and path.suffix == "" and path.name == name:
        raise UserError(
            f"unknown suite {name!r}: give the path of a JSONL file of prompts, or one of {', '.join(BENCHMARKS)}"
        )
    return _load_file(path, limit)


def load_suites(names_or_paths: Sequence[str], limit: int | None = None) -> list[Prompt]:
    """The prompts of several suites, one suite after the other.

    Raises:
        UserError: as `load_suite`, or two suites have the same name.
    """
    prompts: list[Prompt] = []
    for name_or_path in names_or_paths:
        found = load_suite(name_or_path, limit)
        if any(p.suite == found[0].suite for p in prompts):
            raise UserError(f"two suites are called {found[0].suite}: rename one of the files")
        prompts += found
    return prompts


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


def _load_benchmark(name: str, limit: int | None) -> list[Prompt]:
    turns = islice(benchmark_turns(name), limit)
    prompts = [Prompt(name, f"{name}/{index}", tuple(texts)) for index, texts in enumerate(turns)]
    if not prompts:
        raise UserError(f"the data set of suite {name} holds no prompts; give the path of a JSONL file instead")
    return prompts
