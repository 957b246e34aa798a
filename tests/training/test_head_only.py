"""Head-only training: a frozen backbone from a checkpoint, and a Domino head that learns to correct it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from domino_spec.draft.checkpoint import read_draft, save_draft
from domino_spec.draft.domino import Draft
from domino_spec.draft.initialize import new_draft
from domino_spec.recipe import DraftRecipe, HeadRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.training.evaluate import simulated_tau
from domino_spec.training.run import run_training
from tests.tiny import MemoryCache, as_sequences, fit, tiny_draft

pytestmark = pytest.mark.slow

HEAD = HeadRecipe(gru_hidden_dim=16, low_rank=16, pure_draft_prefix_len=0)


def pair_texts(count: int, seed: int) -> list[list[int]]:
    """Texts of pairs: 10 20 (four in ten), 11 21 and 12 21 (three in ten each), in an order that nothing foretells.

    Without knowing what came first, 10 and 21 are the likeliest first and second word; but 21 never follows 10.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([[10, 20], [11, 21], [12, 21]])
    chosen = torch.multinomial(torch.tensor([0.4, 0.3, 0.3]), count * 10, replacement=True, generator=generator)
    return pairs[chosen].view(count, 20).tolist()


@pytest.fixture(scope="module")
def backbone(target, tmp_path_factory) -> Draft:
    """A DFlash draft trained on such texts, as published: slots predict their own positions, no head."""
    directory = tmp_path_factory.mktemp("backbone")
    draft = tiny_draft(target, head=False, shift_label=False, std=0.1)
    fit(target, draft, as_sequences([[5, 6]] * 32, pair_texts(32, seed=0)), 60, learning_rate=2e-2)
    save_draft(draft, directory, dtype=torch.bfloat16)
    start = DraftRecipe(init_from=str(directory), head=HEAD)
    return new_draft(start, target, None, seed=0)


def head_only(setup, draft: DraftRecipe, curriculum: str = "off", steps: int = 12) -> Recipe:
    """The set-up's recipe with another draft, of which only the head is trained."""
    recipe = setup.recipe(steps=steps)
    training = dataclasses.replace(recipe.training, trained="head", curriculum=curriculum)
    return dataclasses.replace(recipe, draft=draft, training=training)


def test_a_head_on_a_frozen_backbone_raises_tau(target, backbone):
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    sequences = as_sequences([[5, 6]] * 32, pair_texts(32, seed=0))
    trainer = fit(target, backbone, sequences, 40, trained="head", curriculum="off", learning_rate=2e-2)
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    trained = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in backbone.head.parameters()), "no optimizer state for the backbone"

    held_out = as_sequences([[5, 6]] * 8, pair_texts(8, seed=1))
    found = simulated_tau(backbone, held_out, MemoryCache(target, held_out, backbone.config.target_layer_ids))
    # Wherever a block holds a whole pair, the backbone alone can only draft its likeliest words, 10 21. Knowing 10,
    # the head writes 20: at best, tau rises from 1.9 to 2.5.
    assert found.tau > 1.25 * found.tau_head_off


def test_a_head_only_run_keeps_every_bit_of_the_backbone(setup, tmp_path):
    """Through scaled features, training, resuming and saving."""
    target = load_target(setup.target, device="cpu")
    save_draft(tiny_draft(target, head=False, shift_label=False), tmp_path / "published", dtype=torch.bfloat16)
    recipe = head_only(setup, DraftRecipe(init_from=str(tmp_path / "published"), head=HEAD), steps=6)

    def stop(result) -> None:
        if result.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, tmp_path / "run", device="cpu", on_step=stop)
    run_training(recipe, tmp_path / "run", device="cpu")

    published, trained = read_draft(tmp_path / "published"), read_draft(tmp_path / "run" / "draft")
    assert (trained.config.shift_label, trained.config.max_drafts) == (False, 4)
    assert trained.head.correction_weight.any()
    held = dict(published.named_parameters())
    for name, parameter in trained.backbone.named_parameters():
        assert torch.equal(parameter, held[f"backbone.{name}"]), name


@pytest.mark.parametrize(
    "draft, curriculum, message",
    [
        (DraftRecipe(), "off", "name that draft in draft.init_from"),
        (DraftRecipe(init_from="x", head=None), "off", "draft.head is null"),
        (DraftRecipe(init_from="x"), "linear", "set training.curriculum to off, not linear"),
        (DraftRecipe(init_from="x"), "constant", "set training.curriculum to off, not constant"),
    ],
)
def test_a_head_only_recipe_that_makes_no_sense_is_refused(setup, draft, curriculum, message):
    with pytest.raises(UserError, match=message):
        head_only(setup, draft, curriculum)
