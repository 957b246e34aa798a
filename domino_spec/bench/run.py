"""`domino-spec bench`: from options to a directory of measurements and a report.

Every prompt runs with every contender, one row of raw.jsonl per run. All contenders of a prompt follow each other, and
the first one changes from prompt to prompt, so a machine that slows down or warms up does so for all of them alike.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from domino_spec.api import default_min_confidence
from domino_spec.bench.methods import Contender, Drafting, Run, check_methods, contenders, method_of, runner
from domino_spec.bench.peers import ASSISTED, DFLASH, PEERS, assisted_by, load_baseline, load_peers
from domino_spec.bench.plots import write_plots
from domino_spec.bench.profile import Breakdown, load_breakdowns, measure_breakdown, save_breakdowns
from domino_spec.bench.report import build_report, write_report
from domino_spec.bench.rows import (
    Load,
    Row,
    RunKey,
    append_row,
    device_name,
    machine_load,
    record_session,
    session_record,
    start_or_resume,
)
from domino_spec.bench.suites import EncodedPrompt, check_prompts, load_suites, make_requests, suites_settings
from domino_spec.bench.ties import TextCheck, measure_ties, save_ties
from domino_spec.decoding.request import Generation
from domino_spec.decoding.sampling import seed_of
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft, draft_directory, load_draft
from domino_spec.draft.vocabulary import FrequentTokens
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target

MOST_REPEATS = 10_000
DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCH = 1
"""Requests decoded together; one for now."""
WARM_UP_TOKENS = 8

Say = Callable[[str], None]
"""Takes one line of progress."""


def run_bench(
    *,
    target: str,
    drafts: Sequence[str],
    suites: Sequence[str],
    methods: Sequence[str],
    out: Path,
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = (0.0,),
    num_drafts: Sequence[int] = (),
    repeats: int = 1,
    threads: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    candidates: int | None = DEFAULT_CANDIDATES,
    enable_thinking: bool = False,
    assistant: str | None = None,
    ranking: Path | None = None,
    ngrams: Path | None = None,
    allow_other_target: bool = False,
    check: bool = True,
    breakdown: bool = True,
    say: Say | None = None,
) -> dict[str, Any]:
    """Measure methods on suites of prompts and write raw.jsonl, report.json, report.md, report.html and plots.

    Interrupted at any point, the same call continues where it stopped. Of a conversation every turn is measured, after
    the target's own greedy answers to the turns before it (`suites`).

    Args:
        target: embedded name, directory or hub id.
        drafts: embedded names, directories or hub ids; a method uses the first one of the kind it was made for.
        suites: names or paths, see `suites.load_suite`.
        methods: as `methods.parse_method` reads them.
        out: the bench directory, made when missing.
        limit: conversations per suite; None for all.
        max_new_tokens: per prompt.
        temperatures: each method runs at each; 0 is greedy.
        num_drafts: budgets, drafts per pass; empty for every method's most.
        repeats: how often every run is measured; repeat r uses seed + r.
        threads: of PyTorch on CPU; None leaves its choice.
        seed: of sampling.
        device: "auto", "cpu" or a CUDA device.
        dtype: one of `DTYPES`.
        candidates: K of the head's restricted candidates; None for the whole draft vocabulary.
        enable_thinking: of targets whose chat template knows it.
        assistant: a transformers model, for the methods that are assisted by one.
        ranking: tokens by frequency (`draft.vocabulary`), for methods with `@SIZE`.
        ngrams: counts of text (`drafters.ngram_counts`), for method `dart`.
        allow_other_target: accept a draft trained for other weights of the same shape.
        check: as `load_target` takes it.
        breakdown: time the stages of a cycle too, at a real context.
        say: takes lines of progress; None prints them to stderr.

    Returns:
        What report.json holds.

    Raises:
        UserError: an option that cannot be used, or `out` holds another configuration's measurements.
    """
    say = say or print_progress
    methods, temperatures = list(dict.fromkeys(methods)), list(dict.fromkeys(float(t) for t in temperatures))
    if repeats > MOST_REPEATS:
        raise UserError(f"bench needs repeats of at most {MOST_REPEATS}, got {repeats}")
    check_numbers(temperatures=len(temperatures), max_new_tokens=max_new_tokens, repeats=repeats, suites=len(suites))
    check_methods(methods, temperatures)
    prompts = load_suites(suites, limit)
    loaded, drafted = _load_models(target, drafts, threads, device, dtype, allow_other_target, check)
    check_prompts(loaded, prompts, max_new_tokens, enable_thinking)
    drafting = Drafting(
        loaded,
        drafted,
        None if ranking is None else FrequentTokens.load(ranking),
        None if ngrams is None else NgramModel.load(ngrams),
    )
    competing = contenders(drafting, methods, num_drafts, temperatures)
    planned = sum(len(prompt.turns) for prompt in prompts) * len(competing) * repeats
    outside = [c.method for c in competing if method_of(c.method).drafting is None]
    baseline = load_baseline(loaded) if outside else None
    names_of = {id(draft): name for draft, name in zip(drafted, drafts, strict=True)}
    taken = {c.method: names_of.get(id(drafting.draft_for(c.method.partition("@")[0]))) for c in competing}
    peers = load_peers(baseline, loaded, outside, taken.get(DFLASH), assistant) if {*outside} & {*PEERS} else None
    configuration = {
        "target": target,
        "target_fingerprint": loaded.fingerprint,
        "drafts": [{"name": name, "digest": _weights_digest(name)} for name in drafts],
        "draft_of_method": {method: name for method, name in taken.items() if name is not None},
        "ranking": None if ranking is None else {"name": str(ranking), "digest": _digest([ranking])},
        "ngrams": None if ngrams is None else {"name": str(ngrams), "digest": _digest([ngrams])},
        "assistant": assisted_by(loaded, assistant) if ASSISTED in outside else assistant,
        **suites_settings(prompts, limit),
        "methods": methods,
        "temperatures": temperatures,
        "num_drafts": sorted({c.budget for c in competing if c.budget}),
        "candidates": candidates,
        "min_confidence": default_min_confidence(loaded.device),
        "max_new_tokens": max_new_tokens,
        "repeats": repeats,
        "planned_runs": planned,
        "seed": seed,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "packed_weights": loaded.packed,
        "thinking": enable_thinking,
    }
    rows = start_or_resume(out, configuration)
    if len(rows) < planned:
        record_session(out, session_record(len(rows)))
    requests = make_requests(loaded, prompts, max_new_tokens, out, enable_thinking, say)
    plan = RunPlan(requests, competing, repeats, max_new_tokens, seed)
    if len(rows) < planned:
        run = runner(drafting, baseline, candidates, peers)
        rows = measure(plan, run, out, rows, say)
    save_ties(measure_ties(loaded, requests, rows), out)
    if breakdown and drafted and not load_breakdowns(out):
        say("timing the stages of a cycle")
        save_breakdowns(_breakdowns(drafting, plan, rows, candidates), out)
    report = write_report(out, write_plots(build_report(out), out))
    say(f"wrote {out / 'report.md'} and {out / 'report.html'}")
    return report


def check_numbers(**numbers: int) -> None:
    """Refuse numbers below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"bench needs {name} of at least 1, got {value}")


