"""report.md of a bench of servers: its tables for people, made from what report.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from domino_spec.bench.cells import Record, number, table, with_interval
from domino_spec.bench.intervals import LEVEL, RESAMPLES
from domino_spec.bench.server.load import LONGEST_WAIT
from domino_spec.bench.tables import GROUPS, at

MOST_DIFFERENCES = 40
"""Lines of texts that part in report.md; report.json has all."""

DEFINITIONS = f"""\
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


def render(report: Record, plots: Sequence[str] = ()) -> str:
    """A report as Markdown.

    Args:
        report: what `report.build_report` returned.
        plots: file names of images to show.
    """
    parts = ["# Serving benchmark report"]
    if report["measured_windows"] < report["settings"]["planned_windows"]:
        parts.append(
            f"**Unfinished: {report['measured_windows']} of {report['settings']['planned_windows']} windows are "
            "measured.** Repeat the command to go on."
        )
    parts.append(_provenance(report))
    failed = sum(entry["errors"] for entry in report["figures"])
    if failed:
        parts.append(f"**{failed} requests have no answer**: see Errors.")
    for temperature in dict.fromkeys(entry["temperature"] for entry in report["figures"]):
        parts += _at_temperature(report, temperature)
    parts += _same_text(report)
    parts += _errors(report)
    if plots:
        parts += ["## Plots", *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots)]
    return "\n\n".join([*parts, "## Definitions", DEFINITIONS]) + "\n"


def _provenance(report: Record) -> str:
    settings, sessions = report["settings"], report["sessions"]
    turns = settings["turns"]
    suites = ", ".join(
        f"{name} ({count})" if turns[name] == count else f"{name} ({count} conversations, {turns[name]} turns)"
        for name, count in settings["suites"].items()
    )
    lines = [
        ["baseline", settings["baseline"]],
        *([f"server {name}", f"{s['url']}, model {s['model']} ({s['engine']})"] for name, s in _servers(settings)),
        ["suites (prompts)", suites],
        ["in flight", ", ".join(map(str, settings["concurrency"]))],
        [
            "decoding",
            f"{settings['max_new_tokens']} new tokens at most, seed {settings['seed']}, repeats "
            f"{settings['repeats']}, thinking {'on' if settings['thinking'] else 'off'}",
        ],
        ["client", sessions[-1]["client"] if sessions else "unknown"],
    ]
    for session in sessions:
        found = ", ".join(f"{package} {version}" for package, version in session["versions"].items())
        engines = ", ".join(f"{name}: {what}" for name, what in session["servers"].items())
        lines += [
            [f"from window {session['rows_before'] + 1}", f"`{session['command']}`"],
            ["", f"{session['started']}, commit {session['commit'] or 'unknown'}, load {session['load_average']}"],
            ["", f"{engines}; client: {found}"],
        ]
    text = table(["", ""], lines).replace("---:", "---")
    if len({(session["commit"], str(session["servers"])) for session in sessions}) > 1:
        text += "\n\n**Measured in sessions of different commits or engines: compare with care.**"
    unasked = [name for name, s in _servers(settings) if not s["takes_template_settings"]]
    if unasked:
        text += (
            f"\n\n**{', '.join(unasked)} cannot be told whether to think** (`chat_template_kwargs` is refused): its "
            "answers are as its chat template has them."
        )
    return text


def _servers(settings: Record) -> Iterable[tuple[str, Record]]:
    return settings["servers"].items()


def order_of_suites(report: Record) -> list[str]:
    """The paper's suites in its order, then others as they were given."""
    known, given = [name for names in GROUPS.values() for name in names], list(report["settings"]["suites"])
    return [*(name for name in known if name in given), *(name for name in given if name not in known)]


def _at_temperature(report: Record, temperature: float) -> list[str]:
    entries, means = at(report["figures"], temperature), at(report["mean"], temperature)
    levels = sorted({entry["concurrency"] for entry in entries})
    suites = [suite for suite in order_of_suites(report) if any(entry["suite"] == suite for entry in entries)]
    by_place = {(e["suite"], e["server"], e["concurrency"]): e for e in entries}
    if len(suites) > 1:
        by_place |= {("mean", e["server"], e["concurrency"]): e for e in means}
        suites = [*suites, "mean"]
    parts = [
        f"## Temperature {temperature:g}",
        "### Tokens/s and speed-up by requests in flight (laid out like Table 2 of the paper)",
        _throughput(report, suites, levels, by_place),
    ]
    if any(name != report["baseline"] for name, _ in _servers(report["settings"])):
        parts += [
            f"### Speed-up over `{report['baseline']}` and tau (laid out like Table 3)",
            _speedups(report, suites, levels, by_place),
        ]
    return [*parts, *_acceptance(report, suites, levels, by_place), "### Latencies", _latencies(entries, suites)]


_ByPlace = dict[tuple[str, str, int], Record]


