"""What a profile says: profile.md with tables, profile.json with everything, and the plot of the paper's Figure 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from domino_spec.bench.figures import Record
from domino_spec.bench.page import Column, number, records_table, table, text_column
from domino_spec.bench.plots import save_figure
from domino_spec.bench.profile import STAGES, Breakdown
from domino_spec.files import atomic_path, write_json
from domino_spec.settings import UserError

JSON_FILE, MARKDOWN_FILE, PLOT = "profile.json", "profile.md", "profile"
STAGE_NAMES = {
    "verify": "verify",
    "verify_lm_head": "verify: LM head",
    "context": "context projection",
    "backbone": "backbone",
    "lm_head": "LM head",
    "rollout": "head rollout",
    "accept_commit": "accept and commit",
    "host_gap": "host gap",
    "rest": "rest",
}
"""Stages as the tables call them; `rest` is the host gap of a bench measured before it had a name."""


def stage_name(stage: str, method: str) -> str:
    """A stage of a method as people call it: what follows the base logits is not a head's rollout everywhere."""
    if stage != "rollout":
        return STAGE_NAMES[stage]
    if method == "ngram":
        return "look-up"
    if method == "dflash":
        return "choice of tokens"
    return "head rollout" if method.partition("+")[0] == "domino" else "tree growth"


def check_writable(out: Path) -> None:
    """Make a directory, and refuse one that nothing can be written to, before time is spent on measuring.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def write_profile(record: Record, out: Path) -> str:
    """Write profile.json, profile.md and the plot as PNG and SVG, each whole or not at all; returns the Markdown.

    Args:
        record: of `profile.profile_record`.
        out: the directory.

    Raises:
        UserError: a file cannot be written.
    """
    text = render_profile(record)
    save_figure(profile_figure(record), out, PLOT)
    with atomic_path(out / MARKDOWN_FILE) as scratch:
        scratch.write_text(f"# Profile\n\n{text}\n\n![profile]({PLOT}.png)\n", encoding="utf-8")
    write_json(record, out / JSON_FILE)
    return text


def render_profile(record: Record) -> str:
    """The tables of a profile as Markdown: one for each method, and one of verify passes if they were measured."""
    overview = records_table(OVERVIEW, record["methods"]) + (
        "\n\nc is the cycle in plain steps: the speed-up is tau / c, so a draft pays where tau is above c. Drafting is "
        "every stage of the draft, verifying the target's layers and LM head. Each figure is a median of its own, so a "
        "column adds up to its cycle but for noise."
    )
    parts = [_heading(record), overview, *map(_stages, record["methods"])]
    return "\n\n".join([*parts, _rows(record)] if record["rows"] else parts)


def _heading(record: Record) -> str:
    made_of = f"shape {record['shape']}, random weights" if record.get("shape") else str(record["target"])
    if record.get("draft_vocab_size"):
        made_of += f", draft vocabulary {record['draft_vocab_size']}"
    if record.get("draft"):
        made_of += f" with {record['draft']}"
    speed = record["copy_bandwidth"]
    measured = f", copy bandwidth {speed / 1e9:.1f} GB/s" if speed else ""
    count = record["threads"]
    threads = f", {count} thread{'s' * (count != 1)}" if record["device"] == "cpu" else ""
    return (
        f"{made_of}; {record['dtype']} on {record['device_name']} ({record['device']}){threads}{measured}; "
        f"context {record['context']}, batch {record['batch']}, median of {record['repeats']}."
    )


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _megabytes(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _spread(timing: Record) -> str:
    return f"{_milliseconds(timing['p10'])}-{_milliseconds(timing['p90'])}"


def _drafting_over_verifying(entry: Record) -> str:
    if not entry["num_drafts"]:
        return "–"
    seconds = {stage: found["seconds"]["median"] for stage, found in entry["stages"].items()}
    drafting = sum(seconds.get(stage, 0.0) for stage in ("context", "backbone", "lm_head", "rollout"))
    return number(drafting / (seconds["verify"] + seconds["verify_lm_head"]))


OVERVIEW = (
    Column("cycle", lambda entry: label(entry)),
    text_column("rows"),
    Column("ms", lambda entry: _milliseconds(entry["cycle"]["median"])),
    Column("10th-90th percentile", lambda entry: _spread(entry["cycle"])),
    Column("c", lambda entry: number(entry["cost_ratio"]) if entry["num_drafts"] else "1.00"),
    Column("drafting / verifying", _drafting_over_verifying),
)
STAGE = (
    text_column("stage", "name"),
    Column("ms", lambda entry: _milliseconds(entry["seconds"]["median"])),
    Column("10th-90th percentile", lambda entry: _spread(entry["seconds"])),
    Column("share", lambda entry: f"{entry['share']:.1%}"),
    Column("MB at least", lambda entry: _megabytes(entry.get("bytes"))),
    Column("floor, ms", lambda entry: _milliseconds(entry.get("floor"))),
    Column("over floor", lambda entry: number(ratio := entry.get("over_floor"), 2 if (ratio or 0) < 100 else 0)),
)


def _stages(entry: Record) -> str:
    """A line for each stage, one for the host gap, and one for the whole cycle."""
    whole, gap = entry["cycle"], entry["host_gap"]
    stages = [{"name": stage_name(stage, entry["method"]), **found} for stage, found in entry["stages"].items()]
    floors = [found["floor"] for found in stages]
    floor = None if None in floors else sum(floors)
    sums = {
        "bytes": sum(found["bytes"] for found in stages),
        "floor": floor,
        "over_floor": whole["median"] / floor if floor else None,
    }
    stages += [
        {"name": "host gap", "seconds": gap, "share": gap["median"] / whole["median"]},
        {"name": "**cycle**", "seconds": whole, "share": 1.0, **sums},
    ]
    text = f"**{label(entry)}**\n\n" + records_table(STAGE, stages)
    if entry["waited"]:
        text += "\n\nThe host waited for the device inside this cycle: the host gap holds that too."
    return text


def _rows(record: Record) -> str:
    """What a verify pass costs by its number of rows."""
    found = {(entry["kind"], entry["rows"]): entry for entry in record["rows"]}

    def cells(kind: str, count: int) -> list[str]:
        entry = found.get((kind, count))
        return (
            ["–", "–"] if entry is None else [_milliseconds(entry["seconds"]["median"]), number(entry["plain_steps"])]
        )

    counts = dict.fromkeys(entry["rows"] for entry in record["rows"])
    headers = ["rows of a verify pass", "chain, ms", "plain steps", "tree, ms", "plain steps"]
    return table(headers, [[str(count), *cells("chain", count), *cells("tree", count)] for count in counts])


def label(entry: Record) -> str:
    """A method's cycle as tables and plots call it."""
    count = entry["num_drafts"]
    if entry["method"] == "none":
        return "plain step"
    return f"{entry['method']}, {count} draft{'s' * (count != 1)}"


