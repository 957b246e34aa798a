"""The curriculum and the learning rate at their ends and in between."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from domino_spec.recipe import OptimizationRecipe
from domino_spec.settings import UserError, parse_settings
from domino_spec.training.step import block_size, lambda_base, learning_rate


def recipe(**settings) -> OptimizationRecipe:
    return OptimizationRecipe(**{"steps": 100, **settings})


def lambdas(**settings) -> list[float]:
    """lambda at every step of a run."""
    settings = recipe(**settings)
    return [lambda_base(step, settings) for step in range(settings.total_steps)]


def test_lambda_goes_linearly_from_one_to_zero_over_the_run():
    values = lambdas()
    assert values[0] == 1 and values[-1] == 0
    steps = [a - b for a, b in pairwise(values)]
    assert all(s == pytest.approx(1 / 99) for s in steps)


def test_lambda_can_start_and_end_elsewhere():
    values = lambdas(lambda_base_start=0.8, lambda_base_end=0.2)
    assert (values[0], values[-1]) == pytest.approx((0.8, 0.2))
    assert all(a - b == pytest.approx(0.6 / 99) for a, b in pairwise(values))


def test_lambda_can_reach_its_end_before_the_run_ends():
    values = lambdas(steps=101, lambda_base_fraction=0.4, lambda_base_end=0.1)
    assert values[:41] == pytest.approx([1 - 0.9 * step / 40 for step in range(41)])
    assert values[40:] == pytest.approx([0.1] * 61)


def test_lambda_can_be_constant_or_off():
    assert set(lambdas(curriculum="constant", lambda_base_start=0.3)) == {0.3}, "the end does not count"
    assert set(lambdas(curriculum="constant", lambda_base_fraction=0.1)) == {1.0}
    assert set(lambdas(curriculum="off", lambda_base_start=0.3)) == {0.0}


@pytest.mark.parametrize("fraction", [1.0, 0.5, 1e-6])
def test_a_run_of_one_step_has_a_lambda(fraction):
    assert lambdas(steps=1, lambda_base_fraction=fraction) == [1.0]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(curriculum="quadratic"), "curriculum: expected 'linear', 'constant' or 'off', found 'quadratic'"),
        (dict(lambda_base_start=1.1), "lambda_base_start: expected 0 to 1, found 1.1"),
        (dict(lambda_base_end=-0.1), "lambda_base_end: expected 0 to 1, found -0.1"),
        (dict(lambda_base_fraction=0.0), "lambda_base_fraction: expected more than 0, at most 1, found 0.0"),
        (dict(lambda_base_fraction=1.5), "lambda_base_fraction: expected more than 0, at most 1, found 1.5"),
        (dict(steps=0), "steps: expected 1 to .*, found 0"),
        (dict(steps=-1), "steps: expected 1 to .*, found -1"),
        (dict(steps=None), "give either steps or epochs"),
        (dict(steps=5, epochs=1.0), "give either steps or epochs"),
        (dict(steps=None, epochs=0.0), "epochs: expected more than 0, at most 1,000,000, found 0.0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(settings, message):
    """Above all one that does not know its end: never a schedule that silently becomes zero."""
    with pytest.raises(UserError, match=message):
        parse_settings(OptimizationRecipe, {"steps": 100, **settings}, "recipe.yaml")


@pytest.mark.parametrize(
    "epochs, sequences, batch_size, steps", [(3.0, 100, 8, 38), (0.5, 100, 10, 5), (1.0, 7, 4, 2), (0.01, 7, 4, 1)]
)
def test_epochs_become_steps_once_the_data_are_known(epochs, sequences, batch_size, steps):
    """To the nearest whole step, and at least one."""
    settings = recipe(steps=None, epochs=epochs, batch_size=batch_size, micro_batch_size=1).with_steps(sequences)
    assert settings.total_steps == steps and settings.epochs is None
    assert lambda_base(0, settings) == 1 and lambda_base(max(1, steps - 1), settings) == 0


def test_steps_that_are_given_do_not_depend_on_the_data():
    assert recipe(steps=70).with_steps(10**6).total_steps == 70


def test_a_schedule_cannot_be_read_before_the_end_is_known():
    settings = recipe(steps=None, epochs=2.0)
    for schedule in (lambda_base, learning_rate):
        with pytest.raises(AssertionError, match="when the data are known"):
            schedule(0, settings)


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
