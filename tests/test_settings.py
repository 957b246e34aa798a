"""Settings of a draft: the default taps, derived sizes, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field

from domino_spec.draft.config import DraftConfig, HeadConfig, default_target_layer_ids
from domino_spec.settings import Settings, UserError, parse_settings, require


@dataclass(frozen=True)
class Inner(Settings):
    count: Annotated[int, Field(ge=1)]
    share: float = 0.5

    def __post_init__(self) -> None:
        require(self.share <= self.count, f"share must be at most count, got {self.share}")


@dataclass(frozen=True)
class Outer(Settings):
    name: str
    inner: Inner | None = None
    sizes: tuple[int, ...] = ()
    shifted: bool = False
    stops: int | tuple[int, ...] | None = None


def test_settings_are_read_with_lists_as_tuples_and_whole_numbers_as_floats():
    read = parse_settings(Outer, {"name": "a", "inner": {"count": 2, "share": 1}, "sizes": [1, 2]}, "file")
    assert read == Outer("a", Inner(2, 1.0), (1, 2))
    assert isinstance(read.inner.share, float)


ENDLESS: list = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"nam": "b"}, "file: unknown key 'nam'; known keys are inner, name, shifted, sizes"),
        ({"inner": {"cont": 1}}, "file: inner: unknown key 'cont'; known keys are count, share"),
        ({"inner": {}}, "file: inner: missing key 'count'"),
        ({"inner": 3}, "file: inner: expected mapping of settings, found 3 (int)"),
        ({"inner": {"count": 0}}, "file: inner.count: expected greater than or equal to 1, found 0 (int)"),
        ({"inner": {"count": 1, "share": 2}}, "file: inner: share must be at most count, got 2.0"),
        ({"inner": {"count": 1.0}}, "file: inner.count: expected integer, found 1.0 (float)"),
        ({"inner": {"count": True}}, "file: inner.count: expected integer, found True (bool)"),
        ({"inner": {"count": 2**63}}, "file: inner.count: expected integer of at most 64 bits, found one of 65 bits"),
        (
            {"inner": {"count": 1, "share": float("nan")}},
            "file: inner.share: expected finite number, found nan (float)",
        ),
        ({"inner": {"count": 1, "share": "1"}}, "file: inner.share: expected number, found '1' (str)"),
        ({"name": None}, "file: name: expected string, found null"),
        ({"name": ["a"]}, "file: name: expected string, found ['a'] (list)"),
        ({"name": "\ud800"}, "file: not valid text: "),
        ({"sizes": 3}, "file: sizes: expected list, found 3 (int)"),
        ({"sizes": [1, "x"]}, "file: sizes[1]: expected integer, found 'x' (str)"),
        ({"sizes": [10**5000]}, "file: sizes[0]: expected integer of at most 64 bits, found one of "),
        ({"sizes": ENDLESS}, "file: expected plain settings, found keys of other kinds or endless nesting"),
        ({"stops": "x"}, "file: stops: expected integer, found 'x' (str)"),
        ({"stops": [1, "x"]}, "file: stops"),
        ({"shifted": 1}, "file: shifted: expected true or false, found 1 (int)"),
        ({"shifted": "no"}, "file: shifted: expected true or false, found 'no' (str)"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_found_and_expected(changes, message):
    with pytest.raises(UserError) as error:
        parse_settings(Outer, {"name": "a"} | changes, "file")
    assert str(error.value).startswith(message)


def test_what_was_found_is_shortened():
    with pytest.raises(UserError) as error:
        parse_settings(Outer, {"name": [["x" * 1000] * 1000]}, "file")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


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
