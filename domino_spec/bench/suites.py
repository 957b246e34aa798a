"""Suites of prompts, a JSONL file or a public benchmark by its name, and their turns as the models see them.

There is one request for every turn of every conversation. A later turn's prompt holds the answers before it. So that
every method gets the same prompt, those answers are the target's own greedy ones, made once by plain decoding (method
`none`) and kept in earlier_answers.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from domino_spec.api import generate, prompt_ids
from domino_spec.bench.rows import append_line, cut_partial_line, turn_suffix
from domino_spec.files import read_jsonl
from domino_spec.public_data import BENCHMARKS, benchmark_turns
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.target.text import Message


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


def suites_settings(prompts: Sequence[Prompt], limit: int | None) -> dict[str, Any]:
    """What settings.json says of the prompts; their digest shows a change of a suite file."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.suite, prompt.id, prompt.turns]).encode())
    names = list(dict.fromkeys(prompt.suite for prompt in prompts))
    return {
        "suites": {name: sum(p.suite == name for p in prompts) for name in names},
        "turns": {name: sum(len(p.turns) for p in prompts if p.suite == name) for name in names},
        "prompts_digest": digest.hexdigest()[:16],
        "limit": limit,
    }


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


# Turns.


ANSWERS_FILE = "earlier_answers.jsonl"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the models see it."""

    suite: str
    id: str
    """The conversation's, followed by `#` and the turn's number from the second turn on."""
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
) -> list[EncodedPrompt]:
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
) -> EncodedPrompt:
    text = prompt.turns[turn - 1]
    id_ = prompt.id + turn_suffix(turn)
    asked = [*messages, {"role": "user", "content": text}] if messages else text
    ids = prompt_ids(target, asked, enable_thinking=enable_thinking)
    if len(ids) + max_new_tokens > target.max_length:
        raise UserError(
            f"prompt {id_} of suite {prompt.suite} has {len(ids)} tokens: with max_new_tokens "
            f"{max_new_tokens} it exceeds the context of {target.max_length} tokens of {target.name}"
        )
    return EncodedPrompt(prompt.suite, id_, ids, turn)


def _answer(target: Target, request: EncodedPrompt, max_new_tokens: int, path: Path, key: tuple[str, str, int]) -> str:
    (answer,) = generate(target, None, [request.token_ids], method="none", max_new_tokens=max_new_tokens)
    names = dict(zip(("suite", "id", "turn"), key, strict=True))
    append_line(path, names | {"text": answer.text, "token_ids": answer.token_ids})
    return answer.text


def read_answers(path: Path) -> dict[tuple[str, str, int], str]:
    """What earlier_answers.jsonl holds: texts by suite, conversation and turn; nothing if it is missing.

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
