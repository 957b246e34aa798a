"""Terminal output of `generate` and `demo`: text as it is accepted, and two panels side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from domino_spec.cli.race import Racer, RaceResult
from domino_spec.cli.record import overall_speed_up
from domino_spec.decoding.request import Generation, showable
from domino_spec.drafters.methods import METHODS
from domino_spec.target.model import Target
from domino_spec.target.text import StopStrings

DRAFTED_STYLE = "bold green"
FRAMES_PER_SECOND = 12


class MarkedText:
    """Cuts a growing generation into pieces that are drafted or supplied by the target, as far as can be shown.

    Args:
        target: for its tokenizer.
        stop: the request's stop strings; what may begin one is held back.
    """

    def __init__(self, target: Target, stop: tuple[str, ...] = ()) -> None:
        assert target.tokenizer is not None
        self._stop_strings = StopStrings(stop)
        self._drafted: list[bool] = []
        """For every character: was the token that completed it drafted?"""
        self._tokens = self._shown = 0

    def advance(self, generation: Generation) -> list[tuple[str, bool]]:
        """(text, drafted) pieces that the last cycle made showable."""
        for i in range(self._tokens, generation.num_tokens):
            self._drafted += [generation.accepted[i]] * (generation.text_ends[i] - len(self._drafted))
        self._tokens = generation.num_tokens
        text, start = generation.text, self._shown
        self._shown = max(start, showable(generation, self._stop_strings))
        runs = groupby(range(start, self._shown), key=self._drafted.__getitem__)
        return [("".join(text[i] for i in run), drafted) for drafted, run in runs]


class AnswerWriter:
    """Prints an answer while it grows; with `show_drafts`, drafted and accepted text is set apart.

    Colour sets it apart on a terminal, square brackets elsewhere.
    """

    def __init__(self, console: Console, show_drafts: bool) -> None:
        self._console, self._show_drafts = console, show_drafts
        self._coloured = console.color_system is not None
        self._open_bracket = False
        if show_drafts:
            self._write("Drafted and accepted", True)
            self._write(" and text that the target supplied\n\n", False)

    def write(self, pieces: list[tuple[str, bool]]) -> None:
        """Print pieces of `MarkedText`."""
        for text, drafted in pieces:
            self._write(text, drafted and self._show_drafts)

    def _write(self, text: str, drafted: bool) -> None:
        if self._coloured:
            self._console.print(Text(text, DRAFTED_STYLE if drafted else ""), end="", soft_wrap=True)
            return
        if drafted != self._open_bracket:
            text = ("[" if drafted else "]") + text
            self._open_bracket = drafted
        self._console.out(text, end="", highlight=False)

    def finish(self, generation: Generation) -> None:
        """End the answer's line; with `show_drafts`, add the statistics."""
        self._write("\n", False)
        if self._show_drafts:
            self._console.print(Text("\n" + statistics(generation), "dim"), soft_wrap=True)


def statistics(generation: Generation) -> str:
    """One line of figures about a finished generation."""
    return (
        f"{generation.num_tokens} tokens in {generation.num_verify_passes} passes of the target, "
        f"tau {generation.acceptance_length:.2f}, {generation.tokens_per_second:.1f} tokens/s "
        f"({generation.seconds_decode:.1f} s)"
    )


class RaceView:
    """Two panels that fill while a race runs; plain lines at its end where standard output is no terminal."""

    def __init__(self, console: Console, prompt: str, max_new_tokens: int) -> None:
        self._console = console
        self._live: Live | None = None
        self._drawn_at = 0.0
        width = max(console.width // 2 - 4, 10)
        lines = max_new_tokens * 5 // width + 4
        self._lines = max(3, min(lines, console.height - 8))
        console.print(Text.assemble(("\nPrompt  ", "bold"), prompt), soft_wrap=not console.is_terminal)
        if console.is_terminal:
            # Refreshing only between cycles keeps the drawing off the clocks.
            self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> RaceView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, plain: Racer, drafted: Racer) -> None:
        """Draw both, at most `FRAMES_PER_SECOND` times a second and when one of them finishes."""
        now = time.monotonic()
        finished = plain.finished and drafted.finished
        if self._live is None or (now - self._drawn_at < 1 / FRAMES_PER_SECOND and not finished):
            return
        self._drawn_at = now
        table = Table.grid(expand=True)
        table.add_column(ratio=1)
        table.add_column(ratio=1)
        table.add_row(self._panel(plain), self._panel(drafted))
        self._live.update(table, refresh=True)

    def _panel(self, racer: Racer) -> Panel:
        width = max(self._console.width // 2 - 4, 10)
        text = Text(racer.generation.text if racer.generation else "")
        last_lines = text.wrap(self._console, width)[-self._lines :]
        return Panel(
            Text("\n").join(last_lines),
            title=METHODS[racer.method].title,
            subtitle=_counters(racer),
            height=self._lines + 2,
            border_style="green" if racer.finished else "dim",
        )

    def report(self, target: Target, result: RaceResult) -> None:
        """Print how the race ended."""
        write = self._console.print
        if self._live is None:
            for racer in (result.plain, result.drafted):
                assert racer.generation is not None
                title = METHODS[racer.method].title
                heading = f"\n{title[0].upper()}{title[1:]}: {_counters(racer)}\n"
                write(Text(heading + racer.generation.text), soft_wrap=True)
            write()
        speed_up = Text.assemble((f"Speed-up {result.speed_up:.2f}", "bold"), " (decode time). ")
        write(speed_up.append(comparison(target, result)), soft_wrap=not self._console.is_terminal)


def _counters(racer: Racer) -> str:
    generation = racer.generation
    if generation is None:
        return "waiting"
    tau = "" if racer.method == "none" else f", tau {generation.acceptance_length:.2f}"
    return f"{generation.num_tokens} tokens, {racer.seconds:.1f} s, {racer.tokens_per_second:.1f} tokens/s{tau}"


def comparison(target: Target, result: RaceResult) -> str:
    """A sentence that says whether the two texts are equal, or where they differ and how close the choice was."""
    plain, drafted = result.plain.generation, result.drafted.generation
    assert plain is not None and drafted is not None
    if result.first_difference is None:
        return f"The two texts are equal: the same {plain.num_tokens} tokens."
    evidence, tokenizer = result.top_two, target.tokenizer
    assert evidence is not None and tokenizer is not None
    best, second = (repr(tokenizer.decode([token])) for token in evidence.tokens)
    verdict = "a near tie" if evidence.near_tie else "more than rounding explains"
    return (
        f"The two texts differ from token {result.first_difference + 1} on, where the target's two best tokens are "
        f"{best} and {second}, {evidence.margin:.2g} apart in their logits ({verdict}; reading the same text in one "
        f"pass moves logits by up to {evidence.rounding:.2g})."
    )


def summary(results: Sequence[RaceResult]) -> Text:
    """A line over several races."""
    equal = sum(result.first_difference is None for result in results)
    return Text.assemble(
        "\nOver all prompts: ",
        (f"speed-up {overall_speed_up(results):.2f}", "bold"),
        f", {equal} of {len(results)} texts equal.",
    )
