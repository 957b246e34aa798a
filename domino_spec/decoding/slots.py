"""What the engine knows of a request that it has taken up, and what it has done so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from domino_spec.decoding.generation import Ending, Generation, Request, TokenLogprob
from domino_spec.decoding.prefixes import Prefix
from domino_spec.decoding.state import Verdict
from domino_spec.target.model import Target


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
    """Read, not taken over from an earlier text."""
    read_seconds: float = 0.0
    """Wall-clock seconds of reading prompts."""

    def count(self, requests: int, drafts: int, accepted: int) -> None:
        """One cycle of so many requests."""
        self.cycles += 1
        self.drafted_cycles += drafts > 0
        self.verify_passes += requests
        self.drafts += drafts
        self.committed_tokens += accepted + requests


@dataclass(eq=False)
class Slot:
    """A request that has been taken up."""

    request: Request
    generation: Generation
    ending: Ending
    taken_up: float
    first_cycle: float = 0.0
    prefix: tuple[Prefix, int] | None = None
    """A text that begins alike, and how many of its rows can be used."""
    unread: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """What the drafter has not taken in, from cycles without drafts: tokens [1, 1] and features [1, 1, F]."""

    @property
    def length(self) -> int:
        """Tokens of its prompt and of its text so far."""
        return len(self.generation.prompt_ids) + self.generation.num_tokens

    def grow(
        self, tokens: list[int], num_drafts: int, sound: bool, now: float, verdict: Verdict | None, row: int
    ) -> None:
        """Add what a cycle committed, unless the request has ended or the values mean nothing.

        Args:
            tokens: accepted drafts and the bonus token.
            num_drafts: proposed in this cycle.
            sound: see `Verdict`.
            now: when the cycle was done, by `time.perf_counter`.
            verdict: for log-probabilities; None where nobody asked for them.
            row: the request's in the verdict.
        """
        generation = self.generation
        if generation.finish_reason is None and not sound:
            generation.finish_reason = "error"
        if generation.finish_reason is not None:
            return
        top = self.request.top_logprobs
        logprobs = [] if top is None or verdict is None else _logprobs(verdict, row, tokens, top)
        self.ending.append(generation, tokens, num_drafts, logprobs)
        generation.seconds_decode = now - self.first_cycle


def take_unread(slots: Sequence[Slot], most: int, width: int, target: Target) -> tuple[Tensor, Tensor | None, Tensor]:
    """What drafters have not taken in of several requests, `most` tokens of each at a time; it then counts as taken in.

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
        TokenLogprob(own, tuple(zip(ids, values, strict=True)))
        for own, ids, values in zip(chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    ]
