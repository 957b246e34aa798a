"""Commands that count the answers a draft is trained on, for drafts to draft with: vocabulary, ngrams."""

from __future__ import annotations

from pathlib import Path

import click

from domino_spec.cli.group import cli
from domino_spec.cli.options import json_option, verbose_option
from domino_spec.cli.shell import prepare, print_json, status
from domino_spec.recipe import load_recipe
from domino_spec.settings import UserError


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
