"""Plots of a report, as PNG files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from domino_spec.bench.markdown import name_of
from domino_spec.files import atomic_path

Record = dict[str, Any]
_INCHES = (9.0, 3.6)
"""Width and height of one panel; a temperature is a panel."""


def write_plots(report: Record, out: Path) -> list[str]:
    """Draw what the report has figures for; returns the file names, in the order to show them.

    Args:
        report: what `report.build_report` returned.
        out: where the files go.

    Raises:
        UserError: a file cannot be written.
    """
    drawn = []
    if any(entry["speedup_over_none"] is not None for entry in report["pooled"]):
        drawn.append(_save(_speedups(report), out, "speedup.png"))
    if report["acceptance"]:
        drawn.append(_save(_histograms(report), out, "acceptance_lengths.png"))
        drawn.append(_save(_positions(report), out, "acceptance_by_position.png"))
    return drawn


def _save(figure: Figure, out: Path, name: str) -> str:
    with atomic_path(out / name) as scratch:
        figure.savefig(scratch, format="png", dpi=120, bbox_inches="tight")
    return name


def _panels(entries: Sequence[Record]) -> tuple[Figure, list[tuple[float, Axes]]]:
    temperatures = list(dict.fromkeys(entry["temperature"] for entry in entries))
    figure = Figure(figsize=(_INCHES[0], _INCHES[1] * len(temperatures)), layout="constrained")
    axes = figure.subplots(len(temperatures), 1, squeeze=False)[:, 0]
    for temperature, panel in zip(temperatures, axes, strict=True):
        panel.set_title(f"temperature {temperature:g}", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(temperatures, axes, strict=True))


def _colors(report: Record) -> dict[str, str]:
    """A colour for each method and budget, the same in every plot."""
    names = dict.fromkeys(name_of(entry) for entry in report["pooled"] if entry["method"] != "none")
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


def _legend(panel: Axes, entries: int) -> None:
    if entries:  # above the panel, where no bar can hide it
        panel.legend(frameon=False, fontsize=8, ncols=min(6, entries), loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _grouped_bars(panel: Axes, series: dict[str, list[float]], labels: Sequence[str], colors: dict[str, str]) -> None:
    width = 0.8 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        panel.bar([x + offset for x in range(len(values))], values, width, label=name, color=colors[name])
    panel.set_xticks(range(len(labels)), labels)
    _legend(panel, len(series))


def _speedups(report: Record) -> Figure:
    figure, panels = _panels(report["pooled"])
    colors = _colors(report)
    for temperature, panel in panels:
        series = {}
        for mean in report["mean"]:
            if mean["temperature"] != temperature or mean["method"] == "none":
                continue
            entries = [
                next((e for e in suite if e["temperature"] == temperature and name_of(e) == name_of(mean)), None)
                for suite in report["suites"].values()
            ]
            found = [*entries, mean]
            series[name_of(mean)] = [(e and e["speedup_over_none"]) or 0.0 for e in found]
        _grouped_bars(panel, series, [*report["suites"], "mean"], colors)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_ylabel("decode speed-up over none")
    return figure


def _histograms(report: Record) -> Figure:
    figure, panels = _panels(report["acceptance"])
    for temperature, panel in panels:
        entries = [e for e in report["acceptance"] if e["temperature"] == temperature]
        longest = 1 + max(entry["budget"] for entry in entries)
        series = {}
        for entry in entries:
            total = sum(entry["histogram"].values()) or 1
            series[name_of(entry)] = [entry["histogram"].get(str(n), 0) / total for n in range(1, longest + 1)]
        _grouped_bars(panel, series, [str(n) for n in range(1, longest + 1)], _colors(report))
        panel.set_xlabel("acceptance length (accepted drafts + 1)")
        panel.set_ylabel("share of passes")
    return figure


def _positions(report: Record) -> Figure:
    figure, panels = _panels(report["acceptance"])
    colors = _colors(report)
    for temperature, panel in panels:
        entries = [e for e in report["acceptance"] if e["temperature"] == temperature]
        for entry in entries:
            name, positions = name_of(entry), range(1, entry["budget"] + 1)
            panel.plot(positions, entry["by_position"], marker="o", markersize=3, label=name, color=colors[name])
        panel.set_ylim(0, 1)
        panel.set_xlabel("drafts k")
        panel.set_ylabel("k or more accepted")
        _legend(panel, len(entries))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
