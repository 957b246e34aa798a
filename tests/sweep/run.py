"""Runs families in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import torch
from transformers.utils import logging

from tests.sweep.judge import Outcome, judge

SECONDS = 180
"""A family that takes longer hangs."""
MEMORY = 4 << 30
"""Bytes of address space of one family: a part that was left at its full size is an error, not a full machine."""


def run_family(family: str, trial: Callable[[str], Outcome] = judge, seconds: float = SECONDS) -> Outcome:
    """The outcome of one family, whatever becomes of its process.

    Args:
        family: its name.
        trial: what the process runs, a function of a module.
        seconds: after which it is stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.judge"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as noise:
        path = f"/proc/{os.getpid()}/fd/{noise.fileno()}"
        process = context.Process(target=_child, args=(family, trial, sender, path), daemon=True)
        process.start()
        sender.close()
        outcome = _wait(family, process, receiver, seconds)
        if outcome.kind == "abort":
            noise.seek(0)
            said = " ".join(noise.read()[-300:].split())
            outcome = Outcome(family, "abort", f"{outcome.detail} {said}".strip())
        return outcome


def _wait(family: str, process, receiver: Connection, seconds: float) -> Outcome:
    try:
        outcome = receiver.recv() if receiver.poll(seconds) else None
    except EOFError:  # it died without one
        outcome = None
        process.join()
    if outcome is not None:
        process.join(seconds)  # a corrupted heap may show only while the process ends
    if process.exitcode is None:
        process.kill()
        process.join()
        return Outcome(family, "timeout", f"not done after {seconds:.0f} s")
    if outcome is not None and process.exitcode == 0:
        return outcome
    code = process.exitcode
    return Outcome(family, "abort", signal.Signals(-code).name if code < 0 else f"exit status {code}")


def _child(family: str, trial: Callable[[str], Outcome], sender: Connection, noise: str) -> None:
    with open(noise, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if "DOMINO_SPEC_NATIVE_SANITIZE" not in os.environ:  # a sanitizer maps far more than it uses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sender.send(trial(family))
    sender.close()


def run_all(names: Sequence[str], jobs: int = 1) -> Iterator[tuple[Outcome, float]]:
    """Outcomes of many families as they come, with the seconds that each took."""

    def timed(family: str) -> tuple[Outcome, float]:
        start = time.perf_counter()
        return run_family(family), time.perf_counter() - start

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(timed, names)
