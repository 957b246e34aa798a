"""Around every request: an id, the API key, one line of log, and what clients get when something goes wrong."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from domino_spec.serve.fields import ApiError
from domino_spec.serve.metrics import Metrics, outcome

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,80}")
_QUIET = ("/health", "/metrics")
"""Asked for every few seconds: logged only when they fail."""


def log_line(record: dict[str, Any]) -> None:
    """One JSON object on standard error."""
    print(json.dumps(record), file=sys.stderr, flush=True)


def error_response(error: ApiError) -> Response:
    """An error as clients expect it."""
    return Response(json.dumps(error.record), error.status, error.headers, media_type="application/json")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of its own errors: no such route, or another method."""
    status = getattr(error, "status_code", 500)
    message = {404: "there is no such route", 405: "this route does not take this method"}.get(status, str(error))
    response = error_response(ApiError(status, f"{message}: {request.method} {request.url.path[:200]}"))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def on_crash(request: Request, error: Exception) -> Response:
    """Starlette's handler of everything else, whose traceback goes to the log."""
    return error_response(ApiError(500, "the server failed to answer; its log says why", code="internal_error"))


class Doorman:
    """Outermost ASGI layer.

    Args:
        app: the layer below.
        routes: that are counted by name; all others are counted as "other".
        metrics: where requests are counted.
        api_key: without which nothing but /health is answered; None lets everybody in.
        log: called with a record of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: frozenset[str],
        metrics: Metrics,
        api_key: str | None,
        log: Callable[[dict[str, Any]], None] = log_line,
    ) -> None:
        self._app, self._routes, self._metrics, self._log = app, routes, metrics, log
        self._api_key = None if api_key is None else api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        details: dict[str, Any] = {}
        scope.setdefault("state", {})["details"] = details
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            if self._admits(scope, headers):
                await self._app(scope, receive, send_with_id)
            else:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error_response(error)(scope, receive, send_with_id)
        finally:
            status = details.pop("status", status)
            route = scope["path"] if scope["path"] in self._routes else "other"
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
