"""Is one draft better than another? Simulated tau answer by answer, and paired ratios with intervals.

Blocks of one answer are alike, so whole answers are drawn anew (a cluster bootstrap), and both drafts are compared on
the same draw: what makes an answer easy for both cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from typing import NamedTuple

import torch
from torch import Tensor

from domino_spec.draft.domino import Draft
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence
from domino_spec.training.evaluate import accepted_drafts, block_logits, expected_acceptance, text_probabilities
from domino_spec.training.features import FeatureSource


class Accepted(NamedTuple):
    """Accepted drafts of every block, one tensor [blocks] for every answer that has any."""

    head_on: list[Tensor]
    head_off: list[Tensor]
    answers: list[int]
    """Which answers these are."""


@torch.inference_mode()
def accepted_by_answer(
    draft: Draft,
    answers: SequenceType[Sequence],
    source: FeatureSource,
    sampled_by: Target | None = None,
    anchors_per_answer: int = 10**6,
) -> Accepted:
    """Run a draft over answers that it was not trained on.

    Args:
        draft: bound to its target.
        answers: the target's own text.
        source: of its features; with `sampled_by`, of the target's last layer too.
        sampled_by: the target, where the text was sampled at temperature 1: gives what *sampled* drafts can expect
            there, instead of what the most probable drafts reach.
        anchors_per_answer: at most this many blocks each.
    """
    on: dict[int, Tensor] = {}
    off: dict[int, Tensor] = {}
    for indices, drafted, base, final in block_logits(draft, answers, source, anchors_per_answer, batch_size=1):
        (index,) = set(indices)
        target_probs = None
        if sampled_by is not None:
            width = draft.config.hidden_size
            last = source.layers.index(sampled_by.num_layers - 1) * width
            features = source.read(answers[index])[:, last : last + width].to(draft.device)
            text = text_probabilities(sampled_by, features, answers[index].tokens.to(draft.device))
            labels = torch.arange(1, drafted.choices.shape[1] + 1, device=draft.device)
            target_probs = text[drafted.blocks.positions[:, None] + labels]
        for logits, into in ((final, on), (base, off)):
            if target_probs is None:
                into[index] = accepted_drafts(logits, drafted.choices)
            else:
                chosen = logits.softmax(-1).gather(-1, drafted.choices.clamp(min=0)[..., None])[..., 0]
                into[index] = expected_acceptance(chosen * (drafted.choices >= 0), target_probs)
    return Accepted(list(on.values()), list(off.values()), list(on))


class Interval(NamedTuple):
    """An estimate with the bounds of its central 95% under resampling."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def tau_interval(accepted: SequenceType[Tensor], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean accepted prefix + 1 over all blocks.

    Args:
        accepted: for every answer, accepted drafts of each of its blocks.
        resamples: of the answers.
        seed: of resampling.
    """
    sums, counts = _sums(accepted)
    means = _draws(len(sums), resamples, seed, sums) / _draws(len(sums), resamples, seed, counts)
    return _interval(sums.sum() / counts.sum() + 1, means + 1)


def tau_ratio(
    accepted: SequenceType[Tensor], against: SequenceType[Tensor], resamples: int = 2000, seed: int = 0
) -> Interval:
    """tau of one draft over that of another on the same blocks, as a ratio; arguments as in `tau_interval`.

    Raises:
        ValueError: the blocks differ.
    """
    sums, counts = _sums(accepted)
    other, other_counts = _sums(against)
    if not torch.equal(counts, other_counts):
        raise ValueError("both drafts must be measured on the same blocks of the same answers")
    total, above, below = (_draws(len(sums), resamples, seed, x) for x in (counts, sums, other))
    ratio = (sums.sum() + counts.sum()) / (other.sum() + counts.sum())
    return _interval(ratio, (above + total) / (below + total))


def _sums(accepted: SequenceType[Tensor]) -> tuple[Tensor, Tensor]:
    sums = torch.stack([blocks.double().sum() for blocks in accepted])
    return sums, torch.tensor([float(len(blocks)) for blocks in accepted], dtype=torch.float64)


def _draws(count: int, resamples: int, seed: int, values: Tensor) -> Tensor:
    """Totals of `values` [count] over draws with replacement, the same draws for the same seed: [resamples]."""
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(count, (resamples, count), generator=generator)].sum(1)


def _interval(value: Tensor, resampled: Tensor) -> Interval:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(value.item(), low, high)
