"""A bench directory's report: report.json with every figure, report.md and report.html to read, all made from it.

Figures come from raw.jsonl alone and can be made again at any time, on any machine, without a model. Beside them stand
what was recorded while measuring: settings.json (configuration and sessions), ties.json (margins of greedy texts that
differ) and breakdown.json (stages of a cycle).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from domino_spec.bench.breakdown import Breakdown
from domino_spec.bench.figures import (
    Against,
    Figures,
    acceptance,
    against,
    contenders_of,
    draws_of,
    figures,
    means,
    measured,
)
from domino_spec.bench.html import write_html
from domino_spec.bench.intervals import LEVEL, RESAMPLES, Draws
from domino_spec.bench.markdown import render
from domino_spec.bench.methods import Contender
from domino_spec.bench.rows import SETTINGS_FILE, Row, read_rows
from domino_spec.bench.ties import compared_texts, find_partings, load_ties
from domino_spec.files import atomic_path, read_json, write_json
from domino_spec.settings import UserError

REPORT_FILE, MARKDOWN_FILE, BREAKDOWN_FILE = "report.json", "report.md", "breakdown.json"


def write_report(out: Path, plots: Sequence[str] = (), reference: str | None = None) -> dict[str, Any]:
    """Write report.json, report.md and report.html of a bench directory; returns what report.json holds.

    Args:
        out: the directory.
        plots: file names of plots in it, to show.
        reference: see `build_report`.

    Raises:
        UserError: it holds no measurements, or a file cannot be read or written.
    """
    report = build_report(out, reference)
    write_json(report, out / REPORT_FILE)
    with atomic_path(out / MARKDOWN_FILE) as scratch:
        scratch.write_text(render(report, plots), encoding="utf-8")
    write_html(report, out, plots)
    return report


def build_report(out: Path, reference: str | None = None) -> dict[str, Any]:
    """Everything that report.json holds.

    Args:
        out: the directory.
        reference: the method that the others are compared with; None for the first one measured that drafts.

    Raises:
        UserError: `out` holds no measurements, or none of the reference, or a file in it is malformed.
    """
    rows = read_rows(out)
    if not rows:
        raise UserError(f"{out} holds no measurements")
    if reference is not None and reference not in {row.method for row in rows}:
        raise UserError(f"{out} holds no measurements of {reference}")
    settings = read_json(out / SETTINGS_FILE)
    contenders, draws = contenders_of(rows), draws_of(rows)
    suites = {name: [row for row in rows if row.suite == name] for name in dict.fromkeys(row.suite for row in rows)}
    # Who comes first in a suite changes from prompt to prompt; tables have one order for all.
    of_suites = {
        name: {c: measured(own, c, draws) for c in contenders if c in set(contenders_of(own))}
        for name, own in suites.items()
    }
    pooled = [figures(measured(rows, contender, draws)) for contender in contenders]
    report = {
        "settings": settings["configuration"],
        "sessions": settings["sessions"],
        "measured_runs": len(rows),
        "load": _load(rows),
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "drawn": "whole conversations within each suite"},
        "suites": {name: [asdict(figures(m)) for m in found.values()] for name, found in of_suites.items()},
        "mean": [asdict(means([found[c] for found in of_suites.values() if c in found])) for c in contenders],
        "pooled": [asdict(f) for f in pooled],
        "against": [asdict(entry) for entry in _against(suites, contenders, settings, draws, reference)],
        "drafting": [_drafting(c) for c in contenders],
        "acceptance": [asdict(acceptance(rows, c)) for c in contenders if c.budget],
        "greedy_equality": _greedy_equality(out, rows),
        "differences": _differences(out, rows),
        "breakdown": [_with_prediction(b, pooled) for b in load_breakdowns(out)],
    }
    return dict(json.loads(json.dumps(report)))  # with the lists of JSON, as whoever reads report.json has it


def _load(rows: Sequence[Row]) -> dict[str, float] | None:
    """What else the machine did during the runs; None for benches of versions that did not look."""
    loads = sorted(row.load_average for row in rows if row.load_average is not None)
    if not loads:
        return None
    stolen = sum(row.steal_seconds or 0.0 for row in rows)
    return {"median": loads[len(loads) // 2], "most": loads[-1], "steal_seconds": round(stolen, 3)}


def _drafting(contender: Contender) -> dict[str, Any]:
    """Whether a contender drafts, and why it does not."""
    reason = None
    if not contender.budget:
        ours = contender.method == "none"
        reason = "method none was asked for" if ours else "transformers decodes by itself, without a draft"
    named = {"method": contender.method, "budget": contender.budget, "temperature": contender.temperature}
    return {**named, "drafting": reason is None, "reason": reason}


def save_breakdowns(breakdowns: Sequence[Breakdown], out: Path) -> None:
    """Write breakdown.json into a directory."""
    write_json([asdict(b) for b in breakdowns], out / BREAKDOWN_FILE)


def load_breakdowns(out: Path) -> list[Breakdown]:
    """What `save_breakdowns` wrote; nothing where it has not."""
    path = out / BREAKDOWN_FILE
    if not path.exists():
        return []
    try:
        return [Breakdown(**value) for value in read_json(path)]
    except TypeError as error:
        raise UserError(f"{path} does not hold breakdowns ({error}): delete it and measure again") from None


def _against(
    suites: Mapping[str, Sequence[Row]],
    contenders: Sequence[Contender],
    settings: Mapping[str, Any],
    draws: Draws,
    reference: str | None,
) -> list[Against]:
    """Every method that drafts beside the reference of its temperature and, where the reference has it, its budget."""
    order = settings["configuration"]["methods"]
    found = []
    for contender in contenders:
        drafting = [c for c in contenders if c.budget and c.temperature == contender.temperature]
        drafting.sort(key=lambda c: order.index(c.method) if c.method in order else len(order))
        references = [c for c in drafting if c.method == (reference or drafting[0].method)]
        if contender.budget and references and contender not in references:
            same_budget = [c for c in references if c.budget == contender.budget]
            found += against(suites, contender, (same_budget or references)[0], draws)
    return found


def _greedy_equality(out: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method, budget and reference: how many greedy texts equal the reference's, how many part at a near tie."""
    ties = {tie.parting: tie for tie in load_ties(out)}
    entries: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row, reference in compared_texts(rows):
        name = (row.method, row.budget, reference.method)
        entry = entries.setdefault(
            name,
            dict(zip(("method", "budget", "reference"), name, strict=True))
            | {"compared": 0, "equal": 0, "near_ties": 0, "largest_margin": None},
        )
        entry["compared"] += 1
        entry["equal"] += row.token_ids == reference.token_ids
    for parting in find_partings(rows):
        tie = ties.get(parting)
        entry = entries[parting.method, parting.budget, parting.reference]
        if tie is not None:
            entry["near_ties"] += tie.near_tie
            entry["largest_margin"] = max(tie.margin, entry["largest_margin"] or 0.0)
    return list(entries.values())


def _differences(out: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    ties = {tie.parting: tie for tie in load_ties(out)}
    described = []
    for parting in find_partings(rows):
        tie = ties.get(parting)
        evidence = dict.fromkeys(("top_tokens", "margin", "rounding", "near_tie"))
        if tie is not None:
            evidence = {name: getattr(tie, name) for name in evidence}
        described.append(asdict(parting) | evidence)
    return described


def _with_prediction(breakdown: Breakdown, pooled: Sequence[Figures]) -> dict[str, Any]:
    """A breakdown, and the speed-up that its c predicts for the greedy runs beside the one that was measured."""
    found = next(
        (f for f in pooled if (f.method, f.budget, f.temperature) == (breakdown.method, breakdown.num_drafts, 0)), None
    )
    return asdict(breakdown) | {
        "cost_ratio": breakdown.cost_ratio,
        "tau_to_pay": breakdown.cost_ratio,
        "tau_to_double": 2 * breakdown.cost_ratio,
        "predicted_speedup": found.tau / breakdown.cost_ratio if found and found.tau else None,
        "measured_speedup": found.speedup_over_none if found else None,
    }
