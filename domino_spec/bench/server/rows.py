"""raw.jsonl of a bench of servers: a line for every request, and one for every window that was measured to its end.

A window is everything that one server was asked at one number of requests in flight: a suite, a temperature, a repeat.
What a window was doing when it was interrupted stays in the file, but only finished windows count; the same command
measures the others anew, as another attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from domino_spec.bench.rows import RAW_FILE, append_line, turn_suffix
from domino_spec.files import read_jsonl
from domino_spec.settings import Settings, UserError, parse_settings

REQUEST, WINDOW = "request", "window"
"""Values of `kind` in raw.jsonl."""


class WindowKey(NamedTuple):
    """Which window of a bench this is."""

    suite: str
    temperature: float
    concurrency: int
    repeat: int
    server: str


class TextKey(NamedTuple):
    """What servers were asked alike."""

    suite: str
    id: str
    temperature: float
    concurrency: int
    repeat: int
    round: int


@dataclass(frozen=True)
class RequestRow(Settings):
    """One request to one server; the fields are keys of raw.jsonl."""

    server: str
    suite: str
    id: str
    """Of the prompt; later turns of a conversation have `#` and their number behind it."""
    temperature: float
    concurrency: int
    """Requests in flight."""
    repeat: int
    attempt: int
    """Of its window; an interrupted one is measured anew under the next number."""
    round: int
    """How often the window had asked this before: small suites are gone through several times."""
    turn: int
    started: float
    """Seconds from the window's start until it was this request's turn."""
    sent: float
    """The same for the try that counts: later than `started` where the server first said 429."""
    rejected: int
    """How often it said 429, or 503 with Retry-After."""
    chunks: tuple[float, ...]
    """Seconds from `sent` to every chunk with text in it."""
    last_token: float | None
    """Seconds from `sent` to the chunk that says why the answer ended."""
    seconds: float
    """From `sent` to the end of the stream, or of the try that failed."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """As the server counts them (usage)."""
    text: str
    """What was received, reasoning first."""
    finish_reason: str | None
    verify_passes: int | None
    """As the answer itself says, where it does; `domino-spec serve` and SGLang do."""
    accepted_drafts: int | None
    error: str | None
    """Why there is no answer; None where there is one."""

    @property
    def window(self) -> WindowKey:
        """The window that it belongs to."""
        return WindowKey(self.suite, self.temperature, self.concurrency, self.repeat, self.server)

    @property
    def asked(self) -> TextKey:
        """What it has in common with the same request to other servers."""
        return TextKey(self.suite, self.id, self.temperature, self.concurrency, self.repeat, self.round)

    @property
    def conversation(self) -> str:
        """The id that all turns of a conversation share: what intervals draw anew."""
        return self.id if self.turn == 1 else self.id.removesuffix(turn_suffix(self.turn))

    @property
    def busy(self) -> float:
        """Seconds for which it was one of those in flight, its waiting after a 429 included."""
        return self.sent - self.started + self.seconds

    @property
    def first_token(self) -> float | None:
        """Seconds to the first chunk with text."""
        return self.chunks[0] if self.chunks else None

    @property
    def seconds_per_token(self) -> float | None:
        """Time from the first to the last token over the tokens after the first; None without two tokens."""
        if not self.chunks or self.last_token is None or (self.completion_tokens or 0) < 2:
            return None
        assert self.completion_tokens is not None
        return (self.last_token - self.chunks[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk with text and the next."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True)
class Reading:
    """One of the engine's own figures, before and after a window."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class WindowRow(Settings):
    """One window, measured to its end; the fields are keys of raw.jsonl."""

    server: str
    suite: str
    temperature: float
    concurrency: int
    repeat: int
    attempt: int
    requests: int
    at: str
    """When it began, UTC."""
    seconds: float
    """From the first request's start to the last one's end."""
    readings: tuple[Reading, ...]
    """What the engine's metrics said (`metrics`); empty where it has none."""

    @property
    def key(self) -> WindowKey:
        """Which window this is."""
        return WindowKey(self.suite, self.temperature, self.concurrency, self.repeat, self.server)


@dataclass(frozen=True)
class Measured:
    """What raw.jsonl holds."""

    windows: list[WindowRow]
    """Finished ones, in the order in which they were measured."""
    requests: dict[WindowKey, list[RequestRow]]
    """Of the finished windows."""
    attempts: dict[WindowKey, int]
    """How often each window was begun."""

    def add(self, window: WindowRow, requests: Iterable[RequestRow]) -> None:
        """Take in a window that has just been measured."""
        self.windows.append(window)
        self.requests[window.key] = list(requests)


def append_request(out: Path, row: RequestRow) -> None:
    """Write a request at the end of raw.jsonl; raises as `rows.append_line`."""
    append_line(out / RAW_FILE, {"kind": REQUEST, **asdict(row)})


def append_window(out: Path, row: WindowRow) -> None:
    """Write the end of a window at the end of raw.jsonl; raises as `rows.append_line`."""
    append_line(out / RAW_FILE, {"kind": WINDOW, **asdict(row)})


def read_measured(out: Path) -> Measured:
    """Everything that a directory holds; nothing where nothing was measured yet.

    Raises:
        UserError: naming file and line.
    """
    path = out / RAW_FILE
    measured = Measured([], {}, {})
    if not path.exists():
        return measured
    begun: dict[tuple[WindowKey, int], list[RequestRow]] = {}
    for number, line in enumerate(read_jsonl(path, {"kind": str}, skip_partial_end=True), 1):
        kind, where = line.pop("kind"), f"{path} line {number}"
        if kind == REQUEST:
            row = parse_settings(RequestRow, line, where)
            begun.setdefault((row.window, row.attempt), []).append(row)
            measured.attempts[row.window] = max(measured.attempts.get(row.window, 0), row.attempt + 1)
        elif kind == WINDOW:
            window = parse_settings(WindowRow, line, where)
            measured.attempts.setdefault(window.key, window.attempt + 1)
            measured.add(window, begun.get((window.key, window.attempt), []))
        else:
            raise UserError(f"{where}: unknown kind {kind!r}; known are {REQUEST} and {WINDOW}")
    return measured
