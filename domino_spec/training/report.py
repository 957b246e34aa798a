"""The report on a training run, one page: what came of it, at what cost, and what it was made with.

Everything in it is computed from files of the run's directory (`recipe.yaml` and `metrics.jsonl`), so a report can be
made at any time, also while the run goes on, and made again later.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domino_spec.files import atomic_path
from domino_spec.recipe import Recipe, load_recipe
from domino_spec.training.flops import shortened
from domino_spec.training.plots import SMOOTHING_POINTS, plot_training, read_metrics, running_mean
from domino_spec.training.watch import METRICS_FILE, RunFacts

REPORT_FILE = "report.md"
PICTURE_FILE = "training.png"

Row = dict[str, Any]


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
        ("tokens of text", f"about {shortened(tokens * done)}"),
        ("time in steps", f"about {_span(seconds * done)}, without evaluation and saving"),
        ("pace", f"{tokens / seconds:,.0f} tokens/s, {recipe.training.batch_size / seconds:.3g} samples/s"),
    ]
    operations = [row for row in usual if row.get("flops")]
    if operations:
        # The median leaves out steps that something else held up.
        achieved = statistics.median(row["flops"] / row["seconds"] for row in operations)
        a_step = statistics.fmean(row["flops"] for row in operations)
        lines.append(("operations", f"{shortened(a_step)}FLOP a step"))
        rate = float(notes.get("matrix rate", 0))
        share = f", **{achieved / rate:.1%}** of the {shortened(rate)}FLOP/s that large products reach" if rate else ""
        lines.append(("rate", f"{shortened(achieved)}FLOP/s{share} (median step)"))
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
