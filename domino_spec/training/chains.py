"""Training passes of EAGLE-3 and DART over the same anchors as the block drafts: equal text, equal labels, equal loss.

The pair whose token is an anchor starts a chain, which sees the pairs before it and no other chain.

EAGLE-3's training-time test (arXiv 2503.01840) runs the chain on its own outputs: step i takes the output of step i - 1
for its feature and the text's next token, and attends to the text's pairs before the chain and to the chain itself.
That is what its published form computes at every position of a text; here it is computed at the anchors alone, which
saves seven passes over text that has no label. DART's masked positions follow the pair and see it causally.

Shapes: A blocks, N drafted tokens, T tokens of all sequences packed together, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from domino_spec.draft.backbone import Attend, grouped_attention
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.training.attention import neighbouring
from domino_spec.training.data import Batch

if TYPE_CHECKING:
    from domino_spec.training.blocks import Blocks


def forward_chains(draft: SingleLayerDraft, batch: Batch, blocks: Blocks) -> Tensor:
    """What the LM head reads for every drafted token: hidden states [A, N, H], after the final norm.

    Args:
        draft: bound to its target.
        batch: packed sequences with features, on the draft's device.
        blocks: of the batch. A block at position 0 has no feature before it: its labels must not count.
    """
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    positions = rows - batch.starts[torch.searchsorted(batch.starts, rows, right=True) - 1]
    fused = draft.fuse(batch.features[None, :, : draft.config.feature_size])
    pairs = draft.pair(batch.tokens.roll(-1)[None], fused)  # the last pair of a sequence is not used
    context = draft.keys_values(pairs, positions[None])
    first = torch.maximum(blocks.anchors - 1, blocks.starts)  # the pair whose token is the anchor
    visible = _Visible(blocks, first, len(rows))
    out = run_chains(draft, blocks, fused[:, first], pairs[:, first], positions[first], context, visible)
    return draft.final_hidden(out)


def run_chains(
    draft: SingleLayerDraft,
    blocks: Blocks,
    residual: Tensor,
    pairs: Tensor,
    positions: Tensor,
    cached: PairKV,
    visible: _Visible,
) -> Tensor:
    """The layer's outputs [A, N, H] for every drafted token.

    Args:
        draft: EAGLE-3 or DART.
        blocks: of the batch.
        residual: [1, A, H], fused features of each chain's first pair.
        pairs: [1, A, 2H], those pairs.
        positions: [A], their positions.
        cached: keys and values of the text's pairs.
        visible: attention of the chains.
    """
    run = _eagle3 if draft.kind == "eagle3" else _dart
    return run(draft, blocks, residual, pairs, positions, cached, visible, blocks.tokens.shape[1])


def _eagle3(
    draft: SingleLayerDraft,
    blocks: Blocks,
    residual: Tensor,
    pairs: Tensor,
    positions: Tensor,
    cached: PairKV,
    visible: _Visible,
    num_drafts: int,
) -> Tensor:
    outputs = []
    for step in range(num_drafts):
        out, new = draft(pairs, residual, (positions + step)[None], cached, visible.steps(step + 1))
        outputs.append(out[0])
        if step + 1 < num_drafts:
            cached = PairKV(*(torch.cat(parts, dim=2) for parts in zip(cached, new, strict=True)))
            residual, pairs = out, draft.pair(blocks.tokens[None, :, step + 1], out)
    return torch.stack(outputs, dim=1)


def _dart(
    draft: SingleLayerDraft,
    blocks: Blocks,
    residual: Tensor,
    pairs: Tensor,
    positions: Tensor,
    cached: PairKV,
    visible: _Visible,
    num_drafts: int,
) -> Tensor:
    count = len(blocks.anchors)
    masks, mask_residual = draft.mask_pairs(count, num_drafts - 1)
    pairs = torch.cat((pairs[0, :, None], masks.to(pairs.dtype)), dim=1).flatten(0, 1)[None]
    residual = torch.cat((residual[0, :, None], mask_residual.to(residual.dtype)), dim=1).flatten(0, 1)[None]
    slots = positions[:, None] + torch.arange(num_drafts, device=positions.device)
    out, _ = draft(pairs, residual, slots.flatten()[None], cached, visible.slots(num_drafts))
    return out[0].unflatten(0, (count, num_drafts))


class _Visible:
    """Attention of chains: the text's pairs before a chain, and the chain itself, in chunks of neighbouring chains.

    Args:
        blocks: of the batch.
        first: [A], row of each chain's first pair.
        context_rows: T.
    """

    def __init__(self, blocks: Blocks, first: Tensor, context_rows: int) -> None:
        self._first, self._starts, self._rows = first, blocks.starts, context_rows

    def steps(self, count: int) -> Attend:
        """For queries [A] of the last of `count` steps; keys hold T pairs and then every step's [A]."""
        blocks = len(self._first)

        def chain(keys: Tensor, part: slice) -> Tensor:
            return keys[:, :, self._rows :].unflatten(2, (count, blocks))[:, :, :, part].flatten(2, 3)

        def mask(size: int) -> Tensor:
            return torch.eye(size, dtype=torch.bool, device=self._first.device).repeat(1, count)

        return lambda query, key, value: self._attend(query, key, value, 1, chain, mask)

    def slots(self, count: int) -> Attend:
        """For queries of A blocks of `count` causal slots; keys hold T pairs and then those slots."""

        def chain(keys: Tensor, part: slice) -> Tensor:
            return keys[:, :, self._rows + part.start * count : self._rows + part.stop * count]

        def mask(size: int) -> Tensor:
            causal = torch.ones(count, count, dtype=torch.bool, device=self._first.device).tril()
            return torch.block_diag(*[causal] * size).bool()

        return lambda query, key, value: self._attend(query, key, value, count, chain, mask)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: int,
        chain: Callable[[Tensor, slice], Tensor],
        chain_mask: Callable[[int], Tensor],
    ) -> Tensor:
        outputs = []
        for part, context in neighbouring(self._first, self._starts, slots):
            before = torch.arange(context.start, context.stop, device=query.device) < self._first[part, None]
            mask = torch.cat((before.repeat_interleave(slots, dim=0), chain_mask(part.stop - part.start)), dim=1)
            keys, values = (torch.cat((x[:, :, context], chain(x, part)), dim=2) for x in (key, value))
            queries = query[:, :, part.start * slots : part.stop * slots]
            outputs.append(grouped_attention(queries, keys, values, mask[None, None]))
        return torch.cat(outputs, dim=2)
