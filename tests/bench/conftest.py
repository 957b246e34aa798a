"""A tiny target and draft on disk, suites of prompts, and one finished bench that several tests look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from domino_spec.bench.run import run_bench
from domino_spec.draft.checkpoint import save_draft
from domino_spec.target.load import load_target
from tests import tiny

METHODS = ["none", "domino", "dflash", "ngram", "domino-tree", "domino-argmax", "domino-matching", "transformers"]
MAX_NEW_TOKENS = 7
PROMPTS = {"sums": ["w3 w4 w5 w3", "w9 w9 w8"], "words": ["w20 w21"]}
TURNS = {"sums": ["w1"], "words": []}
"""What the user says after the answer to each prompt of a suite."""


@dataclass(frozen=True)
class Disk:
    """Names that a user would give on the command line."""

    target: str
    draft: str
    suites: list[str]

    def options(self, out: Path, **changes: Any) -> dict[str, Any]:
        """Options of a small bench."""
        return {
            "target": self.target,
            "drafts": [self.draft],
            "suites": self.suites,
            "methods": METHODS,
            "out": out,
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperatures": [0.0, 1.0],
            "num_drafts": [2, 4],
            "repeats": 2,
            "candidates": 16,
            "breakdown": False,
            "say": lambda line: None,
        } | changes


@pytest.fixture(scope="session")
def disk(tmp_path_factory) -> Disk:
    root = tmp_path_factory.mktemp("bench")
    model = tiny.tiny_model(eos_token_id=tiny.EOS, num_hidden_layers=2)
    model.save_pretrained(root / "target")
    tiny.word_tokenizer().save_pretrained(root / "target")
    target = load_target(root / "target", pack=False)
    save_draft(tiny.tiny_draft(target, taps=(0, 1)), root / "draft")
    suites = []
    for name, prompts in PROMPTS.items():
        path = root / f"{name}.jsonl"
        lines = [json.dumps({"id": f"{name}/{i}", "turns": [p, *TURNS[name]]}) for i, p in enumerate(prompts)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        suites.append(str(path))
    return Disk(str(root / "target"), str(root / "draft"), suites)


@pytest.fixture(scope="session")
def finished(disk: Disk, tmp_path_factory) -> Path:
    """The directory of a whole bench, its breakdown included."""
    out = tmp_path_factory.mktemp("finished") / "bench"
    run_bench(**disk.options(out, breakdown=True))
    return out


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says of decoding, without what it says of the machine meanwhile."""
    of_the_machine = ("seconds_prefill", "seconds_decode", "load_average", "steal_seconds")
    return {key: value for key, value in row.items() if key not in of_the_machine}


def read_raw(out: Path) -> list[dict[str, Any]]:
    """The lines of raw.jsonl, parsed by nothing but json."""
    return [json.loads(line) for line in (out / "raw.jsonl").read_text(encoding="utf-8").splitlines()]
