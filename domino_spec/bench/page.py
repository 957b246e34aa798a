"""Tables and pages: columns of records, Markdown tables, and report.html made from the Markdown of report.md.

report.html is one page that needs no other file and no network. It is made from the Markdown, so the two cannot differ.
Plots are embedded as SVG in the colours of the page, light or dark.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from domino_spec.bench.figures import Record
from domino_spec.files import atomic_path
from domino_spec.settings import UserError

HTML_FILE = "report.html"
GROUPS = {
    "MATH": ("gsm8k", "math500", "aime25"),
    "CODE": ("humaneval", "mbpp", "livecodebench"),
    "CHAT": ("mt-bench", "alpaca"),
}
"""The paper's suites, in its order; other suites follow as they were given."""
VERDICT = {True: "yes", False: "**no**", None: "–"}


def in_paper_order(suites: Iterable[str]) -> list[str]:
    """The paper's suites in its order, then others as they were given."""
    known, given = [name for names in GROUPS.values() for name in names], list(suites)
    return [*(name for name in known if name in given), *(name for name in given if name not in known)]


def at(entries: Sequence[Record], temperature: float) -> list[Record]:
    """The entries of one temperature."""
    return [entry for entry in entries if entry["temperature"] == temperature]


class Column(NamedTuple):
    """A column of a table of records."""

    title: str
    cell: Callable[[Record], str]
    """Makes the text of a record's cell."""


def text_column(title: str, key: str | None = None) -> Column:
    """A value as it is; `key` is the title if not given."""
    return Column(title, lambda entry: str(entry[key or title]))


def number_column(title: str, key: str, digits: int = 2) -> Column:
    """A number, or a dash if there is none."""
    return Column(title, lambda entry: number(entry.get(key), digits))


def figure_column(title: str, key: str, digits: int = 2) -> Column:
    """A figure and its interval."""
    return Column(title, lambda entry: with_interval(entry, key, digits))


def records_table(columns: Sequence[Column], entries: Iterable[Record]) -> str:
    """A Markdown table with a row for each record."""
    return table([c.title for c in columns], [[c.cell(entry) for c in columns] for entry in entries])


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def facts_table(rows: Sequence[Sequence[str]], headers: Sequence[str] = ("", "")) -> str:
    """A Markdown table of text alone."""
    return table(headers, rows).replace("---:", "---")


def name_of(entry: Record) -> str:
    """A method with its budget, as tables and plots name it."""
    return entry["method"] + (f" ({entry['budget']})" if entry["budget"] else "")


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(entry: Record, key: str, digits: int = 2) -> str:
    """A figure of an entry and its interval, "2.21 (2.05-2.38)"; without one that is missing or has no width."""
    value, interval = entry.get(key), entry.get(f"{key}_interval")
    if value is None or interval is None or interval[0] == interval[1]:
        return number(value, digits)
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def plots_section(plots: Sequence[str]) -> list[str]:
    """Markdown that shows PNG files by their names."""
    return ["## Plots", *(f"![{_title(name.removesuffix('.png'))}]({name})" for name in plots)] if plots else []


STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --shade: #f4f6f8; --link: #0b57d0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4ea; --paper: #14171b; --line: #3a414a; --shade: #1e2329; --link: #8ab4f8 }
}
body { margin: 0 auto; max-width: 64rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; margin: 2em 0 .6em }
h1 { margin-top: .5em }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .2em }
a { color: var(--link) }
nav { display: flex; flex-wrap: wrap; gap: .2em 1.2em }
code { font-size: .9em; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .3em .7em; text-align: left; vertical-align: top }
thead th { background: var(--shade) }
thead th:empty { padding: 0 }
.figures td, .figures th { white-space: nowrap }
.figures th:first-child, .figures td:first-child { position: sticky; left: 0; background: var(--paper) }
.figures th:first-child { background: var(--shade) }
.plot { display: block }
.plot svg, .plot img { width: 100%; min-width: 40rem; height: auto }
.plot img { background: #fff }
@media print { body { max-width: none } .scroll { overflow: visible } }
"""


def write_page(markdown: str, title: str, out: Path, plots: Sequence[str] = ()) -> Path:
    """Write the Markdown of a report as report.html into a bench directory; returns its path.

    Args:
        markdown: of the report.
        title: of the page.
        out: the directory.
        plots: file names of the PNG images in it that the Markdown shows; if there is an SVG beside one, the SVG is
            embedded.

    Raises:
        UserError: an image cannot be read, or the page cannot be written.
    """
    text = page(markdown, title, {name: _image(out / name) for name in plots})
    with atomic_path(out / HTML_FILE) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return out / HTML_FILE


def page(markdown: str, title: str, images: Mapping[str, str] | None = None) -> str:
    """Markdown as a whole HTML page that refers to nothing outside itself.

    Args:
        markdown: CommonMark with tables; HTML in it is shown as text.
        title: of the page.
        images: HTML of every image by the name that the Markdown calls it.
    """
    known = images or {}

    def image(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        name = str(tokens[index].attrs["src"])
        return f'<span class="plot scroll">{known[name]}</span>'

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    tokens = parser.parse(markdown)
    contents = _name_headings(tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    body = re.sub(r"<table>(?=\s*<thead>\s*<tr>\s*<th></th>)", '<div class="scroll"><table class="facts">', body)
    body = body.replace("<table>", '<div class="scroll"><table class="figures">').replace("</table>", "</table></div>")
    links = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for name, heading in contents.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        f"<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )


def _name_headings(tokens: Sequence[Token]) -> dict[str, str]:
    """Give every section an id to link to; returns their texts by id, in order."""
    contents: dict[str, str] = {}
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h2":
            name = f"section-{len(contents) + 1}"
            opening.attrs["id"] = name
            contents[name] = content.content
    return contents


def _image(path: Path) -> str:
    """An image file as HTML that holds all of it."""
    drawing = path.with_suffix(".svg")
    try:
        if drawing.exists():
            return _inline_svg(drawing.read_text(encoding="utf-8"), path.stem)
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return f'<img alt="{html.escape(_title(path.stem))}" src="data:image/png;base64,{data}">'


def _inline_svg(text: str, name: str) -> str:
    """An SVG file of Matplotlib as an element of a page.

    Without the prolog and the metadata of a file; with ids that no other drawing has; black and white become the
    page's ink and paper.
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"fill: #ffffff\b", "fill: none", text).replace("#000000", "currentColor")
    # Text that Matplotlib leaves black has no colour in the file.
    attributes = f'role="img" aria-label="{html.escape(_title(name))}" fill="currentColor"'
    return text.replace("<svg ", f"<svg {attributes} ", 1)


def _title(name: str) -> str:
    return name.replace("_", " ")
