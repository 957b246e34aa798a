"""The figures of a report, computed from raw rows alone, with confidence intervals over prompts.

Figures are records: dicts with the keys of report.json. Each is a ratio of sums over runs, turns and repeats included
(docs/design.md, section 3). Of methods (`figures`, `means`):

    tau                      mean of `acceptance_lengths` over all passes, before stop and length cuts
    tokens_per_second        tokens that decoding produced / seconds of decoding, without prefill
    end_to_end_...           the same with all tokens, and prefill in the seconds
    speedup_over_BASELINE    seconds per token of the baseline / those of the method, on the same runs
    cost_ratio               c: seconds per pass / seconds per pass (one token) of `none`, on the same runs
    tau_over_cost, agrees    the speed-up that tau and c predict; whether the measured one is within `AGREEMENT` of it

Of servers (`server_figures`, `server_means`):

    tokens_per_second        completion tokens of all answers / seconds of their windows
    speedup                  tokens per second of a server / those of the baseline at the same place
    in_flight                seconds of all requests / seconds of the windows: their mean number (Little's law)
    first_token              seconds to the first chunk with text (TTFT)
    per_token                of each answer, seconds from the first to the last token / tokens after the first
    chunk_gap                seconds between one chunk with text and the next, over all answers
    latency                  seconds from sending a request to the end of its answer
    acceptance_length        tau as the engine reports it, by `acceptance_source`

`..._interval` holds the ends of a 95% interval: a stratified cluster bootstrap. The turns and repeats of one
conversation are alike, so whole conversations are drawn with replacement, within each suite. All methods and baselines
are computed on the same draws, so what makes a prompt easy for both sides cancels out of a ratio. It is None if a suite
has only one conversation.

Percentiles of few resampled prompts lie too close together: too narrow by sqrt((n - 1) / n), and blind to how little n
prompts say about their spread. Their tails are therefore moved outwards as Student's t has them for that many prompts
(Hesterberg 2015, "What teachers should know about the bootstrap", section 3: expanded percentiles). With five prompts a
suite or fewer the interval is about the range of single prompts, and covers less than 95%.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domino_spec.bench.rows import Contender, Measured, RequestRow, Row, WindowRow
from domino_spec.bench.server.metrics import acceptance as server_acceptance

LEVEL = 0.95
RESAMPLES = 4000
AGREEMENT = 0.05
"""Largest accepted deviation of the speed-up from tau / c, as a share: length and stop cut the last pass short."""

Record = dict[str, Any]
"""An entry of report.json."""
Cluster = tuple[str, str]
"""Suite and conversation."""
Bounds = tuple[float, float]
"""Lower and upper end of an interval."""


@dataclass(frozen=True)
class Samples:
    """A figure as measured, and on every resample of the prompts."""

    values: Tensor
    """[1 + resamples] float64, the measured one first; not finite if a draw leaves nothing to divide by."""
    clusters: frozenset[Cluster]
    """Conversations that it was measured on."""

    @property
    def value(self) -> float | None:
        """As measured; None if there is nothing to divide by."""
        value = self.values[0]
        return value.item() if value.isfinite() else None

    @property
    def interval(self) -> Bounds | None:
        """Where `LEVEL` of its resamples lie; None without a value, or if a suite has only one conversation."""
        suites = Counter(suite for suite, _ in self.clusters)
        if self.value is None or min(suites.values(), default=0) < 2:
            return None
        tail = tail_share(len(self.clusters), len(suites))
        resampled = self.values[1:]
        ends = torch.tensor([tail, 1 - tail], dtype=resampled.dtype)
        low, high = resampled[resampled.isfinite()].quantile(ends).tolist()
        return low, high

    def __truediv__(self, other: Samples) -> Samples:
        """A ratio, both sides on the same draws."""
        return Samples(self.values / other.values, self.clusters | other.clusters)


def mean_of(samples: Sequence[Samples]) -> Samples:
    """The unweighted mean, draw by draw; without a value if one of them has none."""
    values = torch.stack([s.values for s in samples]).mean(0)
    return Samples(values, frozenset().union(*(s.clusters for s in samples)))


@dataclass(frozen=True)
class Draws:
    """Which conversations every resample holds."""

    places: Mapping[Cluster, int]
    """Column of each conversation."""
    counts: Tensor
    """[1 + resamples, conversations] int16: how often each is drawn; the first row is the measurement itself."""

    @classmethod
    def of(cls, clusters: Iterable[Cluster], resamples: int = RESAMPLES) -> Draws:
        """As many conversations of each suite as it has, drawn with replacement.

        A suite's draws depend on nothing but its name and its number of conversations.
        """
        ordered = sorted(set(clusters))
        counts = []
        for suite, count in Counter(suite for suite, _ in ordered).items():
            # A generator of its runs for every suite: with one seed for all, suites of a size would be drawn in step.
            seed = int.from_bytes(hashlib.sha256(suite.encode()).digest()[:4], "big")
            drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
            whole = torch.ones(1 + resamples, count, dtype=torch.int16)
            whole[1:] = torch.zeros_like(whole[1:]).scatter_add_(1, drawn, whole[1:])
            counts.append(whole)
        places = {cluster: place for place, cluster in enumerate(ordered)}
        return cls(places, torch.cat(counts, 1) if counts else torch.ones(1 + resamples, 0, dtype=torch.int16))

    def totals(self, amounts: Iterable[tuple[Cluster, Sequence[float]]], width: int) -> Tensor:
        """Sums of amounts, as measured and in every resample: [1 + resamples, width] float64.

        Args:
            amounts: what to add up, `width` numbers for a run of that conversation.
            width: how many numbers a run has.
        """
        sums: dict[int, Tensor] = {}
        for cluster, values in amounts:
            place, added = self.places[cluster], torch.tensor(values, dtype=torch.float64)
            sums[place] = sums[place] + added if place in sums else added
        if not sums:
            return torch.zeros(len(self.counts), width, dtype=torch.float64)
        return self.counts[:, list(sums)].double() @ torch.stack(list(sums.values()))


def tail_share(clusters: int, suites: int) -> float:
    """The share of resamples beyond each end of an interval: 0.025 of very many prompts, less of fewer.

    Args:
        clusters: conversations, of all suites together.
        suites: each of which gives one degree of freedom away to its runs mean.
    """
    degrees = clusters - suites
    return NormalDist().cdf(-sqrt(clusters / degrees) * _student_quantile(degrees))


def _student_quantile(degrees: int) -> float:
    """Student's t at the upper end of `LEVEL`, to 1% from three degrees of freedom upwards.

    Source: its expansion in powers of 1 / degrees (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


class Sums:
    """Sums of named amounts over some rows, as measured and in every resample.

    Args:
        names: of the amounts.
        amounts: of each row: its conversation, and a number for each name.
        draws: resamples that hold all these conversations.
    """

    def __init__(self, names: Sequence[str], amounts: Iterable[tuple[Cluster, Sequence[float]]], draws: Draws) -> None:
        amounts = list(amounts)
        totals = draws.totals(amounts, len(names))
        self._totals = dict(zip(names, totals.unbind(1), strict=True))
        self._clusters = frozenset(cluster for cluster, _ in amounts)

    def ratio(self, above: str, below: str) -> Samples:
        """One sum over another."""
        return Samples(self._totals[above] / self._totals[below], self._clusters)


def with_intervals(samples: Mapping[str, Samples]) -> Record:
    """Each figure and its interval, as `NAME` and `NAME_interval`."""
    return {key: v for name, of in samples.items() for key, v in ((name, of.value), (f"{name}_interval", of.interval))}


def cluster_of(row: Row | RequestRow) -> Cluster:
    """The conversation that a row belongs to."""
    return row.suite, row.conversation


# Methods.


def contender_of(row: Row) -> Contender:
    """The contender that a row belongs to."""
    return Contender(row.method, row.budget, row.temperature)


def contenders_of(rows: Sequence[Row]) -> list[Contender]:
    """All contenders, sorted by temperature, then as they first appear."""
    return sorted(dict.fromkeys(map(contender_of, rows)), key=lambda contender: contender.temperature)


def draws_of(rows: Iterable[Row]) -> Draws:
    """The resamples of these rows' conversations."""
    return Draws.of(map(cluster_of, rows))


@dataclass(frozen=True)
class MethodSamples:
    """One contender's runs of a set, and its figures as measured and on every resample of the prompts."""

    contender: Contender
    rows: Sequence[Row]
    samples: dict[str, Samples]


def measured(rows: Sequence[Row], contender: Contender, draws: Draws) -> MethodSamples:
    """What one contender's figures are made of.

    Args:
        rows: all runs of the set (a suite, or everything), the baselines' included.
        contender: which of them to describe.
        draws: from `draws_of` these rows, or more.
    """
    runs = [row for row in rows if contender_of(row) == contender]
    alone = _sums(runs, draws)
    samples = {
        "tau": alone.ratio("lengths", "passes"),
        "tokens_per_second": alone.ratio("decode_tokens", "seconds_decode"),
        "end_to_end_tokens_per_second": alone.ratio("tokens", "seconds"),
    }
    for baseline in ("none", "transformers"):
        mine, theirs = (_sums(part, draws) for part in _paired(runs, (row for row in rows if row.method == baseline)))
        samples |= {
            f"speedup_over_{baseline}": theirs.ratio(*SECONDS_PER_TOKEN) / mine.ratio(*SECONDS_PER_TOKEN),
            f"end_to_end_speedup_over_{baseline}": theirs.ratio("seconds", "tokens") / mine.ratio("seconds", "tokens"),
        }
        if baseline == "none":
            samples["cost_ratio"] = mine.ratio(*SECONDS_PER_PASS) / theirs.ratio(*SECONDS_PER_PASS)
    return MethodSamples(contender, runs, samples)


def figures(of: MethodSamples) -> Record:
    """The figures of one contender on one set of runs. Every turn of a conversation counts as a prompt."""
    values = _values(of.samples)
    tau, speedup, cost_ratio = of.samples["tau"].value, values["speedup_over_none"], values["cost_ratio"]
    predicted = tau / cost_ratio if tau is not None and cost_ratio else None
    return {
        **of.contender._asdict(),
        "prompts": len({(row.suite, row.id) for row in of.rows}),
        "conversations": len(set(map(cluster_of, of.rows))),
        "runs": len(of.rows),
        "tokens": sum(len(row.token_ids) for row in of.rows),
        "passes": sum(row.num_verify_passes for row in of.rows),
        **values,
        "tau_over_cost": predicted,
        "agrees": None if speedup is None or not predicted else abs(speedup / predicted - 1) <= AGREEMENT,
    }


def means(of_suites: Sequence[MethodSamples]) -> Record:
    """Unweighted means of one contender's figures over suites; None if a suite lacks the figure."""
    samples = {name: mean_of([of.samples[name] for of in of_suites]) for name in of_suites[0].samples}
    return {**of_suites[0].contender._asdict(), "suites": len(of_suites), **_values(samples)}


def against(
    suites: Mapping[str, Sequence[Row]], contender: Contender, reference: Contender, draws: Draws
) -> list[Record]:
    """A contender beside a reference, in every suite that has both, then (`suite` None) on average over those suites.

    Args:
        suites: rows of every suite.
        contender: which one to compare.
        reference: with which; of the same temperature.
        draws: from `draws_of` all rows.
    """
    sums = {}
    for suite, rows in suites.items():
        runs = [row for row in rows if contender_of(row) == contender]
        mine, theirs = _paired(runs, (row for row in rows if contender_of(row) == reference))
        if mine:
            sums[suite] = _sums(mine, draws), _sums(theirs, draws)

    def ratio(names: Iterable[str], above: str, below: str) -> Samples:
        mine, theirs = (mean_of([sums[suite][side].ratio(above, below) for suite in names]) for side in (0, 1))
        return mine / theirs

    sets: list[tuple[str | None, list[str]]] = [(suite, [suite]) for suite in sums]
    if sums:
        sets.append((None, list(sums)))
    named = contender._asdict() | {"reference": reference.method, "reference_budget": reference.budget}
    return [
        {
            **named,
            "suite": name,
            **with_intervals(
                {
                    "tau_ratio": ratio(names, "lengths", "passes"),
                    "speed_ratio": ratio(names, "decode_tokens", "seconds_decode"),
                }
            ),
        }
        for name, names in sets
    ]


def acceptance(rows: Sequence[Row], contender: Contender) -> Record:
    """How acceptance is distributed over one contender's passes.

    Returns:
        `histogram`: passes by acceptance length (text, as JSON's keys are). `by_position`: for k = 1 .. budget, the
        share that accepted k drafts or more, of the passes with at least k drafts. `conditional`: the same share of
        those that accepted k - 1 or more; None if there are none.
    """
    passes = [
        (drafts, length - 1)
        for row in rows
        if contender_of(row) == contender
        for drafts, length in zip(row.num_drafts, row.acceptance_lengths, strict=True)
    ]
    by_position, conditional = [], []
    for position in range(1, contender.budget + 1):
        proposed = [accepted for drafts, accepted in passes if drafts >= position]
        reached = [accepted for accepted in proposed if accepted >= position - 1]
        kept = sum(accepted >= position for accepted in proposed)
        by_position.append(kept / len(proposed) if proposed else 0.0)
        conditional.append(kept / len(reached) if reached else None)
    lengths = Counter(accepted + 1 for _, accepted in passes)
    return {
        **contender._asdict(),
        "histogram": {str(length): lengths[length] for length in sorted(lengths)},
        "by_position": by_position,
        "conditional": conditional,
    }


_AMOUNTS = ("tokens", "decode_tokens", "passes", "lengths", "seconds", "seconds_decode")
SECONDS_PER_TOKEN, SECONDS_PER_PASS = ("seconds_decode", "decode_tokens"), ("seconds_decode", "passes")
_WITH_INTERVAL = ("tau", "speedup_over_none", "speedup_over_transformers", "cost_ratio")


def _sums(rows: Sequence[Row], draws: Draws) -> Sums:
    return Sums(_AMOUNTS, [(cluster_of(row), _amounts(row)) for row in rows], draws)


def _amounts(row: Row) -> tuple[float, ...]:
    seconds = row.seconds_prefill + row.seconds_decode
    lengths = sum(row.acceptance_lengths)
    return len(row.token_ids), row.decode_tokens, row.num_verify_passes, lengths, seconds, row.seconds_decode


def _values(samples: Mapping[str, Samples]) -> Record:
    values: Record = {}
    for name, of in samples.items():
        values |= with_intervals({name: of}) if name in _WITH_INTERVAL else {name: of.value}
    return values


def _paired(runs: Sequence[Row], others: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Runs of a method and of another for the same prompts, temperature and repeats."""
    by_task = {_task(row): row for row in others}
    matched = [row for row in runs if _task(row) in by_task]
    return matched, [by_task[_task(row)] for row in matched]


def _task(row: Row) -> tuple[str, str, float, int]:
    return row.suite, row.id, row.temperature, row.repeat


# Servers. In the bootstrap a request's share of its window's seconds is in proportion to the time that it was in
# flight, so all shares together are the window.


Place = tuple[str, str, float, int]
"""Server, suite, temperature, concurrency."""
ServerSamples = dict[str, Samples]
"""`tokens_per_second`, and `speedup` over the baseline if that was measured and is another server."""


def place_of(window: WindowRow) -> Place:
    """What the repeats of a window have in common."""
    return window.server, window.suite, window.temperature, window.concurrency


def percentiles(values: Sequence[float]) -> Record | None:
    """`p50`, `p90` and `p99`, interpolated; None for no values."""
    if not values:
        return None
    return dict(zip(("p50", "p90", "p99"), np.percentile(values, (50, 90, 99)).tolist(), strict=True))


def server_figures(
    windows: Sequence[WindowRow], requests: Sequence[RequestRow], samples: ServerSamples | None = None
) -> Record:
    """The figures of one server at one place, all repeats together.

    Args:
        windows: its windows there, one per repeat.
        requests: theirs.
        samples: from `server_samples`, for intervals and the speed-up; None leaves both out.
    """
    answered = [row for row in requests if row.error is None]
    seconds, tokens = sum(window.seconds for window in windows), sum(row.completion_tokens or 0 for row in answered)
    drafting, chunks = server_acceptance(windows, answered), sum(len(row.chunks) for row in answered)
    server, suite, temperature, concurrency = place_of(windows[0])
    record: Record = {
        "server": server,
        "suite": suite,
        "temperature": temperature,
        "concurrency": concurrency,
        "windows": len(windows),
        "requests": len(requests),
        "errors": len(requests) - len(answered),
        "rejected": sum(row.rejected for row in requests),
        "conversations": len(set(map(cluster_of, requests))),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_interval": None,
        "requests_per_second": len(answered) / seconds,
        "in_flight": sum(row.busy for row in requests) / seconds,
        "speedup": None,
        "speedup_interval": None,
        "first_token": percentiles([row.first_token for row in answered if row.first_token is not None]),
        "per_token": percentiles([row.seconds_per_token for row in answered if row.seconds_per_token is not None]),
        "chunk_gap": percentiles([gap for row in answered for gap in row.gaps]),
        "latency": percentiles([row.seconds for row in answered]),
        "tokens_per_chunk": tokens / chunks if chunks else None,
        "acceptance_length": drafting.length,
        "acceptance_source": drafting.source,
    }
    return record | with_intervals(samples or {}) | {"tokens_per_second": tokens / seconds}


def places(measured: Measured) -> dict[Place, list[WindowRow]]:
    """Finished windows by place, in the order in which they were measured."""
    found: dict[Place, list[WindowRow]] = {}
    for window in measured.windows:
        found.setdefault(place_of(window), []).append(window)
    return found


def server_samples(measured: Measured, baseline: str) -> dict[Place, ServerSamples]:
    """Tokens per second and speed-ups of every place, as measured and on every resample of the prompts.

    A place is compared with the baseline over the repeats that both have.
    """
    found = places(measured)
    draws = Draws.of(cluster_of(row) for rows in measured.requests.values() for row in rows)
    samples = {}
    for place, windows in found.items():
        samples[place] = {"tokens_per_second": _speed(measured, windows, draws)}
        others = found.get((baseline, *place[1:]), []) if place[0] != baseline else []
        repeats = {window.repeat for window in windows} & {window.repeat for window in others}
        if repeats:
            mine, theirs = ([w for w in side if w.repeat in repeats] for side in (windows, others))
            samples[place]["speedup"] = _speed(measured, mine, draws) / _speed(measured, theirs, draws)
    return samples


def server_means(figures: Sequence[Record], samples: Mapping[Place, ServerSamples]) -> list[Record]:
    """Unweighted means over suites, for each server and concurrency that was measured on every suite."""
    suites = {f["suite"] for f in figures}
    together: dict[tuple[str, float, int], list[Record]] = {}
    for f in figures:
        together.setdefault((f["server"], f["temperature"], f["concurrency"]), []).append(f)
    means = []
    for (server, temperature, concurrency), runs in together.items():
        if {f["suite"] for f in runs} != suites:
            continue
        of = [samples[server, f["suite"], temperature, concurrency] for f in runs]
        names = [name for name in ("tokens_per_second", "speedup") if all(name in s for s in of)]
        lengths = [f["acceptance_length"] for f in runs if f["acceptance_length"] is not None]
        means.append(
            {
                **{"server": server, "temperature": temperature, "concurrency": concurrency, "suites": len(runs)},
                **{"speedup": None, "speedup_interval": None},
                **with_intervals({name: mean_of([s[name] for s in of]) for name in names}),
                "acceptance_length": sum(lengths) / len(lengths) if len(lengths) == len(runs) else None,
            }
        )
    return means


def _speed(measured: Measured, windows: Iterable[WindowRow], draws: Draws) -> Samples:
    """Tokens per second of some windows of one place."""
    amounts = []
    for window in windows:
        rows = measured.requests[window.key]
        busy = sum(row.busy for row in rows)
        for row in rows:
            tokens = 0 if row.error is not None else row.completion_tokens or 0
            amounts.append((cluster_of(row), (tokens, window.seconds * row.busy / busy)))
    return Sums(("tokens", "seconds"), amounts, draws).ratio("tokens", "seconds")
