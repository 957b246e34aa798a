"""The client of OpenAI-compatible servers, for `regenerate` (whole answers) and for load tests (timed streams).

Every failure is a `Fault` whose text is one line. A request is sent once: the caller decides whether to try again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from domino_spec.settings import UserError

_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which the same request may succeed later."""
_BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class Fault(Exception):
    """There is no answer. The text is the reason; all faults of one kind have the same text.

    Args:
        reason: in a few words.
        status: of the HTTP response, if there was one.
        retry_after: seconds that the response's Retry-After header asks to wait.
        received: the part of a streamed answer that came before the fault.
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

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status is None or self.status in _MAY_PASS

    @property
    def seconds_until_room(self) -> float | None:
        """How long to wait when the server is full (429, or 503 with Retry-After); None for every other fault."""
        if self.status == 429:
            return 1.0 if self.retry_after is None else self.retry_after
        return self.retry_after if self.status == 503 else None


@dataclass
class Answer:
    """A streamed answer, complete or cut short; times are those of `time.perf_counter`."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    """When each chunk that contains text arrived."""
    last_token: float | None = None
    """When the chunk with the finish reason arrived."""
    ended: float = 0.0
    content: str = ""
    reasoning: str = ""
    """Thinking that the server's reasoning parser separated from the answer."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    verify_passes: int | None = None
    accepted_drafts: int | None = None

    @property
    def text(self) -> str:
        """Reasoning and content."""
        return self.reasoning + self.content

    def take(self, chunk: Any, at: float) -> None:
        """Add one JSON object of the stream, which arrived at `at`.

        Raises:
            Fault: it is an error, or does not have the form of OpenAI's chunks.
        """
        try:
            if chunk.get("error"):
                raise Fault(f"an error in the stream ({_shorten(_message(chunk))})")
            for choice in chunk.get("choices") or []:
                self._take_choice(choice, at)
            self._take_usage(chunk.get("usage") or {})
            details = (chunk.get("sglext") or {}).get("spec_tokens_details") or {}  # SGLang, if asked for it
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
    """The address with /v1 at its end, whether the user gave /v1, /chat/completions or neither.

    Raises:
        UserError: it is no address.
    """
    given, url = url, url.rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(url)
        plain = url.isascii() and url.isprintable() and " " not in url
        usable = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{given!r} is not the address of a server: give one such as http://127.0.0.1:8000/v1")
    return url if url.endswith("/v1") else f"{url}/v1"


