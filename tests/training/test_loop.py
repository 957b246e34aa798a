"""What ends a run early: a loss that runs away or is no number, and the user; nothing learned is lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

from domino_spec.settings import UserError
from domino_spec.training.loop import Divergence, interruption
from domino_spec.training.run import _plain, run_training
from domino_spec.training.state import STATE_FILE
from domino_spec.training.step import LossError, Trainer


def test_a_loss_that_runs_away_is_noticed():
    watch = Divergence()
    for step in range(200):
        watch.check(step, 3.0 + math.sin(step))
    with pytest.raises(LossError, match=r"diverges: usually [\d.]+ before step \d+, once [23]"):
        for step in range(200, 400):
            watch.check(step, 3.0 * 1.05 ** (step - 200))


@pytest.mark.parametrize(
    "losses",
    [
        [10 / (1 + step / 20) for step in range(400)],
        [4.0] * 100 + [7.0] * 300,  # longer blocks from here on
        [*[3.0] * 60, 900.0, *[3.0] * 60],  # one bad batch is not a trend
    ],
    ids=["falling", "longer blocks", "one spike"],
)
def test_an_ordinary_loss_is_left_alone(losses):
    watch = Divergence()
    for step, loss in enumerate(losses):
        watch.check(step, loss)
    with pytest.raises(LossError):  # and it was still looking
        for step in range(Divergence.WINDOW):
            watch.check(len(losses) + step, 10 * max(losses))


def saved(out: Path) -> bytes:
    return (out / STATE_FILE).read_bytes()


@pytest.mark.parametrize("kind", ["not finite", "diverging"])
def test_a_bad_loss_keeps_the_last_good_state_and_says_so(setup, tmp_path, monkeypatch, kind):
    """The state is saved after step 4; step 7 goes wrong."""
    recipe = setup.recipe(checkpoint_minutes=1e9)
    original = Trainer.train_step
    good: list[bytes] = []

    def step(self):
        if self.step == 4:
            self.save(tmp_path, "digest")
            good.append(saved(tmp_path))
        if self.step == 6 and kind == "not finite":
            self.draft.backbone.norm.weight.data[0] = math.nan
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    if kind == "diverging":
        monkeypatch.setattr(Divergence, "WINDOW", 2)
        monkeypatch.setattr(Divergence, "FACTOR", 0.1)
    with pytest.raises(UserError, match=r"lower training.learning_rate and choose another --out"):
        run_training(recipe, tmp_path, device="cpu")
    if kind == "not finite":
        assert saved(tmp_path) == good[0], "the state after the failure is not saved over the good one"
    else:
        assert not (tmp_path / STATE_FILE).exists(), "nothing was good enough to be saved"


def test_signals_wait_for_the_end_of_a_step():
    before = signal.getsignal(signal.SIGTERM)
    with interruption() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set(), "noted, and nothing was cut"
        assert signal.getsignal(signal.SIGTERM) is before, "a second one does what it always did"
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def enter() -> None:
        with interruption() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.slow
def test_a_terminated_run_saves_the_step_in_progress_and_goes_on_to_the_same_end(setup, tmp_path):
    """As `torchrun` and schedulers end processes: SIGTERM, in the middle of a run."""
    recipe = setup.recipe(steps=400, checkpoint_minutes=1e9, eval_every=1000)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_plain(dataclasses.asdict(recipe))))
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "domino_spec", "train", str(path), "--out", str(tmp_path / "run"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert 5 < max(done) < 400
    resumed = run_training(recipe, tmp_path / "run", device="cpu")
    whole = run_training(recipe, tmp_path / "whole", device="cpu")
    for (name, a), (_, b) in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(a, b), name
