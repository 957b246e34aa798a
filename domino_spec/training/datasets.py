"""The source of conversations: a public data set or a JSONL file, without the prompts of evaluation suites.

First stage of a recipe: prompts for `regenerate`, or conversations that are trained on as they are.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from domino_spec.files import read_jsonl
from domino_spec.public_data import (
    BENCHMARKS,
    COMPLETE_FUNCTION,
    CONVERSATIONS,
    STEP_BY_STEP,
    benchmark_turns,
    public_rows,
)
from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.training.conversations import (
    ChatFormat,
    Conversation,
    Unusable,
    conversation_sequences,
    parse_conversation,
    row_fault,
)
from domino_spec.training.data import Sequence, load_sequences

_log = logging.getLogger(__name__)

SMALL_BENCHMARKS = ("gsm8k", "math500", "aime25", "humaneval", "mbpp", "mt-bench")
"""Excluded from public conversations by default: all benchmarks but those that are gigabytes or training data."""
IN_EVALUATION = "in an evaluation suite"
DUPLICATE = "duplicate prompt"


@dataclass
class Reading:
    """How much of a data set was used, and what was left out and why."""

    used: int = 0
    """Conversations that were used."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason to number of conversations."""

    @property
    def sentence(self) -> str:
        """The same in words."""
        reasons = [f"{count} {reason}" for reason, count in self.left_out.most_common()]
        return f"{self.used} conversations are used" + (f", left out: {', '.join(reasons)}" if reasons else "")


def read_conversations(source: str | Path, limit: int | None, reading: Reading) -> Iterator[Conversation]:
    """The first conversations of a data set, in its own order.

    Args:
        source: one of `CONVERSATIONS`, or the path of a JSONL file with "turns", "messages" or "conversations" a line.
        limit: at most so many; None for all. Those that cannot be used do not count.
        reading: counts what cannot be used.

    Raises:
        UserError: an unknown name, a missing or malformed file (naming the line), the `datasets` library or the
            network missing for a name.
    """
    return islice(_conversations(source, reading), limit)


def _conversations(source: str | Path, reading: Reading) -> Iterator[Conversation]:
    name = str(source)
    for index, row in enumerate(_rows(name)):
        try:
            if row_fault(row) is not None:  # a row of a public data set; `_rows` has checked those of a file
                raise Unusable("without text in a chat format")
            yield parse_conversation(row, f"{Path(name).stem}/{index}")
        except Unusable as reason:
            reading.left_out[str(reason)] += 1


def _rows(name: str) -> Iterable[Any]:
    if name in CONVERSATIONS:
        instead = f"give the path of a JSONL file of conversations instead of {name}"
        return public_rows(f"data set {name}", CONVERSATIONS[name], instead)
    path = Path(name)
    if not path.exists() and path.suffix == "" and path.name == name:
        raise UserError(
            f"unknown data set {name!r}: give the path of a JSONL file of conversations, "
            f"or one of {', '.join(CONVERSATIONS)}"
        )
    seen: set[str] = set()

    def fault(row: dict[str, Any]) -> str | None:
        id_ = row.get("id")
        if not isinstance(id_, str) and (id_ is not None or "turns" in row):
            return "key 'id' must be str"
        if wrong := row_fault(row):
            return wrong
        if id_ is not None and id_ in seen:
            return f"id {id_!r} was used before"
        if id_ is not None:
            seen.add(id_)
        return None

    return read_jsonl(path, {}, fault=fault)


def prompt_key(text: str) -> str:
    """Equal for prompts that differ only in case, in spacing, or in a benchmark's wording around the question."""
    text = text.strip()
    before, after = COMPLETE_FUNCTION
    if text.endswith(STEP_BY_STEP.strip()):
        text = text.removesuffix(STEP_BY_STEP.strip())
    elif text.startswith(before) and text.endswith(after):
        text = text[len(before) : -len(after)]
    return " ".join(text.split()).casefold()


