"""The group that all commands belong to."""

from __future__ import annotations

import click

from domino_spec import __version__
from domino_spec.cli.shell import OneLineErrors


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
