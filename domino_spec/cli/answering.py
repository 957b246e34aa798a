"""What `regenerate` does and says: the engine of this package or a server answers a recipe's prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from domino_spec.cli.options import Machine
from domino_spec.cli.progress import RegenerateView
from domino_spec.cli.shell import console, status
from domino_spec.public_data import CONVERSATIONS
from domino_spec.recipe import Recipe, check_url
from domino_spec.settings import UserError

if TYPE_CHECKING:
    from domino_spec.training.answers import RegenerateResult


def answer_recipe(
    recipe: Recipe, out: Path, draft: str | None, server: str | None, machine: Machine, shown: bool
) -> RegenerateResult:
    """Let the recipe's target answer its prompts.

    Args:
        recipe: what to answer, and how.
        out: the answers file.
        draft: makes this package's engine faster.
        server: URL, instead of the recipe's `data.server`.
        machine: where this package's engine computes.
        shown: whether progress is shown.

    Raises:
        UserError: there are no prompts, something cannot be read, written, loaded or reached.
    """
    data = recipe.data if server is None else dataclasses.replace(recipe.data, server=check_url(server))
    if data.prompts is None:
        raise UserError("data.prompts is missing in the recipe: name conversations to answer")
    if str(out) in CONVERSATIONS:
        raise UserError(f"data.responses is the public data set {out}: give --out for the answers")
    from domino_spec.training.answers import only_run

    with only_run(out):
        pass  # refused before a target is loaded; `regenerate` takes the lock itself
    if data.server is None:
        from domino_spec.training.answers import regenerate

        target, loaded_draft = machine.load(recipe.target, draft)
        with RegenerateView(console(), shown) as view:
            return regenerate(target, loaded_draft, data.prompts, out, data, view.update)
    if draft is not None:
        raise UserError("--draft is for the engine of this package; a server drafts as it was started to")
    from domino_spec.target.load import load_target_text
    from domino_spec.training.servers import Server, regenerate_with_server

    with status(f"Loading the tokenizer of {recipe.target}"):
        text = load_target_text(recipe.target)
        engine = Server(data.server, data.server_model)
    with RegenerateView(console(), shown) as view:
        return regenerate_with_server(engine, text, data.prompts, out, data, view.update)


def result_lines(out: Path, result: RegenerateResult) -> list[str]:
    """What was answered, and what was left out and why."""
    lines = [f"{out}: {result.answered} conversations answered now, {result.already_answered} before"]
    if result.left_out:
        lines.append(f"left out: {result.left_out}")
    if result.truncated:
        lines.append(f"{result.truncated} answers were cut at data.max_new_tokens")
    return lines
