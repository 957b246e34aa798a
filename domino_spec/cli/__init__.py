"""The command line: one command per verb, each thin. PyTorch and transformers are imported only inside commands.

What a user can get wrong ends in one line on standard error and exit status 2; Ctrl-C ends in status 130.
"""

from domino_spec.cli import bench, decode, profile, serve, train  # noqa: F401 - importing adds their commands
from domino_spec.cli.group import cli, settle_threads

__all__ = ["cli", "main"]


def main() -> None:
    """The `domino-spec` command."""
    settle_threads()
    cli(prog_name="domino-spec")
