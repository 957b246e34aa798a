"""What commands show: progress of long work, text as it is accepted, the two panels of a race, records for `--json`.

Progress is a bar on a terminal, a plain line now and then elsewhere, and nothing under `--json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from domino_spec.decoding.request import Generation, StopStrings, showable
from domino_spec.draft.config import DraftConfig, SingleLayerConfig
from domino_spec.draft.load import DraftDescription, Fit
from domino_spec.drafters.methods import METHODS
from domino_spec.target.model import Target

if TYPE_CHECKING:
    from domino_spec.cli.race import Racer, RaceResult
    from domino_spec.training.answers import RegenerateProgress
    from domino_spec.training.evaluate import SimulatedTau
    from domino_spec.training.step import StepResult
    from domino_spec.training.watch import RunFacts

PLAIN_LINE_SECONDS = 30.0

View = TypeVar("View", bound="ProgressView")


class _Bars(Progress):
    """A bar for each kind of work, with its figures on lines below it while it lasts."""

    def __init__(self, console: Console, refresh_per_second: float) -> None:
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        super().__init__(*columns, console=console, refresh_per_second=refresh_per_second)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if not task.finished:
                for line in task.fields["figures"]:
                    yield Text("         " + line, style="dim", no_wrap=True, overflow="ellipsis")


class ProgressView:
    """One bar with lines of figures and the time left.

    Args:
        console: where to show it.
        shown: False shows nothing.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._plain = shown and not console.is_terminal
        if shown and console.is_terminal:
            # Drawing seldom leaves the cores to the work.
            self._bar = _Bars(console=console, refresh_per_second=2)
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._plain_at = 0.0

    def __enter__(self: View) -> View:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None or self._plain:
            self._console.print(line, highlight=False, soft_wrap=True)

    def show(self, what: str, done: int, total: int, *figures: str) -> None:
        """Show that `done` of `total` are done; the time left follows from the pace since the first call.

        Args:
            what: is being done.
            done: of `total`.
            total: at the end.
            figures: lines to show below the bar; without a terminal they share one.
        """
        now = time.monotonic()
        started, first = self._started.setdefault(what, (now, done))
        left = ""
        if first < done < total:
            left = f"{duration((now - started) / (done - first) * (total - done))} left"
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, figures=(), left="")
            self._bar.update(self._tasks[what], completed=done, total=total, figures=figures, left=left)
        elif self._plain and (done >= total or now - self._plain_at >= PLAIN_LINE_SECONDS):
            self._plain_at = now
            line = f"{what} {done}/{total}: " + ", ".join((*figures, left) if left else figures)
            self._console.print(line, highlight=False, soft_wrap=True)


class TrainingView(ProgressView):
    """Progress of `train`: features captured, then steps with losses, lambda, tau, pace and use of the device."""

    def __init__(self, console: Console, shown: bool = True) -> None:
        super().__init__(console, shown)
        self._steps = 0
        self._matrix_rate = self._step_operations = 0.0
        self._tokens, self._samples, self._operations = Pace(), Pace(), Pace()
        self._feature_pace = Pace()
        self._tau: tuple[str, ...] = ()

    @property
    def callbacks(self) -> dict[str, Any]:
        """The arguments of `run_training` that keep this view up to date."""
        return dict(on_start=self.start, on_features=self.features, on_step=self.step, on_evaluation=self.evaluation)

    def start(self, facts: RunFacts) -> None:
        """What the run is; comes before any step."""
        self._steps, self._matrix_rate = facts.steps, facts.matrix_rate
        self._step_operations = facts.step_operations

    def features(self, done: int, total: int) -> None:
        """Tokens captured so far."""
        self.show("features", done, total, f"{self._feature_pace.rate(done):.0f} tokens/s")

    def step(self, result: StepResult) -> None:
        """One optimizer step."""
        losses = (
            f"base loss {result.base_loss:.3f}, final loss {result.final_loss:.3f}, lambda {result.lambda_base:.2f}"
        )
        pace = (
            f"{self._tokens.advance(result.tokens, result.seconds):.0f} tokens/s, "
            f"{self._samples.advance(result.sequences, result.seconds):.3g} samples/s"
        )
        operations = self._operations.advance(self._step_operations, result.seconds)
        if self._matrix_rate:
            pace += f", {operations / self._matrix_rate:.1%} of the matrix rate"
        self.show("steps", result.step, self._steps, losses, *self._tau, pace)

    def evaluation(self, step: int, tau: SimulatedTau) -> None:
        """A held-out measurement."""
        self._tau = (f"tau {tau.tau:.3f} (head off {tau.tau_head_off:.3f})",)
        line = f"step {step}: simulated tau {tau.tau:.3f}, head off {tau.tau_head_off:.3f}"
        if tau.candidate_recall is not None:
            line += f", recall of {tau.candidates} candidates {tau.candidate_recall:.4f}"
        self.note(line)


