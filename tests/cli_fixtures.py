"""What the command-line tests share: tiny models saved to disk, and commands run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from domino_spec.cli import cli
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.domino import Draft
from domino_spec.target.load import load_target
from tests import tiny

PROMPT = "w3 w4 w5 w6"


def run(*arguments: object, **options) -> Result:
    """Run a command; anything but an orderly exit is raised here, since a traceback is a bug."""
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False, **options)


def succeed(*arguments: object, **options) -> str:
    """Run a command that must succeed without a word on standard error; returns standard output."""
    result = run(*arguments, **options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def succeed_json(*arguments: object, **options) -> dict:
    """The object that a command prints under --json."""
    return json.loads(succeed(*arguments, "--json", **options))


def fail(*arguments: object, **options) -> str:
    """Run a command that must fail on its user's mistake: exit status 2 and one line, which is returned."""
    result = run(*arguments, **options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("domino-spec: error: ")
    return line


def save_target(directory: Path, **overrides) -> Path:
    """A random Llama with a tokenizer of one word per token and a chat template."""
    tiny.tiny_model(**{"max_position_embeddings": 256, **overrides}).save_pretrained(directory)
    tiny.word_tokenizer().save_pretrained(directory)
    return directory


def new_draft(target_directory: Path, **overrides) -> Draft:
    """A random Domino draft for a target on disk."""
    sizes = {"head_sizes": (16, 16)} | overrides  # widths that the loops in C take
    return tiny.tiny_draft(load_target(target_directory, pack=False), **sizes)


def write_recipe(path: Path, target: Path, **data: object) -> Path:
    """A recipe that trains a few steps in seconds."""
    recipe = {
        "target": str(target),
        "draft": {
            "block_size": 4,
            "num_layers": 1,
            "target_layer_ids": [0, 2],
            "head": {"gru_hidden_dim": 16, "low_rank": 16},  # widths that the loops in C take
        },
        "data": {"held_out": 2, "max_length": 64, "max_new_tokens": 24, "batch_size": 4, **data},
        "training": {
            "steps": 4,
            "batch_size": 2,
            "micro_batch_size": 2,
            "anchors": 4,
            "eval_every": 2,
            "log_every": 1,
            "precision": "float32",
        },
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_prompts(path: Path, count: int) -> Path:
    """Prompts of unequal length."""
    rows = [{"id": f"p{i}", "turns": [" ".join(f"w{(3 * i + k) % 50}" for k in range(2 + i))]} for i in range(count)]
    return write_jsonl(path, rows)


@pytest.fixture(name="target_dir", scope="session")
def make_target_dir(tmp_path_factory) -> Path:
    """A target on disk."""
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(name="draft_dir", scope="session")
def make_draft_dir(tmp_path_factory, target_dir) -> Path:
    """A Domino draft for it on disk."""
    directory = tmp_path_factory.mktemp("draft")
    save_draft(new_draft(target_dir), directory, dtype=torch.bfloat16)
    return directory


@pytest.fixture(name="trained_run", scope="session")
def make_trained_run(tmp_path_factory, target_dir) -> tuple[Path, Path]:
    """A finished training run and its recipe, made by the commands themselves."""
    directory = tmp_path_factory.mktemp("training")
    prompts = write_prompts(directory / "prompts.jsonl", 8)
    answers = directory / "answers.jsonl"
    recipe = write_recipe(directory / "recipe.yaml", target_dir, prompts=str(prompts), responses=str(answers))
    succeed("regenerate", recipe)
    succeed("train", recipe, "--out", directory / "run")
    return directory / "run", recipe
