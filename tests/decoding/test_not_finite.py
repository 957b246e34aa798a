"""Logits that are not finite end the request they decided, in ordinary and static cycles, and nobody else's."""

from __future__ import annotations

import math

import pytest
import torch

from domino_spec.decoding.engine import decode
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.settings import UserError
from tests.decoding.graphs.static_engines import EACH, decoded, drafter_of, engine_of, requests_of
from tests.tiny import VOCAB, as_target, plain_greedy, random_prompts, tiny_model

ENDLESS: frozenset[int] = frozenset()
PROMPTS = random_prompts([5, 26, 7, 4, 9])
BOTH = pytest.mark.parametrize("static", [False, True], ids=["ordinary", "static"])


def target_whose_logits(change):
    """A tiny target; `change(logits)` [..., V] is what its LM head returns."""
    target = as_target(tiny_model())
    lm_head = target._lm_head
    target._lm_head = lambda hidden: change(lm_head(hidden))
    return target


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0.9), dict(temperature=0.9, top_k=5, min_p=0.02)])
@pytest.mark.parametrize("method", EACH)
def test_a_broken_row_of_the_lm_head_ends_every_request_before_its_first_token(method, settings, value, static):
    target = as_target(tiny_model())
    drafter = drafter_of(target, method)  # the draft's own LM head is sound
    target = target_whose_logits(lambda logits: logits.index_fill(-1, torch.tensor([7]), value))
    engine = engine_of(target, drafter, static=static)
    for generation in decoded(engine, requests_of(PROMPTS, [12] * 5, [settings] * 5)):
        assert (generation.finish_reason, generation.token_ids) == ("error", [])


@BOTH
@pytest.mark.parametrize("method", EACH)
def test_logits_that_break_in_the_middle_of_a_text_end_it_there_alone(method, static):
    """NaN wherever a certain token would come next: texts without it stay what they were."""
    model = tiny_model()
    texts = [plain_greedy(model, prompt, 20) for prompt in PROMPTS]
    poison = next(t for t in texts[0][4:] if t not in texts[0][:4] and any(t not in text for text in texts[1:]))

    def spoiled(logits):
        hit = logits.argmax(-1, keepdim=True) == poison
        return torch.where(hit & (torch.arange(VOCAB) == 3), math.nan, logits)

    drafter = drafter_of(as_target(model), method)
    engine = engine_of(target_whose_logits(spoiled), drafter, static=static)
    for generation, text in zip(decoded(engine, requests_of(PROMPTS, [20] * 5)), texts, strict=True):
        if poison in text:
            assert generation.finish_reason == "error"
            assert generation.token_ids == text[: generation.num_tokens], "what came before is its own"
            assert poison not in generation.token_ids
        else:
            assert (generation.finish_reason, generation.token_ids) == ("length", text)


@BOTH
@pytest.mark.parametrize("method", EACH)
def test_tokens_that_a_target_forbids_by_minus_infinity_are_no_fault(method, static):
    forbidden = torch.tensor([2, 9, 11])
    target = target_whose_logits(lambda logits: logits.index_fill(-1, forbidden, -math.inf))
    drafter = drafter_of(as_target(tiny_model()), method)
    settings = [dict(temperature=t) for t in (0, 0, 1.0, 1.5, 0)]
    for generation in decoded(engine_of(target, drafter, static=static), requests_of(PROMPTS, [15] * 5, settings)):
        assert generation.finish_reason == "length"
        assert not {*generation.token_ids} & {*forbidden.tolist()}


def test_log_probabilities_are_numbers_or_there_are_none():
    target = target_whose_logits(lambda logits: logits.index_fill(-1, torch.tensor([7]), math.nan))
    engine = engine_of(target, drafter_of(as_target(tiny_model()), "none"), static=False)
    (generation,) = decoded(engine, [Request(PROMPTS[0], limits=Limits(4), top_logprobs=3)])
    assert generation.finish_reason == "error" and generation.logprobs == []


def test_a_batch_says_that_the_target_gave_values_that_are_not_finite():
    target = target_whose_logits(lambda logits: logits.index_fill(-1, torch.tensor([7]), math.nan))
    drafter = drafter_of(as_target(tiny_model()), "none")
    with pytest.raises(UserError, match=r"not finite after 0 tokens of request 1 of 1.*float32"):
        limits = Limits(4, stop_token_ids=ENDLESS)
        for _ in decode(target, drafter, PROMPTS[:1], settings=SamplingSettings(), limits=limits):
            pass
