"""Single tokens as text and bytes, for log-probabilities."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON cannot hold."""


class TokenTexts:
    """What tokens look like; each is worked out once.

    Args:
        tokenizer: of the target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}
        # Some tokenizers drop the space before the first word of a text: no token is decoded as the first.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._before_text = self._decode(self._before)

    def text(self, token: int) -> str:
        """Its text; of a token that holds parts of characters, its bytes in OpenAI's notation."""
        return self._look_up(token)[0]

    def bytes(self, token: int) -> list[int] | None:
        """Its UTF-8 bytes; None where they are not known."""
        return self._look_up(token)[1]

    def record(self, token: int, logprob: float) -> dict[str, Any]:
        """As chat answers describe it."""
        return {"token": self.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": self.bytes(token)}

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _look_up(self, token: int) -> tuple[str, list[int] | None]:
        if token not in self._known:
            self._known[token] = self._describe(token)
        return self._known[token]

    def _describe(self, token: int) -> tuple[str, list[int] | None]:
        together = self._decode([*self._before, token])
        text = together[len(self._before_text) :] if together.startswith(self._before_text) else self._decode([token])
        if "\ufffd" not in text:
            return text, list(text.encode("utf-8"))
        raw = _raw_bytes(str(self._tokenizer.convert_ids_to_tokens(token)))
        if raw is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def _raw_bytes(piece: str) -> bytes | None:
    """The bytes of a piece of a vocabulary made of bytes: <0xE6>, or GPT-2's letters for bytes."""
    found = _BYTE_TOKEN.fullmatch(piece)
    if found:
        return bytes([int(found[1], 16)])
    if all(c in _LETTERS for c in piece):
        return bytes(_LETTERS[c] for c in piece)
    return None


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: what prints stands for itself, the others for letters from 256 on, in order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + i): b for i, b in enumerate(hidden)}


_LETTERS = _byte_letters()
