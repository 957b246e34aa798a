"""What a bench keeps of a profile: the stages of one method's cycle at a real context."""

from __future__ import annotations

import pytest

from domino_spec.bench.profile import STAGES, measure_breakdown
from domino_spec.bench.profile_report import render_breakdown
from domino_spec.settings import UserError
from tests import tiny


@pytest.mark.parametrize("shift_label", [True, False])
@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_a_breakdown_has_the_stages_of_a_profile(target, method, shift_label):
    draft = tiny.tiny_draft(target, shift_label=shift_label)
    found = measure_breakdown(target, draft, tiny.random_prompts([9])[0], method=method, candidates=10, repeats=3)
    assert list(found.stages) == [*STAGES, "host_gap"]
    assert all(found.stages[name] > 0 for name in STAGES)
    assert found.num_drafts == draft.config.max_drafts and found.context == 9
    assert found.cost_ratio == found.cycle / found.plain_step
    assert found.candidates == (10 if method == "domino" else None)


def test_a_single_repeat_adds_up_to_its_cycle(target):
    found = measure_breakdown(target, tiny.tiny_draft(target), [1, 2, 3, 4], repeats=1)
    assert sum(found.stages.values()) == pytest.approx(found.cycle)


def test_the_table_names_every_stage_and_what_tau_must_reach(target):
    found = measure_breakdown(target, tiny.tiny_draft(target), [1, 2, 3], num_drafts=2, repeats=1)
    table = render_breakdown(found)
    named = ("verify", "context projection", "backbone", "LM head", "head rollout", "accept and commit", "host gap")
    assert all(f"| {name} |" in table for name in named) and "| **cycle** |" in table
    assert f"tau {found.cost_ratio:.2f}" in table and f"tau {2 * found.cost_ratio:.2f}" in table


def test_what_cannot_be_broken_down_is_refused(target):
    draft = tiny.tiny_draft(target)
    with pytest.raises(UserError, match="eagle3 needs an EAGLE-3 draft"):
        measure_breakdown(target, draft, [1, 2], method="eagle3")
    with pytest.raises(UserError, match="repeats must be at least 1"):
        measure_breakdown(target, draft, [1, 2], repeats=0)
    with pytest.raises(UserError, match="context must be between 2 and"):
        measure_breakdown(target, draft, [1])
