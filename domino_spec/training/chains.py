"""Training passes of EAGLE-3 and DART over the same anchors as the block drafts: equal text, equal labels, equal loss.

The pair whose token is an anchor starts a chain: it sees the pairs before it, and nobody else's chain.

EAGLE-3's training-time test (arXiv 2503.01840) runs the chain on its own outputs: step i takes the output of step i - 1
for its feature and the text's next token, and attends to the text's pairs before the chain and to the chain itself.
That is what its published form computes at every position of a text; here it is computed at the anchors alone, which
spares seven passes over text that has no label. DART's masked positions follow the pair and see it causally.

Shapes: A blocks, N drafted tokens, T tokens of all sequences packed together, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import replace

import torch
from torch import Tensor

from domino_spec.draft.backbone import Attend, grouped_attention
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.training.anchors import Blocks, gather_blocks
from domino_spec.training.attention import CHUNK_SLOTS
from domino_spec.training.features import Batch


def forward_chains(
    draft: SingleLayerDraft, batch: Batch, anchors: SequenceType[Tensor], block_size: int | None = None
) -> tuple[Tensor, Blocks]:
    """What the LM head reads for every drafted token.

    Args:
        draft: bound to its target.
        batch: packed sequences with features, on the draft's device.
        anchors: positions of each sequence's blocks. One at position 0 has no feature before it, and so no valid label.
        block_size: drafts in a row, where training runs fewer than the draft's.

    Returns:
        Hidden states [A, N, H], after the final norm, and the blocks.
    """
    config = draft.config if block_size is None else replace(draft.config, block_size=block_size)
    blocks = gather_blocks(batch, anchors, config.max_drafts)
    blocks = replace(blocks, valid=blocks.valid & (blocks.positions > 0)[:, None])
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)
    positions = rows - batch.starts[torch.searchsorted(batch.starts, rows, right=True) - 1]
    fused = draft.fuse(batch.features[None, :, : config.feature_size])
    pairs = draft.pair(batch.tokens.roll(-1)[None], fused)  # the last pair of a sequence is nobody's
    context = draft.keys_values(pairs, positions[None])
    first = torch.maximum(blocks.anchors - 1, blocks.starts)  # the pair whose token is the anchor
    visible = _Visible(blocks, first, len(rows))
    run = _eagle3 if config.kind == "eagle3" else _dart
    out = run(draft, blocks, fused[:, first], pairs[:, first], positions[first], context, visible, config.max_drafts)
    return draft.final_hidden(out), blocks


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

        def own(keys: Tensor, part: slice) -> Tensor:
            return keys[:, :, self._rows :].unflatten(2, (count, blocks))[:, :, :, part].flatten(2, 3)

        def mask(size: int) -> Tensor:
            return torch.eye(size, dtype=torch.bool, device=self._first.device).repeat(1, count)

        return lambda query, key, value: self._attend(query, key, value, 1, own, mask)

    def slots(self, count: int) -> Attend:
        """For queries of A blocks of `count` causal slots; keys hold T pairs and then those slots."""

        def own(keys: Tensor, part: slice) -> Tensor:
            return keys[:, :, self._rows + part.start * count : self._rows + part.stop * count]

        def mask(size: int) -> Tensor:
            causal = torch.ones(count, count, dtype=torch.bool, device=self._first.device).tril()
            return torch.block_diag(*[causal] * size).bool()

        return lambda query, key, value: self._attend(query, key, value, count, own, mask)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: int,
        own: Callable[[Tensor, slice], Tensor],
        own_mask: Callable[[int], Tensor],
    ) -> Tensor:
        outputs = []
        for part, context in self._chunks(slots):
            before = torch.arange(context.start, context.stop, device=query.device) < self._first[part, None]
            mask = torch.cat((before.repeat_interleave(slots, dim=0), own_mask(part.stop - part.start)), dim=1)
            keys, values = (torch.cat((x[:, :, context], own(x, part)), dim=2) for x in (key, value))
            queries = query[:, :, part.start * slots : part.stop * slots]
            outputs.append(grouped_attention(queries, keys, values, mask[None, None]))
        return torch.cat(outputs, dim=2)

    def _chunks(self, slots: int) -> list[tuple[slice, slice]]:
        """Neighbouring blocks of one sequence, and the context that they can see."""
        first, starts = self._first.tolist(), self._starts.tolist()
        size, begin, found = max(1, CHUNK_SLOTS // slots), 0, []
        for end in range(1, len(first) + 1):
            if end < len(first) and end - begin < size and starts[end] == starts[begin]:
                continue
            found.append((slice(begin, end), slice(starts[begin], max(first[begin:end]))))
            begin = end
        return found
