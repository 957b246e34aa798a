"""Two finished benches side by side, from their raw rows: what changed between two drafts, commits or machines.

Only what both measured is compared: the same contender on the same prompts. Ratios are B over A, with intervals from
the same resamples of the prompts for both (`figures`), so that what makes a prompt easy for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domino_spec.bench.figures import Draws, Record, contender_of, contenders_of, draws_of, measured, with_intervals
from domino_spec.bench.page import (
    Column,
    facts_table,
    name_of,
    number,
    number_column,
    records_table,
    text_column,
    with_interval,
)
from domino_spec.bench.rows import RAW_FILE, SETTINGS_FILE, Contender, Row, RunKey, read_rows
from domino_spec.files import atomic_path, read_json, write_json
from domino_spec.settings import UserError

COMPARISON_FILE, MARKDOWN_FILE = "comparison.json", "comparison.md"
DERIVED = ("planned_runs", "limit")
"""Settings that follow from the numbers of prompts, methods and repeats, which are compared by themselves."""


def compare_runs(a: Path, b: Path) -> Record:
    """Everything that two bench directories have in common, as one object for JSON.

    Args:
        a: a directory that a bench wrote, finished or not.
        b: another one.

    Returns:
        `a` and `b` (their names), `differing_settings` (name to both values), `only_in_a` and `only_in_b` (contenders
        and suites that the other lacks), `suites` (an entry of `_compared` for every common contender, by suite) and
        `pooled`.

    Raises:
        UserError: one of them is no bench directory, or they have nothing in common.
    """
    rows_a, rows_b = _rows(a), _rows(b)
    cases = {_case(row) for row in rows_a} & {_case(row) for row in rows_b}
    if not cases:
        raise UserError(
            f"{a} and {b} have no run in common, that is the same prompt, method, budget and temperature: "
            f"the first has {_contents(rows_a)}; the second has {_contents(rows_b)}"
        )
    common = [row for row in rows_a if _case(row) in cases]
    sides = _of_conversations(rows_a, common), _of_conversations(rows_b, common)
    draws = draws_of(common)
    suites = {
        suite: [
            _compared(suite, contender, cases, sides, draws)
            for contender in contenders_of([row for row in common if row.suite == suite])
        ]
        for suite in dict.fromkeys(row.suite for row in common)
    }
    return {
        "a": str(a),
        "b": str(b),
        "differing_settings": _differing_settings(a, b),
        "only_in_a": _only_in(rows_a, rows_b),
        "only_in_b": _only_in(rows_b, rows_a),
        "suites": suites,
        "pooled": [_compared(None, contender, cases, sides, draws) for contender in contenders_of(common)],
    }


def write_comparison(comparison: Record, out: Path) -> Path:
    """Write comparison.json and comparison.md into a directory; returns the path of the latter.

    Raises:
        UserError: a file cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a directory")
    write_json(comparison, out / COMPARISON_FILE)
    with atomic_path(out / MARKDOWN_FILE) as scratch:
        scratch.write_text(render_comparison(comparison), encoding="utf-8")
    return out / MARKDOWN_FILE


def render_comparison(comparison: Record) -> str:
    """A comparison as Markdown.

    Args:
        comparison: what `compare_runs` returned.
    """
    parts = ["# Two benches side by side", f"A is `{comparison['a']}`, B is `{comparison['b']}`."]
    if comparison["differing_settings"]:
        rows = [[name, _shown(a), _shown(b)] for name, (a, b) in comparison["differing_settings"].items()]
        parts += ["## What they were measured with, where it differs", facts_table(rows, ["", "A", "B"])]
    else:
        parts.append("Both were measured with the same settings, commit and versions.")
    parts += ["## All common runs together", EXPLANATION, _table(comparison["pooled"])]
    if len(comparison["suites"]) > 1:
        for suite, entries in comparison["suites"].items():
            parts += [f"## {suite}", _table(entries)]
    parts += [
        f"Only in {side.upper()}: {', '.join(comparison[f'only_in_{side}'])}."
        for side in ("a", "b")
        if comparison[f"only_in_{side}"]
    ]
    return "\n\n".join(parts) + "\n"


EXPLANATION = """\
Ratios are B / A, with 95% intervals over the prompts that both have; in bold where the interval leaves out 1.

**Tokens/s of two sessions or machines do not compare: load, clocks and versions move them. Only each run's speed-up
over its own `none`, measured beside it, does.**"""


def _ratio(entry: Record, key: str) -> str:
    """A ratio with its interval, in bold if the interval leaves out 1."""
    text, interval = with_interval(entry, key, 3), entry[f"{key}_interval"]
    return text if interval is None or interval[0] <= 1 <= interval[1] else f"**{text}**"


