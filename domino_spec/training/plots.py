"""A training run as one picture: losses, schedules, simulated tau and per-slot acceptance, from `metrics.jsonl`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domino_spec.files import atomic_path, read_jsonl
from domino_spec.settings import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_POINTS = 20
"""Losses are noisy from step to step: a running mean over this many recorded points is drawn over them."""
BASE, FINAL = "tab:blue", "tab:orange"
"""Colours of base logits (head off) and final logits (head on), the same in every panel."""

Row = dict[str, Any]


def plot_training(metrics: Path, picture: Path) -> None:
    """Draw a run.

    Args:
        metrics: `metrics.jsonl` of the run; a last line cut short by a kill is passed over.
        picture: the PNG to write.

    Raises:
        UserError: the metrics cannot be read, or the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    steps = [row for row in rows if "base_loss" in row]
    evaluations = [row for row in rows if "tau" in row]

    figure = Figure(figsize=(12, 7.5))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    (losses, tau), (schedules, slots) = figure.subplots(2, 2)
    # Without a head, both kinds of logits are the same.
    has_head = any(row.get("candidate_recall") is not None for row in evaluations) or not evaluations
    _draw_losses(losses, steps, has_head)
    _draw_tau(tau, evaluations, has_head)
    _draw_schedules(schedules, steps)
    _draw_slots(slots, evaluations, has_head)
    last = max((row["step"] for row in rows), default=1)
    for axes in (losses, tau, schedules):
        axes.set_xlim(0, last * 1.02)
        axes.set_xlabel("optimizer step")
    for axes in (losses, tau, schedules, slots):
        axes.grid(alpha=0.3, axis="y" if axes is slots else "both")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(picture) as scratch:
        figure.savefig(scratch, format="png", dpi=120)


def _draw_losses(axes: Axes, steps: list[Row], has_head: bool) -> None:
    axes.set_title("loss per weighted token", loc="left")
    settled: list[float] = []
    sides = (("base_loss", "base loss", BASE), ("final_loss", "final loss", FINAL))
    for key, label, colour in sides if has_head else sides[:1]:
        x, y = _series(steps, key)
        means = running_mean(y)
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(x, means, color=colour, label=label)
        settled += means[len(means) // 8 :] + y[len(y) // 8 :]
    if steps:
        axes.legend(frameon=False)
        low, high = min(settled), max(settled)
        if high > low:  # the fall of the first steps would flatten all that follows
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _draw_tau(axes: Axes, evaluations: list[Row], has_head: bool) -> None:
    axes.set_title("simulated tau on held-out answers", loc="left")
    sides = (("tau", "head on", FINAL), ("tau_head_off", "head off", BASE))
    for key, label, colour in sides if has_head else sides[1:]:
        x, y = _series(evaluations, key)
        axes.plot(x, y, color=colour, marker="o", markersize=3, label=label)
        if y:
            above = -14 if has_head and key == "tau_head_off" else 6
            axes.annotate(
                f"{y[-1]:.2f}", (x[-1], y[-1]), (0, above), color=colour, textcoords="offset points", ha="right"
            )
    axes.margins(y=0.12)
    if not evaluations:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", color="gray")
    elif has_head:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.05))


def _draw_schedules(axes: Axes, steps: list[Row]) -> None:
    axes.set_title("lambda (left) and learning rate (right)", loc="left")
    axes.plot(*_series(steps, "lambda_base"), color="tab:gray", label="lambda_base")
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("lambda_base")
    rate = axes.twinx()
    rate.plot(*_series(steps, "learning_rate"), color="tab:green", linestyle="--", label="learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylabel("learning rate", color="tab:green")
    rate.tick_params(axis="y", colors="tab:green")
    rate.spines[["top", "left", "bottom"]].set_visible(False)


def _draw_slots(axes: Axes, evaluations: list[Row], has_head: bool) -> None:
    axes.set_title("share of blocks whose first k drafts are accepted", loc="left")
    axes.set_xlabel("k, drafted tokens")
    axes.set_ylim(0, 1)
    if not evaluations:
        return
    last = evaluations[-1]
    axes.set_title(f"step {last['step']}", loc="right", fontsize="medium")
    slots = range(1, len(last["acceptance"]) + 1)
    axes.set_xticks(slots)
    if not has_head:
        axes.bar(slots, last["acceptance"], 0.8, color=BASE)
        return
    for key, label, colour, shift in (
        ("acceptance", "head on", FINAL, -0.2),
        ("acceptance_head_off", "head off", BASE, 0.2),
    ):
        if key in last:
            axes.bar([k + shift for k in slots], last[key], 0.4, color=colour, label=label)
    axes.legend(frameon=False)


def _series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in rows if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def running_mean(values: list[float]) -> list[float]:
    """The mean of every value and those before it, `SMOOTHING_POINTS` in all."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - SMOOTHING_POINTS) : end]
        means.append(sum(recent) / len(recent))
    return means


def last_metrics(metrics: Path) -> dict[str, Any]:
    """The latest losses and simulated tau of a run, by name; empty for a run without any.

    Raises:
        UserError: the metrics cannot be read.
    """
    latest: dict[str, Any] = {}
    for row in read_metrics(metrics):
        latest |= row
    return latest


def read_metrics(path: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, without a last line that a kill has cut.

    Raises:
        UserError: it cannot be read, or a line holds what no run writes.
    """
    try:
        return read_jsonl(path, {"step": int}, skip_partial_end=True, fault=_row_fault)
    except UserError as error:
        raise UserError(f"{error}; remove what is wrong, or the file: the run itself does not need it") from None


def _row_fault(row: Row) -> str | None:
    for key, value in row.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(value, list) is not key.startswith("acceptance"):
            return f"key {key!r} must {'not ' if isinstance(value, list) else ''}be a list"
        if not all(item is None or (isinstance(item, (int, float)) and math.isfinite(item)) for item in items):
            return f"key {key!r} must hold numbers"
    for kind, others in (("base_loss", ("final_loss",)), ("tau", ("tau_head_off", "acceptance"))):
        for other in others if kind in row else ():
            if other not in row:
                return f"key {other!r} is missing"
    return None
