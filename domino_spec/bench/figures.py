"""Figures from raw rows: pure arithmetic, so that anybody can recompute a report.

Definitions (DESIGN sections 3 and 5), each a ratio of sums over runs, turns and repeats included:
    tau                 mean of `acceptance_lengths` over all passes of all prompts, before stop and length cuts
    tokens per second   tokens that decoding produced / seconds of decoding, both summed; prefill left out
    end to end          all generated tokens / seconds of prefill and decoding
    speed-up            seconds per token of the baseline / those of the method, on the same runs
    c                   seconds per pass of the method / seconds per pass (one token) of `none`, on the same runs
    `..._interval`      where 95% of the same figure lies when whole conversations are drawn anew (`intervals`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domino_spec.bench.intervals import Bounds, Cluster, Draws, Samples, mean_of
from domino_spec.bench.methods import Contender
from domino_spec.bench.rows import Row

AGREEMENT = 0.05
"""How far the speed-up may lie from tau / c, as a share: what is lost where length and stop cut the last pass."""


@dataclass(frozen=True)
class Figures:
    """One contender on one set of runs."""

    method: str
    budget: int
    temperature: float
    prompts: int
    """Every turn of a conversation is one."""
    conversations: int
    """What intervals draw anew."""
    runs: int
    tokens: int
    """Generated tokens."""
    passes: int
    tau: float | None
    tau_interval: Bounds | None
    """None where a suite has only one conversation; so are all intervals."""
    tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    speedup_over_none: float | None
    speedup_over_none_interval: Bounds | None
    speedup_over_transformers: float | None
    speedup_over_transformers_interval: Bounds | None
    end_to_end_speedup_over_none: float | None
    end_to_end_speedup_over_transformers: float | None
    cost_ratio: float | None
    """c."""
    cost_ratio_interval: Bounds | None
    tau_over_cost: float | None
    """The speed-up that tau and c predict."""
    agrees: bool | None
    """Whether the measured speed-up over `none` lies within `AGREEMENT` of it."""


@dataclass(frozen=True)
class Means:
    """One contender's unweighted means over suites; None where a suite lacks the figure."""

    method: str
    budget: int
    temperature: float
    suites: int
    tau: float | None
    tau_interval: Bounds | None
    tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    speedup_over_none: float | None
    speedup_over_none_interval: Bounds | None
    speedup_over_transformers: float | None
    speedup_over_transformers_interval: Bounds | None
    end_to_end_speedup_over_none: float | None
    end_to_end_speedup_over_transformers: float | None
    cost_ratio: float | None
    cost_ratio_interval: Bounds | None


@dataclass(frozen=True)
class Against:
    """One contender beside a reference contender, on the same prompts, temperature and repeats."""

    method: str
    budget: int
    temperature: float
    reference: str
    """The reference's method."""
    reference_budget: int
    suite: str | None
    """None for the ratio of both unweighted means over suites."""
    tau_ratio: float | None
    """tau of the contender / tau of the reference."""
    tau_ratio_interval: Bounds | None
    speed_ratio: float | None
    """Decode tokens/s of the contender / those of the reference."""
    speed_ratio_interval: Bounds | None


@dataclass(frozen=True)
class Acceptance:
    """How acceptance is distributed over passes, for one contender on all runs."""

    method: str
    budget: int
    temperature: float
    histogram: dict[str, int]
    """Passes by acceptance length (as text: JSON's keys)."""
    by_position: list[float]
    """Share of the passes with at least k drafts that accepted k or more, k = 1 .. budget."""
    conditional: list[float | None]
    """The same share of those that accepted k - 1 or more; None where that never happened."""


def contender_of(row: Row) -> Contender:
    """The contender that a row belongs to."""
    return Contender(row.method, row.budget, row.temperature)


def contenders_of(rows: Sequence[Row]) -> list[Contender]:
    """All contenders, sorted by temperature, then as they first appear."""
    return sorted(dict.fromkeys(map(contender_of, rows)), key=lambda contender: contender.temperature)


def draws_of(rows: Iterable[Row]) -> Draws:
    """The resamples of these rows' conversations."""
    return Draws.of(map(_cluster, rows))


@dataclass(frozen=True)
class Measured:
    """One contender's runs of a set, and what they come to as measured and on every resample of the prompts."""

    contender: Contender
    rows: Sequence[Row]
    samples: dict[str, Samples]
    """By the names of the fields of `Figures`."""


def measured(rows: Sequence[Row], contender: Contender, draws: Draws) -> Measured:
    """What one contender's figures are made of.

    Args:
        rows: all runs of the set (a suite, or everything), the baselines' included.
        contender: which of them to describe.
        draws: from `draws_of` these rows, or more.
    """
    own = [row for row in rows if contender_of(row) == contender]
    alone = _Sums(own, draws)
    samples = {
        "tau": alone.ratio("lengths", "passes"),
        "tokens_per_second": alone.ratio("decode_tokens", "seconds_decode"),
        "end_to_end_tokens_per_second": alone.ratio("tokens", "seconds"),
    }
    for baseline in ("none", "transformers"):
        mine, theirs = (_Sums(part, draws) for part in _paired(own, (row for row in rows if row.method == baseline)))
        samples |= {
            f"speedup_over_{baseline}": theirs.ratio(*SECONDS_PER_TOKEN) / mine.ratio(*SECONDS_PER_TOKEN),
            f"end_to_end_speedup_over_{baseline}": theirs.ratio("seconds", "tokens") / mine.ratio("seconds", "tokens"),
        }
        if baseline == "none":
            samples["cost_ratio"] = mine.ratio(*SECONDS_PER_PASS) / theirs.ratio(*SECONDS_PER_PASS)
    return Measured(contender, own, samples)


