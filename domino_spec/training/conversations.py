"""Conversations as text, and how they become sequences whose loss is on the assistant's turns alone.

What is learned is found turn by turn with the target's own chat template, not by searching its text for markers: the
prompt of a turn is what serving would render before it, and its answer is the assistant's text with the token that
ends the turn. So nothing that a user writes can be taken for an answer, and nothing of a template's headers is learned.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from domino_spec.settings import UserError
from domino_spec.target.text import ChatTemplateError, Message, encode_prompt, render_chat
from domino_spec.training.data import Sequence, Turn, join_turns

_log = logging.getLogger(__name__)

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
_PROBE = "probe0answer"


@dataclass(frozen=True)
class Conversation:
    """A conversation in turns: a system prompt or none, a user, and perhaps an assistant."""

    id: str
    messages: tuple[Message, ...]
    category: str = ""

    @property
    def system(self) -> tuple[Message, ...]:
        """The system prompt, or nothing."""
        return tuple(m for m in self.messages[:1] if m["role"] == "system")

    @property
    def user_turns(self) -> list[str]:
        """Texts of the user's turns."""
        return [m["content"] for m in self.messages if m["role"] == "user"]

    @property
    def is_answered(self) -> bool:
        """Whether the assistant says anything."""
        return any(m["role"] == "assistant" for m in self.messages)


class Unusable(ValueError):
    """A conversation that cannot be trained on; its text names the reason, the same for all of its kind."""


