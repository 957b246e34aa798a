"""The decoding loop: prefill once, then propose, verify, commit until every request has ended.

`decode` is the loop itself and yields after every cycle; `generate` runs it to the end for texts or chats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from domino_spec.config import UserError
from domino_spec.decoding.drafter import Drafter
from domino_spec.decoding.sampling import RandomStreams, SamplingSettings
from domino_spec.decoding.state import State
from domino_spec.decoding.verify import commit, verify
from domino_spec.target.model import Target
from domino_spec.target.text import StopStrings, TextStream


@dataclass
class Generation:
    """What one request has produced so far; complete once `finish_reason` is set."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, cut at `max_new_tokens` and at the first stop token (which is kept) or stop string."""
    text: str = ""
    """Their text, without special tokens and without the stop string."""
    finish_reason: str | None = None
    """"stop", "length" or None while running."""
    acceptance_lengths: list[int] = field(default_factory=list)
    """`num_accepted + 1` of every verify pass, before stop or length cut it."""
    num_drafts: list[int] = field(default_factory=list)
    """Drafts proposed in every verify pass."""
    accepted: list[bool] = field(default_factory=list)
    """Per generated token: True where it was drafted, False where the target supplied it."""
    seconds_prefill: float = 0.0
    """Wall-clock seconds before the first cycle, of the whole batch."""
    seconds_decode: float = 0.0
    """Wall-clock seconds from the first cycle to this request's end."""

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


@dataclass(frozen=True)
class Limits:
    """When a request ends."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut off."""
    stop_token_ids: frozenset[int] | None = None
    """Tokens that end an answer; None uses the target's own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if any(not s for s in self.stop):
            raise UserError("a stop string must not be empty")


def prefill(target: Target, prompts: Sequence[Sequence[int]], drafter: Drafter, max_new_tokens: int) -> State:
    """Committed prompts, their cache (all but the last token, which the first pass verifies) and features.

    Raises:
        UserError: an empty prompt, one with token ids that the target does not know, or one that leaves no room in its
            context.
    """
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= target.vocab_size:
            raise UserError(f"a prompt holds token ids outside the vocabulary of {target.vocab_size} of {target.name}")
        if len(prompt) + max_new_tokens > target.max_length:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed the context of "
                f"{target.max_length} tokens of {target.name}"
            )
    device = target.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    # A cycle may overshoot the limit by a whole block before it is cut.
    capacity = int(lengths.max()) + max_new_tokens + 2 * (drafter.max_drafts + 1)
    tokens = torch.zeros(len(prompts), capacity, dtype=torch.long, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    cache = target.new_cache(len(prompts), capacity)
    longest = int(lengths.max()) - 1
    features = target.prefill(tokens[:, :longest], lengths - 1, cache, drafter.feature_layers)
    if features is None and drafter.feature_layers:
        width = len(drafter.feature_layers) * target.hidden_size
        features = torch.zeros(len(prompts), 0, width, dtype=target.dtype, device=device)
    return State(tokens, lengths, lengths.clone(), torch.ones_like(lengths, dtype=torch.bool), cache, features)


@torch.inference_mode()  # as a decorator it leaves the caller's code between two cycles alone
def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    limits: Limits,
    num_drafts: int | None = None,
    matching_rule: bool = False,
    generations: list[Generation] | None = None,
) -> Iterator[list[Generation]]:
    """Decode R requests together; yields the same list of generations, grown, after every cycle.

    Args:
        target: the frozen model.
        drafter: any drafting method.
        prompts: token ids of every request.
        settings: the distribution that the output follows; request r draws from the stream `seed + r`.
        limits: when a request ends.
        num_drafts: drafts per cycle; None for the drafter's most.
        matching_rule: see `verify`.
        generations: filled in place, for callers that must keep partial text when the loop is interrupted.
    """
    generations = [] if generations is None else generations
    generations += [Generation(list(p)) for p in prompts]
    num_drafts = drafter.max_drafts if num_drafts is None else min(num_drafts, drafter.max_drafts)
    stop_ids = target.stop_token_ids if limits.stop_token_ids is None else limits.stop_token_ids
    endings = [Ending(target, limits, stop_ids) for _ in prompts]
    streams = RandomStreams(torch.arange(len(prompts), device=target.device) + settings.seed)

    started = time.perf_counter()
    state = prefill(target, prompts, drafter, limits.max_new_tokens)
    own = drafter.start(state)
    first_cycle = time.perf_counter()
    for generation in generations:
        generation.seconds_prefill = first_cycle - started
    while state.active.any():
        proposal = drafter.propose(state, own, num_drafts)
        verdict = verify(target, state, proposal, settings, streams, drafter.feature_layers, matching_rule)
        before = state.active.tolist()
        commit(state, verdict)
        own = drafter.advance(own, verdict)

        tokens, accepted, proposed = (
            verdict.tokens.tolist(),
            verdict.num_accepted.tolist(),
            proposal.num_drafts.tolist(),
        )
        for r in (r for r, active in enumerate(before) if active):
            endings[r].append(generations[r], tokens[r][: accepted[r] + 1], proposed[r])
            generations[r].seconds_decode = time.perf_counter() - first_cycle
            if generations[r].finish_reason is not None:
                state.active[r] = False
        yield generations


class Ending:
    """Grows one generation by what a cycle committed, and ends it where stop tokens, stop strings or length say.

    Args:
        target: for its tokenizer; without one there is no text and no stop string.
        limits: when to end.
        stop_token_ids: tokens that end the answer.
    """

    def __init__(self, target: Target, limits: Limits, stop_token_ids: frozenset[int]) -> None:
        if limits.stop and target.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this target has none")
        self._limits, self._stop_token_ids = limits, stop_token_ids
        self._stream = TextStream(target.tokenizer) if target.tokenizer is not None else None
        self._stop = StopStrings(limits.stop)

    def append(self, generation: Generation, tokens: list[int], num_drafts: int) -> None:
        """Add the accepted drafts and the bonus token of one cycle."""
        generation.acceptance_lengths.append(len(tokens))
        generation.num_drafts.append(num_drafts)
        for i, token in enumerate(tokens):
            generation.token_ids.append(token)
            generation.accepted.append(i < len(tokens) - 1)
            stopped = token in self._stop_token_ids
            full = len(generation.token_ids) >= self._limits.max_new_tokens
            if self._stream is not None:
                generation.text += self._stream.push([] if stopped else [token], final=stopped or full)
                cut = self._stop.find(generation.text)
                if cut is not None:
                    generation.text = generation.text[:cut]
                    stopped = True
            if stopped or full:
                generation.finish_reason = "stop" if stopped else "length"
                return
