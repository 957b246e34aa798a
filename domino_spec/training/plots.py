"""A training run as one picture: losses, lambda and simulated tau over the steps, from `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from domino_spec.files import atomic_path, read_jsonl

SMOOTHING_POINTS = 20
"""Losses are noisy from step to step: a running mean over this many recorded points is drawn over them."""


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

    rows = read_jsonl(metrics, {"step": int}, skip_partial_end=True)
    steps = [row for row in rows if "base_loss" in row]
    evaluations = [row for row in rows if "tau" in row]

    figure = Figure(figsize=(7, 8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, schedule, tau = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 3))
    for key, label, colour in (("base_loss", "base loss", "tab:blue"), ("final_loss", "final loss", "tab:orange")):
        x, y = _series(steps, key)
        losses.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(x, _running_mean(y), color=colour, label=label)
    losses.set_ylabel("loss per weighted token")
    schedule.plot(*_series(steps, "lambda_base"), color="tab:gray")
    schedule.set_ylabel("lambda_base")
    schedule.set_ylim(-0.05, 1.05)
    for key, label, colour in (("tau_head_off", "head off", "tab:blue"), ("tau", "head on", "tab:orange")):
        tau.plot(*_series(evaluations, key), color=colour, marker="o", markersize=3, label=label)
    tau.set_ylabel("simulated tau, held-out")
    tau.set_xlabel("optimizer step")
    for axes in (losses, schedule, tau):
        axes.grid(alpha=0.3)
    if steps:
        losses.legend()
    if evaluations:
        tau.legend()
    with atomic_path(picture) as scratch:
        figure.savefig(scratch, format="png", dpi=120)


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[key] for row in rows]


def _running_mean(values: list[float]) -> list[float]:
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
    for row in read_jsonl(metrics, {"step": int}, skip_partial_end=True):
        latest |= row
    return latest
