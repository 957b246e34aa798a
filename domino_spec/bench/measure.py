"""The measuring itself: every prompt with every contender, interleaved, one row of raw.jsonl per run.

All contenders of a prompt follow each other, and who goes first moves on from prompt to prompt, so a machine that slows
down or warms up does so for all of them alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from domino_spec.bench import environment
from domino_spec.bench.methods import Contender, Run
from domino_spec.bench.rows import Row, RunKey, append_row
from domino_spec.bench.ties import TextCheck
from domino_spec.bench.turns import Request
from domino_spec.decoding.request import Generation
from domino_spec.decoding.sampling import seed_of

BATCH = 1
"""Requests decoded together; one for now."""
WARM_UP_TOKENS = 8

Say = Callable[[str], None]
"""Takes one line of progress."""


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured."""

    requests: Sequence[Request]
    contenders: Sequence[Contender]
    repeats: int
    max_new_tokens: int
    seed: int
    """Repeat r of a run uses seed + r."""

    def runs(self) -> Iterator[tuple[RunKey, Request, Contender]]:
        """All runs in the order in which they are measured."""
        for repeat in range(self.repeats):
            for index, request in enumerate(self.requests):
                order = deque(self.contenders)
                order.rotate(-(index + repeat))
                for contender in order:
                    key = RunKey(
                        request.suite,
                        request.id,
                        contender.method,
                        contender.budget,
                        contender.temperature,
                        repeat,
                    )
                    yield key, request, contender


def measure(plan: Plan, run: Run, out: Path, rows: Sequence[Row], say: Say) -> list[Row]:
    """Measure what is not there yet, appending to `out`/raw.jsonl as it goes.

    Args:
        plan: what to measure.
        run: decodes one prompt.
        out: the bench directory, prepared by `rows.start_or_resume`.
        rows: what it already holds.
        say: called with a line of progress after every prompt, and at once when a greedy text differs from a
            reference's.

    Returns:
        All rows, old and new.
    """
    rows = list(rows)
    done = {row.key for row in rows}
    pending = [entry for entry in plan.runs() if entry[0] not in done]
    warm: set[Contender] = set()
    for _, request, contender in pending:
        if contender not in warm:
            warm.add(contender)
            run(contender, request.token_ids, plan.seed, min(WARM_UP_TOKENS, plan.max_new_tokens))
    texts = TextCheck(rows)
    started = time.perf_counter()
    line: list[str] = []
    for count, (key, request, contender) in enumerate(pending, 1):
        seed = seed_of(plan.seed, key.repeat)
        before = environment.load()
        generation = run(contender, request.token_ids, seed, plan.max_new_tokens)
        row = _row(key, seed, request, generation, before, environment.load())
        append_row(out, row)
        rows.append(row)
        line.append(_figures(row))
        place = f"[{len(rows)}/{len(rows) - count + len(pending)}] {key.id}"
        for difference in texts.add(row):
            say(f"{place}: {difference}")
        if count == len(pending) or pending[count][1] is not request:
            left = (time.perf_counter() - started) / count * (len(pending) - count)
            say(f"{place}: {', '.join(line)}; {_duration(left)} left")
            line = []
    return rows


def _row(
    key: RunKey, seed: int, request: Request, generation: Generation, before: environment.Load, after: environment.Load
) -> Row:
    stolen = None
    if before["steal_seconds"] is not None and after["steal_seconds"] is not None:
        stolen = round(after["steal_seconds"] - before["steal_seconds"], 3)
    return Row(
        **key._asdict(),
        seed=seed,
        batch=BATCH,
        threads=torch.get_num_threads(),
        prompt_tokens=len(request.token_ids),
        token_ids=tuple(generation.token_ids),
        num_verify_passes=generation.num_verify_passes,
        num_drafts=tuple(generation.num_drafts),
        acceptance_lengths=tuple(generation.acceptance_lengths),
        seconds_prefill=generation.seconds_prefill,
        seconds_decode=generation.seconds_decode,
        turn=request.turn,
        load_average=after["load_average"],
        steal_seconds=stolen,
    )


def _figures(row: Row) -> str:
    name = (
        row.method + (f"({row.budget})" if row.budget else "") + (f" T={row.temperature:g}" if row.temperature else "")
    )
    speed = f"{row.decode_tokens / row.seconds_decode:.1f} tok/s" if row.seconds_decode else "one token"
    drafted = row.budget and row.num_verify_passes  # a peer's first pass may bring all tokens
    tau = f" tau {sum(row.acceptance_lengths) / row.num_verify_passes:.2f}" if drafted else ""
    return f"{name} {speed}{tau}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 100 else f"{minutes} min"
