"""What a request may hold: OpenAI's fields and a few more, validated before anything is computed.

What would change the answer and is not supported is refused; other fields that this server does not know are ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from domino_spec.decoding.sampling import ALMOST_ZERO, INT64, SamplingSettings
from domino_spec.serve.fields import ApiError, Fields, are_token_ids, check_text, check_token_ids, invalid
from domino_spec.settings import UserError
from domino_spec.target.text import Message

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_TOKENS = 1_000_000_000
"""More than any text or vocabulary has."""

Prompt = str | Sequence[int] | Sequence[Message]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and what chat templates call them."""

NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": NOTHING,
    "tool_choice": (None, "none"),
    "functions": NOTHING,
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": NOTHING,
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "suffix": NOTHING,
    "use_beam_search": NOTHING,
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "bad_words": NOTHING,
    "guided_json": (None,),
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "structured_outputs": NOTHING,
    "json_schema": (None,),
    "regex": NOTHING,
    "ebnf": NOTHING,
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": NOTHING,
    "add_generation_prompt": (None, True),
    "continue_final_message": NOTHING,
    "add_special_tokens": (None,),
    "chat_template": NOTHING,
    "documents": NOTHING,
}
"""Fields that would change the answer, with the values that ask for nothing; the vocabulary is OpenAI's and its
peers'."""


@dataclass(frozen=True)
class Served:
    """What is served, as far as requests are checked against it."""

    name: str
    vocab_size: int
    capacity: int
    """Tokens of prompt and answer together."""
    most_choices: int
    """Choices that a request may ask for."""


@dataclass(frozen=True)
class Ask:
    """A request that has been understood."""

    chat: bool
    prompts: Sequence[Prompt]
    settings: SamplingSettings
    """Choice i has the seed of these plus i."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Beside the target's own."""
    ignore_eos: bool = False
    max_tokens: int | None = None
    """None for what is left of the slot."""
    n: int = 1
    """Choices of every prompt."""
    top_logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    enable_thinking: bool = False


def parse_chat(values: dict[str, Any], served: Served) -> Ask:
    """A body of /v1/chat/completions.

    Raises:
        ApiError: it asks for something that this server or this target cannot do.
    """
    fields = Fields(values)
    _check_model(fields, served)
    _refuse_unsupported(fields)
    messages = _messages(fields)
    top_logprobs = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        top_logprobs = top_logprobs or 0
    elif top_logprobs is not None:
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    if fields.flag("echo"):
        raise _unsupported("echo")
    thinking = fields.mapping("chat_template_kwargs")
    for name, _ in thinking.items():
        if name != "enable_thinking":
            raise _unsupported(f"chat_template_kwargs.{name}")
    return _ask(
        fields,
        served,
        chat=True,
        prompts=[messages],
        top_logprobs=top_logprobs,
        enable_thinking=thinking.flag("enable_thinking"),
    )


def parse_completion(values: dict[str, Any], served: Served) -> Ask:
    """A body of /v1/completions.

    Raises:
        ApiError: as `parse_chat`.
    """
    fields = Fields(values)
    _check_model(fields, served)
    _refuse_unsupported(fields)
    top_logprobs = fields.integer("logprobs", 0, MOST_LOGPROBS)
    echo = fields.flag("echo")
    if echo and top_logprobs is not None:
        raise ApiError(
            400,
            "logprobs of the prompt are not supported: leave out echo or logprobs",
            param="echo",
            code="unsupported_parameter",
        )
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MOST_CHOICES)
    if best_of is not None and best_of != n:
        raise invalid("best_of", "best_of is not supported: leave it out, or give it the value of n")
    prompts = _prompts(fields.get("prompt"), served.vocab_size)
    return _ask(fields, served, chat=False, prompts=prompts, top_logprobs=top_logprobs, echo=echo)


def _ask(fields: Fields, served: Served, *, prompts: Sequence[Prompt], **own: Any) -> Ask:
    """What both kinds of request have in common."""
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    answers = n * len(prompts)
    if answers > served.most_choices:
        raise invalid("n", f"{answers} answers are asked for; this server takes {served.most_choices} at once")
    max_tokens = fields.integer("max_tokens", 1, MOST_TOKENS)
    newer = fields.integer("max_completion_tokens", 1, MOST_TOKENS)
    stream = fields.flag("stream")
    options = fields.mapping("stream_options")
    if fields.get("stream_options") is not None and not stream:
        raise invalid("stream_options", "stream_options needs stream to be true")
    return Ask(
        prompts=prompts,
        settings=_settings(fields, served),
        stop=fields.stop(),
        stop_token_ids=fields.token_ids("stop_token_ids", served.vocab_size),
        ignore_eos=fields.flag("ignore_eos"),
        max_tokens=max_tokens if newer is None else newer,
        n=n,
        stream=stream,
        include_usage=options.flag("include_usage"),
        **own,
    )


