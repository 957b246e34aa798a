"""Confidence intervals over prompts: what a report says, beside what it might have said with other prompts.

The turns and repeats of one conversation are alike, so whole conversations are drawn anew, those of each suite among
themselves (a stratified cluster bootstrap). Every method and every baseline is computed on the same draws, so that
what makes a prompt easy, or its text slow, for all of them cancels out of a ratio.

Percentiles of few resampled prompts lie too close together: too narrow by sqrt((n - 1) / n), and blind to how little n
prompts say about their spread. Their tails are therefore moved outwards as Student's t has them for that many prompts
(Hesterberg 2015, "What teachers should know about the bootstrap", section 3: expanded percentiles). From five prompts
a suite downwards that is about the range of single prompts, which is all there is, and less than its name says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 4000

Cluster = tuple[str, str]
"""Suite and conversation."""
Bounds = tuple[float, float]
"""Lower and upper end of an interval."""


@dataclass(frozen=True)
class Samples:
    """A figure as measured, and on every resample of the prompts."""

    values: Tensor
    """[1 + resamples] float64, the measured one first; not finite where a draw leaves nothing to divide by."""
    clusters: frozenset[Cluster]
    """Conversations that it was measured on."""

    @property
    def value(self) -> float | None:
        """As measured; None where there is nothing to divide by."""
        value = self.values[0]
        return value.item() if value.isfinite() else None

    @property
    def interval(self) -> Bounds | None:
        """Where `LEVEL` of its resamples lie; None without a value, or where a suite has only one conversation."""
        suites = Counter(suite for suite, _ in self.clusters)
        if self.value is None or min(suites.values(), default=0) < 2:
            return None
        tail = tail_share(len(self.clusters), len(suites))
        resampled = self.values[1:]
        ends = torch.tensor([tail, 1 - tail], dtype=resampled.dtype)
        low, high = resampled[resampled.isfinite()].quantile(ends).tolist()
        return low, high

    def __truediv__(self, other: Samples) -> Samples:
        """A ratio, both sides on the same draws."""
        return Samples(self.values / other.values, self.clusters | other.clusters)


def mean_of(samples: Sequence[Samples]) -> Samples:
    """The unweighted mean, draw by draw; without a value where one of them has none."""
    values = torch.stack([s.values for s in samples]).mean(0)
    return Samples(values, frozenset().union(*(s.clusters for s in samples)))


@dataclass(frozen=True)
class Draws:
    """Which conversations every resample holds."""

    places: Mapping[Cluster, int]
    """Column of each conversation."""
    counts: Tensor
    """[1 + resamples, conversations] int16: how often each is drawn; the first row is the measurement itself."""

    @classmethod
    def of(cls, clusters: Iterable[Cluster], resamples: int = RESAMPLES) -> Draws:
        """As many conversations of each suite as it has, drawn with replacement.

        A suite's draws depend on nothing but its name and its number of conversations.
        """
        ordered = sorted(set(clusters))
        counts = []
        for suite, count in Counter(suite for suite, _ in ordered).items():
            # A generator of its own for every suite: with one seed for all, suites of a size would be drawn in step.
            seed = int.from_bytes(hashlib.sha256(suite.encode()).digest()[:4], "big")
            drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
            whole = torch.ones(1 + resamples, count, dtype=torch.int16)
            whole[1:] = torch.zeros_like(whole[1:]).scatter_add_(1, drawn, whole[1:])
            counts.append(whole)
        places = {cluster: place for place, cluster in enumerate(ordered)}
        return cls(places, torch.cat(counts, 1) if counts else torch.ones(1 + resamples, 0, dtype=torch.int16))

    def totals(self, amounts: Iterable[tuple[Cluster, Sequence[float]]], width: int) -> Tensor:
        """Sums of amounts, as measured and in every resample: [1 + resamples, width] float64.

        Args:
            amounts: what to add up, `width` numbers for a run of that conversation.
            width: how many numbers a run has.
        """
        sums: dict[int, Tensor] = {}
        for cluster, values in amounts:
            place, added = self.places[cluster], torch.tensor(values, dtype=torch.float64)
            sums[place] = sums[place] + added if place in sums else added
        if not sums:
            return torch.zeros(len(self.counts), width, dtype=torch.float64)
        return self.counts[:, list(sums)].double() @ torch.stack(list(sums.values()))


def tail_share(clusters: int, suites: int) -> float:
    """The share of resamples beyond each end of an interval: 0.025 of very many prompts, less of fewer.

    Args:
        clusters: conversations, of all suites together.
        suites: each of which gives one degree of freedom away to its own mean.
    """
    degrees = clusters - suites
    return NormalDist().cdf(-sqrt(clusters / degrees) * _student_quantile(degrees))


def _student_quantile(degrees: int) -> float:
    """Student's t at the upper end of `LEVEL`, to 1% from three degrees of freedom upwards.

    Source: its expansion in powers of 1 / degrees (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
