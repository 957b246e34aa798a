"""The files of a bench directory: raw.jsonl with every measurement, settings.json with what they were made with.

A bench of methods writes a `Row` per run. A bench of servers writes a `RequestRow` per request and a `WindowRow` per
finished window. Lines are appended as they are measured, so a killed bench loses at most the run or window it was in.
A report is computed from these lines alone (docs/design.md, section 8).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from domino_spec.files import read_json, read_jsonl, write_json
from domino_spec.settings import Settings, UserError, parse_settings

RAW_FILE, SETTINGS_FILE = "raw.jsonl", "settings.json"


def turn_suffix(turn: int) -> str:
    """The suffix that makes the id of a turn from its conversation's."""
    return "" if turn == 1 else f"#{turn}"


def conversation_of(id_: str, turn: int) -> str:
    """The conversation's id, from the id of one of its turns."""
    return id_.removesuffix(turn_suffix(turn))


class Contender(NamedTuple):
    """One method with one setting: a column of the report."""

    method: str
    """Key of `methods.METHODS`, followed by `@SIZE` if the draft vocabulary is cut."""
    budget: int
    """The most drafts of one pass, of a tree those of all its branches; 0 if nothing is drafted."""
    temperature: float


class RunKey(NamedTuple):
    """What makes a run one of its kind within a bench."""

    suite: str
    id: str
    method: str
    budget: int
    temperature: float
    repeat: int


@dataclass(frozen=True)
class Row(Settings):
    """One prompt decoded once by one method; the fields are the keys of raw.jsonl."""

    suite: str
    id: str
    method: str
    budget: int
    """The most drafts of one pass; 0 for methods that draft nothing."""
    temperature: float
    seed: int
    repeat: int
    batch: int
    """Requests decoded together."""
    threads: int
    prompt_tokens: int
    """How many tokens the prompt has."""
    token_ids: tuple[int, ...]
    """Generated tokens, after stop and length cuts."""
    num_verify_passes: int
    num_drafts: tuple[int, ...]
    """Drafts proposed in every pass."""
    acceptance_lengths: tuple[int, ...]
    """`num_accepted + 1` of every pass, before stop and length cuts."""
    seconds_prefill: float
    seconds_decode: float
    turn: int = 1
    """Which turn of its conversation the prompt is, from 1 on; later ones hold the turns and answers before them."""
    load_average: float | None = None
    """Processes of the machine that wanted to run, over the minute before the run's end."""
    steal_seconds: float | None = None
    """Processor time that a hypervisor gave to others meanwhile, over all processors."""

    @property
    def conversation(self) -> str:
        """The id that all turns of a conversation share: what intervals resample."""
        return conversation_of(self.id, self.turn)

    @property
    def key(self) -> RunKey:
        """Which run this is."""
        return RunKey(self.suite, self.id, self.method, self.budget, self.temperature, self.repeat)

    @property
    def decode_tokens(self) -> int:
        """Kept tokens that `seconds_decode` produced.

        Our prefill leaves the prompt's last token to the first pass, so decoding supplies every token. `transformers`
        has its first token when prefill ends; its passes, and so this number, count the others.
        """
        return min(len(self.token_ids), sum(self.acceptance_lengths))


def start_or_resume(out: Path, configuration: Mapping[str, Any]) -> list[Row]:
    """Make `out` ready to take rows of this configuration; returns those it already holds.

    Raises:
        UserError: as `take_directory`, or raw.jsonl is malformed.
    """
    take_directory(out, configuration)
    return read_rows(out)