COLUMNS = (
    text_column("prompts", "conversations"),
    Column("tau A", lambda e: number(e["tau_a"] if e["budget"] else None)),
    Column("tau B", lambda e: number(e["tau_b"] if e["budget"] else None)),
    Column("tau B / A", lambda e: _ratio(e, "tau_ratio") if e["budget"] else "–"),
    number_column("tokens/s A", "tokens_per_second_a", 1),
    number_column("tokens/s B", "tokens_per_second_b", 1),
    number_column("speed-up A", "speedup_over_none_a"),
    number_column("speed-up B", "speedup_over_none_b"),
    Column("speed-up B / A", lambda e: "–" if e["method"] == "none" else _ratio(e, "speedup_ratio")),
    Column("equal greedy texts", lambda e: f"{e['equal_texts']} of {e['texts']}" if e["texts"] else "–"),
)


def _table(entries: Sequence[Record]) -> str:
    greedy = {entry["temperature"] for entry in entries} == {0.0}
    method = Column("method", lambda e: name_of(e) + ("" if greedy else f", T = {e['temperature']:g}"))
    return records_table([method, *COLUMNS], entries)


def _rows(out: Path) -> list[Row]:
    if not (out / RAW_FILE).is_file() or not (out / SETTINGS_FILE).is_file():
        raise UserError(
            f"{out} is no bench directory: {RAW_FILE} and {SETTINGS_FILE} of domino-spec bench are not in it"
        )
    rows = read_rows(out)
    if not rows:
        raise UserError(f"{out} holds no measurements")
    return rows


def _case(row: Row) -> RunKey:
    """What is paired: a run whatever its repeat."""
    return row.key._replace(repeat=0)


def _of_conversations(rows: Sequence[Row], common: Sequence[Row]) -> list[Row]:
    """A run's rows on the common conversations, those of a `none` that the other run lacks included."""
    conversations = {(row.suite, row.conversation) for row in common}
    return [row for row in rows if (row.suite, row.conversation) in conversations]


def _compared(
    suite: str | None, contender: Contender, cases: set[RunKey], sides: tuple[list[Row], list[Row]], draws: Draws
) -> Record:
    """One contender in both runs, on the prompts that both have; `suite` None for all suites together.

    Each speed-up is over the `none` of the same run; None if that has none. `texts` counts greedy texts that both
    wrote for the same prompt, turn and repeat.
    """
    runs: list[list[Row]] = []
    samples = []
    for rows in sides:
        runs.append(
            [r for r in rows if contender_of(r) == contender and _case(r) in cases and suite in (None, r.suite)]
        )
        baseline = [] if contender.method == "none" else [row for row in rows if row.method == "none"]
        samples.append(measured([*runs[-1], *baseline], contender, draws).samples)
    a, b = samples
    written = {row.key: row.token_ids for row in runs[0] if contender.temperature == 0}
    equal = [written[row.key] == row.token_ids for row in runs[1] if row.key in written]
    return {
        "suite": suite,
        **contender._asdict(),
        "conversations": len({(row.suite, row.conversation) for row in runs[0]}),
        **{
            f"{name}_{side}": of[name].value
            for name in ("tau", "tokens_per_second", "speedup_over_none")
            for side, of in (("a", a), ("b", b))
        },
        **with_intervals(
            {
                "tau_ratio": b["tau"] / a["tau"],
                "speedup_ratio": b["speedup_over_none"] / a["speedup_over_none"],
            }
        ),
        "texts": len(equal),
        "equal_texts": sum(equal),
    }


def _differing_settings(a: Path, b: Path) -> dict[str, list[Any]]:
    """Settings by name with both values, then commits and versions of packages."""
    held = [_settings(read_json(out / SETTINGS_FILE)) for out in (a, b)]
    found = {name: [settings.get(name) for settings in held] for name in held[0] | held[1] if name not in DERIVED}
    differing = {name: values for name, values in found.items() if values[0] != values[1]}
    if "suites" in differing:  # these follow from the suites
        differing = {name: values for name, values in differing.items() if name not in ("prompts_digest", "turns")}
    return differing


def _settings(stored: Mapping[str, Any]) -> Record:
    settings = dict(stored["configuration"])
    for session in stored["sessions"]:
        measured_with = {"commit": session["commit"], **session["versions"]}
        for name, value in measured_with.items():
            known = settings.setdefault(name, value)
            if known != value and str(value) not in str(known).split(", "):
                settings[name] = f"{known}, {value}"
    return settings


def _only_in(rows: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Contenders, and suites, that the other run lacks."""
    contenders, suites = set(contenders_of(others)), {row.suite for row in others}
    lacking = [_named(c) for c in contenders_of(rows) if c not in contenders]
    return lacking + [f"suite {suite}" for suite in dict.fromkeys(row.suite for row in rows) if suite not in suites]


def _named(contender: Contender) -> str:
    return f"{name_of(contender._asdict())} at temperature {contender.temperature:g}"


def _contents(rows: Sequence[Row]) -> str:
    suites = ", ".join(dict.fromkeys(row.suite for row in rows))
    return f"{', '.join(map(_named, contenders_of(rows)))} on {suites}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)
