"""A bench directory's report: report.json with every figure, report.md and report.html to read, all made from it.

Figures come from raw.jsonl alone and can be computed again at any time, on any machine, without a model or a server.
Beside them stand what was recorded while measuring: settings.json (configuration and sessions), ties.json (margins of
greedy texts that differ) and breakdown.json (stages of a cycle). A bench of methods and one of servers have the same
frame; their tables are laid out like those of the paper, so that the two can be compared. The paper's own figures are
not repeated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from domino_spec.bench.figures import (
    AGREEMENT,
    LEVEL,
    RESAMPLES,
    Draws,
    Record,
    acceptance,
    against,
    contenders_of,
    draws_of,
    figures,
    means,
    measured,
    places,
    server_figures,
    server_means,
    server_samples,
)
from domino_spec.bench.page import (
    GROUPS,
    VERDICT,
    Column,
    at,
    facts_table,
    figure_column,
    in_paper_order,
    name_of,
    number,
    number_column,
    plots_section,
    records_table,
    table,
    text_column,
    with_interval,
    write_page,
)
from domino_spec.bench.profile import Breakdown, load_breakdowns
from domino_spec.bench.profile_report import render_breakdown
from domino_spec.bench.rows import SETTINGS_FILE, Contender, Measured, Row, read_measured, read_rows
from domino_spec.bench.server.load import LONGEST_WAIT
from domino_spec.bench.ties import compare_texts, compared_texts, find_partings, load_ties
from domino_spec.files import atomic_path, read_json, write_json
from domino_spec.settings import UserError

REPORT_FILE, MARKDOWN_FILE = "report.json", "report.md"
WITHOUT_HEAD = {
    "domino": ("domino-head-off", "dflash"),
    "domino-tree": ("domino-tree-head-off", "dflash-tree"),
}
"""The same draft with its head off, for each method that uses the head."""
HEAD_OFF = "-head-off"
MOST_DIFFERENCES = 40
"""Rows of server texts that differ in report.md; report.json has all."""


def write_report(out: Path, plots: Sequence[str] = ()) -> Record:
    """Write report.json, report.md and report.html of a bench directory; returns what report.json holds.

    Args:
        out: the directory.
        plots: file names of plots in it, to show.

    Raises:
        UserError: it holds no measurements, or a file cannot be read or written.
    """
    report = build_report(out)
    write_json(report, out / REPORT_FILE)
    markdown, settings = render(report, plots), report["settings"]
    with atomic_path(out / MARKDOWN_FILE) as scratch:
        scratch.write_text(markdown, encoding="utf-8")
    of_servers = f"Serving benchmark report: {', '.join(settings['servers'])}" if "servers" in settings else None
    write_page(markdown, of_servers or f"Benchmark report: {settings['target']}", out, plots)
    return report


# report.json: its content.


def build_report(out: Path) -> Record:
    """Everything that report.json holds.

    Raises:
        UserError: `out` holds no measurements, or a file in it is malformed.
    """
    if not (out / SETTINGS_FILE).exists():
        raise UserError(f"{out} holds no measurements")
    settings = read_json(out / SETTINGS_FILE)
    frame = {
        "settings": settings["configuration"],
        "sessions": settings["sessions"],
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "drawn": "whole conversations within each suite"},
    }
    build = _of_servers if "servers" in settings["configuration"] else _of_methods
    return dict(json.loads(json.dumps(frame | build(out, settings["configuration"]))))  # lists, as report.json has them


def _of_methods(out: Path, settings: Record) -> Record:
    rows = read_rows(out)
    if not rows:
        raise UserError(f"{out} holds no measurements")
    contenders, draws = contenders_of(rows), draws_of(rows)
    suites = {name: [row for row in rows if row.suite == name] for name in dict.fromkeys(row.suite for row in rows)}
    # The first contender of a suite changes from prompt to prompt; tables have one order for all.
    of_suites = {
        name: {c: measured(of_suite, c, draws) for c in contenders if c in set(contenders_of(of_suite))}
        for name, of_suite in suites.items()
    }
    pooled = [figures(measured(rows, contender, draws)) for contender in contenders]
    return {
        "measured_runs": len(rows),
        "load": _load(rows),
        "suites": {name: [figures(m) for m in found.values()] for name, found in of_suites.items()},
        "mean": [means([found[c] for found in of_suites.values() if c in found]) for c in contenders],
        "pooled": pooled,
        "against": _against(suites, contenders, settings["methods"], draws),
        "drafting": [_drafting(c) for c in contenders],
        "acceptance": [acceptance(rows, c) for c in contenders if c.budget],
        "greedy_equality": _greedy_equality(out, rows),
        "differences": _differences(out, rows),
        "breakdown": [_with_prediction(b, pooled) for b in load_breakdowns(out)],
    }


def _load(rows: Sequence[Row]) -> Record | None:
    """What else the machine did during the runs; None for old benches that did not record it."""
    loads = sorted(row.load_average for row in rows if row.load_average is not None)
    if not loads:
        return None
    stolen = sum(row.steal_seconds or 0.0 for row in rows)
    return {"median": loads[len(loads) // 2], "most": loads[-1], "steal_seconds": round(stolen, 3)}


def _drafting(contender: Contender) -> Record:
    """Whether a contender drafts, and why it does not."""
    reason = None
    if not contender.budget:
        ours = contender.method == "none"
        reason = "method none was asked for" if ours else "transformers decodes by itself, without a draft"
    return {**contender._asdict(), "drafting": reason is None, "reason": reason}


def _against(
    suites: Mapping[str, Sequence[Row]], contenders: Sequence[Contender], order: Sequence[str], draws: Draws
) -> list[Record]:
    """Every method that drafts beside the first one that does, at the same temperature and, if possible, budget."""
    found = []
    for contender in contenders:
        drafting = [c for c in contenders if c.budget and c.temperature == contender.temperature]
        drafting.sort(key=lambda c: order.index(c.method) if c.method in order else len(order))
        references = [c for c in drafting if c.method == drafting[0].method]
        if contender.budget and contender not in references:
            same_budget = [c for c in references if c.budget == contender.budget]
            found += against(suites, contender, (same_budget or references)[0], draws)
    return found


def _greedy_equality(out: Path, rows: Sequence[Row]) -> list[Record]:
    """Per method, budget and reference: how many greedy texts equal the reference's, how many differ at a near tie."""
    ties = {tie.parting: tie for tie in load_ties(out)}
    entries: dict[tuple[str, int, str], Record] = {}
    for row, reference in compared_texts(rows):
        name = (row.method, row.budget, reference.method)
        entry = entries.setdefault(
            name,
            dict(zip(("method", "budget", "reference"), name, strict=True))
            | {"compared": 0, "equal": 0, "near_ties": 0, "largest_margin": None},
        )
        entry["compared"] += 1
        entry["equal"] += row.token_ids == reference.token_ids
    for parting in find_partings(rows):
        tie = ties.get(parting)
        entry = entries[parting.method, parting.budget, parting.reference]
        if tie is not None:
            entry["near_ties"] += tie.near_tie
            entry["largest_margin"] = max(tie.margin, entry["largest_margin"] or 0.0)
    return list(entries.values())


