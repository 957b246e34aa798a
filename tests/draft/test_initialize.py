"""A fresh draft takes its shape from recipe and target, and starts from reproducible weights."""

from __future__ import annotations

import pytest
import torch

from domino_spec.config import DraftRecipe, HeadConfig, UserError
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.initialize import draft_config, new_draft
from domino_spec.draft.load import load_draft
from tests.tiny import ARCHITECTURES, MASK, assert_close, tiny_target, word_tokenizer

HEAD = HeadConfig(gru_hidden_dim=8, low_rank=4)


def recipe(**changes) -> DraftRecipe:
    return DraftRecipe(**{**dict(block_size=6, num_layers=2, mask_token_id=MASK, head=HEAD), **changes})


def test_what_the_recipe_leaves_out_comes_from_the_target(text_target):
    config = draft_config(recipe(mask_token_id=None, num_layers=1), text_target)
    assert config.mask_token_id == MASK, "the tokenizer's own mask token"
    assert (config.hidden_size, config.vocab_size, config.num_target_layers) == (32, 60, 4)
    assert config.target_layer_ids == (2,)
    assert config.target_fingerprint == text_target.fingerprint


def test_a_target_without_a_mask_token_needs_one_in_the_recipe(target):
    with pytest.raises(UserError, match=r"set draft.mask_token_id"):
        draft_config(recipe(mask_token_id=None), target)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gets_a_draft_that_runs(kind):
    target = tiny_target(kind, tokenizer=word_tokenizer())
    draft = new_draft(recipe(target_layer_ids=(0, 2)), target, None, seed=0)
    hidden = draft.backbone(
        draft.block_embeddings(torch.tensor([3])),
        torch.arange(6)[None],
        draft.backbone.project_context(torch.randn(1, 4, draft.config.feature_size), torch.arange(4)[None]),
        torch.ones(1, 1, 6, 10, dtype=torch.bool),
    )
    assert draft.base_logits(hidden).isfinite().all()
    assert draft.base_logits(hidden).std() > 0, "the LM head must be reached"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_last_norm_starts_as_the_targets_own_function(kind):
    """Gemma stores its norms as an offset from one, so the function is compared, not the stored numbers."""
    target = tiny_target(kind, tokenizer=word_tokenizer())
    torch.nn.init.normal_(target.decoder.norm.weight, std=0.3)
    draft = new_draft(recipe(target_layer_ids=(0, 2)), target, None, seed=0)
    hidden = torch.randn(5, 32)
    assert_close(draft.backbone.norm(hidden), target.decoder.norm(hidden))


def test_first_weights_depend_on_the_seed_only(text_target):
    def weights(seed):
        torch.rand(1)  # whatever else has drawn numbers
        return dict(new_draft(recipe(target_layer_ids=(0, 2)), text_target, None, seed).state_dict())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["backbone.fc.weight"], other["backbone.fc.weight"])


def test_making_a_draft_leaves_the_global_random_state_alone(text_target):
    state = torch.get_rng_state()
    new_draft(recipe(target_layer_ids=(0, 2)), text_target, None, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_can_start_from_the_targets(text_target):
    draft = new_draft(recipe(target_layer_ids=(0, 2), init_layers_from_target=(3, 1)), text_target, None, 0)
    for layer, source in zip(draft.backbone.layers, (3, 1), strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, text_target.layers[source].mlp.gate_proj.weight)
        assert torch.equal(layer.self_attn.k_proj.weight, text_target.layers[source].self_attn.k_proj.weight)


@pytest.mark.parametrize("layers, message", [((1,), "names 1 layers"), ((1, 9), "holds 9")])
def test_a_warm_start_that_does_not_fit_is_refused(text_target, layers, message):
    with pytest.raises(UserError, match=message):
        new_draft(recipe(target_layer_ids=(0, 2), init_layers_from_target=layers), text_target, None, 0)


ROPES = {
    "default": dict(rope_type="default", rope_theta=5000.0),
    "linear": dict(rope_type="linear", rope_theta=5000.0, factor=4.0),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=5000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=64),
}


@pytest.mark.parametrize("rope", ROPES)
def test_positions_turn_in_the_draft_as_they_do_in_the_target(tmp_path, rope):
    """RoPE settings pass from the target to a new draft, to its checkpoint, and back."""
    target = tiny_target(rope_parameters=ROPES[rope], tokenizer=word_tokenizer())
    draft = new_draft(recipe(target_layer_ids=(0, 2)), target, None, seed=0)
    save_draft(draft, tmp_path)
    positions = torch.tensor([[0, 1, 63, 64, 300]])
    cos, sin = target.decoder.rotary_emb(torch.zeros(1), positions)
    for made in (draft, load_draft(tmp_path, target)):
        rotary = made.backbone.rotary(positions)
        assert_close(rotary.cos, cos)
        assert_close(rotary.sin, sin)


def test_a_draft_for_gemma_turns_as_its_full_attention_layers():
    target = tiny_target("gemma3", tokenizer=word_tokenizer())
    draft = new_draft(recipe(target_layer_ids=(0, 2)), target, None, seed=0)
    assert draft.config.rope_theta == target.config.rope_parameters["full_attention"]["rope_theta"]
