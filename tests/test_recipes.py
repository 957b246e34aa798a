"""Every recipe that is shipped loads, fits its target, and costs what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from domino_spec.recipe import HeadRecipe, Recipe, load_recipe
from domino_spec.target.embedded import EMBEDDED_TARGET
from domino_spec.training.estimate import ASSUMED_CONVERSATIONS, estimate_training
from tests.published import save_dflash, save_qwen3

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
LARGE = [path for path in RECIPES if path.stem.startswith("qwen3-")]
PERFECTBLEND = 1_420_000


def on_disk(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with its target, and the draft that it starts from, as configurations on this machine."""
    name = recipe.target.removeprefix("Qwen/")
    draft = recipe.draft
    if draft.init_from is not None:
        assert draft.init_from == f"z-lab/{name}-DFlash-b16"
        draft = dataclasses.replace(draft, init_from=str(save_dflash(directory / "draft", name)))
    data = dataclasses.replace(recipe.data, responses=str(directory / "nowhere.jsonl"))
    return dataclasses.replace(recipe, target=str(save_qwen3(directory / "target", name)), draft=draft, data=data)


def test_there_are_recipes_for_every_way_to_train():
    assert {path.stem for path in LARGE} == {
        f"qwen3-{size}-{kind}" for size in ("4b", "8b") for kind in ("domino", "dflash", "head-only")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path):
    recipe = load_recipe(path)
    assert recipe.target == EMBEDDED_TARGET or path in LARGE
    if path in LARGE:  # the paper's A.1
        training = recipe.training
        assert (training.learning_rate, training.warmup_ratio, training.weight_decay) == (6e-4, 0.04, 0.0)
        assert (training.clip_norm, training.batch_size, recipe.data.max_length) == (1.0, 16, 3072)
        assert (training.parallel, training.precision, recipe.data.thinking) == ("fsdp", "bfloat16", False)


def test_variants_differ_only_where_they_say():
    recipes = {path.stem: load_recipe(path) for path in LARGE}
    domino, dflash, head_only = (recipes[f"qwen3-8b-{kind}"] for kind in ("domino", "dflash", "head-only"))
    assert domino.draft.head == HeadRecipe(gru_hidden_dim=1024, low_rank=256, pure_draft_prefix_len=1)
    assert dflash.draft == dataclasses.replace(domino.draft, head=None, shift_label=False)
    assert dflash.training == dataclasses.replace(domino.training, curriculum="off")
    start = head_only.draft.init_from
    assert head_only.draft == dataclasses.replace(domino.draft, shift_label=False, init_from=start)
    assert head_only.training == dataclasses.replace(dflash.training, trained="head", epochs=1)
    for kind in ("domino", "dflash", "head-only"):
        small, large = recipes[f"qwen3-4b-{kind}"], recipes[f"qwen3-8b-{kind}"]
        assert small.training == large.training
        assert dataclasses.replace(small.draft, init_from=large.draft.init_from) == large.draft


@pytest.mark.slow
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_stated_cost_is_what_the_dry_run_gives(path, tmp_path):
    text = path.read_text()
    each, whole = re.search(
        r"# Cost: (\S+) H100 hours per 100,000 conversations of 1,024 tokens, (\S+) for", text
    ).groups()
    estimate = estimate_training(on_disk(load_recipe(path), tmp_path), processes=8)
    assert estimate.data.sequences == ASSUMED_CONVERSATIONS
    assert float(each) == pytest.approx(estimate.device_hours, rel=0.01)
    assert float(whole) == pytest.approx(estimate.device_hours * PERFECTBLEND / ASSUMED_CONVERSATIONS, rel=0.01)
    assert "not a measurement" in text
    assert estimate.memory["total"] < 80e9, "fits the GPUs that the paper used"
