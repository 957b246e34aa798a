"""Blocks around anchors: where they may stand, what they see, what they predict and what each token weighs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from domino_spec.training.blocks import (
    acceptance_weights,
    forward_blocks,
    gather_blocks,
    position_weights,
    sample_anchors,
)
from domino_spec.training.data import pack_batch
from tests.tiny import (
    MemoryCache,
    as_sequences,
    assert_close,
    block_rows,
    conversation,
    random_prompts,
    tiny_draft,
)


def test_anchors_are_distinct_ascending_and_leave_a_label():
    generator = torch.Generator().manual_seed(0)
    for prompt, length, count in [(5, 30, 8), (5, 30, 1000), (1, 3, 5), (7, 9, 4)]:
        (sequence,) = as_sequences([[0] * prompt], [[0] * (length - prompt)])
        anchors = sample_anchors(sequence, count, generator)
        assert anchors.min() >= prompt - 1 and anchors.max() <= length - 2
        assert (anchors.diff() > 0).all()
        assert len(anchors) == min(count, length - prompt)


def test_every_allowed_anchor_is_sampled():
    generator = torch.Generator().manual_seed(0)
    (sequence,) = as_sequences([[0] * 4], [[0] * 8])
    seen = torch.cat([sample_anchors(sequence, 2, generator) for _ in range(200)]).unique()
    assert seen.tolist() == list(range(3, 11))


def test_anchors_of_a_conversation_are_followed_by_a_token_of_some_answer():
    sequence = conversation("c", [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 10], [11, 12])])
    assert sequence.tokens.tolist() == list(range(1, 13))
    assert sequence.answers == ((2, 5), (6, 7), (10, 12))
    anchors = sample_anchors(sequence, 100, torch.Generator().manual_seed(0))
    assert (sequence.tokens[anchors] + 1).tolist() == [3, 4, 5, 7, 11, 12], "these tokens follow, and are answers'"


def gathered(sequences, anchors, num_drafts):
    """Blocks of sequences whose features do not matter."""
    batch = pack_batch(sequences, [torch.zeros(len(s.tokens), 1) for s in sequences])
    return gather_blocks(batch, [torch.tensor(a) for a in anchors], num_drafts)


def test_labels_are_the_tokens_after_the_anchor_and_stop_at_the_end():
    sequences = as_sequences([[10, 11], [20]], [[12, 13, 14, 15], [21, 22, 23]])
    blocks = gathered(sequences, [[1, 3], [2]], 3)
    assert blocks.tokens[0].tolist() == [11, 12, 13] and blocks.tokens[1].tolist() == [13, 14, 15]
    assert blocks.labels[0].tolist() == [12, 13, 14]
    assert blocks.labels[1, :2].tolist() == [14, 15]
    assert blocks.labels[2, :1].tolist() == [23]
    assert blocks.valid.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert blocks.anchors.tolist() == [1, 3, 8] and blocks.starts.tolist() == [0, 0, 6]
    assert blocks.positions.tolist() == [1, 3, 2], "counted from the start of the own sequence"


def test_labels_never_come_from_the_next_sequence_of_the_pack():
    """Not even where that one has a prompt of a single token, and starts right behind."""
    blocks = gathered(as_sequences([[1], [4]], [[2, 3], [5, 6, 7]]), [[0, 1], [0, 2]], 4)
    assert blocks.valid.sum(-1).tolist() == [2, 1, 3, 1]
    assert blocks.labels[blocks.valid].tolist() == [2, 3, 3, 5, 6, 7, 7]


def test_labels_stop_at_the_end_of_their_turn():
    """The user's next question is not what the target says, and the answer after it is not what follows."""
    sequence = conversation("c", [([1, 2], [3, 4, 5]), ([6], [7, 8])])
    anchors = sequence.anchors.tolist()
    blocks = gathered([sequence], [anchors], 4)
    labels = {a: row[ok].tolist() for a, row, ok in zip(anchors, blocks.labels, blocks.valid, strict=True)}
    assert labels == {1: [3, 4, 5], 2: [4, 5], 3: [5], 5: [7, 8], 6: [8]}


def test_position_weights_decay_from_the_first_draft():
    assert_close(position_weights(4, 7.0), torch.tensor([0.0, -1 / 7, -2 / 7, -3 / 7]).exp())


