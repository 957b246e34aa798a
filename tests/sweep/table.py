"""The table of families in docs/reference/targets.md: written from outcomes, read back by the tests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tests.sweep.families import VARIANTS, class_name
from tests.sweep.judge import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "targets.md"
MARK = "<!-- The rest of this page is written by `python -m tests.sweep --write`. -->"
WORKS, NO_DRAFTS, REFUSED, NOT_TRIED = "Works", "Works without trained drafts", "Refused", "Not tried"


def heading(outcome: Outcome) -> str:
    """Where an outcome stands in the table."""
    if outcome.kind == "equal":
        return NO_DRAFTS if outcome.drafts else WORKS
    return REFUSED if outcome.kind == "refused" else NOT_TRIED


def render(outcomes: Iterable[Outcome], version: str) -> str:
    """The generated part of the page.

    Args:
        outcomes: of all families.
        version: of transformers.
    """
    outcomes = list(outcomes)
    variants = sum(outcome.family in VARIANTS for outcome in outcomes)
    lines = [
        MARK,
        "",
        f"Of transformers {version}, {len(outcomes) - variants} families and {variants} of them with other settings:",
        "",
    ]
    for title in (WORKS, NO_DRAFTS, REFUSED, NOT_TRIED):
        chosen = [outcome for outcome in outcomes if heading(outcome) == title]
        if not chosen:
            continue
        lines += [f"## {title}: {len(chosen)}", ""]
        if title == WORKS:
            lines += ["| `model_type` | class |", "| --- | --- |"]
            lines += [f"| `{o.family}` | `{class_name(o.family)}` |" for o in chosen]
        else:
            lines += ["| `model_type` | class | why |", "| --- | --- | --- |"]
            lines += [f"| `{o.family}` | `{class_name(o.family)}` | {reason(o)} |" for o in chosen]
        lines.append("")
    return "\n".join(lines)


def reason(outcome: Outcome) -> str:
    """Why, as a cell: without what its section says, and without figures that another machine gives otherwise."""
    text = re.sub(r"by [\d.e+-]+ of their size.*", "by more than rounding", outcome.drafts or outcome.detail)
    own = class_name(outcome.family)
    for known in (f" of {own}", f"{own}, ", f"{own} ", f"target {outcome.family}: ", f" of target {outcome.family}"):
        text = text.replace(known, " ")
    first_sentence = " ".join(text.split(". ")[0].split())
    return first_sentence.replace(": , ", ": ").replace("|", "\\|")


def write(outcomes: Iterable[Outcome], version: str, page: Path = PAGE) -> None:
    """Replace the generated part of the page."""
    page.write_text(page.read_text("utf-8").partition(MARK)[0] + render(outcomes, version), "utf-8")


def documented(page: Path = PAGE) -> dict[str, str]:
    """Under which heading the page has each family."""
    found: dict[str, str] = {}
    title = ""
    for line in page.read_text("utf-8").partition(MARK)[2].splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ").partition(":")[0]
        elif row := re.match(r"\| `([^`]+)` \|", line):
            found[row[1]] = title
    found.pop("model_type", None)
    return found
