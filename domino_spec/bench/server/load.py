"""The load: a fixed number of requests in flight at one server, a new one sent when one has ended (a closed loop).

A thread per request in flight, each with its own connection. A request that the server has no room for (429) waits as
long as the server asks and is sent again; its place in the loop stays taken meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domino_spec.bench.server.probe import Endpoint, explain
from domino_spec.clients.openai import Answer, Client, Fault
from domino_spec.settings import UserError
from domino_spec.target.text import Message

FAILURES_TO_GIVE_UP = 10
"""Requests in a row without an answer, beyond those in flight, after which the server is taken to be down."""
LONGEST_WAIT = 60.0
"""Seconds that a server may ask to wait before another try."""
_PATIENCE = 5.0


@dataclass(frozen=True)
class Turn:
    """A prompt as servers are asked it."""

    suite: str
    id: str
    """The conversation's, followed by `#` and the turn's number from the second turn on."""
    turn: int
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Job:
    """One request of a window."""

    turn: Turn
    round: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """What all requests of a window have in common."""

    max_new_tokens: int
    temperature: float
    thinking: bool
    timeout: float
    """Seconds for one request; and for its waiting, if the server has no room."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job; times in seconds from the start of the load."""

    job: Job
    started: float
    sent: float
    """The try that counts."""
    rejected: int
    answer: Answer
    """What was received; of a failed try too."""
    fault: Fault | None


def run_load(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    concurrency: int,
    sampling: Sampling,
    *,
    api_key: str | None = None,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> float:
    """Send jobs to a server, in order, `concurrency` at a time.

    Args:
        endpoint: the server.
        jobs: what to ask.
        concurrency: requests in flight; fewer only if fewer are left.
        sampling: see there.
        api_key: that the server may ask for.
        done: called in the caller's thread with every outcome, as soon as it is there.

    Returns:
        Seconds from the first request's start to the end of the last.

    Raises:
        UserError: the server wants another key or is not what it was, does not answer any more, or answered nothing.
    """
    load = _Load(endpoint, jobs, concurrency, sampling, api_key)
    last, failures, answered = 0.0, 0, 0
    fault: Fault | None = None
    try:
        for _ in jobs:
            outcome = load.outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            last = max(last, outcome.sent + outcome.answer.ended - outcome.answer.sent)
            done(outcome)
            fault = outcome.fault
            answered += fault is None
            failures = 0 if fault is None else failures + 1
            _check(endpoint, fault, failures > FAILURES_TO_GIVE_UP + concurrency)
    finally:
        load.stop()
    _check(endpoint, fault, not answered)
    return last


def _check(endpoint: Endpoint, fault: Fault | None, hopeless: bool) -> None:
    """End the bench where more requests would fail alike."""
    if fault is not None and (hopeless or fault.status in (401, 403, 404, 405)):
        line = explain(endpoint.name, endpoint.url, fault)
        raise UserError(f"{line}; what was measured is kept, and the same command goes on")


class _Load:
    """The threads of `run_load`."""

    def __init__(
        self, endpoint: Endpoint, jobs: Sequence[Job], concurrency: int, sampling: Sampling, api_key: str | None
    ) -> None:
        self.outcomes: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._endpoint, self._sampling = endpoint, sampling
        self._jobs, self._lock, self._stopped = iter(jobs), threading.Lock(), threading.Event()
        self._clients = [Client(endpoint.url, api_key) for _ in range(min(concurrency, len(jobs)))]
        self._threads = [threading.Thread(target=self._work, args=(c,), daemon=True) for c in self._clients]
        self._began = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all threads, and what they are waiting for."""
        self._stopped.set()
        for client in self._clients:
            client.abort()
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _work(self, client: Client) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    job = next(self._jobs, None)
                if job is None:
                    return
                self.outcomes.put(self._ask(client, job))
        except BaseException as error:  # a fault of ours, which must not leave the other side waiting
            self.outcomes.put(error)
        finally:
            client.close()

    def _ask(self, client: Client, job: Job) -> Outcome:
        """The outcome of a job, tried again for as long as the server says that it has no room."""
        sampling, rejected = self._sampling, 0
        body = self._endpoint.body(
            job.turn.messages, sampling.max_new_tokens, sampling.temperature, job.seed, sampling.thinking
        )
        started = time.perf_counter()
        while True:
            fault = None
            try:
                answer = client.stream(body, sampling.timeout)
            except Fault as error:
                assert error.received is not None
                fault, answer = error, error.received
                if error.seconds_until_room is not None:
                    rejected += 1
                    wait = min(error.seconds_until_room, LONGEST_WAIT)
                    in_time = time.perf_counter() + wait - started < sampling.timeout
                    if in_time and not self._stopped.wait(wait):
                        continue
            return Outcome(job, started - self._began, answer.sent - self._began, rejected, answer, fault)
