"""`domino-spec bench`: from options to a directory of measurements and a report."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from domino_spec.api import default_min_confidence
from domino_spec.bench import environment
from domino_spec.bench.baseline import load_baseline
from domino_spec.bench.breakdown import Breakdown, measure_breakdown
from domino_spec.bench.html import write_html
from domino_spec.bench.measure import BATCH, Plan, Say, measure
from domino_spec.bench.methods import Contender, Drafting, check_methods, contenders, method_of, runner
from domino_spec.bench.peers import ASSISTED, DFLASH, PEERS, assisted_by, load_peers
from domino_spec.bench.plots import write_plots
from domino_spec.bench.report import build_report, load_breakdowns, save_breakdowns, write_report
from domino_spec.bench.rows import Row, record_session, start_or_resume
from domino_spec.bench.suites import load_suites, prompts_digest
from domino_spec.bench.ties import measure_ties, save_ties
from domino_spec.bench.turns import Request, check_prompts, make_requests
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft, draft_directory, load_draft
from domino_spec.draft.vocabulary import FrequentTokens
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target

MOST_REPEATS = 10_000
DTYPES = ("auto", "float32", "bfloat16", "float16")


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

    Interrupted at any point, the same call goes on where it stopped. Of a conversation every turn is measured, after
    the target's own greedy answers to the turns before it (`turns`).

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
        threads: of PyTorch on CPU; None leaves its own choice.
        seed: of sampling.
        device: "auto", "cpu" or a CUDA device.
        dtype: one of `DTYPES`.
        candidates: K of the head's restricted candidates; None for the whole draft vocabulary.
        enable_thinking: of targets whose chat template knows it.
        assistant: a transformers model, for the methods that are assisted by one.
        ranking: tokens by frequency (`drafters.vocabulary`), for methods with `@SIZE`.
        ngrams: counts of text (`drafters.ngram_model`), for method `dart`.
        allow_other_target: accept a draft trained for other weights of the same shape.
        check: as `load_target` takes it.
        breakdown: time the stages of a cycle too, at a real context.
        say: takes lines of progress; None prints them to stderr.

    Returns:
        What report.json holds.

    Raises:
        UserError: an option that cannot be used, or `out` holds another configuration's measurements.
    """
    say = say or _print_progress
    methods, temperatures = list(dict.fromkeys(methods)), list(dict.fromkeys(float(t) for t in temperatures))
    if repeats > MOST_REPEATS:
        raise UserError(f"bench needs repeats of at most {MOST_REPEATS}, got {repeats}")
    _check_numbers(temperatures=len(temperatures), max_new_tokens=max_new_tokens, repeats=repeats, suites=len(suites))
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
    names = list(dict.fromkeys(prompt.suite for prompt in prompts))
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
        "suites": {name: sum(p.suite == name for p in prompts) for name in names},
        "turns": {name: sum(len(p.turns) for p in prompts if p.suite == name) for name in names},
        "prompts_digest": prompts_digest(prompts),
        "limit": limit,
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
        "device_name": environment.device_name(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "packed_weights": loaded.packed,
        "thinking": enable_thinking,
    }
    rows = start_or_resume(out, configuration)
    if len(rows) < planned:
        record_session(out, environment.session(len(rows)))
    requests = make_requests(loaded, prompts, max_new_tokens, out, enable_thinking, say)
    plan = Plan(requests, competing, repeats, max_new_tokens, seed)
    if len(rows) < planned:
        run = runner(drafting, baseline, candidates, peers)
        rows = measure(plan, run, out, rows, say)
    save_ties(measure_ties(loaded, requests, rows), out)
    if breakdown and drafted and not load_breakdowns(out):
        say("timing the stages of a cycle")
        save_breakdowns(_breakdowns(drafting, plan, rows, candidates), out)
    plots = write_plots(build_report(out), out)
    report = write_report(out, plots)
    write_html(report, out, plots)
    say(f"wrote {out / 'report.md'} and {out / 'report.html'}")
    return report


def _check_numbers(**numbers: int) -> None:
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
        _check_numbers(threads=threads)
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


def _breakdowns(drafting: Drafting, plan: Plan, rows: Sequence[Row], candidates: int | None) -> list[Breakdown]:
    """The stages of every greedy chain of a block draft, in the middle of the answer to the prompt of median length."""
    request = sorted(plan.requests, key=lambda r: len(r.token_ids))[len(plan.requests) // 2]
    context = _middle_of_answer(request, rows)
    wanted: dict[Contender, None] = {}
    for c in plan.contenders:
        if c.method in ("domino", "dflash"):
            wanted[Contender(c.method, c.budget, 0.0)] = None
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


def _middle_of_answer(request: Request, rows: Sequence[Row]) -> list[int]:
    answer = next(row.token_ids for row in rows if (row.suite, row.id) == (request.suite, request.id))
    return request.token_ids + list(answer[: max(1, len(answer) // 2)])


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
