"""Plots of a server bench: tokens per second, speed-up and time per token, over the requests in flight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from domino_spec.bench.cells import Record
from domino_spec.bench.plots import GAP, GRAY, LEGEND, Sheet, distances, save_figure, styles_of
from domino_spec.bench.server.tables import order_of_suites

_TALL = 1.9
"""Inches of a panel."""


def write_server_plots(report: Record, out: Path) -> list[str]:
    """Draw what the report has figures for, each as PNG and as SVG.

    Args:
        report: what `report.build_report` returned.
        out: where the files go.

    Returns:
        The names of the PNG files, in the order to show them.

    Raises:
        UserError: a file cannot be written.
    """
    drawn = [save_figure(_over_concurrency(report, "tokens_per_second", "tokens per second"), out, "throughput")]
    if any(entry["speedup"] is not None for entry in report["figures"]):
        label = f"speed-up over {report['baseline']}"
        drawn.append(save_figure(_over_concurrency(report, "speedup", label), out, "speedup"))
    if any(entry["per_token"] for entry in report["figures"]):
        drawn.append(save_figure(_latencies(report), out, "latency"))
    return drawn


def _over_concurrency(report: Record, figure: str, label: str) -> Figure:
    """A panel per suite and one for their mean; a line per server."""

    def draw(panel: Axes, entries: Sequence[Record], style: Any, name: str) -> None:
        found = [entry for entry in entries if entry[figure] is not None]
        places, values = [e["concurrency"] for e in found], [e[figure] for e in found]
        bounds = [distances(entry, figure) or [[0.0], [0.0]] for entry in found]
        errors = [[b[side][0] for b in bounds] for side in (0, 1)]
        look: dict[str, Any] = dict(color=style.color, marker=style.marker, linestyle=style.line, markersize=4)
        if found:
            panel.errorbar(places, values, yerr=errors, ecolor=(style.color, 0.4), capsize=2, label=name, **look)

    def finish(panel: Axes) -> None:
        if figure == "speedup":
            panel.axhline(1.0, color=GRAY, linewidth=0.8)

    shown = [name for name in report["settings"]["servers"] if figure != "speedup" or name != report["baseline"]]
    return _panels(report, shown, label, True, draw, finish)


def _latencies(report: Record) -> Figure:
    """Median time per token by suite, shaded from there up to p90."""

    def draw(panel: Axes, entries: Sequence[Record], style: Any, name: str) -> None:
        found = [entry for entry in entries if entry.get("per_token")]
        places = [e["concurrency"] for e in found]
        look: dict[str, Any] = dict(color=style.color, linestyle=style.line)
        if found:
            middle = [1000 * e["per_token"]["p50"] for e in found]
            panel.plot(places, middle, marker=style.marker, markersize=4, label=name, **look)
            panel.fill_between(
                places,
                middle,
                [1000 * e["per_token"]["p90"] for e in found],
                color=style.color,
                alpha=0.15,
                linewidth=0,
            )

    shown = list(report["settings"]["servers"])
    return _panels(report, shown, "ms per token (up to p90)", False, draw, lambda panel: None)


def _panels(
    report: Record,
    servers: Sequence[str],
    label: str,
    with_mean: bool,
    draw: Callable[[Axes, Sequence[Record], Any, str], None],
    finish: Callable[[Axes], None],
) -> Figure:
    """A block per temperature, a panel per suite, the requests in flight from left to right."""
    names = [name for name in report["settings"]["servers"] if name != report["baseline"]]
    look = styles_of(names, report["baseline"])
    levels = sorted({entry["concurrency"] for entry in report["figures"]})
    suites = [s for s in order_of_suites(report) if any(entry["suite"] == s for entry in report["figures"])]
    titles = [*suites, "mean"] if with_mean and len(suites) > 1 else suites
    columns = min(3, len(titles))
    temperatures = list(dict.fromkeys(entry["temperature"] for entry in report["figures"]))
    rows, legend = math.ceil(len(titles) / columns), 0.2 * math.ceil(len(servers) / LEGEND)
    sheet = Sheet(dict.fromkeys(temperatures, rows * (_TALL + GAP) + 0.7 + legend))
    for temperature in temperatures:
        panels = sheet.panels(temperature, titles, columns, _TALL, ("requests in flight", label))
        for title, panel in zip(titles, panels, strict=True):
            entries = report["mean"] if title == "mean" else [e for e in report["figures"] if e["suite"] == title]
            for name in servers:
                own = [e for e in entries if e["server"] == name and e["temperature"] == temperature]
                draw(panel, sorted(own, key=lambda e: e["concurrency"]), look[name], name)
            finish(panel)
            panel.grid(alpha=0.25)
        panels[0].set_xscale("log", base=2)
        panels[0].xaxis.set_major_locator(FixedLocator(levels))
        panels[0].xaxis.set_major_formatter(ScalarFormatter())
        panels[0].xaxis.set_minor_locator(NullLocator())
        panels[0].set_ylim(bottom=0)
        sheet.legend(temperature, rows * (_TALL + GAP) + 0.35, next((p for p in panels if p.lines), panels[0]))
    return sheet.figure
