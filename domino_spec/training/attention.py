"""Attention of many blocks side by side: each sees its own sequence strictly before its anchor, and itself.

The features of the anchor itself do not exist while decoding, so they are hidden here; other blocks and other sequences
of the same pack are hidden too (docs/design.md, sections 4 and 6). Two forms compute the same: `SlicedAttention` hands
chunks of neighbouring blocks, with just the context that they can see, to PyTorch's attention; `FlexibleAttention`
hands the whole pack to FlexAttention on CUDA, which skips hidden tiles. Neither holds all pairs of slots and context.

Shapes: A blocks, B slots, T context rows, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from domino_spec.draft.backbone import Attend, fold_mask, folded_attention
from domino_spec.settings import UserError

if TYPE_CHECKING:
    from domino_spec.training.blocks import Blocks

CHUNK_SLOTS = 256
"""Slots that share one attention call of `SlicedAttention`: more of them read the context less often, but each is
also compared with the slots of the chunk's other blocks, only to be masked."""


def neighbouring(ends: Tensor, starts: Tensor, block_size: int) -> list[tuple[slice, slice]]:
    """Chunks of neighbouring blocks of one sequence, and the context rows that a chunk can see.

    Args:
        ends: [A], each block sees the rows before this one; ascending.
        starts: [A], first row of each block's sequence.
        block_size: B; a chunk has at most `CHUNK_SLOTS` slots, or one block.
    """
    last, begins = ends.tolist(), starts.tolist()
    size, first, chunks = max(1, CHUNK_SLOTS // block_size), 0, []
    for end in range(1, len(last) + 1):
        if end < len(last) and end - first < size and begins[end] == begins[first]:
            continue
        chunks.append((slice(first, end), slice(begins[first], max(last[first:end]))))
        first = end
    return chunks


class _Chunk(NamedTuple):
    slots: slice
    context: slice
    mask: Tensor
    """[1, 1, slots, context + slots], added to the scores: 0 or minus infinity; later folded (`fold_mask`)."""


class SlicedAttention:
    """Exact attention in chunks of neighbouring blocks of one sequence, on any device.

    Args:
        blocks: of the batch.
        block_size: B.
        context_rows: T.
    """

    def __init__(self, blocks: Blocks, block_size: int, context_rows: int) -> None:
        self._rows = context_rows
        self._folded = False
        self._chunks: list[_Chunk] = []
        device = blocks.anchors.device
        for part, context in neighbouring(blocks.anchors, blocks.starts, block_size):
            before = torch.arange(context.start, context.stop, device=device) < blocks.anchors[part, None]
            block = torch.arange(part.stop - part.start, device=device).repeat_interleave(block_size)
            same = block[:, None] == block
            hidden = ~torch.cat((before[block], same), dim=1)[None, None]
            slots = slice(part.start * block_size, part.stop * block_size)
            self._chunks.append(_Chunk(slots, context, hidden.float().masked_fill_(hidden, -torch.inf)))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Attend`, with one request: n is A * B."""
        if not self._folded:  # once for all layers, which then keep one mask for the backward pass
            self._folded = True
            masks = [fold_mask(chunk.mask.to(query.dtype), query, key) for chunk in self._chunks]
            self._chunks = [chunk._replace(mask=mask) for chunk, mask in zip(self._chunks, masks, strict=True)]
        outputs = [query[:, :, :0]]
        for slots, context, mask in self._chunks:
            block = slice(self._rows + slots.start, self._rows + slots.stop)
            keys, values = (torch.cat((x[:, :, context], x[:, :, block]), dim=2) for x in (key, value))
            outputs.append(folded_attention(query[:, :, slots], keys, values, mask))
        return torch.cat(outputs, dim=2)


class FlexibleAttention:
    """The same in one call of FlexAttention, compiled on CUDA.

    Args:
        blocks: of the batch.
        block_size: B.
        context_rows: T.
    """

    def __init__(self, blocks: Blocks, block_size: int, context_rows: int) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        anchors, starts = blocks.anchors, blocks.starts

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block = query // block_size
            before = (key >= starts[block]) & (key < anchors[block])
            same = (key - context_rows) // block_size == block
            return torch.where(key < context_rows, before, same)

        slots, device = len(anchors) * block_size, anchors.device.type
        compiled = device == "cuda"  # elsewhere a dense mask is built first, and attention is slow: for tests
        self._mask = create_block_mask(visible, None, None, slots, context_rows + slots, device, _compile=compiled)
        self._attend = _flex_attention(compiled)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Attend`, with one request: n is A * B."""
        return self._attend(query, key, value, block_mask=self._mask, enable_gqa=True)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention

    attend: Callable[..., Tensor] = flex_attention.flex_attention  # type: ignore[assignment]
    return torch.compile(attend, dynamic=True) if compiled else attend


def block_attention(kind: str, blocks: Blocks, block_size: int, context_rows: int) -> Attend:
    """The form that a recipe's `attention` names: auto, flex or sdpa.

    Raises:
        UserError: training with flex on CPU, where it has no backward pass.
    """
    device = blocks.anchors.device.type
    if kind == "auto":
        kind = "flex" if device == "cuda" else "sdpa"
    if kind == "flex":
        if device == "cpu" and torch.is_grad_enabled():
            raise UserError("training with attention flex needs CUDA; set training.attention to auto or sdpa")
        return FlexibleAttention(blocks, block_size, context_rows)
    return SlicedAttention(blocks, block_size, context_rows)
