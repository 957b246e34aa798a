"""Every figure of report.json, recomputed here from raw.jsonl by other code; and what report.md and the plots show."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import torch

from domino_spec.bench.figures import AGREEMENT, RESAMPLES, tail_share
from domino_spec.bench.report import build_report, write_report
from domino_spec.bench.rows import read_rows
from domino_spec.bench.ties import Tie, find_partings, load_ties, save_ties
from domino_spec.settings import UserError
from tests.bench.conftest import read_raw

CONTENDER = ("method", "budget", "temperature")
INTERVALS = {"tau", "speedup_over_none", "speedup_over_transformers", "cost_ratio"}


def named(entries: list[dict]) -> dict[tuple, dict]:
    found = {tuple(e[k] for k in CONTENDER): e for e in entries}
    assert len(found) == len(entries)
    return found


def tokens_while_decoding(row: dict) -> int:
    return len(row["token_ids"]) - (row["method"] == "transformers")


class Recomputed:
    """One contender's figures over a set of raw rows, from the definitions."""

    def __init__(self, rows: list[dict], contender: tuple) -> None:
        self.rows = [r for r in rows if tuple(r[k] for k in CONTENDER) == contender]
        self.others = {
            baseline: [
                next(
                    r
                    for r in rows
                    if r["method"] == baseline and all(r[k] == own[k] for k in ("suite", "id", "temperature", "repeat"))
                )
                for own in self.rows
            ]
            for baseline in ("none", "transformers")
        }

    @staticmethod
    def pace(rows: list[dict]) -> float:
        return sum(r["seconds_decode"] for r in rows) / sum(map(tokens_while_decoding, rows))

    @staticmethod
    def whole_pace(rows: list[dict]) -> float:
        seconds = sum(r["seconds_decode"] for r in rows) + sum(r["seconds_prefill"] for r in rows)
        return seconds / sum(len(r["token_ids"]) for r in rows)

    @staticmethod
    def step(rows: list[dict]) -> float:
        return sum(r["seconds_decode"] for r in rows) / sum(len(r["acceptance_lengths"]) for r in rows)

    def figures(self) -> dict:
        lengths = [length for row in self.rows for length in row["acceptance_lengths"]]
        none, stock = self.others["none"], self.others["transformers"]
        tau, cost = mean(lengths), self.step(self.rows) / self.step(none)
        speedup = self.pace(none) / self.pace(self.rows)
        return {
            "prompts": len({(r["suite"], r["id"]) for r in self.rows}),
            "conversations": len({(r["suite"], r["id"].partition("#")[0]) for r in self.rows}),
            "runs": len(self.rows),
            "tokens": sum(len(r["token_ids"]) for r in self.rows),
            "passes": len(lengths),
            "tau": tau,
            "tokens_per_second": 1 / self.pace(self.rows),
            "end_to_end_tokens_per_second": 1 / self.whole_pace(self.rows),
            "speedup_over_none": speedup,
            "speedup_over_transformers": self.pace(stock) / self.pace(self.rows),
            "end_to_end_speedup_over_none": self.whole_pace(none) / self.whole_pace(self.rows),
            "end_to_end_speedup_over_transformers": self.whole_pace(stock) / self.whole_pace(self.rows),
            "cost_ratio": cost,
            "tau_over_cost": tau / cost,
            "agrees": abs(speedup * cost / tau - 1) <= AGREEMENT,
        }