def _load_models(
    target: str,
    drafts: Sequence[str],
    threads: int | None,
    device: str,
    dtype: str,
    allow_other_target: bool = False,
    check: bool = True,
) -> tuple[Target, list[AnyDraft]]:
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if threads is not None:
        check_numbers(threads=threads)
        torch.set_num_threads(threads)
    loaded = load_target(target, dtype=dtype, device=device, check=check)
    return loaded, [load_draft(draft, loaded, allow_other_target=allow_other_target) for draft in drafts]


def _weights_digest(draft: str) -> str:
    """A short name for the draft's files, so that a retrained draft at the same place is noticed."""
    directory = draft_directory(draft)
    return _digest(sorted([directory / "config.json", *directory.glob("*.safetensors")]))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _breakdowns(drafting: Drafting, plan: RunPlan, rows: Sequence[Row], candidates: int | None) -> list[Breakdown]:
    """The stages of every greedy chain of a block draft, in the middle of the answer to the prompt of median length."""
    request = sorted(plan.requests, key=lambda r: len(r.token_ids))[len(plan.requests) // 2]
    context = _middle_of_answer(request, rows)
    wanted: dict[Contender, None] = {}
    for c in plan.contenders:
        if c.method in ("domino", "dflash"):
            wanted[c._replace(temperature=0.0)] = None
    found = []
    for c in wanted:
        draft = drafting.draft_for(c.method)
        assert draft is not None
        found.append(
            measure_breakdown(
                drafting.target, draft, context, method=c.method, num_drafts=c.budget, candidates=candidates
            )
        )
    return found


def _middle_of_answer(request: EncodedPrompt, rows: Sequence[Row]) -> list[int]:
    answer = next(row.token_ids for row in rows if (row.suite, row.id) == (request.suite, request.id))
    return request.token_ids + list(answer[: max(1, len(answer) // 2)])


def print_progress(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


# The measuring: every run of the plan in its order, one row each.


@dataclass(frozen=True)
class RunPlan:
    """Everything that is to be measured."""

    requests: Sequence[EncodedPrompt]
    contenders: Sequence[Contender]
    repeats: int
    max_new_tokens: int
    seed: int
    """Repeat r of a run uses seed + r."""

    def runs(self) -> Iterator[tuple[RunKey, EncodedPrompt, Contender]]:
        """All runs in the order in which they are measured."""
        for repeat in range(self.repeats):
            for index, request in enumerate(self.requests):
                order = deque(self.contenders)
                order.rotate(-(index + repeat))
                for contender in order:
                    yield RunKey(request.suite, request.id, *contender, repeat), request, contender


def measure(plan: RunPlan, run: Run, out: Path, rows: Sequence[Row], say: Say) -> list[Row]:
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
        before = machine_load()
        generation = run(contender, request.token_ids, seed, plan.max_new_tokens)
        row = _row(key, seed, request, generation, before, machine_load())
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


def _row(key: RunKey, seed: int, request: EncodedPrompt, generation: Generation, before: Load, after: Load) -> Row:
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
