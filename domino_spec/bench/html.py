"""report.html: report.md as one page that needs no other file and no network.

The page is made from the very Markdown of report.md, so the two cannot drift apart. Plots stand in it as SVG, drawn in
the colours of the page, light or dark.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from domino_spec.bench.markdown import render
from domino_spec.files import atomic_path
from domino_spec.settings import UserError

HTML_FILE = "report.html"

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


def write_html(report: Mapping[str, Any], out: Path, plots: Sequence[str] = ()) -> Path:
    """Write report.html into a bench directory; returns its path.

    Args:
        report: what `report.build_report` returned.
        out: the directory.
        plots: file names of images in it, as `plots.write_plots` returned them; of a PNG with an SVG beside it, the SVG
            is shown.

    Raises:
        UserError: an image cannot be read, or the page cannot be written.
    """
    title = f"Benchmark report: {report['settings']['target']}"
    return write_page(render(dict(report), plots), title, out, plots)


def write_page(markdown: str, title: str, out: Path, plots: Sequence[str] = ()) -> Path:
    """Write any report's Markdown as report.html; the rest as `write_html`."""
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
    page's own ink and paper.
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"fill: #ffffff\b", "fill: none", text).replace("#000000", "currentColor")
    # Text that Matplotlib leaves black has no colour of its own.
    attributes = f'role="img" aria-label="{html.escape(_title(name))}" fill="currentColor"'
    return text.replace("<svg ", f"<svg {attributes} ", 1)


def _title(name: str) -> str:
    return name.replace("_", " ")
