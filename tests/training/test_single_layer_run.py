"""EAGLE-3 and DART drafts from a recipe to a checkpoint that decodes, by the same stages as block drafts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from domino_spec import load_draft, load_target
from domino_spec.api import generate
from domino_spec.files import load_tensors
from domino_spec.recipe import DraftRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.training.estimate import estimate_training
from domino_spec.training.export import export_draft
from domino_spec.training.run import run_training
from tests import tiny

pytestmark = pytest.mark.slow

METHODS = ("eagle3", "dart")


def recipe_of(setup, method: str, **training) -> Recipe:
    draft = DraftRecipe(model=method, block_size=4, target_layer_ids=(0, 1, 3), head=None, draft_vocab_size=40)
    return dataclasses.replace(setup.recipe(objective="kl", **training), draft=draft)


@pytest.fixture(scope="module", params=METHODS)
def finished(request, setup, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("run") / request.param
    run_training(recipe_of(setup, request.param, steps=60), out, device="cpu")
    return request.param, out


def test_a_run_leaves_a_draft_that_decodes_and_accepts(setup, finished):
    method, out = finished
    target = load_target(str(setup.target))
    draft = load_draft(out / "draft", target)
    assert draft.config.kind == method
    prompts = tiny.random_prompts([5, 3])
    drafted = generate(target, draft, prompts, method=method, max_new_tokens=30, num_drafts=12)
    assert [g.token_ids for g in drafted] == [g.token_ids for g in generate(target, None, prompts, max_new_tokens=30)]
    assert max(length for g in drafted for length in g.acceptance_lengths) > 1


def test_a_finished_run_is_exported_in_both_precisions(finished, tmp_path):
    _, out = finished
    exported = export_draft(out, tmp_path / "bf16", torch.bfloat16)
    master = export_draft(out, tmp_path / "fp32", torch.float32)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    weights = dict(exported.named_parameters())
    for name, parameter in master.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter.bfloat16(), weights[name])


def test_what_is_saved_computes_what_was_trained(setup, finished):
    """The scale of the features is folded into `fc`: the loaded draft, given features as they are, agrees."""
    _, out = finished
    target = load_target(str(setup.target), pack=False)
    draft = load_draft(out / "draft", target, dtype=torch.float32)
    state, _ = load_tensors(out / "state.safetensors")
    folded = state["weight/fc.weight"] * state["feature_scale"]
    assert torch.equal(draft.fc.weight, folded.bfloat16().float())
    assert (state["feature_scale"] != 1).any()


def test_a_resumed_run_equals_an_uninterrupted_one(setup, tmp_path, monkeypatch):
    recipe = recipe_of(setup, "eagle3", steps=8, checkpoint_minutes=1e-9)
    run_training(recipe, tmp_path / "whole", device="cpu")

    class Stop(Exception):
        pass

    def stop(result):
        if result.step == 5:
            raise Stop

    with pytest.raises(Stop):
        run_training(recipe, tmp_path / "cut", device="cpu", on_step=stop)
    run_training(recipe, tmp_path / "cut", device="cpu")
    whole, _ = load_tensors(tmp_path / "whole" / "state.safetensors")
    cut, _ = load_tensors(tmp_path / "cut" / "state.safetensors")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_one_feature_cache_serves_drafts_of_every_kind(setup, tmp_path):
    """A cache of more layers than a draft reads is read in part, not captured again."""
    many = recipe_of(setup, "dart", steps=1)
    many = dataclasses.replace(
        many,
        draft=dataclasses.replace(setup.recipe().draft, target_layer_ids=(0, 1, 2, 3), num_layers=1),
    )
    run_training(many, tmp_path / "many", device="cpu", features=tmp_path / "features")
    shards = sorted(p.name for p in (tmp_path / "features").glob("shard-*"))
    recipe = recipe_of(setup, "eagle3", steps=2)
    run_training(recipe, tmp_path / "shared", device="cpu", features=tmp_path / "features")
    assert sorted(p.name for p in (tmp_path / "features").glob("shard-*")) == shards
    run_training(recipe, tmp_path / "own", device="cpu")
    shared, _ = load_tensors(tmp_path / "shared" / "state.safetensors")
    own, _ = load_tensors(tmp_path / "own" / "state.safetensors")
    assert all(torch.equal(shared[name], own[name]) for name in own)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_draft_begins_as_the_highest_feature_read_by_the_target_s_own_head(setup, method):
    from domino_spec.draft.initialize import new_draft

    target = load_target(str(setup.target), pack=False)
    recipe = dataclasses.replace(recipe_of(setup, method).draft, init_layers_from_target=(3,), draft_vocab_size=None)
    draft = new_draft(recipe, target, None, seed=0)
    features = torch.randn(5, 3 * target.hidden_size)
    assert torch.equal(draft.fuse(features), features[:, -target.hidden_size :])
    assert torch.equal(draft.lm_head.weight, target.lm_head_weight)
    layer = dict(target.layers[3].named_parameters())
    assert torch.equal(draft.midlayer.mlp.up_proj.weight, layer["mlp.up_proj.weight"])
    own = draft.midlayer.self_attn.q_proj.weight
    theirs = layer["self_attn.q_proj.weight"]
    assert torch.equal(own[:, target.hidden_size :], theirs), "the half that reads features"
    assert torch.equal(draft.midlayer.hidden_norm.weight, layer["input_layernorm.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_counts_what_training_would_make(setup, method, tmp_path):
    recipe = recipe_of(setup, method, steps=2)
    estimate = estimate_training(recipe)
    out = tmp_path / "run"
    run_training(recipe, out, device="cpu")
    state, _ = load_tensors(out / "state.safetensors")
    made = sum(t.numel() for name, t in state.items() if name.startswith("weight/"))
    assert estimate.parameters["total"] == estimate.parameters["trained"] == made
    assert estimate.step_operations["total"] > 0


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(head=DraftRecipe().head), "a draft of model eagle3 has no Domino head: set head to null"),
        (dict(mask_token_id=3), "mask_token_id is for drafts of model block; leave it out"),
        (dict(shift_label=True), "shift_label is for drafts of model block; leave it out"),
    ],
)
def test_settings_of_block_drafts_are_refused(change, said):
    with pytest.raises(UserError) as caught:
        DraftRecipe(**{"model": "eagle3", "head": None, **change})
    assert said in str(caught.value)
