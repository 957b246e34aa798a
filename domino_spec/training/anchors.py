"""Anchors: which blocks of a sequence are trained, and what they should predict.

An anchor is a position whose token is known and whose following tokens are drafted. All blocks of a batch are trained
side by side in one backbone pass; what they may see is `training.attention`'s (DESIGN section 6).

Shapes: A blocks, B slots, N drafted tokens (`config.max_drafts`), T tokens of all sequences packed together.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.training.data import Sequence
from domino_spec.training.features import Batch


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch and their labels."""

    anchors: Tensor
    """[A], rows of the batch, ascending."""
    starts: Tensor
    """[A], first row of the block's sequence: what lies before belongs to others."""
    tokens: Tensor
    """[A, N], the known token that the causal encoder consumes before predicting each draft: anchor, draft 1, .."""
    labels: Tensor
    """[A, N], the token each draft should be."""
    valid: Tensor
    """[A, N] bool, False from the first position on that is not the answer's."""

    @property
    def positions(self) -> Tensor:
        """[A], position of each anchor in its own sequence."""
        return self.anchors - self.starts


def sample_anchors(sequence: Sequence, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` distinct anchor positions of one sequence, ascending; every one has at least one label."""
    allowed = sequence.anchors
    return allowed[torch.randperm(len(allowed), generator=generator)[:count].sort().values]


def gather_blocks(batch: Batch, anchors: SequenceType[Tensor], num_drafts: int) -> Blocks:
    """Cut labels and known prefixes for every anchor.

    Args:
        batch: packed sequences.
        anchors: positions of each sequence's blocks, counted from its own start.
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
    """Weights that follow what each token still decides about the accepted length (D-PACE, arXiv 2605.18810).

    With the confidences c_i = floor + (1 - floor) * q_i, q_i being the draft's probability of label i, the weight of
    token k is the sum over m >= k of c_1 .. c_m: what the accepted length would lose if token k failed.

    Args:
        confidence: [A, N], probability of every label.
        valid: [A, N] bool; weights of the others are 0.
        floor: 0 to 1 (the publication's alpha).

    Returns:
        [A, N] float32, without gradient.
    """
    smoothed = (floor + (1 - floor) * confidence.detach().float()) * valid
    return smoothed.cumprod(-1).flip(-1).cumsum(-1).flip(-1)
