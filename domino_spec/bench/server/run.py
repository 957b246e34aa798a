"""`domino-spec bench --server`: from addresses of servers to a directory of measurements and a report.

The protocol of the paper's Tables 2 and 3: throughput of each server at several numbers of requests in flight, beside
the same engine without a draft, in one run. Any OpenAI-compatible server can be measured.

Windows are measured one after the other, with a row of raw.jsonl per request. All servers of a (repeat, suite,
temperature, concurrency) follow each other, and the first one changes, so a machine that slows down does so for all
alike. Only one server is asked at a time. Before each window the server is warmed up with short requests, as many as
the window has in flight; they are not counted.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from domino_spec.bench.figures import server_figures
from domino_spec.bench.plots import write_plots
from domino_spec.bench.report import build_report, write_report
from domino_spec.bench.rows import (
    Measured,
    RequestRow,
    WindowKey,
    WindowRow,
    append_line,
    append_request,
    append_window,
    cut_partial_line,
    device_name,
    read_measured,
    record_session,
    session_record,
    take_directory,
    turn_suffix,
)
from domino_spec.bench.run import WARM_UP_TOKENS, Say, check_numbers, print_progress
from domino_spec.bench.server.load import Job, Outcome, Sampling, Turn, run_load
from domino_spec.bench.server.metrics import read_metrics, readings, settled_metrics
from domino_spec.bench.server.probe import Endpoint, baseline_of, parse_servers, probe
from domino_spec.bench.suites import ANSWERS_FILE, Prompt, check_ids, load_suites, read_answers, suites_settings
from domino_spec.clients.openai import Client
from domino_spec.settings import UserError
from domino_spec.target.text import Message

CONCURRENCY = (1, 2, 4, 8, 16, 32)
REQUEST_TIMEOUT = 600.0


def run_server_bench(
    *,
    servers: Sequence[str],
    suites: Sequence[str],
    out: Path,
    concurrency: Sequence[int] = CONCURRENCY,
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = (0.0,),
    repeats: int = 1,
    seed: int = 0,
    thinking: bool = False,
    api_key: str | None = None,
    model: str | None = None,
    request_timeout: float = REQUEST_TIMEOUT,
    say: Say | None = None,
) -> dict[str, Any]:
    """Measure servers on suites of prompts and write raw.jsonl, report.json, report.md, report.html and plots.

    Interrupted at any point, the same call continues with the window that it was in.

    Args:
        servers: addresses, each as URL or NAME=URL; the one named `none`, else the first, is the baseline.
        suites: names or paths, see `suites.load_suite`.
        out: the bench directory, made when missing.
        concurrency: requests in flight; every server is measured at each.
        limit: conversations per suite; None for all.
        max_new_tokens: per answer.
        temperatures: every server is measured at each; 0 is greedy.
        repeats: how often every window is measured; sampled answers then have other seeds.
        seed: of sampling; a request's is this + repeat + repeats * round.
        thinking: of models whose chat template knows it.
        api_key: that the servers may ask for.
        model: what the servers call it; None takes the only one of each.
        request_timeout: seconds for one request.
        say: takes lines of progress; None prints them to stderr.

    Returns:
        What report.json holds.

    Raises:
        UserError: an option that cannot be used, a server that cannot be measured or no longer answers, or `out` holds
            another configuration's measurements. What was measured is kept.
    """
    say = say or print_progress
    levels, degrees = sorted(set(concurrency)), list(dict.fromkeys(float(t) for t in temperatures))
    _check(levels, degrees, max_new_tokens, repeats, seed, request_timeout, len(suites))
    addresses = parse_servers(servers)
    prompts = load_suites(suites, limit)
    check_ids(prompts)
    endpoints = [probe(n, url, model=model, api_key=api_key, thinking=thinking) for n, url in addresses.items()]
    baseline = next(e for e in endpoints if e.name == baseline_of(list(addresses)))
    described = suites_settings(prompts, limit)
    planned = len(described["suites"]) * len(degrees) * len(levels) * repeats * len(endpoints)
    configuration = {
        "servers": {endpoint.name: _described(endpoint) for endpoint in endpoints},
        "baseline": baseline.name,
        **described,
        "concurrency": levels,
        "temperatures": degrees,
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "planned_windows": planned,
        "seed": seed,
        "thinking": thinking,
        "request_timeout": request_timeout,
    }
    take_directory(out, configuration)
    measured = read_measured(out)
    if len(measured.windows) < planned:
        record_session(out, _session(len(measured.windows), endpoints))
        greedy = Sampling(max_new_tokens, 0.0, thinking, request_timeout)
        turns = make_turns(baseline, prompts, greedy, out, concurrency=levels[-1], api_key=api_key, say=say)
        plan = WindowPlan(turns, endpoints, levels, degrees, repeats, max_new_tokens, seed, thinking, request_timeout)
        measure_servers(plan, out, measured, say, api_key)
    report = write_report(out, write_plots(build_report(out), out))
    say(f"wrote {out / 'report.md'} and {out / 'report.html'}")
    return report


def _check(
    levels: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    repeats: int,
    seed: int,
    request_timeout: float,
    suites: int,
) -> None:
    """Refuse numbers that could not be measured with."""
    numbers = {"concurrency": min(levels, default=0), "max_new_tokens": max_new_tokens, "repeats": repeats}
    check_numbers(**numbers, temperatures=len(temperatures), suites=suites)
    if not all(0 <= t < float("inf") for t in temperatures):
        raise UserError(f"temperatures must be 0 or more, got {', '.join(f'{t:g}' for t in temperatures)}")
    if not 0 < request_timeout <= 1e6:
        raise UserError(f"--request-timeout must be seconds above 0, got {request_timeout:g}")
    if seed < 0:
        raise UserError(f"the seed must be 0 or more, got {seed}")


def _described(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "url": endpoint.url,
        "model": endpoint.model,
        "engine": endpoint.engine,
        "takes_template_settings": endpoint.takes_template_settings,
    }


def _session(windows_before: int, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """One stretch of measuring, for settings.json. A key on the command line is not written down."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    hidden = ["..." if before == "--api-key" else word for before, word in zip(["", *words], words, strict=False)]
    session = session_record(windows_before)
    session["command"] = shlex.join("--api-key=..." if w.startswith("--api-key=") else w for w in hidden)
    session["servers"] = {e.name: " ".join(filter(None, (e.engine, e.version))) for e in endpoints}
    session["client"] = device_name(torch.device("cpu"))
    return session


