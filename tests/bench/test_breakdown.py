"""The stages of a cycle: all there, adding up, and leaving the request where it was."""

from __future__ import annotations

import pytest

from domino_spec.bench.breakdown import STAGES, measure_breakdown, render_breakdown, synthetic_context
from domino_spec.config import UserError
from tests import tiny


@pytest.mark.parametrize("shift_label", [True, False])
@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_stages_and_rest_add_up_to_the_cycle(target, method, shift_label):
    draft = tiny.tiny_draft(target, shift_label=shift_label)
    found = measure_breakdown(target, draft, tiny.random_prompts([9])[0], method=method, candidates=10, repeats=3)
    assert list(found.stages) == [*STAGES, "rest"]
    assert all(found.stages[name] > 0 for name in STAGES)
    assert sum(found.stages.values()) == pytest.approx(found.cycle)
    assert found.num_drafts == draft.config.max_drafts and found.context == 9
    assert found.cost_ratio == found.cycle / found.plain_step
    assert found.candidates == (10 if method == "domino" else None)


def test_the_measured_cycle_is_the_one_that_decoding_runs(target, monkeypatch):
    """The stages run on the same inputs as the drafter's own cycle: their rollouts choose the same tokens."""
    from domino_spec.bench import breakdown
    from domino_spec.drafters import domino

    seen = {"drafter": [], "stage": []}
    for name, module in (("drafter", domino), ("stage", breakdown)):

        def recording(*arguments, original=module.head_rollout, name=name, **options):
            result = original(*arguments, **options)
            seen[name].append(result.choices.tolist())
            return result

        monkeypatch.setattr(module, "head_rollout", recording)
    draft = tiny.tiny_draft(target)
    measure_breakdown(target, draft, tiny.random_prompts([9])[0], num_drafts=3, candidates=10, repeats=2)
    assert len(seen["stage"]) >= 2
    assert all(choices == seen["stage"][0] for choices in seen["stage"] + seen["drafter"])


def test_the_table_names_every_stage_and_what_tau_must_reach(target):
    found = measure_breakdown(target, tiny.tiny_draft(target), [1, 2, 3], num_drafts=2, repeats=1)
    table = render_breakdown(found)
    rows = ("verify", "context projection", "backbone", "LM head", "head rollout", "accept and commit", "rest", "cycle")
    assert all(name in table for name in rows)
    assert f"tau {found.cost_ratio:.2f}" in table and f"tau {2 * found.cost_ratio:.2f}" in table


def test_what_cannot_be_broken_down_is_refused(target):
    draft = tiny.tiny_draft(target)
    with pytest.raises(UserError, match="only domino and dflash have stages"):
        measure_breakdown(target, draft, [1, 2], method="ngram")
    with pytest.raises(UserError, match="at least 1"):
        measure_breakdown(target, draft, [1, 2], repeats=0)
    with pytest.raises(UserError, match="between 2 and"):
        synthetic_context(target, target.max_length)


def test_a_synthetic_context_is_the_same_every_time(target):
    context = synthetic_context(target, 20)
    assert len(context) == 20 and context == synthetic_context(target, 20)
    assert all(0 <= token < target.vocab_size for token in context)
