"""Watching a cycle: when the calls that part its stages begin and end, by the host's clock or the device's.

Nothing of the loop or of a drafter is repeated here. While a cycle is watched, the few calls that every method makes
(the target's pass and LM head, the draft's layers and LM head) are noted, and the stages follow from them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal
from domino_spec.target.model import Target

STAGES = ("verify", "verify_lm_head", "context", "backbone", "lm_head", "rollout", "accept_commit")
"""Stages in the order of the tables: the target's layers and its LM head; projection of newly committed features; the
draft's layers and base logits; head rollout or growth of a tree; acceptance and commit. A method has some of them."""
HOLD = 0.25
"""Seconds for which a device is held back at most while the host queues a cycle."""


@dataclass(frozen=True)
class Span:
    """One call while it was watched."""

    name: str
    begin: Any
    end: Any
    values: int
    """Of the tensor that it returned, or tokens of the proposal; else 0."""


class Watch:
    """Notes when calls begin and end: by the wall clock, or on CUDA by events in the order of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.spans: list[Span] = []
        self._device = device

    def mark(self) -> Any:
        """This moment."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronise(self._device)
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks, once the device is done."""
        return begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, noted under `name` whenever it is made."""

        def noted(*arguments: Any, **options: Any) -> Any:
            begin = self.mark()
            result = call(*arguments, **options)
            end = self.mark()
            tensor = result.tokens if isinstance(result, Proposal) else result
            self.spans.append(Span(name, begin, end, tensor.numel() if isinstance(tensor, Tensor) else 0))
            return result

        return noted

    def of(self, *names: str) -> list[Span]:
        """The calls of these names, in the order in which they ended."""
        return [span for span in self.spans if span.name in names]

    def total(self, spans: Sequence[Span]) -> float:
        """Seconds of calls that do not overlap."""
        return sum(self.seconds(span.begin, span.end) for span in spans)


@contextmanager
def watched(watch: Watch, target: Target, draft: Any) -> Iterator[None]:
    """While this lasts, the calls that part the stages are noted, whoever makes them."""
    calls: list[tuple[Any, str, str]] = [(target, "forward", "verify"), (target, "lm_head", "verify_lm_head")]
    if draft is not None and draft.borrows_lm_head:
        calls += [(draft.backbone, "over_cache", "backbone"), (draft, "base_logits", "lm_head")]
    elif draft is not None:
        calls += [(draft, "extend", "backbone"), (draft, "base_logits", "lm_head")]
    try:
        for owner, method, name in calls:
            setattr(owner, method, watch.timed(name, getattr(owner, method)))
        yield
    finally:
        for owner, method, _ in calls:
            vars(owner).pop(method, None)  # the class's own is seen again


def stage_seconds(watch: Watch) -> dict[str, float]:
    """Seconds of the stages that a watched cycle had, by the names in `STAGES`.

    What a drafter does after its first LM head, further passes of its layers aside, is the rollout: the head's steps,
    or the growth of a tree. What it does before that prepares the pass, and belongs to no stage. The rollout of a
    drafter without an LM head (look-up) is all that it does.
    """
    inner, heads = watch.of("backbone", "lm_head"), watch.of("lm_head")
    (propose,), (verification,) = watch.of("propose"), watch.of("verification")
    seconds = {name: watch.total(watch.of(name)) for name in STAGES if watch.of(name)}
    if propose.values:
        begin, later = propose.begin, inner
        if heads:
            begin, later = heads[0].end, inner[inner.index(heads[0]) + 1 :]
        seconds["rollout"] = watch.seconds(begin, propose.end) - watch.total(later)
    target = watch.of("verify", "verify_lm_head")
    seconds["accept_commit"] = watch.total([verification, *watch.of("commit")]) - watch.total(target)
    return {name: seconds[name] for name in STAGES if name in seconds}


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def hold_device(device: torch.device, seconds: float) -> torch.cuda.Event:
    """Keep a CUDA device busy for so long that the host can queue a cycle meanwhile; returns what happens at the end.

    Work that waits in the queue runs back to back, so that events around it count the device's time and nothing else.
    """
    torch.cuda._sleep(int(min(seconds, HOLD) * _sleep_rate(device)))
    over = torch.cuda.Event()
    over.record(torch.cuda.current_stream(device))
    return over


@functools.cache
def _sleep_rate(device: torch.device) -> float:
    """Cycles that make a device sleep for a second."""
    cycles, stream = 10_000_000, torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    torch.cuda._sleep(cycles)
    end.record(stream)
    synchronise(device)
    return cycles / (begin.elapsed_time(end) / 1e3)
