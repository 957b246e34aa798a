"""The engine's thread, the only one that touches the engine: it stands between the event loop and the decoding loop.

Requests wait here, in a queue of bounded length, and go to the engine when it has a free slot. After every step the
thread reports to the event loop how far each request has come. A `Generation` only grows, so a report stays true.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Generation, Request, StopStrings, showable

_log = logging.getLogger(__name__)

CRASHED, STOPPED = "crashed", "stopped"
"""How jobs end besides `Generation.finish_reason`: the engine failed, or the server stopped before they were done."""


class QueueFull(Exception):
    """No slot and no place in the queue is free."""


class Closed(Exception):
    """The engine takes no requests any more, because it drains."""


class Crashed(Exception):
    """The engine has failed."""


@dataclass(frozen=True)
class Progress:
    """How far a request has come."""

    tokens: int = 0
    shown: int = 0
    """Characters of its text that can be shown."""
    finish_reason: str | None = None
    """That of `Generation`, or `CRASHED` or `STOPPED`."""
    at: float = 0.0
    """When, by `time.perf_counter`."""


@dataclass(eq=False)
class Job:
    """A request in the runner. The event loop reads `progress`, and of `generation` no more than `progress` covers."""

    request: Request
    changed: asyncio.Event
    """Set whenever `progress` has changed."""
    generation: Generation
    stop: StopStrings
    submitted: float
    """By `time.perf_counter`, as the other times."""
    progress: Progress
    taken_up: float | None = None
    """When the engine got it."""


def make_job(request: Request, changed: asyncio.Event) -> Job:
    """A job that is submitted now."""
    now = time.perf_counter()
    generation, stop = Generation(list(request.prompt_ids)), StopStrings(request.limits.stop)
    return Job(request, changed, generation, stop, now, Progress(at=now))


class Runner:
    """Runs an engine in a separate thread.

    Args:
        engine: no other thread may call its `step`.
        max_queue: requests that may wait for a slot.
        observe: called in the event loop with a job, its progress before and its progress now.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        observe: Callable[[Job, Progress, Progress], None] = lambda job, before, now: None,
    ) -> None:
        self.engine, self.max_queue, self._observe = engine, max_queue, observe
        self.draining = False
        self.error: BaseException | None = None
        """What ended the engine's thread, if it failed."""
        self._condition = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        """By the identity of their generations."""
        self._cancelled: list[Generation] = []
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._threads = torch.get_num_threads()

    # The event loop's side

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, which reports to `loop`."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; requests that are still decoded are dropped."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    def submit(self, requests: Sequence[Request], changed: asyncio.Event) -> list[Job]:
        """Queue requests, all or none.

        Raises:
            UserError: see `Engine.check`.
            QueueFull, Closed, Crashed: see there.
        """
        for request in requests:
            self.engine.check(request)
        with self._condition:
            if self.error is not None:
                raise Crashed("the engine has failed; the server must be restarted")
            if self.draining or self._stopping:
                raise Closed("the server is stopping")
            slots, waiting = self.engine.slots, len(self._queue)
            if len(requests) > slots + self.max_queue - waiting - len(self._running):
                raise QueueFull(f"the queue is full: {waiting} requests wait for one of {slots} slots; try again")
            jobs = [make_job(request, changed) for request in requests]
            self._queue.extend(jobs)
            self._condition.notify()
        return jobs

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Drop jobs that have not ended; their slots are free at the next step."""
        with self._condition:
            for job in jobs:
                if self._running.pop(id(job.generation), None) is not None:
                    self._cancelled.append(job.generation)
                elif job in self._queue:
                    self._queue.remove(job)
            self._condition.notify()

    def fail_all(self, reason: str) -> None:
        """End all jobs as they are, for this reason."""
        with self._condition:
            jobs = [*self._running.values(), *self._queue]
        self.cancel(jobs)
        self._apply([(job, _ended(job, reason)) for job in jobs])

    def _apply(self, updates: list[tuple[Job, Progress]]) -> None:
        for job, progress in updates:
            if job.progress.finish_reason is not None:  # it ended here while the engine was working on it
                continue
            before, job.progress = job.progress, progress
            self._observe(job, before, progress)
            job.changed.set()

    # The engine's side

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP has one count per thread
        if self.engine.target.device.type == "cuda":
            torch.cuda.set_device(self.engine.target.device)  # CUDA has one device per thread
        try:
            while self._exchange():
                self._report(self.engine.step())
        except BaseException as error:  # of any kind: no client may be left waiting
            _log.exception("the engine has failed; all requests end")
            with self._condition:
                self.error = error
                jobs = [*self._running.values(), *self._queue]
                self._running.clear()
                self._queue.clear()
            self._publish([(job, _ended(job, CRASHED)) for job in jobs])

    def _exchange(self) -> bool:
        """Wait for work, pass cancelled and new requests to the engine; False if the thread is to end."""
        with self._condition:
            while not (self._stopping or self._queue or self._cancelled or self.engine.busy):
                self._condition.wait()
            for generation in self._cancelled:
                self.engine.cancel(generation)
            self._cancelled.clear()
            while self._queue and self.engine.num_running + self.engine.num_waiting < self.engine.slots:
                job = self._queue.popleft()
                job.taken_up = time.perf_counter()
                self._running[id(job.generation)] = job
                self.engine.submit(job.request, job.generation)
            return not self._stopping

    def _report(self, grown: list[Generation]) -> None:
        updates, now = [], time.perf_counter()
        with self._condition:
            for generation in grown:
                job = self._running.get(id(generation))
                if job is None:  # it was cancelled while the step ran
                    continue
                shown = showable(generation, job.stop)
                updates.append((job, Progress(generation.num_tokens, shown, generation.finish_reason, now)))
                if generation.finish_reason is not None:
                    del self._running[id(generation)]
        if updates:
            self._publish(updates)

    def _publish(self, updates: list[tuple[Job, Progress]]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._apply, updates)


def _ended(job: Job, reason: str) -> Progress:
    now = job.progress
    return Progress(now.tokens, now.shown, reason, time.perf_counter())
