"""Counted operations against PyTorch's own counter, which watches a real step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from domino_spec.recipe import OptimizationRecipe
from domino_spec.training import watch
from domino_spec.training.blocks import sample_anchors
from domino_spec.training.data import Sequence
from domino_spec.training.estimate import step_operations
from domino_spec.training.step import BlockLoss, tapped_layers
from domino_spec.training.watch import matrix_rate
from tests.tiny import MemoryCache, as_sequences, random_prompts, tiny_draft, tiny_single_layer

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


def step_recipe(sequences: list[Sequence], **options) -> OptimizationRecipe:
    """A step over just these sequences."""
    return OptimizationRecipe(steps=1, precision="float32", batch_size=len(sequences), micro_batch_size=1, **options)


def watched_step(target, draft, sequences, recipe: OptimizationRecipe):
    """Operations that PyTorch saw in a forward and backward pass, those of attention, and our count by part."""
    draft = draft.train().requires_grad_(True)
    if recipe.trained == "head":
        draft.backbone.requires_grad_(False)
    layers = tapped_layers(draft, recipe)
    batch = MemoryCache(target, sequences, layers).batch(sequences)
    loss = BlockLoss(draft, recipe, layers)
    anchors = [sample_anchors(s, recipe.anchors, torch.Generator().manual_seed(0)) for s in sequences]
    # The counter knows no fused attention of the CPU, but sees the products that the plain one consists of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(batch, anchors, draft.config.block_size, 0.5).loss.backward()
    seen = counter.get_flop_counts()["Global"]
    attention = seen.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops(), attention, step_operations(draft.config, recipe, sequences, draft.draft_vocab_ids)


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
    settings = step_recipe(sequences, anchors=1, **recipe)
    draft = tiny_draft(target, head=head, shift_label=shift_label, draft_vocab_ids=draft_vocab_ids)
    seen, _, counted = watched_step(target, draft, sequences, settings)
    total = sum(counted.values())
    assert 0 <= seen - total <= (0.001 * seen if angles_are_products(target) else 0)


@pytest.mark.parametrize("method", ["eagle3", "dart"])
def test_the_products_of_a_single_layer_are_exactly_what_a_step_does(target, sequences, method):
    """Attention apart: chains of EAGLE-3 compute scores only to mask them."""
    draft = tiny_single_layer(target, method)
    draft.scale_features(torch.ones(draft.fc.in_features))
    seen, attention, counted = watched_step(target, draft, sequences, step_recipe(sequences, anchors=3))
    products = sum(counted.values()) - counted["attention"]
    assert seen - attention == pytest.approx(products, rel=0.002)


def test_scores_that_are_masked_do_not_count(target, sequences):
    """Blocks of one sequence share calls of attention, which compare each with the slots of the others."""
    recipe = step_recipe(sequences, anchors=6)
    seen, attention, counted = watched_step(target, tiny_draft(target), sequences, recipe)
    products = sum(counted.values()) - counted["attention"]
    assert abs(products - (seen - attention)) <= (0.001 * seen if angles_are_products(target) else 0)
    assert 0 < counted["attention"] < attention
    # Two layers of 4 heads of 16: scores and their sum over values, forward once and backward twice.
    anchors = [sample_anchors(s, 6, torch.Generator().manual_seed(0)) for s in sequences]
    pairs = sum(BLOCK * (position + BLOCK) for part in anchors for position in part.tolist())
    assert counted["attention"] == 2 * 3 * 2 * 2 * pairs * 4 * 16


def test_shorter_blocks_are_more(target, sequences):
    """A schedule's operations are the mean over its block sizes."""
    config = tiny_draft(target).config
    whole, halved = (step_operations(config, step_recipe(sequences, block_schedule=s), sequences) for s in ((), (3,)))
    assert halved["layers"] == pytest.approx(whole["layers"], rel=0.2) and halved["context"] == whole["context"]


def test_counting_leaves_the_random_numbers_of_a_run_alone(target, sequences):
    config = tiny_draft(target).config
    before = torch.random.get_rng_state()
    step_operations(config, step_recipe(sequences), sequences)
    assert torch.equal(torch.random.get_rng_state(), before)


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

    monkeypatch.setattr(watch, "_seconds_of_a_product", seconds)
    monkeypatch.setattr(watch, "LARGEST_PRODUCT", 512)
    assert matrix_rate.__wrapped__(torch.device("cpu"), torch.float32) == 2 * 512**3 / 1e-6
    assert max(calls) == 512
