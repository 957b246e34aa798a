"""The command that measures: bench."""

from __future__ import annotations

from pathlib import Path

import click

from domino_spec.cli.group import cli
from domino_spec.config import UserError
from domino_spec.demo.options import (
    Counts,
    Machine,
    Rivals,
    candidates_option,
    counts_options,
    json_option,
    machine_options,
    max_new_tokens_option,
    rivals_options,
)
from domino_spec.demo.shell import comma_separated, print_json


@cli.command()
@rivals_options
@counts_options
@click.option("--suite", "suites", help="Names (gsm8k,...) or JSONL files of prompts, comma-separated.")
@click.option(
    "--methods",
    default="none,ngram,domino",
    show_default=True,
    help="Comma-separated: none, ngram, dflash, domino, domino-tree, eagle3, dart, transformers, ....",
)
@click.option("--prompts", "--limit", "limit", type=int, help="Prompts per suite; all by default.")
@max_new_tokens_option(default=128)
@click.option("--temperatures", default="0", show_default=True, help="Comma-separated; 0 is greedy.")
@click.option("--thinking/--no-thinking", default=False, show_default=True, help="Let the chat template ask for it.")
@click.option("--num-drafts", help="Drafts per cycle, comma-separated; every method's most by default.")
@candidates_option
@click.option("--repeats", type=int, default=1, show_default=True, help="Measure everything this often.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; repeat r uses seed + r.")
@click.option("--assistant", metavar="MODEL", help="Small transformers model that drafts for transformers-assisted.")
@click.option("--out", type=Path, help="Directory of the measurements and the report.")
@click.option("--compare", nargs=2, type=Path, metavar="A B", help="Two finished benches side by side.")
@machine_options
@json_option
def bench(
    rivals: Rivals,
    counts: Counts,
    suites: str | None,
    methods: str,
    limit: int | None,
    max_new_tokens: int,
    temperatures: str,
    thinking: bool,
    num_drafts: str | None,
    candidates: int,
    repeats: int,
    seed: int,
    assistant: str | None,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compare methods on suites of prompts.

    Writes raw.jsonl, report.json, report.md, report.html and plots to a directory. The same command resumes where it
    stopped.

    \b
    domino-spec bench --suite gsm8k,mt-bench --methods none,ngram,domino --limit 4 --out bench
    domino-spec bench --suite my-prompts.jsonl --draft my-draft --threads 2 --out bench
    domino-spec bench --suite gsm8k --methods none,domino,eagle3 --draft my-domino --draft my-eagle3 --out bench
    domino-spec bench --compare bench-before bench-after
    """
    if compare is not None:
        return _compare(compare, suites, out, machine, as_json)
    if suites is None:
        raise UserError("no suite given: domino-spec bench --suite gsm8k --out DIR, or a JSONL file of prompts")
    if out is None:
        raise UserError("no directory given for the measurements: domino-spec bench --suite SUITE --out DIR")
    names = comma_separated(methods, str, "--methods")
    drafts = rivals.drafts_for(names)
    budgets = comma_separated(num_drafts or "", int, "--num-drafts")
    degrees = comma_separated(temperatures, float, "--temperatures")
    machine.prepare()
    from domino_spec.bench.run import run_bench

    report = run_bench(
        target=rivals.target,
        drafts=drafts,
        suites=comma_separated(suites, str, "--suite"),
        methods=names,
        out=out,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperatures=degrees,
        num_drafts=budgets,
        repeats=repeats,
        threads=machine.threads,
        seed=seed,
        device=machine.device,
        dtype=machine.dtype,
        candidates=candidates or None,
        enable_thinking=thinking,
        assistant=assistant,
        ranking=counts.ranking,
        ngrams=counts.ngrams,
        allow_other_target=rivals.allow_other_target,
    )
    if as_json:
        print_json(report)


def _compare(
    directories: tuple[Path, Path], suites: str | None, out: Path | None, machine: Machine, as_json: bool
) -> None:
    """Two finished benches side by side: printed, or written to a directory."""
    if suites is not None:
        raise UserError("--compare reads two finished benches and measures nothing: leave out --suite")
    machine.prepare()
    from domino_spec.bench.compare import compare_runs, render_comparison, write_comparison

    comparison = compare_runs(*directories)
    if out is not None:
        written = write_comparison(comparison, out)
    if as_json:
        print_json(comparison)
    else:
        click.echo(render_comparison(comparison) if out is None else f"wrote {written}")
