"""Plots of a report: PNG files to look at, SVG files for papers and for report.html.

A contender, or a server, has the same colour, marker and line in every plot. Bars and histograms have a named row or
panel for each contender, so that a dozen of them can still be distinguished. Matplotlib's constrained layout places
everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter
from matplotlib.transforms import Bbox

from domino_spec.bench.figures import Record
from domino_spec.bench.page import at, in_paper_order, name_of
from domino_spec.files import atomic_path

WIDTH = 10.0
"""Inches."""
TITLES = 0.9
"""Inches of a block for its title, the labels of its axes and the names of a row of panels."""
FEW_PASSES = 10
"""A share of fewer passes than this is noise, and is left out of the curves."""
GRAY = "0.55"
LEGEND = 5
"""Names in a row of a legend."""
_COLORS = tuple(
    f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
)
_PLACES = [(dx, dy, side) for dy in (9, -9, 0, 20, -20, 31, -31, 42, -42) for dx, side in ((8, "left"), (-8, "right"))]
"""Where the name of a point may be put: points to the right and up, and which side of the text is there."""


class Style(NamedTuple):
    """How a contender is drawn."""

    color: str
    marker: str
    line: str


def write_plots(report: Record, out: Path) -> list[str]:
    """Draw what the report has figures for, each as PNG and as SVG.

    Args:
        report: from `report.build_report`, of methods or of servers.
        out: where the files go.

    Returns:
        The names of the PNG files, in the order to show them.

    Raises:
        UserError: a file cannot be written.
    """
    draw = _server_plots if "servers" in report["settings"] else _method_plots
    return [save_figure(figure, out, name) for name, figure in draw(report).items()]


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


def distances(entry: Record, figure: str) -> list[list[float]] | None:
    """The interval of a figure, if the report has one, as distances [[below], [above]]."""
    bounds = entry.get(f"{figure}_interval")
    if bounds is None:
        return None
    return [[max(0.0, entry[figure] - bounds[0])], [max(0.0, bounds[1] - entry[figure])]]


def _blocks(entries: Sequence[Record], height: float) -> tuple[Figure, dict[float, SubFigure]]:
    """A figure with a block for each temperature of some entries, each so many inches high."""
    temperatures = list(dict.fromkeys(entry["temperature"] for entry in entries))
    figure = Figure(figsize=(WIDTH, height * len(temperatures)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    blocks = figure.subfigures(len(temperatures), 1, squeeze=False)[:, 0]
    for temperature, block in zip(temperatures, blocks, strict=True):
        block.suptitle(f"temperature {temperature:g}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, dict(zip(temperatures, blocks, strict=True))


def _panels(block: SubFigure, names: Sequence[str], columns: int, labels: tuple[str, str]) -> list[Axes]:
    """Named panels in rows of so many, with shared axes; `labels` of the horizontal and of the vertical axes."""
    grid = block.subplots(math.ceil(len(names) / columns), columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for index, panel in enumerate(panels):
        if index >= len(names):
            panel.set_visible(False)
            continue
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(names[index], loc="left", fontsize=9)
        lowest = index + columns >= len(names)
        panel.tick_params(labelsize=8, labelbottom=lowest)
        panel.set_xlabel(labels[0] if lowest else "", fontsize=8)
    block.supylabel(labels[1], fontsize=9)
    return panels[: len(names)]


def _legend(block: SubFigure, panel: Axes) -> None:
    """Below a block: what the colours and markers of a panel mean."""
    handles, labels = panel.get_legend_handles_labels()
    place: dict[str, Any] = dict(loc="outside lower center", ncols=min(LEGEND, len(labels)))
    block.legend(handles, labels, frameon=False, fontsize=8, **place)


# Methods.


def _method_plots(report: Record) -> dict[str, Figure]:
    drawn = {}
    if any(entry["speedup_over_none"] is not None for entry in report["pooled"] if entry["method"] != "none"):
        drawn["speedup"] = _speedups(report)
    if any(map(_has_cost, report["pooled"])):
        drawn["tau_against_cost"] = _tau_against_cost(report)
    if report["acceptance"]:
        drawn["acceptance_lengths"] = _histograms(report)
        drawn["acceptance_by_position"] = _positions(report)
    return drawn


def _speedups(report: Record) -> Figure:
    """A panel per suite and one for their mean; contenders from top to bottom."""
    style = styles(report)
    suites: dict[str, Sequence[Record]] = dict(report["suites"])
    if len(suites) > 1:
        suites["mean"] = report["mean"]
    drafting = [entry for entry in report["mean"] if entry["method"] != "none"]
    names = list(dict.fromkeys(map(name_of, drafting)))
    columns = min(3, len(suites))
    rows = math.ceil(len(suites) / columns)
    figure, blocks = _blocks(drafting, TITLES + rows * (0.35 + 0.2 * len(names)))
    for temperature, block in blocks.items():
        panels = _panels(block, list(suites), columns, ("decode speed-up over none", ""))
        for entries, panel in zip(suites.values(), panels, strict=True):
            found = {name_of(entry): entry for entry in at(entries, temperature)}
            for place, name in enumerate(names):
                value = found.get(name, {}).get("speedup_over_none")
                if value is None:
                    continue
                errors = distances(found[name], "speedup_over_none")
                bar: dict[str, Any] = dict(ecolor=GRAY, capsize=2, error_kw={"elinewidth": 1})
                panel.barh(place, value, 0.75, color=style[name].color, xerr=errors, **bar)
                end = value + (errors[1][0] if errors else 0.0)
                beside: dict[str, Any] = dict(textcoords="offset points", va="center", fontsize=7)
                panel.annotate(f"{value:.2f}", (end, place), (3, 0), **beside)
            panel.axvline(1.0, color=GRAY, linewidth=0.8)
            panel.margins(x=0.15)
            panel.tick_params(axis="y", length=0)
        panels[0].set_xlim(left=0)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _histograms(report: Record) -> Figure:
    """A panel per contender, tau as a line."""
    columns, style = 4, styles(report)
    taus = {(name_of(e), e["temperature"]): e["tau"] for e in report["pooled"]}
    longest = max((int(length) for e in report["acceptance"] for length in e["histogram"]), default=1)
    most = len({name_of(entry) for entry in report["acceptance"]})
    figure, blocks = _blocks(report["acceptance"], TITLES + 1.5 * math.ceil(most / columns))
    for temperature, block in blocks.items():
        entries = at(report["acceptance"], temperature)
        labels = "acceptance length (accepted drafts + 1)", "share of passes"
        panels = _panels(block, [name_of(e) for e in entries], columns, labels)
        for entry, panel in zip(entries, panels, strict=True):
            passes = sum(entry["histogram"].values()) or 1
            lengths = [int(length) for length in entry["histogram"]]
            shares = [count / passes for count in entry["histogram"].values()]
            panel.bar(lengths, shares, 0.85, color=style[name_of(entry)].color)
            tau = taus.get((name_of(entry), temperature))
            if tau is not None:
                panel.axvline(tau, color=GRAY, linewidth=1, linestyle="--")
                panel.text(0.97, 0.95, f"tau {tau:.2f}", transform=panel.transAxes, ha="right", va="top", fontsize=8)
        panels[0].set_xlim(0.4, longest + 0.6)
        panels[0].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def _positions(report: Record) -> Figure:
    """Left: k or more drafts accepted; right: draft k accepted, of the passes that accepted those before it."""
    style = styles(report)
    reach = max(2, max(map(_last_slot, report["acceptance"])))
    titles = ["k or more drafts accepted", "draft k accepted, where those before it were"]
    figure, blocks = _blocks(report["acceptance"], TITLES + 3.4)
    for temperature, block in blocks.items():
        left, right = _panels(block, titles, 2, ("slot k", "share of passes"))
        for entry in at(report["acceptance"], temperature):
            drawn = style[name_of(entry)]
            line: dict[str, Any] = dict(
                color=drawn.color, marker=drawn.marker, linestyle=drawn.line, markersize=3.5, linewidth=1.2
            )
            slots = range(1, min(reach, entry["budget"]) + 1)
            left.plot(slots, entry["by_position"][: len(slots)], label=name_of(entry), **line)
            kept = [k for k in slots if _reached(entry, k) >= FEW_PASSES]
            right.plot(kept, [entry["conditional"][k - 1] for k in kept], **line)
        left.set_ylim(0, 1.02)
        left.set_xlim(0.7, reach + 0.3)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in (left, right):
            panel.grid(alpha=0.25)
        _legend(block, left)
    return figure


def _reached(entry: Record, slot: int) -> int:
    """Passes that accepted all drafts before a slot."""
    return sum(count for length, count in entry["histogram"].items() if int(length) >= slot)


def _last_slot(entry: Record) -> int:
    """The last slot whose draft was ever accepted; a tree's budget says nothing about its depth."""
    return max((int(length) for length in entry["histogram"]), default=1) - 1


