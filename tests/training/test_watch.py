"""What a run records, and that no tracker can hurt it. The trackers here are stand-ins with the real ones' calls."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from domino_spec.recipe import Recipe, load_recipe
from domino_spec.settings import UserError
from domino_spec.training.evaluate import SimulatedTau, simulated_tau
from domino_spec.training.run import run_training
from domino_spec.training.step import StepResult
from domino_spec.training.watch import Metrics
from tests.tiny import as_sequences, fit, random_prompts, tiny_draft

TAU = SimulatedTau(
    tau=2.5,
    tau_head_off=1.5,
    accepted=torch.tensor([1, 2]),
    accepted_head_off=torch.tensor([0, 1]),
    acceptance=[1.0, 0.5],
    acceptance_head_off=[0.5, 0.0],
    candidates=128,
    candidate_recall=0.99,
    sequences=torch.tensor([0, 0]),
)


class Tracker(ModuleType):
    """Stands in for wandb or trackio; fails in what `broken` names."""

    def __init__(self, name: str, broken: str = "") -> None:
        super().__init__(name)
        self.broken = broken
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished: list[dict] = []

    def _maybe_fail(self, what: str) -> None:
        print(f"{self.__name__} says something")
        if what == self.broken:
            raise ConnectionError(f"no route\nto {self.__name__}")

    def init(self, **options) -> SimpleNamespace:
        self.started.append(options)
        self._maybe_fail("init")
        return SimpleNamespace(log=self.log)

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))
        self._maybe_fail("log")

    def finish(self, **outcome) -> None:
        self.finished.append(outcome)
        self._maybe_fail("finish")


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins in the trackers' place."""

    def put(name: str, broken: str = "") -> Tracker:
        tracker = Tracker(name, broken)
        monkeypatch.setitem(sys.modules, name, tracker)
        return tracker

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return put


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(step: int) -> StepResult:
    return StepResult(step, 3.0, 2.0 + step, 1.0, 1e-3, 0.5, tokens=100, seconds=0.1, sequences=4)


def record(out: Path, recipe: Recipe, resumed: int, last: int, evaluate_at: tuple[int, ...] = ()) -> None:
    with Metrics(out, resumed, recipe) as metrics:
        for step in range(resumed + 1, last + 1):
            metrics.step(result(step))
            if step in evaluate_at:
                metrics.evaluation(step, TAU)


def test_every_evaluation_records_acceptance_per_slot_with_the_head_on_and_off(setup, tmp_path):
    run_training(setup.recipe(), tmp_path, device="cpu")
    evaluations = [row for row in rows_of(tmp_path) if "tau" in row]
    assert [row["step"] for row in evaluations] == [5, 10, 12]
    for row in evaluations:
        for tau, shares in ((row["tau"], row["acceptance"]), (row["tau_head_off"], row["acceptance_head_off"])):
            assert len(shares) == 4 and sorted(shares, reverse=True) == shares
            assert tau == pytest.approx(1 + sum(shares)), "a mean of lengths is the sum of their survival"
    assert evaluations[-1]["acceptance"][0] > 0


