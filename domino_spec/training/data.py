"""Answers on disk to sequences of tokens, split into training and held-out parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.files import read_jsonl


@dataclass(frozen=True)
class Sequence:
    """A prompt and the target's answer to it, as token ids."""

    id: str
    tokens: Tensor
    """[T] int64, prompt then answer."""
    prompt_length: int

    @property
    def digest(self) -> str:
        """Identifies the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]


def load_sequences(path: str | Path, max_length: int, vocab_size: int) -> list[Sequence]:
    """Sequences of a JSONL of answers, cut to `max_length`; those with less than two answer tokens are left out.

    Raises:
        UserError: an unreadable file, a malformed line (numbered), or token ids outside the vocabulary.
    """
    sequences = []
    for row in read_jsonl(path, {"id": str, "prompt_ids": list, "response_ids": list}):
        ids = (row["prompt_ids"] + row["response_ids"])[:max_length]
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise UserError(f"{path}: {row['id']} holds token ids outside the target's vocabulary of {vocab_size}")
        prompt_length = len(row["prompt_ids"])
        if prompt_length >= 1 and len(ids) >= prompt_length + 2:
            sequences.append(Sequence(row["id"], torch.tensor(ids), prompt_length))
    if not sequences:
        raise UserError(f"{path} holds no answer that can be trained on")
    return sequences


def split_held_out(sequences: list[Sequence], count: int) -> tuple[list[Sequence], list[Sequence]]:
    """Training part and `count` held-out sequences, chosen by a hash of their ids so that the choice is stable.

    Raises:
        UserError: there are not more than `count` sequences.
    """
    if len(sequences) <= count:
        raise UserError(f"held_out is {count}, but there are only {len(sequences)} sequences")
    ordered = sorted(sequences, key=lambda s: hashlib.sha256(s.id.encode()).hexdigest())
    held_out = {s.id for s in ordered[:count]}
    return [s for s in sequences if s.id not in held_out], [s for s in sequences if s.id in held_out]


def frequent_tokens(sequences: Iterable[Sequence], size: int, always: Iterable[int]) -> Tensor:
    """The draft vocabulary: the `size` most frequent answer tokens, ascending ids (FR-Spec's idea).

    Args:
        sequences: answers to count, prompts not included.
        size: how many tokens.
        always: tokens that must be in, such as stop tokens.

    Returns:
        [size] int64; when fewer distinct tokens occur, the lowest unused ids fill up.
    """
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(sequence.tokens[sequence.prompt_length :].tolist())
    chosen = dict.fromkeys(always)
    for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(chosen) >= size:
            break
        chosen.setdefault(token)
    filler = 0
    while len(chosen) < size:
        chosen.setdefault(filler)
        filler += 1
    return torch.tensor(sorted(chosen))
