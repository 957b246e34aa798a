"""Commands around a draft's training: regenerate, train, export, inspect."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from domino_spec.cli.group import cli
from domino_spec.cli.options import Machine, json_option, machine_options, no_check_option, verbose_option
from domino_spec.cli.shell import console, prepare, print_json, status
from domino_spec.recipe import load_recipe
from domino_spec.settings import UserError, require_extra


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
    from domino_spec.cli.answering import answer_recipe, result_lines

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
    from domino_spec.cli.progress import TrainingView
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
    from domino_spec.cli.record import draft_lines, draft_record
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