CONFIDENCE = torch.tensor([[0.5, 0.2, 1.0]])
"""Of one block; a floor of one half makes it 0.75, 0.6 and 1, whose products are 0.75, 0.45 and 0.45."""


def test_acceptance_weights_of_a_block_of_three():
    weights = acceptance_weights(CONFIDENCE, torch.tensor([[True, True, True]]), 0.5)
    assert_close(weights, torch.tensor([[0.75 + 0.45 + 0.45, 0.45 + 0.45, 0.45]]))
    # Without its third label a block is one of two.
    weights = acceptance_weights(CONFIDENCE, torch.tensor([[True, True, False]]), 0.5)
    assert_close(weights, torch.tensor([[0.75 + 0.45, 0.45, 0.0]]))
    # A floor of 1 leaves no confidence: every token weighs as many tokens as hang on it.
    assert acceptance_weights(CONFIDENCE, torch.ones(1, 3).bool(), 1.0).tolist() == [[3, 2, 1]]


def test_acceptance_weights_say_what_the_accepted_length_owes_to_each_token():
    """They are the derivative of the expected length, sum_m c_1 .. c_m, with respect to every log c_k."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(20, 6, generator=generator)
    lengths = torch.randint(0, 7, (20,), generator=generator)
    valid = torch.arange(6) < lengths[:, None]
    log = (0.3 + 0.7 * confidence).log().requires_grad_()
    expected_length = sum(log[:, :m].sum(-1).exp() * valid[:, m - 1] for m in range(1, 7))
    (gradient,) = torch.autograd.grad(expected_length.sum(), log)
    weights = acceptance_weights(confidence, valid, 0.3)
    assert_close(weights, gradient)
    assert not weights[~valid].any() and (weights[valid] > 0).all()


def test_acceptance_weights_pass_no_gradient_on():
    assert not acceptance_weights(CONFIDENCE.clone().requires_grad_(), torch.ones(1, 3).bool(), 0.5).requires_grad


@pytest.fixture(scope="module")
def batch_and_draft(target):
    draft = tiny_draft(target)
    sequences = as_sequences(random_prompts([4, 6]), random_prompts([20, 14], seed=5))
    return MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences), draft


ANCHORS = [torch.tensor([3, 8, 15]), torch.tensor([7, 9])]
NO_ANCHORS = torch.tensor([], dtype=torch.long)


@torch.inference_mode()
def test_a_block_does_not_see_other_blocks(batch_and_draft):
    batch, draft = batch_and_draft
    together = forward_blocks(draft, batch, ANCHORS)
    for row, (s, anchor) in enumerate(block_rows(ANCHORS)):
        alone = [NO_ANCHORS, NO_ANCHORS]
        alone[s] = torch.tensor([anchor])
        drafted = forward_blocks(draft, batch, alone)
        assert_close(drafted.hidden[0], together.hidden[row])
        assert_close(drafted.low_rank[0], together.low_rank[row])


@torch.inference_mode()
def test_a_block_sees_the_context_strictly_before_its_anchor(batch_and_draft):
    batch, draft = batch_and_draft
    before = forward_blocks(draft, batch, ANCHORS).hidden
    for position in (7, 8, 9):
        features = batch.features.clone()
        features[batch.starts[:-1] + position] += 3.0
        after = forward_blocks(draft, dataclasses.replace(batch, features=features), ANCHORS).hidden
        for row, (_, anchor) in enumerate(block_rows(ANCHORS)):
            moved = (after[row] - before[row]).abs().max()
            if anchor <= position:
                assert moved == 0, f"block at {anchor} saw position {position}"
            else:
                assert moved > 1e-3, f"block at {anchor} did not see position {position}"


@torch.inference_mode()
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_pure_prefix_has_no_correction(target, prefix):
    draft = tiny_draft(target, prefix=prefix)
    sequences = as_sequences(random_prompts([4]), random_prompts([20], seed=5))
    batch = MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences)
    low_rank = forward_blocks(draft, batch, [torch.tensor([3, 8])]).low_rank
    assert not low_rank[:, :prefix].any()
    assert (low_rank[:, prefix:].abs().sum(-1) > 0).all()


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
