"""Progress of long commands: a bar on a terminal, a plain line now and then elsewhere, nothing under --json."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from domino_spec.training.evaluate import SimulatedTau
    from domino_spec.training.loop import StepResult
    from domino_spec.training.regenerate import RegenerateProgress

PLAIN_LINE_SECONDS = 30.0

View = TypeVar("View", bound="ProgressView")


class _Bars(Progress):
    """A bar for each kind of work, with its figures on a line of their own below it while it lasts."""

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
                yield Text("         " + task.fields["figures"], style="dim", no_wrap=True, overflow="ellipsis")


class ProgressView:
    """One bar with a line of figures and the time left.

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

    def show(self, what: str, done: int, total: int, figures: str) -> None:
        """Show that `done` of `total` are done; the time left follows from the pace since the first call."""
        now = time.monotonic()
        started, first = self._started.setdefault(what, (now, done))
        left = ""
        if first < done < total:
            left = f"{duration((now - started) / (done - first) * (total - done))} left"
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total, figures="", left="")
            self._bar.update(self._tasks[what], completed=done, total=total, figures=figures, left=left)
        elif self._plain and (done >= total or now - self._plain_at >= PLAIN_LINE_SECONDS):
            self._plain_at = now
            line = f"{what} {done}/{total}: {figures}" + (f", {left}" if left else "")
            self._console.print(line, highlight=False, soft_wrap=True)


class TrainingView(ProgressView):
    """Progress of `train`: features captured, then steps with losses, lambda, tau and pace."""

    def __init__(self, console: Console, steps: int, shown: bool = True) -> None:
        super().__init__(console, shown)
        self._steps = steps
        self._pace = Pace()
        self._feature_pace = Pace()
        self._tau = ""

    def features(self, done: int, total: int) -> None:
        """Callback of `run_training`: tokens captured so far."""
        self.show("features", done, total, f"{self._feature_pace.rate(done):.0f} tokens/s")

    def step(self, result: StepResult) -> None:
        """Callback of `run_training`: one optimizer step."""
        rate = self._pace.advance(result.tokens, result.seconds)
        figures = (
            f"base loss {result.base_loss:.3f}, final loss {result.final_loss:.3f}, lambda {result.lambda_base:.2f}"
            f"{self._tau}, {rate:.0f} tokens/s"
        )
        self.show("steps", result.step, self._steps, figures)

    def evaluation(self, step: int, tau: SimulatedTau) -> None:
        """Callback of `run_training`: a held-out measurement."""
        self._tau = f", tau {tau.tau:.3f} (head off {tau.tau_head_off:.3f})"
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
    """Tokens per second."""

    def __init__(self, smoothing: float = 0.95) -> None:
        self._smoothing = smoothing
        self._tokens = self._seconds = 0.0
        self._first: tuple[float, int] | None = None

    def advance(self, tokens: int, seconds: float) -> float:
        """A smoothed rate of work that reports its own durations."""
        self._tokens = self._smoothing * self._tokens + tokens
        self._seconds = self._smoothing * self._seconds + seconds
        return self._tokens / self._seconds if self._seconds else 0.0

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
