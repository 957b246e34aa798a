"""The curriculum and the learning rate at their ends and in between."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from domino_spec.config import OptimizationRecipe, UserError
from domino_spec.training.curriculum import block_size, lambda_base, learning_rate


def recipe(**settings) -> OptimizationRecipe:
    return OptimizationRecipe(**{"steps": 100, **settings})


def test_lambda_goes_linearly_from_one_to_zero_over_the_run():
    values = [lambda_base(step, recipe()) for step in range(100)]
    assert values[0] == 1 and values[-1] == 0
    steps = [a - b for a, b in pairwise(values)]
    assert all(s == pytest.approx(1 / 99) for s in steps)


def test_lambda_can_start_and_end_elsewhere():
    settings = recipe(lambda_base_start=0.8, lambda_base_end=0.2)
    assert [lambda_base(s, settings) for s in (0, 99)] == pytest.approx([0.8, 0.2])
    constant = recipe(lambda_base_start=0.5, lambda_base_end=0.5)
    assert {lambda_base(s, constant) for s in range(100)} == {0.5}


def test_a_run_of_one_step_has_a_lambda():
    assert lambda_base(0, recipe(steps=1)) == 1


def test_a_run_that_does_not_know_its_steps_is_an_error():
    """Never a schedule that silently becomes zero."""
    with pytest.raises(TypeError):
        OptimizationRecipe()
    for steps in (0, -1):
        with pytest.raises(UserError, match="steps must be at least 1"):
            recipe(steps=steps)


def test_learning_rate_warms_up_linearly_and_ends_near_zero():
    settings = recipe(learning_rate=1e-3, warmup_ratio=0.1)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) in (9, 10)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert 0 < rates[-1] < 1e-6 * 10


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, recipe(learning_rate=2e-3, warmup_ratio=0.0)) == pytest.approx(2e-3)


def test_block_schedule_spreads_shorter_blocks_evenly_and_ends_with_the_full_size():
    sizes = [block_size(step, recipe(steps=9, block_schedule=(2, 4)), 8) for step in range(9)]
    assert sizes == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert {block_size(step, recipe(), 8) for step in range(100)} == {8}