def _differences(out: Path, rows: Sequence[Row]) -> list[Record]:
    ties = {tie.parting: tie for tie in load_ties(out)}
    return [
        asdict(parting)
        | {name: getattr(ties.get(parting), name, None) for name in ("top_tokens", "margin", "rounding", "near_tie")}
        for parting in find_partings(rows)
    ]


def _with_prediction(breakdown: Breakdown, pooled: Sequence[Record]) -> Record:
    """A breakdown, and the speed-up that its c predicts for the greedy runs beside the one that was measured."""
    wanted = Contender(breakdown.method, breakdown.num_drafts, 0.0)._asdict()
    found = next((f for f in pooled if f.items() >= wanted.items()), None)
    return asdict(breakdown) | {
        "cost_ratio": breakdown.cost_ratio,
        "tau_to_pay": breakdown.cost_ratio,
        "tau_to_double": 2 * breakdown.cost_ratio,
        "predicted_speedup": found["tau"] / breakdown.cost_ratio if found and found["tau"] else None,
        "measured_speedup": found["speedup_over_none"] if found else None,
    }


def _of_servers(out: Path, settings: Record) -> Record:
    measured = read_measured(out)
    if not measured.windows:
        raise UserError(f"{out} holds no measurements of servers")
    baseline, order = settings["baseline"], list(settings["servers"])
    samples = server_samples(measured, baseline)
    found = [
        server_figures(windows, [row for window in windows for row in measured.requests[window.key]], samples[place])
        for place, windows in places(measured).items()
    ]
    found.sort(key=lambda f: (f["temperature"], f["concurrency"], order.index(f["server"])))
    equalities, differences = compare_texts(measured, baseline)
    return {
        "measured_windows": len(measured.windows),
        "baseline": baseline,
        "figures": found,
        "mean": server_means(found, samples),
        "text_equality": [asdict(e) for e in equalities],
        "differences": [asdict(d) for d in differences],
        "errors": _errors(measured),
    }


