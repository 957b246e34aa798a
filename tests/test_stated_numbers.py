"""Numbers that the reference states are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from domino_spec.api import default_min_confidence
from domino_spec.cli import group as threads
from domino_spec.decoding import engine, request
from domino_spec.decoding.policy import adaptive
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.drafters import dart, eagle3, methods
from domino_spec.drafters import lookup as lookup_first
from domino_spec.drafters import lookup as ngram
from domino_spec.target import model
from tests.decoding import test_lossless

DOCS = Path(__file__).parent.parent / "docs"
CPU = default_min_confidence(torch.device("cpu"))
STATED = {
    "reference/decoding.md": (
        f"in parts of at most {model.PREFILL_CHUNK} tokens",
        f"at most {methods.TREE_BUDGET} drafts by default",
        f"{methods.TREE_BUDGET + 1} // R - 1 drafts each",
        f"another size, {methods.LARGEST_TREE} at most",
        f"{eagle3.TOP_K} best nodes of a level expanded together, {eagle3.DEPTH} times",
        f"`num_drafts` 15 and {eagle3.TOTAL - 1}",
        f"the {dart.TOP} best tokens of each",
        f"{dart.BEAM} best prefixes of each depth",
        f"trees of {dart.TOTAL} drafts ({dart.TOTAL + 1} rows",
        f"({CPU} by default on a CPU, 0 elsewhere)",
        f"promises {adaptive.START_DRAFTING - 1:.0%} more tokens per second than plain decoding",
        f"fewer than {adaptive.COMPARISONS} comparisons and drafting promises less than {adaptive.CLEARLY - 1:.0%}",
        f"At most {adaptive.BUDGET:.1%} of the time is lost on learning",
        f"After {request.FIRST_CHECK} such passes",
        f"below {request.USELESS:.0%} a warning",
    ),
    "reference/command-line.md": (f"GOMP_SPINCOUNT={threads.SPIN_COUNT}",),
    "benchmarks.md": (
        f"{len(test_lossless.CASES)} cases",
        "together: 1e-4",
    ),
    "how-to/serve.md": (f"the {DEFAULT_CANDIDATES} best base logits",),
}


@pytest.mark.parametrize(("page", "sentence"), [(page, s) for page, stated in STATED.items() for s in stated])
def test_what_a_page_states_is_what_the_code_does(page, sentence):
    assert sentence in " ".join((DOCS / page).read_text("utf-8").split())


def test_words_for_numbers_that_the_page_spells_out():
    assert (engine.TRIAL_REQUESTS, methods.SMALLEST_TREE, adaptive.BUDGET_AT_START) == (4, 2, 0.25)
    assert lookup_first.LookupFirst.__init__.__defaults__ == (3, 6, None)
    assert ngram.PromptLookup().max_drafts == 8 and request.DEVIATIONS == 3


def test_what_the_benchmarks_page_says_of_the_tests_of_losslessness():
    """Seven wrong ways in 14 pairings, one false alarm in ten thousand."""
    (rules,) = test_lossless.test_a_wrong_verifier_is_detected.pytestmark
    walks, drafters = test_lossless.test_a_wrong_walk_is_detected.pytestmark
    ways = {rule for _, rule in rules.args[1]} | {*walks.args[1]}
    pairings = len(rules.args[1]) + len(walks.args[1]) * len(drafters.args[1])
    page = " ".join((DOCS / "benchmarks.md").read_text("utf-8").split())
    assert len(ways) == 7 and f"Seven deliberately wrong ways to verify, in {pairings} pairings" in page
    assert test_lossless.FALSE_ALARM == 1e-4


def test_the_table_of_methods_is_the_code_s():
    table = (DOCS / "reference/decoding.md").read_text("utf-8").partition("## Methods")[2]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == {*methods.METHODS}
    for name, method in methods.METHODS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
        assert row.endswith("| no |") == (not method.kinds)
