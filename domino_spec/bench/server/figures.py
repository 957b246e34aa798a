"""Figures of servers from raw rows: pure arithmetic, so that anybody can recompute a report.

tokens per second   completion tokens of all answers / seconds of their windows, from the first request to the end
                    of the last; over repeats, sums of both
speed-up            tokens per second of a server / those of the baseline, at the same suite, temperature and
                    concurrency
in flight           seconds of all requests / seconds of the windows: the mean number of them (Little's law)
`..._interval`      where 95% of the same figure lies when whole conversations are drawn anew (`intervals`); a
                    request's share of its window's seconds is in proportion to the time that it was in flight, so
                    that all shares together are the window
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from domino_spec.bench.intervals import Bounds, Cluster, Draws, Samples, mean_of
from domino_spec.bench.server.metrics import acceptance
from domino_spec.bench.server.rows import Measured, RequestRow, WindowRow


@dataclass(frozen=True)
class Percentiles:
    """Of some times, in seconds; between two of them, linear."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Figures:
    """One server on one suite at one temperature and concurrency, all repeats together."""

    server: str
    suite: str
    temperature: float
    concurrency: int
    windows: int
    requests: int
    errors: int
    """Requests without an answer."""
    rejected: int
    """Tries for which the server had no room (429); they were made again."""
    conversations: int
    """What intervals draw anew."""
    tokens: int
    """Completion tokens of all answers, as the server counts them."""
    seconds: float
    tokens_per_second: float
    tokens_per_second_interval: Bounds | None
    """None with only one conversation."""
    requests_per_second: float
    """Answers, not tries."""
    in_flight: float
    speedup: float | None
    """Over the baseline; None where that was not measured, or is this one."""
    speedup_interval: Bounds | None
    first_token: Percentiles | None
    """Time to the first chunk with text (TTFT)."""
    per_token: Percentiles | None
    """Inter-token latency: of each answer, the time from its first to its last token / its tokens after the first."""
    chunk_gap: Percentiles | None
    """Between one chunk with text and the next, over all answers: what a reader sees as pauses."""
    latency: Percentiles | None
    """From sending a request to the end of its answer."""
    tokens_per_chunk: float | None
    acceptance_length: float | None
    acceptance_source: str


@dataclass(frozen=True)
class Means:
    """One server's unweighted means over suites; None where a suite lacks the figure."""

    server: str
    temperature: float
    concurrency: int
    suites: int
    tokens_per_second: float | None
    tokens_per_second_interval: Bounds | None
    speedup: float | None
    speedup_interval: Bounds | None
    acceptance_length: float | None


Place = tuple[str, str, float, int]
"""Server, suite, temperature, concurrency."""


@dataclass(frozen=True)
class Sampled:
    """What intervals are made of."""

    tokens_per_second: Samples
    speedup: Samples | None


def place_of(window: WindowRow) -> Place:
    """What the repeats of a window have in common."""
    return window.server, window.suite, window.temperature, window.concurrency


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """The median and two high percentiles; None of nothing."""
    if not values:
        return None
    return Percentiles(*(float(v) for v in np.percentile(values, (50, 90, 99))))


