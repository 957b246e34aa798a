"""Progress of long commands: a bar on a terminal, a plain line now and then elsewhere, nothing under --json."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from domino_spec.training.answers import RegenerateProgress
    from domino_spec.training.evaluate import SimulatedTau
    from domino_spec.training.step import StepResult
    from domino_spec.training.watch import RunFacts

PLAIN_LINE_SECONDS = 30.0

View = TypeVar("View", bound="ProgressView")


class _Bars(Progress):
    """A bar for each kind of work, with its figures on lines of their own below it while it lasts."""

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
    """Tokens, or whatever is counted, per second."""

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
