"""Anchors and blocks: which tokens of a batch are drafted in training, and the draft's forward pass over them.

An anchor is a position whose token is known and whose following tokens are drafted. All blocks of a batch are trained
side by side in one pass of the backbone; `training.attention` decides what each may see (docs/design.md, section 6).
Training and simulated tau share `forward_blocks`: anchors in, one row per drafted token out.

Shapes: A blocks, B slots, N drafted tokens (`config.max_drafts`), T tokens of all sequences packed together, H hidden,
L low rank of the head.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from domino_spec.draft.config import SINGLE_LAYER_KINDS
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import AnyDraft
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.ops.heads import HeadInputs, head_rollout
from domino_spec.training.attention import block_attention
from domino_spec.training.chains import forward_chains
from domino_spec.training.data import Batch, Sequence

ROLLOUT_LOGITS = 8_000_000
"""Logits that exist at once while the draft writes its own prefixes: 32 MB in float32."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch and their labels."""

    anchors: Tensor
    """[A], rows of the batch, ascending."""
    starts: Tensor
    """[A], first row of the block's sequence; rows before it belong to other sequences."""
    tokens: Tensor
    """[A, N], the known token that the head's prefix encoder reads before each draft: anchor, draft 1, ..."""
    labels: Tensor
    """[A, N], the token that each draft should be."""
    valid: Tensor
    """[A, N] bool, False from the first position on that is not part of the answer."""

    @property
    def positions(self) -> Tensor:
        """[A], position of each anchor in its own sequence."""
        return self.anchors - self.starts


@dataclass(frozen=True)
class DraftedTokens:
    """Per drafted token of every block: what predicts it and what it should be."""

    hidden: Tensor
    """[A, N, H], the slot that predicts the token."""
    low_rank: Tensor | None
    """[A, N, L], zero if the base logits are used alone; None without a head."""
    blocks: Blocks
    choices: Tensor
    """[A, N], labels as indices into the draft's logits; -1 if the draft cannot propose the label."""


def sample_anchors(sequence: Sequence, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` distinct anchor positions of one sequence, ascending; every one has at least one label."""
    allowed = sequence.anchors
    return allowed[torch.randperm(len(allowed), generator=generator)[:count].sort().values]


def gather_blocks(batch: Batch, anchors: SequenceType[Tensor], num_drafts: int) -> Blocks:
    """Cut labels and known prefixes for every anchor.

    Args:
        batch: packed sequences.
        anchors: positions of each sequence's blocks, counted from the start of that sequence.
        num_drafts: N.
    """
    device = batch.tokens.device
    counts = torch.tensor([len(a) for a in anchors], device=device)
    starts = batch.starts[:-1].repeat_interleave(counts)
    rows = torch.cat(list(anchors)).to(device) + starts
    consumed = rows[:, None] + torch.arange(num_drafts, device=device)
    last = len(batch.tokens) - 1
    labelled = (consumed + 1).clamp(max=last)
    inside = batch.is_answer[labelled] & (consumed < last)
    # The next sequence starts with a prompt, so its answer is never taken for the rest of this one.
    valid = inside.long().cumprod(-1).bool()
    return Blocks(rows, starts, batch.tokens[consumed.clamp(max=last)], batch.tokens[labelled], valid)


def position_weights(num_drafts: int, decay: float, device: torch.device | None = None) -> Tensor:
    """w_k = exp(-k / decay), k counted from the first drafted token (paper 4.2): [N]."""
    return torch.exp(-torch.arange(num_drafts, dtype=torch.float32, device=device) / decay)


def acceptance_weights(confidence: Tensor, valid: Tensor, floor: float) -> Tensor:
    """Weights by what each token still decides about the accepted length (D-PACE, arXiv 2605.18810).

    With the confidences c_i = floor + (1 - floor) * q_i, where q_i is the draft's probability of label i, the weight of
    token k is the sum over m >= k of c_1 .. c_m: what the accepted length would lose if token k failed.

    Args:
        confidence: [A, N], probability of every label.
        valid: [A, N] bool; the weight of other tokens is 0.
        floor: 0 to 1 (the publication's alpha).

    Returns:
        [A, N] float32, without gradient.
    """
    smoothed = (floor + (1 - floor) * confidence.detach().float()) * valid
    return smoothed.cumprod(-1).flip(-1).cumsum(-1).flip(-1)


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
        block_size: slots per block; shorter than the draft's if training schedules it (`step.block_size`).
        causal_encoder: what the head's prefix encoder reads: the batch's tokens (teacher_forcing), or the draft's own
            greedy tokens (training_time_test; paper 4.2, 5.3.2).
        attention: auto, flex or sdpa.
    """
    size = draft.config.block_size if block_size is None else block_size
    if draft.kind in SINGLE_LAYER_KINDS:
        blocks = gather_blocks(batch, anchors, size)
        # A chain at position 0 has no feature before it.
        blocks = replace(blocks, valid=blocks.valid & (blocks.positions > 0)[:, None])
        choices = draft.to_choices(blocks.labels).where(blocks.valid[:, :1], -1)
        return DraftedTokens(forward_chains(cast(SingleLayerDraft, draft), batch, blocks), None, blocks, choices)
    draft = cast(Draft, draft)
    first = draft.config.first_draft_slot  # the slot that predicts the first draft
    blocks = gather_blocks(batch, anchors, size - first)
    device = batch.tokens.device

    rows = torch.arange(len(batch.tokens), device=device)
    positions = rows - batch.starts[torch.searchsorted(batch.starts, rows, right=True) - 1]
    features = draft.read_features(batch.features[None, :, : draft.backbone.fc.in_features])
    context = draft.backbone.project_context(features, positions[None])
    slots = blocks.positions[:, None] + torch.arange(size, device=device)
    hidden = draft.backbone(
        draft.block_embeddings(blocks.tokens[:, 0], size).flatten(0, 1)[None],
        slots.flatten()[None],
        context,
        block_attention(attention, blocks, size, len(rows)),
    )
    hidden = hidden.view(len(slots), size, -1)[:, first:]  # [A, N, H]

    low_rank = None
    if draft.head is not None:
        prefix = blocks.tokens
        if causal_encoder == "training_time_test":
            prefix = torch.cat((prefix[:, :1], _greedy_drafts(draft, hidden, prefix[:, 0])[:, :-1]), dim=1)
        states = draft.head.block(draft.embed(prefix))  # [A, N, G]
        low_rank = draft.head.low_rank(hidden, states)
        corrected = torch.arange(size - first, device=device) >= draft.head.config.pure_draft_prefix_len
        low_rank = low_rank * corrected[:, None]
    return DraftedTokens(hidden, low_rank, blocks, draft.to_choices(blocks.labels))


@torch.no_grad()
def _greedy_drafts(draft: Draft, hidden: Tensor, anchor_tokens: Tensor) -> Tensor:
    """The draft's own greedy tokens: hidden states [A, N, H] and anchors [A] to token ids [A, N]."""
    chunk = max(1, ROLLOUT_LOGITS // (hidden.shape[1] * draft.config.logits_size))
    choices, head = [], draft.head_weights
    for part, anchors in zip(hidden.split(chunk), anchor_tokens.split(chunk), strict=True):
        block = HeadInputs(part, draft.base_logits(part), draft.embed(anchors))
        choices.append(head_rollout(head, block).choices)
    return draft.to_token_ids(torch.cat(choices))
