"""The command line: one command per verb, each thin. PyTorch and transformers are imported only inside commands.

What a user can get wrong ends in one line on standard error and exit status 2; Ctrl-C ends in status 130.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from domino_spec import __version__
from domino_spec.config import UserError
from domino_spec.demo.options import (
    METHODS,
    Machine,
    Pair,
    candidates_option,
    json_option,
    machine_options,
    max_new_tokens_option,
    num_drafts_option,
    pair_options,
    verbose_option,
)
from domino_spec.demo.shell import OneLineErrors, comma_separated, console, prepare, print_json, read_prompt, status
from domino_spec.recipe import load_recipe


@click.group(cls=OneLineErrors, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="domino-spec")
@click.pass_context
def cli(context: click.Context) -> None:
    """Make a language model write faster without changing what it writes.

    A small draft proposes the next tokens, the target checks them in one pass, and what it agrees with is kept.

    \b
    domino-spec demo
    domino-spec generate "Why is the sky blue?" --show-drafts
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.argument("prompt", required=False)
@pair_options
@click.option("--method", type=click.Choice(METHODS), help="How to draft; the draft's own method by default.")
@max_new_tokens_option(default=256)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens that together reach this.")
@click.option("--top-k", type=int, default=0, help="Keep this many of the likeliest tokens; 0 keeps all.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@num_drafts_option
@candidates_option
@click.option("--min-confidence", type=float, help="End a draft where its token is less probable; measured default.")
@click.option("--sample-drafts/--argmax-drafts", default=None, help="Above temperature 0, sample drafts, or not.")
@click.option("--exact", is_flag=True, help="Refuse a target whose verify pass may round otherwise than plain steps.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--show-drafts", is_flag=True, help="Set drafted and accepted text apart from what the target supplied.")
@machine_options
@json_option
def generate(
    prompt: str | None,
    pair: Pair,
    method: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    num_drafts: int | None,
    candidates: int,
    min_confidence: float | None,
    sample_drafts: bool | None,
    exact: bool,
    raw: bool,
    show_drafts: bool,
    machine: Machine,
    as_json: bool,
) -> None:
    """Answer PROMPT ("-" is standard input), printed as it is written.

    \b
    domino-spec generate "Why is the sky blue?" --show-drafts
    domino-spec generate - --method ngram --json < question.txt
    """
    prompt = read_prompt(prompt)
    machine.prepare()
    from domino_spec.api import default_method, stream
    from domino_spec.decoding.generate import Generation, Limits
    from domino_spec.decoding.sampling import SamplingSettings
    from domino_spec.demo.record import generation_record
    from domino_spec.demo.terminal import AnswerWriter, MarkedText

    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    Limits(max_new_tokens, stop)  # what is wrong with these is said before a model is loaded
    draft_name = pair.draft_for((method,))
    target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
    method = method or default_method(draft, sample_drafts=sample_drafts)
    generations: list[Generation] = []
    cycles = stream(
        target,
        draft,
        [prompt],
        method=method,
        settings=settings,
        max_new_tokens=max_new_tokens,
        stop=stop,
        num_drafts=num_drafts,
        candidates=candidates or None,
        min_confidence=min_confidence,
        sample_drafts=sample_drafts,
        exact=exact,
        chat=not raw,
        generations=generations,
    )
    text, writer = MarkedText(target, stop), None
    for _ in cycles:
        if not as_json:
            writer = writer or AnswerWriter(console(), show_drafts)
            writer.write(text.advance(generations[0]))
    if writer is not None:
        writer.finish(generations[0])
    else:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        print_json({**generation_record(generations[0], target, draft_name, method), **sampling})


@cli.command()
@pair_options
@click.option("--method", type=click.Choice(METHODS[:-1]), help="How to draft; the draft's own method by default.")
@click.option("--prompt", multiple=True, help="Ask this instead of the demo's own prompts; may be repeated.")
@max_new_tokens_option(default=96)
@num_drafts_option
@machine_options
@json_option
def demo(
    pair: Pair,
    method: str | None,
    prompt: tuple[str, ...],
    max_new_tokens: int,
    num_drafts: int | None,
    machine: Machine,
    as_json: bool,
) -> None:
    """Race the target alone against the target with a draft.

    Both answer the same prompts, side by side, with live counters; the last line gives the speed-up.

    \b
    domino-spec demo
    domino-spec demo --prompt "Tell me about the moon." --max-new-tokens 200
    """
    machine.prepare()
    from domino_spec.decoding.generate import Limits
    from domino_spec.demo.race import PROMPTS, race, warm_up
    from domino_spec.demo.record import races_record
    from domino_spec.demo.terminal import RaceView, summary

    Limits(max_new_tokens)
    draft_name = pair.draft_for((method,))
    target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
    options: dict[str, Any] = {"method": method, "num_drafts": num_drafts}
    with status("Warming up"):
        warm_up(target, draft, **options)
    terminal, results = console(shown=not as_json), []
    for text in prompt or PROMPTS:
        with RaceView(terminal, text, max_new_tokens) as view:
            results.append(race(target, draft, text, max_new_tokens=max_new_tokens, on_cycle=view.update, **options))
        view.report(target, results[-1])
    if as_json:
        print_json(races_record(results, target, draft_name))
    elif len(results) > 1:
        terminal.print(summary(results))


@cli.command()
@click.argument("recipe", type=Path)
@click.option("--out", type=Path, help="JSONL of answers to append to; the recipe's data.responses by default.")
@click.option("--draft", help="Answer faster with this draft; which answers are likely stays the same.")
@click.option("--server", metavar="URL", help="Let this OpenAI-compatible server of the target answer.")
@machine_options
@json_option
def regenerate(
    recipe: Path, out: Path | None, draft: str | None, server: str | None, machine: Machine, as_json: bool
) -> None:
    """Let the target answer the prompts of RECIPE.

    Its answers are the training data of a draft. The same command resumes where it stopped.

    \b
    domino-spec regenerate my-draft.yaml
    domino-spec regenerate my-draft.yaml --out answers.jsonl --device cuda
    domino-spec regenerate my-draft.yaml --server http://localhost:8000
    """
    settings = load_recipe(recipe)
    machine.prepare()
    from domino_spec.demo.answering import answer_recipe, result_lines

    out = out or Path(settings.data.responses)
    result = answer_recipe(settings, out, draft, server, machine, shown=not as_json)
    if as_json:
        print_json({"out": str(out), **asdict(result)})
    else:
        click.echo("\n".join(result_lines(out, result)))


@cli.command()
@click.argument("recipe", type=Path)
@click.option("--out", type=Path, help="Directory of the run; an interrupted run in it is resumed.")
@click.option("--features", type=Path, help="Directory of the feature cache; OUT/features by default.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, without loading weights or training.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N.")
@click.option("--threads", type=int, help="CPU threads; PyTorch's choice by default.")
@verbose_option
@json_option
def train(
    recipe: Path,
    out: Path | None,
    features: Path | None,
    dry_run: bool,
    device: str,
    threads: int | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Train the draft of RECIPE into a run directory.

    The same command resumes where it stopped.

    \b
    domino-spec train my-draft.yaml --dry-run
    domino-spec train my-draft.yaml --out runs/my-draft
    """
    settings = load_recipe(recipe)
    Machine(device, "auto", threads, verbose).prepare()
    if dry_run:
        from domino_spec.training.estimate import estimate_lines, estimate_training

        estimate = estimate_training(settings)
        return print_json(asdict(estimate)) if as_json else click.echo("\n".join(estimate_lines(estimate)))
    if out is None:
        raise UserError("no directory given for the run: domino-spec train RECIPE --out RUN")
    from domino_spec.demo.progress import TrainingView
    from domino_spec.training.parallel import is_first_process
    from domino_spec.training.plots import last_metrics
    from domino_spec.training.report import write_report
    from domino_spec.training.run import run_training

    with TrainingView(console(), shown=is_first_process() and not as_json) as view:
        run_training(settings, out, device=device, features=features, **view.callbacks)
    if not is_first_process():
        return
    report = write_report(out)
    if as_json:
        print_json({"draft": str(out / "draft"), "report": str(report), **last_metrics(out / "metrics.jsonl")})
    else:
        click.echo(f"the draft is in {out / 'draft'}, the report on its training is {report}")


@cli.command()
@click.argument("run", type=Path)
@click.option("--out", type=Path, required=True, help="Directory of the draft to write.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True, help="Of the tensors.")
@verbose_option
@json_option
def export(run: Path, out: Path, dtype: str, verbose: bool, as_json: bool) -> None:
    """Write the draft of a training RUN as a checkpoint.

    It has the published layout, which other tools read.

    \b
    domino-spec export runs/my-draft --out my-draft
    """
    prepare(verbose)
    import torch

    from domino_spec.training.export import export_draft

    draft = export_draft(run, out, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    parameters = sum(p.numel() for p in draft.parameters())
    if as_json:
        print_json({"draft": str(out), "parameters": parameters, "dtype": dtype})
    else:
        click.echo(f"{out}: {parameters:,} parameters in {dtype}; decode with --draft {out}")


@cli.command()
@click.argument("draft")
@click.option("--target", help="Say whether the draft fits this target: smollm2-135m, a directory or a hub id.")
@verbose_option
@json_option
def inspect(draft: str, target: str | None, verbose: bool, as_json: bool) -> None:
    """Say what DRAFT is, and whether it fits a target.

    The exit status is 2 where it does not fit.

    \b
    domino-spec inspect smollm2-135m-domino --target smollm2-135m
    """
    prepare(verbose)
    from domino_spec.demo.record import draft_lines, draft_record
    from domino_spec.draft.describe import check_fit, describe_draft
    from domino_spec.draft.load import draft_directory

    description, fit = describe_draft(draft_directory(draft)), None
    if target is not None:
        with status(f"Comparing with {target}"):
            fit = check_fit(description.config, draft, target)
    if as_json:
        print_json(draft_record(draft, description, fit))
    else:
        click.echo("\n".join(draft_lines(draft, description, fit)))
    if fit is not None and not fit.fits:
        raise UserError(fit.sentence)


@cli.command()
@pair_options
@click.option("--suite", "suites", required=True, help="Names (gsm8k,...) or JSONL files of prompts, comma-separated.")
@click.option(
    "--methods",
    default="none,ngram,domino",
    show_default=True,
    help="Comma-separated: none, ngram, dflash, domino, domino+ngram, transformers, ....",
)
@click.option("--prompts", "--limit", "limit", type=int, help="Prompts per suite; all by default.")
@max_new_tokens_option(default=128)
@click.option("--temperatures", default="0", show_default=True, help="Comma-separated; 0 is greedy.")
@click.option("--num-drafts", help="Drafts per cycle, comma-separated; every method's most by default.")
@candidates_option
@click.option("--repeats", type=int, default=1, show_default=True, help="Measure everything this often.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; repeat r uses seed + r.")
@click.option("--out", type=Path, required=True, help="Directory of the measurements and the report.")
@machine_options
@json_option
def bench(
    pair: Pair,
    suites: str,
    methods: str,
    limit: int | None,
    max_new_tokens: int,
    temperatures: str,
    num_drafts: str | None,
    candidates: int,
    repeats: int,
    seed: int,
    out: Path,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compare methods on suites of prompts.

    Writes raw.jsonl, report.json, report.md and plots to a directory.

    \b
    domino-spec bench --suite gsm8k,mt-bench --methods none,ngram,domino --limit 4 --out bench
    domino-spec bench --suite my-prompts.jsonl --draft my-draft --threads 2 --out bench
    """
    names = comma_separated(methods, str, "--methods")
    draft = pair.draft_for(names)
    budgets = comma_separated(num_drafts or "", int, "--num-drafts")
    degrees = comma_separated(temperatures, float, "--temperatures")
    machine.prepare()
    from domino_spec.bench.run import run_bench

    report = run_bench(
        target=pair.target,
        draft=draft,
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
        allow_other_target=pair.allow_other_target,
    )
    if as_json:
        print_json(report)


def main() -> None:
    """The `domino-spec` command."""
    cli(prog_name="domino-spec")
