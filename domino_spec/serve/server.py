"""Starting and stopping: an engine that is ready to serve, and uvicorn around it, which drains before it exits."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from domino_spec.api import default_min_confidence
from domino_spec.decoding.cycle import Drafter
from domino_spec.decoding.engine import Engine, Stats
from domino_spec.decoding.policy.adaptive import AdaptivePolicy
from domino_spec.decoding.policy.costs import CostModel, measure_costs
from domino_spec.decoding.prefixes import PrefixCache
from domino_spec.decoding.request import Limits, Request
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import default_method, make_drafter, watch_for
from domino_spec.serve.app import Service
from domino_spec.serve.preflight import check_room, check_slots, slot_capacity
from domino_spec.serve.runner import STOPPED
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.target.text import encode_prompt

WARM_UP_TOKENS = 8
WRITING_SECONDS = 5
"""Seconds for the last bytes of answers, once the engine is done."""


def make_engine(
    target: Target,
    draft: AnyDraft | None,
    *,
    slots: int,
    capacity: int | None = None,
    method: str | None = None,
    num_drafts: int | None = None,
    candidates: int | None = DEFAULT_CANDIDATES,
    costs_file: Path | None = None,
    prefix_bytes: int = 0,
    static: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Engine:
    """An engine that is warm and chooses the number of drafts by the measured cost of passes, unless it is given.

    Args:
        target: the model served.
        draft: None for plain decoding or prompt lookup.
        slots: requests that are decoded together.
        capacity: tokens per slot; None for the target's length, `DEFAULT_CAPACITY` at most.
        method: a key of `methods.METHODS`; None for the draft's default.
        num_drafts: a fixed number per cycle; None adapts.
        candidates: see `make_drafter`.
        costs_file: where costs are read from, or written to once they are measured; None measures them every time.
        prefix_bytes: memory for the caches of texts that ended, which follow-up turns continue; 0 keeps none.
        static: see `Engine`.
        report: called with lines about the progress.

    Raises:
        UserError: a setting out of range, or a draft that does not serve the method.
    """
    if num_drafts is not None and num_drafts < 0:
        raise UserError(f"num_drafts must not be negative, got {num_drafts}")
    check_slots(slots)
    capacity = slot_capacity(target.max_length, capacity)
    method = default_method(draft) if method is None else method
    drafter = make_drafter(
        method,
        draft,
        requests=1,  # a policy cuts what does not pay
        device=target.device,
        candidates=candidates,
        min_confidence=default_min_confidence(target.device),
        num_drafts=num_drafts,
    )
    check_room(target, drafter, slots, capacity, prefix_bytes)
    adapts = num_drafts is None and drafter.max_drafts > 0
    costs = _costs(target, drafter, slots, costs_file, report) if adapts else None
    engine = Engine(target, drafter, slots=slots, capacity=capacity, num_drafts=num_drafts, static=static)
    report("warming up")
    _warm_up(engine)
    engine.watch = watch_for(method)
    engine.policy = None if costs is None else AdaptivePolicy(costs)
    engine.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
    return engine


def read_costs(file: Path | None) -> CostModel | None:
    """Costs that were measured before; None if there are none yet.

    Raises:
        UserError: the file holds something else.
    """
    if file is None or not file.exists():
        return None
    try:
        return CostModel.load(file)
    except UserError as error:
        raise UserError(f"{error}; delete the file, and what passes cost is measured again") from None


def _costs(target: Target, drafter: Drafter, slots: int, file: Path | None, report: Callable[[str], None]) -> CostModel:
    kept = read_costs(file)
    if kept is not None:
        return kept
    report(f"measuring what passes cost, up to {slots} requests")
    costs = measure_costs(target, drafter, slots, report=report)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        costs.save(file)
        report(f"wrote {file}")
    return costs


def _warm_up(engine: Engine) -> None:
    """Decode a few tokens in every slot, and reset the counts."""
    prompt = [0] if engine.target.tokenizer is None else encode_prompt(engine.target.tokenizer, "Hello.", chat=False)
    room = engine.capacity - len(prompt)
    if room >= 1:
        limits = Limits(min(WARM_UP_TOKENS, room), stop_token_ids=frozenset())
        for _ in range(engine.slots):
            engine.submit(Request(prompt, limits=limits))
        while engine.busy:
            engine.step()
    engine.stats = Stats()


class Server(uvicorn.Server):
    """Uvicorn; on SIGTERM or SIGINT it waits for running requests and refuses new ones.

    Args:
        service: what is served.
        drain_seconds: how long running requests may take; a second signal ends them at once.
        on_ready: called when clients can connect.
    """

    def __init__(
        self, service: Service, *, drain_seconds: float = 30.0, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        # The middleware logs one line per request. Uvicorn logs its warnings only.
        config = uvicorn.Config(
            service.app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=WRITING_SECONDS,
        )
        super().__init__(config)
        self._runner, self._drain_seconds, self._on_ready = service.runner, drain_seconds, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    def serve_forever(self, bound: socket.socket) -> None:
        """Serve until a signal ends it."""
        asyncio.run(self.serve(sockets=[bound]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, then say that it is ready."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first drains, the next ends all requests at once."""
        if self._loop is None:  # not started yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Stop when the running requests have ended; called again, stop at once. To be called in the event loop."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._drain_seconds = 0.0

    async def _drain(self) -> None:
        self._runner.draining = True
        started = asyncio.get_running_loop().time()
        while self._runner.num_running or self._runner.num_waiting:
            if asyncio.get_running_loop().time() - started >= self._drain_seconds:
                self._runner.fail_all(STOPPED)
                break
            await asyncio.sleep(0.02)
        self.should_exit = True