class Client:
    """One connection to a server, kept between requests and used by one thread. Other threads may call `abort`.

    Args:
        url: from `base_url`.
        api_key: sent with every request; None for none.
        use_proxies: whether the environment's proxies apply.

    Raises:
        UserError: the key cannot be sent.
    """

    def __init__(self, url: str, api_key: str | None = None, *, use_proxies: bool = False) -> None:
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UserError("the API key holds characters that no header can carry")
        self._url = url
        self._headers = {"Accept-Encoding": "identity"}  # compression would delay chunks
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=1)
        self._http = httpx.Client(trust_env=use_proxies, limits=limits, verify=_tls())
        self._socket: socket.socket | None = None
        self._aborted = False

    def get(self, path: str, timeout: float, *, at_root: bool = False) -> str:
        """The body of a GET.

        Args:
            path: such as /models.
            timeout: seconds for the whole response.
            at_root: the path is beside /v1, as /metrics is, and not below it.

        Raises:
            Fault: the response is not 200, or there is none.
        """
        url = (self._url.removesuffix("/v1") if at_root else self._url) + path
        with self._response("GET", url, None, timeout) as response:
            return response.read().decode("utf-8", "replace")

    def complete(self, body: dict[str, Any], timeout: float) -> Any:
        """The JSON of a chat answer in one piece.

        Args:
            body: of the request.
            timeout: seconds for the whole response.

        Raises:
            Fault: the response is refused, late, broken off or not JSON.
        """
        with self._response("POST", f"{self._url}/chat/completions", body, timeout) as response:
            try:
                return json.loads(response.read())
            except ValueError:  # a UnicodeDecodeError is one too
                raise Fault("a reply that is not JSON") from None

    def stream(self, body: dict[str, Any], timeout: float) -> Answer:
        """A whole chat answer, received as a stream.

        Args:
            body: of the request; it must ask for a stream with usage.
            timeout: seconds for the whole answer.

        Raises:
            Fault: the answer is refused, late, broken off, not a stream, or without usage.
        """
        answer = Answer(time.perf_counter())
        try:
            with self._response("POST", f"{self._url}/chat/completions", body, timeout) as response:
                kind = (response.headers.get("Content-Type") or "text/plain").partition(";")[0].strip().lower()
                if kind != "text/event-stream":
                    raise Fault(f"an answer in one piece ({kind}), where a stream was asked for")
                for chunk, at in _events(response):
                    answer.take(chunk, at)
            if answer.finish_reason is None:
                raise Fault("the stream broke off")
            if not isinstance(answer.completion_tokens, int):
                raise Fault("an answer without usage, so that its tokens cannot be counted")
            answer.ended = time.perf_counter()
            return answer
        except Fault as fault:
            answer.ended = time.perf_counter()
            fault.received = answer
            raise

    def abort(self) -> None:
        """Make the request in progress, and every later one, fail at once."""
        self._aborted = True
        self._cut()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _cut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _response(self, method: str, url: str, body: Any, timeout: float) -> Iterator[httpx.Response]:
        """A response with status 200, its body still to be read inside the context.

        httpx limits the time of each read. The limit here is for all of them, so a timer cuts the connection.
        """
        deadline = time.perf_counter() + timeout
        timer = threading.Timer(timeout, self._cut)
        timer.daemon = True
        timer.start()
        try:
            response = self._send(method, url, body, timeout)
            try:
                if response.status_code != 200:
                    raise _refusal(response, response.read())
                yield response
            finally:
                response.close()
        except (httpx.HTTPError, httpx.StreamError) as error:
            if isinstance(error, httpx.TimeoutException) or time.perf_counter() >= deadline:
                raise Fault(f"no whole answer within {timeout:g} s") from None
            if isinstance(error, httpx.RemoteProtocolError):
                raise Fault("the connection broke off") from None
            raise Fault(f"no connection ({_cause(error)})") from None
        finally:
            timer.cancel()

    def _send(self, method: str, url: str, body: Any, timeout: float) -> httpx.Response:
        """The head of the response. If the server has closed a kept connection meanwhile, a new one is opened."""
        content = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        extensions = {"trace": self._note_socket}
        request = self._http.build_request(
            method, url, content=content, headers=headers, timeout=timeout, extensions=extensions
        )
        kept = self._socket
        if self._aborted:
            raise Fault("no connection (given up)")
        try:
            return self._http.send(request, stream=True)
        except _BROKEN:
            if kept is None or kept is not self._socket or self._aborted:
                raise
            return self._http.send(request, stream=True)

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._aborted:
                self._cut()


@functools.cache
def _tls() -> ssl.SSLContext:
    """One context for all clients: making one reads all certificates of the system."""
    return ssl.create_default_context()


def _events(response: httpx.Response) -> Iterator[tuple[Any, float]]:
    """The objects of a stream of server-sent events up to [DONE], and when each arrived."""
    rest, data, done = b"", b"", False
    for piece in response.iter_raw():
        at = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data += line[5:].lstrip() + b"\n"
            elif not line and data:
                # After [DONE] only the end is read, without which the connection cannot be used again.
                done = done or data.strip() == b"[DONE]"
                if not done:
                    yield _parse(data), at
                data = b""


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise Fault("a chunk that is not JSON") from None


def _refusal(response: httpx.Response, body: bytes) -> Fault:
    """The fault for a response other than 200."""
    reason = f"HTTP {response.status_code} {response.reason_phrase}".strip()
    try:
        said = _shorten(_message(json.loads(body)))
    except (ValueError, AttributeError):
        said = ""
    try:
        after = max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):  # there is none, or it is a date, which is rare
        after = None
    return Fault(reason + (f" ({said})" if said else ""), response.status_code, after)


def _message(record: Any) -> str:
    """The text of an error: OpenAI's {"error": {"message"}}, or the flatter forms of some servers."""
    error = record.get("error") or record.get("message") or record.get("detail") or ""
    return str(error.get("message", "") if isinstance(error, dict) else error)


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."


def _cause(error: BaseException) -> str:
    """The operating system's words for what went wrong, which httpx wraps twice."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return " ".join(str(error).split()) or type(error).__name__
