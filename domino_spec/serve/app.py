"""The routes: from an HTTP request to jobs of the engine, and from their progress to the answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits
from domino_spec.decoding.request import Request as EngineRequest
from domino_spec.decoding.sampling import seed_of
from domino_spec.serve.answers import Answers
from domino_spec.serve.fields import ApiError, invalid, parse_json
from domino_spec.serve.metrics import CONTENT_TYPE, Metrics
from domino_spec.serve.middleware import Doorman, log_line, on_api_error, on_crash, on_http_error
from domino_spec.serve.protocol import Ask, Served, check_model_name, parse_chat, parse_completion
from domino_spec.serve.runner import Closed, Job, QueueFull, Runner
from domino_spec.serve.tokens import TokenTexts
from domino_spec.settings import UserError
from domino_spec.target.text import encode_prompt

T = TypeVar("T")

LARGEST_BODY = 16 * 1024 * 1024
"""Bytes of a request; more than any context holds."""
GONE = 499
"""What the log calls a request whose client has left."""
ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"})


@dataclass(frozen=True)
class Settings:
    """How a server behaves towards its clients."""

    model: str
    """The name that requests must give."""
    max_queue: int = 64
    """Requests that may wait for a slot."""
    timeout: float | None = 600.0
    """Seconds that a request may take, its waiting included; None for any."""
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    """Web pages whose scripts may ask."""
    method: str = ""
    """How the engine drafts, for /metrics."""
    drafting_off: str | None = None
    """Why it does not (`methods.why_nothing_is_drafted`)."""
    log: Callable[[dict[str, Any]], None] = log_line
    """Called with a record of every request."""


class Service:
    """One engine behind HTTP; `app` is the ASGI application, `runner` the engine's thread.

    Args:
        engine: nobody else may call it from now on.
        settings: see there.

    Raises:
        UserError: the target has no tokenizer.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        if engine.target.tokenizer is None:
            raise UserError(f"{engine.target.name} has no tokenizer, and a server reads and writes text")
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        self.runner = Runner(engine, settings.max_queue, self.metrics.grew)
        self.metrics.watch(self.runner, settings.method, settings.drafting_off)
        self._tokenizer, self._tokens = engine.target.tokenizer, TokenTexts(engine.target.tokenizer)
        self._served = Served(
            settings.model, engine.target.vocab_size, engine.capacity, engine.slots + settings.max_queue
        )
        self._started = int(time.time())
        self.app = self._make_app()

    def _make_app(self) -> Starlette:
        settings, middleware = self.settings, []
        if settings.cors_origins:  # outermost: a page may read errors too
            cors: dict[str, Any] = dict(
                allow_origins=list(settings.cors_origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
            middleware.append(Middleware(CORSMiddleware, **cors))
        middleware.append(
            Middleware(Doorman, routes=ROUTES, metrics=self.metrics, api_key=settings.api_key, log=settings.log)
        )
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            middleware=middleware,
            exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_crash},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.runner.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(self.runner.stop)

    # Routes

    async def _health(self, request: Request) -> Response:
        state = "failed" if self.runner.error is not None else "draining" if self.runner.draining else "ok"
        return _json({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_record()]})

    async def _model(self, request: Request) -> Response:
        check_model_name(request.path_params["name"], self._served)
        return _json(self._model_record())

    def _model_record(self) -> dict[str, Any]:
        named = {"id": self._served.name, "object": "model", "created": self._started, "owned_by": "domino-spec"}
        return {**named, "max_model_len": self._served.capacity}

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    # From a request to its answer

    async def _answer(self, request: Request, parse: Callable[[dict[str, Any], Served], Ask]) -> Response:
        started, details = time.perf_counter(), request.state.details
        try:
            ask = parse(parse_json(await _body(request)), self._served)
        except ClientDisconnect:
            return _gone(details)
        details["stream"] = ask.stream
        requests, prefixes = await asyncio.to_thread(self._requests, ask)
        changed = asyncio.Event()
        answers = Answers(
            ask,
            self._submit(requests, changed),
            model=self._served.name,
            fingerprint=self.engine.target.fingerprint,
            tokens=self._tokens,
            prefixes=prefixes,
        )
        answering = _Answering(self, answers, changed, started, details)
        handed_on = False
        try:
            # Headers wait for the first tokens, so that what fails before them has a status of its own.
            await answering.until(request.receive, lambda: answers.started if ask.stream else answers.finished)
            handed_on = ask.stream
            return _EventStream(answering) if ask.stream else _json(answers.whole())
        except ClientDisconnect:
            return _gone(details)
        finally:
            if not handed_on:
                answering.close()

    def _requests(self, ask: Ask) -> tuple[list[EngineRequest], list[str]]:
        """What the engine is asked for, every prompt as often as choices are wanted, and what each answer echoes."""
        requests: list[EngineRequest] = []
        prefixes: list[str] = []
        for prompt in ask.prompts:
            ids = self._encode(ask, prompt)
            limits = Limits(self._max_tokens(ask, len(ids)), ask.stop, self._stop_tokens(ask))
            for _ in range(ask.n):
                settings = replace(ask.settings, seed=seed_of(ask.settings.seed, len(requests)))
                requests.append(EngineRequest(ids, settings, limits, ask.top_logprobs))
                prefixes.append(self._echo(ask, prompt))
        return requests, prefixes

    def _encode(self, ask: Ask, prompt: Any) -> list[int]:
        param = "messages" if ask.chat else "prompt"
        if not ask.chat and not isinstance(prompt, str):
            return list(prompt)
        try:
            ids = encode_prompt(self._tokenizer, prompt, chat=ask.chat, enable_thinking=ask.enable_thinking)
        except UserError as error:
            raise invalid(param, str(error)) from None
        if not ids:
            raise invalid(param, "the prompt is empty")
        return ids

    def _max_tokens(self, ask: Ask, prompt_tokens: int) -> int:
        left, capacity = self._served.capacity - prompt_tokens, self._served.capacity
        if left < 1 or left < (ask.max_tokens or 1):
            asked = "" if ask.max_tokens is None else f" and max_tokens {ask.max_tokens}"
            message = f"a prompt of {prompt_tokens} tokens{asked} exceed the context of {capacity} tokens"
            raise invalid("messages" if ask.chat else "prompt", message, "context_length_exceeded")
        return left if ask.max_tokens is None else ask.max_tokens

    def _stop_tokens(self, ask: Ask) -> frozenset[int]:
        own = frozenset() if ask.ignore_eos else self.engine.target.stop_token_ids
        return own | frozenset(ask.stop_token_ids)

    def _submit(self, requests: Sequence[EngineRequest], changed: asyncio.Event) -> list[Job]:
        try:
            return self.runner.submit(requests, changed)
        except UserError as error:
            raise invalid(None, str(error)) from None
        except QueueFull:
            waiting = self.runner.num_waiting
            message = f"the queue is full: {waiting} requests wait for one of {self.engine.slots} slots; try again"
            raise ApiError(429, message, code="queue_full", retry_after=1) from None
        except Closed:
            if self.runner.error is not None:
                raise ApiError(503, "the engine has failed; the server must be restarted", code="crashed") from None
            raise ApiError(503, "the server is stopping", code="stopped", retry_after=5) from None

    def _echo(self, ask: Ask, prompt: Any) -> str:
        if not ask.echo:
            return ""
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt, skip_special_tokens=True))


