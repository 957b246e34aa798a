"""Tables of a report that are laid out like those of the paper, so that the two can be laid side by side.

What stands in them is measured here; the paper's own figures are not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from domino_spec.bench.cells import Record, name_of, number, table, with_interval

GROUPS = {
    "MATH": ("gsm8k", "math500", "aime25"),
    "CODE": ("humaneval", "mbpp", "livecodebench"),
    "CHAT": ("mt-bench", "alpaca"),
}
"""The paper's suites, in its order; other suites stand behind them as they were given."""
OTHERS = "OTHER"
WITHOUT_HEAD = {
    "domino": ("domino-head-off", "dflash"),
    "domino-tree": ("domino-tree-head-off", "dflash-tree"),
}
"""The same draft with its head off, for each method that uses the head."""
HEAD_OFF = "-head-off"


def at(entries: Sequence[Record], temperature: float) -> list[Record]:
    """The entries of one temperature."""
    return [entry for entry in entries if entry["temperature"] == temperature]


def suites_at(report: Record, temperature: float) -> dict[str, dict[str, Record]]:
    """Entries of every suite by method and budget, suites in the paper's order."""
    known = [name for names in GROUPS.values() for name in names]
    order = [*(name for name in known if name in report["suites"]), *(n for n in report["suites"] if n not in known)]
    return {suite: {name_of(entry): entry for entry in at(report["suites"][suite], temperature)} for suite in order}


def baseline_of(report: Record, temperature: float) -> str:
    """What speed-ups are taken over: `none` where it was measured, else `transformers`."""
    entries = at(report["pooled"], temperature)
    found = (b for b in ("none", "transformers") if any(e[f"speedup_over_{b}"] is not None for e in entries))
    return next(found, "none")


def methods_by_suites(report: Record, temperature: float) -> str:
    """Table 1's layout: methods by suites in their groups, speed-up and tau of each, and their unweighted means."""
    suites, baseline = suites_at(report, temperature), baseline_of(report, temperature)
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    groups, names, kinds = [""], ["**suite**"], ["**method**"]
    for suite in [*suites, None]:
        group = "OVERALL" if suite is None else group_of.get(suite, OTHERS)
        groups += ["" if group in groups else group, ""]
        names += [f"**{suite or 'mean'}**", ""]
        kinds += ["speed-up", "tau"]
    rows = []
    for mean in at(report["mean"], temperature):
        if mean["method"] == baseline:
            continue
        entries = [of.get(name_of(mean), {}) for of in suites.values()]
        cells = [cell for entry in [*entries, mean] for cell in _speedup_and_tau(entry, baseline)]
        rows.append([name_of(mean), *cells])
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
    """Table 4's layout: mean tau and speed-up without and with the head; None where not both were measured."""
    baseline = baseline_of(report, temperature)
    means = {name_of(mean): mean for mean in at(report["mean"], temperature)}
    rows = []
    for without, with_head in _head_pairs(report, means):
        for name, what in ((without, "without Domino head"), (with_head, "with Domino head")):
            speedup, tau = _speedup_and_tau(means[name], baseline)
            rows.append([f"{what}: {name}", tau, speedup])
    return table(["method", "mean tau", "mean speed-up"], rows) if rows else None


def head_by_suites(report: Record, temperature: float) -> list[str]:
    """Table 6's layout, one table for each pair that was measured: the same for every suite."""
    baseline = baseline_of(report, temperature)
    means = {name_of(mean): mean for mean in at(report["mean"], temperature)}
    found = []
    for pair in _head_pairs(report, means):
        lines = [*suites_at(report, temperature).items(), ("**mean**", means)]
        rows = []
        for suite, entries in lines:
            cells = [reversed(_speedup_and_tau(entries.get(name, {}), baseline)) for name in pair]
            rows.append([suite, *(cell for two in cells for cell in two)])
        headers = ["suite", *(f"{what}: {kind}" for what in pair for kind in ("tau", "speed-up"))]
        found.append(table(headers, rows))
    return found


def against_reference(report: Record, temperature: float) -> list[str]:
    """Every method beside the reference: ratios of tau by suite, and of tau and speed on average."""
    entries = at(report.get("against", []), temperature)
    suites = list(suites_at(report, temperature))
    by_name: dict[tuple[str, str], dict[str | None, Record]] = {}
    for entry in entries:
        reference = name_of({"method": entry["reference"], "budget": entry["reference_budget"]})
        by_name.setdefault((name_of(entry), reference), {})[entry["suite"]] = entry
    if not by_name:
        return []
    rows = [
        [
            name,
            reference,
            *(with_interval(of.get(suite, {}), "tau_ratio") for suite in [*suites, None]),
            with_interval(of[None], "speed_ratio"),
        ]
        for (name, reference), of in by_name.items()
    ]
    return [table(["method", "against", *(f"tau: {suite}" for suite in suites), "tau: mean", "tokens/s: mean"], rows)]


def _speedup_and_tau(entry: Mapping[str, object], baseline: str) -> tuple[str, str]:
    entry = dict(entry)
    tau = with_interval(entry, "tau") if entry.get("budget") else "–"
    return with_interval(entry, f"speedup_over_{baseline}"), tau


def _head_pairs(report: Record, means: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Names without and with the head, where one draft ran both.

    `dflash` is the same draft only where there was one draft; with several it may be another, of its own training.
    """
    settings = report["settings"]
    one_draft = len(settings["drafts"]) == 1 if "drafts" in settings else True
    pairs = []
    for name, mean in means.items():
        for method in WITHOUT_HEAD.get(mean["method"], ()):
            other = name_of(mean | {"method": method})
            if other in means and (one_draft or method.endswith(HEAD_OFF)):
                pairs.append((other, name))
                break
    return pairs
