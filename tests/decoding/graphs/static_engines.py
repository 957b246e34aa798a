"""Requests and engines that the tests of static cycles share."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.cycle import Proposal
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.methods import make_drafter
from tests.tiny import (
    VOCAB,
    KeepsNothing,
    draft_for,
    random_prompts,
)

STATIC = ("none", "dflash", "domino", "dflash-tree", "domino-tree")
EACH = [pytest.param(m, marks=pytest.mark.slow) if m.startswith("dflash") else m for m in STATIC]
"""As parameters: those without a head are left to `make test`."""
ENDLESS: frozenset[int] = frozenset()
EVERYTHING = dict(
    temperature=1.0, top_k=9, top_p=0.9, min_p=0.02, presence_penalty=0.5, repetition_penalty=1.2, logit_bias={3: 1.0}
)
COUNTS = [3, 40, 9, 14, 1, 22]
PROMPTS = random_prompts([7, 1, 30, 4, 2, 11])


def drafter_of(target, method: str, **options):
    return make_drafter(method, draft_for(method, target), requests=1, device=target.device, candidates=8, **options)


def engine_of(target, drafter, static: bool = True, slots: int = 3, **options) -> Engine:
    return Engine(target, drafter, slots=slots, capacity=100, static=static, **options)


def requests_of(prompts, counts, settings=None, stops=None) -> list[Request]:
    settings, stops = settings or [{}] * len(prompts), stops or [ENDLESS] * len(prompts)
    return [
        Request(p, SamplingSettings(**{"seed": seed, **s}), Limits(n, stop_token_ids=frozenset(stop)))
        for seed, (p, n, s, stop) in enumerate(zip(prompts, counts, settings, stops, strict=True))
    ]


def decoded(engine: Engine, requests: list[Request]):
    generations = [engine.submit(r) for r in requests]
    while engine.busy:
        engine.step()
    return generations


def told(generations) -> list[tuple]:
    return [(g.token_ids, g.finish_reason, g.acceptance_lengths, g.num_drafts, g.accepted) for g in generations]


class Knows(KeepsNothing):
    """A drafter that knows the texts, some of its drafts wrong; it works on the device alone."""

    static, max_drafts = True, 5

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = torch.zeros(len(texts), 200, dtype=torch.long)
        for row, text in zip(self.texts, texts, strict=True):
            row[: len(text)] = torch.tensor(text)

    def propose(self, state, own, num_drafts: int) -> Proposal:
        places = torch.arange(state.tokens.shape[1])
        texts = self.texts[:, : len(places)]
        alike = (texts[:, None] == state.tokens) | (places >= state.lengths[:, None])  # [P, R, capacity]
        who = alike.all(-1).float().argmax(0)
        index = state.lengths[:, None] + torch.arange(num_drafts)
        tokens = self.texts[who].gather(1, index)
        wrong = (index + 3 * who[:, None]) % 7 == 0
        return Proposal(torch.where(wrong, (tokens + 1) % VOCAB, tokens), 1 + (state.lengths + who) % num_drafts)


def known(target, settings: dict | None = None, prompts=PROMPTS, count: int = 60) -> Knows:
    requests = requests_of(prompts, [count] * len(prompts), [settings or {}] * len(prompts))
    plain = decoded(engine_of(target, drafter_of(target, "none"), static=False), requests)
    return Knows([p + g.token_ids for p, g in zip(prompts, plain, strict=True)])
