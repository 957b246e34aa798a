"""The traps that cost others their results (docs/design.md, section 6), each with its tests.

Head weights missing from the saved checkpoint
    tests/draft/test_checkpoint.py::test_the_head_is_in_the_saved_checkpoint
    tests/training/test_evaluate.py::test_a_trained_draft_keeps_its_acceptance_through_its_checkpoint
    tests/training/test_run.py::test_the_trained_draft_is_bfloat16_whole_and_fits_its_target
No backbone gradient at slot 0 under shift_label
    tests/training/test_step.py::test_the_anchors_slot_trains_the_backbone_when_labels_are_shifted
Loss divided by the token count, or by every micro-batch or process for itself
    tests/training/test_step.py::test_the_step_is_the_weighted_mean_of_the_paper
    tests/training/test_step.py::test_a_step_does_not_depend_on_its_micro_batches
    tests/training/test_parallel.py::test_two_processes_reach_the_losses_and_weights_of_one
bfloat16 master weights
    tests/training/test_step.py::test_master_weights_are_float32_and_keep_tiny_updates
Uncorrected slots left at token id 0 when decoding
    tests/drafters/test_block_drafter.py::test_drafts_of_every_cycle_equal_a_fresh_computation
    tests/ops/test_chains.py::test_greedy_rollout_equals_step_by_step_recomputation
Configuration fields not forwarded to the exported file
    tests/training/test_traps.py::test_every_field_of_the_configuration_reaches_the_file
    tests/training/test_traps.py::test_every_setting_of_a_recipe_reaches_the_exported_draft
Label misalignment by one
    tests/training/test_evaluate.py::test_a_draft_of_a_cycle_is_accepted_in_whole_blocks
    tests/training/test_evaluate.py::test_simulated_acceptance_equals_decoding_from_every_anchor
Evaluating with thinking on a draft trained without
    tests/target/test_text.py::test_thinking_is_off_unless_asked_for
    tests/training/test_datasets.py::test_answers_given_with_another_thinking_mode_are_refused
Reading tau from a run whose target and draft do not match
    tests/draft/test_pairing.py::test_other_weights_of_the_same_shape_are_refused_unless_allowed
    tests/training/test_features.py::test_other_settings_are_refused
    tests/training/test_traps.py::test_a_bench_of_a_draft_made_for_another_target_measures_nothing
An autoregressive baseline slower than it should be
    tests/training/test_traps.py::test_the_baseline_is_one_row_of_one_pass_for_every_token
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from domino_spec import generate, load_target
from domino_spec.bench.run import run_bench
from domino_spec.draft.checkpoint import read_config, save_draft
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.initialize import new_draft
from domino_spec.recipe import DraftRecipe, HeadRecipe
from domino_spec.settings import UserError
from domino_spec.training.export import export_draft
from domino_spec.training.run import run_training
from tests.tiny import MASK, random_prompts, tiny_draft, tiny_model, tiny_target, word_tokenizer

UNUSUAL_DRAFT = DraftRecipe(
    block_size=6,
    num_layers=3,
    mask_token_id=MASK,
    target_layer_ids=(2, 0, 1),
    intermediate_size=44,
    shift_label=True,
    head=HeadRecipe(gru_hidden_dim=8, low_rank=4, pure_draft_prefix_len=2),
    draft_vocab_size=40,
)


def test_the_tests_of_the_list_above_exist():
    named = re.findall(r"^    (\S+)::(\w+)$", __doc__, re.MULTILINE)
    assert len(named) == __doc__.count("::")
    for file, name in named:
        assert f"def {name}(" in Path(__file__).parents[2].joinpath(file).read_text(), f"{file}::{name}"


def test_every_field_of_the_configuration_reaches_the_file(tmp_path):
    """Each one away from its default, the target's peculiarities included, so that a field left out falls back."""
    rope = dict(rope_type="linear", factor=4.0, rope_theta=5e5)
    shape = dict(rms_norm_eps=3e-5, max_position_embeddings=400, rope_parameters=rope, head_dim=12)
    target = tiny_target("qwen3", **shape)
    draft = new_draft(UNUSUAL_DRAFT, target, torch.arange(3, 43), seed=0)
    reads_last = dict(target_layer_ids=(3, 0, 1), last_tap_normed=True)
    draft.config = dataclasses.replace(draft.config, short_blocks=True, **reads_last)
    save_draft(draft, tmp_path, dtype=torch.bfloat16)
    found = read_config(tmp_path)
    for field in dataclasses.fields(DraftConfig):
        if field.name == "published":  # what is not ours to say
            continue
        value = getattr(found, field.name)
        assert value == getattr(draft.config, field.name), field.name
        assert value != field.default, f"{field.name} shows nothing at its default"
    assert (found.rope_theta, found.rope_scaling["factor"], found.rms_norm_eps) == (5e5, 4.0, 3e-5)
    assert found.target_fingerprint == target.fingerprint