def figures_of(windows: Sequence[WindowRow], requests: Sequence[RequestRow], sampled: Sampled | None = None) -> Figures:
    """The figures of one server at one place.

    Args:
        windows: its windows there, one per repeat.
        requests: theirs.
        sampled: from `sample`, for intervals and the speed-up; None leaves both out.
    """
    answered = [row for row in requests if row.error is None]
    seconds, tokens = sum(window.seconds for window in windows), sum(row.completion_tokens or 0 for row in answered)
    drafting, chunks = acceptance(windows, answered), sum(len(row.chunks) for row in answered)
    speed, speedup = (sampled.tokens_per_second, sampled.speedup) if sampled else (None, None)
    server, suite, temperature, concurrency = place_of(windows[0])
    return Figures(
        server=server,
        suite=suite,
        temperature=temperature,
        concurrency=concurrency,
        windows=len(windows),
        requests=len(requests),
        errors=len(requests) - len(answered),
        rejected=sum(row.rejected for row in requests),
        conversations=len(set(map(_cluster, requests))),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        tokens_per_second_interval=speed.interval if speed else None,
        requests_per_second=len(answered) / seconds,
        in_flight=sum(row.busy for row in requests) / seconds,
        speedup=speedup.value if speedup else None,
        speedup_interval=speedup.interval if speedup else None,
        first_token=percentiles([row.first_token for row in answered if row.first_token is not None]),
        per_token=percentiles([row.seconds_per_token for row in answered if row.seconds_per_token is not None]),
        chunk_gap=percentiles([gap for row in answered for gap in row.gaps]),
        latency=percentiles([row.seconds for row in answered]),
        tokens_per_chunk=tokens / chunks if chunks else None,
        acceptance_length=drafting.length,
        acceptance_source=drafting.source,
    )


def places(measured: Measured) -> dict[Place, list[WindowRow]]:
    """Finished windows by place, in the order in which they were measured."""
    found: dict[Place, list[WindowRow]] = {}
    for window in measured.windows:
        found.setdefault(place_of(window), []).append(window)
    return found


def sample(measured: Measured, baseline: str) -> dict[Place, Sampled]:
    """Tokens per second and speed-ups of every place, as measured and on every resample of the prompts.

    A place is compared with the baseline over the repeats that both have.
    """
    found = places(measured)
    draws = Draws.of(_cluster(row) for rows in measured.requests.values() for row in rows)
    sampled = {}
    for place, windows in found.items():
        others = found.get((baseline, *place[1:]), []) if place[0] != baseline else []
        repeats = {window.repeat for window in windows} & {window.repeat for window in others}
        speedup = None
        if repeats:
            mine, theirs = ([w for w in side if w.repeat in repeats] for side in (windows, others))
            speedup = _speed(measured, mine, draws) / _speed(measured, theirs, draws)
        sampled[place] = Sampled(_speed(measured, windows, draws), speedup)
    return sampled


def means_of(figures: Sequence[Figures], sampled: dict[Place, Sampled]) -> list[Means]:
    """Unweighted means over suites, where every suite that was measured has the server at that concurrency."""
    suites = {f.suite for f in figures}
    together: dict[tuple[str, float, int], list[Figures]] = {}
    for f in figures:
        together.setdefault((f.server, f.temperature, f.concurrency), []).append(f)
    means = []
    for (server, temperature, concurrency), own in together.items():
        if {f.suite for f in own} != suites:
            continue
        of = [sampled[server, f.suite, temperature, concurrency] for f in own]
        speed, speedups = mean_of([s.tokens_per_second for s in of]), [s.speedup for s in of if s.speedup is not None]
        speedup = mean_of(speedups) if len(speedups) == len(of) else None
        lengths = [f.acceptance_length for f in own if f.acceptance_length is not None]
        means.append(
            Means(
                *(server, temperature, concurrency, len(own)),
                *(speed.value, speed.interval),
                *((speedup.value, speedup.interval) if speedup else (None, None)),
                sum(lengths) / len(lengths) if len(lengths) == len(own) else None,
            )
        )
    return means


def _speed(measured: Measured, windows: Iterable[WindowRow], draws: Draws) -> Samples:
    """Tokens per second of some windows of one place."""
    amounts, clusters = [], set()
    for window in windows:
        rows = measured.requests[window.key]
        busy = sum(row.busy for row in rows)
        for row in rows:
            tokens = 0 if row.error is not None else row.completion_tokens or 0
            amounts.append((_cluster(row), (tokens, window.seconds * row.busy / busy)))
            clusters.add(_cluster(row))
    tokens_of, seconds_of = draws.totals(amounts, 2).unbind(1)
    return Samples(tokens_of / seconds_of, frozenset(clusters))


def _cluster(row: RequestRow) -> Cluster:
    return row.suite, row.conversation
