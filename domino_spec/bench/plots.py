"""Plots of a report: PNG files beside it to look at, SVG files for papers and for report.html.

A contender has the same colour, marker and line in every plot. Bars and histograms stand in panels of their own, named
where they are, so that a dozen contenders can still be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from domino_spec.bench.cells import Record, name_of
from domino_spec.files import atomic_path

WIDTH = 10.0
"""Inches."""
FEW_PASSES = 10
"""A share of fewer passes than this is noise, and is left out of the curves."""
GRAY = "0.55"
_TITLE, GAP = 0.35, 0.45
"""Inches: of the title of a block; between the rows of its panels, where their names stand."""
LEGEND = 5
"""Names in a row of a legend."""
_COLORS = tuple(
    f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
)
_PLACES = [(dx, dy, side) for dy in (9, -9, 0, 20, -20, 31, -31, 42, -42) for dx, side in ((8, "left"), (-8, "right"))]
"""Where the name of a point may stand: points to the right and up, and which side of the text is there."""


class Style(NamedTuple):
    """How a contender is drawn."""

    color: str
    marker: str
    line: str


def write_plots(report: Record, out: Path) -> list[str]:
    """Draw what the report has figures for, each as PNG and as SVG.

    Args:
        report: what `report.build_report` returned.
        out: where the files go.

    Returns:
        The names of the PNG files, in the order to show them.

    Raises:
        UserError: a file cannot be written.
    """
    drawn = []
    if any(entry["speedup_over_none"] is not None for entry in report["pooled"] if entry["method"] != "none"):
        drawn.append(save_figure(_speedups(report), out, "speedup"))
    if any(_has_cost(entry) for entry in report["pooled"]):
        drawn.append(save_figure(_tau_against_cost(report), out, "tau_against_cost"))
    if report["acceptance"]:
        drawn.append(save_figure(_histograms(report), out, "acceptance_lengths"))
        drawn.append(save_figure(_positions(report), out, "acceptance_by_position"))
    return drawn


def styles(report: Record) -> dict[str, Style]:
    """A style for each method and budget: nine colours, and other markers and lines where they come round again."""
    names = list(dict.fromkeys(name_of(entry) for entry in report["pooled"] if entry["method"] != "none"))
    return styles_of(names, "none")


def styles_of(names: Sequence[str], baseline: str) -> dict[str, Style]:
    """A style for each name, grey for the baseline."""
    rounds = list(zip("osD^vPX", ("-", "--", ":", "-.", "-", "--", ":"), strict=True))
    found = {
        name: Style(_COLORS[index % len(_COLORS)], *rounds[index // len(_COLORS) % len(rounds)])
        for index, name in enumerate(names)
    }
    return found | {baseline: Style(GRAY, "o", "-")}


def save_figure(figure: Figure, out: Path, name: str) -> str:
    """Write a figure as `name`.png and `name`.svg into a directory, each whole or not at all; returns the PNG's name.

    Raises:
        UserError: a file cannot be written.
    """
    # The canvases themselves: `savefig` would draw everything twice.
    with atomic_path(out / f"{name}.png") as scratch:
        FigureCanvasAgg(figure).print_png(scratch)
    # Text stays text, to be searched, and the same report gives the same file.
    stable: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(stable), atomic_path(out / f"{name}.svg") as scratch:
        FigureCanvasSVG(figure).print_svg(scratch, metadata={"Date": None})
    return f"{name}.png"


def _temperatures(entries: Iterable[Record]) -> list[float]:
    return list(dict.fromkeys(entry["temperature"] for entry in entries))


def _at(entries: Iterable[Record], temperature: float) -> list[Record]:
    return [entry for entry in entries if entry["temperature"] == temperature]


def distances(entry: Record, figure: str) -> list[list[float]] | None:
    """The interval of a figure, where the report has one, as distances [[below], [above]]."""
    bounds = entry.get(f"{figure}_interval")
    if bounds is None:
        return None
    return [[max(0.0, entry[figure] - bounds[0])], [max(0.0, bounds[1] - entry[figure])]]


class Sheet:
    """A figure that is filled from top to bottom, in inches: a block per temperature, each a grid of panels.

    Fixed places, because laying out many panels by measuring their texts takes longer than drawing them.
    """

    def __init__(self, blocks: Mapping[float, float]) -> None:
        """`blocks`: the height below its title of every temperature's block."""
        self.figure = Figure(figsize=(WIDTH, sum(blocks.values()) + _TITLE * len(blocks)), dpi=120)
        FigureCanvasAgg(self.figure)
        self._tops: dict[float, float] = {}
        top = 0.0
        for temperature, height in blocks.items():
            self._text(0.1, top + 0.2, f"temperature {temperature:g}", fontsize=11, fontweight="bold")
            self._tops[temperature] = top + _TITLE
            top += _TITLE + height

    def _text(self, x: float, y: float, text: str, **options: Any) -> None:
        """Text at so many inches from the left and from the top."""
        width, height = self.figure.get_size_inches()
        self.figure.text(x / width, 1 - y / height, text, va="center", **options)

    def panels(
        self,
        temperature: float,
        names: Sequence[str],
        columns: int,
        tall: float,
        labels: tuple[str, str],
        left: float = 0.65,
        right: float = 0.15,
    ) -> list[Axes]:
        """So many named panels, row by row, with axes in common.

        Args:
            temperature: of the block that they fill.
            names: above each panel.
            columns: panels in a row.
            tall: height of a panel in inches.
            labels: of the horizontal and of the vertical axes.
            left: margin in inches.
            right: margin in inches.
        """
        width, height = self.figure.get_size_inches()
        wide = (width - left - right - 0.15 * (columns - 1)) / columns
        panels: list[Axes] = []
        for index, name in enumerate(names):
            row, column = divmod(index, columns)
            x, y = left + column * (wide + 0.15), self._tops[temperature] + row * (tall + GAP) + 0.25
            shared: dict[str, Any] = dict(sharex=panels[0], sharey=panels[0]) if panels else {}
            place = (x / width, 1 - (y + tall) / height, wide / width, tall / height)
            panel = self.figure.add_axes(place, **shared)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(name, loc="left", fontsize=9)
            panel.tick_params(labelsize=8, labelleft=column == 0, labelbottom=index + columns >= len(names))
            panels.append(panel)
        rows = math.ceil(len(names) / columns)
        bottom = self._tops[temperature] + rows * (tall + GAP) + 0.2
        self._text(left + (width - left) / 2, bottom, labels[0], fontsize=9, ha="center")
        middle = self._tops[temperature] + rows * (tall + GAP) / 2
        self._text(0.13, middle, labels[1], fontsize=9, ha="center", rotation=90)
        return panels

    def legend(self, temperature: float, below: float, panel: Axes) -> None:
        """Who is who, so many inches below the title of a block."""
        height = self.figure.get_size_inches()[1]
        handles, labels = panel.get_legend_handles_labels()
        place: dict[str, Any] = dict(
            loc="upper center", bbox_to_anchor=(0.5, 1 - (self._tops[temperature] + below) / height)
        )
        self.figure.legend(handles, labels, ncols=min(LEGEND, len(labels)), frameon=False, fontsize=8, **place)


