"""The target answers prompts: first stage of a recipe, since a draft learns to predict this target's own text.

Here it is decoded by this package; a server can do it too (`servers.py`). Prompts of like length are decoded together,
and a batch's answers are appended to the file as soon as the batch is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from domino_spec.decoding.engine import decode
from domino_spec.decoding.request import Generation, Limits
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import default_method, make_drafter
from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.training.answers import (
    TOO_LONG,
    Dialogue,
    RegenerateProgress,
    RegenerateResult,
    Regeneration,
    only_run,
)


def regenerate(
    target: Target,
    draft: AnyDraft | None,
    prompts: str | Path,
    out: str | Path,
    recipe: DataRecipe,
    on_progress: Callable[[RegenerateProgress], None] = lambda progress: None,
) -> RegenerateResult:
    """Let the target answer every prompt that `out` does not answer yet.

    Args:
        target: who answers.
        draft: makes it faster and changes no answer's distribution; None decodes plainly.
        prompts: conversations, see `datasets.read_conversations`.
        out: JSONL to append to: {"id", "category", "temperature", "prompt_ids", "response_ids"} a line, and "thinking"
            where the chat template knows it. The last turn of several has every earlier turn and answer in its prompt.
        recipe: settings.
        on_progress: called after every decoding cycle.

    Raises:
        UserError: an unreadable or malformed file (with its line number), answers that cannot be written, or that
            another process is writing.
    """
    if target.tokenizer is None:
        raise UserError("prompts need a tokenizer, and this target has none")
    with only_run(out):
        run = Regeneration.start(prompts, out, recipe, target.tokenizer, on_progress)
        run.fit(target.max_length, recipe.max_new_tokens)  # sorted, so that a batch's prefill holds little padding
        for start in range(0, len(run.waiting), recipe.batch_size):
            batch = run.waiting[start : start + recipe.batch_size]
            run.finish(batch, _answer_batch(target, draft, batch, recipe, run.report))
        return run.result()


def _answer_batch(
    target: Target,
    draft: AnyDraft | None,
    batch: Sequence[Dialogue],
    recipe: DataRecipe,
    on_tokens: Callable[[int], None],
) -> int:
    """Answer every turn of some conversations; returns the number of tokens generated."""
    finished_tokens = 0
    settings = SamplingSettings(temperature=recipe.temperature)
    limits = Limits(recipe.max_new_tokens)
    while waiting := [d for d in batch if not d.is_done]:
        ids = [d.prompt_ids for d in waiting]
        # A later turn may outgrow the context by the answers before it; its conversation then ends here.
        room = target.max_length - limits.max_new_tokens
        too_long = [d for d, prompt in zip(waiting, ids, strict=True) if len(prompt) > room]
        for dialogue in too_long:
            dialogue.ended = TOO_LONG
        if too_long:
            continue
        drafter = make_drafter(
            default_method(draft),
            draft,
            requests=len(ids),
            device=target.device,
            candidates=None,
        )
        generations: list[Generation] = []
        seeds = [answer_seed(d.id) for d in waiting]
        for generations in decode(target, drafter, ids, settings=settings, limits=limits, seeds=seeds):
            on_tokens(finished_tokens + sum(g.num_tokens for g in generations))
        finished_tokens += sum(g.num_tokens for g in generations)
        for dialogue, generation in zip(waiting, generations, strict=True):
            truncated = generation.finish_reason == "length"
            dialogue.answer(generation.prompt_ids, generation.token_ids, generation.text, truncated)
    return finished_tokens


def answer_seed(id_: str) -> int:
    """Sampled answers depend on the conversation alone, not on its batch, so not on when a run was interrupted."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:4], "big")