def _settings(fields: Fields, served: Served) -> SamplingSettings:
    seed = fields.integer("seed", -INT64, INT64 - 1)
    temperature = fields.number("temperature", 0, 2, 1.0)
    top_k = fields.integer("top_k", -1, MOST_TOKENS) or 0
    try:
        return SamplingSettings(
            temperature=0.0 if temperature < ALMOST_ZERO else temperature,
            top_k=min(max(top_k, 0), served.vocab_size),  # -1 is what peers call 0
            top_p=fields.number("top_p", 0, 1, 1.0),
            min_p=fields.number("min_p", 0, 1, 0.0),
            repetition_penalty=fields.number("repetition_penalty", 0.01, 100, 1.0),
            presence_penalty=fields.number("presence_penalty", -2, 2, 0.0),
            frequency_penalty=fields.number("frequency_penalty", -2, 2, 0.0),
            logit_bias=fields.logit_bias(served.vocab_size),
            seed=secrets.randbits(62) if seed is None else seed,
        )
    except UserError as error:
        raise invalid(str(error).split()[0], str(error)) from None


def check_model_name(name: str, served: Served) -> None:
    """Refuse a model that is not served here.

    Raises:
        ApiError: 404 with OpenAI's code.
    """
    if name != served.name:
        message = f"the model {name[:100]!r} does not exist; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.string("model")
    if name is None:
        raise invalid("model", f"model is missing: this server has {served.name!r}", "missing_required_parameter")
    check_model_name(name, served)


def _unsupported(name: str) -> ApiError:
    message = f"{name} is not supported by this server, and the answer would depend on it: leave it out"
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _refuse_unsupported(fields: Fields) -> None:
    for name, value in fields.items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            raise _unsupported(name)


def _messages(fields: Fields) -> list[Message]:
    values = fields.get("messages")
    if values is None:
        raise invalid("messages", "messages is missing", "missing_required_parameter")
    if not isinstance(values, list) or not values:
        raise invalid("messages", "messages must be an array of at least one message", "invalid_type")
    return [_message(value, f"messages[{i}]") for i, value in enumerate(values)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(where, f"{where} must be an object with role and content", "invalid_type")
    fields = Fields(value, where)
    role = fields.string("role")
    if role not in ROLES:
        raise invalid(f"{where}.role", f"{where}.role must be system, developer, user or assistant")
    for name in ("tool_calls", "function_call", "audio"):
        if fields.get(name) not in NOTHING:
            raise _unsupported(f"{where}.{name}")
    content = fields.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(f"{where}.content", f"{where}.content must be text or an array of text parts", "invalid_type")
    return {"role": ROLES[role], "content": check_text(content, f"{where}.content")}


def _text_part(part: object, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise invalid(where, f"{where} must be an object with a type", "invalid_type")
    if part["type"] != "text":
        message = f"{where} is of type {part['type'][:40]!r}; this server reads text only"
        raise ApiError(400, message, param=where, code="unsupported_value")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{where}.text", f"{where}.text must be a string", "invalid_type")
    return str(part["text"])


def _prompts(value: object, vocab_size: int) -> list[Prompt]:
    """A text, several texts, token ids, or several lists of them."""
    if value is None:
        raise invalid("prompt", "prompt is missing", "missing_required_parameter")
    if isinstance(value, str):
        return [check_text(value, "prompt")]
    if isinstance(value, list) and value:
        if all(isinstance(p, str) for p in value):
            return [check_text(p, "prompt") for p in value]
        several = value if isinstance(value[0], list) else [value]
        if all(isinstance(p, list) and p and are_token_ids(p) for p in several):
            for ids in several:
                check_token_ids(ids, vocab_size, "prompt")
            return several
    raise invalid("prompt", "prompt must be a text, token ids, or an array of either, none empty", "invalid_type")
