"""From the jobs of a request to its answer, as one object or in chunks: text, log-probabilities, usage."""

from __future__ import annotations

import re
import time
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from domino_spec.decoding.request import Generation
from domino_spec.serve.protocol import Answer, AnyRequest, ApiError, Choice, Usage
from domino_spec.serve.runner import CRASHED, STOPPED, Job

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""
FAILURES: dict[str, dict[str, Any]] = {
    "error": {
        "status": 500,
        "message": "the model's output for this request is not finite; other requests are not affected",
        "code": "output_not_finite",
        "retry": False,
    },
    CRASHED: {"status": 500, "message": "the engine has failed; the server must be restarted", "code": CRASHED},
    STOPPED: {"status": 503, "message": "the server is stopping", "code": STOPPED, "retry_after": 5},
}
"""Reasons for which a job ends without an answer, and the `ApiError` that says so."""


class TokenTexts:
    """Single tokens as text and as bytes, for log-probabilities; each is computed once.

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
        return self._described(token)[0]

    def bytes(self, token: int) -> list[int] | None:
        """Its UTF-8 bytes; None if they are not known."""
        return self._described(token)[1]

    def record(self, token: int, logprob: float) -> dict[str, Any]:
        """As chat answers describe it."""
        return {"token": self.text(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": self.bytes(token)}

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _described(self, token: int) -> tuple[str, list[int] | None]:
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
    number = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    if number:
        return bytes([int(number[1], 16)])
    return bytes(_LETTERS[c] for c in piece) if all(c in _LETTERS for c in piece) else None


_PRINTING = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTING]
_LETTERS = {chr(b): b for b in _PRINTING} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}
"""GPT-2's letters for bytes: a printing byte stands for itself, the others for letters from 256 on, in order."""


@dataclass
class _Sent:
    """One choice, and how much of it the client has been sent."""

    index: int
    job: Job
    prefix: str
    """What stands before the generated text (echo)."""
    opened: bool = False
    closed: bool = False
    characters: int = 0
    tokens: int = 0

    def advance(self) -> tuple[str, range]:
        """The text and the tokens that can be sent since the last call.

        A token is sent with its text. So a stop token, and what a stop string took away, have no log-probabilities.
        """
        generation, progress = self.job.generation, self.job.progress
        start, first, shown = self.characters, self.tokens, progress.tokens
        if progress.finish_reason != "length":
            shown = bisect_left(range(shown), progress.shown, key=lambda i: _starts_at(generation, i))
        self.characters, self.tokens = max(start, progress.shown), max(first, shown)
        return generation.text[start : self.characters], range(first, self.tokens)


def _starts_at(generation: Generation, token: int) -> int:
    return generation.text_ends[token - 1] if token else 0


