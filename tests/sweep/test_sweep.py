"""Every causal LM family of transformers gives here exactly its own text, or is refused by one line."""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import version

import pytest

from tests.sweep import faults
from tests.sweep.families import families
from tests.sweep.judge import Outcome
from tests.sweep.run import run_family
from tests.sweep.table import MARK, PAGE, documented, heading, render, write

QUICK = (
    *("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"),
    *("minimax_m2", "phi3", "deepseek_v3", "bert"),
)
"""Ten families for the quick tests and for the sanitizers: what native loops run, and what they must not touch."""
FAMILIES = QUICK if os.environ.get("DOMINO_SPEC_NATIVE_SANITIZE") == "1" else families()

DOCUMENTED = f"Of transformers {version('transformers')}, " in PAGE.read_text("utf-8")
"""Whether the page is about the installed transformers; others have other families."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_gives_its_own_text_or_is_refused_by_one_line(family):
    outcome = run_family(family)
    if outcome.kind == "not built" and not DOCUMENTED:
        pytest.skip(f"{family} was not built: {outcome.detail}")
    assert outcome.passed, f"{outcome.kind}: {outcome.detail}"
    if DOCUMENTED:
        assert heading(outcome) == documented()[family], (
            "docs/reference/targets.md says otherwise; if this is better, run `python -m tests.sweep --write`"
        )


@pytest.mark.skipif(not DOCUMENTED, reason="the page is about another transformers")
def test_the_page_names_every_family_once():
    assert sorted(documented()) == sorted(families())


def test_the_page_is_read_as_it_was_written(tmp_path):
    page = tmp_path / "targets.md"
    page.write_text(f"by hand\n{MARK}\nold", "utf-8")
    outcomes = [
        Outcome("llama", "equal"),
        Outcome("gemma2", "equal", drafts="no norm | none"),
        Outcome("bert", "refused", "hidden states differ by 0.64 of their size from transformers' own"),
        Outcome("mamba", "not tried", "why"),
    ]
    write(outcomes, "5.0", page)
    assert documented(page) == {outcome.family: heading(outcome) for outcome in outcomes}
    assert page.read_text("utf-8") == "by hand\n" + render(outcomes, "5.0")
    assert "0.64" not in page.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "trial"),
    [
        pytest.param("gpt_oss", partial(faults.argument_ignored, "s_aux"), id="sink ignored"),
        pytest.param("gemma2", partial(faults.argument_ignored, "softcap"), id="cap of scores ignored"),
        pytest.param(
            "granite (logits_scaling 1)", partial(faults.argument_ignored, "scaling"), id="factor of scores ignored"
        ),
        pytest.param("mistral", faults.window_off_by_one, id="window off by one, in every layer"),
        pytest.param("gemma3_text", faults.window_off_by_one, id="window off by one, in every second layer"),
        pytest.param("gemma2", faults.norm_before_instead_of_after, id="norm before instead of after"),
        pytest.param("gemma2", faults.cap_of_logits_ignored, id="cap of logits ignored"),
    ],
)
def test_planted_faults_are_seen(family, trial):
    assert run_family(family, trial).kind == "wrong text"


@pytest.mark.slow
def test_without_a_planted_fault_the_same_trial_passes():
    assert run_family("gemma2", faults.nothing).kind == "equal"


@pytest.mark.slow
def test_a_process_that_aborts_or_hangs_is_reported():
    aborted = run_family("llama", faults.heap_corrupted)
    assert aborted.kind == "abort" and aborted.detail.startswith("SIGABRT")
    assert run_family("llama", faults.hangs, seconds=2).kind == "timeout"


@pytest.mark.slow
def test_a_comparison_that_cannot_see_is_reported():
    assert run_family("llama", faults.weights_without_effect).kind == "blind"
