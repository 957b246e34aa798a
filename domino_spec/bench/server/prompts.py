"""Prompts as servers are asked them: one for every turn of every conversation.

A later turn follows the baseline server's own greedy answers to the turns before it, made once and kept in
earlier_answers.jsonl, so that every server is asked the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from domino_spec.bench.rows import append_line, cut_partial_line, turn_suffix
from domino_spec.bench.server.load import Job, Outcome, Sampling, Turn, run_load
from domino_spec.bench.server.probe import Endpoint
from domino_spec.bench.suites import Prompt
from domino_spec.bench.turns import ANSWERS_FILE, read_answers
from domino_spec.settings import UserError
from domino_spec.target.text import Message


def make_turns(
    baseline: Endpoint,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    out: Path,
    *,
    concurrency: int,
    api_key: str | None,
    say: Callable[[str], None],
) -> list[Turn]:
    """Every turn of every prompt, a conversation's turns in order.

    Args:
        baseline: the server that answers earlier turns.
        prompts: that passed `turns.check_ids`.
        sampling: of those answers; they are greedy.
        out: the bench directory, prepared by `rows.take_directory`.
        concurrency: answers that are made at a time.
        api_key: that the server may ask for.
        say: called with a line of progress after every answer that is made.

    Raises:
        UserError: an answer cannot be had, or earlier_answers.jsonl is malformed.
    """
    path = out / ANSWERS_FILE
    cut_partial_line(path)
    known = read_answers(path)
    for number in range(1, max(len(prompt.turns) for prompt in prompts)):  # all first answers, then all second ones
        missing = [
            Job(_turn(prompt, number, known), 0, 0)
            for prompt in prompts
            if number < len(prompt.turns) and (prompt.suite, prompt.id, number) not in known
        ]
        if missing:

            def keep(outcome: Outcome, number: int = number) -> None:
                turn = outcome.job.turn
                if outcome.fault is not None:
                    raise UserError(
                        f"server {baseline.name} has no answer to {turn.id} of suite {turn.suite}, which the turn "
                        f"after it needs: {outcome.fault}; the same command goes on"
                    )
                key = (turn.suite, turn.id.removesuffix(turn_suffix(number)), number)
                known[key] = outcome.answer.content
                append_line(path, {**dict(zip(("suite", "id", "turn"), key, strict=True)), "text": known[key]})
                say(f"{turn.id}: answered, for the turn after it")

            run_load(baseline, missing, concurrency, sampling, api_key=api_key, done=keep)
    return [_turn(prompt, number, known) for prompt in prompts for number in range(1, len(prompt.turns) + 1)]


def _turn(prompt: Prompt, number: int, known: dict[tuple[str, str, int], str]) -> Turn:
    messages: list[Message] = []
    for earlier in range(1, number):
        messages += [
            {"role": "user", "content": prompt.turns[earlier - 1]},
            {"role": "assistant", "content": known[prompt.suite, prompt.id, earlier]},
        ]
    messages.append({"role": "user", "content": prompt.turns[number - 1]})
    return Turn(prompt.suite, prompt.id + turn_suffix(number), number, tuple(messages))