def row_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of a row that should hold a conversation, or None.

    A row holds `turns` (what the user says), `messages` (`role` and `content`), or `conversations` (`from` and
    `value`, as ShareGPT has them).
    """
    key = next((k for k in ("turns", "messages", "conversations") if k in row), None)
    if key is None:
        return "key 'turns' must be list (or give 'messages' or 'conversations')"
    if not isinstance(row[key], list):
        return f"key {key!r} must be list"
    if key == "turns":
        whole = row[key] and all(isinstance(turn, str) and turn.strip() for turn in row[key])
        return None if whole else "key 'turns' must hold one or more texts"
    role, content = ("role", "content") if key == "messages" else ("from", "value")
    for message in row[key]:
        texts = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in (role, content))
        if not texts:
            return f"key {key!r} must hold objects with the texts {role!r} and {content!r}"
    return None


def parse_conversation(row: Mapping[str, Any], default_id: str) -> Conversation:
    """The conversation of a row that `row_fault` accepts.

    Answers before the user's first turn are dropped: parts of longer conversations begin with them.

    Raises:
        Unusable: it does not alternate between user and assistant.
    """
    if "turns" in row:
        messages = [{"role": "user", "content": turn} for turn in row["turns"]]
    elif "messages" in row:
        messages = [_message(m["role"], m["content"], m.get("reasoning_content")) for m in row["messages"]]
    else:
        messages = [_message(m["from"], m["value"]) for m in row["conversations"]]
    system = [m for m in messages[:1] if m["role"] == "system" and m["content"].strip()]
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    while spoken and spoken[0]["role"] == "assistant":
        spoken = spoken[1:]
    if not spoken:
        raise Unusable("no user turn")
    if "turns" not in row:
        _check_turns(spoken)
    id_ = row.get("id")
    return Conversation(id_ if isinstance(id_, str) else default_id, (*system, *spoken), row.get("category") or "")


def _message(role: str, content: str, reasoning: Any = None) -> Message:
    if role not in _ROLES:
        raise Unusable("a role other than system, user and assistant")
    extra = {"reasoning_content": reasoning} if isinstance(reasoning, str) and reasoning else {}
    return {"role": _ROLES[role], "content": content, **extra}


def _check_turns(spoken: SequenceType[Message]) -> None:
    for index, message in enumerate(spoken):
        if message["role"] != ("user", "assistant")[index % 2]:
            raise Unusable("turns do not alternate")
        if message["role"] == "user" and not message["content"].strip():
            raise Unusable("an empty user turn")


class ChatFormat:
    """How a target's chat template writes a conversation, and where its answers end.

    Args:
        tokenizer: of the target.
        stop_token_ids: tokens at which the target stops.
        thinking: passed to templates that know it; None leaves the template's default.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int], thinking: bool | None = False
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError("conversations need a chat template, and this target's tokenizer has none")
        self.tokenizer, self.thinking = tokenizer, thinking
        self._stop_token_ids = stop_token_ids
        probe = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": _PROBE}]
        self._tail = self._render(probe, False).rpartition(_PROBE)[2]
        ends = [token for token in self._encode(self._tail) if token in stop_token_ids]
        self.end_of_turn: list[int] = ends[:1]
        """The token with which the target ends an answer; empty if the template writes no stop token."""
        if not ends:
            _log.warning("the chat template ends answers with no stop token: where answers end is not learned")

    def prompt_ids(self, messages: SequenceType[Message]) -> list[int]:
        """Token ids of what the target is given when it is to answer these messages."""
        return encode_prompt(self.tokenizer, messages, enable_thinking=self.thinking)

    def answer_ids(self, messages: SequenceType[Message], ended: bool = True) -> list[int]:
        """Token ids of the last message, the assistant's, as it would have written them after `prompt_ids`.

        Args:
            messages: up to and with the answer.
            ended: the answer was not cut short, so the end of its turn is part of it.

        Returns:
            Up to and with the first stop token.
        """
        text, prompt = self._answer_text(messages), self.prompt_ids(messages[:-1])
        # Some tokenizers encode a text's first word differently from the same word inside a text. If a token would
        # span the border, the answer is encoded alone: while serving, the border is fixed.
        both = self._encode(self._render(messages[:-1], True) + text)
        ids = both[len(prompt) :] if both[: len(prompt)] == prompt else self._encode(text)
        for index, token in enumerate(ids):
            if token in self._stop_token_ids:
                return ids[: index + 1]
        return ids + self.end_of_turn if ended else ids

    def _answer_text(self, messages: SequenceType[Message]) -> str:
        *before, answer = messages
        text, content = self._render(messages, False), answer["content"]
        if answer.get("reasoning_content"):
            prompt = self._render(before, True)
            if text.startswith(prompt) and text.endswith(self._tail):
                return text[len(prompt) : len(text) - len(self._tail)]
        stripped = content.strip()
        # Most templates strip what they are given, and then the answer is what they write.
        strips = stripped != content and self._render([*before, {**answer, "content": stripped}], False) == text
        return stripped if strips else content

    def _render(self, messages: SequenceType[Message], add_generation_prompt: bool) -> str:
        return render_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.thinking,
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def knows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads `enable_thinking`."""
    return "enable_thinking" in str(tokenizer.chat_template or "")


def conversation_sequences(chat: ChatFormat, conversation: Conversation, max_length: int) -> list[Sequence]:
    """A conversation as sequences in which the assistant's turns alone are learned.

    Every answer follows the very tokens that serving puts before it. Turns share one sequence as long as that holds;
    if a template rewrites earlier turns (Qwen3 drops their thinking), each turn becomes a sequence.

    Args:
        chat: the target's format.
        conversation: with one or more answers.
        max_length: tokens; longer sequences are cut at the end.

    Returns:
        No sequence if no answer has two tokens or more within `max_length`.

    Raises:
        Unusable: there is no answer, or the chat template refuses the conversation.
    """
    messages = conversation.messages
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        raise Unusable("no assistant turn")
    turns = []
    try:
        for number, end in enumerate(ends, 1):
            id_ = conversation.id if len(ends) == 1 else f"{conversation.id}#{number}"
            prompt = chat.prompt_ids(messages[: end - 1])
            if len(prompt) >= max_length:
                break
            turns.append(Turn(id_, prompt, chat.answer_ids(messages[:end])))
    except ChatTemplateError:
        raise Unusable("refused by the chat template") from None
    return join_turns(turns, max_length)