# The prompts, with the baseline's answers to earlier turns.


def make_turns(
    baseline: Endpoint,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    out: Path,
    *,
    concurrency: int,
    api_key: str | None,
    say: Callable[[str], None],
) -> list[Turn]:
    """Every turn of every prompt, a conversation's turns in order.

    A later turn follows the baseline server's own greedy answers to the turns before it, made once and kept in
    earlier_answers.jsonl, so that every server is asked the same.

    Args:
        baseline: the server that answers earlier turns.
        prompts: that passed `suites.check_ids`.
        sampling: of those answers; they are greedy.
        out: the bench directory, prepared by `rows.take_directory`.
        concurrency: answers that are made at a time.
        api_key: that the server may ask for.
        say: called with a line of progress after every answer that is made.

    Raises:
        UserError: an answer cannot be had, or earlier_answers.jsonl is malformed.
    """
    path = out / ANSWERS_FILE
    cut_partial_line(path)
    known = read_answers(path)
    for number in range(1, max(len(prompt.turns) for prompt in prompts)):  # all first answers, then all second ones
        missing = [
            Job(_turn(prompt, number, known), 0, 0)
            for prompt in prompts
            if number < len(prompt.turns) and (prompt.suite, prompt.id, number) not in known
        ]
        if missing:

            def keep(outcome: Outcome, number: int = number) -> None:
                turn = outcome.job.turn
                if outcome.fault is not None:
                    raise UserError(
                        f"server {baseline.name} has no answer to {turn.id} of suite {turn.suite}, which the turn "
                        f"after it needs: {outcome.fault}; the same command goes on"
                    )
                key = (turn.suite, turn.id.removesuffix(turn_suffix(number)), number)
                known[key] = outcome.answer.content
                append_line(path, {**dict(zip(("suite", "id", "turn"), key, strict=True)), "text": known[key]})
                say(f"{turn.id}: answered, for the turn after it")

            run_load(baseline, missing, concurrency, sampling, api_key=api_key, done=keep)
    return [_turn(prompt, number, known) for prompt in prompts for number in range(1, len(prompt.turns) + 1)]


def _turn(prompt: Prompt, number: int, known: dict[tuple[str, str, int], str]) -> Turn:
    messages: list[Message] = []
    for earlier in range(1, number):
        messages += [
            {"role": "user", "content": prompt.turns[earlier - 1]},
            {"role": "assistant", "content": known[prompt.suite, prompt.id, earlier]},
        ]
    messages.append({"role": "user", "content": prompt.turns[number - 1]})
    return Turn(prompt.suite, prompt.id + turn_suffix(number), number, tuple(messages))


# The measuring: every window of the plan in its order.


LEAST_ROUNDS = 2
"""A window asks at least this many requests per request in flight: small suites are gone through several times."""


@dataclass(frozen=True)
class WindowPlan:
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
        """What a window asks: its suite, as often as it takes to keep this many requests in flight."""
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


def measure_servers(plan: WindowPlan, out: Path, measured: Measured, say: Say, api_key: str | None = None) -> None:
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
    plan: WindowPlan,
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
    f = server_figures([window], rows)
    parts = [f"{f['tokens_per_second']:.1f} tok/s"]
    parts += [f"first token {f['first_token']['p50'] * 1000:.0f} ms"] if f["first_token"] else []
    parts += [f"per token {f['per_token']['p50'] * 1000:.1f} ms"] if f["per_token"] else []
    parts += [f"tau {f['acceptance_length']:.2f}"] if f["acceptance_length"] else []
    parts += [f"{f['errors']} of {f['requests']} failed"] if f["errors"] else []
    return ", ".join(parts)
