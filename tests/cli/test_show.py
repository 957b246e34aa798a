"""What `train` says about its steps and evaluations."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from domino_spec.cli.show import TrainingView
from domino_spec.training.evaluate import SimulatedTau
from domino_spec.training.step import StepResult
from domino_spec.training.watch import RunFacts

LINE = "step 5: simulated tau 2.500, head off 2.000"
FACTS = RunFacts("5 layers", 10, 64, 6400, 3200, 8, 1000, "cpu", 1, matrix_rate=4e9, step_operations=2e9)


def evaluation(recall: float | None) -> SimulatedTau:
    accepted = torch.tensor([1, 2])
    return SimulatedTau(2.5, 2.0, accepted, accepted - 1, [1.0, 0.5], [0.5, 0.5], 512, recall, sequences=torch.zeros(2))


def step(number: int, **values) -> StepResult:
    result = StepResult(number, 3.25, 2.5, 0.75, 1e-3, 0.5, tokens=1000, seconds=2.0, sequences=16)
    return dataclasses.replace(result, **values)


@pytest.mark.parametrize(
    "recall, line", [(0.99573, f"{LINE}, recall of 512 candidates 0.9957"), (None, LINE)], ids=["head", "no head"]
)
def test_an_evaluation_is_one_line_with_the_recall_where_a_head_corrects(recall, line):
    written = io.StringIO()
    with TrainingView(Console(file=written)) as view:
        view.evaluation(5, evaluation(recall))
    assert written.getvalue() == line + "\n"


def test_a_step_shows_losses_tau_pace_and_use_of_the_device():
    written = io.StringIO()
    with TrainingView(Console(file=written)) as view:
        view.start(FACTS)
        view.evaluation(9, evaluation(None))
        view.step(step(10))
    assert written.getvalue().splitlines()[1] == (
        "steps 10/10: base loss 3.250, final loss 2.500, lambda 0.75, tau 2.500 (head off 2.000), "
        "500 tokens/s, 8 samples/s, 25.0% of the matrix rate"
    )


def test_the_pace_follows_recent_steps():
    written = io.StringIO()
    with TrainingView(Console(file=written)) as view:
        view.start(FACTS)
        view.step(step(1, seconds=1000.0))  # compiles
        for number in range(2, 401):
            view.step(step(number))
    assert "500 tokens/s, 8 samples/s, 25.0% of the matrix rate" in written.getvalue().splitlines()[-1]


def test_on_a_terminal_the_figures_fit_below_the_bar_and_the_time_left_beside_it():
    written = io.StringIO()
    with TrainingView(Console(file=written, force_terminal=True, width=80)) as view:
        view.start(FACTS)
        view.evaluation(1, evaluation(None))
        view.step(step(1))
        view.step(step(2))
    last = written.getvalue()
    assert "base loss 3.250, final loss 2.500, lambda 0.75" in last
    assert "tau 2.500 (head off 2.000)" in last
    assert "500 tokens/s, 8 samples/s, 25.0% of the matrix rate" in last
    assert "2/10" in last and "left" in last
    assert "…" not in last


def test_nothing_is_shown_when_nothing_is_asked_for():
    written = io.StringIO()
    with TrainingView(Console(file=written), shown=False) as view:
        for name, callback in view.callbacks.items():
            callback(
                *{"on_start": (FACTS,), "on_features": (1, 2), "on_step": (step(10),)}.get(name, (5, evaluation(1.0)))
            )
    assert not written.getvalue()
