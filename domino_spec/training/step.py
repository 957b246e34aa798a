"""Forward pass and loss of one micro-batch as a module: what is differentiated, and what several processes wrap."""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from domino_spec.draft.load import AnyDraft
from domino_spec.recipe import OptimizationRecipe
from domino_spec.training.anchors import acceptance_weights, position_weights
from domino_spec.training.blocks import DraftedTokens, forward_blocks
from domino_spec.training.features import Batch
from domino_spec.training.fused_loss import blended_loss, label_probabilities
from domino_spec.training.losses import OBJECTIVES


class MicroLoss(NamedTuple):
    """Sums over one micro-batch; divide by the denominators of all micro-batches of the step."""

    loss: Tensor
    """Scalar, differentiable."""
    base: Tensor
    final: Tensor
    denominator: Tensor
    """Sum of weights; with weights that follow acceptance, the number of blocks, since their sum is what they say."""


def tapped_layers(draft: AnyDraft, recipe: OptimizationRecipe) -> tuple[int, ...]:
    """Decoder layers whose outputs training reads: the draft's own, then the last where its distribution is needed."""
    config = draft.config
    assert config.num_target_layers is not None and config.target_layer_ids is not None, "the draft is not bound"
    last = config.num_target_layers - 1
    if not OBJECTIVES[recipe.objective].needs_target or last in config.target_layer_ids:
        return config.target_layer_ids
    return (*config.target_layer_ids, last)


class BlockLoss(nn.Module):
    """The loss of all blocks of a micro-batch.

    Args:
        draft: bound to its target.
        recipe: objective, weights and precision.
        layers: tapped decoder layers, as in the batches' features.
    """

    def __init__(self, draft: AnyDraft, recipe: OptimizationRecipe, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.draft, self.recipe, self._layers = draft, recipe, layers

    def forward(self, batch: Batch, anchors: SequenceType[Tensor], block_size: int, lambda_base: float) -> MicroLoss:
        """Losses of the micro-batch.

        Args:
            batch: packed sequences with features, on the draft's device.
            anchors: positions of each sequence's blocks.
            block_size: slots per block.
            lambda_base: weight of the base loss.
        """
        draft, recipe, device = self.draft, self.recipe, batch.tokens.device
        dtype = getattr(torch, recipe.precision)
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
            # A label that the draft cannot propose has no probability, and nothing after it can be accepted.
            confidence = torch.zeros(usable.shape, device=device).index_copy(0, rows, found).view_as(drafted.choices)
            weights = acceptance_weights(confidence, drafted.blocks.valid, recipe.confidence_floor)
            denominator = drafted.blocks.valid[:, 0].sum().float()
        else:
            weights = position_weights(drafted.choices.shape[-1], recipe.position_decay, device)
            weights = weights.expand(drafted.choices.shape)
            denominator = weights.flatten()[rows].sum()
        terms = OBJECTIVES[recipe.objective]
        target_hidden = self._target_hidden(batch, drafted, rows) if terms.needs_target else None
        losses = blended_loss(
            hidden,
            low_rank,
            labels,
            weights.flatten()[rows],
            lm_head,
            correction,
            lambda_base,
            target_hidden,
            terms,
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
