"""Counts of the answers that a draft is trained on: `domino-spec vocabulary` (FR-Spec) and `domino-spec ngrams` (DART).

A vocabulary ranks tokens by frequency. An n-gram model prunes DART's trees: each answer is one text without its prompt,
since the model is asked what follows drafted tokens, which belong to answers. An answer that the target ended includes
its stop token. An answer cut at a limit gets none, though the released code ends every text: nobody knows where the
target would have stopped.

The held-out answers of the recipe are not counted, since the draft is measured on them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from domino_spec.draft.vocabulary import FrequentTokens, count_for, tokenizer_fingerprint
from domino_spec.drafters.ngram_counts import ORDER, NgramModel
from domino_spec.recipe import Recipe
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from domino_spec.training.data import answer_texts, split_held_out
from domino_spec.training.datasets import load_training_data


def write_vocabulary(recipe: Recipe, out: Path, size: int | None = None, device: str = "auto") -> FrequentTokens:
    """Rank the tokens of a recipe's training answers and write the ranking.

    Args:
        recipe: whose data and target are used.
        out: the JSON file.
        size: how many tokens to keep; None for all that occur.
        device: where the target is loaded, for its vocabulary and its fingerprint.

    Raises:
        UserError: bad data, too small a size, or a file that cannot be read or written.
    """
    target, answers = _training_answers(recipe, device)
    ranking = count_for(target, answers, f"training answers of {recipe.data.responses}", size)
    ranking.save(out)
    return ranking


def write_ngrams(recipe: Recipe, out: Path, order: int = ORDER, device: str = "auto") -> NgramModel:
    """Count a recipe's training answers and write the model.

    Args:
        recipe: whose data and target are used.
        out: the safetensors file.
        order: tokens of the longest n-grams.
        device: where the target is loaded, for its vocabulary and its fingerprint.

    Raises:
        UserError: bad data, an order out of range, or a file that cannot be read or written.
    """
    target, answers = _training_answers(recipe, device)
    model = NgramModel.build(
        (answer.tolist() for answer in answers),
        order,
        vocab_size=target.vocab_size,
        source=f"training answers of {recipe.data.responses}",
        tokenizer=tokenizer_fingerprint(target.tokenizer),
        target_fingerprint=target.fingerprint,
    )
    model.save(out)
    return model


def _training_answers(recipe: Recipe, device: str) -> tuple[Target, list[Tensor]]:
    target = load_target(recipe.target, device=device, pack=False, check=False)  # it does not run
    training, _ = split_held_out(load_training_data(recipe.data, target), recipe.data.held_out)
    return target, list(answer_texts(training))