def _errors(measured: Measured) -> list[Record]:
    """How often requests failed, and why."""
    counted = Counter(
        (row.server, row.suite, row.concurrency, row.temperature, row.error)
        for rows in measured.requests.values()
        for row in rows
        if row.error is not None
    )
    names = ("server", "suite", "concurrency", "temperature", "error")
    return [{**dict(zip(names, key, strict=True)), "times": times} for key, times in counted.items()]


# report.md: the frame that both kinds of report have.


def render(report: Record, plots: Sequence[str] = ()) -> str:
    """A report as Markdown.

    Args:
        report: from `build_report`.
        plots: file names of images to show.
    """
    of_servers = "servers" in report["settings"]
    unit = "windows" if of_servers else "runs"
    found, planned = report[f"measured_{unit}"], report["settings"][f"planned_{unit}"]
    parts = ["# Serving benchmark report" if of_servers else "# Benchmark report"]
    if found < planned:
        parts.append(f"**Unfinished: {found} of {planned} {unit} are measured.** Repeat the command to go on.")
    parts += [_provenance(report, unit), *(_server_sections(report) if of_servers else _method_sections(report))]
    definitions = SERVER_DEFINITIONS if of_servers else DEFINITIONS
    return "\n\n".join([*parts, *plots_section(plots), "## Definitions", definitions]) + "\n"


def _provenance(report: Record, unit: str) -> str:
    """What was measured, and with what."""
    sessions, of_servers = report["sessions"], unit == "windows"
    lines = _server_facts(report) if of_servers else _method_facts(report)
    for session in sessions:
        versions = ", ".join(f"{package} {version}" for package, version in session["versions"].items())
        if of_servers:
            engines = ", ".join(f"{name}: {what}" for name, what in session["servers"].items())
            versions = f"{engines}; client: {versions}"
        lines += [
            [f"from {unit[:-1]} {session['rows_before'] + 1}", f"`{session['command']}`"],
            ["", f"{session['started']}, commit {session['commit'] or 'unknown'}, load {session['load_average']}"],
            ["", versions],
        ]
        if "threads" in session and not of_servers:
            lines.append(["", _threads(session["threads"])])
    load = report.get("load")
    if load:
        stolen = f", {load['steal_seconds']:g} s of processor time taken by other guests of the host"
        lines.append(["load while measuring", f"{load['median']:g} (median), {load['most']:g} at most{stolen}"])
    text, engine = facts_table(lines), "servers" if of_servers else "versions"
    if len({(session["commit"], str(session[engine])) for session in sessions}) > 1:
        different = "engines" if of_servers else "versions"
        text += f"\n\n**Measured in sessions of different commits or {different}: compare with care.**"
    unasked = [name for name, s in report["settings"].get("servers", {}).items() if not s["takes_template_settings"]]
    if unasked:
        text += (
            f"\n\n**{', '.join(unasked)} cannot be told whether to think** (`chat_template_kwargs` is refused): its "
            "answers are as its chat template has them."
        )
    return text


