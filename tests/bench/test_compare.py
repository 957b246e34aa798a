"""Two runs side by side: only what both measured, ratios recomputed by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from domino_spec.bench.compare import compare_runs, render_comparison, write_comparison
from domino_spec.bench.rows import Row
from domino_spec.settings import UserError
from tests.bench.synthetic import make_row, make_rows, write_bench

pytestmark = pytest.mark.slow

METHODS = [("none", 0), ("domino", 7), ("ngram", 8)]
SUITES = {"sums": 3, "words": 2}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_rows(SUITES, METHODS, temperatures=(0.0, 1.0), repeats=2)


@pytest.fixture(scope="module")
def before(rows, finished, tmp_path_factory) -> Path:
    return write_bench(tmp_path_factory.mktemp("compare") / "before", rows, finished)


def entries(comparison: dict) -> list[dict]:
    return [*comparison["pooled"], *(entry for of in comparison["suites"].values() for entry in of)]


def pooled(comparison: dict, method: str, temperature: float = 0.0) -> dict:
    (found,) = [e for e in comparison["pooled"] if (e["method"], e["temperature"]) == (method, temperature)]
    return found


def tau(rows: list[Row], method: str, suites: tuple[str, ...] = ("sums", "words"), temperature: float = 0.0) -> float:
    own = [r for r in rows if r.method == method and r.suite in suites and r.temperature == temperature]
    return sum(sum(r.acceptance_lengths) for r in own) / sum(len(r.acceptance_lengths) for r in own)


def doubled(row: Row) -> Row:
    return replace(row, acceptance_lengths=tuple(2 * length for length in row.acceptance_lengths))


def test_a_run_against_itself_has_ratios_of_one_and_equal_texts(before):
    comparison = compare_runs(before, before)
    assert list(comparison["suites"]) == ["sums", "words"]
    assert len(comparison["pooled"]) == 6 and len(entries(comparison)) == 18
    for entry in entries(comparison):
        assert entry["tau_ratio"] == 1 and tuple(entry["tau_ratio_interval"]) == (1, 1)
        assert entry["tau_a"] == entry["tau_b"] and entry["tokens_per_second_a"] == entry["tokens_per_second_b"]
        assert entry["speedup_ratio"] == 1 and tuple(entry["speedup_ratio_interval"]) == (1, 1)
        prompts = sum(SUITES.values()) if entry["suite"] is None else SUITES[entry["suite"]]
        assert entry["conversations"] == prompts
        assert entry["texts"] == entry["equal_texts"] == (2 * prompts if entry["temperature"] == 0 else 0)
    assert comparison["differing_settings"] == {}
    assert comparison["only_in_a"] == comparison["only_in_b"] == []


def test_twice_the_acceptance_is_twice_the_tau(before, rows, finished, tmp_path):
    after = write_bench(tmp_path / "after", [doubled(row) for row in rows], finished)
    for entry in entries(compare_runs(before, after)):
        assert entry["tau_ratio"] == pytest.approx(2) and entry["tau_ratio_interval"] == pytest.approx((2, 2))
        assert entry["tau_b"] == pytest.approx(2 * entry["tau_a"])
    for entry in entries(compare_runs(after, before)):
        assert entry["tau_ratio"] == pytest.approx(0.5)


def test_a_gain_in_one_suite_shows_there_and_widens_what_is_said_of_all(before, rows, finished, tmp_path):
    changed = [doubled(row) if row.suite == "sums" else row for row in rows]
    comparison = compare_runs(before, write_bench(tmp_path / "after", changed, finished))
    ratios = {name: [entry["tau_ratio"] for entry in of] for name, of in comparison["suites"].items()}
    assert ratios == {"sums": pytest.approx([2] * 6), "words": [1] * 6}
    entry = pooled(comparison, "domino")
    assert (entry["tau_a"], entry["tau_b"]) == pytest.approx((tau(rows, "domino"), tau(changed, "domino")))
    assert entry["tau_ratio"] == pytest.approx(tau(changed, "domino") / tau(rows, "domino"))
    low, high = entry["tau_ratio_interval"]
    assert 1 < low < entry["tau_ratio"] < high < 2


def test_a_slower_machine_changes_speeds_and_leaves_speedups_alone(before, rows, finished, tmp_path):
    slow = [replace(row, seconds_decode=2 * row.seconds_decode) for row in rows]
    for entry in entries(compare_runs(before, write_bench(tmp_path / "slow", slow, finished))):
        assert entry["tokens_per_second_b"] == pytest.approx(entry["tokens_per_second_a"] / 2)
        assert entry["speedup_ratio"] == pytest.approx(1)
        assert entry["speedup_over_none_b"] == pytest.approx(entry["speedup_over_none_a"])


def test_a_faster_method_shows_in_its_speedup_over_its_own_baseline(before, rows, finished, tmp_path):
    fast = [replace(r, seconds_decode=r.seconds_decode / (3 if r.method == "ngram" else 1)) for r in rows]
    comparison = compare_runs(before, write_bench(tmp_path / "fast", fast, finished))
    assert pooled(comparison, "ngram")["speedup_ratio"] == pytest.approx(3)
    assert pooled(comparison, "domino")["speedup_ratio"] == pytest.approx(1)


def test_only_common_prompts_and_contenders_are_compared(before, rows, finished, tmp_path):
    fewer = [row for row in rows if row.method != "ngram" and row.id not in ("sums/0", "words/0", "words/1")]
    fewer += make_rows({"sums": 3}, [("domino", 15)])
    comparison = compare_runs(before, write_bench(tmp_path / "fewer", fewer, finished))
    assert {(e["method"], e["budget"]) for e in entries(comparison)} == {("none", 0), ("domino", 7)}
    assert list(comparison["suites"]) == ["sums"]
    entry = pooled(comparison, "domino")
    common = [row for row in rows if row.id in ("sums/1", "sums/2")]
    assert entry["tau_a"] == entry["tau_b"] == pytest.approx(tau(common, "domino", ("sums",)))
    assert entry["conversations"] == 2 and entry["texts"] == 4 and entry["tau_ratio"] == 1
    assert comparison["only_in_a"] == ["ngram (8) at temperature 0", "ngram (8) at temperature 1", "suite words"]
    assert comparison["only_in_b"] == ["domino (15) at temperature 0"]
    text = render_comparison(comparison)
    assert "Only in A: ngram (8) at temperature 0, ngram (8) at temperature 1, suite words." in text


def test_a_run_without_plain_decoding_has_no_speedup_there(before, rows, finished, tmp_path):
    lacking = write_bench(tmp_path / "lacking", [row for row in rows if row.method != "none"], finished)
    comparison = compare_runs(before, lacking)
    for entry in entries(comparison):
        assert entry["speedup_over_none_a"] > 0
        assert entry["speedup_over_none_b"] is entry["speedup_ratio"] is entry["speedup_ratio_interval"] is None
        assert entry["tau_ratio"] == 1
    assert json.loads(json.dumps(comparison, allow_nan=False)) is not None


def test_texts_that_changed_are_counted(before, rows, finished, tmp_path):
    changed = [
        replace(row, token_ids=(*row.token_ids[:-1], 0)) if (row.id, row.method) == ("words/1", "domino") else row
        for row in rows
    ]
    comparison = compare_runs(before, write_bench(tmp_path / "changed", changed, finished))
    counts = {e["method"]: (e["equal_texts"], e["texts"]) for e in comparison["pooled"] if e["temperature"] == 0}
    assert counts == {"none": (10, 10), "domino": (8, 10), "ngram": (10, 10)}
    assert "| 8 of 10 |" in render_comparison(comparison)


def test_turns_of_a_conversation_are_drawn_together(finished, tmp_path):
    def turns(conversation: int) -> list[Row]:
        first, second = (make_row("chat", i, "ngram", 8) for i in (conversation, conversation + 100))
        return [first, replace(second, id=f"{first.id}#2", turn=2)]

    bench = write_bench(tmp_path / "turns", [row for i in range(3) for row in turns(i)], finished)
    (entry,) = compare_runs(bench, bench)["pooled"]
    assert (entry["conversations"], entry["texts"], entry["equal_texts"]) == (3, 6, 6)


def test_a_single_prompt_gives_a_ratio_without_an_interval(finished, tmp_path):
    bench = write_bench(tmp_path / "one", make_rows({"sums": 1}, METHODS), finished)
    for entry in entries(compare_runs(bench, bench)):
        assert entry["tau_ratio"] == 1 and entry["tau_ratio_interval"] is None


def test_settings_that_differ_are_named(before, rows, finished, tmp_path):
    configuration = json.loads((before / "settings.json").read_text())["configuration"]
    changes = {"thinking": not configuration["thinking"], "max_new_tokens": 2048, "target": "another-target"}
    after = write_bench(tmp_path / "after", rows, finished, **changes)
    settings = json.loads((after / "settings.json").read_text())
    settings["sessions"][0]["commit"] = "another-commit"
    (after / "settings.json").write_text(json.dumps(settings))
    comparison = compare_runs(before, after)
    found = comparison["differing_settings"]
    assert found == {
        **{name: [configuration[name], value] for name, value in changes.items()},
        "commit": [found["commit"][0], "another-commit"],
    }
    text = render_comparison(comparison)
    assert f"| max_new_tokens | {configuration['max_new_tokens']} | 2048 |" in text and "another-target" in text


def test_the_tables_show_the_figures_and_warn_about_speeds(before, rows, finished, tmp_path):
    better = [doubled(row) if row.method == "domino" else row for row in rows]
    comparison = compare_runs(before, write_bench(tmp_path / "better", better, finished))
    lines = render_comparison(comparison).splitlines()
    entry = pooled(comparison, "domino", 1.0)
    (line,) = [line for line in lines[: lines.index("## sums")] if line.startswith("| domino (7), T = 1 |")]
    assert f"| 5 | {entry['tau_a']:.2f} | {entry['tau_b']:.2f} | **2.000" in line
    assert f"| {entry['tokens_per_second_a']:.1f} | {entry['tokens_per_second_b']:.1f} |" in line
    assert not any("**" in line for line in lines if line.startswith("| ngram"))
    assert "## words" in lines
    assert any("Tokens/s of two sessions or machines do not compare" in line for line in lines)


def test_a_comparison_is_written_beside_its_figures(before, tmp_path):
    comparison = compare_runs(before, before)
    path = write_comparison(comparison, tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.md" and path.read_text() == render_comparison(comparison)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(comparison))
    with pytest.raises(UserError, match="give --out a directory"):
        write_comparison(comparison, path)


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "settings only"])
def test_a_directory_that_is_no_bench_is_refused(before, tmp_path, kind):
    other = tmp_path / "other"
    if kind == "file":
        other.write_text("text")
    elif kind != "missing":
        other.mkdir()
    if kind == "settings only":
        (other / "settings.json").write_bytes((before / "settings.json").read_bytes())
    for pair in ((before, other), (other, before)):
        with pytest.raises(UserError, match="is no bench directory") as error:
            compare_runs(*pair)
        assert str(other) in str(error.value) and "\n" not in str(error.value)


def test_runs_with_nothing_in_common_are_refused(before, finished, tmp_path):
    other = write_bench(tmp_path / "other", make_rows({"letters": 2}, [("domino", 7)]), finished)
    with pytest.raises(UserError, match="have no run in common") as error:
        compare_runs(before, other)
    assert "domino (7) at temperature 0 on letters" in str(error.value) and "\n" not in str(error.value)