def figures(of: Measured) -> Figures:
    """The figures of one contender."""
    values = _values(of.samples)
    tau, speedup, cost_ratio = of.samples["tau"].value, values["speedup_over_none"], values["cost_ratio"]
    predicted = tau / cost_ratio if tau is not None and cost_ratio else None
    return Figures(
        method=of.contender.method,
        budget=of.contender.budget,
        temperature=of.contender.temperature,
        prompts=len({(row.suite, row.id) for row in of.rows}),
        conversations=len(set(map(_cluster, of.rows))),
        runs=len(of.rows),
        tokens=sum(len(row.token_ids) for row in of.rows),
        passes=sum(row.num_verify_passes for row in of.rows),
        tau_over_cost=predicted,
        agrees=None if speedup is None or not predicted else abs(speedup / predicted - 1) <= AGREEMENT,
        **values,
    )


def means(of_suites: Sequence[Measured]) -> Means:
    """Unweighted means of one contender's figures over suites."""
    contender = of_suites[0].contender
    samples = {name: mean_of([of.samples[name] for of in of_suites]) for name in of_suites[0].samples}
    return Means(
        method=contender.method,
        budget=contender.budget,
        temperature=contender.temperature,
        suites=len(of_suites),
        **_values(samples),
    )


def against(
    suites: Mapping[str, Sequence[Row]], contender: Contender, reference: Contender, draws: Draws
) -> list[Against]:
    """A contender beside a reference, in every suite that has both, then on average over those suites.

    Args:
        suites: rows of every suite.
        contender: which one to compare.
        reference: with which; of the same temperature.
        draws: from `draws_of` all rows.
    """
    sums = {}
    for suite, rows in suites.items():
        own = [row for row in rows if contender_of(row) == contender]
        mine, theirs = _paired(own, (row for row in rows if contender_of(row) == reference))
        if mine:
            sums[suite] = _Sums(mine, draws), _Sums(theirs, draws)

    def compared(above: str, below: str, names: Iterable[str]) -> Samples:
        mine, theirs = (mean_of([sums[suite][side].ratio(above, below) for suite in names]) for side in (0, 1))
        return mine / theirs

    sets: list[tuple[str | None, list[str]]] = [(suite, [suite]) for suite in sums]
    if sums:
        sets.append((None, list(sums)))
    found = []
    for name, names in sets:
        taus, speeds = compared("lengths", "passes", names), compared("decode_tokens", "seconds_decode", names)
        found.append(
            Against(
                *(contender.method, contender.budget, contender.temperature, reference.method, reference.budget, name),
                *(taus.value, taus.interval, speeds.value, speeds.interval),
            )
        )
    return found


def acceptance(rows: Sequence[Row], contender: Contender) -> Acceptance:
    """Acceptance lengths and positions of one contender over all runs."""
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
    return Acceptance(
        method=contender.method,
        budget=contender.budget,
        temperature=contender.temperature,
        histogram={str(length): lengths[length] for length in sorted(lengths)},
        by_position=by_position,
        conditional=conditional,
    )


_AMOUNTS = ("tokens", "decode_tokens", "passes", "lengths", "seconds", "seconds_decode")
"""What figures are ratios of: columns of `_Sums`."""
SECONDS_PER_TOKEN, SECONDS_PER_PASS = ("seconds_decode", "decode_tokens"), ("seconds_decode", "passes")


class _Sums:
    """Sums over some runs, as measured and in every resample."""

    def __init__(self, rows: Sequence[Row], draws: Draws) -> None:
        totals = draws.totals([(_cluster(row), _amounts(row)) for row in rows], len(_AMOUNTS))
        self._totals = dict(zip(_AMOUNTS, totals.unbind(1), strict=True))
        self._clusters = frozenset(map(_cluster, rows))

    def ratio(self, above: str, below: str) -> Samples:
        """One sum over another, both from `_AMOUNTS`."""
        return Samples(self._totals[above] / self._totals[below], self._clusters)


def _amounts(row: Row) -> tuple[float, ...]:
    seconds = row.seconds_prefill + row.seconds_decode
    lengths = sum(row.acceptance_lengths)
    return len(row.token_ids), row.decode_tokens, row.num_verify_passes, lengths, seconds, row.seconds_decode


def _values(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """Fields of `Figures` and `Means`: values, and the intervals of those that have one there."""
    intervals = {f"{name}_interval": of.interval for name, of in samples.items() if f"{name}_interval" in _INTERVALS}
    return {name: of.value for name, of in samples.items()} | intervals


_INTERVALS = Figures.__dataclass_fields__


def _paired(own: Sequence[Row], others: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Runs of a method and of another for the same prompts, temperature and repeats."""
    by_task = {_task(row): row for row in others}
    matched = [row for row in own if _task(row) in by_task]
    return matched, [by_task[_task(row)] for row in matched]


def _task(row: Row) -> tuple[str, str, float, int]:
    return row.suite, row.id, row.temperature, row.repeat


def _cluster(row: Row) -> Cluster:
    return row.suite, row.conversation