def _method_facts(report: Record) -> list[list[str]]:
    settings = report["settings"]
    drafts = settings.get("drafts")
    if drafts is None:  # an old bench, of one draft
        drafts = [{"name": settings["draft"], "digest": settings["draft_digest"]}] if settings["draft"] else []
    assistant = settings.get("assistant")
    packing = "weights packed for all methods but transformers" if settings["packed_weights"] else "weights not packed"
    return [
        ["target", f"{settings['target']} (fingerprint {settings['target_fingerprint']})"],
        *([["draft", f"{draft['name']} (weights {draft['digest']})"] for draft in drafts] or [["draft", "none"]]),
        *([["assistant of transformers", assistant]] if assistant else []),
        ["suites (prompts)", _suites(settings)],
        [
            "decoding",
            f"{settings['max_new_tokens']} new tokens at most, seed {settings['seed']}, repeats {settings['repeats']}, "
            f"batch {settings['batch']}, candidates {settings['candidates'] or 'all'}, "
            f"thinking {'on' if settings['thinking'] else 'off'}, min_confidence {settings['min_confidence']} where "
            "used",
        ],
        [
            "device",
            f"{settings['device_name']} ({settings['device']}), {settings['dtype']}, {settings['threads']} threads, "
            f"{packing}",
        ],
    ]


def _server_facts(report: Record) -> list[list[str]]:
    settings, sessions = report["settings"], report["sessions"]
    servers = settings["servers"].items()
    return [
        ["baseline", settings["baseline"]],
        *([f"server {name}", f"{s['url']}, model {s['model']} ({s['engine']})"] for name, s in servers),
        ["suites (prompts)", _suites(settings)],
        ["in flight", ", ".join(map(str, settings["concurrency"]))],
        [
            "decoding",
            f"{settings['max_new_tokens']} new tokens at most, seed {settings['seed']}, repeats "
            f"{settings['repeats']}, thinking {'on' if settings['thinking'] else 'off'}",
        ],
        ["client", sessions[-1]["client"] if sessions else "unknown"],
    ]


def _suites(settings: Record) -> str:
    counts, turns = settings["suites"], settings.get("turns")
    if turns is None:  # an old bench, of first turns alone
        return ", ".join(f"{name} ({count})" for name, count in counts.items()) + "; first turn of each"
    return ", ".join(
        f"{name} ({count})"
        if turns.get(name, count) == count
        else f"{name} ({count} conversations, {turns[name]} turns)"
        for name, count in counts.items()
    )


def _threads(threads: Record) -> str:
    """What decides how a session's threads run."""
    variables = ", ".join(f"{name}={value}" for name, value in threads["environment"].items())
    return (
        f"{threads['num_threads']} threads, {threads['processors']} processors ({variables or 'no OpenMP variables'})"
    )


# Tables of methods.

COST = (
    Column("method", name_of),
    text_column("runs"),
    text_column("tokens"),
    text_column("passes"),
    figure_column("tau", "tau", 3),
    figure_column("c", "cost_ratio", 3),
    number_column("tau / c", "tau_over_cost", 3),
    figure_column("speed-up over none", "speedup_over_none", 3),
    Column(f"within {AGREEMENT:.0%}", lambda entry: VERDICT[entry["agrees"]]),
    number_column("end-to-end tokens/s", "end_to_end_tokens_per_second", 1),
    number_column("over none", "end_to_end_speedup_over_none"),
    number_column("over transformers", "end_to_end_speedup_over_transformers"),
)
SAME_TEXT = (
    Column("method", name_of),
    text_column("compared with", "reference"),
    text_column("texts", "compared"),
    text_column("equal"),
    text_column("part at a near tie", "near_ties"),
    number_column("largest top-two margin where they part", "largest_margin", 6),
)
DIFFERENCES = (
    *SAME_TEXT[:2],
    Column("prompt", lambda d: f"{d['id']}, repeat {d['repeat']}"),
    text_column("tokens before", "position"),
    Column("wrote / reference wrote", lambda d: f"{d['token']} / {d['reference_token']}"),
    Column("target's best two", lambda d: "–" if d["top_tokens"] is None else " / ".join(map(str, d["top_tokens"]))),
    number_column("margin", "margin", 6),
    number_column("rounding", "rounding", 6),
    Column("near tie", lambda d: VERDICT[d["near_tie"]]),
)


