"""A new draft takes its shape from recipe and target, and starts from reproducible weights or from another draft."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from domino_spec.draft.checkpoint import draft_tensors, read_draft, save_draft
from domino_spec.draft.config import HeadConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.initialize import draft_config, new_draft
from domino_spec.draft.load import load_draft
from domino_spec.ops.heads import HeadInputs, head_rollout
from domino_spec.recipe import DraftRecipe, HeadRecipe
from domino_spec.settings import UserError
from tests.tiny import ARCHITECTURES, MASK, VOCAB, assert_close, tiny_draft, tiny_target, word_tokenizer

HEAD = HeadRecipe(gru_hidden_dim=8, low_rank=4)


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


# Warm starts from a checkpoint


def proposals(draft: Draft, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, final logits and drafted tokens after some context [R, T, F]."""
    config, rows = draft.config, features.shape[1]
    positions = torch.arange(rows + config.block_size)[None].expand(len(features), -1)
    anchors = torch.arange(len(features)) + 3
    mask = torch.ones(1, 1, config.block_size, rows + config.block_size, dtype=torch.bool)
    context = draft.backbone.project_context(draft.read_features(features), positions[:, :rows])
    hidden = draft.backbone(draft.block_embeddings(anchors), positions[:, rows:], context, mask)
    hidden = hidden[:, config.first_draft_slot :]
    base = draft.base_logits(hidden)
    rollout = head_rollout(draft.head_weights, HeadInputs(hidden, base, draft.embed(anchors)))
    return hidden, base, draft.to_token_ids(rollout.choices)


def checkpoint(directory: Path, target, nested: bool = False, dtype=torch.bfloat16, **options) -> Draft:
    """A random draft saved in `directory`, as it is read back."""
    draft = tiny_draft(target, **options)
    draft.layout = "logit_head." if nested else ""
    save_draft(draft, directory, dtype=dtype)
    return read_draft(directory).float().bind(target)


def wide_scale(draft: Draft) -> Tensor:
    """Feature scales over six orders of magnitude, none of them a power of two."""
    return torch.logspace(-3, 3, draft.config.feature_size)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(shift_label=False),
        dict(head=False, shift_label=False),
        dict(nested=True),
        dict(draft_vocab_ids=torch.arange(0, VOCAB, 2)),
    ],
    ids=["domino", "own positions", "dflash", "older names", "draft vocabulary"],
)
@torch.no_grad()
def test_a_warm_start_proposes_exactly_what_the_checkpoint_proposes(tmp_path, text_target, options):
    """Bit for bit, although training sees its features on another scale; and saved at once, it is the same draft."""
    source = checkpoint(tmp_path, text_target, **options)
    start = DraftRecipe(init_from=str(tmp_path), **({"head": None} if source.head is None else {}))
    draft = new_draft(start, text_target, None, seed=0)
    draft.scale_features(wide_scale(draft), trained=True)
    features = torch.randn(6, 7, draft.config.feature_size, generator=torch.Generator().manual_seed(0))
    for actual, expected in zip(proposals(draft, features), proposals(source, features), strict=True):
        assert torch.equal(actual, expected)
    saved, held = draft_tensors(draft), draft_tensors(source)
    assert {n.removeprefix("logit_head.") for n in held} == set(saved)
    for name, tensor in held.items():
        assert torch.equal(saved[name.removeprefix("logit_head.")].float(), tensor.float()), name
    assert all(p.requires_grad and p.dtype == torch.float32 for p in draft.parameters())