@pytest.fixture(scope="module")
def report(finished: Path) -> dict:
    return json.loads((finished / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def raw(finished: Path) -> list[dict]:
    return read_raw(finished)


def test_the_report_covers_every_contender_and_suite(report, raw):
    contenders = {tuple(row[k] for k in CONTENDER) for row in raw}
    greedy = {(m, b, 0.0) for m, b, _ in contenders if m not in ("domino-argmax", "domino-matching")}
    assert greedy < contenders and ("domino", 2, 1.0) in contenders and ("domino-matching", 4, 1.0) in contenders
    assert set(named(report["pooled"])) == set(named(report["mean"])) == contenders
    assert set(report["suites"]) == {"sums", "words"}
    assert all(set(named(entries)) == contenders for entries in report["suites"].values())
    assert report["measured_runs"] == len(raw) == report["settings"]["planned_runs"]


def test_every_figure_can_be_recomputed_from_the_raw_rows(report, raw):
    sets = [(report["pooled"], raw)]
    sets += [(entries, [r for r in raw if r["suite"] == name]) for name, entries in report["suites"].items()]
    for entries, rows in sets:
        for contender, entry in named(entries).items():
            expected = Recomputed(rows, contender).figures()
            assert set(entry) == {*CONTENDER, *expected, *(f"{name}_interval" for name in INTERVALS)}
            for name, value in expected.items():
                assert entry[name] == pytest.approx(value), (contender, name)


def test_means_are_unweighted_over_suites(report):
    for contender, entry in named(report["mean"]).items():
        of_suites = [named(entries)[contender] for entries in report["suites"].values()]
        assert entry["suites"] == len(of_suites) == 2
        for name in set(entry) - {*CONTENDER, "suites", *(f"{name}_interval" for name in INTERVALS)}:
            assert entry[name] == pytest.approx(mean(suite[name] for suite in of_suites)), (contender, name)


def test_acceptance_can_be_recomputed_from_the_raw_rows(report, raw):
    entries = named(report["acceptance"])
    assert set(entries) == {c for c in named(report["pooled"]) if c[1] > 0}
    for contender, entry in entries.items():
        passes = [
            (drafts, length - 1)
            for row in raw
            if tuple(row[k] for k in CONTENDER) == contender
            for drafts, length in zip(row["num_drafts"], row["acceptance_lengths"], strict=True)
        ]
        counts = defaultdict(int)
        for _, accepted in passes:
            counts[str(accepted + 1)] += 1
        assert entry["histogram"] == counts
        for k in range(1, contender[1] + 1):
            with_k = [accepted >= k for drafts, accepted in passes if drafts >= k]
            reached = [accepted >= k for drafts, accepted in passes if drafts >= k and accepted >= k - 1]
            assert entry["by_position"][k - 1] == pytest.approx(mean(with_k) if with_k else 0.0)
            assert entry["conditional"][k - 1] == (pytest.approx(mean(reached)) if reached else None)


def test_greedy_equality_can_be_recomputed_from_the_raw_rows(report, raw):
    greedy = {(r["method"], r["budget"], r["id"], r["repeat"]): r["token_ids"] for r in raw if r["temperature"] == 0}
    seen = set()
    for entry in report["greedy_equality"]:
        seen.add((entry["method"], entry["reference"]))
        texts = [
            (tokens, greedy[entry["reference"], 0, prompt, repeat])
            for (method, budget, prompt, repeat), tokens in greedy.items()
            if (method, budget) == (entry["method"], entry["budget"])
        ]
        assert entry["compared"] == len(texts) == 10
        assert entry["equal"] == sum(own == other for own, other in texts)
    methods = ("domino", "dflash", "ngram", "domino-tree")
    assert seen == {(m, r) for m in methods for r in ("none", "transformers")} | {("transformers", "none")}


def test_a_difference_injected_into_the_raw_rows_is_reported_with_its_margin(finished, tmp_path):
    for name in ("settings.json", "raw.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    rows = read_raw(tmp_path)
    victim = next(r for r in rows if r["method"] == "domino" and r["temperature"] == 0 and r["budget"] == 4)
    victim["token_ids"][4] += 1
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    partings = [p for p in find_partings(read_rows(tmp_path)) if p.position == 4 and p.id == victim["id"]]
    partings = [p for p in partings if (p.method, p.budget, p.repeat) == ("domino", 4, victim["repeat"])]
    assert {p.reference for p in partings} == {"none", "transformers"}
    before = {(e["method"], e["budget"], e["reference"]): e for e in build_report(finished)["greedy_equality"]}
    save_ties([Tie(p, (1, 2), 0.25, 1e-6, False) for p in partings], tmp_path)
    report = write_report(tmp_path)
    for entry in report["greedy_equality"]:
        name = (entry["method"], entry["budget"], entry["reference"])
        hit = name[:2] == ("domino", 4)
        assert entry["equal"] == before[name]["equal"] - hit
        assert (entry["largest_margin"] == 0.25) == hit
    entry = next(d for d in report["differences"] if d["position"] == 4 and d["id"] == victim["id"])
    assert (entry["token"], entry["margin"], entry["near_tie"]) == (victim["token_ids"][4], 0.25, False)
    markdown = (tmp_path / "report.md").read_text()
    assert "0.250000 | 0.000001 | **no** |" in markdown


def test_the_report_says_what_it_was_measured_with(finished, report):
    settings, session = report["settings"], report["sessions"][0]
    assert settings["seed"] == 0 and settings["threads"] == 1 and settings["dtype"] == "float32"
    assert settings["device"] == "cpu" and settings["device_name"] and settings["target_fingerprint"]
    assert settings["num_drafts"] == [2, 4] and settings["suites"] == {"sums": 2, "words": 1}
    assert session["command"] and session["versions"]["torch"] and "commit" in session
    markdown = (finished / "report.md").read_text()
    words = (settings["target_fingerprint"], session["started"], settings["device_name"], "1 threads")
    for text in (*words, "thinking off", "sums (2 conversations, 4 turns), words (1)", *settings["drafts"][0].values()):
        assert text in markdown


@pytest.mark.slow
def test_intervals_can_be_recomputed_from_the_raw_rows(report, raw):
    """Suite `sums` has two conversations, drawn anew by a generator that the suite's name seeds."""
    seed = int.from_bytes(hashlib.sha256(b"sums").digest()[:4], "big")
    drawn = torch.randint(2, (RESAMPLES, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    tail = tail_share(2, 1)
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    for contender, entry in named(report["suites"]["sums"]).items():
        own = [Recomputed([r for r in raw if r["id"].startswith(f"sums/{i}")], contender) for i in (0, 1)]
        resampled = defaultdict(list)
        for draw in drawn:
            lengths = [n for i in draw for row in own[i].rows for n in row["acceptance_lengths"]]
            mine, none = (
                [row for i in draw for row in of[i]] for of in ([o.rows for o in own], [o.others["none"] for o in own])
            )
            resampled["tau"].append(mean(lengths))
            resampled["speedup_over_none"].append(Recomputed.pace(none) / Recomputed.pace(mine))
            resampled["cost_ratio"].append(Recomputed.step(mine) / Recomputed.step(none))
        for name, values in resampled.items():
            expected = torch.tensor(values, dtype=torch.float64).quantile(ends).tolist()
            assert entry[f"{name}_interval"] == pytest.approx(expected), (contender, name)
    assert report["intervals"] == {"level": 0.95, "resamples": RESAMPLES, "drawn": report["intervals"]["drawn"]}
    for entries in (report["suites"]["words"], report["mean"], report["pooled"]):  # one prompt says nothing of others
        assert {entry[f"{name}_interval"] for entry in entries for name in INTERVALS} == {None}


def test_methods_are_compared_with_the_first_that_drafts(report):
    found = {(*(e[k] for k in CONTENDER), e["suite"]): e for e in report["against"]}
    assert {(e["reference"], e["temperature"]) for e in found.values()} == {("domino", 0.0), ("domino", 1.0)}
    assert all(e["reference_budget"] == e["budget"] for e in found.values())
    drafting = {c for c in named(report["pooled"]) if c[1]}
    assert {c[:3] for c in found} == {c for c in drafting if c[0] != "domino"}
    for (*contender, suite), entry in found.items():
        side = named(report["mean"] if suite is None else report["suites"][suite])
        own, reference = side[tuple(contender)], side[("domino", *contender[1:])]
        assert entry["tau_ratio"] == pytest.approx(own["tau"] / reference["tau"])
        assert entry["speed_ratio"] == pytest.approx(own["tokens_per_second"] / reference["tokens_per_second"])
        assert (entry["tau_ratio_interval"] is None) == (suite != "sums")


def test_the_breakdown_predicts_the_speedup_that_is_measured_beside_it(report):
    assert [(b["method"], b["num_drafts"]) for b in report["breakdown"]] == [
        ("domino", 2),
        ("domino", 4),
        ("dflash", 2),
        ("dflash", 4),
    ]
    for entry in report["breakdown"]:
        found = named(report["pooled"])[entry["method"], entry["num_drafts"], 0.0]
        cost = entry["cycle"] / entry["plain_step"]
        assert entry["cost_ratio"] == entry["tau_to_pay"] == pytest.approx(cost)
        assert entry["predicted_speedup"] == pytest.approx(found["tau"] / cost)
        assert entry["measured_speedup"] == found["speedup_over_none"]


def test_plots_are_images_shown_in_the_report(finished):
    markdown = (finished / "report.md").read_text()
    for name in ("speedup.png", "acceptance_lengths.png", "acceptance_by_position.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in markdown


def test_the_report_can_be_made_again_without_a_model(finished, report):
    assert build_report(finished) == report
    assert load_ties(finished) == [] or report["differences"]


def test_an_unfinished_bench_says_so_and_leaves_out_what_it_cannot_compare(finished, tmp_path):
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    rows = [row for row in read_raw(finished) if row["method"] != "none"][:5]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = write_report(tmp_path)
    assert all(e["speedup_over_none"] is None and e["agrees"] is None for e in report["pooled"])
    assert "**Unfinished: 5 of" in (tmp_path / "report.md").read_text()


def test_a_directory_without_measurements_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no measurements"):
        write_report(tmp_path)
