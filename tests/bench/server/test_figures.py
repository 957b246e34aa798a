"""Figures of servers: every one against a sum that is done by hand, and each engine's own way to count acceptance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from domino_spec.bench.figures import percentiles, places, server_figures, server_means, server_samples
from domino_spec.bench.rows import Measured, RequestRow, WindowRow
from domino_spec.bench.server.metrics import (
    NOT_REPORTED,
    NOTHING_DRAFTED,
    OWN,
    SGLANG,
    SGLANG_AVERAGE,
    VLLM,
    acceptance,
    parse_metrics,
    readings,
    settled_metrics,
)
from domino_spec.bench.ties import compare_texts, first_difference

ROW = RequestRow(
    server="none",
    suite="s",
    id="s/0",
    temperature=0.0,
    concurrency=2,
    repeat=0,
    attempt=0,
    round=0,
    turn=1,
    started=0.0,
    sent=0.0,
    rejected=0,
    chunks=(0.5, 1.0, 2.0),
    last_token=2.5,
    seconds=3.0,
    prompt_tokens=4,
    completion_tokens=9,
    text="one two",
    finish_reason="stop",
    verify_passes=None,
    accepted_drafts=None,
    error=None,
)
WINDOW = WindowRow("none", "s", 0.0, 2, 0, 0, 2, "2026-01-01T00:00:00+00:00", 6.0, ())


def measured(windows: dict[WindowRow, list[RequestRow]]) -> Measured:
    found = Measured([], {}, {})
    for window, rows in windows.items():
        found.add(window, rows)
    return found


def window(server: str = "none", seconds: float = 6.0, **changes) -> WindowRow:
    return replace(WINDOW, server=server, seconds=seconds, **changes)


def rows(server: str, tokens: list[int], seconds: list[float], **changes) -> list[RequestRow]:
    """A request for each of as many conversations."""
    return [
        replace(ROW, server=server, id=f"s/{i}", completion_tokens=t, seconds=s, **changes)
        for i, (t, s) in enumerate(zip(tokens, seconds, strict=True))
    ]


def test_times_of_a_request():
    assert ROW.first_token == 0.5 and ROW.gaps == [0.5, 1.0]
    assert ROW.seconds_per_token == pytest.approx((2.5 - 0.5) / 8)
    assert replace(ROW, sent=2.0, started=0.5).busy == 4.5, "waiting after a 429 keeps its place taken"
    assert replace(ROW, completion_tokens=1).seconds_per_token is None
    silent = replace(ROW, chunks=())
    assert silent.first_token is None and silent.gaps == [] and silent.seconds_per_token is None
    assert replace(ROW, id="s/0#2", turn=2).conversation == "s/0"


def test_figures_of_a_window_by_hand():
    failed = replace(ROW, error="HTTP 500", completion_tokens=None, chunks=(), last_token=None, rejected=2, seconds=1.0)
    f = server_figures([WINDOW], [ROW, replace(ROW, id="s/1", completion_tokens=21, seconds=5.0), failed])
    assert (f["requests"], f["errors"], f["rejected"], f["conversations"], f["tokens"]) == (3, 1, 2, 2, 30)
    assert f["tokens_per_second"] == 30 / 6 and f["requests_per_second"] == 2 / 6 and f["in_flight"] == (3 + 5 + 1) / 6
    assert f["latency"]["p50"] == 4.0 and f["first_token"]["p99"] == 0.5 and f["tokens_per_chunk"] == 5
    assert f["chunk_gap"]["p50"] == 0.75 and f["per_token"]["p50"] == pytest.approx((2 / 8 + 2 / 20) / 2)
    assert f["speedup"] is None and f["tokens_per_second_interval"] is None


def test_percentiles_are_numpys_own():
    values = [0.4, 0.1, 0.9, 0.3]
    found = percentiles(values)
    assert tuple(found[name] for name in ("p50", "p90", "p99")) == tuple(np.percentile(values, (50, 90, 99)))
    assert percentiles([]) is None


def test_speed_ups_compare_tokens_per_second_of_the_same_place_over_the_same_repeats():
    them = window(), rows("none", [10, 20], [2.0, 4.0])
    again = window(seconds=2.0, repeat=1), rows("none", [30, 30], [1.0, 1.0], repeat=1)
    us = window("domino", 3.0), rows("domino", [10, 20], [1.0, 2.0])
    alone = window("domino", 3.0, concurrency=8), rows("domino", [9, 9], [1.0, 2.0], concurrency=8)
    found = measured(dict([them, again, us, alone]))
    sampled = server_samples(found, "none")
    here, base = sampled["domino", "s", 0.0, 2], sampled["none", "s", 0.0, 2]
    assert base["tokens_per_second"].value == pytest.approx((30 + 60) / (6 + 2)) and "speedup" not in base
    assert here["speedup"].value == pytest.approx((30 / 3) / (30 / 6)), "the baseline's second repeat has no partner"
    assert "speedup" not in sampled["domino", "s", 0.0, 8]
    assert {len(windows) for windows in places(found).values()} == {1, 2}


def test_a_speed_up_that_every_request_shares_has_no_spread_though_the_speeds_have():
    tokens, seconds = [5, 50, 20, 80], [2.0, 5.0, 1.0, 9.0]
    us = window("domino", 6.0), rows("domino", tokens, [s / 2 for s in seconds])
    found = measured(dict([(window(seconds=12.0), rows("none", tokens, seconds)), us]))
    sampled = server_samples(found, "none")["domino", "s", 0.0, 2]
    low, high = sampled["speedup"].interval
    assert low == pytest.approx(2.0) and high == pytest.approx(2.0)
    low, high = sampled["tokens_per_second"].interval
    assert low < sampled["tokens_per_second"].value < high
    assert sampled["tokens_per_second"].value == pytest.approx(sum(tokens) / 6.0)


def test_turns_and_rounds_of_one_conversation_are_drawn_together():
    own = [replace(ROW, round=r, id=i, turn=t) for r in (0, 1) for i, t in (("s/0", 1), ("s/0#2", 2))]
    sampled = server_samples(measured({WINDOW: own}), "none")["none", "s", 0.0, 2]
    assert sampled["tokens_per_second"].value == 36 / 6 and sampled["tokens_per_second"].interval is None


def test_means_are_unweighted_over_suites_that_have_the_server():
    windows: dict[WindowRow, list[RequestRow]] = {}
    for suite, seconds in (("s", 6.0), ("t", 3.0)):
        for server, factor in (("none", 1.0), ("domino", 2.0 if suite == "s" else 4.0)):
            key = window(server, seconds / factor, suite=suite)
            windows[key] = rows(server, [10, 20], [1.0, 2.0], suite=suite)
    extra = window("domino", 1.0, concurrency=4)
    windows[extra] = rows("domino", [1, 1], [1.0, 1.0], concurrency=4)
    found = measured(windows)
    sampled = server_samples(found, "none")
    figures = [
        server_figures(ws, [row for w in ws for row in found.requests[w.key]], sampled[place])
        for place, ws in places(found).items()
    ]
    means = {(m["server"], m["concurrency"]): m for m in server_means(figures, sampled)}
    assert set(means) == {("none", 2), ("domino", 2)}, "one suite alone is no mean"
    assert means["domino", 2]["speedup"] == pytest.approx(3.0)
    assert means["none", 2]["tokens_per_second"] == pytest.approx((5 + 10) / 2) and means["none", 2]["speedup"] is None


# Acceptance


def with_readings(names: tuple[str, ...], grown: tuple[float, ...], before: float = 100.0) -> WindowRow:
    return replace(WINDOW, readings=readings(dict.fromkeys(names, before), dict(zip(names, grown, strict=True))))


def test_each_engine_counts_acceptance_its_own_way():
    counted = "counters of /metrics"
    own = with_readings(OWN, (110.0, 125.0, 150.0))
    assert vars(acceptance([own], [])) == {"length": 1 + 25 / 10, "source": counted}
    vllm = with_readings(VLLM, (104.0, 106.0))
    assert vars(acceptance([vllm, replace(vllm, repeat=1)], [])) == {"length": 1 + 12 / 8, "source": counted}
    sglang = with_readings(SGLANG, (110.0, 144.0, 104.0))
    assert vars(acceptance([sglang], [])) == {"length": (44 - 4) / 10, "source": counted}
    told = [replace(ROW, verify_passes=4, accepted_drafts=6), replace(ROW, verify_passes=6, accepted_drafts=4)]
    assert acceptance([sglang], [*told, ROW]).length == 2.0, "SGLang's answers say it without any approximation"
    average = replace(WINDOW, readings=readings({}, {SGLANG_AVERAGE: 3.5}))
    assert acceptance([average], []).length == 3.5
    assert "since its start" in acceptance([average], []).source


def test_no_drafts_and_no_report_are_two_things():
    assert vars(acceptance([WINDOW], [ROW])) == {"length": None, "source": NOT_REPORTED}
    plain = with_readings(OWN, (140.0, 100.0, 100.0))
    assert vars(acceptance([plain], [replace(ROW, verify_passes=4, accepted_drafts=0)])) == {
        "length": None,
        "source": NOTHING_DRAFTED,
    }
    assert acceptance([with_readings(VLLM, (100.0, 100.0))], []).source == NOTHING_DRAFTED


def test_counters_are_read_from_prometheus_text_and_added_over_labels():
    text = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a b}c"} 40.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 2.0 1700000000
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e+09
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 1e2
vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 30.0
domino_spec_verify_passes_total 7.0
something_else_total 5
not a line
"""
    assert parse_metrics(text) == {VLLM[0]: 42.0, VLLM[1]: 100.0, OWN[0]: 7.0}


