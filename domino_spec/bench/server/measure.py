"""The measuring of servers: windows one after the other, the servers taking turns, a row of raw.jsonl per request.

All servers of a (repeat, suite, temperature, concurrency) follow each other, and who goes first moves on, so a machine
that slows down does so for all alike. Only one server is asked at a time. Before each window as many short requests as
are in flight in it warm the server up; they are not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

from domino_spec.bench.measure import WARM_UP_TOKENS, Say
from domino_spec.bench.server.figures import figures_of
from domino_spec.bench.server.load import Job, Outcome, Sampling, Turn, run_load
from domino_spec.bench.server.metrics import read_metrics, readings, settled_metrics
from domino_spec.bench.server.probe import Endpoint
from domino_spec.bench.server.rows import (
    Measured,
    RequestRow,
    WindowKey,
    WindowRow,
    append_request,
    append_window,
)
from domino_spec.clients.openai import Client

LEAST_ROUNDS = 2
"""A window asks at least so many requests per request in flight: small suites are gone through several times."""


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured."""

    turns: Sequence[Turn]
    servers: Sequence[Endpoint]
    concurrency: Sequence[int]
    temperatures: Sequence[float]
    repeats: int
    max_new_tokens: int
    seed: int
    thinking: bool
    timeout: float

    def windows(self) -> Iterator[tuple[WindowKey, Endpoint]]:
        """All windows in the order in which they are measured."""
        count = 0
        for repeat in range(self.repeats):
            for suite in dict.fromkeys(turn.suite for turn in self.turns):
                for temperature in self.temperatures:
                    for concurrency in self.concurrency:
                        order = deque(self.servers)
                        order.rotate(-count)
                        count += 1
                        for server in order:
                            yield WindowKey(suite, temperature, concurrency, repeat, server.name), server

    def jobs(self, key: WindowKey) -> list[Job]:
        """What a window asks: its suite, as often as it takes to keep so many requests in flight."""
        turns = [turn for turn in self.turns if turn.suite == key.suite]
        rounds = max(1, -(-LEAST_ROUNDS * key.concurrency // len(turns)))
        return [
            Job(turn, number, self.seed + key.repeat + self.repeats * number)
            for number in range(rounds)
            for turn in turns
        ]

    def sampling(self, temperature: float) -> Sampling:
        """How the requests of a window are sampled."""
        return Sampling(self.max_new_tokens, temperature, self.thinking, self.timeout)


def measure_servers(plan: Plan, out: Path, measured: Measured, say: Say, api_key: str | None = None) -> None:
    """Measure the windows that are not finished yet, appending to `out`/raw.jsonl as it goes.

    Args:
        plan: what to measure.
        out: the bench directory, prepared by `rows.take_directory`.
        measured: what it already holds; grows.
        say: called with a line of progress after every window.
        api_key: that the servers may ask for.

    Raises:
        UserError: as `run_load`; what was measured is kept.
    """
    pending = [entry for entry in plan.windows() if entry[0] not in measured.requests]
    total, began = len(pending) + len(measured.windows), time.perf_counter()
    for count, (key, server) in enumerate(pending, 1):
        window, rows = _measure_window(plan, key, server, out, measured.attempts.get(key, 0), say, api_key)
        measured.add(window, rows)
        left = (time.perf_counter() - began) / count * (len(pending) - count)
        place = f"[{len(measured.windows)}/{total}] {key.suite}, {key.concurrency} in flight"
        at = f", T={key.temperature:g}" if key.temperature else ""
        say(f"{place}{at}: {server.name} {_in_short(window, rows)}; {left / 60:.0f} min left")


def _measure_window(
    plan: Plan,
    key: WindowKey,
    server: Endpoint,
    out: Path,
    attempt: int,
    say: Say,
    api_key: str | None,
) -> tuple[WindowRow, list[RequestRow]]:
    jobs, sampling, rows = plan.jobs(key), plan.sampling(key.temperature), list[RequestRow]()
    short = Sampling(min(WARM_UP_TOKENS, plan.max_new_tokens), key.temperature, plan.thinking, plan.timeout)
    run_load(server, list(islice(jobs, key.concurrency)), key.concurrency, short, api_key=api_key)

    def keep(outcome: Outcome) -> None:
        row = _row(key, attempt, outcome)
        append_request(out, row)
        rows.append(row)

    before = _metrics(server, api_key, say)
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    seconds = run_load(server, jobs, key.concurrency, sampling, api_key=api_key, done=keep)
    after = _metrics(server, api_key, say)
    window = WindowRow(
        server=server.name,
        suite=key.suite,
        temperature=key.temperature,
        concurrency=key.concurrency,
        repeat=key.repeat,
        attempt=attempt,
        requests=len(rows),
        at=at,
        seconds=seconds,
        readings=readings(before, after),
    )
    append_window(out, window)
    return window, rows


def _metrics(server: Endpoint, api_key: str | None, say: Callable[[str], None]) -> dict[str, float]:
    client = Client(server.url, api_key)
    try:
        found, still = settled_metrics(lambda: read_metrics(client, server.engine))
    finally:
        client.close()
    if not still:
        say(f"warning: the counters of {server.name} do not stand still: somebody else is asking this server")
    return dict(found)


def _row(key: WindowKey, attempt: int, outcome: Outcome) -> RequestRow:
    answer, turn = outcome.answer, outcome.job.turn
    return RequestRow(
        **key._asdict(),
        attempt=attempt,
        id=turn.id,
        turn=turn.turn,
        round=outcome.job.round,
        started=_micro(outcome.started),
        sent=_micro(outcome.sent),
        rejected=outcome.rejected,
        chunks=tuple(_micro(at - answer.sent) for at in answer.chunks),
        last_token=None if answer.last_token is None else _micro(answer.last_token - answer.sent),
        seconds=_micro(answer.ended - answer.sent),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        text=answer.text,
        finish_reason=answer.finish_reason,
        verify_passes=answer.verify_passes,
        accepted_drafts=answer.accepted_drafts,
        error=None if outcome.fault is None else str(outcome.fault),
    )


def _micro(seconds: float) -> float:
    """To the microsecond, which is finer than anything here and keeps the file short."""
    return round(seconds, 6)


def _in_short(window: WindowRow, rows: Sequence[RequestRow]) -> str:
    """A window in a line of progress."""
    f = figures_of([window], rows)
    parts = [f"{f.tokens_per_second:.1f} tok/s"]
    parts += [f"first token {f.first_token.p50 * 1000:.0f} ms"] if f.first_token else []
    parts += [f"per token {f.per_token.p50 * 1000:.1f} ms"] if f.per_token else []
    parts += [f"tau {f.acceptance_length:.2f}"] if f.acceptance_length else []
    parts += [f"{f.errors} of {f.requests} failed"] if f.errors else []
    return ", ".join(parts)
