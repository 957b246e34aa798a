"""A real server on a free port, in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai

from domino_spec.decoding.engine import Engine
from domino_spec.serve.app import Service, Settings
from domino_spec.serve.preflight import bind, url
from domino_spec.serve.server import Server, make_engine
from tests import tiny

MODEL = "tiny"
PATIENCE = 60.0
"""Seconds after which a test gives up waiting."""


class Running:
    """What tests want of a server that runs."""

    def __init__(self, service: Service, server: Server, address: str, log: list[dict[str, Any]]) -> None:
        self.service, self.server, self.address, self.log = service, server, address, log
        self.engine, self.runner = service.engine, service.runner
        self.client = self.new_client(openai.OpenAI)
        self.http = httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False)

    def new_client(self, kind: Callable[..., Any], key: str = "none") -> Any:
        """The official client, which shall not try again behind the test's back."""
        return kind(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def chat(self, text: str, **options) -> Any:
        """An answer to one message."""
        return self.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **options)

    def complete(self, prompt: Any, **options) -> Any:
        """A continuation."""
        return self.client.completions.create(model=MODEL, prompt=prompt, **options)

    def is_idle(self) -> bool:
        """Whether nothing runs or waits, in the runner and in the engine."""
        return not (self.runner.num_running or self.runner.num_waiting or self.engine.busy)

    def metric(self, name: str, **labels: str) -> float:
        """A value that /metrics shows; 0 where it is not there."""
        for line in self.http.get("/metrics").text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
                return float(value)
        return 0.0


def eventually(holds: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


class Gate:
    """Lets an engine step only while it is open; as a context it is closed, and open again at its end."""

    def __init__(self, engine: Engine) -> None:
        self._open = threading.Event()
        self._open.set()
        step = engine.step

        def gated() -> list:
            assert self._open.wait(PATIENCE)
            return step()

        engine.step = gated  # type: ignore[method-assign]

    def __enter__(self) -> Gate:
        self.close()
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@contextlib.contextmanager
def serving(target, draft=None, *, slots: int = 4, capacity: int | None = None, **options) -> Iterator[Running]:
    """A server; `options` are those of `make_engine` and `Settings`."""
    names = ("method", "num_drafts", "costs_file", "prefix_bytes")
    method = options.get("method") or ""
    drain_seconds = options.pop("drain_seconds", PATIENCE)
    engine = make_engine(
        target, draft, slots=slots, capacity=capacity, **{k: options.pop(k) for k in names if k in options}
    )
    log: list[dict[str, Any]] = []
    service = Service(engine, Settings(MODEL, log=log.append, method=method, **options))
    bound, ready = bind("127.0.0.1", 0, None), threading.Event()
    server = Server(service, drain_seconds=drain_seconds, on_ready=ready.set)
    thread = threading.Thread(target=server.serve_forever, args=(bound,), daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    running = Running(service, server, url(bound), log)
    try:
        yield running
    finally:
        running.client.close()
        running.http.close()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def word_target(seed: int = 0, **overrides):
    """A random target of one word per token, with a chat template that knows enable_thinking."""
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {% if m['role'] == 'system' %}w3 {% endif %}{{ m['content'] }} w2 {% endfor %}"
        "{% if enable_thinking %}w9 {% endif %}"
    )
    return tiny.as_target(tiny.tiny_model(seed=seed, **overrides), tokenizer)
