"""Is one draft better than another? Paired differences of simulated tau on the same blocks, with intervals.

Blocks of one answer are alike, so whole answers are drawn anew (a cluster bootstrap), and both drafts are compared on
the same draw: what makes an answer easy for both cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from typing import NamedTuple

import torch
from torch import Tensor


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
