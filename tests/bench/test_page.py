"""report.html holds what report.md holds, and nothing from outside."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from domino_spec.bench.page import page, write_page
from domino_spec.bench.plots import write_plots
from domino_spec.bench.report import build_report, render, write_report
from domino_spec.settings import UserError
from tests.bench.synthetic import make_row, make_rows, write_bench

pytestmark = pytest.mark.slow

VOID = {"meta", "img", "br", "hr", "link", "input"}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """What a browser would see: balanced tags, cells of tables, headings, ids, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.labels: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in FETCHING]
        self.references += [found for _, value in attrs for found in re.findall(r"url\(([^)]*)\)", value or "")]
        self.labels += [value for name, value in attrs if name == "aria-label"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data


def cells_of_markdown(text: str) -> list[str]:
    """Cells of all tables, without the marks of Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| --")]
    cells = [cell for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [re.sub(r"\*\*|`|\\(?=\|)", "", cell).strip() for cell in cells]


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory) -> Path:
    """A bench directory with a report of many contenders at two temperatures."""
    out = tmp_path_factory.mktemp("html")
    write_bench(out, make_rows({"sums": 3, "words": 2}, temperatures=(0.0, 1.0)), finished)
    write_report(out, write_plots(build_report(out), out))
    return out


@pytest.fixture(scope="module")
def seen(made) -> Page:
    return Page((made / "report.html").read_text(encoding="utf-8"))


def test_every_table_of_the_markdown_is_in_the_page(made, seen):
    cells = cells_of_markdown((made / "report.md").read_text(encoding="utf-8"))
    assert sum(bool(re.search(r"\d", cell)) for cell in cells) > 300
    assert seen.cells == cells


def test_every_section_and_definition_is_in_the_page(made, seen):
    markdown = (made / "report.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ").replace("`", "") for line in markdown.splitlines() if line.startswith("#")]
    assert seen.headings == headings and "Definitions" in headings
    words = " ".join(" ".join(seen.words).split())
    definitions = [
        line for line in markdown[markdown.index("## Definitions") :].splitlines() if line.startswith("- **")
    ]
    assert len(definitions) >= 5
    for line in definitions:
        assert re.search(r"\*\*(.*?)\*\*", line).group(1) in words  # type: ignore[union-attr]


def test_the_page_refers_to_nothing_outside_itself(made, seen):
    assert seen.references
    assert all(reference.startswith(("#", "data:")) for reference in seen.references)
    assert {reference[1:] for reference in seen.references if reference.startswith("#")} <= set(seen.ids)
    assert len(seen.ids) == len(set(seen.ids))
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "@import" not in (made / "report.html").read_text(encoding="utf-8")


def test_plots_are_drawn_in_the_page_in_its_own_colours(made, seen):
    plots = ["speedup", "tau against cost", "acceptance lengths", "acceptance by position"]
    assert seen.tags.count("svg") == 4 and seen.labels == plots
    drawings = re.findall(r"<svg.*?</svg>", (made / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    for drawing in drawings:
        assert "#000000" not in drawing and "#ffffff" not in drawing and "currentColor" in drawing


def test_an_image_without_a_drawing_is_embedded_as_it_is(made, tmp_path):
    (tmp_path / "speedup.png").write_bytes((made / "speedup.png").read_bytes())
    path = write_page(render(build_report(made), ["speedup.png"]), "title", tmp_path, ["speedup.png"])
    seen = Page(path.read_text(encoding="utf-8"))
    (data,) = [reference for reference in seen.references if reference.startswith("data:image/png;base64,")]
    assert base64.b64decode(data.partition(",")[2]) == (made / "speedup.png").read_bytes()


def test_a_missing_image_is_named(made, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*speedup\.png"):
        write_page("text", "title", tmp_path, ["speedup.png"])


def test_names_are_text_and_never_markup(finished, tmp_path):
    suite = "<script>alert(1)</script>"
    rows = [
        make_row(suite, prompt, method, 4 * (method == "ngram")) for prompt in (0, 1) for method in ("none", "ngram")
    ]
    write_bench(tmp_path, rows, finished, target='"><b>bold</b>')
    write_report(tmp_path)
    seen = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert suite in seen.cells and not {"script", "b"} & set(seen.tags)


def test_markdown_becomes_a_page_that_fits_a_phone():
    seen = page("# A title\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n", "A <title>")
    assert '<meta name="viewport" content="width=device-width' in seen and "prefers-color-scheme: dark" in seen
    assert "<title>A &lt;title&gt;</title>" in seen
    assert Page(seen).cells == ["a", "b", "x", "1"]
    assert re.search(r'<div class="scroll"><table.*</table>\s*</div>', seen, re.DOTALL)


def test_a_bench_writes_the_page(finished):
    seen = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert seen.cells == cells_of_markdown((finished / "report.md").read_text(encoding="utf-8"))
    assert "svg" in seen.tags