def _method_sections(report: Record) -> list[str]:
    parts = []
    for temperature in dict.fromkeys(entry["temperature"] for entry in report["pooled"]):
        parts += _methods_at(report, temperature)
    if report["greedy_equality"]:
        parts += ["## Same text at temperature 0", records_table(SAME_TEXT, report["greedy_equality"])]
        if report["differences"]:
            parts += [
                "Where texts part, and what the target says there: a near tie is a margin of at most twice what "
                "rounding moves a logit on that text (the same tokens read in one pass and one by one).",
                records_table(DIFFERENCES, report["differences"]),
            ]
    if report["acceptance"]:
        parts += ["## Acceptance by number of drafts", _positions(report["acceptance"])]
    if report["breakdown"]:
        parts += ["## Where a cycle goes", *map(_breakdown, report["breakdown"])]
    return parts


def _methods_at(report: Record, temperature: float) -> list[str]:
    baseline, pooled = baseline_of(report, temperature), at(report["pooled"], temperature)
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
    speed = number_column("", "tokens_per_second", 1)
    parts += ["### Decode tokens/s", _by_suite(report, temperature, speed.cell)]
    over_transformers = figure_column("", "speedup_over_transformers")
    if baseline != "transformers" and any(entry["speedup_over_transformers"] is not None for entry in pooled):
        parts += ["### Decode speed-up over `transformers`", _by_suite(report, temperature, over_transformers.cell)]
    return [*parts, "### Cost of a pass, and end to end (all runs together)", records_table(COST, pooled)]


def _by_suite(report: Record, temperature: float, cell: Callable[[Record], str]) -> str:
    """One figure of every method by suite, and its mean."""
    suites = suites_at(report, temperature)
    rows = [
        [name_of(mean), *(cell(entries.get(name_of(mean), {})) for entries in suites.values()), cell(mean)]
        for mean in at(report["mean"], temperature)
    ]
    return table(["method", *suites, "mean"], rows)


def suites_at(report: Record, temperature: float) -> dict[str, dict[str, Record]]:
    """Entries of every suite by method and budget, suites in the paper's order."""
    found = {suite: at(report["suites"][suite], temperature) for suite in in_paper_order(report["suites"])}
    return {suite: {name_of(entry): entry for entry in entries} for suite, entries in found.items()}


def baseline_of(report: Record, temperature: float) -> str:
    """What speed-ups are taken over: `none` if it was measured, else `transformers`."""
    entries = at(report["pooled"], temperature)
    found = (b for b in ("none", "transformers") if any(e[f"speedup_over_{b}"] is not None for e in entries))
    return next(found, "none")


def methods_by_suites(report: Record, temperature: float) -> str:
    """Table 1's layout: methods by suites in their groups, speed-up and tau of each, and their unweighted means."""
    suites, baseline = suites_at(report, temperature), baseline_of(report, temperature)
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    groups, names, kinds = [""], ["**suite**"], ["**method**"]
    for suite in [*suites, None]:
        group = "OVERALL" if suite is None else group_of.get(suite, "OTHER")
        groups += ["" if group in groups else group, ""]
        names += [f"**{suite or 'mean'}**", ""]
        kinds += ["speed-up", "tau"]
    rows = []
    for mean in at(report["mean"], temperature):
        if mean["method"] != baseline:
            entries = [of.get(name_of(mean), {}) for of in suites.values()]
            rows.append([name_of(mean), *(c for e in [*entries, mean] for c in _speedup_and_tau(e, baseline))])
    return table(groups, [names, kinds, *rows])