def evaluation_prompts(suites: Iterable[str]) -> frozenset[str]:
    """`prompt_key` of what the user says first in every conversation of some suites.

    Args:
        suites: names in `BENCHMARKS`, or JSONL files.

    Raises:
        UserError: as `read_conversations`.
    """
    keys: set[str] = set()
    for suite in suites:
        if suite in BENCHMARKS:
            keys.update(prompt_key(turns[0]) for turns in benchmark_turns(suite))
        elif Path(suite).suffix == "" and not Path(suite).exists():
            known = ", ".join(BENCHMARKS)
            raise UserError(f"data.exclude: unknown suite {suite!r}: give the path of a JSONL file, or one of {known}")
        else:
            keys.update(prompt_key(c.user_turns[0]) for c in read_conversations(suite, None, Reading()))
    return frozenset(keys)


def not_evaluated(source: str | Path, recipe: DataRecipe, reading: Reading) -> Iterator[Conversation]:
    """The first `limit` conversations of a data set, without those that open as one of an excluded suite does.

    Raises:
        UserError: as `read_conversations`.
    """
    suites = recipe.exclude
    if suites is None:
        suites = SMALL_BENCHMARKS if str(source) in CONVERSATIONS else ()
    excluded = evaluation_prompts(suites)
    for conversation in read_conversations(source, recipe.limit, reading):
        if prompt_key(conversation.user_turns[0]) in excluded:
            reading.left_out[IN_EVALUATION] += 1
        else:
            reading.used += 1
            yield conversation


def load_prompts(source: str | Path, recipe: DataRecipe) -> tuple[list[Conversation], Reading]:
    """Conversations to answer: every user turn of those that are not excluded, and each only once.

    Raises:
        UserError: as `read_conversations`, or nothing is left.
    """
    reading, seen, prompts = Reading(), set(), []
    for conversation in not_evaluated(source, recipe, reading):
        asked = (*(m["content"] for m in conversation.system), *conversation.user_turns)
        key = tuple(" ".join(text.split()).casefold() for text in asked)
        if key in seen:
            reading.used -= 1
            reading.left_out[DUPLICATE] += 1
            continue
        seen.add(key)
        prompts.append(conversation)
    _check_any(prompts, source, reading)
    return prompts, reading


def load_training_data(recipe: DataRecipe, target: Target) -> list[Sequence]:
    """The sequences that `data.responses` holds: answers of `regenerate`, or conversations in a chat format.

    Raises:
        UserError: they cannot be read, or nothing of them can be trained on.
    """
    source = recipe.responses
    if source not in CONVERSATIONS and _holds_token_ids(source):
        return load_sequences(source, recipe.max_length, target.vocab_size, recipe.thinking, recipe.limit)
    if target.tokenizer is None:
        raise UserError("conversations need a tokenizer, and this target has none: give answers as token ids")
    chat = ChatFormat(target.tokenizer, target.stop_token_ids, recipe.thinking)
    reading, sequences = Reading(), []
    for conversation in not_evaluated(source, recipe, reading):
        try:
            found = conversation_sequences(chat, conversation, recipe.max_length)
            if not found:
                raise Unusable("without an answer that fits data.max_length")
            sequences += found
        except Unusable as reason:
            reading.used -= 1
            reading.left_out[str(reason)] += 1
    _check_any(sequences, source, reading)
    if reading.left_out:
        _log.warning("%s: %s", source, reading.sentence)
    return sequences


def _check_any(found: list[Any], source: str | Path, reading: Reading) -> None:
    if not found:
        raise UserError(f"{source} holds no conversation that can be used ({reading.sentence})")


def _holds_token_ids(source: str) -> bool:
    """Whether a file's first row is an answer in token ids; True if it cannot be read: `load_sequences` reports why."""
    path = Path(source)
    if not path.exists():
        return path.suffix != "" or path.name != source
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError):
        return True
    return not (isinstance(row, dict) and {"messages", "conversations", "turns"} & row.keys())
