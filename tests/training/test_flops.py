"""Counted operations against PyTorch's own counter, which watches a real step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from domino_spec.recipe import OptimizationRecipe
from domino_spec.training import flops
from domino_spec.training.anchors import gather_blocks, sample_anchors
from domino_spec.training.data import Sequence
from domino_spec.training.flops import matrix_rate, step_flops, step_work
from domino_spec.training.step import BlockLoss, tapped_layers
from tests.tiny import MemoryCache, as_sequences, random_prompts, tiny_draft

BLOCK = 5
EVEN_IDS = torch.arange(0, 60, 2)


def angles_are_products(target) -> bool:
    """Whether this transformers computes RoPE's angles by a product of matrices (5.17 does), which no step needs."""
    with FlopCounterMode(display=False) as counter:
        target.decoder.rotary_emb(torch.zeros(()), torch.arange(3)[None])
    return counter.get_total_flops() > 0


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    """Answers longer and shorter than a block, and two of them in one sequence."""
    single = as_sequences(random_prompts([5, 9, 4]), random_prompts([20, 13, 3], seed=9))
    (tokens,) = random_prompts([24], seed=4)
    return [*single, Sequence("two", torch.tensor(tokens), ((4, 9), (15, 22)))]


def anchors_of(sequences: list[Sequence], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [sample_anchors(s, count, generator) for s in sequences]


def watched_step(target, sequences, anchors, recipe: OptimizationRecipe, **draft_options):
    """Operations that PyTorch saw in a forward and backward pass, those of attention, and our count of them."""
    draft = tiny_draft(target, **draft_options).train().requires_grad_(True)
    draft.backbone.requires_grad_(recipe.trained == "all")
    layers = tapped_layers(draft, recipe)
    batch = MemoryCache(target, sequences, layers).batch(sequences)
    loss = BlockLoss(draft, recipe, layers)
    # The counter knows no fused attention of the CPU, but sees the products that the plain one consists of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(batch, anchors, BLOCK, 0.5).loss.backward()
    seen = counter.get_flop_counts()["Global"]
    attention = seen.get(torch.ops.aten.bmm, 0)
    work = step_work(draft.config, sequences, anchors, BLOCK, draft.draft_vocab_ids)
    return counter.get_total_flops(), attention, step_flops(draft.config, recipe, work)


@pytest.mark.parametrize(
    "shift_label, draft_vocab_ids", [(True, None), (False, EVEN_IDS)], ids=["shifted", "unshifted, draft vocabulary"]
)
@pytest.mark.parametrize(
    "head, recipe",
    [
        (True, {}),
        (False, {}),
        (True, dict(objective="kl")),
        (True, dict(position_weights="acceptance")),
        (True, dict(causal_encoder="training_time_test")),
        (False, dict(causal_encoder="training_time_test")),
        (True, dict(trained="head")),
    ],
    ids=str,
)
def test_the_count_is_exactly_what_a_step_does(target, sequences, head, recipe, draft_vocab_ids, shift_label):
    """With one anchor per sequence, where attention computes no score only to mask it."""
    settings = OptimizationRecipe(steps=1, precision="float32", **recipe)
    options = dict(head=head, shift_label=shift_label, draft_vocab_ids=draft_vocab_ids)
    seen, _, counted = watched_step(target, sequences, anchors_of(sequences, 1), settings, **options)
    assert 0 <= seen - counted.total <= (0.001 * seen if angles_are_products(target) else 0)


def test_scores_that_are_masked_do_not_count(target, sequences):
    """Blocks of one sequence share calls of attention, which compare each with the slots of the others."""
    anchors = anchors_of(sequences, 6)
    recipe = OptimizationRecipe(steps=1, precision="float32")
    seen, attention, counted = watched_step(target, sequences, anchors, recipe)
    assert counted.total - counted.attention == seen - attention
    assert 0 < counted.attention < attention
    # Two layers of 4 heads of 16: scores and their sum over values, forward once and backward twice.
    pairs = sum(BLOCK * (position + BLOCK) for part in anchors for position in part.tolist())
    assert counted.attention == 2 * 3 * 2 * 2 * pairs * 4 * 16


def test_labels_are_those_that_training_has(target, sequences):
    anchors = anchors_of(sequences, 50)
    config = tiny_draft(target).config
    batch = MemoryCache(target, sequences, (0, 3)).batch(sequences)
    blocks = gather_blocks(batch, anchors, config.max_drafts)
    work = step_work(config, sequences, anchors, config.block_size)
    assert work.labels == blocks.valid.sum() < blocks.valid.numel()
    proposable = torch.isin(blocks.labels, EVEN_IDS) & blocks.valid
    assert step_work(config, sequences, anchors, config.block_size, EVEN_IDS).labels == proposable.sum()


def test_operations_add_up_over_micro_batches(target, sequences):
    config, recipe = tiny_draft(target).config, OptimizationRecipe(steps=1)
    anchors = anchors_of(sequences, 6)
    whole = step_flops(config, recipe, step_work(config, sequences, anchors, BLOCK))
    parts = [
        step_flops(config, recipe, step_work(config, sequences[part], anchors[part], BLOCK))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert whole.total == sum(part.total for part in parts)


def test_the_matrix_rate_leaves_the_random_numbers_of_a_run_alone():
    before = torch.random.get_rng_state()
    matrix_rate.cache_clear()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert math.isfinite(rate) and rate > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch):
    """A device that takes a microsecond a product, and every other time twice as long."""
    calls = []

    def seconds(left, right, out):
        calls.append(len(left))
        return 1e-6 * (1 + len(calls) % 2)

    monkeypatch.setattr(flops, "_seconds_of_a_product", seconds)
    monkeypatch.setattr(flops, "LARGEST_PRODUCT", 512)
    assert matrix_rate.__wrapped__(torch.device("cpu"), torch.float32) == 2 * 512**3 / 1e-6
    assert max(calls) == 512