def test_counters_are_taken_once_they_stand_still():
    values = iter([{"a": 1.0}, {"a": 2.0}, {"a": 3.0}, {"a": 3.0}, {"a": 9.0}])
    assert settled_metrics(lambda: next(values), 0) == ({"a": 3.0}, True)
    count = iter(range(1000))
    assert settled_metrics(lambda: {"a": float(next(count))}, 0)[1] is False, "somebody else is asking"
    calls = iter([{}])
    assert settled_metrics(lambda: next(calls), 0) == ({}, True), "a server without metrics is asked once"


# Texts


def test_first_difference_of_texts():
    assert first_difference("abc", "abc") is None and first_difference("", "") is None
    assert first_difference("abc", "axc") == 1 and first_difference("abc", "ab") == 2 and first_difference("", "a") == 0


def test_greedy_texts_are_compared_with_the_baselines_and_the_baseline_with_itself():
    def text(server, text, concurrency=1, **changes):
        key = window(server, concurrency=concurrency, temperature=changes.get("temperature", 0.0))
        return key, replace(ROW, server=server, text=text, concurrency=concurrency, **changes)

    pairs = [
        text("none", "one two three"),
        text("none", "one two, three", 4),
        text("none", "one two, three", 4, round=1),
        text("domino", "one two three"),
        text("domino", "one two", 4),
        text("domino", "one two, three", 4, round=1),
        text("domino", "else", temperature=1.0),
        text("domino", "lost", 4, id="s/1", error="HTTP 500"),
    ]
    grouped: dict[WindowRow, list[RequestRow]] = {}
    for key, row in pairs:
        grouped.setdefault(key, []).append(row)
    equalities, differences = compare_texts(measured(grouped), "none")
    counts = {(e.server, e.concurrency): (e.reference_concurrency, e.compared, e.equal) for e in equalities}
    assert counts == {("none", 4): (1, 2, 0), ("domino", 1): (1, 1, 1), ("domino", 4): (4, 2, 1)}
    found = {(d.server, d.concurrency): d for d in differences}
    assert set(found) == {("none", 4), ("domino", 4)} and found["none", 4].times == 2
    parted = found["domino", 4]
    assert (parted.position, parted.wrote, parted.reference_wrote) == (7, "", ", three")
