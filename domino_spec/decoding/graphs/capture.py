"""CUDA graphs of static cycles: a shape is captured when it is first needed, and replayed from then on.

Before a capture the cycle runs without active requests, which changes nothing (`cycles`): so kernels are compiled,
workspaces allocated and libraries set up outside of the graph. If a capture fails, cycles run eagerly from then on, and
one line in the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from domino_spec.target.model import Target

_log = logging.getLogger(__name__)

WARM_UPS = 2
"""Cycles before a capture."""


class Captured(Protocol):
    """A captured cycle."""

    def replay(self) -> object:
        """Run it again."""
        ...


def capturable(device: torch.device) -> bool:
    """Whether a device has graphs."""
    return device.type == "cuda"


def why_not(target: Target) -> str | None:
    """Why a target's passes cannot be captured, as far as it is known beforehand; None if nothing is known.

    A capture does not record work on another device, and does not fail at it: every replay would lack that work.
    """
    model = target.model
    devices = {t.device for tensors in (model.parameters(), model.buffers()) for t in tensors} | {target.device}
    if len(devices) > 1:
        return f"{target.name} is spread over {', '.join(sorted(map(str, devices)))}"
    offloaded = next(
        (type(m).__name__ for m in model.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)), None
    )
    return None if offloaded is None else f"{target.name} keeps weights of {offloaded} elsewhere"


def warm_up(cycle: Callable[[], None], device: torch.device) -> None:
    """Run a cycle a few times; on CUDA on another stream than the current one, which captures require."""
    if device.type != "cuda":
        cycle()
        return
    with torch.cuda.device(device):
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(WARM_UPS):
                cycle()
        torch.cuda.current_stream().wait_stream(other)


def capture(cycle: Callable[[], None], pool: Any, device: torch.device) -> Captured:
    """A CUDA graph of a cycle; capturing runs nothing."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a server's event loop does.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            cycle()
    return graph


class Graphs:
    """Runs cycles, by graphs if the device has them.

    Args:
        target: whose passes are a part of the cycles.
        active: [slots] bool, the requests that a cycle decodes; none while one is warmed up.
    """

    def __init__(self, target: Target, active: Tensor) -> None:
        self._device, self._active = target.device, active
        self.captures = capturable(self._device)
        """Whether new shapes are captured."""
        self._graphs: dict[Hashable, Captured] = {}
        self._pool: Any = None
        if self.captures and (reason := why_not(target)) is not None:
            self._give_up(reason)

    def __len__(self) -> int:
        return len(self._graphs)

    def runner(self, shape: Hashable, cycle: Callable[[], None]) -> Callable[[], object]:
        """What runs a cycle of a shape: its graph, which is captured now if there is none yet, or the cycle itself."""
        if self.captures and shape not in self._graphs:
            self._capture(shape, cycle)
        graph = self._graphs.get(shape)
        return cycle if graph is None else graph.replay

    def _capture(self, shape: Hashable, cycle: Callable[[], None]) -> None:
        if self._pool is None and self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        active = self._active.clone()
        try:
            self._active.fill_(False)
            warm_up(cycle, self._device)
        finally:
            self._active.copy_(active)
        try:
            self._graphs[shape] = capture(cycle, self._pool, self._device)
        except Exception as error:  # a module may do anything that a graph cannot hold
            self._give_up(_reason(error))

    def _give_up(self, reason: str) -> None:
        self.captures = False
        _log.warning("cycles are not captured as CUDA graphs and run eagerly, which is slower: %s", reason)


def _reason(error: Exception) -> str:
    """An error's message, and the module that raised it."""
    module, frame = None, error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        module = type(owner).__name__ if isinstance(owner, nn.Module) else module
        frame = frame.tb_next
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    return message if module is None else f"{module}: {message}"
