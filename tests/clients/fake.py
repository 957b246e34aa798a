"""An OpenAI-compatible server without a model, in a thread of the test's own process: it does what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

PATIENCE = 30.0
"""Seconds after which a test gives up waiting."""


class Fake:
    """One server; a test sets its attributes, before or while it runs."""

    def __init__(self, *, owner: str = "acme", models: tuple[str, ...] = ("m",)) -> None:
        self.owner, self.models = owner, models
        self.bodies: list[dict[str, Any]] = []
        """Of all chat requests."""
        self.answer: Callable[[dict[str, Any]], list[str]] = lambda body: [f"{w} " for w in prompt_of(body).split()]
        """The texts of an answer's chunks, each of `tokens_per_chunk` tokens."""
        self.tokens_per_chunk = 1
        self.refuse: Callable[[dict[str, Any]], Response | None] = lambda body: None
        """A response in place of the answer."""
        self.extra: dict[str, Any] = {}
        """Further keys of usage."""
        self.last: list[dict[str, Any]] = []
        """Further chunks before the end."""
        self.with_usage = True
        self.metrics: Callable[[], str] | None = None
        self.info: dict[str, Any] | None = None
        """What /server_info and /version say."""
        self.api_key: str | None = None
        self.together = 1
        """No answer begins before so many requests have been in flight at once, or as many as `expected` left."""
        self.in_flight = self.most_in_flight = 0
        self.address = ""
        self.seen_idle: Callable[[], bool] = lambda: True
        """Asked at every request: is everybody else idle?"""
        self.never_alone = False
        self._gate: asyncio.Condition | None = None

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/version", self._info),
                Route("/server_info", self._info),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return error(401, "the API key is wrong")
        return JSONResponse({"data": [{"id": name, "owned_by": self.owner} for name in self.models]})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics()) if self.metrics else error(404, "no metrics here")

    async def _info(self, request: Request) -> Response:
        return JSONResponse(self.info) if self.info else error(404, "nothing")

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.never_alone |= not self.seen_idle()
        refusal = self.refuse(body)
        if refusal is not None:
            return refusal
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        await self._enter()
        try:
            texts = self.answer(body)
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for text in texts:
                yield event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            for chunk in self.last:
                yield event(chunk)
            if self.with_usage:
                tokens = self.tokens_per_chunk * len(texts)
                yield event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens, **self.extra}})
            yield "data: [DONE]\n\n"
        finally:
            self.in_flight -= 1

    async def _enter(self) -> None:
        """Wait until as many requests are in flight as the test wants to see together."""
        if self._gate is None:
            self._gate = asyncio.Condition()
        async with self._gate:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self._gate.notify_all()
            await asyncio.wait_for(self._gate.wait_for(lambda: self.most_in_flight >= self.together), PATIENCE)


def prompt_of(body: dict[str, Any]) -> str:
    """What the user said last."""
    return body["messages"][-1]["content"]


def event(record: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(record)}\n\n"


def error(status: int, message: str, **headers: str) -> Response:
    """A refusal in OpenAI's shape."""
    return JSONResponse({"error": {"message": message}}, status, headers)


def streamed(*pieces: str | bytes) -> Response:
    """A stream of exactly these bytes, piece by piece."""

    async def send() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece.encode() if isinstance(piece, str) else piece
            await asyncio.sleep(0)

    return StreamingResponse(send(), media_type="text/event-stream")


@contextlib.contextmanager
def faking(*fakes: Fake) -> Iterator[None]:
    """Let servers run; their `address` (with /v1) is set."""
    running = []
    for fake in fakes:
        bound = socket.create_server(("127.0.0.1", 0))
        fake.address = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(fake.app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        running.append((server, thread))
    try:
        yield
    finally:
        for server, thread in running:
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def free_address() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
