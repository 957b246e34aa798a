"""Around every request: an id, the API key, one line of log, errors in OpenAI's shape, and counts for Prometheus."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from domino_spec.serve.protocol import ApiError, invalid
from domino_spec.serve.runner import CRASHED, STOPPED, Closed, Crashed, Job, Progress, QueueFull, Runner
from domino_spec.settings import UserError

GONE = 499
"""The status in the log of a request whose client has left."""
ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"})
"""Logged and counted by name; all others are "other"."""
_QUIET = ("/health", "/metrics")
"""Asked for every few seconds: logged only when they fail."""
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,80}")


def log_line(record: dict[str, Any]) -> None:
    """Write one JSON object to standard error."""
    print(json.dumps(record), file=sys.stderr, flush=True)


class RequestMiddleware:
    """The outermost ASGI layer; `scope["state"]["details"]` collects what the log says about a request.

    Args:
        app: the layer below.
        metrics: where requests are counted.
        api_key: without it nothing but /health is answered; None admits every request.
        log: called with a record of every request.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, log: Callable[[dict[str, Any]], None] = log_line
    ) -> None:
        self._app, self._metrics, self._log = app, metrics, log
        self._api_key = None if api_key is None else api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        details: dict[str, Any] = {}
        scope.setdefault("state", {})["details"] = details

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                details.setdefault("status", message["status"])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if self._admits(scope, headers):
                await self._app(scope, receive, send_with_id)
            else:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error_response(error)(scope, receive, send_with_id)
        finally:
            status = details.pop("status", 500)
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._metrics.requests.labels(route, outcome(status)).inc()
            if status >= 400 or route not in _QUIET:
                seconds = round(time.perf_counter() - started, 4)
                moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                record = {"time": moment, "id": request_id, "route": route, "status": status, "seconds": seconds}
                self._log({**record, **details})

    def _admits(self, scope: Scope, headers: Headers) -> bool:
        if self._api_key is None or scope["path"] == "/health":
            return True
        kind, _, key = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)


# Errors


def error_response(error: ApiError) -> Response:
    """An error as clients expect it."""
    return Response(json.dumps(error.record), error.status, error.headers, media_type="application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of every exception in `HANDLED`."""
    match error:
        case ApiError():
            return error_response(error)
        case UserError():  # the engine cannot decode the request
            return error_response(invalid(None, str(error)))
        case QueueFull():
            return error_response(ApiError(429, str(error), code="queue_full", retry_after=1))
        case Crashed():
            return error_response(ApiError(503, str(error), code=CRASHED))
        case Closed():
            return error_response(ApiError(503, str(error), code=STOPPED, retry_after=5))
        case ClientDisconnect():  # the response goes nowhere
            request.state.details["status"] = GONE
            return Response(status_code=GONE)
        case HTTPException(status_code=status):  # Starlette's own: no such route, or another method
            said = {404: "there is no such route", 405: "this route does not take this method"}.get(status, str(error))
            response = error_response(ApiError(status, f"{said}: {request.method} {request.url.path[:200]}"))
            response.headers.update(error.headers or {})
            return response
    return error_response(ApiError(500, "the server failed to answer; its log says why", code="internal_error"))


HANDLED = (ApiError, UserError, QueueFull, Crashed, Closed, ClientDisconnect, HTTPException, Exception)


# Metrics

PREFIX = "domino_spec"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What /metrics shows of one server: requests, the queue, tokens, and how drafting does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_requests", "HTTP requests that have ended.", ["route", "outcome"], registry=self.registry
        )
        self._generated = self._counter("generated_tokens", "Tokens of answers.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts taken up.")
        self._cached = self._counter("cached_prompt_tokens", "Tokens of prompts that need not be read.")
        self._queue = self._histogram("queue_seconds", "Seconds a request waited for a slot.", SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "Seconds to a request's first tokens.", SECONDS)
        self._between = self._histogram(
            "inter_token_seconds",
            "Seconds per token after the first ones: tokens of one verify pass share the time since the last.",
            TOKEN_SECONDS,
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, runner: Runner, method: str, drafting_off: str | None) -> None:
        """Report what a runner and its engine count, what they draft with, or why they do not draft."""
        self.registry.register(_EngineCollector(runner, method, drafting_off))

    def grew(self, job: Job, before: Progress, now: Progress) -> None:
        """Count a job's progress."""
        fresh = now.tokens - before.tokens
        if fresh <= 0:
            return
        self._generated.inc(fresh)
        seconds = now.at - before.at
        if before.tokens:
            for _ in range(fresh):
                self._between.observe(seconds / fresh)
            return
        self._prompt.inc(len(job.request.prompt_ids))
        self._cached.inc(job.generation.cached_tokens)
        self._first.observe(now.at - job.submitted)
        self._queue.observe((job.taken_up or now.at) - job.submitted)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


def outcome(status: int) -> str:
    """A word for an HTTP status."""
    if status < 400:
        return "ok"
    names = {429: "queue_full", 499: "disconnected", 503: "unavailable", 504: "timeout"}
    return names.get(status, "refused" if status < 500 else "failed")


class _EngineCollector:
    """Reads the engine's counts when Prometheus asks for them."""

    def __init__(self, runner: Runner, method: str, drafting_off: str | None) -> None:
        self._runner, self._method, self._drafting_off = runner, method, drafting_off

    def collect(self) -> Iterator[Metric]:
        """One family per count."""
        runner, stats = self._runner, self._runner.engine.stats
        drafting = float(self._drafting_off is None)
        yield _gauge("drafting", "1 where the server drafts when it pays, 0 where drafting is off.", drafting)
        info = GaugeMetricFamily(
            f"{PREFIX}_method_info", "How the server drafts, or why it does not.", labels=("method", "drafting_off")
        )
        info.add_metric((self._method, self._drafting_off or ""), 1.0)
        yield info
        yield _gauge("running_requests", "Requests that have a slot.", runner.num_running)
        yield _gauge("waiting_requests", "Requests that wait for a slot.", runner.num_waiting)
        yield _gauge("slots", "Requests that are decoded together at most.", runner.engine.slots)
        yield _counter("cycles", "Cycles of the decoding loop.", stats.cycles)
        yield _counter("drafted_cycles", "Cycles in which something was drafted.", stats.drafted_cycles)
        share = stats.drafted_cycles / stats.cycles if stats.cycles else 0.0
        yield _gauge("drafted_share", "Share of cycles in which something was drafted.", share)
        yield _counter("verify_passes", "Verify passes of single requests.", stats.verify_passes)
        yield _counter("drafts", "Drafts proposed.", stats.drafts)
        accepted = stats.committed_tokens - stats.verify_passes
        yield _counter("accepted_drafts", "Drafts accepted, before stop or length cut them.", accepted)
        tau = stats.committed_tokens / stats.verify_passes if stats.verify_passes else 0.0
        yield _gauge("acceptance_length", "tau: mean of accepted drafts + 1 over all verify passes.", tau)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
