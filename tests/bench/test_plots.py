"""Plots say what the report says, and can be read with a dozen contenders."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from domino_spec.bench.page import name_of
from domino_spec.bench.plots import name_points, styles, write_plots
from domino_spec.bench.report import build_report
from tests.bench.synthetic import ALL, make_rows, write_bench

pytestmark = pytest.mark.slow

SUITES = {"sums": 3, "words": 2}


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory) -> dict:
    return build_report(write_bench(tmp_path_factory.mktemp("dozen"), make_rows(SUITES), finished))


@pytest.fixture(scope="module")
def drawn(report, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plots")
    names = ["speedup.png", "tau_against_cost.png", "acceptance_lengths.png", "acceptance_by_position.png"]
    assert write_plots(report, out) == names
    return out


def texts(path: Path) -> list[str]:
    return ["".join(e.itertext()).strip() for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_every_plot_is_there_as_pixels_and_as_a_drawing(drawn):
    assert len(list(drawn.iterdir())) == 8
    for path in drawn.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and texts(path.with_suffix(".svg"))


def test_bars_are_named_and_give_their_speedups(drawn, report):
    written = texts(drawn / "speedup.svg")
    for suite, entries in {**report["suites"], "mean": report["mean"]}.items():
        assert suite in written
        for entry in entries:
            if entry["method"] != "none":
                assert name_of(entry) in written and f"{entry['speedup_over_none']:.2f}" in written


def test_bars_have_error_bars_where_there_are_intervals(report, tmp_path):
    without = {
        "suites": {
            name: [{**e, "speedup_over_none_interval": None} for e in report["suites"][name]] for name in SUITES
        },
        "mean": [{**e, "speedup_over_none_interval": None} for e in report["mean"]],
    }
    counts = []
    for changes in ({}, without):
        write_plots({**report, **changes, "acceptance": []}, tmp_path)
        counts.append((tmp_path / "speedup.svg").read_text().count('id="LineCollection'))
    assert counts == [(len(ALL) - 1) * (len(SUITES) + 1), 0]


def test_a_panel_for_every_contender_gives_its_acceptance_lengths_and_tau(drawn, report):
    written = texts(drawn / "acceptance_lengths.svg")
    taus = {name_of(e): e["tau"] for e in report["pooled"]}
    for entry in report["acceptance"]:
        assert name_of(entry) in written and f"tau {taus[name_of(entry)]:.2f}" in written


def test_curves_end_where_drafts_do_and_not_where_budgets_do(drawn, report):
    assert max(entry["budget"] for entry in report["acceptance"]) == 60
    slots = [int(text) for text in texts(drawn / "acceptance_by_position.svg") if text.isdigit()]
    assert max(slots) == max(int(n) - 1 for entry in report["acceptance"] for n in entry["histogram"]) == 8


def test_tau_against_cost_names_points_and_lines_of_equal_speedup(drawn, report):
    written = texts(drawn / "tau_against_cost.svg")
    assert {name_of(entry) for entry in report["pooled"]} <= set(written)
    best = max(entry["tau_over_cost"] for entry in report["pooled"])
    lines = sorted(float(text[:-1]) for text in written if text.endswith("×"))
    assert {1.0, 1.5, 2.0} <= set(lines) and lines[-1] <= 1.3 * best


def test_names_of_close_points_cover_neither_each_other_nor_a_point():
    figure = Figure(figsize=(8, 5))
    canvas = FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.set_xlim(0.8, 2.5)
    panel.set_ylim(0, 4)
    points = [(1.2 + 0.03 * (i % 3), 2.0 + 0.06 * i, f"a-long-name ({i})", "C0") for i in range(12)]
    name_points(panel, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in panel.texts]
    assert len(boxes) == len(points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    corners = panel.transData.transform([point[:2] for point in points])
    assert not any(box.contains(x, y) for box in boxes for x, y in corners)


def test_no_two_contenders_of_thirty_look_alike():
    entries = [{"method": f"method-{i}", "budget": 4} for i in range(30)]
    found = styles({"pooled": [*entries, {"method": "none", "budget": 0}]})
    assert len(set(found.values())) == 31


def test_what_cannot_be_compared_is_left_out(finished, tmp_path):
    rows = make_rows({"sums": 1}, [("ngram", 8)])
    report = build_report(write_bench(tmp_path / "bench", rows, finished))
    assert write_plots(report, tmp_path) == ["acceptance_lengths.png", "acceptance_by_position.png"]
    rows = make_rows({"sums": 1}, [("none", 0)])
    report = build_report(write_bench(tmp_path / "plain", rows, finished))
    assert "acceptance_lengths.png" not in write_plots(report, tmp_path / "empty")


def test_the_same_report_gives_the_same_drawing(drawn, report, tmp_path):
    write_plots({**report, "acceptance": []}, tmp_path)
    for path in tmp_path.glob("*.svg"):
        assert path.read_bytes() == (drawn / path.name).read_bytes()