def suites_by_batch(report: Record, temperature: float) -> str:
    """Table 3's layout: for each suite the baseline's tokens/s, then every method's speed-up by batch size, and tau."""
    baseline = baseline_of(report, temperature)
    rows = []
    for suite, entries in suites_at(report, temperature).items():
        rows.append([f"**{suite}**", "", ""])
        if baseline in entries:
            rows.append([f"{baseline} (tokens/s)", number(entries[baseline]["tokens_per_second"], 1), "–"])
        rows += [
            [name, *_speedup_and_tau(entry, baseline)] for name, entry in entries.items() if entry["method"] != baseline
        ]
    return table(["method", f"batch {report['settings']['batch']}", "tau"], rows)


def head_on_and_off(report: Record, temperature: float) -> str | None:
    """Table 4's layout: mean tau and speed-up without and with the head; None if not both were measured."""
    baseline = baseline_of(report, temperature)
    means = {name_of(mean): mean for mean in at(report["mean"], temperature)}
    rows = []
    for pair in _head_pairs(report, means):
        for name, what in zip(pair, ("without Domino head", "with Domino head"), strict=True):
            speedup, tau = _speedup_and_tau(means[name], baseline)
            rows.append([f"{what}: {name}", tau, speedup])
    return table(["method", "mean tau", "mean speed-up"], rows) if rows else None


def head_by_suites(report: Record, temperature: float) -> list[str]:
    """Table 6's layout, one table for each pair that was measured: the same for every suite."""
    baseline = baseline_of(report, temperature)
    means = {name_of(mean): mean for mean in at(report["mean"], temperature)}
    found = []
    for pair in _head_pairs(report, means):
        rows = []
        for suite, entries in [*suites_at(report, temperature).items(), ("**mean**", means)]:
            cells = [reversed(_speedup_and_tau(entries.get(name, {}), baseline)) for name in pair]
            rows.append([suite, *(cell for two in cells for cell in two)])
        headers = ["suite", *(f"{what}: {kind}" for what in pair for kind in ("tau", "speed-up"))]
        found.append(table(headers, rows))
    return found


def against_reference(report: Record, temperature: float) -> list[str]:
    """Every method beside the reference: ratios of tau by suite, and of tau and speed on average."""
    suites = list(suites_at(report, temperature))
    by_name: dict[tuple[str, str], dict[str | None, Record]] = {}
    for entry in at(report.get("against", []), temperature):
        reference = name_of({"method": entry["reference"], "budget": entry["reference_budget"]})
        by_name.setdefault((name_of(entry), reference), {})[entry["suite"]] = entry
    if not by_name:
        return []
    rows = [
        [
            *names,
            *(with_interval(of.get(suite, {}), "tau_ratio") for suite in [*suites, None]),
            with_interval(of[None], "speed_ratio"),
        ]
        for names, of in by_name.items()
    ]
    return [table(["method", "against", *(f"tau: {suite}" for suite in suites), "tau: mean", "tokens/s: mean"], rows)]


def _speedup_and_tau(entry: Record, baseline: str) -> tuple[str, str]:
    tau = with_interval(entry, "tau") if entry.get("budget") else "–"
    return with_interval(entry, f"speedup_over_{baseline}"), tau