_COLORS = dict(
    zip(
        (*STAGES, "host_gap"),
        ("tab:blue", "lightsteelblue", "tab:cyan", "tab:orange", "navajowhite", "tab:green", "tab:purple", "0.75"),
        strict=True,
    )
)


def profile_figure(record: Record) -> Figure:
    """A bar for each method, its stages one on the other in milliseconds, as on the left of the paper's Figure 1."""
    methods = record["methods"]
    figure = Figure(figsize=(max(6.0, 2.8 + 1.1 * len(methods)), 4.2), dpi=120, layout="constrained")
    panel = figure.add_subplot()
    names = [label(entry).replace(", ", "\n") for entry in methods]
    bottoms = [0.0] * len(methods)
    for stage, color in _COLORS.items():
        heights = [1e3 * max(0.0, _height(entry, stage)) for entry in methods]
        if not any(heights):
            continue
        called = {stage_name(stage, e["method"]) for e, height in zip(methods, heights, strict=True) if height}
        legend: Any = " / ".join(sorted(called))
        panel.bar(range(len(methods)), heights, 0.62, bottom=bottoms, color=color, label=legend)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, (entry, top) in enumerate(zip(methods, bottoms, strict=True)):
        text = f"{1e3 * entry['cycle']['median']:.3g} ms"
        if entry["num_drafts"]:
            text += f"\nc = {entry['cost_ratio']:.2f}"
        panel.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    panel.set_xticks(range(len(methods)), names, fontsize=8)
    panel.set_ylabel("ms per cycle")
    panel.margins(y=0.18)
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
    title = record.get("shape") or record["target"]
    panel.set_title(f"{title}, context {record['context']}, batch {record['batch']}, {record['dtype']}", fontsize=9)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    return figure


def _height(entry: Record, stage: str) -> float:
    if stage == "host_gap":
        return float(entry["host_gap"]["median"])
    found = entry["stages"].get(stage)
    return 0.0 if found is None else float(found["seconds"]["median"])


def render_breakdown(breakdown: Breakdown) -> str:
    """A Markdown table of one breakdown, milliseconds and shares of the cycle."""
    rows = [(stage_name(name, breakdown.method), seconds) for name, seconds in breakdown.stages.items()]
    rows += [("**cycle**", breakdown.cycle), ("plain step", breakdown.plain_step)]
    cells = [[name, f"{seconds * 1e3:.2f}", f"{seconds / breakdown.cycle:.1%}"] for name, seconds in rows]
    return (
        f"{breakdown.method}, {breakdown.num_drafts} drafts, context {breakdown.context} tokens, "
        f"{breakdown.threads} threads, median of {breakdown.repeats}:\n\n"
        f"{table(['stage', 'ms', 'share of the cycle'], cells)}\n\n"
        f"Cost ratio c = {breakdown.cost_ratio:.2f}: speed-up = tau / c, so the draft pays above tau "
        f"{breakdown.cost_ratio:.2f} and doubles the speed at tau {2 * breakdown.cost_ratio:.2f}."
    )
