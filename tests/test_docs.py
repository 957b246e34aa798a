"""Commands that README and the documentation show are commands that exist, with options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from domino_spec.cli import cli
from tests.readme_commands import NOT_RUN, blocks, console_commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*domino-spec ((?!-).*)")


def shown_commands(page: Path) -> list[list[str]]:
    """Arguments of every `domino-spec` command in a page's console blocks."""
    shown = "".join(content for language, content in blocks(page.read_text("utf-8")) if language == "console")
    found = (COMMAND.fullmatch(line) for line in shown.replace("\\\n", " ").splitlines())
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_a_page_shows_parse(page):
    for name, *arguments in shown_commands(page):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, f"domino-spec {name}"
        command.make_context(name, arguments, parent=click.Context(cli))  # raises where an option does not exist


def test_the_pages_show_commands():
    assert sum(len(shown_commands(page)) for page in PAGES) > 40


def test_nothing_says_that_the_package_is_on_an_index():
    for page in PAGES:
        assert "pip install domino-spec" not in page.read_text("utf-8"), page


def test_what_ci_runs_of_readme_is_what_a_reader_runs():
    commands = [shlex.join(words) for words in console_commands(README)]
    assert all(any(command.startswith(left_out) for command in commands) for left_out in NOT_RUN)
    run = [command for command in commands if not command.startswith(NOT_RUN)]
    for needed in ("pip install torch==", "pip install '.[demo]'", "domino-spec demo", "domino-spec generate"):
        assert any(command.startswith(needed) for command in run), needed
    assert {"domino-spec serve", "domino-spec serve --check"} <= set(run)
    assert "custom_generate=draft.custom_generate" in README
