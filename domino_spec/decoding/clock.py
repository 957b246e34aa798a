"""What kinds of cycles take: a Kalman filter of how far their seconds are off the cost model's.

How fast the machine is changes for all kinds alike, and is told apart from what is wrong with the model: else
drafting would look cheap whenever a machine slows down while nothing is drafted. What is off is a sum, of
logarithms: of the pace, of what cycles have in common that draft (or do not), that do so for as many requests, and
that verify about as many drafts. After many cycles of one kind their sum is known well; the next cycle of another
kind then says which part is whose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

NOISE, PACE_DRIFT = 0.1**2, 0.05**2
"""Variance of the logarithm of a cycle's seconds: of every cycle by itself, and of how fast the machine is from one
cycle to the next."""
OFF = (1.0**2, 0.2**2, 0.1**2, 0.1**2)
"""Variance of the same by which the cost model is off: for all cycles, for those that draft or do not, beyond that for
a number of requests, and beyond that for a number of drafts."""
OFF_DRIFT = 1e-5
"""What a cycle adds to what is known of its kind."""
UNLIKELY = 2.5
"""Standard deviations by which a cycle surprises at most: a machine may also stand still for a while."""


class Clock:
    """Seconds of cycles to come, by those that were seen."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, ...], int] = {}
        """Where each part of the sum is, by drafted, requests and class of drafts; () is the pace."""
        self._mean = torch.zeros(0, dtype=torch.double)
        self._covariance = torch.zeros(0, 0, dtype=torch.double)
        self._means: list[float] = []

    def observe(self, requests: int, num_drafts: int, drafted: bool, modelled: float, seconds: float) -> None:
        """A cycle took so long."""
        parts = [self._part(key) for key in _keys(requests, num_drafts, drafted)]
        variances = self._covariance.diagonal()
        variances[parts[0]] += PACE_DRIFT
        variances[parts[1:]] += OFF_DRIFT
        shared = self._covariance[:, parts].sum(1)
        variance = float(shared[parts].sum()) + NOISE
        surprise = math.log(seconds / modelled) - sum(self._means[part] for part in parts)
        most = UNLIKELY * math.sqrt(variance)
        gain = shared / variance
        self._mean += gain * min(max(surprise, -most), most)
        self._covariance.addr_(gain, shared, alpha=-1)
        self._means = self._mean.tolist()

    def seconds(self, requests: int, drafted: bool, modelled: Sequence[float]) -> list[float]:
        """That cycles will take which verify 0, 1, .. drafts per request."""
        return [s * math.exp(self._off(_keys(requests, n, drafted))) for n, s in enumerate(modelled)]

    def _off(self, keys: Sequence[tuple[int, ...]]) -> float:
        return sum(self._means[self._parts[key]] for key in keys if key in self._parts)

    def _part(self, key: tuple[int, ...]) -> int:
        if key not in self._parts:
            self._parts[key] = len(self._parts)
            self._means.append(0.0)
            self._mean = F.pad(self._mean, (0, 1))
            self._covariance = F.pad(self._covariance, (0, 1, 0, 1))
            self._covariance[-1, -1] = OFF[len(key)]
        return self._parts[key]


def _keys(requests: int, num_drafts: int, drafted: bool) -> tuple[tuple[int, ...], ...]:
    """Of the parts of a kind of cycles."""
    return (), (drafted,), (drafted, requests), (drafted, requests, num_drafts.bit_length())
