"""Tables of simulated tau: what was measured, kept on disk, with paired intervals and ratios to one method.

`training.evaluate.simulate` measures; `benchmarks/simulated_tau.py` is the command.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from pathlib import Path
from typing import Any

import torch

from domino_spec.bench.figures import Cluster, Draws, Record, Samples, Sums, mean_of, with_intervals
from domino_spec.bench.page import number, table, with_interval
from domino_spec.files import atomic_path, read_jsonl
from domino_spec.settings import UserError
from domino_spec.training.data import conversation_id
from domino_spec.training.evaluate import Simulated


def save_simulated(simulated: Simulated, ids: SequenceType[str], settings: Mapping[str, Any], path: Path) -> None:
    """Write JSON lines, atomically: the settings, then a line per answer.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps({"settings": settings})]
    for id_, *parts in zip(ids, simulated.anchors, simulated.accepted, simulated.proposed, strict=True):
        values = dict(zip(("anchors", "accepted", "proposed"), (part.tolist() for part in parts), strict=True))
        lines.append(json.dumps({"id": id_, **values}))
    with atomic_path(path) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_simulated(ids: SequenceType[str], settings: Mapping[str, Any], path: Path) -> Simulated | None:
    """What `save_simulated` wrote, or None if there is no such file.

    Raises:
        UserError: it was measured with other settings or on other answers, or cannot be read.
    """
    if not path.exists():
        return None
    head, *rows = read_jsonl(path, {})
    held = head.get("settings")
    wanted = json.loads(json.dumps(settings))
    if held != wanted or [row.get("id") for row in rows] != list(ids):
        names = sorted(k for k in wanted | held if wanted.get(k) != held.get(k)) if isinstance(held, dict) else []
        raise UserError(f"{path} was measured with other {', '.join(names) or 'answers'}: give another --out")
    parts = (
        [torch.tensor(row[name], dtype=torch.long) for row in rows] for name in ("anchors", "accepted", "proposed")
    )
    return Simulated(*parts)


def suite_of(id_: str) -> str:
    """gsm8k of gsm8k/17."""
    return id_.split("/")[0]


def summarize(results: Mapping[str, Simulated], ids: SequenceType[str], reference: str) -> list[Record]:
    """tau of every method, and its ratio to one of them on the same resamples of the answers (see `figures`).

    Args:
        results: by method, all on the same answers.
        ids: of the answers; the part before the first slash is the suite.
        reference: the method that ratios are to.

    Returns:
        An entry for each method: `method`, `answers` and `anchors` counted, `drafts` per proposal, and under `suites`
        (by name), `mean` (of the suites, unweighted) and `pooled` (all anchors alike) each `tau`, its `ratio` to the
        reference's, and `tau_interval` and `ratio_interval`, 95%.

    Raises:
        UserError: the reference was not measured, or no answer has an anchor.
        ValueError: methods were measured on different answers.
    """
    if reference not in results:
        raise UserError(f"the reference {reference} was not measured; measured are {', '.join(results)}")
    used = [i for i, anchors in enumerate(results[reference].anchors) if len(anchors)]
    if not used:
        raise UserError("every answer is too short for an anchor: lower the horizon")
    clusters = {i: (suite_of(ids[i]), conversation_id(ids[i])) for i in used}
    draws = Draws.of(clusters.values())
    taus = {}
    for method, result in results.items():
        if [i for i, anchors in enumerate(result.anchors) if len(anchors)] != used:
            raise ValueError(f"{method} and {reference} must be measured on the same answers")
        taus[method] = _taus(result, clusters, draws)
    entries = []
    for method, (suites, mean, pooled) in taus.items():
        other_suites, other_mean, other_pooled = taus[reference]
        proposed = torch.cat(results[method].proposed)
        entries.append(
            {
                "method": method,
                "answers": len(used),
                "anchors": len(proposed),
                "drafts": proposed.double().mean().item(),
                "suites": {
                    name: with_intervals({"tau": tau, "ratio": tau / other_suites[name]})
                    for name, tau in suites.items()
                },
                "mean": with_intervals({"tau": mean, "ratio": mean / other_mean}),
                "pooled": with_intervals({"tau": pooled, "ratio": pooled / other_pooled}),
            }
        )
    return entries


def _taus(
    result: Simulated, clusters: Mapping[int, Cluster], draws: Draws
) -> tuple[dict[str, Samples], Samples, Samples]:
    """By suite, their mean, and over all anchors."""
    amounts: dict[str, list[tuple[Cluster, tuple[float, float]]]] = defaultdict(list)
    for i, cluster in clusters.items():
        lengths = result.accepted[i] + 1
        amounts[cluster[0]].append((cluster, (float(lengths.sum()), float(len(lengths)))))

    def tau(part: list[tuple[Cluster, tuple[float, float]]]) -> Samples:
        return Sums(("lengths", "anchors"), part, draws).ratio("lengths", "anchors")

    suites = {name: tau(part) for name, part in amounts.items()}
    return suites, mean_of(list(suites.values())), tau([a for part in amounts.values() for a in part])


def render(entries: SequenceType[Record], reference: str) -> str:
    """What `summarize` returned, as Markdown."""
    suites = list(entries[0]["suites"])
    headers = [*suites, "mean of suites", "all anchors"]

    def cells(entry: Record, figure: str, digits: int) -> list[str]:
        values = [number(entry["suites"][name][figure], digits) for name in suites]
        return [*values, *(with_interval(entry[part], figure, digits) for part in ("mean", "pooled"))]

    taus = [[e["method"], f"{e['drafts']:.1f}", str(e["anchors"]), *cells(e, "tau", 2)] for e in entries]
    return "\n\n".join(
        (
            f"tau on {entries[0]['answers']} answers; in brackets 95% over conversations:",
            table(["method", "drafts", "anchors", *headers], taus),
            f"tau over that of {reference}, on the same resamples:",
            table(["method", *headers], [[e["method"], *cells(e, "ratio", 3)] for e in entries]),
        )
    )