def _head_pairs(report: Record, means: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Names without and with the head, if one draft ran both.

    `dflash` is the same draft only if there was one draft; with several it may be another, trained separately.
    """
    one_draft = len(report["settings"].get("drafts", ["the only one"])) == 1
    pairs = []
    for name, mean in means.items():
        for method in WITHOUT_HEAD.get(mean["method"], ()):
            other = name_of(mean | {"method": method})
            if other in means and (one_draft or method.endswith(HEAD_OFF)):
                pairs.append((other, name))
                break
    return pairs


def _positions(entries: Sequence[Record]) -> str:
    # A tree's budget is far beyond its depth. Columns end where no pass of any method accepted anything.
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
    text = render_breakdown(Breakdown(**{name: entry[name] for name in Breakdown.__dataclass_fields__}))
    if entry["predicted_speedup"] is not None and entry["measured_speedup"] is not None:
        off = entry["measured_speedup"] / entry["predicted_speedup"] - 1
        text += (
            f"\n\nWith the tau of the greedy runs this c predicts a speed-up of {entry['predicted_speedup']:.2f} over "
            f"`none`; measured in them: {entry['measured_speedup']:.2f} ({off:+.1%})."
        )
    return text


# Tables of servers.


def _times(title: str, key: str, digits: int) -> Column:
    """Percentiles of a time in milliseconds."""

    def cell(entry: Record) -> str:
        of = entry[key]
        return "–" if of is None else " / ".join(f"{of[name] * 1000:.{digits}f}" for name in ("p50", "p90", "p99"))

    return Column(title, cell)


def _quoted(text: str) -> str:
    """Text inside a table: on one line, as code."""
    return "(end)" if not text else "`" + text.replace("`", "'").replace("\n", "↵").replace("\r", "") + "`"


LATENCIES = (
    Column("", lambda e: f"{e['suite']}, {e['concurrency']} in flight"),
    text_column("server"),
    text_column("requests"),
    number_column("mean in flight", "in_flight", 1),
    number_column("requests/s", "requests_per_second"),
    _times("first token", "first_token", 1),
    _times("per token", "per_token", 2),
    _times("chunk gap", "chunk_gap", 2),
    _times("latency", "latency", 0),
    number_column("tokens per chunk", "tokens_per_chunk"),
)
SERVER_TEXT = (
    Column("server", lambda e: f"{e['server']}, {e['concurrency']} in flight"),
    Column("compared with", lambda e: f"{e['reference']}, {e['reference_concurrency']} in flight"),
    text_column("texts", "compared"),
    text_column("equal"),
)
SERVER_DIFFERENCES = (
    SERVER_TEXT[0],
    text_column("suite"),
    text_column("prompt", "id"),
    text_column("times"),
    text_column("characters before", "position"),
    Column("goes on with", lambda d: _quoted(d["wrote"])),
    Column("reference goes on with", lambda d: _quoted(d["reference_wrote"])),
)
ERRORS = (
    text_column("server"),
    text_column("suite"),
    text_column("in flight", "concurrency"),
    Column("temperature", lambda e: f"{e['temperature']:g}"),
    text_column("times"),
    text_column("what", "error"),
)


def _server_sections(report: Record) -> list[str]:
    parts = []
    failed = sum(entry["errors"] for entry in report["figures"])
    if failed:
        parts.append(f"**{failed} requests have no answer**: see Errors.")
    for temperature in dict.fromkeys(entry["temperature"] for entry in report["figures"]):
        parts += _servers_at(report, temperature)
    if report["text_equality"]:
        parts += ["## Same text at temperature 0", records_table(SERVER_TEXT, report["text_equality"])]
    if report["differences"]:
        more = len(report["differences"]) - MOST_DIFFERENCES
        parts += [
            "Where texts part. Engines round differently, and so does one engine with other requests beside one: texts "
            "then part where two tokens are nearly as probable. The baseline compared with itself says how often that "
            "is without drafts." + (f" {more} more are in report.json." if more > 0 else ""),
            records_table(SERVER_DIFFERENCES, report["differences"][:MOST_DIFFERENCES]),
        ]
    return parts + (["## Errors", records_table(ERRORS, report["errors"])] if report["errors"] else [])


def _servers_at(report: Record, temperature: float) -> list[str]:
    entries, baseline = at(report["figures"], temperature), report["baseline"]
    servers, levels = list(report["settings"]["servers"]), sorted({entry["concurrency"] for entry in entries})
    suites = [s for s in in_paper_order(report["settings"]["suites"]) if any(entry["suite"] == s for entry in entries)]
    by_place = {(e["suite"], e["server"], e["concurrency"]): e for e in entries}
    rows_of = [*suites, "mean"] if len(suites) > 1 else suites
    by_place |= {("mean", e["server"], e["concurrency"]): e for e in at(report["mean"], temperature)}

    def along(suite: str, server: str) -> list[Record]:
        return [by_place.get((suite, server, level), {}) for level in levels]

    headers = ["suite", "server", *map(str, levels)]
    throughput = [[s, name, *map(_tokens_and_speedup, along(s, name))] for s in rows_of for name in servers]
    parts = [
        f"## Temperature {temperature:g}",
        "### Tokens/s and speed-up by requests in flight (laid out like Table 2 of the paper)",
        table(headers, throughput),
    ]
    if servers != [baseline]:
        speedups = []
        for suite in rows_of:
            speeds = [number(entry.get("tokens_per_second"), 1) for entry in along(suite, baseline)]
            speedups += [[f"**{suite}**", *("" for _ in levels), ""], [f"{baseline} (tokens/s)", *speeds, "–"]]
            for name in servers:
                if name != baseline:
                    lengths = [
                        e["acceptance_length"] for e in along(suite, name) if e.get("acceptance_length") is not None
                    ]
                    tau = number(sum(lengths) / len(lengths) if lengths else None)
                    speedups.append([name, *(with_interval(entry, "speedup") for entry in along(suite, name)), tau])
        parts += [
            f"### Speed-up over `{baseline}` and tau (laid out like Table 3)",
            table(["server", *map(str, levels), "mean tau"], speedups),
        ]
    taus = []
    for suite, name in ((s, name) for s in suites for name in servers):
        sources = dict.fromkeys(e["acceptance_source"] for e in along(suite, name) if e)
        if sources:
            cells = [number(entry.get("acceptance_length")) for entry in along(suite, name)]
            taus.append([suite, name, *cells, "; ".join(sources)])
    latencies = sorted(entries, key=lambda e: (suites.index(e["suite"]), e["concurrency"]))
    return [
        *parts,
        "### tau, as the engines report it",
        table([*headers, "source"], taus),
        "### Latencies",
        "Milliseconds, p50 / p90 / p99:\n\n" + records_table(LATENCIES, latencies),
    ]


def _tokens_and_speedup(entry: Record) -> str:
    beside = "" if entry.get("speedup") is None else f" ({entry['speedup']:.2f}x)"
    return number(entry.get("tokens_per_second"), 1) + beside


# What the figures mean, for the end of report.md.

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
SERVER_DEFINITIONS = f"""\
- **Window**: one suite at one server with so many requests in flight (a closed loop: the next one is sent when one has
  ended). The suite is gone through as often as it takes to have at least two requests per request in flight. Where the
  last answers run out the server has fewer, so the mean number **in flight** stands beside.
- **tokens/s**: completion tokens of all answers, as the server's usage counts them, over the seconds of the window,
  from its first request to the end of its last answer. Prefill, queueing and the network are all in it.
- **Speed-up**: tokens/s over those of the baseline server at the same suite, temperature and number in flight.
- **First token** (TTFT): from sending a request to the first chunk with text. A server that keeps the prefixes of
  earlier requests has seen a suite's prompts by then.
- **Per token** (inter-token latency, TPOT): of each answer, the time from its first chunk with text to the chunk that
  ends it, over its tokens after the first. Where the first chunk holds several tokens it says a little too little.
- **Chunk gap**: from one chunk with text to the next. A verify pass sends several tokens at once, so this is how long a
  reader waits, while **per token** is how fast the text grows.
- **Latency**: from sending a request to the end of its answer. A request that was refused with 429 is sent again after
  the time that the server names ({LONGEST_WAIT:.0f} s at most); its waiting counts in tokens/s, not in the latencies.
- **tau**: the acceptance length (mean of accepted drafts + 1 over verify passes) as the engine itself reports it; its
  source is named. vLLM counts only passes that had drafts.
- Percentiles p50, p90, p99 are over answers (chunk gaps: over all gaps of all answers).
- In brackets behind a figure: its {LEVEL:.0%} interval over prompts. Whole conversations are drawn anew within their
  suite, {RESAMPLES:,} times with a fixed seed, each with the share of its window's seconds for which it was in flight;
  a speed-up is taken on the same draw for both servers. A suite with one prompt has no interval.
- **Turns**: a later turn's prompt holds the baseline server's own greedy answers to the turns before it, the same for
  every server (`earlier_answers.jsonl`).
- Figures come from `raw.jsonl` alone: `kind` is `request` (one answer) or `window` (its end, and what the engine's
  metrics said before and after). Requests of windows that were interrupted are kept there and not counted."""