def _speedups(report: Record) -> Figure:
    """A panel per suite and one for their mean; contenders from top to bottom."""
    look = styles(report)
    suites: dict[str, Sequence[Record]] = dict(report["suites"])
    if len(suites) > 1:
        suites["mean"] = report["mean"]
    columns = min(3, len(suites))
    rows = math.ceil(len(suites) / columns)
    shown = {
        temperature: [name_of(e) for e in _at(report["mean"], temperature) if e["method"] != "none"]
        for temperature in _temperatures(report["mean"])
    }
    shown = {temperature: names for temperature, names in shown.items() if names}
    tall = {temperature: 0.2 * len(names) + 0.1 for temperature, names in shown.items()}
    sheet = Sheet({temperature: rows * (tall[temperature] + GAP) + 0.55 for temperature in shown})
    for temperature, names in shown.items():
        left = 0.3 + 0.07 * max(map(len, names))
        labels = "decode speed-up over none", ""
        panels = sheet.panels(temperature, list(suites), columns, tall[temperature], labels, left)
        for entries, panel in zip(suites.values(), panels, strict=True):
            found = {name_of(entry): entry for entry in _at(entries, temperature)}
            for place, name in enumerate(names):
                entry = found.get(name, {})
                value = entry.get("speedup_over_none")
                if value is None:
                    continue
                errors = distances(entry, "speedup_over_none")
                bar: dict[str, Any] = dict(ecolor=GRAY, capsize=2, error_kw={"elinewidth": 1})
                panel.barh(place, value, 0.75, color=look[name].color, xerr=errors, **bar)
                end = value + (errors[1][0] if errors else 0.0)
                beside: dict[str, Any] = dict(textcoords="offset points", va="center", fontsize=7)
                panel.annotate(f"{value:.2f}", (end, place), (3, 0), **beside)
            panel.axvline(1.0, color=GRAY, linewidth=0.8)
            panel.margins(x=0.15)
            panel.tick_params(axis="y", length=0)
        panels[0].set_xlim(left=0)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
    return sheet.figure