def _throughput(report: Record, suites: Sequence[str], levels: Sequence[int], by_place: _ByPlace) -> str:
    rows = []
    for suite in suites:
        for name, _ in _servers(report["settings"]):
            cells = []
            for level in levels:
                entry = by_place.get((suite, name, level), {})
                speedup = entry.get("speedup")
                beside = "" if speedup is None else f" ({speedup:.2f}x)"
                cells.append(number(entry.get("tokens_per_second"), 1) + beside)
            rows.append([suite, name, *cells])
    return table(["suite", "server", *map(str, levels)], rows)


def _speedups(report: Record, suites: Sequence[str], levels: Sequence[int], by_place: _ByPlace) -> str:
    baseline, rows = report["baseline"], []
    for suite in suites:
        rows.append([f"**{suite}**", *("" for _ in levels), ""])
        speeds = [number(by_place.get((suite, baseline, level), {}).get("tokens_per_second"), 1) for level in levels]
        rows.append([f"{baseline} (tokens/s)", *speeds, "–"])
        for name, _ in _servers(report["settings"]):
            if name == baseline:
                continue
            entries = [by_place.get((suite, name, level), {}) for level in levels]
            lengths = [entry["acceptance_length"] for entry in entries if entry.get("acceptance_length") is not None]
            tau = sum(lengths) / len(lengths) if lengths else None
            rows.append([name, *(with_interval(entry, "speedup") for entry in entries), number(tau)])
    return table(["server", *map(str, levels), "mean tau"], rows)


def _acceptance(report: Record, suites: Sequence[str], levels: Sequence[int], by_place: _ByPlace) -> list[str]:
    rows = []
    for suite in suites:
        for name, _ in _servers(report["settings"]):
            entries = [by_place.get((suite, name, level), {}) for level in levels]
            sources = dict.fromkeys(entry["acceptance_source"] for entry in entries if "acceptance_source" in entry)
            if sources:  # means have none of their own
                cells = [number(entry.get("acceptance_length")) for entry in entries]
                rows.append([suite, name, *cells, "; ".join(sources)])
    return [
        "### tau, as the engines report it",
        table(["suite", "server", *map(str, levels), "source"], rows),
    ]


def _latencies(entries: Sequence[Record], suites: Sequence[str]) -> str:
    rows = [
        [
            f"{e['suite']}, {e['concurrency']} in flight",
            e["server"],
            str(e["requests"]),
            number(e["in_flight"], 1),
            number(e["requests_per_second"]),
            _spread(e["first_token"], 1),
            _spread(e["per_token"], 2),
            _spread(e["chunk_gap"], 2),
            _spread(e["latency"], 0),
            number(e["tokens_per_chunk"]),
        ]
        for suite in suites
        for e in sorted((e for e in entries if e["suite"] == suite), key=lambda e: e["concurrency"])
    ]
    headers = ["", "server", "requests", "mean in flight", "requests/s", "first token", "per token", "chunk gap"]
    return "Milliseconds, p50 / p90 / p99:\n\n" + table([*headers, "latency", "tokens per chunk"], rows)


def _spread(of: Record | None, digits: int) -> str:
    if of is None:
        return "–"
    return " / ".join(f"{of[name] * 1000:.{digits}f}" for name in ("p50", "p90", "p99"))


def _same_text(report: Record) -> list[str]:
    if not report["text_equality"]:
        return []
    rows = [
        [
            f"{e['server']}, {e['concurrency']} in flight",
            f"{e['reference']}, {e['reference_concurrency']} in flight",
            str(e["compared"]),
            str(e["equal"]),
        ]
        for e in report["text_equality"]
    ]
    parts = ["## Same text at temperature 0", table(["server", "compared with", "texts", "equal"], rows)]
    if report["differences"]:
        shown = report["differences"][:MOST_DIFFERENCES]
        more = len(report["differences"]) - len(shown)
        details = [
            [
                f"{d['server']}, {d['concurrency']} in flight",
                d["suite"],
                d["id"],
                str(d["times"]),
                str(d["position"]),
                _quoted(d["wrote"]),
                _quoted(d["reference_wrote"]),
            ]
            for d in shown
        ]
        headers = ["server", "suite", "prompt", "times", "characters before", "goes on with", "reference goes on with"]
        parts += [
            "Where texts part. Engines round differently, and so does one engine with other requests beside one: texts "
            "then part where two tokens are nearly as probable. The baseline compared with itself says how often that "
            "is without drafts." + (f" {more} more are in report.json." if more else ""),
            table(headers, details),
        ]
    return parts


def _quoted(text: str) -> str:
    """Text inside a table: on one line, and as it is."""
    return "(end)" if not text else "`" + text.replace("`", "'").replace("\n", "↵").replace("\r", "") + "`"


def _errors(report: Record) -> list[str]:
    if not report["errors"]:
        return []
    rows = [
        [e["server"], e["suite"], str(e["concurrency"]), f"{e['temperature']:g}", str(e["times"]), e["error"]]
        for e in report["errors"]
    ]
    return ["## Errors", table(["server", "suite", "in flight", "temperature", "times", "what"], rows)]