def _has_cost(entry: Record) -> bool:
    return entry["tau"] is not None and entry["cost_ratio"] is not None


def _tau_against_cost(report: Record) -> Figure:
    """All runs of a contender as one point: what a pass yields against what it costs. Rays join equal speed-ups."""
    style = styles(report)
    shown = [entry for entry in report["pooled"] if _has_cost(entry)]
    figure, blocks = _blocks(shown, TITLES + 4.2)
    points = []
    for temperature, block in blocks.items():
        (panel,) = _panels(block, [""], 1, ("c: cost of a pass, in steps of none", "tau: tokens per pass"))
        entries = at(shown, temperature)
        for entry in entries:
            drawn = style[name_of(entry)]
            bounds: dict[str, Any] = dict(xerr=distances(entry, "cost_ratio"), yerr=distances(entry, "tau"))
            bounds |= dict(fmt=drawn.marker, color=drawn.color, ecolor=(drawn.color, 0.4), markersize=6)
            panel.errorbar(entry["cost_ratio"], entry["tau"], **bounds)
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
        points.append((panel, [(e["cost_ratio"], e["tau"], name_of(e), style[name_of(e)].color) for e in entries]))
    figure.draw_without_rendering()  # places the panels: names are put where there is room
    for panel, named in points:
        name_points(panel, named)
    return figure


