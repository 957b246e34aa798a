"""The C twin of `reference.head_rollout` and `trees.head_tree`, over the loops in rollout.c: one call for a block.

Most of a block's drafting on CPU was not arithmetic: a dozen small PyTorch functions for each draft, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from domino_spec.ops.embedding import EmbeddingTable
from domino_spec.ops.native import bindings
from domino_spec.ops.native import steps as cpu
from domino_spec.ops.reference import Rollout
from domino_spec.ops.trees import Tree, depth_widths

if TYPE_CHECKING:
    from domino_spec.draft.domino import DominoHead


def takes(
    head: DominoHead | None, hidden: Tensor, base_logits: Tensor, embed_choice: Callable[[Tensor], Tensor]
) -> bool:
    """Whether the functions below can draft this block: float32 on CPU, widths that fit, and no gradient asked for."""
    given = (hidden, base_logits)
    if not all(x.dtype == torch.float32 and cpu.is_available(x.device, x.dtype) for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    if head is None:
        return True
    if not isinstance(embed_choice, EmbeddingTable):
        return False
    ids = embed_choice.token_ids
    if ids is not None and (ids.dtype != torch.int64 or ids.device != hidden.device or not ids.is_contiguous()):
        return False
    weights = (*_weights(head), embed_choice.weight)
    floats = all(x.dtype == torch.float32 and x.device == hidden.device and x.is_contiguous() for x in weights)
    widths = (hidden.shape[-1], head.config.gru_hidden_dim, head.config.low_rank)
    return floats and embed_choice.dtype == torch.float32 and all(map(cpu.fits, widths))


def head_rollout_cpu(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None = None,
    temperature: float | Tensor = 0.0,
    uniform: Tensor | None = None,
    min_confidence: float = 0.0,
) -> Rollout:
    """`reference.head_rollout`, with the same arguments, where `takes` says yes."""
    requests, depths, width = base_logits.shape
    temperatures = None
    if uniform is not None:
        if not isinstance(temperature, Tensor):
            temperature = torch.full((requests,), float(temperature))
        temperatures = bindings.spread("head_rollout", "temperature", temperature.float(), (requests,))
    grown = _grow(
        head, hidden, base_logits, anchor_embedding, embed_choice, candidates, [1] * depths, min_confidence,
        temperatures, uniform,
    )  # fmt: skip
    number = grown.choices.shape[1]
    confidence = grown.scores.exp() if min_confidence > 0 else None
    if grown.probs is None or number == 0:
        return Rollout(grown.choices, None, None, confidence)
    ids = torch.arange(width).expand(requests, depths, width) if grown.ids is None else grown.ids
    return Rollout(grown.choices, ids[:, :number], grown.probs[:, :number], confidence)


def head_tree_cpu(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
    budget: int,
    width: int | None,
    min_confidence: float = 0.0,
) -> Tree:
    """`trees.head_tree` without a depth penalty, with the same arguments, where `takes` says yes."""
    depths, vocabulary = base_logits.shape[1:]
    widths = depth_widths(depths, min(candidates or math.inf, vocabulary), budget, width)
    grown = _grow(
        head, hidden[:, : len(widths)], base_logits[:, : len(widths)], anchor_embedding, embed_choice, candidates,
        widths, min_confidence, budget=budget,
    )  # fmt: skip
    longest = grown.choices.shape[1] if min_confidence == 0 else int(grown.num_drafts.max())
    number = min(budget, longest)
    return Tree(grown.choices[:, :number], grown.parents[:, :number], grown.num_drafts, grown.scores[:, :number])


@dataclass(frozen=True)
class _Grown:
    """Prefixes of all depths, and what sampled chains were drawn from."""

    choices: Tensor
    """[R, M], indices into the logits, depth by depth."""
    parents: Tensor
    """[R, M], as in `Tree`."""
    scores: Tensor
    """[R, M], log probabilities; those of the most probable tokens where chains are sampled."""
    num_drafts: Tensor
    """[R], how many are left of the M where there is a budget."""
    ids: Tensor | None
    """[R, depths, K], candidates; None where all are."""
    probs: Tensor | None
    """[R, depths, K]; None where nothing is sampled."""


def _grow(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
    widths: list[int],
    min_confidence: float,
    temperatures: Tensor | None = None,
    uniform: Tensor | None = None,
    budget: int = 0,
) -> _Grown:
    requests, depths, vocabulary = base_logits.shape
    number = vocabulary if candidates is None else min(candidates, vocabulary)
    choices, parents = torch.empty(2, requests, sum(widths), dtype=torch.long).unbind()
    scores, num_drafts = torch.empty(requests, sum(widths)), torch.zeros(requests, dtype=torch.long)
    ids = torch.empty(requests, depths, number, dtype=torch.long) if number < vocabulary else None
    probs = None if uniform is None else torch.empty(requests, depths, number)
    table = (
        embed_choice if isinstance(embed_choice, EmbeddingTable) else None
    )  # `takes` asks for one if there is a head
    kept = bindings.head_rollout(
        slots=hidden.contiguous(),
        logits=base_logits.contiguous(),
        anchors=anchor_embedding.contiguous(),
        head=None if head is None else _weights(head),
        embeddings=None if table is None else table.weight,
        token_ids=None if table is None else table.token_ids,
        scale=1.0 if table is None else table.scale,
        pure_prefix=0 if head is None else head.config.pure_draft_prefix_len,
        threshold=math.log(min_confidence) if min_confidence > 0 else -math.inf,
        widths=widths,
        temperatures=temperatures,
        uniform=None if uniform is None else uniform.contiguous(),
        choices=choices,
        parents=parents,
        scores=scores,
        budget=budget,
        num_drafts=num_drafts,
        ids=ids,
        probs=probs,
    )
    total = sum(kept)
    return _Grown(choices[:, :total], parents[:, :total], scores[:, :total], num_drafts, ids, probs)


def _weights(head: DominoHead) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gru = head.prefix_gru
    return gru.weight_ih_l0, gru.weight_hh_l0, head.input_weight, head.correction_weight
