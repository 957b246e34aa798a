"""Attention over anchors is one dense masked attention, cut into pieces that stay small; nothing leaks in a pack."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from domino_spec.settings import UserError
from domino_spec.training import attention
from domino_spec.training.attention import FlexibleAttention, SlicedAttention, block_attention
from domino_spec.training.blocks import Blocks, DraftedTokens, forward_blocks, gather_blocks, sample_anchors
from domino_spec.training.data import pack_batch
from tests.tiny import MemoryCache, as_sequences, assert_close, random_prompts, tiny_draft

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # as it is on CPU

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4, 2, 8, 3
LENGTHS = [9, 4, 14, 6]
ANCHORS = [[0, 3, 4, 7], [2], [5, 6, 7, 8, 9, 12], [0, 1]]
"""Of each sequence; before an anchor at 0 there is no context at all."""


def some_blocks(lengths: list[int], anchors: list[list[int]]) -> Blocks:
    """Blocks of sequences whose tokens do not matter."""
    sequences = as_sequences([[0]] * len(lengths), [[0] * (n - 1) for n in lengths])
    batch = pack_batch(sequences, [torch.zeros(n, 1) for n in lengths])
    return gather_blocks(batch, [torch.tensor(a, dtype=torch.long) for a in anchors], SLOTS)


def inputs(slots: int, rows: int, kv_heads: int = KV_HEADS, grad: bool = True) -> list[torch.Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, slots), (kv_heads, rows + slots), (kv_heads, rows + slots)]
    return [torch.randn(1, *shape, HEAD_DIM, generator=generator).requires_grad_(grad) for shape in shapes]


def dense_attention(lengths, anchors, query, key, value) -> torch.Tensor:
    """Softmax over everything that a slot may see, one slot at a time."""
    first_rows = [sum(lengths[:s]) for s in range(len(lengths))]
    rows, groups = sum(lengths), HEADS // key.shape[1]
    outputs = []
    for block, (start, anchor) in enumerate((f, a) for f, own in zip(first_rows, anchors, strict=True) for a in own):
        seen = [*range(start, start + anchor), *range(rows + block * SLOTS, rows + (block + 1) * SLOTS)]
        for slot in range(block * SLOTS, (block + 1) * SLOTS):
            for head in range(HEADS):
                scores = key[0, head // groups, seen] @ query[0, head, slot] / HEAD_DIM**0.5
                outputs.append(scores.softmax(0) @ value[0, head // groups, seen])
    return torch.stack(outputs).view(1, -1, HEADS, HEAD_DIM).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize("blocks_a_chunk", [1, 2, 3, 5, 100])
def test_chunks_equal_dense_attention_in_value_and_gradient(monkeypatch, blocks_a_chunk, kv_heads):
    monkeypatch.setattr(attention, "CHUNK_SLOTS", blocks_a_chunk * SLOTS)
    blocks, tensors = some_blocks(LENGTHS, ANCHORS), inputs(13 * SLOTS, sum(LENGTHS), kv_heads)
    sliced = SlicedAttention(blocks, SLOTS, sum(LENGTHS))(*tensors)
    dense = dense_attention(LENGTHS, ANCHORS, *tensors)
    assert_close(sliced, dense)
    weight = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    for fast, plain in zip(
        *(torch.autograd.grad((out * weight).sum(), tensors) for out in (sliced, dense)), strict=True
    ):
        assert_close(fast, plain)
        assert plain.abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, KV_HEADS, HEADS])
def test_flexattention_equals_dense_attention(kv_heads):
    """In value; on CPU it has no backward pass."""
    blocks, tensors = some_blocks(LENGTHS, ANCHORS), inputs(13 * SLOTS, sum(LENGTHS), kv_heads, grad=False)
    flexible = FlexibleAttention(blocks, SLOTS, sum(LENGTHS))(*tensors)
    assert_close(flexible, dense_attention(LENGTHS, ANCHORS, *tensors))


def test_flexattention_is_told_of_few_tiles_and_still_equals_chunks():
    """Over many of its tiles of 128 rows and slots, with anchors as they are sampled."""
    generator = torch.Generator().manual_seed(0)
    lengths = [300, 150, 411]
    sequences = as_sequences([[0] * 5] * 3, [[0] * (n - 5) for n in lengths])
    anchors = [sample_anchors(s, 40, generator).tolist() for s in sequences]
    blocks, tensors = some_blocks(lengths, anchors), inputs(120 * SLOTS, sum(lengths), grad=False)
    flexible = FlexibleAttention(blocks, SLOTS, sum(lengths))
    assert flexible._mask.sparsity() > 30, "percent of tiles that need no computing"
    assert_close(flexible(*tensors), SlicedAttention(blocks, SLOTS, sum(lengths))(*tensors))


def test_training_with_flexattention_on_cpu_is_refused_in_one_line():
    with pytest.raises(UserError, match="attention flex needs CUDA"):
        block_attention("flex", some_blocks(LENGTHS, ANCHORS), SLOTS, sum(LENGTHS))


def test_the_form_is_chosen_by_name_and_on_cpu_is_the_exact_one():
    blocks = some_blocks(LENGTHS, ANCHORS)
    with torch.no_grad():
        forms = {kind: type(block_attention(kind, blocks, SLOTS, sum(LENGTHS))) for kind in ("auto", "sdpa", "flex")}
    assert forms == {"auto": SlicedAttention, "sdpa": SlicedAttention, "flex": FlexibleAttention}


@pytest.fixture(scope="module")
def pack(target):
    """A draft, sequences, and their anchors: some sequences have none."""
    draft = tiny_draft(target)
    sequences = as_sequences(random_prompts([4, 6, 3, 5]), random_prompts([20, 14, 9, 17], seed=5))
    anchors = [torch.tensor(a, dtype=torch.long) for a in ([3, 8, 15], [7, 9], [], [4, 5, 6, 20])]
    return draft, MemoryCache(target, sequences, draft.config.target_layer_ids), sequences, anchors


def parts(drafted: DraftedTokens) -> tuple[torch.Tensor, ...]:
    """Hidden states, correction inputs and choices; and which of the latter two mean anything."""
    assert drafted.low_rank is not None
    return drafted.hidden, drafted.low_rank, drafted.choices, drafted.blocks.valid


@pytest.mark.parametrize("kind", ["sdpa", "flex"])
@torch.no_grad()
def test_nothing_leaks_between_the_sequences_of_a_pack(pack, kind):
    """All tokens and features of one sequence are replaced: no other notices, not in a single bit."""
    draft, source, sequences, anchors = pack
    batch = source.batch(sequences)
    before = forward_blocks(draft, batch, anchors, attention=kind)
    owners = torch.arange(4).repeat_interleave(torch.tensor([len(a) for a in anchors]))
    for changed in range(4):
        rows = slice(*batch.starts[changed : changed + 2].tolist())
        tokens, features = batch.tokens.clone(), batch.features.clone()
        tokens[rows] = (tokens[rows] + 7) % 50
        features[rows] = features[rows].flip(0) * 2 + 1
        other = dataclasses.replace(batch, tokens=tokens, features=features)
        after = forward_blocks(draft, other, anchors, attention=kind)
        mine = owners == changed
        assert torch.equal(after.hidden[~mine], before.hidden[~mine])
        assert torch.equal(after.low_rank[~mine], before.low_rank[~mine])
        assert torch.equal(after.blocks.labels[~mine], before.blocks.labels[~mine])
        if mine.any():
            assert (after.hidden[mine] - before.hidden[mine]).abs().amax((1, 2)).min() > 1e-2


@torch.no_grad()
def test_the_order_of_sequences_in_a_pack_does_not_matter(pack):
    draft, source, sequences, anchors = pack
    plain = forward_blocks(draft, source.batch(sequences), anchors)
    order = [2, 3, 0, 1]
    mixed = forward_blocks(draft, source.batch([sequences[i] for i in order]), [anchors[i] for i in order])
    counts = [len(a) for a in anchors]
    hidden, low_rank, choices, valid = (torch.cat([x.split(counts)[i] for i in order]) for x in parts(plain))
    assert_close(mixed.hidden, hidden)
    assert_close(mixed.low_rank[valid], low_rank[valid])
    assert torch.equal(mixed.choices[valid], choices[valid]) and torch.equal(mixed.blocks.valid, valid)


@torch.no_grad()
def test_a_pack_equals_its_sequences_one_by_one(pack):
    draft, source, sequences, anchors = pack
    together = forward_blocks(draft, source.batch(sequences), anchors)
    pairs = [(s, a) for s, a in zip(sequences, anchors, strict=True) if len(a)]
    alone = [parts(forward_blocks(draft, source.batch([s]), [a])) for s, a in pairs]
    hidden, low_rank, choices, valid = (torch.cat(x) for x in zip(*alone, strict=True))
    assert_close(together.hidden, hidden)
    assert_close(together.low_rank[valid], low_rank[valid])
    assert torch.equal(together.choices[valid], choices[valid]) and torch.equal(together.blocks.valid, valid)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def largest_tensor(sequences: int, blocks_each: int, length: int = 200) -> int:
    """Elements of the largest tensor in one attention, forward and backward."""
    anchors = [torch.linspace(1, length - 2, blocks_each).long().tolist()] * sequences
    blocks = some_blocks([length] * sequences, anchors)
    tensors = inputs(sequences * blocks_each * SLOTS, sequences * length)
    with Largest() as largest:
        SlicedAttention(blocks, SLOTS, sequences * length)(*tensors).sum().backward()
    return largest.elements


def test_memory_grows_with_the_chunk_and_the_data_never_with_their_product(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_SLOTS", 8 * SLOTS)
    for sequences, blocks in ((4, 60), (8, 60), (4, 120)):
        slots, rows = sequences * blocks * SLOTS, sequences * 200
        # Queries, or keys with all that a pass gives them; or the scores of a chunk, one per head, slot and key.
        data = max(HEADS * slots, KV_HEADS * (rows + slots)) * HEAD_DIM
        chunk = HEADS * 8 * SLOTS * (200 + 8 * SLOTS)
        assert largest_tensor(sequences, blocks) <= max(data, chunk) < slots * rows
    monkeypatch.setattr(attention, "CHUNK_SLOTS", 10**9)
    assert largest_tensor(4, 60) > max(data, chunk), "chunks are what keeps it small"


def test_masks_do_not_grow_with_the_number_of_blocks(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_SLOTS", 8 * SLOTS)
    for each in (16, 64, 128):
        anchors = [torch.linspace(1, 198, each).long().tolist()] * 3
        chunks = SlicedAttention(some_blocks([200] * 3, anchors), SLOTS, 600)._chunks
        assert max(chunk.mask.numel() for chunk in chunks) <= 8 * SLOTS * (200 + 8 * SLOTS)
        assert sum(chunk.mask.shape[2] for chunk in chunks) == 3 * each * SLOTS
