"""The training loop: frozen target, cached features, blocks around anchors, blended loss, AdamW.

Third stage of a recipe (prompts, answers, *training*, export). Every random choice is a function of the seed and the
step, so a run that was killed continues exactly as if it had not been.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path

import torch

from domino_spec.draft.load import AnyDraft
from domino_spec.recipe import OptimizationRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.training.anchors import sample_anchors
from domino_spec.training.curriculum import block_size, check_block_schedule, lambda_base, learning_rate
from domino_spec.training.data import Sequence
from domino_spec.training.evaluate import SimulatedTau, simulated_tau
from domino_spec.training.features import FeatureSource
from domino_spec.training.flops import step_flops, step_work
from domino_spec.training.guards import Divergence, LossError, interruption
from domino_spec.training.parallel import ALONE, Processes, Shared, micro_batches, whole
from domino_spec.training.state import load_state, save_state
from domino_spec.training.step import BlockLoss

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    base_loss: float
    """Weighted mean loss of the base logits."""
    final_loss: float
    """The same of the final logits."""
    lambda_base: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of text in the step's sequences."""
    seconds: float
    sequences: int
    """Sequences of the step, those of all processes."""
    flops: float
    """Floating-point operations of the step, those of all processes (`training.flops`)."""


def recipe_digest(recipe: Recipe, sequences: SequenceType[Sequence], target_fingerprint: str) -> str:
    """Identifies a run: recipe, target and the sequences trained on.

    What changes no number but in rounding is left out: cadences, and how the work is cut and shared.
    """
    training = dataclasses.replace(recipe.training, checkpoint_minutes=0.0, eval_every=1, log_every=1, trackers=())
    training = dataclasses.replace(
        training, micro_batch_size=1, attention="auto", activation_checkpointing=False, parallel="ddp"
    )
    settings = dataclasses.asdict(dataclasses.replace(recipe, training=training))
    settings["data"] = [(s.digest, s.answers) for s in sequences]
    settings["fingerprint"] = target_fingerprint
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def step_sequences(sequences: SequenceType[Sequence], step: int, recipe: OptimizationRecipe) -> list[Sequence]:
    """The sequences of one optimizer step: the next `batch_size` of an endless, freshly shuffled run over the data."""
    chosen = []
    for position in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, index = divmod(position, len(sequences))
        chosen.append(sequences[_epoch_order(len(sequences), recipe.seed, epoch)[index]])
    return chosen


@functools.lru_cache(maxsize=2)  # a step may straddle two epochs
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())


