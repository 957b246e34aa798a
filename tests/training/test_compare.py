"""Intervals hold what they say, and pairing finds what separate intervals would not."""

from __future__ import annotations

import pytest
import torch

from domino_spec.training.evaluate import tau_interval, tau_ratio


def answers(count: int, generator: torch.Generator, gain: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Accepted drafts of two drafts per block: answers differ a lot from each other, the drafts by `gain` a little."""
    first, second = [], []
    for _ in range(count):
        easy = torch.rand(1, generator=generator).item() * 4
        blocks = easy + torch.randn(int(torch.randint(5, 30, (1,), generator=generator)), generator=generator) * 0.3
        first.append(blocks)
        second.append(blocks * (1 + gain) + torch.randn(len(blocks), generator=generator) * 0.1)
    return first, second


def test_the_value_is_the_mean_over_blocks_plus_one():
    accepted = [torch.tensor([0, 2, 4]), torch.tensor([6])]
    assert tau_interval(accepted).value == pytest.approx(4.0)
    ratio = tau_ratio([torch.tensor([1, 3, 5]), torch.tensor([7])], accepted)
    assert ratio.value == pytest.approx(5 / 4)


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_hold_the_truth():
    """100 samples of 60 answers: fewer than 86 hits would come up with probability below 1e-3 for a true 95%."""
    generator = torch.Generator().manual_seed(0)
    truth = 1 + torch.cat(answers(20_000, generator)[0]).mean().item()
    hits = 0
    for seed in range(100):
        interval = tau_interval(answers(60, generator)[0], resamples=400, seed=seed)
        hits += interval.low <= truth <= interval.high
    assert hits >= 86


def test_pairing_finds_a_gain_that_separate_intervals_hide():
    first, second = answers(60, torch.Generator().manual_seed(1), gain=0.05)
    ratio = tau_ratio(second, first)
    assert ratio.low > 1.0
    apart = tau_interval(first), tau_interval(second)
    assert apart[1].low < apart[0].high, "apart they overlap"


def test_blocks_that_differ_are_refused():
    with pytest.raises(ValueError, match="same blocks"):
        tau_ratio([torch.zeros(3)], [torch.zeros(4)])
