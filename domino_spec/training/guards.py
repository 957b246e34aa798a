"""What ends a run before its last step, without losing what it has learned: a bad loss, or the user."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import statistics
import threading
from collections.abc import Iterator

from domino_spec.settings import UserError


class LossError(UserError):
    """Training cannot go on from here: the weights, or the next step, are no good."""


class Divergence:
    """Notices a loss that runs away: its median over `WINDOW` steps far above the lowest such median."""

    WINDOW = 50
    FACTOR = 3.0
    """Longer blocks raise the loss too: to 1.24 times its lowest at most, in runs that went well (docs/log.md)."""

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=self.WINDOW)
        self._lowest = math.inf

    def check(self, step: int, loss: float) -> None:
        """Look at the loss of one more step.

        Raises:
            LossError: the loss has run away.
        """
        self._recent.append(loss)
        if len(self._recent) < self.WINDOW:
            return
        usual = statistics.median(self._recent)
        self._lowest = min(self._lowest, usual)
        if usual > self.FACTOR * self._lowest:
            raise LossError(f"the loss diverges: usually {usual:.3g} before step {step}, once {self._lowest:.3g}")


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that no step is cut in its middle; a second signal ends the process."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]

    def restore() -> None:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        event.set()
        restore()

    for number, handler in zip(signals, before, strict=True):
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield event
    finally:
        restore()
