"""report.md: the tables of a report for people, made from what report.json holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from domino_spec.bench.breakdown import Breakdown, render_breakdown
from domino_spec.bench.cells import Record, name_of, number, table, with_interval
from domino_spec.bench.figures import AGREEMENT
from domino_spec.bench.intervals import LEVEL, RESAMPLES
from domino_spec.bench.tables import (
    against_reference,
    at,
    baseline_of,
    head_by_suites,
    head_on_and_off,
    methods_by_suites,
    suites_at,
    suites_by_batch,
)

__all__ = ["DEFINITIONS", "name_of", "render", "table"]

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
- In brackets behind a method: its budget, the most drafts of one pass. Those of a tree stand on several paths, of which
  a pass accepts one.
- In brackets behind a figure: its {LEVEL:.0%} interval over prompts. Whole conversations, with all their turns and
  repeats, are drawn anew within their suite, {RESAMPLES:,} times with a fixed seed; a ratio is taken on the same draw
  for both sides. The percentiles are widened as Student's t asks for that many prompts; of five prompts a suite or
  fewer, the interval is about the range of single prompts, and holds the truth less often than it says. A figure
  without brackets has no interval: a suite with one prompt says nothing of others.
- **Turns**: a later turn's prompt holds the target's own greedy answers to the turns before it, the same for every
  method (`earlier_answers.jsonl`)."""


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


def _threads_line(threads: Record) -> str:
    """What decides how threads run, of one session."""
    variables = ", ".join(f"{name}={value}" for name, value in threads["environment"].items())
    return (
        f"{threads['num_threads']} threads, {threads['processors']} processors ({variables or 'no OpenMP variables'})"
    )


def _provenance(report: Record) -> str:
    settings, sessions = report["settings"], report["sessions"]
    lines = [
        ["target", f"{settings['target']} (fingerprint {settings['target_fingerprint']})"],
        *_drafts(settings),
        ["suites (prompts)", _suites(settings)],
        ["decoding", _decoding_line(settings)],
        ["device", f"{settings['device_name']} ({settings['device']}), {_arithmetic(settings)}"],
    ]
    for session in sessions:
        versions = ", ".join(f"{package} {version}" for package, version in session["versions"].items())
        lines += [
            [f"from run {session['rows_before'] + 1}", f"`{session['command']}`"],
            ["", f"{session['started']}, commit {session['commit'] or 'unknown'}, load {session['load_average']}"],
            ["", versions],
            *([["", _threads_line(session["threads"])]] if "threads" in session else []),
        ]
    load = report.get("load")
    if load:
        stolen = f", {load['steal_seconds']:g} s of processor time taken by other guests of the host"
        lines.append(["load while measuring", f"{load['median']:g} (median), {load['most']:g} at most{stolen}"])
    text = table(["", ""], lines).replace("---:", "---")
    if len({(session["commit"], str(session["versions"])) for session in sessions}) > 1:
        text += "\n\n**Measured in sessions of different commits or versions: compare with care.**"
    return text


def _drafts(settings: Record) -> list[list[str]]:
    drafts = settings.get("drafts")
    if drafts is None:  # a bench of one draft, measured before there could be several
        drafts = [{"name": settings["draft"], "digest": settings["draft_digest"]}] if settings["draft"] else []
    lines = [["draft", f"{draft['name']} (weights {draft['digest']})"] for draft in drafts] or [["draft", "none"]]
    assistant = settings.get("assistant")
    return lines + ([["assistant of transformers", assistant]] if assistant else [])


def _suites(settings: Record) -> str:
    turns = settings.get("turns")
    if turns is None:  # measured before later turns were
        return ", ".join(f"{name} ({count})" for name, count in settings["suites"].items()) + "; first turn of each"
    return ", ".join(
        f"{name} ({count})"
        if turns.get(name, count) == count
        else f"{name} ({count} conversations, {turns[name]} turns)"
        for name, count in settings["suites"].items()
    )


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
    suites = suites_at(report, temperature)
    means, pooled = at(report["mean"], temperature), at(report["pooled"], temperature)
    baseline = baseline_of(report, temperature)

    def by_suite(cell: Callable[[Record], str]) -> str:
        rows = []
        for mean in means:
            name = name_of(mean)
            rows.append([name, *(cell(entries.get(name, {})) for entries in suites.values()), cell(mean)])
        return table(["method", *suites, "mean"], rows)

    parts = [
        f"## Temperature {temperature:g}",
        f"### Speed-up over `{baseline}`, and tau (laid out like Table 1 of the paper)",
        methods_by_suites(report, temperature),
        f"### By suite and batch size (laid out like Table 3): speed-up over `{baseline}`",
        suites_by_batch(report, temperature),
    ]
    head = head_on_and_off(report, temperature)
    if head is not None:
        parts += ["### One draft with its Domino head off and on (laid out like Table 4)", head]
        parts += ["### The same by suite (laid out like Table 6)", *head_by_suites(report, temperature)]
    beside = against_reference(report, temperature)
    if beside:
        parts += [
            "### Methods against one of them",
            "Ratios on the same prompts, above 1 where the method is the better:",
            *beside,
        ]
    parts += ["### Decode tokens/s", by_suite(lambda entry: number(entry.get("tokens_per_second"), 1))]
    other = "speedup_over_transformers"
    if baseline != "transformers" and any(entry[other] is not None for entry in pooled):
        parts += [
            "### Decode speed-up over `transformers`",
            by_suite(lambda entry: with_interval(entry, other)),
        ]
    return [*parts, "### Cost of a pass, and end to end (all runs together)", _cost(pooled)]


def _cost(pooled: Sequence[Record]) -> str:
    verdict = {True: "yes", False: "**no**", None: "–"}
    rows = [
        [
            name_of(e),
            str(e["runs"]),
            str(e["tokens"]),
            str(e["passes"]),
            with_interval(e, "tau", 3),
            with_interval(e, "cost_ratio", 3),
            number(e["tau_over_cost"], 3),
            with_interval(e, "speedup_over_none", 3),
            verdict[e["agrees"]],
            number(e["end_to_end_tokens_per_second"], 1),
            number(e["end_to_end_speedup_over_none"]),
            number(e["end_to_end_speedup_over_transformers"]),
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
            number(e["largest_margin"], 6),
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
                number(d["margin"], 6),
                number(d["rounding"], 6),
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
    # A tree's budget is far beyond its depth: what no pass of any method reached is not shown.
    reached = max(sum(value > 0 for value in entry["by_position"]) for entry in entries)
    most = max(1, min(reached + 1, max(entry["budget"] for entry in entries)))
    rows = [
        [
            f"{name_of(entry)}, T = {entry['temperature']:g}",
            *(number(value) for value in entry["by_position"][:most]),
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
