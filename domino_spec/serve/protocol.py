"""OpenAI's API on the wire: what a request may hold, what an error says, and the shape of an answer.

A request is parsed by one of two pydantic models before anything is computed. What would change the answer and is not
supported is refused; other fields that this server does not know are ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from domino_spec.decoding.sampling import ALMOST_ZERO, INT64, SamplingSettings
from domino_spec.settings import Fault, first_fault, shortened
from domino_spec.target.text import Message, check_characters

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_STOP_STRINGS = 4
MOST_TOKENS = 1_000_000_000
"""More than any text or vocabulary has."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and what chat templates call them."""

NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "audio", "suffix", "use_beam_search", "bad_words"), NOTHING),
    **dict.fromkeys(
        ("guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "regex", "ebnf"), NOTHING
    ),
    **dict.fromkeys(("include_stop_str_in_output", "continue_final_message", "chat_template", "documents"), NOTHING),
    **dict.fromkeys(("web_search_options", "reasoning_effort", "guided_json", "json_schema"), ()),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "add_special_tokens"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), ("none",)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "min_tokens": (0,),
}
"""Fields of OpenAI's API and of other servers that would change the answer, with the values that ask for nothing."""


# Errors


class ApiError(Exception):
    """The error that a client gets instead of an answer.

    Args:
        status: of the HTTP response.
        message: one or two sentences.
        param: the field that is wrong.
        code: a word that programs can test.
        retry_after: seconds after which another try makes sense.
        retry: False tells the client that another try would fail in the same way.
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
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if not retry:
            self.headers["x-should-retry"] = "false"  # the official client obeys it

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A request that its client can correct."""
    return ApiError(400, message, param=param, code=code)


def _unsupported(name: str) -> ApiError:
    message = f"{name} is not supported by this server, and the answer would depend on it: leave it out"
    return invalid(name, message, "unsupported_parameter")


def _refusal(fault: Fault) -> ApiError:
    """What pydantic found wrong, with OpenAI's codes."""
    if fault.kind in ("unsupported_parameter", "extra_forbidden"):
        return _unsupported(fault.key)
    code, sentence = "invalid_value", fault.sentence
    if fault.kind == "missing":  # `_json_object` dropped it if it was null
        code, sentence = "missing_required_parameter", sentence.replace("missing key", "missing or null:")
    elif fault.kind.endswith("_type") or fault.kind == "too_short":
        code = "invalid_type"
    elif fault.kind == "unsupported_value":
        code = fault.kind
    return invalid(fault.key or None, sentence, code)


# Requests


@dataclass(frozen=True)
class Served:
    """What requests are checked against."""

    name: str
    vocab_size: int
    capacity: int
    """Tokens of prompt and answer together."""
    most_choices: int
    """Choices that a request may ask for."""


def _whole(value: object) -> object:
    """JSON has one kind of number: 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list_of_strings(value: object) -> object:
    if not isinstance(value, (str, list)):
        raise PydanticCustomError("stop_type", "Input should be string or list of strings")
    return [value] if isinstance(value, str) else value


def _text(text: str) -> str:
    check_characters(text, "the text")
    return text


def _nothing(value: object) -> object:
    if value not in NOTHING:
        raise PydanticCustomError("unsupported_parameter", "Input should be empty")
    return value


def _token_ids(ids: list[int], info: ValidationInfo[Any]) -> list[int]:
    size = info.context.vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < size:
        wrong = next(i for i in ids if not 0 <= i < size)
        raise ValueError(f"expected token ids of the vocabulary of {size}, found {shortened(wrong)}")
    return ids


def _no_more_than_tokens(biases: Any, info: ValidationInfo[Any]) -> Any:
    """Bounds the number of errors that pydantic collects."""
    if isinstance(biases, dict) and len(biases) > info.context.vocab_size:
        raise ValueError(f"expected at most {info.context.vocab_size} token ids, found {len(biases)}")
    return biases


def _biases(biases: dict[str, float], info: ValidationInfo[Any]) -> dict[str, float]:
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 20):
            raise ValueError(f"expected token ids as keys, found {shortened(name)}")
        _token_ids([int(name)], info)
    return biases


def _prompts(value: Any, info: ValidationInfo[Any]) -> list[str] | list[list[int]]:
    """A text, several texts, token ids, or several lists of them."""
    if isinstance(value, list) and value and not isinstance(value[0], str):
        several = value if isinstance(value[0], list) else [value]
        if all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in several):
            return [_token_ids(ids, info) for ids in several]
    texts = _list_of_strings(value)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise PydanticCustomError("prompt_type", "Input should be a text, token ids, or a list of either, none empty")
    return list(map(_text, texts))


def _parts(content: object) -> object:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("content_type", "Input should be text or a list of text parts")
    return content


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1, le=MOST_TOKENS)]
Choices = Annotated[Whole, Field(ge=1, le=MOST_CHOICES)]
Logprobs = Annotated[Whole, Field(ge=0, le=MOST_LOGPROBS)]
Share = Annotated[float, Field(ge=0, le=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, AfterValidator(_text)]
Unasked = Annotated[Any, AfterValidator(_nothing)]


class _Object(BaseModel):
    """A JSON object from outside. A field that is null counts as absent (`_json_object`)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _TextPart(_Object):
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("part_type", "Input should be an object with a type")
        if part["type"] != "text":
            raise PydanticCustomError("unsupported_value", "Input should be a part of type text")
        return part


