"""One client of an OpenAI-compatible server: streamed chat answers, with the time at which every chunk arrived.

The standard library's HTTP is enough for that, and light: what the client computes, the server on the same machine
cannot. Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from domino_spec.settings import UserError

_ONCE = 65536
"""Bytes read at a time at most."""
_GONE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class Fault(Exception):
    """There is no answer; the text is the reason, the same for all of its kind.

    Args:
        reason: in a few words.
        status: of the HTTP response, where there was one.
        retry_after: seconds after which another try makes sense; None where it makes none.
        received: what had come of the answer.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        retry_after: float | None = None,
        received: Answer | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.retry_after, self.received = status, retry_after, received


@dataclass
class Answer:
    """An answer, as far as it has come; times are those of `time.perf_counter`."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    """When each chunk with text in it came."""
    last_token: float | None = None
    """When the chunk came that says why the answer ended."""
    ended: float = 0.0
    content: str = ""
    reasoning: str = ""
    """What a reasoning parser of the server took out of the answer."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    verify_passes: int | None = None
    accepted_drafts: int | None = None

    @property
    def text(self) -> str:
        """Everything that was received."""
        return self.reasoning + self.content

    def take(self, chunk: Any, at: float) -> None:
        """Add one object of the stream.

        Raises:
            Fault: it is an error, or nothing that OpenAI would send.
        """
        try:
            if chunk.get("error"):
                raise Fault(f"an error in the stream ({_shorten(_message(chunk))})")
            for choice in chunk.get("choices") or []:
                self._take_choice(choice, at)
            self._take_usage(chunk.get("usage") or {})
            details = (chunk.get("sglext") or {}).get("spec_tokens_details") or {}  # SGLang, asked for it
            self.verify_passes = details.get("spec_verify_ct", self.verify_passes)
            self.accepted_drafts = details.get("spec_num_correct_drafts", self.accepted_drafts)
        except (AttributeError, KeyError, TypeError):
            raise Fault("a chunk that is not OpenAI's") from None

    def _take_choice(self, choice: dict[str, Any], at: float) -> None:
        delta = choice.get("delta") or {}
        content = delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if content or reasoning:
            self.chunks.append(at)
            self.content += content
            self.reasoning += reasoning
        if choice.get("finish_reason") is not None:
            self.finish_reason, self.last_token = str(choice["finish_reason"]), at

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        self.completion_tokens = usage.get("completion_tokens", self.completion_tokens)
        self.verify_passes = usage.get("num_verify_passes", self.verify_passes)
        self.accepted_drafts = usage.get("num_accepted_drafts", self.accepted_drafts)


def base_url(url: str) -> str:
    """The address that routes are put behind: with /v1, whether it was given or not.

    Raises:
        UserError: it is no address.
    """
    url = url.rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(url)
        plain = url.isascii() and url.isprintable() and " " not in url
        usable = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"--server {url}: not an address; give one such as http://127.0.0.1:8000/v1")
    return url if url.endswith("/v1") else f"{url}/v1"