def _rays(best: float) -> list[float]:
    """Speed-ups to draw a line for, past the best one."""
    known = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    return [speedup for speedup in known if speedup <= max(2.0, 1.3 * best)]


def name_points(panel: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the names of points beside them; while there is room, they cover neither each other nor a point."""
    figure = panel.get_figure(root=True)
    assert figure is not None
    canvas = figure.canvas
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
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the thread
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


# Servers, over the requests in flight.


def _server_plots(report: Record) -> dict[str, Figure]:
    servers, baseline = list(report["settings"]["servers"]), report["baseline"]
    drawn = {"throughput": _over_concurrency(report, servers, "tokens per second", _line("tokens_per_second"), True)}
    if any(entry["speedup"] is not None for entry in report["figures"]):
        others, label = [name for name in servers if name != baseline], f"speed-up over {baseline}"
        drawn["speedup"] = _over_concurrency(report, others, label, _line("speedup"), True)
    if any(entry["per_token"] for entry in report["figures"]):
        drawn["latency"] = _over_concurrency(report, servers, "ms per token (up to p90)", _time_per_token, False)
    return drawn


Draw = Callable[[Axes, Sequence[Record], Style, str], None]
"""Draws one server's entries, by increasing concurrency, in a style under a name."""


def _line(figure: str) -> Draw:
    """A figure with its intervals."""

    def draw(panel: Axes, entries: Sequence[Record], style: Style, name: str) -> None:
        found = [entry for entry in entries if entry[figure] is not None]
        bounds = [distances(entry, figure) or [[0.0], [0.0]] for entry in found]
        options: dict[str, Any] = dict(color=style.color, marker=style.marker, linestyle=style.line, markersize=4)
        options["yerr"] = [[b[side][0] for b in bounds] for side in (0, 1)]
        if found:
            places, values = [e["concurrency"] for e in found], [e[figure] for e in found]
            panel.errorbar(places, values, ecolor=(style.color, 0.4), capsize=2, label=name, **options)
        if figure == "speedup":
            panel.axhline(1.0, color=GRAY, linewidth=0.8)

    return draw


def _time_per_token(panel: Axes, entries: Sequence[Record], style: Style, name: str) -> None:
    """Median time per token, shaded from there up to p90."""
    found = [entry for entry in entries if entry.get("per_token")]
    if found:
        places = [e["concurrency"] for e in found]
        middle, high = ([1000 * e["per_token"][p] for e in found] for p in ("p50", "p90"))
        options: dict[str, Any] = dict(color=style.color, linestyle=style.line, marker=style.marker, markersize=4)
        panel.plot(places, middle, label=name, **options)
        panel.fill_between(places, middle, high, color=style.color, alpha=0.15, linewidth=0)


def _over_concurrency(report: Record, servers: Sequence[str], label: str, draw: Draw, with_mean: bool) -> Figure:
    """A block per temperature, a panel per suite, the requests in flight from left to right; a line per server."""
    others = [name for name in report["settings"]["servers"] if name != report["baseline"]]
    style, entries = styles_of(others, report["baseline"]), report["figures"]
    suites = [s for s in in_paper_order(report["settings"]["suites"]) if any(entry["suite"] == s for entry in entries)]
    titles = [*suites, "mean"] if with_mean and len(suites) > 1 else suites
    columns = min(3, len(titles))
    figure, blocks = _blocks(entries, TITLES + 0.2 + 2.2 * math.ceil(len(titles) / columns))
    for temperature, block in blocks.items():
        panels = _panels(block, titles, columns, ("requests in flight", label))
        for title, panel in zip(titles, panels, strict=True):
            of = at(report["mean"] if title == "mean" else [e for e in entries if e["suite"] == title], temperature)
            for name in servers:
                of_server = [entry for entry in of if entry["server"] == name]
                draw(panel, sorted(of_server, key=lambda e: e["concurrency"]), style[name], name)
            panel.grid(alpha=0.25)
        panels[0].set_xscale("log", base=2)
        panels[0].xaxis.set_major_locator(FixedLocator(sorted({entry["concurrency"] for entry in entries})))
        panels[0].xaxis.set_major_formatter(ScalarFormatter())
        panels[0].xaxis.set_minor_locator(NullLocator())
        panels[0].set_ylim(bottom=0)
        _legend(block, next((p for p in panels if p.get_legend_handles_labels()[1]), panels[0]))
    return figure