@pytest.mark.parametrize("shift_label", [True, False])
def test_every_setting_of_a_recipe_reaches_the_exported_draft(setup, tmp_path, shift_label):
    recipe = setup.recipe(steps=1)
    unusual = dataclasses.replace(UNUSUAL_DRAFT, shift_label=shift_label)
    run_training(dataclasses.replace(recipe, draft=unusual), tmp_path / "run", device="cpu")
    for dtype in (torch.bfloat16, torch.float32):
        export_draft(tmp_path / "run", tmp_path / "out", dtype)
        config = read_config(tmp_path / "out")
        assert (config.block_size, config.num_hidden_layers, config.mask_token_id) == (6, 3, MASK)
        assert (config.target_layer_ids, config.intermediate_size) == ((2, 0, 1), 44)
        assert (config.shift_label, config.max_drafts) == (shift_label, 6 if shift_label else 5)
        assert dataclasses.astuple(config.head) == (8, 4, 2)
        assert (config.draft_vocab_size, config.num_target_layers) == (40, 4)
        assert config.target_fingerprint == load_target(setup.target, device="cpu").fingerprint


def test_a_bench_of_a_draft_made_for_another_target_measures_nothing(setup, tmp_path):
    """Decoding would be right and tau about 1: a figure that says nothing of the draft."""
    save_draft(tiny_draft(load_target(setup.target, device="cpu", pack=False)), tmp_path / "draft")
    tiny_model(seed=9).save_pretrained(tmp_path / "other")
    word_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "suite.jsonl").write_text(json.dumps({"id": "a", "turns": ["w3 w4"]}) + "\n")
    options = dict(
        drafts=[str(tmp_path / "draft")],
        suites=[str(tmp_path / "suite.jsonl")],
        methods=["domino"],
        out=tmp_path / "bench",
        max_new_tokens=4,
        device="cpu",
        dtype="float32",
        breakdown=False,
        say=lambda line: None,
    )
    with pytest.raises(UserError, match="was trained for a target with fingerprint"):
        run_bench(target=str(tmp_path / "other"), **options)
    assert not (tmp_path / "bench").exists()
    run_bench(target=str(setup.target), **options)
    assert (tmp_path / "bench" / "raw.jsonl").read_text()


def test_the_baseline_is_one_row_of_one_pass_for_every_token(setup, monkeypatch):
    """The same engine, cache and packed weights as with a draft, and nothing for a draft's sake: no feature is kept,
    no row but the last is projected to logits, no text is read twice."""
    target = load_target(setup.target, device="cpu")
    assert target.packed, "as it would be for a draft"
    passes, projected = [], []
    forward, lm_head = target.forward, target.lm_head

    def watch_forward(tokens, cache, feature_layers=(), ancestors=None):
        passes.append((tuple(tokens.shape), tuple(feature_layers)))
        return forward(tokens, cache, feature_layers, ancestors)

    def watch_lm_head(hidden):
        projected.append(hidden.shape[:-1].numel())
        return lm_head(hidden)

    monkeypatch.setattr(target, "forward", watch_forward)
    monkeypatch.setattr(target, "lm_head", watch_lm_head)
    (result,) = generate(target, None, random_prompts([7], seed=4), max_new_tokens=10)
    assert result.num_tokens == 10
    assert passes == [((1, 6), ())] + [((1, 1), ())] * 10
    assert projected == [1] * 10
