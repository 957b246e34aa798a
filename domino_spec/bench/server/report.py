"""A server bench's report: report.json with every figure, report.md and report.html to read, all made from it.

Figures come from raw.jsonl alone and can be made again at any time, without a server.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from domino_spec.bench.html import write_page
from domino_spec.bench.intervals import LEVEL, RESAMPLES
from domino_spec.bench.report import MARKDOWN_FILE, REPORT_FILE
from domino_spec.bench.rows import SETTINGS_FILE
from domino_spec.bench.server.figures import figures_of, means_of, places, sample
from domino_spec.bench.server.rows import Measured, read_measured
from domino_spec.bench.server.tables import render
from domino_spec.bench.server.texts import compare_texts
from domino_spec.files import atomic_path, read_json, write_json
from domino_spec.settings import UserError


def write_report(out: Path, report: dict[str, Any], plots: Sequence[str] = ()) -> None:
    """Write report.json, report.md and report.html into a directory.

    Args:
        out: the directory.
        report: from `build_report`.
        plots: file names of plots in it, to show.

    Raises:
        UserError: a file cannot be read or written.
    """
    write_json(report, out / REPORT_FILE)
    text = render(report, plots)
    with atomic_path(out / MARKDOWN_FILE) as scratch:
        scratch.write_text(text, encoding="utf-8")
    write_page(text, f"Serving benchmark report: {', '.join(report['settings']['servers'])}", out, plots)


def build_report(out: Path) -> dict[str, Any]:
    """Everything that report.json holds.

    Raises:
        UserError: `out` holds no finished window, or a file in it is malformed.
    """
    measured = read_measured(out)
    if not measured.windows:
        raise UserError(f"{out} holds no measurements of servers")
    settings = read_json(out / SETTINGS_FILE)
    baseline = settings["configuration"]["baseline"]
    sampled = sample(measured, baseline)
    figures = [
        figures_of(windows, [row for window in windows for row in measured.requests[window.key]], sampled[place])
        for place, windows in places(measured).items()
    ]
    order = list(settings["configuration"]["servers"])
    figures.sort(key=lambda f: (f.temperature, f.concurrency, order.index(f.server)))
    equalities, differences = compare_texts(measured, baseline)
    report = {
        "settings": settings["configuration"],
        "sessions": settings["sessions"],
        "measured_windows": len(measured.windows),
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "drawn": "whole conversations within each suite"},
        "baseline": baseline,
        "figures": [asdict(f) for f in figures],
        "mean": [asdict(mean) for mean in means_of(figures, sampled)],
        "text_equality": [asdict(e) for e in equalities],
        "differences": [asdict(d) for d in differences],
        "errors": _errors(measured),
    }
    return dict(json.loads(json.dumps(report)))  # with the lists of JSON, as whoever reads report.json has it


def _errors(measured: Measured) -> list[dict[str, Any]]:
    """How often requests failed, and why."""
    counted = Counter(
        (row.server, row.suite, row.concurrency, row.temperature, row.error)
        for rows in measured.requests.values()
        for row in rows
        if row.error is not None
    )
    names = ("server", "suite", "concurrency", "temperature", "error")
    return [{**dict(zip(names, key, strict=True)), "times": times} for key, times in counted.items()]