class _Answering:
    """One request between its submission and its end, however it ends.

    Args:
        service: to which it was submitted.
        answers: its jobs and what they have written.
        changed: set when one of its jobs has progressed.
        started: when it arrived.
        details: of its line in the log.
    """

    def __init__(
        self, service: Service, answers: Answers, changed: asyncio.Event, started: float, details: dict[str, Any]
    ) -> None:
        self.answers, self.changed, self.details = answers, changed, details
        self._service, self._started = service, started

    async def until(self, receive: Receive, reached: Callable[[], bool]) -> None:
        """Wait until the jobs have got somewhere.

        Raises:
            ApiError: one has failed, or time is up.
            ClientDisconnect: the client has left.
        """

        async def wait() -> None:
            self.answers.check()
            while not reached():
                await self.changed.wait()
                self.changed.clear()
                self.answers.check()

        await self.unless_it_ends(receive, wait())

    async def unless_it_ends(self, receive: Receive, work: Awaitable[T]) -> T:
        """The result of `work`, which is given up where the client leaves or time is up; raises as `until`."""
        timeout = self._service.settings.timeout
        left = None if timeout is None else max(0.0, self._started + timeout - time.perf_counter())
        task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
        try:
            done, _ = await asyncio.wait((task, leaving), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                return task.result()
            if done:
                raise ClientDisconnect
            message = f"the request took longer than {timeout:g} seconds; ask for fewer tokens"
            raise ApiError(504, message, code="timeout", retry=False)
        finally:
            for one in (task, leaving):
                one.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    def close(self) -> None:
        """Free the slots of what has not ended, and say in the log what came of it."""
        jobs = self.answers.jobs
        self._service.runner.cancel(jobs)
        record = self.answers.usage()
        reasons = sorted({job.progress.finish_reason or "cancelled" for job in jobs})
        taken_up = [job.taken_up - job.submitted for job in jobs if job.taken_up is not None]
        self.details.update(
            prompt_tokens=record["prompt_tokens"],
            tokens=record["completion_tokens"],
            tau=round(record["acceptance_length"], 3),
            queue_seconds=round(max(taken_up), 4) if taken_up else None,
            finish=",".join(reasons),
        )


class _EventStream(Response):
    """Sends an answer piece by piece as server-sent events."""

    def __init__(self, answering: _Answering) -> None:
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream"
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or as much as the client wants; an error that comes late is the last event."""
        answering = self._answering
        try:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await answering.unless_it_ends(receive, self._send_chunks(send))
                last = b"data: [DONE]\n\n"
            except ApiError as error:
                answering.details["status"] = error.status
                last = _event(error.record)
            finally:
                answering.close()  # the slot must not wait for a client that does not read
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except (ClientDisconnect, OSError):
            answering.details["status"] = GONE

    async def _send_chunks(self, send: Send) -> None:
        answers, changed = self._answering.answers, self._answering.changed
        while True:
            changed.clear()
            answers.check()
            finished = answers.finished
            body = b"".join(map(_event, answers.chunks()))
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if finished:
                return
            await changed.wait()


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + _dump(record) + b"\n\n"


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def _json(record: dict[str, Any], status: int = 200) -> Response:
    return Response(_dump(record), status, media_type="application/json")


def _gone(details: dict[str, Any]) -> Response:
    details["status"] = GONE
    return Response(status_code=GONE)


async def _disconnect(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """A request's body.

    Raises:
        ApiError: it is not JSON by its header, or too large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the header Content-Type must be application/json", code="invalid_content_type")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)
