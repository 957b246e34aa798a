"""`domino-spec bench --server`: from addresses of servers to a directory of measurements and a report.

The protocol of the paper's Tables 2 and 3: throughput of each server at several numbers of requests in flight, beside
the same engine without a draft, in one run. Any OpenAI-compatible server can be measured.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from domino_spec.bench import environment
from domino_spec.bench.measure import Say
from domino_spec.bench.rows import record_session, take_directory
from domino_spec.bench.server.load import Sampling
from domino_spec.bench.server.measure import Plan, measure_servers
from domino_spec.bench.server.plots import write_server_plots
from domino_spec.bench.server.probe import Endpoint, baseline_of, parse_servers, probe
from domino_spec.bench.server.prompts import make_turns
from domino_spec.bench.server.report import build_report, write_report
from domino_spec.bench.server.rows import read_measured
from domino_spec.bench.suites import load_suites, prompts_digest
from domino_spec.bench.turns import check_ids
from domino_spec.settings import UserError

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

    Interrupted at any point, the same call goes on with the window that it was in.

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
    say = say or _print_progress
    levels, degrees = sorted(set(concurrency)), list(dict.fromkeys(float(t) for t in temperatures))
    _check(levels, degrees, max_new_tokens, repeats, seed, request_timeout, len(suites))
    addresses = parse_servers(servers)
    prompts = load_suites(suites, limit)
    check_ids(prompts)
    endpoints = [probe(n, url, model=model, api_key=api_key, thinking=thinking) for n, url in addresses.items()]
    baseline = next(e for e in endpoints if e.name == baseline_of(list(addresses)))
    names = list(dict.fromkeys(prompt.suite for prompt in prompts))
    planned = len(names) * len(degrees) * len(levels) * repeats * len(endpoints)
    configuration = {
        "servers": {endpoint.name: _described(endpoint) for endpoint in endpoints},
        "baseline": baseline.name,
        "suites": {name: sum(p.suite == name for p in prompts) for name in names},
        "turns": {name: sum(len(p.turns) for p in prompts if p.suite == name) for name in names},
        "prompts_digest": prompts_digest(prompts),
        "limit": limit,
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
        plan = Plan(turns, endpoints, levels, degrees, repeats, max_new_tokens, seed, thinking, request_timeout)
        measure_servers(plan, out, measured, say, api_key)
    report = build_report(out)
    write_report(out, report, write_server_plots(report, out))
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
    for name, value in {**numbers, "temperatures": len(temperatures), "suites": suites}.items():
        if value < 1:
            raise UserError(f"bench needs {name} of at least 1, got {value}")
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
    session = environment.session(windows_before)
    session["command"] = shlex.join("--api-key=..." if w.startswith("--api-key=") else w for w in hidden)
    session["servers"] = {e.name: " ".join(filter(None, (e.engine, e.version))) for e in endpoints}
    session["client"] = environment.device_name(torch.device("cpu"))
    return session


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