class Connection:
    """A connection to a server that is kept between requests, for one thread; `abort` may be called by others.

    Args:
        url: from `base_url`.
        api_key: sent with every request; None for none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(parts.hostname or "", parts.port)
        self._path = parts.path
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._socket: socket.socket | None = None
        self._aborted = False

    def get(self, path: str, timeout: float, *, at_root: bool = False) -> str:
        """The body of a GET.

        Args:
            path: such as /models.
            timeout: seconds.
            at_root: not behind /v1 but beside it, where /metrics is.

        Raises:
            Fault: the answer is not 200, or there is none.
        """
        deadline = time.perf_counter() + timeout
        path = (self._path.removesuffix("/v1") if at_root else self._path) + path
        with self._faults(timeout):
            response = self._send("GET", path, None, deadline)
            body = response.read()
            if response.status != 200:
                raise _refusal(response, body)
            return body.decode("utf-8", "replace")

    def chat(self, body: dict[str, Any], timeout: float) -> Answer:
        """A whole streamed answer.

        Args:
            body: of the request; it must ask for a stream with usage.
            timeout: seconds until its end.

        Raises:
            Fault: it is refused, broken off, late, not a stream, or without usage.
        """
        answer = Answer(time.perf_counter())
        deadline = answer.sent + timeout
        try:
            with self._faults(timeout):
                response = self._send("POST", self._path + "/chat/completions", body, deadline)
                if response.status != 200:
                    raise _refusal(response, response.read())
                kind = response.headers.get_content_type()
                if kind != "text/event-stream":
                    raise Fault(f"an answer in one piece ({kind}), where a stream was asked for")
                for chunk, at in self._events(response, deadline):
                    answer.take(chunk, at)
                answer.ended = time.perf_counter()
                if answer.finish_reason is None:
                    raise Fault("the stream broke off")
                if not isinstance(answer.completion_tokens, int):
                    raise Fault("an answer without usage, so that its tokens cannot be counted")
                return answer
        except Fault as fault:
            answer.ended = time.perf_counter()
            fault.received = answer
            raise

    def abort(self) -> None:
        """Let whatever waits for this connection fail at once, and everything later."""
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()
        self._socket = None

    @contextlib.contextmanager
    def _faults(self, timeout: float) -> Iterator[None]:
        """Whatever goes wrong becomes a `Fault`, after which the connection is opened anew."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise Fault(f"no whole answer within {timeout:g} s") from None
            if isinstance(error, http.client.HTTPException):
                raise Fault("the connection broke off") from None
            if isinstance(error, OSError):
                raise Fault(f"no connection ({error.strerror or error})") from None
            raise

    def _send(self, method: str, path: str, body: dict[str, Any] | None, deadline: float) -> http.client.HTTPResponse:
        """The head of the response. A kept connection that the server has closed meanwhile is opened once more."""
        data = None if body is None else json.dumps(body).encode("utf-8")
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        while True:
            kept = self._http.sock is not None
            try:
                if not kept:
                    self._http.timeout = _left(deadline)
                    self._http.connect()
                    self._socket = self._http.sock
                if self._aborted:
                    raise ConnectionAbortedError("given up")
                self._wait_until(deadline)
                self._http.request(method, path, data, headers)
                return self._http.getresponse()
            except _GONE:
                self.close()
                if not kept or self._aborted:
                    raise

    def _events(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[tuple[Any, float]]:
        """Objects of a stream of server-sent events, and when they came."""
        rest, data = b"", b""
        while True:
            self._wait_until(deadline)
            piece = response.read1(_ONCE)
            at = time.perf_counter()
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                line = line.rstrip(b"\r")
                if line.startswith(b"data:"):
                    data += line[5:].lstrip() + b"\n"
                elif not line and data:
                    if data.strip() == b"[DONE]":
                        self._wait_until(deadline)
                        response.read()  # nothing but the end, without which the connection cannot be used again
                        return
                    yield _parse(data), at
                    data = b""

    def _wait_until(self, deadline: float) -> None:
        assert self._socket is not None
        self._socket.settimeout(_left(deadline))


def _left(deadline: float) -> float:
    left = deadline - time.perf_counter()
    if left <= 0:
        raise TimeoutError
    return left


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise Fault("a chunk that is not JSON") from None


def _refusal(response: http.client.HTTPResponse, body: bytes) -> Fault:
    """What a response other than 200 means."""
    reason = f"HTTP {response.status} {response.reason}".strip()
    try:
        said = _shorten(_message(json.loads(body)))
    except (ValueError, AttributeError):
        said = ""
    after = _seconds(response.headers.get("Retry-After"))
    if response.status == 429 and after is None:
        after = 1.0
    worth_it = response.status in (429, 503)
    return Fault(reason + (f" ({said})" if said else ""), response.status, after if worth_it else None)


def _message(record: Any) -> str:
    """What an error says: OpenAI's {"error": {"message"}}, or the flatter forms of some servers."""
    error = record.get("error") or record.get("message") or record.get("detail") or ""
    return str(error.get("message", "") if isinstance(error, dict) else error)


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date, which is rare
        return None
