"""The routes: from an HTTP request to jobs of the engine, and from their progress to the answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits
from domino_spec.decoding.request import Request as EngineRequest
from domino_spec.decoding.sampling import seed_of
from domino_spec.serve.answers import Answers, TokenTexts
from domino_spec.serve.middleware import CONTENT_TYPE, GONE, HANDLED, Metrics, RequestMiddleware, log_line, on_error
from domino_spec.serve.protocol import (
    AnyRequest,
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    Served,
    check_model_name,
    invalid,
    parse,
)
from domino_spec.serve.runner import Runner
from domino_spec.settings import UserError
from domino_spec.target.text import encode_prompt

JSON = "application/json"
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
LARGEST_BODY = 16 * 1024 * 1024
"""Bytes of a request; more than any context holds."""


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
    """Web pages whose scripts may send requests."""
    method: str = ""
    """How the engine drafts, for /metrics."""
    drafting_off: str | None = None
    """Why nothing is drafted (`methods.why_nothing_is_drafted`); None if something is."""
    log: Callable[[dict[str, Any]], None] = log_line
    """Called with a record of every request."""


class Service:
    """One engine behind HTTP. `app` is the ASGI application, `runner` holds the engine's thread.

    Args:
        engine: nothing else may call it from now on.
        settings: see `Settings`.

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
        settings = self.settings
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        around = Middleware(RequestMiddleware, metrics=self.metrics, api_key=settings.api_key, log=settings.log)
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            middleware=[cors, around] if settings.cors_origins else [around],  # a page may read errors, too
            exception_handlers=dict.fromkeys(HANDLED, on_error),
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
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_record()]})

    async def _model(self, request: Request) -> Response:
        check_model_name(request.path_params["name"], self._served)
        return JSONResponse(self._model_record())

    def _model_record(self) -> dict[str, Any]:
        named = {"id": self._served.name, "object": "model", "created": self._started, "owned_by": "domino-spec"}
        return {**named, "max_model_len": self._served.capacity}

    async def _chat(self, request: Request) -> _Reply:
        return await self._answer(request, ChatCompletionRequest)

    async def _completions(self, request: Request) -> _Reply:
        return await self._answer(request, CompletionRequest)

    # From a request to its answer

    async def _answer(self, request: Request, kind: type[ChatCompletionRequest] | type[CompletionRequest]) -> _Reply:
        arrived, changed = time.perf_counter(), asyncio.Event()
        asked: AnyRequest = parse(kind, await _body(request), self._served)
        request.state.details["stream"] = asked.stream
        requests, prefixes = await asyncio.to_thread(self._engine_requests, asked)
        jobs = self.runner.submit(requests, changed)
        answers = Answers(asked, jobs, prefixes, self.engine.target.fingerprint, self._tokens)
        return _Reply(self.runner, answers, changed, asked.stream, arrived, self.settings.timeout)

    def _engine_requests(self, asked: AnyRequest) -> tuple[list[EngineRequest], list[str]]:
        """One request per prompt and choice, and the text that each answer begins with (echo).

        Raises:
            ApiError: a prompt cannot be encoded, or is too long.
        """
        requests: list[EngineRequest] = []
        prefixes: list[str] = []
        param, capacity = "messages" if asked.chat else "prompt", self._served.capacity
        sampling = asked.sampling(self._served.vocab_size)
        stop_token_ids = frozenset(asked.stop_token_ids)
        if not asked.ignore_eos:
            stop_token_ids |= self.engine.target.stop_token_ids
        for prompt in asked.prompts:
            ids, text = self._encode(asked, prompt, param)
            left = capacity - len(ids)
            if left < (asked.length or 1):
                given = "" if asked.length is None else f" and max_tokens {asked.length}"
                message = f"a prompt of {len(ids)} tokens{given} exceed the context of {capacity} tokens"
                raise invalid(param, message, "context_length_exceeded")
            limits = Limits(asked.length or left, tuple(asked.stop), stop_token_ids)
            for _ in range(asked.n):
                settings = replace(sampling, seed=seed_of(sampling.seed, len(requests)))
                requests.append(EngineRequest(ids, settings, limits, asked.top))
                prefixes.append(text)
        return requests, prefixes

    def _encode(self, asked: AnyRequest, prompt: Any, param: str) -> tuple[list[int], str]:
        """Token ids of a prompt, and its text if it is to be echoed."""
        if isinstance(prompt, list) and not asked.chat:
            return prompt, str(self._tokenizer.decode(prompt, skip_special_tokens=True)) if asked.echo else ""
        thinking = isinstance(asked, ChatCompletionRequest) and asked.chat_template_kwargs.enable_thinking
        try:
            ids = encode_prompt(self._tokenizer, prompt, chat=asked.chat, enable_thinking=thinking)
        except UserError as error:
            raise invalid(param, str(error)) from None
        if not ids:
            raise invalid(param, "the prompt is empty")
        return ids, prompt if asked.echo else ""


