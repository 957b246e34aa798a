"""Answers on disk to sequences of tokens, split into training and held-out parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from domino_spec.draft.vocabulary import count_tokens, fill_up, rank_tokens
from domino_spec.files import read_jsonl
from domino_spec.settings import UserError


@dataclass(frozen=True)
class Sequence:
    """A conversation as token ids: prompts, and the target's answers, which alone are learned."""

    id: str
    tokens: Tensor
    """[T] int64."""
    answers: tuple[tuple[int, int], ...]
    """Half-open ranges of the answers' tokens, ascending; the first starts after at least one token of prompt."""

    @property
    def digest(self) -> str:
        """Identifies the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that are learned."""
        return sum(end - start for start, end in self.answers)

    @property
    def anchors(self) -> Tensor:
        """Every position that can be an anchor, ascending: known, and followed by a token of an answer."""
        return torch.cat([torch.arange(start - 1, end - 1) for start, end in self.answers])


@dataclass(frozen=True)
class Batch:
    """Sequences packed one after the other, without padding."""

    tokens: Tensor
    """[T] int64."""
    starts: Tensor
    """[S + 1], first row of every sequence, then T."""
    is_answer: Tensor
    """[T] bool, True for tokens of answers."""
    features: Tensor
    """[T, layers * H]."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def pack_batch(sequences: SequenceType[Sequence], features: SequenceType[Tensor]) -> Batch:
    """Pack sequences and their features [T, layers * H], one after the other."""
    is_answer = [torch.zeros(len(s.tokens), dtype=torch.bool) for s in sequences]
    for mask, sequence in zip(is_answer, sequences, strict=True):
        for start, end in sequence.answers:
            mask[start:end] = True
    lengths = torch.tensor([0, *(len(s.tokens) for s in sequences)])
    tokens = torch.cat([s.tokens for s in sequences])
    return Batch(tokens, lengths.cumsum(0), torch.cat(is_answer), torch.cat(list(features)))


class Turn(NamedTuple):
    """One answer and what came before it."""

    id: str
    """The conversation's id, followed by `#` and the answer's number if there are several."""
    prompt_ids: list[int]
    answer_ids: list[int]


def conversation_id(id_: str) -> str:
    """The id that the turns of a conversation share."""
    base, mark, number = id_.rpartition("#")
    return base if mark and number.isdecimal() else id_


def join_turns(turns: Iterable[Turn], max_length: int) -> list[Sequence]:
    """Sequences of a conversation's turns: one, as long as each prompt continues the prompt and answer before it.

    Args:
        turns: of one conversation, in order.
        max_length: tokens; longer sequences are cut at the end.

    Returns:
        Sequences named after the last turn in them. Answers of fewer than two tokens within `max_length` are left out.
    """
    texts: list[tuple[str, list[int], list[tuple[int, int]]]] = []
    for id_, prompt, answer in turns:
        answers = []
        if texts and texts[-1][1] == prompt[: len(texts[-1][1])]:
            answers = texts.pop()[2]
        texts.append((id_, prompt + answer, [*answers, (len(prompt), len(prompt) + len(answer))]))
    sequences = []
    for id_, tokens, spans in texts:
        cut = [(start, min(end, max_length)) for start, end in spans]
        kept = tuple((start, end) for start, end in cut if start >= 1 and end >= start + 2)
        if kept:
            sequences.append(Sequence(id_, torch.tensor(tokens[: kept[-1][1]]), kept))
    return sequences


def load_sequences(
    path: str | Path,
    max_length: int,
    vocab_size: int,
    thinking: bool | None = False,
    limit: int | None = None,
) -> list[Sequence]:
    """Sequences of a JSONL of answers, cut to `max_length`; those with less than two answer tokens are left out.

    Answers to consecutive turns of one conversation share a sequence if the later prompt holds the earlier answer
    as it was given.

    Args:
        path: {"id", "prompt_ids", "response_ids"} and perhaps "thinking" a line.
        max_length: tokens.
        vocab_size: of the target.
        thinking: what the recipe says; rows that were answered otherwise are refused.
        limit: conversations to use, the first ones; None for all.

    Raises:
        UserError: an unreadable file, a malformed line (numbered), answers given with another thinking mode, or token
            ids outside the vocabulary.
    """
    sequences: list[Sequence] = []
    rows = read_jsonl(path, {"id": str, "prompt_ids": list, "response_ids": list})
    for row in rows:
        ids = row["prompt_ids"] + row["response_ids"]
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise UserError(f"{path}: {row['id']} holds token ids outside the target's vocabulary of {vocab_size}")
        if row.get("thinking", thinking) != thinking:
            raise UserError(
                f"{path}: {row['id']} was answered with thinking {json.dumps(row['thinking'])}, but data.thinking is "
                f"{json.dumps(thinking)}: set it to what the draft will meet, and regenerate where that differs"
            )
    for _, turns in islice(groupby(rows, key=lambda row: conversation_id(row["id"])), limit):
        sequences += join_turns((Turn(r["id"], r["prompt_ids"], r["response_ids"]) for r in turns), max_length)
    if not sequences:
        raise UserError(f"{path} holds no answer that can be trained on")
    return sequences


def split_held_out(sequences: list[Sequence], count: int) -> tuple[list[Sequence], list[Sequence]]:
    """Training part and `count` held-out sequences, chosen by a hash of their ids so that the choice is stable.

    Sequences of one conversation stay together, since a later one may hold an earlier one's answer; so a few more than
    `count` may be held out.

    Raises:
        UserError: there are not more than `count` sequences.
    """
    if len(sequences) <= count:
        raise UserError(f"held_out is {count}, but there are only {len(sequences)} sequences")
    ordered = sorted(sequences, key=lambda s: hashlib.sha256(conversation_id(s.id).encode()).hexdigest())
    held_out = {conversation_id(s.id) for s in ordered[:count]}
    training = [s for s in sequences if conversation_id(s.id) not in held_out]
    if not training:
        raise UserError(f"held_out is {count}, and no conversation is left to train on")
    return training, [s for s in sequences if conversation_id(s.id) in held_out]


def frequent_tokens(sequences: Iterable[Sequence], size: int, always: Iterable[int]) -> Tensor:
    """The draft vocabulary: the `size` most frequent answer tokens, ascending ids (FR-Spec's idea).

    Args:
        sequences: answers to count, prompts not included.
        size: how many tokens.
        always: tokens that must be in, such as stop tokens.

    Returns:
        [size] int64; when fewer distinct tokens occur, the lowest unused ids fill up.

    Raises:
        UserError: more tokens must be in than `size`.
    """
    return torch.tensor(fill_up(rank_tokens(count_tokens(answer_texts(sequences)), always, size), size))


def answer_texts(sequences: Iterable[Sequence]) -> Iterator[Tensor]:
    """The tokens of every answer, prompts not included."""
    for sequence in sequences:
        for start, end in sequence.answers:
            yield sequence.tokens[start:end]