class RegenerateView(ProgressView):
    """Progress of `regenerate`: answers done and tokens per second."""

    def __init__(self, console: Console, shown: bool = True) -> None:
        super().__init__(console, shown)
        self._pace = Pace()

    def update(self, progress: RegenerateProgress) -> None:
        """Callback of `regenerate`."""
        self.show("answers", progress.answered, progress.total, f"{self._pace.rate(progress.new_tokens):.0f} tokens/s")


class Pace:
    """A rate per second, of tokens or of anything else that is counted."""

    def __init__(self, smoothing: float = 0.95) -> None:
        self._smoothing = smoothing
        self._amount = self._seconds = 0.0
        self._first: tuple[float, int] | None = None

    def advance(self, amount: float, seconds: float) -> float:
        """A smoothed rate of work that reports its own durations."""
        self._amount = self._smoothing * self._amount + amount
        self._seconds = self._smoothing * self._seconds + seconds
        return self._amount / self._seconds if self._seconds else 0.0

    def rate(self, total_tokens: int) -> float:
        """The mean rate since the first call, by the wall clock."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, total_tokens)
        started, before = self._first
        return (total_tokens - before) / (now - started) if now > started else 0.0


def duration(seconds: float) -> str:
    """A time span for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# Text as it is accepted, and the race


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
    """Two panels that fill while a race runs; plain lines at its end if standard output is no terminal."""

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


# Records for `--json`, and the lines of `inspect`


def setting_record(target: Target, draft: str | None) -> dict[str, Any]:
    """What a result was made with."""
    return {
        "target": target.name,
        "draft": draft,
        "device": str(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def generation_record(
    generation: Generation, target: Target, draft: str | None, method: str, drafting_off: str | None = None
) -> dict[str, Any]:
    """A finished generation. `seconds` is the time of decoding; `seconds_prefill` comes before it.

    `drafting_off` is why nothing was drafted (`methods.why_nothing_is_drafted`).
    """
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "num_tokens": generation.num_tokens,
        "num_verify_passes": generation.num_verify_passes,
        "acceptance_length": generation.acceptance_length,
        "tokens_per_second": generation.tokens_per_second,
        "seconds": generation.seconds_decode,
        "seconds_prefill": generation.seconds_prefill,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.prompt_ids),
        "acceptance_lengths": generation.acceptance_lengths,
        "num_drafts": generation.num_drafts,
        "drafted": generation.accepted,
        "method": method,
        "drafting": drafting_off is None,
        "reason": drafting_off,
        **setting_record(target, draft),
    }


def _racer_record(racer: Racer) -> dict[str, Any]:
    assert racer.generation is not None
    return {
        "text": racer.generation.text,
        "token_ids": racer.generation.token_ids,
        "num_tokens": racer.generation.num_tokens,
        "num_verify_passes": racer.generation.num_verify_passes,
        "acceptance_length": racer.generation.acceptance_length,
        "tokens_per_second": racer.tokens_per_second,
        "seconds": racer.seconds,
        "seconds_prefill": racer.generation.seconds_prefill,
    }


def races_record(results: Sequence[RaceResult], target: Target, draft: str | None) -> dict[str, Any]:
    """The races of a demo and what they come to."""
    method = results[0].drafted.method
    races = []
    for result in results:
        evidence = result.top_two
        races.append(
            {
                "prompt": result.prompt,
                "none": _racer_record(result.plain),
                method: _racer_record(result.drafted),
                "speed_up": result.speed_up,
                "equal": result.first_difference is None,
                "first_difference": result.first_difference,
                "top_two_margin": evidence.margin if evidence else None,
                "rounding": evidence.rounding if evidence else None,
            }
        )
    return {
        "method": method,
        **setting_record(target, draft),
        "speed_up": overall_speed_up(results),
        "equal": all(race["equal"] for race in races),
        "races": races,
    }


