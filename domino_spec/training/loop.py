"""The training loop: steps until the last one, with evaluations, saves, and an end for what goes wrong.

Third stage of a recipe (prompts, answers, *training*, export). `step.Trainer` does one step; `run.run_training`
prepares data and directory and calls `train`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceType
from pathlib import Path

import torch

from domino_spec.draft.load import AnyDraft
from domino_spec.recipe import Recipe
from domino_spec.settings import UserError
from domino_spec.training.data import Sequence
from domino_spec.training.evaluate import SimulatedTau
from domino_spec.training.step import LossError, StepResult, Trainer

_log = logging.getLogger(__name__)


def recipe_digest(recipe: Recipe, sequences: SequenceType[Sequence], target_fingerprint: str) -> str:
    """Identifies a run: recipe, target and the sequences trained on.

    Settings that change results only by rounding are left out: cadences, and how the work is divided.
    """
    training = dataclasses.replace(recipe.training, checkpoint_minutes=0.0, eval_every=1, log_every=1, trackers=())
    training = dataclasses.replace(
        training, micro_batch_size=1, attention="auto", activation_checkpointing=False, parallel="ddp"
    )
    settings = dataclasses.asdict(dataclasses.replace(recipe, training=training))
    settings["data"] = [(s.digest, s.answers) for s in sequences]
    settings["fingerprint"] = target_fingerprint
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def train(
    trainer: Trainer,
    held_out: SequenceType[Sequence],
    directory: Path,
    digest: str,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_evaluation: Callable[[int, SimulatedTau], None] = lambda step, tau: None,
    on_save: Callable[[], None] = lambda: None,
) -> AnyDraft:
    """Run from the trainer's step to the recipe's last.

    Saves every `checkpoint_minutes`, at the end, and when interrupted: SIGINT and SIGTERM (which `torchrun` passes on)
    end the run after the step in progress, the same step in all processes. A second signal does not wait; the step that
    it interrupts is not saved.

    Raises:
        UserError: the state cannot be read or written, belongs to another run, or the loss is not finite or diverges;
            the last state saved before that is kept.
        KeyboardInterrupt: interrupted, and saved.
    """
    recipe, processes = trainer.recipe, trainer.processes
    saved_at, saved_step = time.monotonic(), trainer.step
    divergence, failed = Divergence(), False

    def save() -> None:
        trainer.save(directory, digest)
        on_save()

    with interruption() as interrupted:
        try:
            while trainer.step < recipe.total_steps:
                result = trainer.train_step()
                weight = result.lambda_base
                divergence.check(result.step, (1 - weight) * result.final_loss + weight * result.base_loss)
                on_step(result)
                if result.step % recipe.eval_every == 0 or result.step == recipe.total_steps:
                    trainer.can_save = False  # a run resumed from here would lack the figure
                    tau = trainer.evaluate(held_out)
                    if tau is not None:
                        on_evaluation(result.step, tau)
                    trainer.can_save = True
                # Clocks differ between processes: they stop and save together, when any of them wants to.
                due = time.monotonic() - saved_at >= recipe.checkpoint_minutes * 60
                wanted = torch.tensor([float(interrupted.is_set()), float(due)], device=trainer.draft.device)
                stop, due = (processes.sum(wanted) > 0).tolist()
                if stop:
                    raise KeyboardInterrupt
                if due:
                    save()
                    saved_at, saved_step = time.monotonic(), trainer.step
        except LossError as error:
            failed = True
            raise UserError(
                f"{error}; {_kept(saved_step, directory)}; lower training.learning_rate and choose another --out"
            ) from None
        finally:
            if trainer.step > saved_step and not failed:
                if trainer.can_save:
                    save()
                elif interrupted.is_set():
                    _log.warning("cut in the middle of a step: %s", _kept(saved_step, directory))
    return trainer.draft


def _kept(step: int, directory: Path) -> str:
    return f"the state of step {step} is kept in {directory}" if step else "nothing was saved yet"


class Divergence:
    """Detects a loss that diverges: its median over `WINDOW` steps is far above the lowest such median."""

    WINDOW = 50
    FACTOR = 3.0
    """Longer blocks raise the loss too: to 1.24 times its lowest at most, in runs that went well (docs/log.md)."""

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=self.WINDOW)
        self._lowest = math.inf

    def check(self, step: int, loss: float) -> None:
        """Check the loss of one more step.

        Raises:
            LossError: the loss diverges.
        """
        self._recent.append(loss)
        if len(self._recent) < self.WINDOW:
            return
        usual = statistics.median(self._recent)
        self._lowest = min(self._lowest, usual)
        if usual > self.FACTOR * self._lowest:
            raise LossError(f"the loss diverges: usually {usual:.3g} before step {step}, once {self._lowest:.3g}")


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that no step is interrupted; a second signal ends the process."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]

    def restore() -> None:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        event.set()
        restore()

    for number, handler in zip(signals, before, strict=True):
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield event
    finally:
        restore()