@dataclass
class _Reply:
    """An ASGI response that sends an answer while its jobs grow, and frees their slots however it ends."""

    runner: Runner
    answers: Answers
    changed: asyncio.Event
    """Set when one of the jobs has progressed."""
    stream: bool
    """Send server-sent events; False sends one object."""
    arrived: float
    """When the request came, by `time.perf_counter`."""
    timeout: float | None
    """Seconds from then on that it may take."""
    begun: bool = False
    """Whether headers were sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or as much as the client waits for.

        Raises:
            ApiError: before anything was sent. An error after the first tokens is the last event of the stream.
        """
        details, last = scope["state"]["details"], b"[DONE]"
        try:
            try:
                await self._unless_it_ends(receive, self._follow_jobs(send))
            except ApiError as error:
                if not self.begun:
                    raise
                details["status"], last = error.status, json.dumps(error.record).encode()
            finally:
                self._close(details)  # the slot must not wait for a client that does not read
            if self.stream:
                await send({"type": "http.response.body", "body": _event(last), "more_body": False})
            else:
                await Response(self.answers.whole().json_bytes(), media_type=JSON)(scope, receive, send)
        except (ClientDisconnect, OSError):
            details["status"] = GONE

    async def _follow_jobs(self, send: Send) -> None:
        """Wait until all jobs have ended; a stream sends what they have written.

        Headers wait for the first tokens, so that what fails before them gets its HTTP status.
        """
        while True:
            self.changed.clear()
            self.answers.check()
            finished = self.answers.finished
            body = b"".join(_event(chunk.json_bytes()) for chunk in self.answers.chunks()) if self.stream else b""
            if body and not self.begun:
                self.begun = True
                await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if finished:
                return
            await self.changed.wait()

    async def _unless_it_ends(self, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and give it up when the client leaves or time is up.

        Raises:
            ApiError: a job has failed, or time is up.
            ClientDisconnect: the client has left.
        """
        left = None if self.timeout is None else max(0.0, self.arrived + self.timeout - time.perf_counter())
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
        try:
            done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                return tasks[0].result()
            if done:
                raise ClientDisconnect
            message = f"the request took longer than {self.timeout:g} seconds; ask for fewer tokens"
            raise ApiError(504, message, code="timeout", retry=False)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _close(self, details: dict[str, Any]) -> None:
        """Free the slots of jobs that have not ended, and note the outcome for the log."""
        jobs = self.answers.jobs
        self.runner.cancel(jobs)
        usage = self.answers.usage()
        waits = [job.taken_up - job.submitted for job in jobs if job.taken_up is not None]
        details.update(
            prompt_tokens=usage.prompt_tokens,
            tokens=usage.completion_tokens,
            tau=round(usage.acceptance_length, 3),
            queue_seconds=round(max(waits), 4) if waits else None,
            finish=",".join(sorted({job.progress.finish_reason or "cancelled" for job in jobs})),
        )


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """A request's body.

    Raises:
        ApiError: it is not JSON by its header, or too large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise ApiError(415, f"the header Content-Type must be {JSON}", code="invalid_content_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
    return bytes(body)