def overall_speed_up(results: Sequence[RaceResult]) -> float:
    """Tokens per second of decoding over all races, with the draft over alone."""
    plain, drafted = [r.plain for r in results], [r.drafted for r in results]
    return _pace(drafted) / _pace(plain)


def _pace(racers: Sequence[Racer]) -> float:
    return sum(r.generation.num_tokens for r in racers if r.generation) / sum(r.seconds for r in racers)


def draft_record(name: str, description: DraftDescription, fit: Fit | None) -> dict[str, Any]:
    """What `inspect` found; what a kind of draft does not have is None."""
    config = description.config
    head = config.head
    return {
        "draft": name,
        "method": description.method,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "block_size": config.block_size,
        "shift_label": config.shift_label,
        "max_drafts": config.max_drafts,
        "pure_draft_prefix_len": head.pure_draft_prefix_len if head else None,
        "gru_hidden_dim": head.gru_hidden_dim if head else None,
        "low_rank": head.low_rank if head else None,
        "target_layer_ids": None if config.target_layer_ids is None else list(config.target_layer_ids),
        "last_layer_tap": config.last_layer_tap,
        "num_target_layers": config.num_target_layers,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "mask_token_id": config.mask_token_id,
        "target_fingerprint": config.target_fingerprint,
        "parameters": description.parameters,
        "dtypes": list(description.dtypes),
        "file_bytes": description.file_bytes,
        "fits": fit.fits if fit else None,
        "fit": fit.sentence if fit else None,
    }


def draft_lines(name: str, description: DraftDescription, fit: Fit | None) -> list[str]:
    """What `inspect` found, for people."""
    config, parameters = description.config, description.parameters
    subset = f"{config.draft_vocab_size:,} frequent ones of the target's " if config.draft_vocab_size else ""
    layers = "a low, a middle and a high layer, by the published rule"
    if config.target_layer_ids is not None:
        layers = f"layers {', '.join(map(str, config.target_layer_ids))}"
        layers += "" if config.num_target_layers is None else f" of {config.num_target_layers}"
    if config.last_layer_tap:
        layers += f", the last {config.last_layer_tap.replace('_', ' its final ')}"
    rows = [
        ("draft", name),
        *_METHOD_ROWS[config.kind](config),
        ("vocabulary", f"{subset}{config.vocab_size:,} tokens"),
        ("reads", layers),
        ("trained for", config.target_fingerprint or "not stated"),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in parameters.items())),
        ("files", f"{description.file_bytes / 1e6:.1f} MB, {', '.join(description.dtypes)}"),
    ]
    if fit is not None:
        rows.append(("target", fit.sentence if fit.fits else "does not fit"))
    return [f"{label:<12} {text}" for label, text in rows]


def _block_rows(config: DraftConfig) -> list[tuple[str, str]]:
    head = config.head
    labels = "the token one position later (shifted)" if config.shift_label else "the token at its own position"
    kind = "Domino: DFlash backbone with a Domino head" if head else "DFlash: backbone without a head"
    rows = [
        ("method", kind),
        ("backbone", f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"),
        ("block", f"{config.block_size} slots, each predicts {labels}; {config.max_drafts} usable drafts"),
        ("mask token", str(config.mask_token_id)),
    ]
    if head:
        prefix = f"corrects all drafts but the first {head.pure_draft_prefix_len}"
        rows.insert(3, ("head", f"GRU width {head.gru_hidden_dim}, low rank {head.low_rank}; {prefix}"))
    return rows


def _single_layer_rows(config: SingleLayerConfig) -> list[tuple[str, str]]:
    shape = f"hidden size {config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}"
    if config.kind == "dart":
        kind = "DART: one layer that predicts several masked positions in one pass"
        block = f"{config.num_masks} masked positions, {config.max_drafts} levels of drafts"
    else:
        kind = "EAGLE-3: one layer that reads its own outputs, token by token"
        block = f"trained for {config.block_size} tokens in a row; drafts trees of any size"
    return [("method", kind), ("layer", shape), ("block", block)]


_METHOD_ROWS: dict[str, Callable[[Any], list[tuple[str, str]]]] = {
    "domino": _block_rows,
    "dflash": _block_rows,
    "eagle3": _single_layer_rows,
    "dart": _single_layer_rows,
}