class Answers:
    """Builds the answer to a request from its jobs.

    Args:
        request: what was asked for.
        jobs: its choices.
        prefixes: of every choice, the text before what is generated (echo).
        fingerprint: of the weights.
        tokens: of the target.
    """

    def __init__(
        self, request: AnyRequest, jobs: Sequence[Job], prefixes: Sequence[str], fingerprint: str, tokens: TokenTexts
    ) -> None:
        self._request, self.jobs, self._tokens = request, jobs, tokens
        self._choices = [_Sent(i, job, text) for i, (job, text) in enumerate(zip(jobs, prefixes, strict=True))]
        kind = "text_completion"
        if request.chat:
            kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }
        if request.include_usage:
            self._head["usage"] = None  # every chunk has the key, and the last one its value

    @property
    def started(self) -> bool:
        """Whether a choice has a token or has ended."""
        return any(job.progress.tokens or job.progress.finish_reason for job in self.jobs)

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return all(job.progress.finish_reason is not None for job in self.jobs)

    def usage(self) -> Usage:
        """The counts so far."""
        generations, prompts = [job.generation for job in self.jobs], self.jobs[:: self._request.n]
        prompt_tokens = sum(len(job.request.prompt_ids) for job in prompts)
        completion_tokens = sum(job.progress.tokens for job in self.jobs)
        passes = sum(g.num_verify_passes for g in generations)
        committed = sum(sum(g.acceptance_lengths) for g in generations)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details={"cached_tokens": sum(job.generation.cached_tokens for job in prompts)},
            acceptance_length=committed / passes if passes else 0.0,
            num_drafts=sum(sum(g.num_drafts) for g in generations),
            num_accepted_drafts=committed - passes,
            num_verify_passes=passes,
        )

    def check(self) -> None:
        """Stop if a choice has failed.

        Raises:
            ApiError: which says why.
        """
        for job in self.jobs:
            if job.progress.finish_reason in FAILURES:
                raise ApiError(**FAILURES[job.progress.finish_reason])

    def whole(self) -> Answer:
        """The answer as one object, once it is finished."""
        choices = []
        for sent in self._choices:
            text, tokens = sent.advance()
            content: dict[str, Any] = {"text": sent.prefix + text}
            if self._request.chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(sent, content, tokens, sent.job.progress.finish_reason))
        return Answer(**{**self._head, "choices": choices, "usage": self.usage()})

    def chunks(self) -> list[Answer]:
        """What became known since the last call, as objects of a stream; the last one holds the usage."""
        pieces = [piece for sent in self._choices for piece in self._pieces(sent)]
        chunks = [Answer(**self._head, choices=[piece]) for piece in pieces]
        if self._request.include_usage and all(sent.closed for sent in self._choices):
            chunks.append(Answer(**{**self._head, "choices": [], "usage": self.usage()}))
        return chunks

    def _pieces(self, sent: _Sent) -> list[Choice]:
        """The opening of one choice, its text, and its end, as far as they are known and not sent."""
        progress, chat = sent.job.progress, self._request.chat
        pieces: list[Choice] = []
        if sent.closed or not (progress.tokens or progress.finish_reason):
            return pieces
        if not sent.opened and (chat or sent.prefix):
            opening = {"delta": {"role": "assistant", "content": ""}} if chat else {"text": sent.prefix}
            pieces.append(self._choice(sent, opening))
        sent.opened = True
        text, tokens = sent.advance()
        if text or tokens:
            pieces.append(self._choice(sent, {"delta": {"content": text}} if chat else {"text": text}, tokens))
        if progress.finish_reason is not None:
            sent.closed = True
            end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            pieces.append(self._choice(sent, end, finish_reason=progress.finish_reason))
        return pieces

    def _choice(
        self, sent: _Sent, content: dict[str, Any], tokens: range = range(0), finish_reason: str | None = None
    ) -> Choice:
        logprobs = None
        if self._request.top is not None and (tokens or not self._request.stream):
            logprobs = (self._chat_logprobs if self._request.chat else self._text_logprobs)(sent.job.generation, tokens)
        return Choice(index=sent.index, **content, logprobs=logprobs, finish_reason=finish_reason)

    def _chat_logprobs(self, generation: Generation, tokens: range) -> dict[str, Any]:
        content = []
        for i in tokens:
            found = generation.logprobs[i]
            best = [self._tokens.record(token, value) for token, value in found.top]
            content.append({**self._tokens.record(generation.token_ids[i], found.logprob), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _text_logprobs(self, generation: Generation, tokens: range) -> dict[str, Any]:
        found = [generation.logprobs[i] for i in tokens]
        best = [{self._tokens.text(t): max(v, LEAST_LOGPROB) for t, v in f.top} for f in found]
        return {
            "tokens": [self._tokens.text(generation.token_ids[i]) for i in tokens],
            "token_logprobs": [max(f.logprob, LEAST_LOGPROB) for f in found],
            "top_logprobs": best if self._request.top else None,
            "text_offset": [_starts_at(generation, i) for i in tokens],
        }