def take_directory(out: Path, configuration: Mapping[str, Any]) -> None:
    """Make `out` ready to take measurements of this configuration, or more of them.

    A partial last line of raw.jsonl, left by a killed writer, is cut off.

    Raises:
        UserError: `out` cannot be written, holds something else, or another configuration's measurements.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a directory")
    settings, raw = out / SETTINGS_FILE, out / RAW_FILE
    wanted = json.loads(json.dumps(configuration))
    if settings.exists():
        held = read_json(settings)
        kept = held.get("configuration", {}) if isinstance(held, dict) else {}
        for name in wanted | kept:
            if kept.get(name) != wanted.get(name):
                raise UserError(
                    f"{out} holds measurements with {name} {kept.get(name)!r}, not {wanted.get(name)!r}: "
                    "give another --out, or the options that its settings.json lists"
                )
    elif raw.exists():
        raise UserError(f"{out} holds a raw.jsonl without the settings.json that says what it is: give another --out")
    else:
        write_json({"configuration": wanted, "sessions": []}, settings)
    cut_partial_line(raw)


def record_session(out: Path, session: Mapping[str, Any]) -> None:
    """Add one stretch of measuring (command, commit, versions) to settings.json."""
    held = read_json(out / SETTINGS_FILE)
    held["sessions"].append(session)
    write_json(held, out / SETTINGS_FILE)


def append_row(out: Path, row: Row) -> None:
    """Write one row at the end of raw.jsonl; raises as `append_line`."""
    append_line(out / RAW_FILE, asdict(row))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Write one line at the end of a JSONL file.

    Raises:
        UserError: it could not be written; the lines before it are kept.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was measured before is kept") from None


def read_rows(out: Path) -> list[Row]:
    """All rows of a bench directory, without a partial last line; none when nothing was measured yet.

    Raises:
        UserError: naming file and line.
    """
    path = out / RAW_FILE
    if not path.exists():
        return []
    rows = read_jsonl(path, {"suite": str, "id": str}, skip_partial_end=True)
    return [parse_settings(Row, row, f"{path} line {line}") for line, row in enumerate(rows, 1)]


def cut_partial_line(path: Path) -> None:
    """Cut off a last line without its end, which a killed writer left; nothing if the file is whole or missing."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)


# What a measurement was made with: command, commit, versions, machine. Recorded in settings.json.


def session_record(rows_before: int) -> dict[str, Any]:
    """One stretch of measuring, for settings.json.

    Args:
        rows_before: rows that the bench held when it started.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows_before": rows_before,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "threads": thread_settings(),
        **machine_load(),
    }


THREAD_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_")


def thread_settings() -> dict[str, Any]:
    """What decides how PyTorch's threads run on a CPU, which can change a ratio several times over."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREAD_VARIABLES)}
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "num_threads": torch.get_num_threads(),
        "processors": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "cpu": cpu_name(),
        "environment": variables,
    }


Load = dict[str, float | None]


def machine_load() -> Load:
    """What else the machine is doing: processes that want to run, and seconds that a hypervisor gave to others.

    `load_average` is the mean over the last minute, this process included. `steal_seconds` is counted over all
    processors since the machine started: what two counts differ by was lost between them.
    """
    average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    steal = None
    try:
        first = Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()
        if first[0] == "cpu" and len(first) > 8:
            steal = int(first[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    return {"load_average": average, "steal_seconds": steal}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("domino-spec", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of this package's checkout, `-dirty` where files differ; None if there is no checkout."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        top, head, changes = (
            subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("rev-parse", "--show-toplevel"),
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    if Path(top) != checkout:  # installed into an environment inside another repository
        return None
    return f"{head}-dirty" if changes else head


def device_name(device: torch.device) -> str:
    """The hardware behind a device, as its vendor calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor, as its vendor calls it, and how many there are."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


# Rows of a bench of servers. A window is one suite, asked of one server at one temperature, number of requests in
# flight and repeat. Requests of an interrupted window stay in the file, but only finished windows count. The next run
# of the command measures an unfinished window again, as another attempt.


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
    """Of the prompt; followed by `#` and the turn's number for later turns of a conversation."""
    temperature: float
    concurrency: int
    """Requests in flight."""
    repeat: int
    attempt: int
    """Of its window; an interrupted one is measured again under the next number."""
    round: int
    """How often the window had asked this before: small suites are gone through several times."""
    turn: int
    started: float
    """Seconds from the window's start until it was this request's turn."""
    sent: float
    """The same for the try that counts: later than `started` if the server first said 429."""
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
    """As the answer itself says, if it does; `domino-spec serve` and SGLang do."""
    accepted_drafts: int | None
    error: str | None
    """Why there is no answer; None if there is one."""

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
        """The id that all turns of a conversation share: what intervals resample."""
        return conversation_of(self.id, self.turn)

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
    """One of the engine's figures, before and after a window."""

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
    """What the engine's metrics said (`metrics`); empty if it has none."""

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
    """Everything that a directory holds; nothing if nothing was measured yet.

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