class _Message(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    tool_calls: Unasked = None
    function_call: Unasked = None
    audio: Unasked = None
    content: Annotated[list[_TextPart], FailFast(), BeforeValidator(_parts)]


class _TemplateOptions(_Object):
    model_config = ConfigDict(extra="forbid")

    enable_thinking: bool = False


class _StreamOptions(_Object):
    include_usage: bool = False


class _Request(_Object):
    """Fields that both routes share. The defaults are OpenAI's."""

    chat: ClassVar[bool]

    model: str
    n: Choices = 1
    """Choices for every prompt."""
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[Whole, Field(ge=-1, le=MOST_TOKENS)] = 0
    """-1 means all, as 0 does."""
    top_p: Annotated[Share, Field(gt=0)] = 1.0
    min_p: Annotated[Share, Field(lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_no_more_than_tokens), AfterValidator(_biases)] = {}
    seed: Annotated[Whole, Field(ge=-INT64, le=INT64 - 1)] | None = None
    """Choice i is drawn with this seed plus i."""
    stop: Annotated[
        list[Annotated[str, Field(min_length=1), AfterValidator(_text)]],
        FailFast(),
        Field(max_length=MOST_STOP_STRINGS),
        BeforeValidator(_list_of_strings),
    ] = []
    stop_token_ids: Annotated[list[Whole], FailFast(), AfterValidator(_token_ids)] = []
    """In addition to the target's."""
    ignore_eos: bool = False
    stream: bool = False
    stream_options: _StreamOptions | None = None
    echo: bool = False

    @property
    def prompts(self) -> Sequence[str | Sequence[int] | Sequence[Message]]:
        """The prompts to continue."""
        raise NotImplementedError

    @property
    def top(self) -> int | None:
        """How many log-probabilities to report in addition to each token's; None for none at all."""
        raise NotImplementedError

    @property
    def length(self) -> int | None:
        """Most tokens of an answer; None for what is left of the slot."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, served: Served) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ApiError: naming one of them.
        """
        answers = self.n * len(self.prompts)
        if answers > served.most_choices:
            raise invalid("n", f"{answers} answers are asked for; this server takes {served.most_choices} at once")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options needs stream to be true")

    def sampling(self, vocab_size: int) -> SamplingSettings:
        """How tokens are drawn; without a seed, a new one every time."""
        return SamplingSettings(
            temperature=0.0 if self.temperature < ALMOST_ZERO else self.temperature,
            top_k=min(max(self.top_k, 0), vocab_size),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=secrets.randbits(62) if self.seed is None else self.seed,
        )


class ChatCompletionRequest(_Request):
    """A body of /v1/chat/completions."""

    chat = True

    messages: Annotated[list[_Message], FailFast(), Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: _TemplateOptions = _TemplateOptions()

    @property
    def prompts(self) -> list[list[Message]]:
        """The conversation."""
        texts = ((m.role, "".join(part.text for part in m.content)) for m in self.messages)
        return [[{"role": ROLES[role], "content": text} for role, text in texts]]

    @property
    def top(self) -> int | None:
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, served: Served) -> None:
        """See the base class."""
        super().check(served)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.echo:
            raise _unsupported("echo")


class CompletionRequest(_Request):
    """A body of /v1/completions."""

    chat = False

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    logprobs: Logprobs | None = None
    best_of: Choices | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Texts, or token ids."""
        return self.prompt

    @property
    def top(self) -> int | None:
        """See the base class."""
        return self.logprobs

    def check(self, served: Served) -> None:
        """See the base class."""
        super().check(served)
        if self.echo and self.logprobs is not None:
            message = "logprobs of the prompt are not supported: leave out echo or logprobs"
            raise invalid("echo", message, "unsupported_parameter")
        if self.best_of not in (None, self.n):
            raise invalid("best_of", "best_of is not supported: leave it out, or give it the value of n")


AnyRequest = ChatCompletionRequest | CompletionRequest
R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: bytes, served: Served) -> R:
    """Read a request.

    Raises:
        ApiError: it is not JSON, or asks for something that this server or this target cannot do.
    """
    values = _json_object(body)
    if isinstance(values.get("model"), str):
        check_model_name(values["model"], served)
    for name, value in values.items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            raise _unsupported(name)
    try:
        request = kind.model_validate(values, context=served)
    except ValidationError as error:
        raise _refusal(first_fault(error, kind, values)) from None
    request.check(served)
    return request


def check_model_name(name: str, served: Served) -> None:
    """Refuse a model that is not served here.

    Raises:
        ApiError: 404 with OpenAI's code.
    """
    if name != served.name:
        message = f"the model {name[:100]!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _json_object(body: bytes) -> dict[str, Any]:
    """A JSON object without its nulls.

    Raises:
        ApiError: it is none.
    """
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_nulls)
    except RecursionError:
        raise invalid(None, "the body is nested too deeply", "invalid_json") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise invalid(None, f"the body is not valid JSON: {reason}", "invalid_json") from None
    if not isinstance(values, dict):
        raise invalid(None, f"the body must be a JSON object, got {type(values).__name__}", "invalid_json")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value is not None}


# Answers


class Usage(BaseModel):
    """Tokens of prompts (each once) and answers, and how drafting did."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    acceptance_length: float
    """tau, the mean of accepted drafts + 1 over the verify passes; 0 before the first."""
    num_drafts: int
    num_accepted_drafts: int
    num_verify_passes: int


class Choice(BaseModel):
    """One choice: with `message` or `text` when it is whole, with `delta` or `text` in a stream."""

    index: int
    message: dict[str, str | None] | None = None
    delta: dict[str, str] | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class Answer(BaseModel):
    """A whole answer or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None

    def json_bytes(self) -> bytes:
        """What is sent: only the fields that were set."""
        return self.model_dump_json(exclude_unset=True).encode()
