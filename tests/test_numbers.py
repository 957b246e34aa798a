"""Every option that holds a number, with numbers nobody can mean: one line and status 2, or it works."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from domino_spec.cli import cli
from tests.cli_fixtures import (  # noqa: F401
    make_draft_dir,
    make_target_dir,
    run,
    write_jsonl,
    write_prompts,
    write_recipe,
)

LISTS = ("--temperatures", "--num-drafts", "--rows", "--concurrency")
"""Options of several numbers with commas between them, where they are texts to click."""
HUGE = str(2**63)
VALUES = ["nan", "inf", "-inf", "-1", "0", str(2**63 - 1), HUGE, f"-{HUGE}", "1e308", "-1e308", "1e-320"]
NEVER_OFFERED = {"--port"}
"""Would be bound to."""


def numeric_options(command: str) -> list[str]:
    kinds = ("integer", "float", "integer range", "float range")
    options = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
    numbers = [p.opts[0] for p in options if p.type.name in kinds and not p.is_flag]
    return [name for name in numbers if name not in NEVER_OFFERED] + [
        p.opts[0] for p in options if p.opts[0] in LISTS and p.type.name == "text"
    ]


SLOW = ("bench", "profile")
CASES = [
    pytest.param(command, option, marks=pytest.mark.slow if command in SLOW else ())
    for command in cli.commands
    for option in numeric_options(command)
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory, target_dir, draft_dir) -> dict[str, tuple]:
    """Every command with what it needs, nearly nothing to do."""
    made = tmp_path_factory.mktemp("numbers")
    prompts = write_prompts(made / "prompts.jsonl", 2)
    rows = [{"id": f"a{i}", "prompt_ids": [1, 3], "response_ids": list(range(3, 30))} for i in range(4)]
    answers = write_jsonl(made / "answers.jsonl", rows)
    recipe = write_recipe(made / "recipe.yaml", target_dir, prompts=str(prompts), responses=str(answers))
    pair = ("--target", target_dir, "--draft", draft_dir)
    ranked = ("--ranking", made / "ranking.json")
    assert run("vocabulary", recipe, "--out", made / "ranking.json").exit_code == 0
    return {
        "generate": ("generate", "w3 w4", *pair, "--method", "domino", "--temperature", 0.7, *ranked),
        "demo": ("demo", *pair, "--prompt", "w3"),
        "bench": ("bench", "--suite", prompts, *pair, "--methods", "none,domino", "--limit", 1),
        "serve": ("serve", *pair, "--slots", 1, "--capacity", 40, "--port", 0),
        "profile": ("profile", *pair, "--context", 20),
        "vocabulary": ("vocabulary", recipe),
        "ngrams": ("ngrams", recipe),
        "regenerate": ("regenerate", recipe),
        "train": ("train", recipe, "--dry-run"),
    }


SMALL = {
    "generate": {"--max-new-tokens": 3},
    "demo": {"--max-new-tokens": 3},
    "bench": {"--max-new-tokens": 2},
    "profile": {"--repeats": 1},
}
"""What keeps a command short, unless it is the option that is tried."""


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """`serve` gets ready, and ends."""
    pytest.importorskip("uvicorn")

    class NoServer:
        def __init__(self, service, **options):
            pass

        def serve_forever(self, bound):
            bound.close()

    monkeypatch.setattr("domino_spec.serve.server.Server", NoServer)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), CASES)
def test_a_number_that_nobody_can_mean_is_one_line_or_works(tmp_path: Path, commands, command, option):
    for place, value in enumerate(VALUES):
        more = [part for name, small in SMALL.get(command, {}).items() if name != option for part in (name, small)]
        if command in ("bench", "profile", "vocabulary", "ngrams", "regenerate"):
            more += ["--out", tmp_path / str(place)]
        if option in ("--concurrency", "--request-timeout"):
            more += ["--server", "http://127.0.0.1:9/v1"]
        result = run(*commands[command], *more, f"{option}={value}")
        errors = [line for line in result.stderr.splitlines() if line.startswith("domino-spec: error: ")]
        assert result.exit_code == (2 if errors else 0), (value, result.stderr)
        assert len(errors) <= 1 and (not errors or result.stderr.splitlines()[-1] == errors[0])
        if value in ("nan", "inf", "-inf", "1e308", "-1e308"):
            assert errors, f"{option} takes {value}"