def _histograms(report: Record) -> Figure:
    """A panel per contender, tau as a line."""
    columns, tall, look = 4, 1.1, styles(report)
    shown = {t: _at(report["acceptance"], t) for t in _temperatures(report["acceptance"])}
    taus = {(name_of(e), e["temperature"]): e["tau"] for e in report["pooled"]}
    sheet = Sheet({t: math.ceil(len(entries) / columns) * (tall + GAP) + 0.55 for t, entries in shown.items()})
    longest = max((int(length) for e in report["acceptance"] for length in e["histogram"]), default=1)
    for temperature, entries in shown.items():
        labels = "acceptance length (accepted drafts + 1)", "share of passes"
        panels = sheet.panels(temperature, [name_of(e) for e in entries], columns, tall, labels)
        for entry, panel in zip(entries, panels, strict=True):
            passes = sum(entry["histogram"].values()) or 1
            lengths = [int(length) for length in entry["histogram"]]
            shares = [count / passes for count in entry["histogram"].values()]
            panel.bar(lengths, shares, 0.85, color=look[name_of(entry)].color)
            tau = taus.get((name_of(entry), temperature))
            if tau is not None:
                panel.axvline(tau, color=GRAY, linewidth=1, linestyle="--")
                panel.text(0.97, 0.95, f"tau {tau:.2f}", transform=panel.transAxes, ha="right", va="top", fontsize=8)
        panels[0].set_xlim(0.4, longest + 0.6)
        panels[0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return sheet.figure


def _positions(report: Record) -> Figure:
    """Left: k or more drafts accepted; right: draft k accepted where all before it were."""
    look, tall = styles(report), 2.6
    shown = {t: _at(report["acceptance"], t) for t in _temperatures(report["acceptance"])}
    legends = {t: 0.2 * math.ceil(len(entries) / LEGEND) for t, entries in shown.items()}
    sheet = Sheet({t: tall + GAP + 0.7 + legends[t] for t in shown})
    reach = max(2, max(map(_last_slot, report["acceptance"])))
    titles = ["k or more drafts accepted", "draft k accepted, where those before it were"]
    for temperature, entries in shown.items():
        left, right = sheet.panels(temperature, titles, 2, tall, ("slot k", "share of passes"))
        for entry in entries:
            name = name_of(entry)
            style = look[name]
            line: dict[str, Any] = dict(
                color=style.color, marker=style.marker, linestyle=style.line, markersize=3.5, linewidth=1.2
            )
            slots = range(1, min(reach, entry["budget"]) + 1)
            left.plot(slots, entry["by_position"][: len(slots)], label=name, **line)
            kept = [k for k in slots if _reached(entry, k) >= FEW_PASSES]
            right.plot(kept, [entry["conditional"][k - 1] for k in kept], **line)
        left.set_ylim(0, 1.02)
        left.set_xlim(0.7, reach + 0.3)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in (left, right):
            panel.grid(alpha=0.25)
        sheet.legend(temperature, tall + GAP + 0.35, left)
    return sheet.figure


def _reached(entry: Record, slot: int) -> int:
    """Passes that accepted all drafts before a slot."""
    return sum(count for length, count in entry["histogram"].items() if int(length) >= slot)


def _last_slot(entry: Record) -> int:
    """The last slot whose draft was ever accepted; a tree's budget says nothing about its depth."""
    return max((int(length) for length in entry["histogram"]), default=1) - 1


def _has_cost(entry: Record) -> bool:
    return entry["tau"] is not None and entry["cost_ratio"] is not None


def _tau_against_cost(report: Record) -> Figure:
    """All runs of a contender as one point: what a pass yields against what it costs; ray by ray the same speed-up."""
    look = styles(report)
    temperatures = [t for t in _temperatures(report["pooled"]) if any(map(_has_cost, _at(report["pooled"], t)))]
    tall, labels = 4.2, ("c: cost of a pass, in steps of none", "tau: tokens per pass")
    sheet = Sheet(dict.fromkeys(temperatures, tall + GAP + 0.55))
    for temperature in temperatures:
        (panel,) = sheet.panels(temperature, [""], 1, tall, labels, right=0.45)
        entries = [entry for entry in _at(report["pooled"], temperature) if _has_cost(entry)]
        for entry in entries:
            style = look[name_of(entry)]
            bounds: dict[str, Any] = dict(xerr=distances(entry, "cost_ratio"), yerr=distances(entry, "tau"))
            panel.errorbar(
                entry["cost_ratio"],
                entry["tau"],
                fmt=style.marker,
                color=style.color,
                ecolor=(style.color, 0.4),
                markersize=6,
                **bounds,
            )
        costs, taus = [entry["cost_ratio"] for entry in entries], [entry["tau"] for entry in entries]
        left, right, top = 0.75 * min(costs), 1.15 * max(costs), 1.15 * max(1.5, *taus, 1.5)
        panel.set_xlim(left, right)
        panel.set_ylim(0, top)
        for speedup in _rays(max(tau / cost for tau, cost in zip(taus, costs, strict=True))):
            end = min(right, top / speedup)
            if end <= left:
                continue
            panel.plot([left, end], [speedup * left, speedup * end], color=GRAY, lw=0.7, linestyle=":", zorder=0)
            beyond = dict(ha="left", va="center") if end == right else dict(ha="center", va="bottom")
            label: dict[str, Any] = dict(textcoords="offset points", color=GRAY, fontsize=8, **beyond)
            panel.annotate(f"{speedup:g}×", (end, speedup * end), (2, 2), **label)
        name_points(panel, [(e["cost_ratio"], e["tau"], name_of(e), look[name_of(e)].color) for e in entries])
    return sheet.figure


def _rays(best: float) -> list[float]:
    """Speed-ups to draw a line for, past the best one."""
    known = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    return [speedup for speedup in known if speedup <= max(2.0, 1.3 * best)]


def name_points(panel: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of points beside them, where they cover neither each other nor a point while there is room."""
    canvas = panel.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    corners = panel.transData.transform([(x, y) for x, y, _, _ in points])
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in corners]
    for x, y, name, color in points:
        text = None
        for dx, dy, side in _PLACES:
            if text is not None:
                text.remove()
            thread = dict(arrowstyle="-", color=GRAY, linewidth=0.5) if abs(dy) > 10 else None
            text = panel.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                color=color,
                arrowprops=thread,
                annotation_clip=False,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the thread
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
