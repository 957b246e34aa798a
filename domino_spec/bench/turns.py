"""Prompts as the models see them: one request for every turn of every conversation.

A later turn's prompt holds the answers before it. So that every method gets the same prompt, those answers are the
target's own greedy ones, made once by plain decoding (method `none`) and kept in earlier_answers.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from domino_spec.api import generate, prompt_ids
from domino_spec.bench.rows import append_line, cut_partial_line, turn_suffix
from domino_spec.bench.suites import Prompt
from domino_spec.files import read_jsonl
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.target.text import Message

ANSWERS_FILE = "earlier_answers.jsonl"


@dataclass(frozen=True)
class Request:
    """A prompt as the models see it."""

    suite: str
    id: str
    """The conversation's, with `#` and the turn's number behind it from the second turn on."""
    token_ids: list[int]
    turn: int = 1


def check_prompts(target: Target, prompts: Sequence[Prompt], max_new_tokens: int, enable_thinking: bool) -> None:
    """Refuse what could only fail after hours of measuring.

    Raises:
        UserError: a first turn leaves no room for the answer, turns of several conversations would have the same id,
            or there are several turns and no chat template to put them into.
    """
    check_ids(prompts)
    for prompt in prompts:
        if len(prompt.turns) > 1 and (target.tokenizer is None or target.tokenizer.chat_template is None):
            raise UserError(
                f"prompt {prompt.id} of suite {prompt.suite} has {len(prompt.turns)} turns, and the tokenizer of "
                f"{target.name} has no chat template for them: give suites of single turns"
            )
        _encode(target, prompt, 1, [], max_new_tokens, enable_thinking)


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of which two turns would have the same id.

    Raises:
        UserError: naming the id.
    """
    seen: set[tuple[str, str]] = set()
    for prompt in prompts:
        for turn in range(1, len(prompt.turns) + 1):
            id_ = prompt.id + turn_suffix(turn)
            if (prompt.suite, id_) in seen:
                raise UserError(
                    f"suite {prompt.suite} has two prompts called {id_}, as a turn is called after its conversation "
                    "with # and its number: rename one"
                )
            seen.add((prompt.suite, id_))


def make_requests(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    out: Path,
    enable_thinking: bool,
    say: Callable[[str], None],
) -> list[Request]:
    """Every turn of every prompt in the target's chat template, a conversation's turns in order.

    Suites take turns, so that an interrupted bench has measured something of every one. Answers that earlier_answers
    .jsonl does not hold yet are made and appended, one by one.

    Args:
        target: the model served.
        prompts: that passed `check_prompts`.
        max_new_tokens: of every answer.
        out: the bench directory, prepared by `rows.start_or_resume`.
        enable_thinking: see `api.prompt_ids`.
        say: called with a line of progress after every answer that is made.

    Raises:
        UserError: a later turn leaves no room for its answer, or earlier_answers.jsonl is malformed.
    """
    cut_partial_line(out / ANSWERS_FILE)
    known = read_answers(out / ANSWERS_FILE)
    missing = sum(
        (prompt.suite, prompt.id, turn) not in known for prompt in prompts for turn in range(1, len(prompt.turns))
    )
    made, requests = 0, []
    for prompt in in_turns(prompts):
        messages: list[Message] = []
        for turn in range(1, len(prompt.turns) + 1):
            request = _encode(target, prompt, turn, messages, max_new_tokens, enable_thinking)
            requests.append(request)
            if turn == len(prompt.turns):
                break
            key = (prompt.suite, prompt.id, turn)
            if key not in known:
                known[key] = _answer(target, request, max_new_tokens, out / ANSWERS_FILE, key)
                made += 1
                say(f"[{made}/{missing}] {request.id}: answered, for the turn after it")
            messages += [
                {"role": "user", "content": prompt.turns[turn - 1]},
                {"role": "assistant", "content": known[key]},
            ]
    return requests


def _encode(
    target: Target,
    prompt: Prompt,
    turn: int,
    messages: Sequence[Message],
    max_new_tokens: int,
    enable_thinking: bool,
) -> Request:
    text = prompt.turns[turn - 1]
    id_ = prompt.id + turn_suffix(turn)
    asked = [*messages, {"role": "user", "content": text}] if messages else text
    ids = prompt_ids(target, asked, enable_thinking=enable_thinking)
    if len(ids) + max_new_tokens > target.max_length:
        raise UserError(
            f"prompt {id_} of suite {prompt.suite} has {len(ids)} tokens: with max_new_tokens "
            f"{max_new_tokens} it exceeds the context of {target.max_length} tokens of {target.name}"
        )
    return Request(prompt.suite, id_, ids, turn)


def _answer(target: Target, request: Request, max_new_tokens: int, path: Path, key: tuple[str, str, int]) -> str:
    (answer,) = generate(target, None, [request.token_ids], method="none", max_new_tokens=max_new_tokens)
    names = dict(zip(("suite", "id", "turn"), key, strict=True))
    append_line(path, names | {"text": answer.text, "token_ids": answer.token_ids})
    return answer.text


def read_answers(path: Path) -> dict[tuple[str, str, int], str]:
    """What earlier_answers.jsonl holds: texts by suite, conversation and turn; nothing where it is missing.

    Raises:
        UserError: naming the line that is malformed.
    """
    if not path.exists():
        return {}
    lines = read_jsonl(path, {"suite": str, "id": str, "turn": int, "text": str}, skip_partial_end=True)
    return {(line["suite"], line["id"], line["turn"]): line["text"] for line in lines}


def in_turns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of every suite, then the second of every suite, and so on."""
    place: Counter[str] = Counter()
    keyed = []
    for prompt in prompts:
        keyed.append((place[prompt.suite], prompt))
        place[prompt.suite] += 1
    return [prompt for _, prompt in sorted(keyed, key=lambda entry: entry[0])]