def test_tensorboard_shows_losses_and_every_slot(setup, tmp_path):
    record(tmp_path, setup.recipe(), 0, 3, evaluate_at=(2,))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("final_loss")] == [(1, 3.0), (2, 4.0), (3, 5.0)]
    assert [(e.step, e.value) for e in events.Scalars("acceptance/02")] == [(2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("acceptance_head_off/01")] == [(2, 0.5)]


def test_a_resumed_run_drops_what_lies_past_its_state(setup, tmp_path):
    record(tmp_path, setup.recipe(), 0, 6, evaluate_at=(5,))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "base_lo')  # killed while writing
    record(tmp_path, setup.recipe(), 4, 5)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert not any("tau" in row for row in rows_of(tmp_path))


def test_steps_are_recorded_as_often_as_the_recipe_says(setup, tmp_path):
    record(tmp_path, setup.recipe(log_every=4), 0, 9)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 4, 8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_whole_recipe_and_every_figure(setup, tmp_path, install, name):
    tracker, recipe = install(name), setup.recipe(trackers=(name,))
    run_training(recipe, tmp_path / "my-run", device="cpu")
    (options,) = tracker.started
    assert options["project"] == "domino-spec" and options["resume"] == "allow"
    assert options["name"].startswith("my-run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options["config"]))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    rows = rows_of(tmp_path / "my-run")
    assert [step for step, _ in tracker.logged] == [row["step"] for row in rows]
    for row, (_, values) in zip(rows, tracker.logged, strict=True):
        for key, value in row.items():
            if isinstance(value, list):
                assert [values[f"{key}/{k:02d}"] for k in range(1, 5)] == value
            elif key != "step":
                assert values[key] == value
    assert len(tracker.finished) == 1


def test_a_project_may_be_named_in_the_environment(setup, tmp_path, install, monkeypatch):
    tracker = install("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "drafts")
    record(tmp_path, setup.recipe(trackers=("wandb",)), 0, 1)
    assert tracker.started[0]["project"] == "drafts"


@pytest.mark.parametrize("name, key", [("wandb", "id"), ("trackio", "name")])
def test_a_run_is_resumed_as_itself_and_another_directory_is_another_run(setup, tmp_path, install, name, key):
    tracker, recipe = install(name), setup.recipe(trackers=(name,))
    record(tmp_path / "a" / "run", recipe, 0, 3)
    record(tmp_path / "a" / "run", recipe, 3, 4)
    record(tmp_path / "b" / "run", recipe, 0, 3)
    first, again, other = (options[key] for options in tracker.started)
    assert first == again != other


def test_trackers_get_every_row_once_though_a_resumed_run_repeats_some(setup, tmp_path, install):
    tracker, recipe = install("wandb"), setup.recipe(trackers=("wandb",))
    record(tmp_path, recipe, 0, 5, evaluate_at=(4,))
    record(tmp_path, recipe, 3, 6, evaluate_at=(4, 6))
    kinds = [(step, "tau" in values) for step, values in tracker.logged]
    assert sorted(kinds) == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (4, True),
        (5, False),
        (6, False),
        (6, True),
    ]


def test_wandb_is_told_whether_the_run_ended_well(setup, tmp_path, install):
    tracker, recipe = install("wandb"), setup.recipe(trackers=("wandb",))
    record(tmp_path / "well", recipe, 0, 1)
    with pytest.raises(KeyboardInterrupt), Metrics(tmp_path / "stopped", 0, recipe):
        raise KeyboardInterrupt
    assert tracker.finished == [{"exit_code": 0}, {"exit_code": 1}]


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_done(setup, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"pip install trackio, or take it out of training\.trackers") as error:
        run_training(setup.recipe(trackers=("trackio",)), tmp_path / "out", device="cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_tracker_is_one_warning_and_training_goes_on(setup, tmp_path, install, caplog, broken):
    wandb, trackio = install("wandb", broken), install("trackio")
    with caplog.at_level(logging.WARNING):
        run_training(setup.recipe(trackers=("wandb", "trackio")), tmp_path, device="cpu")
    assert max(row["step"] for row in rows_of(tmp_path)) == 12
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "wandb" in r.getMessage()]
    assert len(warnings) == 1 and "no route to wandb" in warnings[0]
    assert len(wandb.logged) == {"init": 0, "log": 1, "finish": 15}[broken], "off from the first failure on"
    assert len(trackio.logged) == 15 and trackio.finished == [{}], "the other one is not affected"


@pytest.mark.slow
def test_what_trackers_print_stays_off_standard_output(setup, tmp_path, install, capsys):
    install("trackio")
    record(tmp_path, setup.recipe(trackers=("trackio",)), 0, 2)
    written = capsys.readouterr()
    assert "trackio says something" in written.err and not written.out


@pytest.mark.slow
def test_a_run_says_what_it_is_before_it_begins(setup, tmp_path):
    seen = []
    run_training(setup.recipe(steps=None, epochs=2.0), tmp_path, device="cpu", on_start=seen.append)
    (facts,) = seen
    assert (facts.training_sequences, facts.held_out_sequences, facts.processes) == (16, 4, 1)
    assert facts.steps == 8 == max(row["step"] for row in rows_of(tmp_path)), "2 epochs of 16 sequences, 4 a step"
    shape = "1 layers, blocks of 4, 4 drafts (shifted labels), taps 0 3 (the last before its final norm)"
    assert facts.draft.startswith(f"{shape}, draft vocabulary 40")
    assert facts.answer_tokens < facts.training_tokens
    header = (tmp_path / "recipe.yaml").read_text().split("\ntarget:")[0]
    for name, value in facts.notes().items():
        assert f"# {name}: {value}\n" in header + "\n"
    assert set(facts.notes()) == {f.name.replace("_", " ") for f in dataclasses.fields(facts)}


@pytest.mark.slow
def test_slots_with_the_head_off_are_those_of_the_base_logits(target):
    """Trained by its final loss alone, the draft leans on its head."""
    prompts = random_prompts([4] * 4)
    sequences = as_sequences(prompts, random_prompts([24] * 4, seed=8))
    draft = tiny_draft(target)
    trainer = fit(target, draft, sequences, 60, curriculum="off", learning_rate=2e-2)
    tau = simulated_tau(draft, sequences, trainer.source)
    for shares, accepted in ((tau.acceptance, tau.accepted), (tau.acceptance_head_off, tau.accepted_head_off)):
        assert shares == [(accepted >= k).double().mean().item() for k in range(1, 6)]
    assert tau.acceptance[0] == tau.acceptance_head_off[0], "the first draft is the pure prefix"
    assert tau.acceptance[-1] > tau.acceptance_head_off[-1] + 0.2
