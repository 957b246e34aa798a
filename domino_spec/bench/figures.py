"""Figures from raw rows: pure arithmetic, so that anybody can recompute a report.

Definitions (DESIGN sections 3 and 5):
    tau                 mean of `acceptance_lengths` over all passes of all prompts, before stop and length cuts
    tokens per second   tokens that decoding produced / seconds of decoding, both summed; prefill left out
    end to end          all generated tokens / seconds of prefill and decoding
    speed-up            seconds per token of the baseline / those of the method, on the same runs
    c                   seconds per pass of the method / seconds per pass (one token) of `none`, on the same runs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    runs: int
    tokens: int
    """Generated tokens."""
    passes: int
    tau: float | None
    tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    speedup_over_none: float | None
    speedup_over_transformers: float | None
    end_to_end_speedup_over_none: float | None
    end_to_end_speedup_over_transformers: float | None
    cost_ratio: float | None
    """c."""
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
    tokens_per_second: float | None
    end_to_end_tokens_per_second: float | None
    speedup_over_none: float | None
    speedup_over_transformers: float | None
    end_to_end_speedup_over_none: float | None
    end_to_end_speedup_over_transformers: float | None
    cost_ratio: float | None


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


def figures(rows: Sequence[Row], contender: Contender) -> Figures:
    """The figures of one contender.

    Args:
        rows: all runs of the set (a suite, or everything), the baselines' included.
        contender: which of them to describe.
    """
    own = [row for row in rows if contender_of(row) == contender]
    passes = sum(row.num_verify_passes for row in own)
    tau = _ratio(sum(sum(row.acceptance_lengths) for row in own), passes)
    over_none = _paired(rows, own, "none")
    over_transformers = _paired(rows, own, "transformers")
    cost_ratio = _ratio(_seconds_per_pass(over_none[0]), _seconds_per_pass(over_none[1]))
    speedup, predicted = _speedup(over_none), _ratio(tau, cost_ratio)
    return Figures(
        method=contender.method,
        budget=contender.budget,
        temperature=contender.temperature,
        prompts=len({(row.suite, row.id) for row in own}),
        runs=len(own),
        tokens=sum(len(row.token_ids) for row in own),
        passes=passes,
        tau=tau,
        tokens_per_second=_ratio(1.0, _seconds_per_token(own)),
        end_to_end_tokens_per_second=_ratio(1.0, _seconds_per_token_end_to_end(own)),
        speedup_over_none=speedup,
        speedup_over_transformers=_speedup(over_transformers),
        end_to_end_speedup_over_none=_end_to_end_speedup(over_none),
        end_to_end_speedup_over_transformers=_end_to_end_speedup(over_transformers),
        cost_ratio=cost_ratio,
        tau_over_cost=predicted,
        agrees=None if speedup is None or predicted is None else abs(speedup / predicted - 1) <= AGREEMENT,
    )


def means(of_suites: Sequence[Figures]) -> Means:
    """Unweighted means of one contender's figures over suites."""
    first = of_suites[0]

    def mean(name: str) -> float | None:
        values = [getattr(suite, name) for suite in of_suites]
        return None if None in values else sum(values) / len(values)

    return Means(
        method=first.method,
        budget=first.budget,
        temperature=first.temperature,
        suites=len(of_suites),
        tau=mean("tau"),
        tokens_per_second=mean("tokens_per_second"),
        end_to_end_tokens_per_second=mean("end_to_end_tokens_per_second"),
        speedup_over_none=mean("speedup_over_none"),
        speedup_over_transformers=mean("speedup_over_transformers"),
        end_to_end_speedup_over_none=mean("end_to_end_speedup_over_none"),
        end_to_end_speedup_over_transformers=mean("end_to_end_speedup_over_transformers"),
        cost_ratio=mean("cost_ratio"),
    )


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


Pairs = tuple[list[Row], list[Row]]
"""Runs of a method and of a baseline for the same prompts, temperature and repeats."""


def _paired(rows: Sequence[Row], own: Sequence[Row], baseline: str) -> Pairs:
    others = {_task(row): row for row in rows if row.method == baseline}
    matched = [row for row in own if _task(row) in others]
    return matched, [others[_task(row)] for row in matched]


def _task(row: Row) -> tuple[str, str, float, int]:
    return row.suite, row.id, row.temperature, row.repeat


def _speedup(pairs: Pairs) -> float | None:
    return _ratio(_seconds_per_token(pairs[1]), _seconds_per_token(pairs[0]))


def _end_to_end_speedup(pairs: Pairs) -> float | None:
    return _ratio(_seconds_per_token_end_to_end(pairs[1]), _seconds_per_token_end_to_end(pairs[0]))


def _seconds_per_token(rows: Sequence[Row]) -> float | None:
    return _ratio(sum(row.seconds_decode for row in rows), sum(row.decode_tokens for row in rows))


def _seconds_per_token_end_to_end(rows: Sequence[Row]) -> float | None:
    seconds = sum(row.seconds_prefill + row.seconds_decode for row in rows)
    return _ratio(seconds, sum(len(row.token_ids) for row in rows))


def _seconds_per_pass(rows: Sequence[Row]) -> float | None:
    return _ratio(sum(row.seconds_decode for row in rows), sum(row.num_verify_passes for row in rows))


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
