"""Commands around a draft's training: regenerate, train, export, inspect, vocabulary, ngrams."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from domino_spec.cli.group import cli, console, prepare, print_json, status
from domino_spec.cli.options import Machine, json_option, machine_options, no_check_option, verbose_option
from domino_spec.public_data import CONVERSATIONS
from domino_spec.recipe import Recipe, check_url, load_recipe
from domino_spec.settings import UserError, require_extra

if TYPE_CHECKING:
    from domino_spec.training.answers import RegenerateResult


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
    if server or settings.data.server:
        require_extra("train", "regenerate with a server")
    machine.prepare(settings.target)
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
@no_check_option
@json_option
def train(
    recipe: Path,
    out: Path | None,
    features: Path | None,
    dry_run: bool,
    device: str,
    threads: int | None,
    verbose: bool,
    no_check: bool,
    as_json: bool,
) -> None:
    """Train the draft of RECIPE into a run directory.

    The same command resumes where it stopped.

    \b
    domino-spec train my-draft.yaml --dry-run
    domino-spec train my-draft.yaml --out runs/my-draft
    """
    settings = load_recipe(recipe)
    if not dry_run:
        require_extra("train", "train")
    Machine(device, "auto", threads, verbose).prepare(None if dry_run else settings.target)
    if dry_run:
        from domino_spec.training.estimate import estimate_lines, estimate_training

        estimate = estimate_training(settings)
        return print_json(asdict(estimate)) if as_json else click.echo("\n".join(estimate_lines(estimate)))
    if out is None:
        raise UserError("no directory given for the run: domino-spec train RECIPE --out RUN")
    from domino_spec.cli.show import TrainingView
    from domino_spec.training.parallel import is_first_process
    from domino_spec.training.report import write_report
    from domino_spec.training.run import run_training
    from domino_spec.training.watch import last_metrics

    with TrainingView(console(), shown=is_first_process() and not as_json) as view:
        run_training(settings, out, device=device, features=features, check=not no_check, **view.callbacks)
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
    prepare(verbose, target=target)
    from domino_spec.cli.show import draft_lines, draft_record
    from domino_spec.draft.load import check_fit, describe_draft, draft_directory

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


def answer_recipe(
    recipe: Recipe, out: Path, draft: str | None, server: str | None, machine: Machine, shown: bool
) -> RegenerateResult:
    """Let the recipe's target answer its prompts.

    Args:
        recipe: what to answer, and how.
        out: the answers file.
        draft: makes this package's engine faster.
        server: URL, instead of the recipe's `data.server`.
        machine: where this package's engine computes.
        shown: whether progress is shown.

    Raises:
        UserError: there are no prompts, something cannot be read, written, loaded or reached.
    """
    data = recipe.data if server is None else replace(recipe.data, server=check_url(server))
    if data.prompts is None:
        raise UserError("data.prompts is missing in the recipe: name conversations to answer")
    if str(out) in CONVERSATIONS:
        raise UserError(f"data.responses is the public data set {out}: give --out for the answers")
    from domino_spec.cli.show import RegenerateView
    from domino_spec.training.answers import only_run

    with only_run(out):
        pass  # refused before a target is loaded; `regenerate` takes the lock itself
    if data.server is None:
        from domino_spec.training.answers import regenerate

        target, loaded_draft = machine.load(recipe.target, draft)
        with RegenerateView(console(), shown) as view:
            return regenerate(target, loaded_draft, data.prompts, out, data, view.update)
    if draft is not None:
        raise UserError("--draft is for the engine of this package; a server drafts as it was started to")
    from domino_spec.target.load import load_target_text
    from domino_spec.training.servers import Server, regenerate_with_server

    with status(f"Loading the tokenizer of {recipe.target}"):
        text = load_target_text(recipe.target)
        engine = Server(data.server, data.server_model)
    with RegenerateView(console(), shown) as view:
        return regenerate_with_server(engine, text, data.prompts, out, data, view.update)


def result_lines(out: Path, result: RegenerateResult) -> list[str]:
    """What was answered, and what was left out and why."""
    lines = [f"{out}: {result.answered} conversations answered now, {result.already_answered} before"]
    if result.left_out:
        lines.append(f"left out: {result.left_out}")
    if result.truncated:
        lines.append(f"{result.truncated} answers were cut at data.max_new_tokens")
    return lines


@cli.command()
@click.argument("recipe", type=Path)
@click.option("--out", type=Path, required=True, help="JSON file to write.")
@click.option("--size", type=int, help="Tokens to keep; all that occur by default.")
@verbose_option
@json_option
def vocabulary(recipe: Path, out: Path, size: int | None, verbose: bool, as_json: bool) -> None:
    """Rank the tokens of RECIPE's training answers by frequency.

    A draft that proposes only the most frequent ones is cheaper (FR-Spec): --ranking of generate and bench.

    \b
    domino-spec vocabulary my-draft.yaml --out ranking.json
    domino-spec generate "Why?" --ranking ranking.json --draft-vocab-size 8192
    """
    settings = load_recipe(recipe)
    prepare(verbose, target=settings.target)
    from domino_spec.training.counts import write_vocabulary

    with status("Counting tokens"):
        ranking = write_vocabulary(settings, out, size)
    sizes = [n for n in (1024, 2048, 4096, 8192, 16384, 32768) if n < ranking.size] + [ranking.size]
    if as_json:
        print_json({"out": str(out), "size": ranking.size, "coverage": {n: ranking.coverage(n) for n in sizes}})
    else:
        shares = ", ".join(f"{n:,}: {ranking.coverage(n):.1%}" for n in sizes)
        click.echo(f"{out}: {ranking.size:,} tokens; share of the text that the first ones make up: {shares}")


@cli.command()
@click.argument("recipe", type=Path)
@click.option("--out", type=Path, required=True, help="Safetensors file to write.")
@click.option("--order", type=int, default=3, show_default=True, help="Tokens of the longest n-grams.")
@verbose_option
@json_option
def ngrams(recipe: Path, out: Path, order: int, verbose: bool, as_json: bool) -> None:
    """Count the n-grams of RECIPE's training answers.

    They prune the trees of DART drafts: --ngrams of generate and bench.

    \b
    domino-spec ngrams my-dart.yaml --out ngrams.safetensors
    domino-spec generate "Why?" --draft my-dart --ngrams ngrams.safetensors
    """
    settings = load_recipe(recipe)
    prepare(verbose, target=settings.target)
    from domino_spec.drafters.ngram_counts import LARGEST_ORDER
    from domino_spec.training.counts import write_ngrams

    if order > LARGEST_ORDER:
        raise UserError(f"--order must be at most {LARGEST_ORDER}, got {order}: longer n-grams hardly occur twice")
    with status("Counting n-grams"):
        model = write_ngrams(settings, out, order)
    counts = {length: len(keys) for length, keys in enumerate(model.keys, 1)}
    if as_json:
        print_json({"out": str(out), "order": model.order, "ngrams": counts})
    else:
        found = ", ".join(f"{count:,} of {length}" for length, count in counts.items())
        click.echo(f"{out}: different n-grams of up to {model.order} tokens: {found}")
