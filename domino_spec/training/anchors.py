"""Anchors: which blocks of a sequence are trained, what they may see, and what they should predict.

An anchor is a position whose token is known and whose following tokens are drafted. All blocks of a sequence are
trained side by side in one backbone pass, under a mask that lets a block see the context strictly before its anchor
and itself, and nothing of other blocks (DESIGN section 6).

Shapes: S sequences, A anchors, B slots, N drafted tokens (`config.max_drafts`), T tokens of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.config import DraftConfig


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch of sequences and their labels."""

    anchors: Tensor
    """[S, A], positions; 0 where a sequence has fewer than A, with every label then invalid."""
    tokens: Tensor
    """[S, A, N], the known token that the causal encoder consumes before predicting each draft: anchor, draft 1, .."""
    labels: Tensor
    """[S, A, N], the token each draft should be."""
    valid: Tensor
    """[S, A, N] bool, False from the first position past the response on."""


def sample_anchors(prompt_length: int, length: int, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` distinct anchor positions of one sequence, ascending.

    The first possible anchor is the last prompt token, where decoding starts; the last is the one before the last
    token, so that every block has at least one label.
    """
    first, last = prompt_length - 1, length - 2
    candidates = max(0, last - first + 1)
    chosen = torch.randperm(candidates, generator=generator)[:count]
    return chosen.sort().values + first


def gather_blocks(tokens: Tensor, lengths: Tensor, anchors: Tensor, anchor_counts: Tensor, num_drafts: int) -> Blocks:
    """Cut labels and known prefixes for every anchor.

    Args:
        tokens: [S, T], right-padded sequences.
        lengths: [S], their real lengths.
        anchors: [S, A], right-padded positions.
        anchor_counts: [S], how many of them are real.
        num_drafts: N.
    """
    offsets = torch.arange(num_drafts, device=tokens.device)
    positions = anchors[..., None] + offsets  # [S, A, N]: of the tokens consumed; labels are one further
    flat = tokens.gather(1, (positions + 1).clamp(max=tokens.shape[1] - 1).flatten(1)).view(positions.shape)
    consumed = tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1).flatten(1)).view(positions.shape)
    real = torch.arange(anchors.shape[1], device=tokens.device) < anchor_counts[:, None]  # [S, A]
    valid = (positions + 1 < lengths[:, None, None]) & real[..., None]
    return Blocks(anchors, consumed, flat, valid)


def block_positions(anchors: Tensor, config: DraftConfig) -> Tensor:
    """Absolute positions of all slots side by side: [S, A] to [S, A * B]."""
    return (anchors[..., None] + torch.arange(config.block_size, device=anchors.device)).flatten(1)


def block_mask(anchors: Tensor, context_rows: int, config: DraftConfig) -> Tensor:
    """What each slot may attend to: [S, 1, A * B, T + A * B] bool.

    Context strictly before the anchor (its own features do not exist while decoding), then the slots of its block.
    """
    slots = anchors.shape[1] * config.block_size
    start = anchors.repeat_interleave(config.block_size, dim=1)  # [S, A * B]
    context = torch.arange(context_rows, device=anchors.device) < start[..., None]
    block = torch.arange(slots, device=anchors.device) // config.block_size
    own = (block[:, None] == block).expand(len(anchors), -1, -1)
    return torch.cat((context, own), dim=-1)[:, None]


def position_weights(num_drafts: int, decay: float, device: torch.device | None = None) -> Tensor:
    """w_k = exp(-k / decay), k counted from the first drafted token (paper 4.2): [N]."""
    return torch.exp(-torch.arange(num_drafts, dtype=torch.float32, device=device) / decay)
