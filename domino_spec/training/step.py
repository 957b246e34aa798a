"""One training step: schedules, the loss of a micro-batch, and the optimizer step (paper 4.2 and A.1).

Every random choice is a function of the seed and the step, so a run that was killed continues exactly as if it had not
been. `loop.train` repeats the step, evaluates and saves; `loss.blended_loss` computes the loss of labelled tokens.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from domino_spec.draft.load import AnyDraft
from domino_spec.recipe import OptimizationRecipe
from domino_spec.settings import UserError, require
from domino_spec.training.blocks import (
    DraftedTokens,
    acceptance_weights,
    forward_blocks,
    position_weights,
    sample_anchors,
)
from domino_spec.training.data import Batch, Sequence
from domino_spec.training.evaluate import SimulatedTau, simulated_tau
from domino_spec.training.features import FeatureSource
from domino_spec.training.loss import OBJECTIVES, blended_loss, label_probabilities
from domino_spec.training.parallel import ALONE, Processes, Shared, micro_batches, whole
from domino_spec.training.state import load_state, save_state


def lambda_base(step: int, recipe: OptimizationRecipe) -> float:
    """Weight of the base loss at `step` (from 0): linear over the run, constant, or off (paper 4.2)."""
    if recipe.curriculum == "off":
        return 0.0
    if recipe.curriculum == "constant":
        return recipe.lambda_base_start
    assert recipe.steps is not None, "epochs become steps when the data are known"
    moving = max(1.0, recipe.lambda_base_fraction * (recipe.steps - 1))
    progress = min(1.0, step / moving)
    return recipe.lambda_base_start + (recipe.lambda_base_end - recipe.lambda_base_start) * progress


def learning_rate(step: int, recipe: OptimizationRecipe) -> float:
    """Linear warm-up, then cosine to zero (paper A.1)."""
    assert recipe.steps is not None, "epochs become steps when the data are known"
    warmup = round(recipe.steps * recipe.warmup_ratio)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def block_size(step: int, recipe: OptimizationRecipe, full: int) -> int:
    """Slots per block at `step`: `block_schedule` spreads shorter blocks evenly over the run, the full size last.

    Drafts after a rejected one are lost, so a block's first tokens matter most, but a block of B slots spends only
    1 / B of its compute on the first one. Short blocks around more anchors (the product of both stays the same) spend
    more of it there.
    """
    assert recipe.steps is not None, "epochs become steps when the data are known"
    sizes = [*recipe.block_schedule, full]
    return sizes[min(len(sizes) - 1, step * len(sizes) // recipe.steps)]


def check_block_schedule(recipe: OptimizationRecipe, full: int) -> None:
    """Check `block_schedule` against the draft's block size.

    Raises:
        UserError: a scheduled block is not shorter than the draft's.
    """
    for size in recipe.block_schedule:
        require(size < full, f"training.block_schedule holds {size}, but the draft's own blocks have {full} slots")


def step_sequences(sequences: SequenceType[Sequence], step: int, recipe: OptimizationRecipe) -> list[Sequence]:
    """The sequences of one optimizer step: the next `batch_size` of an endless, freshly shuffled run over the data."""
    chosen = []
    for position in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        epoch, index = divmod(position, len(sequences))
        chosen.append(sequences[_epoch_order(len(sequences), recipe.seed, epoch)[index]])
    return chosen


@functools.lru_cache(maxsize=2)  # a step may include the end of one epoch and the start of the next
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())


class MicroLoss(NamedTuple):
    """Sums over one micro-batch; divide by the denominators of all micro-batches of the step."""

    loss: Tensor
    """Scalar, differentiable."""
    base: Tensor
    final: Tensor
    denominator: Tensor
    """Sum of weights. Weights that follow acceptance are divided by the number of blocks instead, since a change of
    their sum is part of what they express."""


def tapped_layers(draft: AnyDraft, recipe: OptimizationRecipe) -> tuple[int, ...]:
    """Decoder layers whose outputs training reads: the draft's taps, then the last layer if the objective needs it."""
    config = draft.config
    assert config.num_target_layers is not None and config.target_layer_ids is not None, "the draft is not bound"
    last = config.num_target_layers - 1
    if not OBJECTIVES[recipe.objective].needs_target or last in config.target_layer_ids:
        return config.target_layer_ids
    return (*config.target_layer_ids, last)


