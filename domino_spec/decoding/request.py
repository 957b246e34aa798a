"""One request: what is asked for, what it has produced so far, how its text grows, and when it ends.

The counts over all requests stand at the end: an engine's `Stats`, and `DraftWatch`, which warns if drafts are useless.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from domino_spec.decoding.cycle import Verdict
from domino_spec.decoding.prefixes import Prefix
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.target.text import check_characters

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When a request ends."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut off."""
    stop_token_ids: frozenset[int] | None = None
    """Tokens that end an answer; None uses the target's."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if any(not s for s in self.stop):
            raise UserError("a stop string must not be empty")
        for text in self.stop:
            check_characters(text, "a stop string")


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt_ids: Sequence[int]
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    limits: Limits = field(default_factory=Limits)
    top_logprobs: int | None = None
    """Report the log-probability of every token, and of this many of the most probable ones; None reports nothing."""


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was to the target itself, before temperature and warpers."""

    logprob: float
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens in its place with their log-probabilities, best first."""


@dataclass
class Generation:
    """What one request has produced so far; complete once `finish_reason` is set."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, cut at `max_new_tokens` and at the first stop token (which is kept) or stop string."""
    text: str = ""
    """Their text, without special tokens and without the stop string."""
    text_ends: list[int] = field(default_factory=list)
    """Per generated token: characters of the text once it was there, before a stop string was cut off."""
    finish_reason: str | None = None
    """"stop", "length", "cancelled", "error" (the target's output was not finite), or None while running."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of every token, if they were asked for."""
    acceptance_lengths: list[int] = field(default_factory=list)
    """`num_accepted + 1` of every verify pass, before stop or length cut it."""
    num_drafts: list[int] = field(default_factory=list)
    """Drafts proposed in every verify pass."""
    accepted: list[bool] = field(default_factory=list)
    """Per generated token: True if it was drafted, False if the target supplied it."""
    seconds_prefill: float = 0.0
    """Wall-clock seconds from admission to the first cycle."""
    seconds_decode: float = 0.0
    """Wall-clock seconds from the first cycle to this request's end."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be read, because an earlier request had left their rows."""

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids)

    @property
    def num_verify_passes(self) -> int:
        """Target passes since prefill."""
        return len(self.acceptance_lengths)

    @property
    def acceptance_length(self) -> float:
        """tau: mean of `num_accepted + 1` over this request's verify passes; 0 before the first."""
        return sum(self.acceptance_lengths) / len(self.acceptance_lengths) if self.acceptance_lengths else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding, prefill left out."""
        return self.num_tokens / self.seconds_decode if self.seconds_decode else 0.0


class TextStream:
    """Turns tokens into text piece by piece; keeps a character back until all of its bytes are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Characters of the window's text that were returned already."""

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that these tokens complete; `final` returns what was kept back."""
        self._ids.extend(token_ids)
        text = self._text()
        if text.endswith("\ufffd") and not final:
            return ""
        piece = text[self._shown :]
        self._shown = len(text)
        if text.endswith("\n"):
            # A line end is a safe place to start a fresh window, which keeps decoding cheap on long texts. One token
            # stays: some tokenizers drop the space before the first word of a text.
            self._ids = self._ids[-1:]
            self._shown = len(self._text())
        return piece

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))


class StopStrings:
    """Finds the first of several strings in a growing text."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings), default=0)
        self._searched = 0

    def find(self, text: str) -> int | None:
        """Index where the first stop string starts, or None. `text` must extend the text of the last call."""
        start = max(0, self._searched - self._longest)
        found = [i for i in (text.find(s, start) for s in self._strings) if i >= 0]
        self._searched = len(text)
        return min(found, default=None)

    def safe_length(self, text: str) -> int:
        """Characters that can be shown now: none of them can turn out to begin a stop string."""
        for held in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-held:]) for s in self._strings):
                return len(text) - held
        return len(text)


def showable(generation: Generation, stop: StopStrings) -> int:
    """Characters of a growing text that can be shown: no character is half there, no stop string can take one back."""
    return len(generation.text) if generation.finish_reason is not None else stop.safe_length(generation.text)


