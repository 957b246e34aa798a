"""report.md: the tables of a report for people, made from what report.json holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from domino_spec.bench.breakdown import Breakdown, render_breakdown
from domino_spec.bench.figures import AGREEMENT

DEFINITIONS = f"""\
- **tau**: mean of accepted drafts + 1 over all verify passes of all prompts, before stop and length cuts shorten the
  last pass. The mean over suites is unweighted.
- **tokens/s**: tokens that decoding produced over seconds of decoding, both summed over runs; prefill left out. Our
  decoding produces every token; `transformers` has its first one when its prefill ends, so there the rest count.
- **Speed-up**: seconds per token of the baseline over those of the method, on the same prompts and repeats. `none` is
  the same engine without a draft; `transformers` is stock `model.generate` with SDPA attention.
- **End to end**: all tokens over seconds of prefill and decoding.
- **c**: seconds per pass of the method over seconds per step of `none`. The speed-up must lie within
  {AGREEMENT:.0%} of tau / c; what is missing is what length and stop cut off last passes.
- In brackets: the budget, drafts per pass. Those of a tree stand on several paths, of which a pass accepts one."""

Record = dict[str, Any]


def render(report: Record, plots: Sequence[str] = ()) -> str:
    """A report as Markdown.

    Args:
        report: what `report.build_report` returned.
        plots: file names of images to show.
    """
    settings = report["settings"]
    parts = ["# Benchmark report", _provenance(report)]
    for temperature in dict.fromkeys(entry["temperature"] for entry in report["pooled"]):
        parts += _at_temperature(report, temperature)
    parts += _same_text(report)
    if report["acceptance"]:
        parts += ["## Acceptance by number of drafts", _positions(report["acceptance"])]
    if report["breakdown"]:
        parts.append("## Where a cycle goes")
        parts += [_breakdown(entry) for entry in report["breakdown"]]
    if plots:
        parts += ["## Plots", *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots)]
    parts += ["## Definitions", DEFINITIONS]
    if report["measured_runs"] < settings["planned_runs"]:
        parts.insert(
            1,
            f"**Unfinished: {report['measured_runs']} of {settings['planned_runs']} runs are measured.** "
            "Repeat the command to go on.",
        )
    return "\n\n".join(parts) + "\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def name_of(entry: Record) -> str:
    """A method with its budget, as the tables call it."""
    return entry["method"] + (f" ({entry['budget']})" if entry["budget"] else "")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _provenance(report: Record) -> str:
    settings, sessions = report["settings"], report["sessions"]
    suites = ", ".join(f"{name} ({count})" for name, count in settings["suites"].items())
    lines = [
        ["target", f"{settings['target']} (fingerprint {settings['target_fingerprint']})"],
        ["draft", "none" if settings["draft"] is None else f"{settings['draft']} (weights {settings['draft_digest']})"],
        ["suites (prompts)", f"{suites}; first turn of each"],
        ["decoding", _decoding_line(settings)],
        ["device", f"{settings['device_name']} ({settings['device']}), {_arithmetic(settings)}"],
    ]
    for session in sessions:
        versions = ", ".join(f"{package} {version}" for package, version in session["versions"].items())
        lines += [
            [f"from run {session['rows_before'] + 1}", f"`{session['command']}`"],
            ["", f"{session['started']}, commit {session['commit'] or 'unknown'}, load {session['load_average']}"],
            ["", versions],
        ]
    text = table(["", ""], lines).replace("---:", "---")
    if len({(session["commit"], str(session["versions"])) for session in sessions}) > 1:
        text += "\n\n**Measured in sessions of different commits or versions: compare with care.**"
    return text


def _arithmetic(settings: Record) -> str:
    packing = "weights packed for all methods but transformers" if settings["packed_weights"] else "weights not packed"
    return f"{settings['dtype']}, {settings['threads']} threads, {packing}"


def _decoding_line(settings: Record) -> str:
    return (
        f"{settings['max_new_tokens']} new tokens at most, seed {settings['seed']}, repeats {settings['repeats']}, "
        f"batch {settings['batch']}, candidates {settings['candidates'] or 'all'}, "
        f"thinking {'on' if settings['thinking'] else 'off'}, min_confidence {settings['min_confidence']} where used"
    )


def _at_temperature(report: Record, temperature: float) -> list[str]:
    def at(entries: Sequence[Record]) -> list[Record]:
        return [entry for entry in entries if entry["temperature"] == temperature]

    suites = {name: {name_of(e): e for e in at(entries)} for name, entries in report["suites"].items()}
    means, pooled = at(report["mean"]), at(report["pooled"])

    def by_suite(figure: str, digits: int, show: Callable[[Record], bool] = lambda _: True) -> str:
        rows = []
        for mean in filter(show, means):
            name = name_of(mean)
            values = [_number(entries.get(name, {}).get(figure), digits) for entries in suites.values()]
            rows.append([name, *values, _number(mean[figure], digits)])
        return table(["method", *suites, "mean"], rows)

    parts = [
        f"## Temperature {temperature:g}",
        "### Acceptance length (tau)",
        by_suite("tau", 2, lambda entry: entry["budget"] > 0),
        "### Decode tokens/s",
        by_suite("tokens_per_second", 1),
    ]
    for baseline in ("none", "transformers"):
        figure = f"speedup_over_{baseline}"
        if any(entry[figure] is not None for entry in pooled):
            parts += [f"### Decode speed-up over `{baseline}`", by_suite(figure, 2)]
    parts += ["### Cost of a pass, and end to end (all runs together)", _cost(pooled)]
    return parts


def _cost(pooled: Sequence[Record]) -> str:
    verdict = {True: "yes", False: "**no**", None: "–"}
    rows = [
        [
            name_of(e),
            str(e["runs"]),
            str(e["tokens"]),
            str(e["passes"]),
            _number(e["tau"], 3),
            _number(e["cost_ratio"], 3),
            _number(e["tau_over_cost"], 3),
            _number(e["speedup_over_none"], 3),
            verdict[e["agrees"]],
            _number(e["end_to_end_tokens_per_second"], 1),
            _number(e["end_to_end_speedup_over_none"]),
            _number(e["end_to_end_speedup_over_transformers"]),
        ]
        for e in pooled
    ]
    return table(
        [
            "method",
            "runs",
            "tokens",
            "passes",
            "tau",
            "c",
            "tau / c",
            "speed-up over none",
            f"within {AGREEMENT:.0%}",
            "end-to-end tokens/s",
            "over none",
            "over transformers",
        ],
        rows,
    )


def _same_text(report: Record) -> list[str]:
    if not report["greedy_equality"]:
        return []
    rows = [
        [
            name_of(e),
            e["reference"],
            str(e["compared"]),
            str(e["equal"]),
            str(e["near_ties"]),
            _number(e["largest_margin"], 6),
        ]
        for e in report["greedy_equality"]
    ]
    headers = [
        "method",
        "compared with",
        "texts",
        "equal",
        "part at a near tie",
        "largest top-two margin where they part",
    ]
    parts = [
        "## Same text at temperature 0",
        table(headers, rows),
    ]
    if report["differences"]:
        details = [
            [
                name_of(d),
                d["reference"],
                f"{d['id']}, repeat {d['repeat']}",
                str(d["position"]),
                f"{d['token']} / {d['reference_token']}",
                "–" if d["top_tokens"] is None else " / ".join(map(str, d["top_tokens"])),
                _number(d["margin"], 6),
                _number(d["rounding"], 6),
                {True: "yes", False: "**no**", None: "–"}[d["near_tie"]],
            ]
            for d in report["differences"]
        ]
        headers = ["method", "compared with", "prompt", "tokens before", "wrote / reference wrote", "target's best two"]
        parts += [
            "Where texts part, and what the target says there: a near tie is a margin of at most twice what rounding "
            "moves a logit on that text (the same tokens read in one pass and one by one).",
            table([*headers, "margin", "rounding", "near tie"], details),
        ]
    return parts


def _positions(entries: Sequence[Record]) -> str:
    most = max(entry["budget"] for entry in entries)
    rows = [
        [
            f"{name_of(entry)}, T = {entry['temperature']:g}",
            *(_number(value) for value in entry["by_position"]),
            *("" for _ in range(most - entry["budget"])),
        ]
        for entry in entries
    ]
    return "Of the passes with at least k drafts, the share that accepted k or more:\n\n" + table(
        ["method", *(str(k) for k in range(1, most + 1))], rows
    )


def _breakdown(entry: Record) -> str:
    fields = {name: entry[name] for name in Breakdown.__dataclass_fields__}
    text = render_breakdown(Breakdown(**fields))
    if entry["predicted_speedup"] is not None and entry["measured_speedup"] is not None:
        off = entry["measured_speedup"] / entry["predicted_speedup"] - 1
        text += (
            f"\n\nWith the tau of the greedy runs this c predicts a speed-up of {entry['predicted_speedup']:.2f} over "
            f"`none`; measured in them: {entry['measured_speedup']:.2f} ({off:+.1%})."
        )
    return text
