"""Counts of the answers that a draft is trained on: `domino-spec vocabulary` (FR-Spec) and `domino-spec ngrams` (DART).

A vocabulary ranks tokens by frequency. An n-gram model prunes DART's trees: each answer is one text without its prompt,
since the model is asked what follows drafted tokens, which belong to answers. An answer that the target ended includes
its stop token. An answer cut at a limit gets none, though the released code ends every text: nobody knows where the
target would have stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from domino_spec.draft.vocabulary import FrequentTokens, count_for, tokenizer_fingerprint
from domino_spec.drafters.ngram_counts import ORDER, NgramModel
from domino_spec.files import read_jsonl
from domino_spec.recipe import Recipe
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence, answer_texts, load_sequences, split_held_out
from domino_spec.training.datasets import load_training_data


def rank_answers(paths: Path | str | Iterable[Path | str], target: Target, size: int | None = None) -> FrequentTokens:
    """Rank the tokens of answers on disk; prompts are not counted.

    Args:
        paths: JSONL files as `regenerate` writes them.
        target: whose tokens they are.
        size: how many tokens to keep; None for all that occur.

    Raises:
        UserError: a file that cannot be read, token ids outside the vocabulary, or too small a size.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    return count_for(target, _responses(files, target.vocab_size), ", ".join(map(str, files)), size)


def write_vocabulary(recipe: Recipe, out: Path, size: int | None = None, device: str = "auto") -> FrequentTokens:
    """Rank the tokens of a recipe's training answers, the held-out ones not among them, and write the ranking.

    Args:
        recipe: whose data and target are used.
        out: the JSON file.
        size: how many tokens to keep; None for all that occur.
        device: where the target is loaded, which is asked for its vocabulary and its fingerprint only.

    Raises:
        UserError: bad data, too small a size, or a file that cannot be read or written.
    """
    target = load_target(recipe.target, device=device, pack=False, check=False)  # it is not run
    training, _ = split_held_out(load_training_data(recipe.data, target), recipe.data.held_out)
    ranking = count_for(target, answer_texts(training), f"training answers of {recipe.data.responses}", size)
    ranking.save(out)
    return ranking


def _responses(files: Iterable[Path], vocab_size: int) -> Iterator[list[int]]:
    for path in files:
        for row in read_jsonl(path, {"id": str, "response_ids": list}):
            ids = row["response_ids"]
            if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
                raise UserError(f"{path}: {row['id']} holds token ids outside the target's vocabulary of {vocab_size}")
            yield ids


def build_ngrams(
    paths: Path | str | Iterable[Path | str], target: Target, order: int = ORDER, thinking: bool | None = False
) -> NgramModel:
    """Count answers on disk, all of them: `write_ngrams` leaves those out that a recipe measures itself on.

    Args:
        paths: JSONL files as `regenerate` writes them.
        target: whose tokens they are.
        order: tokens of the longest n-grams.
        thinking: how they were answered.

    Raises:
        UserError: a file that cannot be read, token ids outside the vocabulary, or an order out of range.
    """
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    sequences = [s for path in files for s in load_sequences(path, sys.maxsize, target.vocab_size, thinking)]
    return _count(sequences, target, order, ", ".join(map(str, files)))


def write_ngrams(recipe: Recipe, out: Path, order: int = ORDER, device: str = "auto") -> NgramModel:
    """Count a recipe's training answers, the held-out ones not among them, and write the model.

    Args:
        recipe: whose data and target are used.
        out: the safetensors file.
        order: tokens of the longest n-grams.
        device: where the target is loaded, which is asked for its vocabulary and its fingerprint only.

    Raises:
        UserError: bad data, an order out of range, or a file that cannot be read or written.
    """
    target = load_target(recipe.target, device=device, pack=False, check=False)  # it is not run
    training, _ = split_held_out(load_training_data(recipe.data, target), recipe.data.held_out)
    model = _count(training, target, order, f"training answers of {recipe.data.responses}")
    model.save(out)
    return model


def _count(sequences: Iterable[Sequence], target: Target, order: int, source: str) -> NgramModel:
    return NgramModel.build(
        (answer.tolist() for answer in answer_texts(sequences)),
        order,
        vocab_size=target.vocab_size,
        source=source,
        tokenizer=tokenizer_fingerprint(target.tokenizer),
        target_fingerprint=target.fingerprint,
    )
