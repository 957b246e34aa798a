"""Decoding to the end: a batch of requests handed to an engine of their own.

`decode` yields after every cycle; the loop itself is `engine.Engine`. `prefill` is for those who measure single cycles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from domino_spec.config import UserError
from domino_spec.decoding.drafter import Drafter, cycle_room
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.generation import Generation, Limits, Request, check_prompt
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.decoding.state import State
from domino_spec.target.model import Target


def prefill(
    target: Target,
    prompts: Sequence[Sequence[int]],
    drafter: Drafter,
    max_new_tokens: int,
    settings: SamplingSettings | None = None,
) -> State:
    """Committed prompts, their cache (all but the last token, which the first pass verifies) and features.

    Args:
        target: the frozen model.
        prompts: token ids of every request.
        drafter: whose features are kept.
        max_new_tokens: tokens that there must be room for.
        settings: of all requests, request r with the stream `seed + r`; None is greedy.

    Raises:
        UserError: see `check_prompt`.
    """
    for prompt in prompts:
        check_prompt(target, prompt, max_new_tokens)
    device = target.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    capacity = int(lengths.max()) + max_new_tokens + cycle_room(drafter)
    tokens = torch.zeros(len(prompts), capacity, dtype=torch.long, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    cache = target.new_cache(len(prompts), capacity)
    longest = int(lengths.max()) - 1
    features = target.prefill(tokens[:, :longest], lengths - 1, cache, drafter.feature_layers)
    active = torch.ones_like(lengths, dtype=torch.bool)
    sampling = Sampling.alike(settings or SamplingSettings(), len(prompts), device)
    return State(tokens, lengths, lengths.clone(), active, cache, sampling, features)


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
    seeds: Sequence[int] | None = None,
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
        seeds: of every request's stream, in place of `seed + r`.

    Raises:
        UserError: see `check_prompt`; or, once all others have ended, a request's values were not finite.
    """
    generations = [] if generations is None else generations
    seeds = range(settings.seed, settings.seed + len(prompts)) if seeds is None else seeds
    requests = [
        Request(prompt, replace(settings, seed=seed), limits) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for prompt in prompts:
        check_prompt(target, prompt, limits.max_new_tokens)
    engine = Engine(
        target,
        drafter,
        slots=len(prompts),
        capacity=max(map(len, prompts)) + limits.max_new_tokens,
        num_drafts=num_drafts,
        matching_rule=matching_rule,
    )
    generations += [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
        yield generations
    for place, generation in enumerate(generations, 1):
        if generation.finish_reason == "error":
            raise UserError(
                f"{target.name} gave values that are not finite after {generation.num_tokens} tokens of request "
                f"{place} of {len(generations)}: check its weights, or load it in another precision than "
                f"{_name(target.dtype)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
