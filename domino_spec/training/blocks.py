"""From a batch of sequences to the hidden state and correction input of every drafted token.

The one forward pass that training and simulated tau share: sampled anchors in, one row per drafted token out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from domino_spec.draft.model import Draft
from domino_spec.training.anchors import Blocks, block_mask, block_positions, gather_blocks
from domino_spec.training.features import Batch


@dataclass(frozen=True)
class DraftedTokens:
    """Per drafted token of every block: what predicts it and what it should be."""

    hidden: Tensor
    """[S, A, N, H], the slot that predicts the token."""
    low_rank: Tensor | None
    """[S, A, N, L], zero where the base logits are used alone; None without a head."""
    blocks: Blocks
    choices: Tensor
    """[S, A, N], labels as indices into the draft's logits; -1 where it cannot propose the label."""


def forward_blocks(draft: Draft, batch: Batch, anchors: list[Tensor], block_size: int | None = None) -> DraftedTokens:
    """Run all blocks of a batch in one backbone pass, with teacher-forced prefixes for the head (paper 4.2).

    Args:
        draft: bound to its target.
        batch: sequences with features, on the draft's device.
        anchors: anchor positions of each sequence.
        block_size: slots per block where training runs shorter blocks than the draft's (see `curriculum.block_size`).
    """
    config = draft.config if block_size is None else replace(draft.config, block_size=block_size)
    device = batch.tokens.device
    counts = torch.tensor([len(a) for a in anchors], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(anchors, batch_first=True).to(device)  # [S, A]
    blocks = gather_blocks(batch.tokens, batch.lengths, padded, counts, config.max_drafts)

    rows = batch.tokens.shape[1]
    context = draft.backbone.project_context(batch.features, torch.arange(rows, device=device).expand(len(anchors), -1))
    anchor_tokens = batch.tokens.gather(1, padded)
    hidden = draft.backbone(
        draft.block_embeddings(anchor_tokens, config.block_size).flatten(1, 2),
        block_positions(padded, config),
        context,
        block_mask(padded, rows, config),
    )
    hidden = hidden.view(*padded.shape, config.block_size, -1)
    first = config.first_draft_slot
    hidden = hidden[:, :, first : first + config.max_drafts]  # [S, A, N, H]

    low_rank = None
    if draft.head is not None:
        states = draft.head.block(draft.embed(blocks.tokens))  # [S, A, N, G]
        low_rank = draft.head.low_rank(hidden, states)
        corrected = torch.arange(config.max_drafts, device=device) >= draft.head.config.pure_draft_prefix_len
        low_rank = low_rank * corrected[:, None]
    return DraftedTokens(hidden, low_rank, blocks, draft.to_choices(blocks.labels))
