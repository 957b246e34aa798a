"""Blocks around anchors: where they may stand, what they see, what they predict."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from domino_spec.training.anchors import block_mask, block_positions, gather_blocks, position_weights, sample_anchors
from domino_spec.training.blocks import forward_blocks
from tests.tiny import MemoryCache, as_sequences, assert_close, random_prompts, tiny_draft


def test_anchors_are_distinct_ascending_and_leave_a_label():
    generator = torch.Generator().manual_seed(0)
    for prompt, length, count in [(5, 30, 8), (5, 30, 1000), (1, 3, 5), (7, 9, 4)]:
        anchors = sample_anchors(prompt, length, count, generator)
        assert anchors.min() >= prompt - 1 and anchors.max() <= length - 2
        assert (anchors.diff() > 0).all()
        assert len(anchors) == min(count, length - prompt)


def test_every_allowed_anchor_is_sampled():
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([sample_anchors(4, 12, 2, generator) for _ in range(200)]).unique()
    assert seen.tolist() == list(range(3, 11))


def test_labels_are_the_tokens_after_the_anchor_and_stop_at_the_end():
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 0, 0]])
    blocks = gather_blocks(tokens, torch.tensor([6, 4]), torch.tensor([[0, 3], [2, 0]]), torch.tensor([2, 1]), 3)
    assert blocks.tokens[0].tolist() == [[10, 11, 12], [13, 14, 15]]
    assert blocks.labels[0, 0].tolist() == [11, 12, 13]
    assert blocks.labels[0, 1, :2].tolist() == [14, 15]
    assert blocks.valid[0].tolist() == [[True, True, True], [True, True, False]]
    assert blocks.labels[1, 0, :1].tolist() == [23]
    assert blocks.valid[1].tolist() == [[True, False, False], [False, False, False]], "padding is no block"


def test_mask_is_the_context_before_the_anchor_and_the_own_block(target):
    config = tiny_draft(target).config
    anchors, rows, size = torch.tensor([[0, 4, 2]]), 6, config.block_size
    mask = block_mask(anchors, rows, config)
    assert mask.shape == (1, 1, 3 * size, rows + 3 * size)
    for query in range(3 * size):
        block = query // size
        for key in range(rows + 3 * size):
            own = key >= rows and (key - rows) // size == block
            before = key < rows and key < anchors[0, block]
            assert mask[0, 0, query, key] == (own or before)
    assert block_positions(anchors, config)[0].tolist() == [a + s for a in (0, 4, 2) for s in range(size)]


def test_position_weights_decay_from_the_first_draft():
    assert_close(position_weights(4, 7.0), torch.tensor([0.0, -1 / 7, -2 / 7, -3 / 7]).exp())


@pytest.fixture(scope="module")
def batch_and_draft(target):
    draft = tiny_draft(target)
    sequences = as_sequences(random_prompts([4, 6]), random_prompts([20, 14], seed=5))
    return MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences), draft


ANCHORS = [torch.tensor([3, 8, 15]), torch.tensor([7, 9])]


@torch.inference_mode()
def test_a_block_does_not_see_other_blocks(batch_and_draft):
    batch, draft = batch_and_draft
    together = forward_blocks(draft, batch, ANCHORS)
    for s, anchors in enumerate(ANCHORS):
        for a, anchor in enumerate(anchors):
            alone = [torch.tensor([0]), torch.tensor([0])]
            alone[s] = anchor[None]
            drafted = forward_blocks(draft, batch, alone)
            assert_close(drafted.hidden[s, 0], together.hidden[s, a])
            assert_close(drafted.low_rank[s, 0], together.low_rank[s, a])


@torch.inference_mode()
def test_a_block_sees_the_context_strictly_before_its_anchor(batch_and_draft):
    batch, draft = batch_and_draft
    before = forward_blocks(draft, batch, ANCHORS).hidden
    for row in (7, 8, 9):
        features = batch.features.clone()
        features[:, row] += 3.0
        after = forward_blocks(draft, dataclasses.replace(batch, features=features), ANCHORS).hidden
        for s, anchors in enumerate(ANCHORS):
            for a, anchor in enumerate(anchors.tolist()):
                moved = (after[s, a] - before[s, a]).abs().max()
                if anchor <= row:
                    assert moved == 0, f"block at {anchor} saw row {row}"
                else:
                    assert moved > 1e-3, f"block at {anchor} did not see row {row}"


@torch.inference_mode()
def test_padding_changes_nothing(batch_and_draft):
    batch, draft = batch_and_draft
    wider = dataclasses.replace(
        batch,
        tokens=torch.nn.functional.pad(batch.tokens, (0, 5), value=7),
        features=torch.nn.functional.pad(batch.features, (0, 0, 0, 5), value=9.0),
    )
    plain, padded = (forward_blocks(draft, b, ANCHORS) for b in (batch, wider))
    assert_close(padded.hidden, plain.hidden)
    assert torch.equal(padded.blocks.valid, plain.blocks.valid)
    assert torch.equal(padded.choices[plain.blocks.valid], plain.choices[plain.blocks.valid])


@torch.inference_mode()
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_pure_prefix_has_no_correction(target, prefix):
    draft = tiny_draft(target, prefix=prefix)
    sequences = as_sequences(random_prompts([4]), random_prompts([20], seed=5))
    batch = MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences)
    low_rank = forward_blocks(draft, batch, [torch.tensor([3, 8])]).low_rank
    assert not low_rank[:, :, :prefix].any()
    assert (low_rank[:, :, prefix:].abs().sum(-1) > 0).all()


@torch.inference_mode()
def test_labels_outside_the_draft_vocabulary_are_marked(target):
    ids = torch.arange(0, 60, 2)
    draft = tiny_draft(target, draft_vocab_ids=ids)
    sequences = as_sequences(random_prompts([4]), random_prompts([20], seed=5))
    batch = MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences)
    drafted = forward_blocks(draft, batch, [torch.tensor([3, 8])])
    odd = drafted.blocks.labels % 2 == 1
    assert odd.any() and (~odd).any()
    assert torch.equal(drafted.choices == -1, odd)
    assert torch.equal(ids[drafted.choices[~odd]], drafted.blocks.labels[~odd])
