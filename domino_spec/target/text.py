"""Prompts: texts and chats to token ids, by the target's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from domino_spec.settings import UserError
from domino_spec.target.load import reason

Message = dict[str, str]


class ChatTemplateError(UserError):
    """A chat template does not take some messages, or cannot be used at all."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    chat: bool = True,
    enable_thinking: bool | None = False,
) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the target.
        prompt: a user's text, or a list of chat messages ({"role", "content"}).
        chat: wrap a text in the tokenizer's chat template if it has one; False continues the raw text.
        enable_thinking: passed to templates that know it (Qwen3); None leaves them their own default.

    Raises:
        ChatTemplateError: the chat template fails, or does not take the messages.
        UserError: the prompt is empty or not valid Unicode, or the tokenizer fails at it.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty")
        if not chat or tokenizer.chat_template is None:
            return _encode_text(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    for message in prompt:
        for value in message.values():
            check_characters(str(value), "the prompt")
    if not prompt:
        raise UserError("the prompt holds no messages")
    if tokenizer.chat_template is None:
        raise UserError("chat messages need a chat template, and this target's tokenizer has none")
    options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    with _rendering(tokenizer):
        encoded: Any = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is continued as it is."""
    check_characters(text, "the prompt")
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as error:
        where = f"the tokenizer of {tokenizer.name_or_path or 'the target'}"
        raise UserError(f"{where} cannot encode the prompt: {reason(error)}") from error


def check_characters(text: str, what: str) -> None:
    """Refuse text that UTF-8 cannot encode: bytes of another encoding on a command line, half a surrogate in JSON.

    Args:
        text: to check.
        what: what it is, for the message.

    Raises:
        UserError: naming the first place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid UTF-8 text: character {error.start + 1} of it is no character; "
            "convert it to UTF-8 and try again"
        ) from None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    enable_thinking: bool | None = False,
) -> str:
    """What the chat template writes for some messages; with the generation prompt, what `encode_prompt` encodes.

    Raises:
        ChatTemplateError: the chat template fails, or does not take the messages.
    """
    options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    with _rendering(tokenizer):
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **options
        )
        return str(text)


@contextmanager
def _rendering(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """A template is a program from the checkpoint, run in jinja's sandbox: it can raise anything."""
    try:
        yield
    except Exception as error:
        where = f"the chat template of {tokenizer.name_or_path or 'the target'}"
        if type(error) is TemplateError:  # what `raise_exception` raises; jinja's own errors are subclasses
            said = " ".join(str(error).split())[:300]
            raise ChatTemplateError(f"{where} does not take these messages: {said}") from error
        raise ChatTemplateError(f"{where} cannot be used: {reason(error)}") from error
