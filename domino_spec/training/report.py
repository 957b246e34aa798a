"""The report on a training run, one page and one picture: its figures, its cost, and the settings it was made with.

Everything is computed from files in the run's directory (`recipe.yaml` and `metrics.jsonl`), so a report can be made at
any time, also while the run continues, and made again later.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domino_spec.files import atomic_path
from domino_spec.recipe import Recipe, load_recipe
from domino_spec.training.estimate import with_prefix
from domino_spec.training.watch import METRICS_FILE, Row, RunFacts, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE = "report.md"
PICTURE_FILE = "training.png"
SMOOTHING_POINTS = 20
"""Losses are noisy from step to step: a running mean over this many recorded points is drawn over them."""
BASE, FINAL = "tab:blue", "tab:orange"
"""Colours of base logits (head off) and final logits (head on), the same in every panel."""


def write_report(run: Path) -> Path:
    """Write `report.md` and `training.png` into the directory of a run, finished or not; returns the report's path.

    Raises:
        UserError: `recipe.yaml` or `metrics.jsonl` is missing or unreadable, or a file cannot be written.
    """
    recipe, notes = load_recipe(run / "recipe.yaml"), read_notes(run / "recipe.yaml")
    rows = read_metrics(run / METRICS_FILE)
    plot_training(run / METRICS_FILE, run / PICTURE_FILE)
    with atomic_path(run / REPORT_FILE) as scratch:
        scratch.write_text(_render(run.resolve().name, recipe, notes, rows), encoding="utf-8")
    return run / REPORT_FILE


def read_notes(recipe: Path) -> dict[str, str]:
    """What the comments above a saved recipe say, `# name: value` a line: versions, device, counts of the data."""
    notes = {}
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        name, _, value = line.removeprefix("# ").partition(": ")
        notes[name] = value
    return notes


def _render(name: str, recipe: Recipe, notes: dict[str, str], rows: list[Row]) -> str:
    steps = [row for row in rows if "base_loss" in row]
    evaluations = [row for row in rows if "tau" in row]
    done = max((row["step"] for row in rows), default=0)
    total = recipe.training.steps or int(notes.get("steps", 0))
    parts = [f"# Training report: {name}"]
    if done < total:
        parts.append(f"**Unfinished: step {done:,} of {total:,}.** Repeat the command to go on.")
    parts += [_outcome(recipe, steps, evaluations), f"![curves of the run]({PICTURE_FILE})"]
    if evaluations:
        parts += ["## Acceptance by drafted token", _acceptance(evaluations[-1], recipe.draft.head is not None)]
    if steps:
        parts += ["## Cost", _table(("", "value"), _cost(recipe, notes, steps, done))]
    parts += ["## Settings", _table(("setting", "value"), _settings(recipe, notes, total))]
    parts.append("The rest, and all that was left at its default, is in `recipe.yaml`.")
    counts = {f.name.replace("_", " ") for f in dataclasses.fields(RunFacts) if f.type == "int"}
    lines = [(k, f"{int(v):,}" if k in counts else v) for k, v in notes.items() if k != "draft"]
    parts += ["## Data, device and versions", _table(("", "value"), lines)]
    return "\n\n".join(parts) + "\n"


def _outcome(recipe: Recipe, steps: list[Row], evaluations: list[Row]) -> str:
    """The last figures as sentences."""
    sentences = []
    if not evaluations:
        sentences.append("Simulated tau has not been measured yet.")
    else:
        last = evaluations[-1]
        on, off = last["tau"], last["tau_head_off"]
        where = f"on held-out answers at step {last['step']:,} ({last['blocks']:,} blocks)"
        if recipe.draft.head is None:
            sentences.append(f"Simulated tau {where}: **{on:.3f}**; this draft has no head.")
        else:
            change = f"{'gain' if on >= off else 'loss'} of {abs(on - off):.3f}, {(on / off - 1):+.1%}"
            sentences.append(f"Simulated tau {where}: **{on:.3f} with the head on, {off:.3f} with it off** ({change}).")
        best = max(evaluations, key=lambda row: row["tau"])
        if best is not last:
            sentences.append(f"The highest so far was {best['tau']:.3f}, at step {best['step']:,}.")
        if last.get("candidate_recall") is not None:
            sentences.append(
                f"The corrected choice is among the {last['candidates']} best base logits in "
                f"{last['candidate_recall']:.2%} of slots."
            )
    if steps:
        base, final = (running_mean([row[key] for row in steps])[-1] for key in ("base_loss", "final_loss"))
        losses = f"base loss {base:.3f}, final loss {final:.3f}" if recipe.draft.head else f"loss {base:.3f}"
        sentences.append(f"Over the last {min(SMOOTHING_POINTS, len(steps))} recorded steps: {losses}.")
    return " ".join(sentences)


def _acceptance(last: Row, has_head: bool) -> str:
    """Share of blocks whose first k drafts were all accepted."""
    header = ["first k drafts accepted", *(str(k) for k in range(1, len(last["acceptance"]) + 1))]
    sides = {"head on": last["acceptance"], "head off": last.get("acceptance_head_off", [])}
    if not has_head:
        sides = {"no head": last["acceptance"]}
    return _table(header, [(side, *(f"{share:.0%}" for share in shares)) for side, shares in sides.items() if shares])


def _cost(recipe: Recipe, notes: dict[str, str], steps: list[Row], done: int) -> list[tuple[str, str]]:
    # Only every `log_every`-th step is recorded, so totals are estimates from those.
    usual = steps[1:] or steps  # the first step also compiles
    tokens, seconds = (statistics.fmean(row[key] for row in usual) for key in ("tokens", "seconds"))
    sequences = done * recipe.training.batch_size
    known = int(notes.get("training sequences", 0))
    passes = f", {sequences / known:.2f} times those of the data" if known else ""
    lines = [
        ("steps", f"{done:,}, of which {len(steps):,} are recorded"),
        ("sequences", f"{sequences:,}{passes}"),
        ("tokens of text", f"about {with_prefix(tokens * done)}"),
        ("time in steps", f"about {_span(seconds * done)}, without evaluation and saving"),
        ("pace", f"{tokens / seconds:,.0f} tokens/s, {recipe.training.batch_size / seconds:.3g} samples/s"),
    ]
    if operations := float(notes.get("step operations", 0)):
        achieved = operations / statistics.median(
            row["seconds"] for row in usual
        )  # steps that were held up do not count
        lines.append(("operations", f"{with_prefix(operations)}FLOP a step"))
        rate = float(notes.get("matrix rate", 0))
        share = (
            f", **{achieved / rate:.1%}** of the {with_prefix(rate)}FLOP/s that large products reach" if rate else ""
        )
        lines.append(("rate", f"{with_prefix(achieved)}FLOP/s{share} (median step)"))
    return lines


def _settings(recipe: Recipe, notes: dict[str, str], total: int) -> list[tuple[str, str]]:
    draft, data, training = recipe.draft, recipe.data, recipe.training
    curriculum = {
        "linear": f"linear, {training.lambda_base_start:g} to {training.lambda_base_end:g} over "
        f"{training.lambda_base_fraction:.0%} of the run",
        "constant": f"constant, {training.lambda_base_start:g}",
        "off": "off",
    }[training.curriculum]
    weights = {
        "exponential": f"exponential, decay {training.position_decay:g}",
        "acceptance": f"acceptance, floor {training.confidence_floor:g}",
    }[training.position_weights]
    layers = f"layers {', '.join(map(str, draft.init_layers_from_target or ()))} of the target"
    start = draft.init_from or (layers if draft.init_layers_from_target else "random weights")
    return [
        ("target", recipe.target),
        ("draft", notes.get("draft", "unknown")),
        ("block schedule", ", ".join(map(str, training.block_schedule)) or "none"),
        ("started from", start),
        ("trained", training.trained),
        ("head's prefix encoder", training.causal_encoder if draft.head is not None else "no head"),
        ("data", f"{data.responses}, up to {data.max_length:,} tokens; features {data.features}, {data.feature_dtype}"),
        ("objective", training.objective),
        ("lambda", curriculum),
        ("position weights", weights),
        (
            "batch",
            f"{training.batch_size} sequences, {training.micro_batch_size} at a time; {training.anchors} anchors",
        ),
        ("steps", f"{total:,}" + (f" ({training.epochs:g} epochs)" if training.epochs else "")),
        (
            "optimizer",
            f"AdamW, learning rate {training.learning_rate:g}, warm-up {training.warmup_ratio:.0%}, weight decay "
            f"{training.weight_decay:g}, clip {training.clip_norm:g}",
        ),
        ("products in", training.precision),
        ("seed", str(training.seed)),
    ]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in cells)


def _span(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


# The picture.


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
