"""Reading a request's JSON: every field with its type and range checked, every error in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from domino_spec.decoding.sampling import INT64

MOST_STOP_STRINGS = 4


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of the HTTP response.
        message: one or two sentences.
        param: the field that is wrong.
        code: a word that programs can look at.
        retry_after: seconds after which another try makes sense.
        retry: False tells the client that another try would end alike.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)
        if not retry:
            self.headers["x-should-retry"] = "false"  # the official client obeys it

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A request that its client can put right."""
    return ApiError(400, message, param=param, code=code)


def parse_json(body: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        ApiError: it is none.
    """
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from None
    except ValueError as error:
        raise invalid(None, f"the body is not valid JSON: {_one_line(error)}", "invalid_json") from None
    if not isinstance(values, dict):
        raise invalid(None, f"the body must be a JSON object, got {_kind(values)}", "invalid_json")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


class Fields:
    """The fields of a JSON object; null stands for absent.

    Every method takes the field's name and returns its value or what stands in for it.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values, self._where = values, where

    def get(self, name: str) -> Any:
        """As it is."""
        return self._values.get(name)

    def _name(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _wrong_type(self, name: str, expected: str, value: object) -> ApiError:
        return invalid(self._name(name), f"{self._name(name)} must be {expected}, got {_kind(value)}", "invalid_type")

    def flag(self, name: str) -> bool:
        """True or false; false where absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong_type(name, "a boolean", value)
        return bool(value)

    def integer(self, name: str, least: int, most: int) -> int | None:
        """A whole number between two bounds, inclusive."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong_type(name, "an integer", value)
        self._check_range(name, value, least, most)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A finite number between two bounds, inclusive."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong_type(name, "a number", value)
        self._check_range(name, value, least, most)
        return float(value)

    def _check_range(self, name: str, value: float, least: float, most: float) -> None:
        if not least <= value <= most:  # neither is what is not finite
            shown = str(value) if abs(value) < INT64 else "a huge number"
            message = f"{self._name(name)} must be between {least} and {most}, got {shown}"
            raise invalid(self._name(name), message)

    def string(self, name: str) -> str | None:
        """Text that UTF-8 can hold."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._wrong_type(name, "a string", value)
        return check_text(value, self._name(name))

    def mapping(self, name: str) -> Fields:
        """The fields of an object; none where absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong_type(name, "an object", value)
        return Fields(value or {}, self._name(name))

    def items(self) -> list[tuple[str, Any]]:
        """Those that are not null."""
        return [(name, value) for name, value in self._values.items() if value is not None]

    def stop(self) -> tuple[str, ...]:
        """Up to four texts that end an answer."""
        value = self.get("stop")
        strings = [value] if isinstance(value, str) else value or []
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise self._wrong_type("stop", "a string or an array of strings", value)
        if len(strings) > MOST_STOP_STRINGS:
            raise invalid("stop", f"stop may hold at most {MOST_STOP_STRINGS} strings, got {len(strings)}")
        if any(not s for s in strings):
            raise invalid("stop", "a stop string must not be empty")
        return tuple(check_text(s, "stop") for s in strings)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Ids of tokens."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not are_token_ids(value):
            raise self._wrong_type(name, "an array of token ids", value)
        check_token_ids(value, vocab_size, self._name(name))
        return tuple(value)

    def logit_bias(self, vocab_size: int) -> dict[int, float]:
        """Token ids and what is added to their logits."""
        bias = self.mapping("logit_bias")
        ids: dict[int, float] = {}
        for name, _ in bias.items():
            if not (name.isascii() and name.isdigit() and len(name) < 20):
                raise invalid("logit_bias", f"logit_bias takes token ids, got {name[:20]!r}")
            check_token_ids([int(name)], vocab_size, "logit_bias")
            ids[int(name)] = bias.number(name, -100, 100, 0.0)
        return ids


def check_text(text: str, param: str) -> str:
    """The text.

    Raises:
        ApiError: it holds half a surrogate pair, which JSON can write and no tokenizer can read.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise invalid(param, f"{param} holds an unpaired surrogate, which is no character")
    return text


def are_token_ids(value: list[Any]) -> bool:
    """Whether these are whole numbers."""
    return all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Refuse ids that the target does not know.

    Raises:
        ApiError: one is outside the vocabulary.
    """
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise invalid(param, f"{param} holds a token id outside the vocabulary of {vocab_size}")