def check_prompt(target: Target, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Refuse a prompt that cannot be decoded.

    Raises:
        UserError: it is empty, holds token ids that the target does not know, or leaves no room in its context.
    """
    if not prompt:
        raise UserError("the prompt is empty")
    if min(prompt) < 0 or max(prompt) >= target.vocab_size:
        raise UserError(f"a prompt holds token ids outside the vocabulary of {target.vocab_size} of {target.name}")
    if len(prompt) + max_new_tokens > target.max_length:
        reason = "" if target.rope_limit is None else ": its RoPE changes all angles in longer texts"
        raise UserError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed the context of "
            f"{target.max_length} tokens of {target.name}{reason}"
        )


class Ending:
    """Grows one generation by what a cycle committed; stop tokens, stop strings and the length limit end it.

    Args:
        target: for its tokenizer; without one there is no text and no stop string.
        limits: when to end.
    """

    def __init__(self, target: Target, limits: Limits) -> None:
        if limits.stop and target.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this target has none")
        self._max_new_tokens = limits.max_new_tokens
        self.stop_token_ids = target.stop_token_ids if limits.stop_token_ids is None else limits.stop_token_ids
        self._stream = TextStream(target.tokenizer) if target.tokenizer is not None else None
        self._stop = StopStrings(limits.stop) if limits.stop else None

    def append(
        self, generation: Generation, tokens: list[int], num_drafts: int, logprobs: Sequence[TokenLogprob] = ()
    ) -> None:
        """Add the accepted drafts and the bonus token of one cycle, and their log-probabilities if there are any."""
        generation.acceptance_lengths.append(len(tokens))
        generation.num_drafts.append(num_drafts)
        for i, token in enumerate(tokens):
            generation.token_ids.append(token)
            generation.accepted.append(i < len(tokens) - 1)
            generation.logprobs.extend(logprobs[i : i + 1])
            stopped = token in self.stop_token_ids
            full = len(generation.token_ids) >= self._max_new_tokens
            if self._stream is not None:
                generation.text += self._stream.push([] if stopped else [token], final=stopped or full)
                generation.text_ends.append(len(generation.text))
                if self._stop is not None and (cut := self._stop.find(generation.text)) is not None:
                    generation.text, stopped = generation.text[:cut], True
            if stopped or full:
                generation.finish_reason = "stop" if stopped else "length"
                return


@dataclass(eq=False)
class Slot:
    """A request that an engine has accepted, from its queue to its end.

    Its row in the engine's tensors is not stored here: it is the place of the object in the engine's list.
    """

    request: Request
    generation: Generation
    ending: Ending
    admitted: float
    """When it was admitted, by `time.perf_counter`; `first_cycle` is on the same clock."""
    first_cycle: float = 0.0
    prefix: tuple[Prefix, int] | None = None
    """A text that begins with the same tokens, and how many of its rows can be used."""
    unread: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """What the drafter has not read yet, from cycles without drafts: tokens [1, 1] and features [1, 1, F]."""

    @property
    def length(self) -> int:
        """Tokens of its prompt and of its text so far."""
        return len(self.generation.prompt_ids) + len(self.generation.token_ids)

    def grow(self, cycle: CycleResult, row: int, now: float) -> None:
        """Add what a cycle committed for this request, whose `row` it was, unless the request has ended.

        `now` is when the cycle was done, by `time.perf_counter`. Values that are not finite end the request.
        """
        generation = self.generation
        if generation.finish_reason is None and not cycle.finite[row]:
            generation.finish_reason = "error"
        if generation.finish_reason is not None:
            return
        tokens, top = cycle.tokens[row][: cycle.num_accepted[row] + 1], self.request.top_logprobs
        logprobs = [] if top is None or cycle.verdict is None else _logprobs(cycle.verdict, row, tokens, top)
        self.ending.append(generation, tokens, cycle.num_drafts[row], logprobs)
        generation.seconds_decode = now - self.first_cycle


@dataclass(frozen=True)
class CycleResult:
    """What a cycle decided, on the host; each list has an entry for each of R requests."""

    slots: Sequence[Slot]
    """Its requests, in the order of its rows."""
    tokens: list[list[int]]
    """See `Verdict`."""
    num_accepted: list[int]
    """Accepted drafts, without the bonus; -1 for a request that had ended before."""
    num_drafts: list[int]
    finite: list[bool]
    verdict: Verdict | None = None
    """For log-probabilities; None if no request wants them."""


def take_unread(slots: Sequence[Slot], most: int, width: int, target: Target) -> tuple[Tensor, Tensor | None, Tensor]:
    """Take what the drafter has not read of several requests, at most `most` tokens of each, out of their slots.

    Returns:
        Arguments of `Drafter.read`: tokens [R, n], features [R, n, width] (None for a width of 0), and counts [R].
    """
    taken = [slot.unread[:most] for slot in slots]
    counts = [len(part) for part in taken]
    shape, device = (len(slots), max(counts)), target.device
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    features = torch.zeros(*shape, width, dtype=target.dtype, device=device) if width else None
    for place, (slot, part) in enumerate(zip(slots, taken, strict=True)):
        if part:
            tokens[place, : len(part)] = torch.cat([t for t, _ in part], dim=1)[0]
            if features is not None:
                known = [f for _, f in part if f is not None]
                features[place, : len(known)] = torch.cat(known, dim=1)[0]
            del slot.unread[:most]
    return tokens, features, torch.tensor(counts, device=device)


def _logprobs(verdict: Verdict, request: int, tokens: list[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of a request's committed tokens."""
    assert verdict.logits is not None
    rows = torch.arange(len(tokens)) if verdict.path is None else verdict.path[request, : len(tokens)]
    logprobs = verdict.logits[request, rows].float().log_softmax(-1)  # [n, V]
    chosen: Tensor = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0]
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    return [
        TokenLogprob(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@dataclass
class Stats:
    """What an engine has done since it was made."""

    cycles: int = 0
    drafted_cycles: int = 0
    """Cycles in which some request had drafts."""
    verify_passes: int = 0
    """Passes of single requests: R of them in a cycle of R requests."""
    drafts: int = 0
    committed_tokens: int = 0
    """Accepted drafts and bonus tokens, before stop or length cut them."""
    prompt_tokens: int = 0
    """Read by passes, not copied from an earlier text."""
    read_seconds: float = 0.0
    """Wall-clock seconds of reading prompts."""


FIRST_CHECK = 64
"""Passes with drafts before the first judgement."""
USELESS = 0.2
"""If a smaller share of passes accepts a draft, the drafts are called useless. A draft that was trained for its target
has one accepted in more than half of its passes."""
DEVIATIONS = 3.0
"""Standard deviations of the bound."""

CAUSES = (
    "the draft was made for another target or a fine-tuned one (domino-spec inspect DRAFT --target TARGET compares "
    "them), the chat template or thinking mode differs from its training data, its label convention or tapped layers "
    "are read otherwise than it was trained, its values overflow in this precision, or the temperature is high"
)


@dataclass
class DraftWatch:
    """Counts passes with drafts and those that accepted one; warns once if hardly any does.

    A draft that does not fit (made for another target, another chat template, read by another convention, overflowing)
    changes no word of the output; the only sign is that almost no pass accepts a draft. It warns if Wilson's upper
    bound for the share of passes that accept one is low. Passes of one text resemble each other, and the bound is
    computed repeatedly, so it is wide (three standard deviations) and computed only when the passes have doubled.
    """

    name: str
    """Name of the method, for the warning."""
    passes: int = 0
    """Verify passes of single requests that had drafts."""
    hits: int = 0
    """Those of them that accepted at least one."""
    accepted: int = 0
    """Drafts accepted by them."""
    warned: bool = False
    judged_at: int = FIRST_CHECK
    """Passes after which it is judged next."""

    def count(self, proposed: Iterable[int], accepted: Iterable[int]) -> None:
        """Count the passes of one cycle.

        Args:
            proposed: drafts of each request.
            accepted: how many of them were accepted; below 0 for requests that were not decoded.
        """
        for drafts, kept in zip(proposed, accepted, strict=True):
            if drafts > 0 and kept >= 0:
                self.passes += 1
                self.hits += kept > 0
                self.accepted += kept
        if self.passes >= self.judged_at and not self.warned:
            self.judged_at = 2 * self.passes
            if upper_bound(self.hits, self.passes) < USELESS:
                self.warned = True
                _log.warning("%s", self.sentence)

    @property
    def sentence(self) -> str:
        """The warning."""
        return (
            f"drafts are hardly ever accepted: of {self.passes} verify passes with drafts of method {self.name}, "
            f"{self.hits} accepted one (acceptance length {1 + self.accepted / self.passes:.2f}), so drafting only "
            f"costs time, though no word is wrong. Likely causes: {CAUSES}"
        )


def upper_bound(hits: int, trials: int, deviations: float = DEVIATIONS) -> float:
    """Upper end of Wilson's interval for the chance of a hit."""
    share, weight = hits / trials, deviations**2 / trials
    spread = deviations * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return (share + weight / 2 + spread) / (1 + weight)
