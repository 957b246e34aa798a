"""The command that measures: bench, of methods in this process or of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from domino_spec.cli.group import cli, comma_separated, print_json
from domino_spec.cli.options import (
    FINITE,
    Counts,
    Machine,
    Rivals,
    asked_for,
    candidates_option,
    counts_options,
    json_option,
    machine_options,
    max_new_tokens_option,
    rivals_options,
)
from domino_spec.settings import UserError, require_extra

OF_METHODS = frozenset(
    (
        *("target", "drafts", "allow_other_target", "ranking", "ngrams", "methods", "num_drafts", "candidates"),
        *("assistant", "compare", "device", "dtype", "threads"),
    )
)
OF_SERVERS = frozenset(("concurrency", "api_key", "served_model", "request_timeout"))
"""Parameters that only one of the two kinds of bench has."""


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
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="[NAME=]URL",
    help="Measure this OpenAI-compatible server; may be repeated. The one named none, else the first, is the baseline.",
)
@click.option(
    "--concurrency", default="1,2,4,8,16,32", show_default=True, help="With --server: requests in flight, by commas."
)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="With --server: of the servers; OPENAI_API_KEY is safer.")
@click.option("--served-model", metavar="NAME", help="With --server: the model's name there; the only one by default.")
@click.option(
    "--request-timeout", type=FINITE, default=600.0, show_default=True, help="With --server: seconds per request."
)
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
    servers: tuple[str, ...],
    concurrency: str,
    api_key: str | None,
    served_model: str | None,
    request_timeout: float,
    compare: tuple[Path, Path] | None,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compare methods, or servers, on suites of prompts.

    Writes raw.jsonl, report.json, report.md, report.html and plots to a directory. The same command resumes where it
    stopped.

    \b
    domino-spec bench --suite gsm8k,mt-bench --methods none,ngram,domino --limit 4 --out bench
    domino-spec bench --suite my-prompts.jsonl --draft my-draft --threads 2 --out bench
    domino-spec bench --suite gsm8k --methods none,domino,eagle3 --draft my-domino --draft my-eagle3 --out bench
    domino-spec bench --compare bench-before bench-after
    domino-spec bench --suite gsm8k --server none=http://127.0.0.1:8001/v1 --server http://127.0.0.1:8000/v1 --out bench
    """
    _refuse_options(OF_METHODS if servers else OF_SERVERS, bool(servers))
    if compare is not None:
        return _compare(compare, suites, out, machine, as_json)
    if suites is None:
        raise UserError("no suite given: domino-spec bench --suite gsm8k --out DIR, or a JSONL file of prompts")
    if out is None:
        raise UserError("no directory given for the measurements: domino-spec bench --suite SUITE --out DIR")
    if servers:
        require_extra("bench", "bench")
        machine.prepare()
        from domino_spec.bench.server.run import run_server_bench

        report = run_server_bench(
            servers=servers,
            suites=comma_separated(suites, str, "--suite"),
            out=out,
            concurrency=comma_separated(concurrency, int, "--concurrency"),
            limit=limit,
            max_new_tokens=max_new_tokens,
            temperatures=comma_separated(temperatures, float, "--temperatures"),
            repeats=repeats,
            seed=seed,
            thinking=thinking,
            api_key=api_key,
            model=served_model,
            request_timeout=request_timeout,
        )
        return _print(report, as_json)
    names = comma_separated(methods, str, "--methods")
    budgets = comma_separated(num_drafts or "", int, "--num-drafts")
    degrees = comma_separated(temperatures, float, "--temperatures")
    require_extra("bench", "bench")
    machine.prepare(rivals.target)
    from domino_spec.bench.methods import check_options, needs_draft
    from domino_spec.bench.run import run_bench

    check_options(names, asked_for("num_drafts", "candidates", "ngrams"))
    report = run_bench(
        target=rivals.target,
        drafts=rivals.drafts_for([name for name in names if needs_draft(name)]),
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
        check=not machine.no_check,
    )
    _print(report, as_json)


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)


def _refuse_options(names: frozenset[str], of_servers: bool) -> None:
    """Options that the other kind of bench has, given on the command line."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in names:
            name = option.opts[0]
            raise UserError(
                f"{name} is of methods that this process runs: leave it out with --server"
                if of_servers
                else f"{name} goes with --server URL"
            )


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
