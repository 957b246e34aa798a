"""The report of a run: figures that can be checked against its files, at any time of the run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from domino_spec.recipe import DataRecipe, DraftRecipe, OptimizationRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.training import report
from domino_spec.training.report import read_notes, write_report
from domino_spec.training.run import run_training
from domino_spec.training.watch import last_metrics

NOTES = {
    "torch": "2.99",
    "commit": "abc123",
    "steps": "100",
    "training sequences": "320",
    "matrix rate": "1e+12",
    "step operations": "5e+11",
}


@pytest.fixture
def text_only(monkeypatch):
    """No picture, which takes most of a report's time."""
    monkeypatch.setattr(report, "plot_training", lambda metrics, picture: None)


def plain(value):
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_run(
    out: Path, rows: list[dict], notes: dict[str, str] = NOTES, draft: dict | None = None, **training
) -> Path:
    """A run's directory with such metrics."""
    recipe = Recipe(
        "some/target",
        DraftRecipe(**(draft or {})),
        DataRecipe(),
        OptimizationRecipe(**{"steps": 100, "seed": 17, **training}),
    )
    out.mkdir()
    header = "".join(f"# {name}: {value}\n" for name, value in notes.items())
    (out / "recipe.yaml").write_text(header + yaml.safe_dump(plain(dataclasses.asdict(recipe)), sort_keys=False))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def step_row(step: int, **values) -> dict:
    row = dict(step=step, base_loss=3.0, final_loss=2.0, lambda_base=0.5, learning_rate=1e-3, grad_norm=1.0)
    return {**row, "tokens": 1000, "seconds": 2.0, "sequences": 16, **values}


def tau_row(step: int, on: float = 2.25, off: float = 1.5, recall: float | None = 0.99) -> dict:
    shares = dict(acceptance=[0.75, on - 1.75], acceptance_head_off=[0.25, off - 1.25])
    return dict(step=step, tau=on, tau_head_off=off, **shares, blocks=2048, candidates=128, candidate_recall=recall)


