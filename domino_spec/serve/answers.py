"""The objects that clients get: answers whole and in chunks, usage, log-probabilities, in OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from domino_spec.decoding.request import Generation
from domino_spec.serve.fields import ApiError
from domino_spec.serve.protocol import Ask
from domino_spec.serve.runner import CRASHED, STOPPED, Job, Progress
from domino_spec.serve.tokens import LEAST_LOGPROB, TokenTexts


def failure(progress: Progress) -> ApiError | None:
    """What to tell a client whose request ended without an answer."""
    match progress.finish_reason:
        case "error":
            message = "the model's output for this request is not finite; other requests are not affected"
            return ApiError(500, message, code="output_not_finite", retry=False)
        case "crashed":
            return ApiError(500, "the engine has failed; the server must be restarted", code=CRASHED)
        case "stopped":
            return ApiError(503, "the server is stopping", code=STOPPED, retry_after=5)
    return None


def _shown_tokens(generation: Generation, progress: Progress) -> int:
    """How many tokens have put something into the text shown; all of them where the length ended it.

    So a stop token and what a stop string took away have no log-probabilities in the answer.
    """
    if progress.finish_reason == "length":
        return progress.tokens
    return bisect_left(range(progress.tokens), progress.shown, key=lambda i: _starts_at(generation, i))


def _starts_at(generation: Generation, token: int) -> int:
    return generation.text_ends[token - 1] if token else 0


class _Choice:
    """One choice, and how much of it has been sent."""

    def __init__(self, job: Job, prefix: str) -> None:
        self.job, self.prefix = job, prefix
        self.opened = self.closed = False
        self.characters = self.tokens = 0

    def advance(self, progress: Progress) -> tuple[str, range]:
        """The text and the tokens that have become showable."""
        generation, start, first = self.job.generation, self.characters, self.tokens
        self.characters = max(start, progress.shown)
        self.tokens = max(first, _shown_tokens(generation, progress))
        return generation.text[start : self.characters], range(first, self.tokens)


class Answers:
    """Builds the answer to a request from its jobs.

    Args:
        ask: the request.
        jobs: its choices.
        model: the name it is served under.
        fingerprint: of the weights.
        tokens: single tokens as text.
        prefixes: of every choice, the text that stands before what was generated (echo).
    """

    def __init__(
        self,
        ask: Ask,
        jobs: Sequence[Job],
        *,
        model: str,
        fingerprint: str,
        tokens: TokenTexts,
        prefixes: Sequence[str],
    ) -> None:
        self._ask, self.jobs, self._tokens = ask, jobs, tokens
        self._choices = [_Choice(job, prefix) for job, prefix in zip(jobs, prefixes, strict=True)]
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if ask.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    @property
    def started(self) -> bool:
        """Whether a choice has got anywhere."""
        return any(job.progress.tokens or job.progress.finish_reason for job in self.jobs)

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return all(job.progress.finish_reason is not None for job in self.jobs)

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts (each once) and answers, and how drafting did."""
        generations, prompts = [job.generation for job in self.jobs], self.jobs[:: self._ask.n]
        prompt_tokens = sum(len(job.request.prompt_ids) for job in prompts)
        completion_tokens = sum(job.progress.tokens for job in self.jobs)
        passes = sum(g.num_verify_passes for g in generations)
        committed = sum(sum(g.acceptance_lengths) for g in generations)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(job.generation.cached_tokens for job in prompts)},
            "acceptance_length": committed / passes if passes else 0.0,
            "num_drafts": sum(sum(g.num_drafts) for g in generations),
            "num_accepted_drafts": committed - passes,
            "num_verify_passes": passes,
        }

    def check(self) -> None:
        """Stop if a choice has failed.

        Raises:
            ApiError: which says why.
        """
        for job in self.jobs:
            error = failure(job.progress)
            if error is not None:
                raise error

    def whole(self) -> dict[str, Any]:
        """The answer as one object, once it is finished."""
        choices = []
        for index, choice in enumerate(self._choices):
            progress = choice.job.progress
            text, tokens = choice.advance(progress)
            content: dict[str, Any] = {"text": choice.prefix + text}
            if self._ask.chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, content, tokens, progress.finish_reason))
        return {**self._head, "choices": choices, "usage": self.usage()}

    def chunks(self) -> list[dict[str, Any]]:
        """What became known since the last call, as objects of a stream; the last ones hold the usage."""
        chunks = []
        for index, choice in enumerate(self._choices):
            chunks += [self._chunk([piece]) for piece in self._pieces(index, choice)]
        if self._ask.include_usage and all(choice.closed for choice in self._choices):
            chunks.append({**self._chunk([]), "usage": self.usage()})
        return chunks

    def _pieces(self, index: int, choice: _Choice) -> list[dict[str, Any]]:
        """Chunks of one choice: its opening, its text, its end."""
        progress, pieces = choice.job.progress, []
        if choice.closed or not (progress.tokens or progress.finish_reason):
            return []
        if not choice.opened:
            choice.opened = True
            if self._ask.chat:
                pieces.append(self._choice(index, {"delta": {"role": "assistant", "content": ""}}, range(0), None))
            elif choice.prefix:
                pieces.append(self._choice(index, {"text": choice.prefix}, range(0), None))
        text, tokens = choice.advance(progress)
        if text or tokens:
            content: dict[str, Any] = {"delta": {"content": text}} if self._ask.chat else {"text": text}
            pieces.append(self._choice(index, content, tokens, None))
        if progress.finish_reason is not None:
            choice.closed = True
            end: dict[str, Any] = {"delta": {}} if self._ask.chat else {"text": ""}
            pieces.append(self._choice(index, end, range(0), progress.finish_reason))
        return pieces

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self._ask.chat else {}
        used: dict[str, Any] = {"usage": None} if self._ask.include_usage else {}
        return {**self._head, **kind, "choices": choices, **used}

    def _choice(self, index: int, content: dict[str, Any], tokens: range, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._ask.top_logprobs is not None and (tokens or not self._ask.stream):
            logprobs = self._chat_logprobs(index, tokens) if self._ask.chat else self._text_logprobs(index, tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chat_logprobs(self, index: int, tokens: range) -> dict[str, Any]:
        generation = self.jobs[index].generation
        content = []
        for i in tokens:
            found = generation.logprobs[i]
            best = [self._tokens.record(token, value) for token, value in found.top]
            content.append({**self._tokens.record(generation.token_ids[i], found.logprob), "top_logprobs": best})
        return {"content": content, "refusal": None}

    def _text_logprobs(self, index: int, tokens: range) -> dict[str, Any]:
        generation = self.jobs[index].generation
        found = [generation.logprobs[i] for i in tokens]
        return {
            "tokens": [self._tokens.text(generation.token_ids[i]) for i in tokens],
            "token_logprobs": [max(f.logprob, LEAST_LOGPROB) for f in found],
            "top_logprobs": [{self._tokens.text(t): max(v, LEAST_LOGPROB) for t, v in f.top} for f in found]
            if self._ask.top_logprobs
            else None,
            "text_offset": [_starts_at(generation, i) for i in tokens],
        }