class BlockLoss(nn.Module):
    """The loss of all blocks of a micro-batch: the module that several processes wrap (`training.parallel`).

    Args:
        draft: bound to its target.
        recipe: objective, weights and precision.
        layers: tapped decoder layers, as in the batches' features.
    """

    def __init__(self, draft: AnyDraft, recipe: OptimizationRecipe, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.draft, self.recipe, self._layers = draft, recipe, layers
        self._dtype: torch.dtype = getattr(torch, recipe.precision)
        self._terms = OBJECTIVES[recipe.objective]
        self._needs_target = self._terms.needs_target

    def forward(self, batch: Batch, anchors: SequenceType[Tensor], block_size: int, lambda_base: float) -> MicroLoss:
        """Losses of the micro-batch.

        Args:
            batch: packed sequences with features, on the draft's device.
            anchors: positions of each sequence's blocks.
            block_size: slots per block.
            lambda_base: weight of the base loss.
        """
        draft, recipe, device, dtype = self.draft, self.recipe, batch.tokens.device, self._dtype
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            drafted = forward_blocks(draft, batch, anchors, block_size, recipe.causal_encoder, recipe.attention)
        usable = (drafted.blocks.valid & (drafted.choices >= 0)).flatten()
        rows = usable.nonzero()[:, 0]
        hidden = drafted.hidden.flatten(0, 1)[rows].to(dtype)
        low_rank = None if drafted.low_rank is None else drafted.low_rank.flatten(0, 1)[rows].to(dtype)
        correction = None if draft.head is None else draft.head.correction_weight
        target_lm_head, lm_head = draft.ends.lm_head.detach(), draft.lm_head_weight
        labels = drafted.choices.flatten()[rows]
        if recipe.position_weights == "acceptance":
            found = label_probabilities(hidden, low_rank, labels, lm_head, correction)
            # A label outside the draft vocabulary has no probability, and nothing after it can be accepted.
            confidence = torch.zeros(usable.shape, device=device).index_copy(0, rows, found).view_as(drafted.choices)
            weights = acceptance_weights(confidence, drafted.blocks.valid, recipe.confidence_floor)
            denominator = drafted.blocks.valid[:, 0].sum().float()
        else:
            weights = position_weights(drafted.choices.shape[-1], recipe.position_decay, device)
            weights = weights.expand(drafted.choices.shape)
            denominator = weights.flatten()[rows].sum()
        losses = blended_loss(
            hidden,
            low_rank,
            labels,
            weights.flatten()[rows],
            lm_head,
            correction,
            lambda_base,
            self._target_hidden(batch, drafted, rows) if self._needs_target else None,
            self._terms,
            target_lm_head,
        )
        return MicroLoss(*losses, denominator)

    @torch.no_grad()
    def _target_hidden(self, batch: Batch, drafted: DraftedTokens, rows: Tensor) -> Tensor:
        """The target's final hidden state before each label, from the tap of its last layer: [M, H]."""
        config = self.draft.config
        assert config.num_target_layers is not None
        width = self.draft.ends.lm_head.shape[1]
        start = self._layers.index(config.num_target_layers - 1) * width
        last = batch.features[:, start : start + width]
        offsets = torch.arange(drafted.choices.shape[-1], device=last.device)
        positions = (drafted.blocks.anchors[:, None] + offsets).flatten()[rows]
        return self.draft.ends.final_norm(last[positions])


class LossError(UserError):
    """Training cannot continue: the loss or its gradient is not finite, or the loss diverges."""


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
        self.processes, self.device = processes, draft.device
        self.step = 0
        self.state_checksum = ""
        """Of the state that was saved or resumed last; empty before there is one, and in processes that do not save."""
        self.can_save = True
        """False while a step is half done: the optimizer is at work, or the step's evaluation is not recorded yet."""
        draft.prepare_training(recipe.trained, recipe.activation_checkpointing)
        self._micro_batches = micro_batches(recipe.batch_size, recipe.micro_batch_size, processes)
        self._loss = BlockLoss(draft, recipe, source.layers)
        low_precision = recipe.precision == "bfloat16"
        self._shared = Shared(self._loss, processes, recipe.parallel, low_precision) if processes.count > 1 else None
        self._trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95), fused=True
        )

    def resume(self, directory: Path, digest: str) -> None:
        """Continue from the state saved in `directory`, if there is one.

        Raises:
            UserError: the state is unreadable, damaged, or belongs to another run.
        """
        total = self.recipe.total_steps
        self.step, self.state_checksum = load_state(self.draft, self.optimizer, digest, directory, total)

    def save(self, directory: Path, digest: str) -> None:
        """Write the state from which `resume` continues; every process must call it.

        Raises:
            UserError: it could not be written; the previous state survives.
        """
        assert self.can_save, "only the state of a whole step may be saved"
        self.state_checksum = save_state(self.draft, self.optimizer, self.step, digest, directory, self.processes)

    def train_step(self) -> StepResult:
        """One optimizer step over `batch_size` sequences.

        Raises:
            LossError: the loss or its gradient is not finite; the weights are as they were before the step.
            UserError: no token of the step can be trained.
        """
        started = time.perf_counter()
        recipe, size = self.recipe, block_size(self.step, self.recipe, self.draft.config.block_size)
        sequences = step_sequences(self.sequences, self.step, recipe)
        anchors = self.step_anchors(sequences, size)
        # Sequences of like length share a micro-batch; the sum over the step does not depend on the grouping.
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
        sequences, anchors = [sequences[i] for i in order], [anchors[i] for i in order]
        weight = lambda_base(self.step, recipe)
        rate = learning_rate(self.step, recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # base loss, final loss, denominator
        for part in self._micro_batches:
            batch = self.source.batch(sequences[part]).to(self.device)
            losses = self._backward(batch, anchors[part], size, weight, last=part is self._micro_batches[-1])
            totals += torch.stack(losses[1:]).detach()
        if self._shared is not None:
            totals = self.processes.sum(totals)
        base, final, denominator = totals.tolist()
        if denominator == 0:
            raise UserError("no trainable token in a whole step; is draft_vocab_size far too small?")
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad /= denominator
        gradient_norm = torch.nn.utils.clip_grad_norm_(self._trained, recipe.clip_norm)
        norm = (gradient_norm if self._shared is None else whole(gradient_norm)).item()
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
        )

    def _backward(self, *arguments: object, last: bool) -> tuple[Tensor, ...]:
        """Forward and backward of one micro-batch; several processes add up their gradients after the `last`."""
        if self._shared is not None:
            return self._shared.backward(*arguments, last=last)
        losses = self._loss(*arguments)
        losses.loss.backward()
        return losses

    def step_anchors(self, sequences: SequenceType[Sequence], block_size: int) -> list[Tensor]:
        """The anchors of this step; shorter blocks are more."""
        generator = torch.Generator().manual_seed((self.recipe.seed + 1) * 1_000_003 + self.step)
        count = self.recipe.anchors * self.draft.config.block_size // block_size
        return [sample_anchors(s, count, generator) for s in sequences]

    def evaluate(self, held_out: SequenceType[Sequence]) -> SimulatedTau | None:
        """Simulated tau on held-out text, in the first process; None in the others."""
        if self._shared is None:
            return simulated_tau(self.draft, held_out, self.source)
        with self._shared.gathered() as mine:
            return simulated_tau(self.draft, held_out, self.source) if mine else None
