"""Errors of users, settings read from files (`parse_settings`), and the packages that a task needs.

A *recipe* (`recipe.py`) is ours, so an unknown key or a wrong type is an error that names the key. A *published draft
configuration* belongs to others, so keys that this package does not know are kept and written back unchanged
(docs/design.md, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import reprlib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails


class UserError(ValueError):
    """Something that the user can correct. The command line prints it as one line and exits with status 2."""


def cache_directory() -> Path:
    """Where converted models and compiled loops are kept: $DOMINO_SPEC_CACHE, else ~/.cache/domino-spec."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "domino-spec"
    return Path(os.environ.get("DOMINO_SPEC_CACHE", default))


class Settings:
    """Base of the dataclasses that are read from files: pydantic checks them in `parse_settings`, and only there.

    Inside the program they are ordinary dataclasses, with `__post_init__` for what one annotation cannot say.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)

_EXPECTED = {
    "int_type": "integer",
    "float_type": "number",
    "finite_number": "finite number",
    "bool_type": "true or false",
    "string_type": "string",
    "tuple_type": "list",
    "mapping_type": "mapping",
    "dict_type": "mapping",
    "dataclass_type": "mapping of settings",
    "model_type": "mapping",
    "list_type": "list",
    "too_short": "list of at least {min_length}",
    "too_long": "list of at most {max_length}",
    "string_too_short": "string of at least {min_length} characters",
    "string_too_long": "string of at most {max_length} characters",
}
"""Pydantic's kinds of error, in the words of YAML and JSON; limits in braces."""


def parse_settings(cls: type[S], values: object, where: str) -> S:
    """Build the dataclass `cls` from what a YAML or JSON file held; refuse unknown keys, wrong types and wrong ranges.

    Lists become tuples and whole numbers become floats if `cls` asks for them; nothing else is converted.

    Args:
        cls: a dataclass over `Settings`; its annotations may carry constraints (`Annotated[int, Field(ge=1)]`).
        values: what the file held.
        where: what is read, for messages, such as the file's path.

    Raises:
        UserError: one line with the key, what was found and what was expected.
    """
    try:
        for key, number in _integers(values, ""):
            if number.bit_length() > 63:  # what tensors hold; Python itself refuses to write much longer ones
                bits = number.bit_length()
                raise UserError(f"{where}: {key}: expected integer of at most 64 bits, found one of {bits + 1} bits")
        text = json.dumps(values, default=str)  # strict validation takes lists for tuples in JSON alone
    except (TypeError, RecursionError):
        raise UserError(f"{where}: expected plain settings, found keys of other kinds or endless nesting") from None
    try:
        return _adapter(cls).validate_json(text)  # type: ignore[arg-type,no-any-return]
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error, cls, json.loads(text)).sentence}") from None


@functools.cache
def _adapter(cls: type[Settings]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What pydantic found wrong with values from outside."""

    key: str
    """Where it stands, such as `training.trackers[1]`; empty for the values as a whole."""
    kind: str
    """Pydantic's name of the kind of error."""
    sentence: str
    """The key, what was expected and what was found."""


def first_fault(error: ValidationError, cls: Any, values: object) -> Fault:
    """The fault to report first.

    Args:
        error: what pydantic raised.
        cls: the dataclass or model that was to be built.
        values: what it was to be built from.
    """
    # A misspelt key is unknown, and its right name missing: the first says more.
    first = {"unexpected_keyword_argument": 0, "missing": 1}
    worst = min(error.errors(include_url=False), key=lambda one: first.get(one["type"], 2))
    key = _prefix(_keys(worst["loc"], worst["type"], values)).removesuffix(": ")
    return Fault(key, worst["type"], _describe(worst, cls, values))


def _integers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _integers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _integers(item, f"{key}[{index}]")


def _describe(error: ErrorDetails, cls: Any, values: object) -> str:
    """One of pydantic's errors about `values` as `key: expected this, found that`."""
    kind, path = error["type"], _keys(error["loc"], error["type"], values)
    if kind == "unexpected_keyword_argument":
        known = ", ".join(sorted(f.name for f in dataclasses.fields(_class_at(cls, path[:-1]))))
        return f"{_prefix(path[:-1])}unknown key {shortened(path[-1])}; known keys are {known}"
    if kind == "missing":
        return f"{_prefix(path[:-1])}missing key {path[-1]!r}"
    if kind == "value_error":  # raised by `__post_init__` or a validator
        return f"{_prefix(path)}{error['ctx']['error']}"
    if kind == "json_invalid":  # such as a half of a surrogate pair
        return f"not valid text: {error['ctx']['error']}"
    expected = _EXPECTED.get(kind, "").format(**error.get("ctx", {})) or error["msg"].removeprefix("Input should be ")
    return f"{_prefix(path)}expected {expected}, found {found(error['input'])}"


def _keys(path: tuple[int | str, ...], kind: str, values: Any) -> tuple[int | str, ...]:
    """The keys and indices of one of pydantic's paths, which also names the members of unions that it tried."""
    keys: list[int | str] = []
    part: Any
    for part in path:
        if isinstance(values, list if isinstance(part, int) else dict) and (isinstance(part, int) or part in values):
            values = values[part]
        elif kind != "missing" or part != path[-1]:
            continue
        keys.append(part)
    return tuple(keys)


def _prefix(path: tuple[int | str, ...]) -> str:
    """`training.trackers[1]: `, or nothing for the whole file."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{key}: " if key else ""


def _class_at(cls: Any, path: tuple[int | str, ...]) -> Any:
    """The dataclass that stands under the keys `path` of `cls`."""
    for name in path:
        hint = typing.get_type_hints(cls)[str(name)]
        cls = next(c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c))
    return cls


def found(value: object) -> str:
    """A value from a file for an error text, with its type: `'x' (str)`."""
    return "null" if value is None else f"{shortened(value)} ({type(value).__name__})"


def shortened(value: object) -> str:
    """`value` as Python writes it, on one line, and cut if it is long or deep."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    """`values`; raises `UserError` if one of them occurs twice."""
    require(len(set(values)) == len(values), f"expected each only once, found {shortened(list(values))}")
    return values


# Packages that one task needs beyond decoding: the extras of pyproject.toml. A command asks for them before it imports
# PyTorch, so a missing package is reported at once and not after seconds of loading.

EXTRAS = {
    "demo": ("accelerate", "gguf"),
    "train": ("tensorboard", "matplotlib", "httpx"),
    "bench": ("matplotlib", "markdown-it-py", "httpx"),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
}
"""Packages by extra, under the names that pip knows."""
_MODULES = {"markdown-it-py": "markdown_it"}
"""What is imported, for packages of another name."""


def missing_packages(extra: str) -> list[str]:
    """Those packages of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def require_extra(extra: str, task: str) -> None:
    """Refuse a task whose packages are not installed.

    Args:
        extra: a key of `EXTRAS`.
        task: what needs it, for the message.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    missing = missing_packages(extra)
    if missing:
        is_not = "which is not installed" if len(missing) == 1 else "which are not installed"
        raise UserError(f"{task} needs {', '.join(missing)}, {is_not}: pip install {' '.join(EXTRAS[extra])}")
