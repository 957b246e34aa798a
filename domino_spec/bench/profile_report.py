"""What a profile says: profile.md with tables, profile.json with everything, and the plot of the paper's Figure 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from domino_spec.bench.cells import Record, number, table
from domino_spec.bench.plots import save_figure
from domino_spec.bench.profile_watch import STAGES
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
_COLORS = dict(
    zip(
        (*STAGES, "host_gap"),
        ("tab:blue", "lightsteelblue", "tab:cyan", "tab:orange", "navajowhite", "tab:green", "tab:purple", "0.75"),
        strict=True,
    )
)


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
    """The tables of a profile as Markdown: one for each method, and one of verify passes where they were measured."""
    parts = [_heading(record), _overview(record)]
    parts += [_stages(entry) for entry in record["methods"]]
    if record["rows"]:
        parts.append(_rows(record))
    return "\n\n".join(parts)


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


def _overview(record: Record) -> str:
    """A line for each method: what its cycle costs, and what tau must be for it to pay."""
    rows = [
        [
            label(entry),
            str(entry["rows"]),
            _milliseconds(entry["cycle"]["median"]),
            _spread(entry["cycle"]),
            number(entry["cost_ratio"]) if entry["num_drafts"] else "1.00",
            number(_drafting(entry) / _verifying(entry)) if entry["num_drafts"] else "–",
        ]
        for entry in record["methods"]
    ]
    headers = ["cycle", "rows", "ms", "10th-90th percentile", "c", "drafting / verifying"]
    return table(headers, rows) + (
        "\n\nc is the cycle in plain steps: the speed-up is tau / c, so a draft pays where tau is above c. Drafting is "
        "every stage of the draft, verifying the target's layers and LM head. Each figure is a median of its own, so a "
        "column adds up to its cycle but for noise."
    )


def _stages(entry: Record) -> str:
    rows = []
    for stage, found in entry["stages"].items():
        rows.append(
            [
                stage_name(stage, entry["method"]),
                _milliseconds(found["seconds"]["median"]),
                _spread(found["seconds"]),
                _share(found["share"]),
                _megabytes(found["bytes"]),
                "–" if found["floor"] is None else _milliseconds(found["floor"]),
                _times(found["over_floor"]),
            ]
        )
    whole, gap = entry["cycle"], entry["host_gap"]
    floors = [found["floor"] for found in entry["stages"].values()]
    floor = None if None in floors else sum(floors)
    moved = sum(found["bytes"] for found in entry["stages"].values())
    share = _share(gap["median"] / whole["median"])
    rows.append(["host gap", _milliseconds(gap["median"]), _spread(gap), share, "–", "–", "–"])
    rows.append(
        [
            "**cycle**",
            _milliseconds(whole["median"]),
            _spread(whole),
            "100.0%",
            _megabytes(moved),
            "–" if floor is None else _milliseconds(floor),
            _times(whole["median"] / floor if floor else None),
        ]
    )
    headers = ["stage", "ms", "10th-90th percentile", "share", "MB at least", "floor, ms", "over floor"]
    text = f"**{label(entry)}**\n\n" + table(headers, rows)
    if entry["waited"]:
        text += (
            "\n\nThe host waited for the device inside this cycle: stages hold waits, and the gap is not all of them."
        )
    return text


def _rows(record: Record) -> str:
    """What a verify pass costs by its number of rows."""
    found = {(entry["kind"], entry["rows"]): entry for entry in record["rows"]}
    rows = []
    for count in dict.fromkeys(entry["rows"] for entry in record["rows"]):
        cells = []
        for kind in ("chain", "tree"):
            entry = found.get((kind, count))
            cells += (
                ["–", "–"]
                if entry is None
                else [_milliseconds(entry["seconds"]["median"]), number(entry["plain_steps"])]
            )
        rows.append([str(count), *cells])
    headers = ["rows of a verify pass", "chain, ms", "plain steps", "tree, ms", "plain steps"]
    return table(headers, rows)


def label(entry: Record) -> str:
    """A method's cycle as tables and plots call it."""
    count = entry["num_drafts"]
    if entry["method"] == "none":
        return "plain step"
    return f"{entry['method']}, {count} draft{'s' * (count != 1)}"


def _drafting(entry: Record) -> float:
    return _seconds_of(entry, ("context", "backbone", "lm_head", "rollout"))


def _verifying(entry: Record) -> float:
    return _seconds_of(entry, ("verify", "verify_lm_head"))


def _seconds_of(entry: Record, stages: tuple[str, ...]) -> float:
    return sum(found["seconds"]["median"] for stage, found in entry["stages"].items() if stage in stages)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _times(ratio: float | None) -> str:
    return number(ratio, 2 if ratio is None or ratio < 100 else 0)


def _spread(timing: Record) -> str:
    return f"{_milliseconds(timing['p10'])}-{_milliseconds(timing['p90'])}"


def _share(share: float) -> str:
    return f"{share:.1%}"


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
