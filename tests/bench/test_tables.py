"""Tables laid out like the paper's: where each figure stands, and what is left out where it was not measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from domino_spec.bench.page import with_interval
from domino_spec.bench.report import (
    against_reference,
    build_report,
    head_by_suites,
    head_on_and_off,
    methods_by_suites,
    suites_by_batch,
    write_report,
)
from tests.bench.synthetic import make_rows, write_bench

SUITES = {"mine": 3, "alpaca": 3, "gsm8k": 4, "humaneval": 3}
CONTENDERS = [("none", 0), ("dflash", 7), ("domino", 7), ("domino", 15), ("eagle3", 15)]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture(scope="module")
def bench(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables") / "bench"
    rows = make_rows(SUITES, CONTENDERS, temperatures=(0.0, 1.0))
    return write_bench(out, rows, finished, methods=["none", "dflash", "domino", "eagle3"])


@pytest.fixture(scope="module")
def report(bench):
    return build_report(bench)


def find(entries, method, budget, temperature=0.0):
    (found,) = [e for e in entries if (e["method"], e["budget"], e["temperature"]) == (method, budget, temperature)]
    return found


def test_a_figure_stands_before_its_interval():
    entry = {"tau": 2.2149, "tau_interval": [2.05, 2.384]}
    assert with_interval(entry, "tau") == "2.21 (2.05-2.38)"
    assert with_interval(entry | {"tau_interval": None}, "tau") == "2.21"
    assert with_interval({"tau": 1.0, "tau_interval": [1.0, 1.0]}, "tau") == "1.00"
    assert with_interval({}, "tau") == with_interval({"tau": None}, "tau") == "–"


def test_methods_stand_against_suites_in_the_papers_groups(report):
    groups, _, suites, kinds, *rows = cells(methods_by_suites(report, 0.0))
    assert groups == ["", "MATH", "", "CODE", "", "CHAT", "", "OTHER", "", "OVERALL", ""]
    assert suites[1::2] == ["**gsm8k**", "**humaneval**", "**alpaca**", "**mine**", "**mean**"]
    assert kinds == ["**method**", *["speed-up", "tau"] * 5]
    assert [row[0] for row in rows] == ["dflash (7)", "domino (7)", "domino (15)", "eagle3 (15)"], "not the baseline"
    assert {len(row) for row in rows} == {len(groups)}
    domino = rows[1]
    for place, suite in ((1, "gsm8k"), (3, "humaneval"), (5, "alpaca"), (7, "mine")):
        entry = find(report["suites"][suite], "domino", 7)
        low, high = entry["speedup_over_none_interval"]
        assert domino[place] == f"{entry['speedup_over_none']:.2f} ({low:.2f}-{high:.2f})"
        assert domino[place + 1] == with_interval(entry, "tau")
    assert domino[9].startswith(f"{find(report['mean'], 'domino', 7)['speedup_over_none']:.2f} (")
    sampled = cells(methods_by_suites(report, 1.0))
    assert sampled[4:] != rows and [row[0] for row in sampled[4:]] == [row[0] for row in rows]


def test_a_suite_that_a_method_lacks_is_a_dash(finished, tmp_path):
    rows = [r for r in make_rows(SUITES, CONTENDERS) if (r.suite, r.method) != ("alpaca", "eagle3")]
    eagle = cells(methods_by_suites(build_report(write_bench(tmp_path, rows, finished)), 0.0))[-1]
    assert eagle[5:7] == ["–", "–"] and "–" not in eagle[:5]


def test_every_suite_starts_with_the_baselines_own_speed(report):
    headers, _, *rows = cells(suites_by_batch(report, 0.0))
    assert headers == ["method", "batch 1", "tau"]
    blocks = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    assert [block[0] for block in blocks] == [[f"**{s}**", "", ""] for s in ("gsm8k", "humaneval", "alpaca", "mine")]
    for block, suite in zip(blocks, ("gsm8k", "humaneval", "alpaca", "mine"), strict=True):
        none = find(report["suites"][suite], "none", 0)
        assert block[1] == ["none (tokens/s)", f"{none['tokens_per_second']:.1f}", "–"]
        eagle = find(report["suites"][suite], "eagle3", 15)
        assert block[5] == ["eagle3 (15)", with_interval(eagle, "speedup_over_none"), with_interval(eagle, "tau")]


def test_without_plain_decoding_the_outside_baseline_takes_its_place(finished, tmp_path):
    rows = make_rows(SUITES, [("transformers", 0), ("domino", 7)])
    out = write_bench(tmp_path, rows, finished)
    report = write_report(out)
    assert cells(suites_by_batch(report, 0.0))[3][0] == "transformers (tokens/s)"
    domino = cells(methods_by_suites(report, 0.0))[4]
    assert domino[1] == with_interval(find(report["suites"]["gsm8k"], "domino", 7), "speedup_over_transformers")
    assert "### Speed-up over `transformers`, and tau" in (out / "report.md").read_text()


def test_the_head_is_compared_where_one_draft_ran_both(report, finished, tmp_path):
    headers, _, off, on = cells(head_on_and_off(report, 0.0))
    assert headers == ["method", "mean tau", "mean speed-up"]
    assert (off[0], on[0]) == ("without Domino head: dflash (7)", "with Domino head: domino (7)")
    means = [find(report["mean"], method, 7) for method in ("dflash", "domino")]
    for row, mean in zip((off, on), means, strict=True):
        assert row[1:] == [with_interval(mean, "tau"), with_interval(mean, "speedup_over_none")]
    (table,) = head_by_suites(report, 0.0)
    headers, _, *rows = cells(table)
    assert headers == ["suite", "dflash (7): tau", "dflash (7): speed-up", "domino (7): tau", "domino (7): speed-up"]
    assert [row[0] for row in rows] == ["gsm8k", "humaneval", "alpaca", "mine", "**mean**"]
    assert rows[-1][1:] == [*off[1:], *on[1:]]

    two = [{"name": "a", "digest": "1"}, {"name": "b", "digest": "2"}]
    several = build_report(write_bench(tmp_path / "several", make_rows(SUITES, CONTENDERS), finished, drafts=two))
    assert head_on_and_off(several, 0.0) is None and head_by_suites(several, 0.0) == [], "dflash may be another draft"
    rows = [replace(r, method="domino-head-off") if r.method == "dflash" else r for r in make_rows(SUITES, CONTENDERS)]
    named = build_report(write_bench(tmp_path / "named", rows, finished, drafts=two))
    assert cells(head_on_and_off(named, 0.0))[2][0] == "without Domino head: domino-head-off (7)"
    alone = build_report(write_bench(tmp_path / "alone", make_rows(SUITES, [("none", 0), ("domino", 7)]), finished))
    assert head_on_and_off(alone, 0.0) is None


def test_methods_stand_beside_the_reference_of_their_own_budget(report):
    (table,) = against_reference(report, 0.0)
    headers, _, *rows = cells(table)
    assert headers[:2] == ["method", "against"] and headers[-2:] == ["tau: mean", "tokens/s: mean"]
    assert [row[:2] for row in rows] == [
        ["domino (7)", "dflash (7)"],
        ["domino (15)", "dflash (7)"],  # the reference has no other
        ["eagle3 (15)", "dflash (7)"],
    ]
    tau = find(report["suites"]["gsm8k"], "domino", 7)["tau"] / find(report["suites"]["gsm8k"], "dflash", 7)["tau"]
    assert rows[0][2].startswith(f"{tau:.2f} (")


def test_report_md_says_which_table_of_the_paper_each_one_follows(bench):
    write_report(bench)
    markdown = (bench / "report.md").read_text()
    for number in (1, 3, 4, 6):
        assert markdown.count(f"laid out like Table {number}") == 2, "one of each temperature"
    assert "95% interval over prompts" in markdown and "drafts of one pass" in markdown


def test_methods_keep_one_order_in_every_suite(finished, tmp_path):
    """Who is measured first changes from prompt to prompt, and so with the first prompt of a suite."""
    rows = make_rows(SUITES, CONTENDERS)
    turned = [row for row in rows if row.suite != "gsm8k"] + [row for row in rows if row.suite == "gsm8k"][::-1]
    out = write_bench(tmp_path / "bench", turned, finished, methods=["none", "dflash", "domino", "eagle3"])
    report = build_report(out)
    orders = {tuple((e["method"], e["budget"]) for e in entries) for entries in report["suites"].values()}
    assert orders == {tuple((e["method"], e["budget"]) for e in report["pooled"])}
