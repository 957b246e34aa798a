"""Settings of a draft: the default taps, derived sizes, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from domino_spec.config import DraftConfig, HeadConfig, UserError, default_target_layer_ids


@pytest.mark.parametrize(
    "target_layers, draft_layers, taps",
    [
        (36, 5, (1, 9, 17, 25, 33)),  # Qwen3-8B and -4B, as published
        (36, 1, (18,)),
        (30, 2, (1, 27)),
        (28, 5, (1, 7, 13, 19, 25)),
        (5, 2, (1, 2)),
    ],
)
def test_default_taps_are_spaced_as_in_dflash(target_layers, draft_layers, taps):
    assert default_target_layer_ids(target_layers, draft_layers) == taps


def test_a_target_too_shallow_for_its_taps_is_refused():
    with pytest.raises(UserError, match="a target of 6 layers is too shallow for 5 evenly spaced taps"):
        default_target_layer_ids(6, 5)


def config(**changes) -> DraftConfig:
    settings = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        num_target_layers=10,
        target_layer_ids=(1, 7),
        mask_token_id=99,
    )
    return DraftConfig(**{**settings, **changes})


def test_the_label_convention_decides_slots_and_drafts():
    shifted, unshifted = config(block_size=16, shift_label=True), config(block_size=16, shift_label=False)
    assert (shifted.max_drafts, shifted.first_draft_slot) == (16, 0)
    assert (unshifted.max_drafts, unshifted.first_draft_slot) == (15, 1)


def test_sizes_follow_from_taps_and_draft_vocabulary():
    assert config().feature_size == 64
    assert (config().logits_size, config(draft_vocab_size=40).logits_size) == (100, 40)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(block_size=1), "block_size must be at least 2, got 1"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be at least 1"),
        (dict(target_layer_ids=()), "target_layer_ids must name at least one layer"),
        (dict(target_layer_ids=(1, 10)), "target_layer_ids holds 10, but the target's layers are 0 to 9"),
        (dict(target_layer_ids=(-1,)), "target_layer_ids holds -1"),
        (dict(mask_token_id=100), "mask_token_id 100 is outside the vocabulary of 100"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (dict(draft_vocab_size=101), "draft_vocab_size must be between 1 and 100, got 101"),
        (dict(draft_vocab_size=0), "draft_vocab_size must be between 1 and 100, got 0"),
    ],
)
def test_an_impossible_draft_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_settings_cannot_be_changed_afterwards():
    for settings, name in ((config(), "block_size"), (HeadConfig(), "low_rank")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, name, 3)