class Trainer:
    """One run: `draft` and its optimizer, moved forward a step at a time.

    Args:
        draft: in float32 (the master weights), bound to its target.
        recipe: optimization settings, with a known number of steps.
        sequences: training part of the data.
        source: of their features, of at least the layers `tapped_layers` names.
        processes: that share the work.

    Raises:
        UserError: the processes cannot share a step, or the block schedule does not fit the draft.
    """

    def __init__(
        self,
        draft: AnyDraft,
        recipe: OptimizationRecipe,
        sequences: SequenceType[Sequence],
        source: FeatureSource,
        processes: Processes = ALONE,
    ) -> None:
        assert draft.dtype == torch.float32, "master weights must be float32"
        check_block_schedule(recipe, draft.config.block_size)
        self.draft, self.recipe, self.sequences, self.source = draft, recipe, sequences, source
        self.processes = processes
        self.step = 0
        self.state_checksum = ""
        """Of the state that was saved or resumed last; empty before there is one, and in processes that do not save."""
        self.can_save = True
        """False while a step is half done: the optimizer is at work, or the step's evaluation is not recorded yet."""
        draft.prepare_training(recipe.trained, recipe.activation_checkpointing)
        self._share = micro_batches(recipe.batch_size, recipe.micro_batch_size, processes)
        loss = BlockLoss(draft, recipe, source.layers)
        self.shared = Shared(loss, processes, recipe.parallel, recipe.precision == "bfloat16")
        self._vocabulary = None if draft.draft_vocab_ids is None else draft.draft_vocab_ids.cpu()
        self._trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def resume(self, directory: Path, digest: str) -> None:
        """Go on from the state saved in `directory`, if there is one.

        Raises:
            UserError: the state is unreadable, damaged, or belongs to another run.
        """
        total = self.recipe.total_steps
        self.step, self.state_checksum = load_state(self.draft, self.optimizer, digest, directory, total)

    def save(self, directory: Path, digest: str) -> None:
        """Write the state to go on from; every process must call it.

        Raises:
            UserError: it could not be written; the previous state survives.
        """
        assert self.can_save, "a state is that of a whole step"
        self.state_checksum = save_state(self.draft, self.optimizer, self.step, digest, directory, self.processes)

    def train_step(self) -> StepResult:
        """One optimizer step over `batch_size` sequences.

        Raises:
            LossError: the loss or its gradient is not finite; the weights are as they were before the step.
            UserError: no token of the step can be trained.
        """
        started = time.perf_counter()
        recipe = self.recipe
        sequences = step_sequences(self.sequences, self.step, recipe)
        anchors = self._anchors(sequences)
        # Like lengths share a micro-batch; the sum over the step does not depend on the grouping.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        sequences, anchors = [sequences[i] for i in order], [anchors[i] for i in order]
        weight = lambda_base(self.step, recipe)
        rate = learning_rate(self.step, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        work = step_work(self.draft.config, sequences, anchors, self._block_size, self._vocabulary)
        totals = torch.zeros(3, dtype=torch.float64, device=self.draft.device)  # base loss, final loss, denominator
        for part in self._share:
            batch = self.source.batch(sequences[part]).to(self.draft.device)
            arguments = (batch, anchors[part], self._block_size, weight)
            losses = self.shared.backward(*arguments, last=part is self._share[-1])
            totals += torch.stack(losses[1:]).detach()
        base, final, denominator = self.processes.sum(totals).tolist()
        if denominator == 0:
            raise UserError("no trainable token in a whole step; is draft_vocab_size far too small?")
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad /= denominator
        norm = whole(torch.nn.utils.clip_grad_norm_(self._trained, recipe.clip_norm)).item()
        if not math.isfinite(base + final + norm):
            raise LossError(f"the loss or its gradient is not finite at step {self.step + 1}")
        self.can_save = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.can_save = True
        return StepResult(
            step=self.step,
            base_loss=base / denominator,
            final_loss=final / denominator,
            lambda_base=weight,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(s.tokens) for s in sequences),
            seconds=time.perf_counter() - started,
            sequences=len(sequences),
            flops=step_flops(self.draft.config, recipe, work).total,
        )

    def evaluate(self, held_out: SequenceType[Sequence]) -> SimulatedTau | None:
        """Simulated tau on held-out text, in the first process; None in the others."""
        with self.shared.gathered() as mine:
            return simulated_tau(self.draft, held_out, self.source) if mine else None

    def _anchors(self, sequences: SequenceType[Sequence]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed((self.recipe.seed + 1) * 1_000_003 + self.step)
        count = self.recipe.anchors * self.draft.config.block_size // self._block_size
        return [sample_anchors(s, count, generator) for s in sequences]

    @property
    def _block_size(self) -> int:
        return block_size(self.step, self.recipe, self.draft.config.block_size)


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

    Saves every `checkpoint_minutes`, at the end, and when interrupted: SIGINT and SIGTERM (`torchrun` passes on the
    latter) end the run after the step in progress, in all processes at the same one. A second one does not wait; a step
    that it cuts in the middle is not saved.

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
                wishes = torch.tensor([float(interrupted.is_set()), float(due)], device=trainer.draft.device)
                stop, due = (processes.sum(wishes) > 0).tolist()
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