def test_the_report_of_a_run_states_the_figures_of_its_metrics(setup, tmp_path):
    run_training(setup.recipe(), tmp_path / "my-run", device="cpu")
    path = write_report(tmp_path / "my-run")
    text, latest = path.read_text(), last_metrics(tmp_path / "my-run" / "metrics.jsonl")
    assert path == tmp_path / "my-run" / "report.md"
    assert text.startswith("# Training report: my-run\n") and "Unfinished" not in text
    assert f"**{latest['tau']:.3f} with the head on, {latest['tau_head_off']:.3f} with it off**" in text
    for side, key in (("head on", "acceptance"), ("head off", "acceptance_head_off")):
        shares = " | ".join(f"{share:.0%}" for share in latest[key])
        assert f"| {side} | {shares} |" in text
    notes = read_notes(tmp_path / "my-run" / "recipe.yaml")
    assert len(notes["commit"]) >= 7
    for name in ("commit", "torch", "device", "draft", "target fingerprint"):
        assert notes[name] in text
    assert "| training sequences | 16 |" in text and "| held out sequences | 4 |" in text and "| seed | 0 |" in text
    assert "](training.png)" in text
    assert (tmp_path / "my-run" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_report_needs_nothing_but_recipe_and_metrics(setup, tmp_path):
    run_training(setup.recipe(), tmp_path / "whole" / "run", device="cpu")
    copy = tmp_path / "copy" / "run"
    copy.mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (copy / name).write_bytes((tmp_path / "whole" / "run" / name).read_bytes())
    assert write_report(copy).read_text() == write_report(tmp_path / "whole" / "run").read_text()


@pytest.mark.parametrize(
    "on, off, words", [(2.25, 1.5, "(gain of 0.750, +50.0%)"), (1.8, 2.0, "(loss of 0.200, -10.0%)")]
)
def test_the_head_is_credited_with_its_gain_or_its_loss(text_only, tmp_path, on, off, words):
    text = write_report(write_run(tmp_path / "run", [tau_row(100, on, off)])).read_text()
    assert f"**{on:.3f} with the head on, {off:.3f} with it off** {words}" in text


def test_the_last_figures_are_stated_and_a_better_one_before_is_not_hidden(text_only, tmp_path):
    text = write_report(write_run(tmp_path / "run", [tau_row(50, on=2.6), tau_row(100)])).read_text()
    assert "at step 100 (2,048 blocks): **2.250" in text
    assert "The highest so far was 2.600, at step 50." in text


def test_a_draft_without_a_head_is_not_compared_with_itself(text_only, tmp_path):
    out = write_run(tmp_path / "run", [step_row(100), tau_row(100, 1.5, 1.5, None)], draft={"head": None})
    text = write_report(out).read_text()
    assert "**1.500**; this draft has no head" in text and "| no head | 75% | -25% |" in text
    assert "gain" not in text and "head off" not in text and "final loss" not in text


def test_cost_is_computed_from_the_recorded_steps(text_only, tmp_path):
    """Step 1, which also compiles, is left out of the pace."""
    steps = [step_row(1, seconds=500.0), *(step_row(step) for step in range(10, 101, 10))]
    text = write_report(write_run(tmp_path / "run", steps)).read_text()
    assert "| steps | 100, of which 11 are recorded |" in text
    assert "| sequences | 1,600, 5.00 times those of the data |" in text
    assert "| tokens of text | about 100 k |" in text
    assert "| time in steps | about 3.3 minutes" in text
    assert "| pace | 500 tokens/s, 8 samples/s |" in text
    assert "| operations | 500 GFLOP a step |" in text
    assert "| rate | 250 GFLOP/s, **25.0%** of the 1 TFLOP/s" in text


def test_a_run_that_counts_no_operations_claims_no_rate(text_only, tmp_path):
    rows = [{k: v for k, v in step_row(step).items() if k != "sequences"} for step in (1, 2)]
    text = write_report(write_run(tmp_path / "run", rows, notes={"commit": "abc"})).read_text()
    assert "FLOP" not in text and "| pace | 500 tokens/s" in text


@pytest.mark.parametrize("rows", [[], [step_row(1)], [step_row(step) for step in range(1, 41)]], ids=len)
def test_an_unfinished_run_is_reported_as_such(tmp_path, rows):
    out = write_run(tmp_path / "run", rows)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "base_l')  # being written
    text = write_report(out).read_text()
    assert f"**Unfinished: step {len(rows)} of 100.**" in text
    assert "Simulated tau has not been measured yet." in text
    assert (out / "training.png").stat().st_size > 0


def test_a_run_in_epochs_knows_its_end_from_its_notes(text_only, tmp_path):
    out = write_run(tmp_path / "run", [step_row(50)], steps=None, epochs=5.0)
    text = write_report(out).read_text()
    assert "**Unfinished: step 50 of 100.**" in text and "| steps | 100 (5 epochs) |" in text


def test_every_setting_that_makes_a_result_is_in_the_table(text_only, tmp_path):
    training = dict(
        objective="lk_hybrid", position_weights="acceptance", causal_encoder="training_time_test", curriculum="constant"
    )
    text = write_report(write_run(tmp_path / "run", [], **training)).read_text()
    table = text.split("## Settings")[1]
    for words in ("some/target", "lk_hybrid", "acceptance, floor 0.5", "training_time_test", "constant, 1", "| 17 |"):
        assert words in table
    assert re.search(r"learning rate 0.0006, warm-up 4%", table)


@pytest.mark.parametrize("missing", ["recipe.yaml", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_one_line(tmp_path, missing):
    out = write_run(tmp_path / "run", [])
    (out / missing).unlink()
    with pytest.raises(UserError, match=missing) as error:
        write_report(out)
    assert "\n" not in str(error.value)
    assert not (out / "report.md").exists()
