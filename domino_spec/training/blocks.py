"""From a batch of sequences to the hidden state and correction input of every drafted token.

The one forward pass that training and simulated tau share: sampled anchors in, one row per drafted token out.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from domino_spec.draft.domino import Draft
from domino_spec.draft.load import AnyDraft
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.ops.heads import HeadInputs, head_rollout
from domino_spec.training.anchors import Blocks, gather_blocks
from domino_spec.training.attention import block_attention
from domino_spec.training.chains import forward_chains
from domino_spec.training.features import Batch

ROLLOUT_LOGITS = 8_000_000
"""Logits that exist at once while the draft writes prefixes of its own: 32 MB in float32."""


@dataclass(frozen=True)
class DraftedTokens:
    """Per drafted token of every block: what predicts it and what it should be."""

    hidden: Tensor
    """[A, N, H], the slot that predicts the token."""
    low_rank: Tensor | None
    """[A, N, L], zero where the base logits are used alone; None without a head."""
    blocks: Blocks
    choices: Tensor
    """[A, N], labels as indices into the draft's logits; -1 where it cannot propose the label."""


def forward_blocks(
    draft: AnyDraft,
    batch: Batch,
    anchors: SequenceType[Tensor],
    block_size: int | None = None,
    causal_encoder: str = "teacher_forcing",
    attention: str = "auto",
) -> DraftedTokens:
    """Run all blocks of a batch side by side.

    Args:
        draft: bound to its target.
        batch: packed sequences with features, on the draft's device.
        anchors: positions of each sequence's blocks.
        block_size: slots per block where training runs shorter blocks than the draft's (see `curriculum.block_size`).
        causal_encoder: what the head's prefix encoder reads: teacher_forcing, the batch's own tokens; or
            training_time_test, the draft's greedy tokens (paper 4.2, 5.3.2).
        attention: auto, flex or sdpa.
    """
    if isinstance(draft, SingleLayerDraft):
        hidden, blocks = forward_chains(draft, batch, anchors, block_size)
        return DraftedTokens(hidden, None, blocks, draft.to_choices(blocks.labels).where(blocks.valid[:, :1], -1))
    config = draft.config if block_size is None else replace(draft.config, block_size=block_size)
    device = batch.tokens.device
    blocks = gather_blocks(batch, anchors, config.max_drafts)

    rows = torch.arange(len(batch.tokens), device=device)
    positions = rows - batch.starts[torch.searchsorted(batch.starts, rows, right=True) - 1]
    features = draft.read_features(batch.features[None, :, : config.feature_size])
    context = draft.backbone.project_context(features, positions[None])
    slots = blocks.positions[:, None] + torch.arange(config.block_size, device=device)
    hidden = draft.backbone(
        draft.block_embeddings(blocks.tokens[:, 0], config.block_size).flatten(0, 1)[None],
        slots.flatten()[None],
        context,
        block_attention(attention, blocks, config.block_size, len(rows)),
    )
    first = config.first_draft_slot
    hidden = hidden.view(len(slots), config.block_size, -1)[:, first : first + config.max_drafts]  # [A, N, H]

    low_rank = None
    if draft.head is not None:
        prefix = blocks.tokens
        if causal_encoder == "training_time_test":
            prefix = torch.cat((prefix[:, :1], _own_drafts(draft, hidden, prefix[:, 0])[:, :-1]), dim=1)
        states = draft.head.block(draft.embed(prefix))  # [A, N, G]
        low_rank = draft.head.low_rank(hidden, states)
        corrected = torch.arange(config.max_drafts, device=device) >= draft.head.config.pure_draft_prefix_len
        low_rank = low_rank * corrected[:, None]
    return DraftedTokens(hidden, low_rank, blocks, draft.to_choices(blocks.labels))


@torch.no_grad()
def _own_drafts(draft: Draft, hidden: Tensor, anchor_tokens: Tensor) -> Tensor:
    """What the draft itself would write: hidden states [A, N, H] and anchors [A] to token ids [A, N]."""
    chunk = max(1, ROLLOUT_LOGITS // (hidden.shape[1] * draft.config.logits_size))
    choices, head = [], draft.head_weights
    for part, anchors in zip(hidden.split(chunk), anchor_tokens.split(chunk), strict=True):
        block = HeadInputs(part, draft.base_logits(part), draft.embed(anchors))
        choices.append(head_rollout(head, block).choices)
    return draft.to_token_ids(torch.cat(choices))
