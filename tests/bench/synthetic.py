"""Bench directories with rows that were never measured: as many contenders as a test wants, in no time."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from domino_spec.bench.rows import Row

ALL = (
    *(("none", 0), ("transformers", 0), ("transformers-lookup", 8), ("ngram", 8), ("dflash", 15), ("dflash-tree", 16)),
    *(("domino", 7), ("domino", 16), ("domino-tree", 16), ("domino-tree+ngram", 16)),
    *(("eagle3", 15), ("eagle3", 60), ("eagle3-frspec", 60), ("dart", 60)),
)
"""A dozen contenders and their baselines."""


def make_row(suite: str, prompt: int, method: str, budget: int, temperature: float = 0.0, repeat: int = 0) -> Row:
    """A plausible run, the same for the same arguments."""
    dice = random.Random(f"{suite} {prompt} {method} {budget} {temperature} {repeat}")
    longest = min(budget, 8)
    chance = 0.35 + 0.4 * random.Random(method).random()
    lengths: list[int] = []
    while sum(lengths) < 64:
        accepted = next((k for k in range(longest) if dice.random() > chance), longest)
        lengths.append(accepted + 1)
    step = 0.02 * (1 + 0.02 * budget) * dice.uniform(0.95, 1.05)
    tokens = random.Random(f"{suite} {prompt} {temperature and (method, repeat)}").sample(range(1000), 64)
    return Row(
        suite=suite,
        id=f"{suite}/{prompt}",
        method=method,
        budget=budget,
        temperature=temperature,
        seed=repeat,
        repeat=repeat,
        batch=1,
        threads=2,
        prompt_tokens=20 + prompt,
        token_ids=tuple(tokens),
        num_verify_passes=len(lengths),
        num_drafts=(budget,) * len(lengths),
        acceptance_lengths=tuple(lengths),
        seconds_prefill=0.05,
        seconds_decode=step * len(lengths),
    )


def make_rows(
    suites: Mapping[str, int],
    contenders: Sequence[tuple[str, int]] = ALL,
    temperatures: Sequence[float] = (0.0,),
    repeats: int = 1,
) -> list[Row]:
    """Rows of every prompt with every contender; `suites` says how many prompts each has."""
    return [
        make_row(suite, prompt, method, budget, temperature, repeat)
        for repeat in range(repeats)
        for suite, count in suites.items()
        for prompt in range(count)
        for temperature in temperatures
        for method, budget in contenders
    ]


def write_bench(out: Path, rows: Sequence[Row], template: Path, **configuration: Any) -> Path:
    """A finished bench directory that holds these rows.

    Args:
        out: the directory.
        rows: its measurements.
        template: a directory that was really measured, for its settings.
        configuration: what to change in those.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((template / "settings.json").read_text(encoding="utf-8"))
    suites = {name: len({row.id for row in rows if row.suite == name}) for name in {row.suite: 0 for row in rows}}
    settings["configuration"] |= {"suites": suites, "planned_runs": len(rows)} | configuration
    (out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (out / "raw.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return out