@torch.no_grad()
def test_a_scale_without_compensation_would_change_the_proposals(tmp_path, text_target):
    source = checkpoint(tmp_path, text_target)
    draft = new_draft(DraftRecipe(init_from=str(tmp_path)), text_target, None, seed=0)
    draft.scale_features(wide_scale(draft))
    features = torch.randn(6, 7, draft.config.feature_size, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(proposals(draft, features)[2], proposals(source, features)[2])


def test_what_a_warm_start_leaves_out_is_the_checkpoints(tmp_path, target):
    """Also where a fresh draft would take it from the tokenizer (there is none here) or from a default."""
    source = checkpoint(tmp_path, target, shift_label=False, layers=1, taps=(1,), prefix=2)
    config = draft_config(DraftRecipe(init_from=str(tmp_path)), target, source.config)
    assert config == source.config
    assert (config.block_size, config.shift_label, config.head.pure_draft_prefix_len) == (5, False, 2)
    assert not config.published, "the new draft writes a configuration of its own"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(block_size=8), r"draft.block_size is 8 in the recipe and 5 in .*checkpoint"),
        (dict(num_layers=3), r"draft.num_layers is 3 in the recipe and 2 in"),
        (dict(mask_token_id=7), r"draft.mask_token_id is 7 in the recipe and 59 in"),
        (dict(target_layer_ids=(0, 2)), r"draft.target_layer_ids is \[0, 2\] in the recipe and \[0, 3\] in"),
        (dict(intermediate_size=48), r"draft.intermediate_size is 48 in the recipe and 40 in"),
        (dict(shift_label=False), r"draft.shift_label is False in the recipe and True in"),
        (dict(head=HeadRecipe(gru_hidden_dim=16)), r"draft.head.gru_hidden_dim is 16 in the recipe and 12 in"),
        (dict(head=HeadRecipe(low_rank=4)), r"draft.head.low_rank is 4 in the recipe and 6 in"),
        (dict(head=HeadRecipe(pure_draft_prefix_len=0)), r"draft.head.pure_draft_prefix_len is 0 in the recipe and 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_contradicts_its_checkpoint_is_refused(tmp_path, text_target, changes, message):
    checkpoint(tmp_path / "checkpoint", text_target)
    with pytest.raises(UserError, match=message) as error:
        new_draft(DraftRecipe(init_from=str(tmp_path / "checkpoint"), **changes), text_target, None, 0)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_head_on_a_published_backbone_starts_neutral_and_keeps_its_convention(tmp_path, text_target):
    source = checkpoint(tmp_path, text_target, head=False, shift_label=False)
    draft = new_draft(DraftRecipe(init_from=str(tmp_path), head=HEAD), text_target, None, seed=0)
    assert draft.config.head == HeadConfig(gru_hidden_dim=8, low_rank=4, pure_draft_prefix_len=1)
    assert (draft.config.shift_label, draft.config.max_drafts) == (False, 4)
    features = torch.randn(6, 7, draft.config.feature_size)
    for actual, expected in zip(proposals(draft, features), proposals(source, features), strict=True):
        assert torch.equal(actual, expected)
    assert draft.head.prefix_gru.weight_ih_l0.any()


def test_a_head_can_be_left_behind(tmp_path, text_target):
    checkpoint(tmp_path, text_target, shift_label=False)
    draft = new_draft(DraftRecipe(init_from=str(tmp_path), head=None), text_target, None, seed=0)
    assert draft.head is None and draft.config.head is None


def test_a_draft_without_a_head_never_has_shifted_labels(tmp_path, text_target):
    """Readers of DFlash drafts do not know of them, and would draft one slot late."""
    checkpoint(tmp_path, text_target, shift_label=True)
    with pytest.raises(UserError, match=r"draft.head is null, but slots of .* predict the token one position later"):
        new_draft(DraftRecipe(init_from=str(tmp_path), head=None), text_target, None, seed=0)
    with pytest.raises(UserError, match=r"shift_label true needs a head"):
        DraftRecipe(head=None, shift_label=True)
    for head in (None, HeadRecipe()):
        fresh = DraftRecipe(num_layers=2, mask_token_id=MASK, target_layer_ids=(0, 2), head=head)
        assert new_draft(fresh, text_target, None, seed=0).config.shift_label == (head is not None)


def test_another_draft_vocabulary_than_the_checkpoints_is_refused(tmp_path, text_target):
    ids = torch.arange(0, VOCAB, 2)
    checkpoint(tmp_path, text_target, draft_vocab_ids=ids)
    start = DraftRecipe(init_from=str(tmp_path), draft_vocab_size=len(ids))
    assert torch.equal(new_draft(start, text_target, ids, 0).draft_vocab_ids, ids)
    with pytest.raises(UserError, match=r"leave it out to keep that draft's"):
        new_draft(start, text_target, ids + 1, 0)
    with pytest.raises(UserError, match=r"draft_vocab_size is 20 in the recipe and 30 in"):
        new_draft(dataclasses.replace(start, draft_vocab_size=20), text_target, ids[:20], 0)


@torch.no_grad()
def test_a_whole_vocabulary_can_be_cut_to_a_part_of_it(tmp_path, text_target):
    ids = torch.tensor([1, 4, 9, 33, MASK])
    source = checkpoint(tmp_path, text_target)
    draft = new_draft(DraftRecipe(init_from=str(tmp_path), draft_vocab_size=5), text_target, ids, seed=0)
    hidden, state = torch.randn(3, 32), torch.randn(3, 12)
    assert_close(draft.base_logits(hidden), source.base_logits(hidden)[:, ids])
    assert_close(draft.head.correction(hidden, state), source.head.correction(hidden, state)[:, ids])


def test_a_checkpoint_for_another_target_is_refused_unless_the_recipe_allows_it(tmp_path, text_target, caplog):
    checkpoint(tmp_path / "tuned", tiny_target(seed=5, tokenizer=word_tokenizer()))
    start = DraftRecipe(init_from=str(tmp_path / "tuned"))
    with pytest.raises(UserError, match=r"fingerprint.*draft.init_from_other_target: true"):
        new_draft(start, text_target, None, 0)
    draft = new_draft(dataclasses.replace(start, init_from_other_target=True), text_target, None, 0)
    assert draft.config.target_fingerprint == text_target.fingerprint, "it is trained for this target from here on"
    assert "was trained for other weights" in caplog.text

    checkpoint(tmp_path / "wide", tiny_target(seed=5, vocab_size=70))
    with pytest.raises(UserError, match=r"vocabulary 70, the target has 60"):
        new_draft(DraftRecipe(init_from=str(tmp_path / "wide")), text_target, None, 0)


def test_a_start_from_two_places_is_refused():
    with pytest.raises(UserError, match="either init_from or init_layers_from_target"):
        DraftRecipe(init_from="x", init_layers_from_target=(0, 1))


def test_a_missing_checkpoint_is_named(text_target):
    with pytest.raises(UserError, match=r"\./nowhere does not exist"):
        new_draft(DraftRecipe(init_from="./nowhere"), text_target, None, 0)
