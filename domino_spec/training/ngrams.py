"""`domino-spec ngrams`: the N-gram model that prunes DART's trees, counted in the answers that a draft is trained on.

Every answer is one text, without its prompt: the model is asked what follows drafted tokens, which answers hold. An
answer that the target ended itself holds its stop token, which is counted like any other. One that was cut at a limit
gets none, though the released code ends every text: where the target would have stopped is not known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from domino_spec.draft.vocabulary import tokenizer_fingerprint
from domino_spec.drafters.ngram_counts import ORDER, NgramModel
from domino_spec.recipe import Recipe
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence, answer_texts, load_sequences, split_held_out
from domino_spec.training.datasets import load_training_data


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
