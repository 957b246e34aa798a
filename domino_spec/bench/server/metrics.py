"""The acceptance length as engines report it themselves: counters of /metrics before and after a window.

domino-spec   verify passes, accepted drafts, drafts
vLLM          vllm:spec_decode_num_drafts, ..._num_accepted_tokens: 1 + accepted / drafts, passes that had drafts
SGLang        counts of every answer (asked for by `return_spec_tokens_details`), else with --enable-metrics
              sglang:spec_verify_calls, generation_tokens and num_requests, else the server's average since its
              start in /server_info
others        what their answers say in usage (num_verify_passes, num_accepted_drafts), else nothing
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from domino_spec.bench.rows import Reading, RequestRow, WindowRow
from domino_spec.clients.openai import Client, Fault

OWN = ("domino_spec_verify_passes_total", "domino_spec_accepted_drafts_total", "domino_spec_drafts_total")
VLLM = ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
SGLANG = ("sglang:spec_verify_calls_total", "sglang:generation_tokens_total", "sglang:num_requests_total")
SGLANG_AVERAGE = "avg_spec_accept_length"
NOT_REPORTED, NOTHING_DRAFTED = "not reported", "nothing drafted"
_NAMES = frozenset((*OWN, *VLLM, *SGLANG))
_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)(?:\s+\d+)?")
_TRIES, _PAUSE = 20, 0.1
"""Reads until a server's figures no longer change, and the seconds between two."""
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Acceptance:
    """How drafting did in some windows."""

    length: float | None
    """tau: mean of accepted drafts + 1 over verify passes; None if no source states it, or nothing was drafted."""
    source: str
    """Where it is from, or why it is not there."""


def read_metrics(client: Client, engine: str) -> dict[str, float]:
    """What a server says of its drafting, by name; empty if it has no metrics."""
    found: dict[str, float] = {}
    with contextlib.suppress(Fault):
        found = parse_metrics(client.get("/metrics", _TIMEOUT, at_root=True))
    if engine == "sglang" and SGLANG[0] not in found:
        with contextlib.suppress(Fault, ValueError, KeyError, IndexError, TypeError):
            states = json.loads(client.get("/server_info", _TIMEOUT, at_root=True))["internal_states"]
            found[SGLANG_AVERAGE] = float(states[0][SGLANG_AVERAGE])
    return found


def parse_metrics(text: str) -> dict[str, float]:
    """The counters that matter here, of Prometheus' text format; those of several engines or labels are added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is not None and sample[1] in _NAMES:
            try:
                found[sample[1]] = found.get(sample[1], 0.0) + float(sample[2])
            except ValueError:
                continue
    return found


def settled_metrics(read: Callable[[], Mapping[str, float]], pause: float = _PAUSE) -> tuple[Mapping[str, float], bool]:
    """A server's figures once they no longer change: some are counted a moment after the answer.

    Args:
        read: asks for them.
        pause: seconds between two reads.

    Returns:
        The figures, and whether they stopped changing; if not, another client uses this server too.
    """
    last = read()
    for _ in range(_TRIES if last else 0):
        time.sleep(pause)
        again = read()
        if again == last:
            return last, True
        last = again
    return last, not last


def readings(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Reading, ...]:
    """Figures before and after, as a window keeps them; a counter that first appears later was 0."""
    return tuple(Reading(name, before.get(name, 0.0), value) for name, value in sorted(after.items()))


def acceptance(windows: Sequence[WindowRow], requests: Iterable[RequestRow]) -> Acceptance:
    """The acceptance length over some windows of one server, from the best source that it has."""
    grown: dict[str, float] = {}
    for window in windows:
        for reading in window.readings:
            grown[reading.name] = grown.get(reading.name, 0.0) + reading.after - reading.before
    for names in (OWN, VLLM):
        if names[0] in grown:
            passes, accepted, drafts = (grown.get(name, 0.0) for name in (names[0], names[1], names[-1]))
            drafted = drafts if names is OWN else passes
            if passes <= 0 or drafted <= 0:
                return Acceptance(None, NOTHING_DRAFTED)
            return Acceptance(1 + accepted / passes, "counters of /metrics")
    stated = [
        (r.verify_passes, r.accepted_drafts) for r in requests if r.verify_passes and r.accepted_drafts is not None
    ]
    if stated:
        return Acceptance(1 + sum(a for _, a in stated) / sum(p for p, _ in stated), "the answers themselves")
    calls, tokens, answers = (grown.get(name, 0.0) for name in SGLANG)
    if calls > 0:  # the first token of every answer comes with the prompt, not from a verify pass
        return Acceptance((tokens - answers) / calls, "counters of /metrics")
    averages = [r.after for window in windows for r in window.readings if r.name == SGLANG_AVERAGE]
    if averages:
        return Acceptance(averages[-1], "the server's average since its start")
    return Acceptance(None, NOT_REPORTED)
