"""The raw measurements of a bench: one line of raw.jsonl per run, and the configuration that all of them share.

Rows are appended as they are measured, so a killed bench loses at most the run it was in. Everything that a report
says is computed from these rows; settings.json says what they were measured with (DESIGN section 8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from domino_spec.files import read_json, read_jsonl, write_json
from domino_spec.settings import Settings, UserError, parse_settings

RAW_FILE, SETTINGS_FILE = "raw.jsonl", "settings.json"


def turn_suffix(turn: int) -> str:
    """What stands behind a conversation's id in the id of one of its turns."""
    return "" if turn == 1 else f"#{turn}"


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
        """The id that all turns of a conversation share: what intervals draw anew."""
        return self.id if self.turn == 1 else self.id.removesuffix(turn_suffix(self.turn))

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
    """Cut off a last line without its end, which a killed writer left; nothing where the file is whole or missing."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
