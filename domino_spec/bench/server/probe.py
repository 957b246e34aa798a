"""Which servers are to be measured, and whether they can be: reachable, OpenAI-compatible, streaming, with usage.

Everything that could fail after hours is tried first, with one short answer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from domino_spec.clients.openai import Client, Fault, base_url
from domino_spec.settings import UserError
from domino_spec.target.text import Message

BASELINE = "none"
"""The name by which a server is known to be the baseline, as the method of that name is elsewhere."""
_NAMED = re.compile(r"([\w.+@:-]+)=(https?://.*)", re.DOTALL)
_TIMEOUT = 30.0
"""Seconds for questions that are not measured."""
_TRIES = 5


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it wants to be asked."""

    name: str
    url: str
    """With /v1."""
    model: str
    engine: str
    """Who owns the model by /v1/models: domino-spec, vllm, sglang, ...."""
    version: str | None
    takes_template_settings: bool
    """Whether `chat_template_kwargs` may be sent; without them a request cannot say whether the model shall think."""

    def body(
        self, messages: Sequence[Message], max_tokens: int, temperature: float, seed: int | None, thinking: bool
    ) -> dict[str, Any]:
        """A request for a stream with usage.

        Above temperature 0 top_p is said too: some engines take a model's recommended one if it is not.
        """
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if temperature > 0:
            asked |= {"top_p": 1.0, "seed": seed}
        if self.takes_template_settings:
            asked["chat_template_kwargs"] = {"enable_thinking": thinking}
        if self.engine == "sglang":
            asked["return_spec_tokens_details"] = True
        return asked


def parse_servers(servers: Sequence[str]) -> dict[str, str]:
    """Addresses with /v1 by name, from `[NAME=]URL`; a server without a name has that of its host and port.

    Raises:
        UserError: an address cannot be used, or two servers have the same name.
    """
    found: dict[str, str] = {}
    for text in servers:
        named = _NAMED.fullmatch(text)
        url = base_url(named[2] if named else text)
        name = named[1] if named else urlsplit(url).netloc
        if name in found:
            raise UserError(f"two servers are called {name}: name them, as in --server none=URL --server domino=URL")
        found[name] = url
    if not found:
        raise UserError("no server given: domino-spec bench --server URL --suite SUITE --out DIR")
    return found


def baseline_of(names: Sequence[str]) -> str:
    """The server that the others are compared with: the one called `none`, else the first."""
    return BASELINE if BASELINE in names else names[0]


def probe(
    name: str, url: str, *, model: str | None = None, api_key: str | None = None, thinking: bool = False
) -> Endpoint:
    """Get to know a server.

    Args:
        name: of the server.
        url: from `base_url`.
        model: what it calls the model; None takes the only one that it has.
        api_key: that it may ask for.
        thinking: whether its answers shall think.

    Raises:
        UserError: it cannot be reached, wants another key, has no such model, or cannot be measured.
    """
    client = Client(url, api_key)
    try:
        entry = _model(client, name, url, model)
        engine = str(entry.get("owned_by") or "unknown")
        version = _version(client, engine)
        for takes in (True, False):
            endpoint = Endpoint(name, url, entry["id"], engine, version, takes)
            ask = endpoint.body([{"role": "user", "content": "Say hello."}], 4, 0.0, None, thinking)
            try:
                _ask_once(client, ask)
                return endpoint
            except Fault as fault:
                if not (takes and fault.status in (400, 422)):
                    raise UserError(explain(name, url, fault)) from None
        raise AssertionError("unreachable")
    finally:
        client.close()


def _ask_once(client: Client, body: dict[str, Any]) -> None:
    """One answer, waited for if the server has no room; raises `Fault`."""
    for attempt in range(_TRIES):
        try:
            client.stream(body, 10 * _TIMEOUT)  # the first answer of a server may compile something
            return
        except Fault as fault:
            if fault.seconds_until_room is None or attempt == _TRIES - 1:
                raise
            time.sleep(min(fault.seconds_until_room, _TIMEOUT))


def explain(name: str, url: str, fault: Fault) -> str:
    """One line for a fault that ends a bench: what is wrong with which server, and what to do."""
    who = f"server {name} at {url}"
    if fault.status in (401, 403):
        return f"{who} wants another API key ({fault}): give --api-key or OPENAI_API_KEY"
    if fault.status in (404, 405):
        return f"{who} does not answer like an OpenAI-compatible server ({fault}): is the address right?"
    if fault.status is None and str(fault).startswith("no connection"):
        return f"{who} cannot be reached ({fault}): is it running, and the address right?"
    return f"{who} cannot be measured: {fault}"


def _model(client: Client, name: str, url: str, wanted: str | None) -> dict[str, Any]:
    """The entry of the model in /v1/models."""
    try:
        listed = json.loads(client.get("/models", _TIMEOUT))["data"]
        entries = {str(entry["id"]): {**entry, "id": str(entry["id"])} for entry in listed}
    except Fault as fault:
        raise UserError(explain(name, url, fault)) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(explain(name, url, Fault("/v1/models lists no models", 404))) from None
    if wanted is not None and wanted not in entries:
        raise UserError(f"server {name} at {url} has no model {wanted!r}; it has {', '.join(entries) or 'none'}")
    if wanted is None and len(entries) != 1:
        raise UserError(
            f"server {name} at {url} has {len(entries)} models ({', '.join(entries)}): choose one by --served-model"
        )
    return entries[wanted] if wanted is not None else next(iter(entries.values()))


def _version(client: Client, engine: str) -> str | None:
    """What a server says of its version: vLLM by /version, SGLang by /server_info."""
    route = {"vllm": "/version", "sglang": "/server_info"}.get(engine)
    if route is None:
        return None
    try:
        found = json.loads(client.get(route, _TIMEOUT, at_root=True)).get("version")
    except (Fault, ValueError, AttributeError):
        return None
    return None if found is None else str(found)
