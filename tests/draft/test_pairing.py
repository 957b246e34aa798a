"""A draft made for another target is refused in one sentence that names both sides."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.load import load_draft
from domino_spec.settings import UserError
from tests.tiny import tiny_draft, tiny_target


@pytest.fixture
def directory(tmp_path, target):
    save_draft(tiny_draft(target), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "shape, what",
    [
        (dict(hidden_size=48), "hidden size 32, the target has 48"),
        (dict(vocab_size=61), "vocabulary 60, the target has 61"),
        (dict(num_hidden_layers=5), "number of target layers 4, the target has 5"),
    ],
)
def test_another_shape_is_refused_naming_both_sides(directory, shape, what):
    with pytest.raises(UserError, match=what) as error:
        load_draft(directory, tiny_target(**shape))
    assert str(directory) in str(error.value) and "target tiny" in str(error.value)


def test_other_weights_of_the_same_shape_are_refused_unless_allowed(directory, target, caplog):
    other = tiny_target(seed=9)
    with pytest.raises(UserError, match="fingerprint") as error:
        load_draft(directory, other)
    assert other.fingerprint in str(error.value) and target.fingerprint in str(error.value)
    with caplog.at_level(logging.WARNING):
        load_draft(directory, other, allow_other_target=True)
    assert "other weights" in caplog.text


def test_the_right_target_is_accepted_without_a_word(directory, target, caplog):
    draft = load_draft(directory, target)
    assert draft.ends.lm_head.shape == target.lm_head_weight.shape
    assert not caplog.records


def test_a_draft_without_a_fingerprint_warns(tmp_path, target, caplog):
    draft = tiny_draft(target)
    draft.config = dataclasses.replace(draft.config, target_fingerprint=None)
    save_draft(draft, tmp_path)
    load_draft(tmp_path, target)
    assert len(caplog.records) == 1 and "only shapes were checked" in caplog.text
