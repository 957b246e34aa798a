"""Reading and writing files: a crash, a full disk or a bad line never loses what was there before."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from domino_spec.settings import UserError, found

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of types in headers of safetensors files."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` only if the block raises nothing.

    Raises:
        UserError: the file could not be written (a full disk, no permission); `path` is as it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.touch()
        mode = scratch.stat().st_mode
        yield scratch
        os.chmod(scratch, mode)  # safetensors makes files that only their owner may read
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot write {path}: {reason}; what was there before is kept") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        UserError: it could not be written; the previous file survives.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as scratch:
        save_file(contiguous, scratch, {"format": "pt", **(metadata or {})})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        UserError: it is missing, truncated or not a safetensors file.
    """
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def outline_tensors(path: Path) -> dict[str, Tensor]:
    """Shapes and types of a safetensors file, read from its header: tensors on the meta device, which hold no values.

    Lists of whole numbers (draft vocabularies) are read, since the shape of a draft depends on them. Raises as
    `load_tensors`.
    """
    with _open_tensors(path) as file:
        return {name: _outline(file, name) for name in file.keys()}  # noqa: SIM118


def _outline(file: Any, name: str) -> Tensor:
    header = file.get_slice(name)
    dtype, shape = _TYPES.get(header.get_dtype()), header.get_shape()
    if dtype is None or (len(shape) == 1 and not dtype.is_floating_point):
        return file.get_tensor(name)
    return torch.empty(shape, dtype=dtype, device="meta")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that a model's weights are in: one, or those that its index names; empty if it has none.

    Raises:
        UserError: the index is not the map of tensors to files beside it that it should be.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        return []
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index}: weight_map: expected a mapping of tensors to files, found {found(files)}")
    for name, file in files.items():
        # A path could lead out of the directory, and a file of another kind could be a pickle.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map: expected a safetensors file beside it for tensor {name}, found {found(file)}"
            )
    return [directory / file for file in sorted(set(files.values()))]


def gather_tensors(files: Iterable[Path], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several files together.

    Args:
        files: of `weight_files`.
        read: gives the tensors of one, such as `outline_tensors`.

    Raises:
        UserError: one cannot be read, or two hold a tensor of the same name.
    """
    gathered: dict[str, Tensor] = {}
    for file in files:
        tensors = read(file)
        if twice := tensors.keys() & gathered.keys():
            raise UserError(f"{file}: tensor {min(twice)} is in another file, too")
        gathered |= tensors
    return gathered


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; raises as `load_tensors`."""
    with _open_tensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            _refuse_names_twice(path)
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); it may be truncated") from None


def _refuse_names_twice(path: Path) -> None:
    """The library silently keeps the last of two tensors with one name; it has checked the rest already."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in Counter(name for name, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path}: tensor {name} is in its header {count} times")
        return dict(pairs)

    json.loads(header, object_pairs_hook=once)


def write_json(value: Any, path: Path) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: it cannot be read or is not JSON, which has no NaN and no infinity.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object; raises as `read_json`, and if it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {found(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def read_jsonl(
    path: str | Path,
    required: Mapping[str, type],
    skip_partial_end: bool = False,
    fault: Callable[[dict[str, Any]], str | None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Objects of a JSONL file, each checked to hold `required` keys of those types.

    Args:
        path: the file; blank lines are skipped.
        required: the type of each key.
        skip_partial_end: drop a last line that does not end in a newline (a writer was killed while writing it).
        fault: returns what else is wrong with a row, or None.

    Raises:
        UserError: naming file and line number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    lines = text.split("\n")
    if skip_partial_end:
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise UserError(f"{path} line {number}: not valid JSON (it is nested too deeply)") from None
        except ValueError as error:
            raise UserError(f"{path} line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: expected an object, got {type(row).__name__}")
        for key, kind in required.items():
            if not isinstance(row.get(key), kind):
                raise UserError(f"{path} line {number}: key {key!r} must be {kind.__name__}")
        if wrong := fault(row):
            raise UserError(f"{path} line {number}: {wrong}")
        rows.append(row)
    if not rows and not skip_partial_end:
        raise UserError(f"{path} holds no rows")
    return rows
