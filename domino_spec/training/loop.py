"""The training loop: frozen target, cached features, blocks around anchors, blended loss, AdamW.

Third stage of a recipe (prompts, answers, *training*, export). Every random choice is a function of the seed and the
step, so a run that was killed continues exactly as if it had not been.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path

import torch

from domino_spec.config import OptimizationRecipe, Recipe, UserError
from domino_spec.draft.model import Draft
from domino_spec.training.anchors import position_weights, sample_anchors
from domino_spec.training.blocks import forward_blocks
from domino_spec.training.curriculum import block_size, lambda_base, learning_rate
from domino_spec.training.data import Sequence
from domino_spec.training.evaluate import SimulatedTau, simulated_tau
from domino_spec.training.features import Batch, FeatureCache
from domino_spec.training.losses import blended_loss
from domino_spec.training.state import load_state, save_state


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    base_loss: float
    """Weighted mean cross-entropy of the base logits."""
    final_loss: float
    """The same of the final logits."""
    lambda_base: float
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of text in the step's sequences."""
    seconds: float


def recipe_digest(recipe: Recipe, sequences: SequenceType[Sequence], target_fingerprint: str) -> str:
    """Identifies a run: recipe, target and the sequences trained on. Cadences that change no number are left out."""
    training = dataclasses.replace(recipe.training, checkpoint_minutes=0.0, eval_every=1, log_every=1)
    settings = dataclasses.asdict(dataclasses.replace(recipe, training=training))
    settings["data"] = [s.digest for s in sequences]
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
        recipe: optimization settings.
        sequences: training part of the data.
        cache: their features.
    """

    def __init__(
        self, draft: Draft, recipe: OptimizationRecipe, sequences: SequenceType[Sequence], cache: FeatureCache
    ) -> None:
        assert draft.dtype == torch.float32, "master weights must be float32"
        self.draft, self.recipe, self.sequences, self.cache = draft, recipe, sequences, cache
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            draft.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def resume(self, directory: Path, digest: str) -> None:
        """Go on from the state saved in `directory`, if there is one.

        Raises:
            UserError: the state is unreadable or belongs to another run.
        """
        self.step = load_state(self.draft, self.optimizer, digest, directory)

    def train_step(self) -> StepResult:
        """One optimizer step over `batch_size` sequences.

        Raises:
            UserError: the loss is not finite.
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

        totals = torch.zeros(3, dtype=torch.float64)  # base loss, final loss, sum of weights
        for start in range(0, len(sequences), recipe.micro_batch_size):
            part = slice(start, start + recipe.micro_batch_size)
            totals += self._backward(self.cache.batch(sequences[part]), anchors[part], weight)
        base, final, total_weight = totals.tolist()
        if not math.isfinite(base + final):
            raise UserError(f"the loss is not finite at step {self.step + 1}; lower training.learning_rate")
        if total_weight == 0:
            raise UserError("no trainable token in a whole step; is draft_vocab_size far too small?")
        for parameter in self.draft.parameters():
            if parameter.grad is not None:
                parameter.grad /= total_weight
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(
            step=self.step,
            base_loss=base / total_weight,
            final_loss=final / total_weight,
            lambda_base=weight,
            learning_rate=rate,
            grad_norm=norm.item(),
            tokens=sum(len(s.tokens) for s in sequences),
            seconds=time.perf_counter() - started,
        )

    def _anchors(self, sequences: SequenceType[Sequence]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed((self.recipe.seed + 1) * 1_000_003 + self.step)
        count = self.recipe.anchors * self.draft.config.block_size // self._block_size
        return [sample_anchors(s.prompt_length, len(s.tokens), count, generator) for s in sequences]

    @property
    def _block_size(self) -> int:
        return block_size(self.step, self.recipe, self.draft.config.block_size)

    def _backward(self, batch: Batch, anchors: list[torch.Tensor], weight: float) -> torch.Tensor:
        """Accumulate gradients of the *sum* of weighted losses; returns base loss, final loss and sum of weights."""
        draft, device = self.draft, self.draft.device
        batch = Batch(*(getattr(batch, f.name).to(device) for f in dataclasses.fields(batch)))
        low_precision = self.recipe.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
            if not low_precision:
                batch = dataclasses.replace(batch, features=batch.features.float())
            drafted = forward_blocks(draft, batch, anchors, self._block_size)
        usable = (drafted.blocks.valid & (drafted.choices >= 0)).flatten()
        rows = usable.nonzero()[:, 0]
        weights = position_weights(drafted.choices.shape[-1], self.recipe.position_decay, device)
        weights = weights.expand(drafted.choices.shape).flatten()[rows]
        dtype = torch.bfloat16 if low_precision else torch.float32
        loss = blended_loss(
            drafted.hidden.flatten(0, 2)[rows].to(dtype),
            None if drafted.low_rank is None else drafted.low_rank.flatten(0, 2)[rows].to(dtype),
            drafted.choices.flatten()[rows],
            weights,
            draft.ends.lm_head,
            None if draft.head is None else draft.head.correction_weight,
            weight,
            self._target_hidden(batch, drafted, rows) if self.recipe.objective == "kl" else None,
        )
        loss.loss.backward()
        return torch.stack((loss.base, loss.final, weights.sum())).double().cpu()

    def _target_hidden(self, batch: Batch, drafted, rows: torch.Tensor) -> torch.Tensor:
        """The target's final hidden state before each label, from the tap of its last layer: [M, H]."""
        config = self.draft.config
        tap = config.target_layer_ids.index(config.num_target_layers - 1)
        hidden_size = config.hidden_size
        last = batch.features[..., tap * hidden_size : (tap + 1) * hidden_size]
        offsets = torch.arange(drafted.choices.shape[-1], device=last.device)
        positions = (drafted.blocks.anchors[..., None] + offsets).clamp(max=last.shape[1] - 1)
        flat = (positions + torch.arange(len(last), device=last.device)[:, None, None] * last.shape[1]).flatten()
        with torch.no_grad():
            return self.draft.ends.final_norm(last.flatten(0, 1)[flat[rows]])


def train(
    trainer: Trainer,
    held_out: SequenceType[Sequence],
    directory: Path,
    digest: str,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_evaluation: Callable[[int, SimulatedTau], None] = lambda step, tau: None,
    on_save: Callable[[], None] = lambda: None,
) -> Draft:
    """Run from the trainer's step to the recipe's last.

    Saves every `checkpoint_minutes`, at the end, and when interrupted (Ctrl-C), so nothing is lost.

    Raises:
        UserError: the state cannot be read or written, belongs to another run, or the loss is not finite.
    """
    recipe = trainer.recipe
    saved_at, saved_step = time.monotonic(), trainer.step

    def save() -> None:
        save_state(trainer.draft, trainer.optimizer, trainer.step, digest, directory)
        on_save()

    try:
        while trainer.step < recipe.steps:
            result = trainer.train_step()
            on_step(result)
            if result.step % recipe.eval_every == 0 or result.step == recipe.steps:
                on_evaluation(result.step, simulated_tau(trainer.draft, held_out, trainer.cache))
            if time.monotonic() - saved_at >= recipe.checkpoint_minutes * 60:
                save()
                saved_at, saved_step = time.monotonic(), trainer.step
    finally:
        if trainer.step > saved_step:
            save()
    return trainer.draft
