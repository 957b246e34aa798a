"""The race: one prompt decoded by the target alone and with a draft, cycle by cycle, each on its own clock.

The two never run at the same time, since they would share the machine's cores. Whoever has used less time so far
runs the next cycle, so an onlooker sees the true race in slow motion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from domino_spec.api import stream
from domino_spec.bench.ties import TopTwo, first_difference, top_two
from domino_spec.decoding.request import Generation
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import default_method, why_nothing_is_drafted
from domino_spec.settings import UserError
from domino_spec.target.model import Target

PROMPTS = (
    "Explain in a few sentences why the sky is blue at noon and red in the evening.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Explain each step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
)
"""What the demo asks if no prompt is given."""

WARM_UP_TOKENS = 16


class Racer:
    """One method at work on one prompt, with a clock that runs only while it decodes."""

    def __init__(self, method: str, cycles: Iterator[list[Generation]], generations: list[Generation]) -> None:
        self.method = method
        self.total_seconds = 0.0
        """Prefill and decoding."""
        self._cycles, self._generations = cycles, generations
        self.finished = False

    @property
    def generation(self) -> Generation | None:
        """What it has written; None before the first cycle."""
        return self._generations[0] if self._generations else None

    @property
    def seconds(self) -> float:
        """Seconds of decoding, without prefill."""
        return self.total_seconds - (self.generation.seconds_prefill if self.generation else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of decoding."""
        return self.generation.num_tokens / self.seconds if self.generation and self.seconds > 0 else 0.0

    def cycle(self) -> None:
        """Run one cycle (the first includes prefill)."""
        started = time.perf_counter()
        next(self._cycles)
        self.total_seconds += time.perf_counter() - started
        assert self.generation is not None
        self.finished = self.generation.finish_reason is not None


@dataclass(frozen=True)
class RaceResult:
    """How a race ended."""

    prompt: str
    plain: Racer
    """The target alone."""
    drafted: Racer
    """The target with a draft."""
    first_difference: int | None
    """Index of the first generated token in which the texts differ; None if they are equal."""
    top_two: TopTwo | None
    """The target's two best tokens there."""

    @property
    def speed_up(self) -> float:
        """Ratio of decode times for the same number of tokens, prefill left out."""
        return self.drafted.tokens_per_second / self.plain.tokens_per_second


def race(
    target: Target,
    draft: AnyDraft | None,
    prompt: str,
    *,
    method: str | None = None,
    max_new_tokens: int = 128,
    num_drafts: int | None = None,
    on_cycle: Callable[[Racer, Racer], None] = lambda plain, drafted: None,
) -> RaceResult:
    """Decode `prompt` greedily by the target alone and with a draft.

    Args:
        target: from `load_target`.
        draft: from `load_draft`; None for methods that need none.
        prompt: a user's text.
        method: of drafting; the draft's default if not given.
        max_new_tokens: when to stop at the latest.
        num_drafts: drafts per cycle; None for the most.
        on_cycle: called after every cycle, off both clocks.

    Raises:
        UserError: as `generate`, or a method that drafts nothing.
    """
    method = default_method(draft) if method is None else method
    reason = why_nothing_is_drafted(method, asked=False, num_drafts=num_drafts)
    if reason is not None:
        raise UserError(f"a race needs drafts, and {reason}: give --draft or --method ngram, and --num-drafts above 0")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_drafts": num_drafts}
    plain, drafted = (_racer(target, draft, prompt, name, options) for name in ("none", method))
    while not (plain.finished and drafted.finished):
        running = [racer for racer in (drafted, plain) if not racer.finished]
        min(running, key=lambda racer: racer.total_seconds).cycle()
        on_cycle(plain, drafted)

    assert plain.generation is not None and drafted.generation is not None
    texts = plain.generation.token_ids, drafted.generation.token_ids
    difference, evidence = first_difference(*texts), None
    if difference is not None:
        evidence = top_two(target, plain.generation.prompt_ids, texts[0][:difference])
    return RaceResult(prompt, plain, drafted, difference, evidence)


def _racer(target: Target, draft: AnyDraft | None, prompt: str, method: str, options: dict[str, Any]) -> Racer:
    generations: list[Generation] = []
    cycles = stream(target, draft, [prompt], method=method, generations=generations, **options)
    return Racer(method, cycles, generations)


def warm_up(target: Target, draft: AnyDraft | None, method: str | None, num_drafts: int | None) -> None:
    """A short race whose times are thrown away: first passes allocate memory and choose kernels."""
    race(target, draft, PROMPTS[0], method=method, max_new_tokens=WARM_UP_TOKENS, num_drafts=num_drafts)
