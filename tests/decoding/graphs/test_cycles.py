"""The static cycle writes what the ordinary one writes, a cycle late."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest
import torch

from domino_spec.decoding.cycle import DraftPlan, ObservedCycle
from domino_spec.decoding.graphs import cycles as cycles_module
from domino_spec.decoding.graphs.cycles import extent_of, is_static
from domino_spec.decoding.prefixes import PrefixCache
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import Sampling, SamplingSettings, path_history
from domino_spec.drafters.methods import METHODS, make_drafter
from tests.decoding.graphs.static_engines import (
    COUNTS,
    EACH,
    ENDLESS,
    EVERYTHING,
    PROMPTS,
    STATIC,
    decoded,
    drafter_of,
    engine_of,
    known,
    requests_of,
    told,
)
from tests.tiny import (
    VOCAB,
    as_target,
    draft_for,
    plain_greedy,
    random_prompts,
    run,
    tiny_model,
    tiny_target,
    word_tokenizer,
)

# What it writes


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.8), EVERYTHING], ids=["greedy", "sampled", "everything"])
@pytest.mark.parametrize("method", EACH)
def test_texts_and_figures_are_those_of_ordinary_cycles(target, method, settings):
    """Requests of unequal length, more than there are slots, across extents."""
    requests = requests_of(PROMPTS, COUNTS, [settings] * len(PROMPTS))
    engines = [engine_of(target, drafter_of(target, method), static) for static in (False, True)]
    ordinary, ours = (decoded(engine, requests) for engine in engines)
    assert told(ours) == told(ordinary)
    for name in ("verify_passes", "drafts", "committed_tokens", "prompt_tokens"):
        assert getattr(engines[1].stats, name) == getattr(engines[0].stats, name)
    assert engines[0].static is None and engines[1].static.launched > 0


def test_requests_with_settings_of_their_own_are_decoded_together(target):
    settings = [{}, dict(temperature=0.7), EVERYTHING, dict(logit_bias={7: 30.0}), dict(frequency_penalty=0.3), {}]
    requests = requests_of(PROMPTS, COUNTS, settings)
    ordinary, ours = (decoded(engine_of(target, drafter_of(target, "domino"), s), requests) for s in (False, True))
    assert told(ours) == told(ordinary)


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.9)], ids=["greedy", "sampled"])
def test_stop_tokens_and_limits_end_a_text_within_a_block(target, settings):
    drafter = known(target, settings)
    texts = [row[len(p) :].tolist() for row, p in zip(drafter.texts, PROMPTS, strict=True)]
    stops = [{text[n // 2], VOCAB - 1} if n > 8 else () for text, n in zip(texts, COUNTS, strict=True)]
    requests = requests_of(PROMPTS, COUNTS, [settings] * len(PROMPTS), stops)
    engines = [engine_of(target, drafter, static) for static in (False, True)]
    ordinary, ours = (decoded(engine, requests) for engine in engines)
    assert told(ours) == told(ordinary)
    assert {g.finish_reason for g in ours} == {"stop", "length"}
    assert engines[1].stats.verify_passes == engines[0].stats.verify_passes
    cut = [sum(g.acceptance_lengths) > g.num_tokens for g in ours]
    assert any(c for c, g in zip(cut, ours, strict=True) if g.finish_reason == "stop"), "within a block"
    assert any(c for c, g in zip(cut, ours, strict=True) if g.finish_reason == "length"), "within a block"
    assert max(max(g.acceptance_lengths) for g in ours) > 3


def test_more_stop_tokens_than_the_device_looks_for(target):
    """It goes on with such a request until the host has heard; what it adds is not kept."""
    text = plain_greedy(tiny_model(), PROMPTS[0], 30)
    others = [t for t in range(VOCAB) if t not in text]
    last = max(text[5:])
    assert len(others) >= cycles_module.MOST_STOPS > 0
    stops = {*[t for t in others if t < last][: cycles_module.MOST_STOPS], last}
    requests = requests_of([PROMPTS[0]], [30], stops=[stops])
    ordinary, ours = (decoded(engine_of(target, drafter_of(target, "none"), s), requests) for s in (False, True))
    assert told(ours) == told(ordinary) and ours[0].finish_reason == "stop"


def test_stop_strings_are_seen_by_the_host():
    target = tiny_target(tokenizer=word_tokenizer())
    text = run(target, drafter_of(target, "none"), [PROMPTS[0]], 30)[0].token_ids
    limits = Limits(30, stop=(f"w{text[7]}",), stop_token_ids=ENDLESS)
    engine = engine_of(target, drafter_of(target, "domino-tree"), slots=1)
    stopped, after = decoded(engine, [Request(PROMPTS[0], limits=limits), *requests_of([PROMPTS[0]], [30])])
    assert stopped.finish_reason == "stop" and stopped.token_ids == text[: text.index(text[7]) + 1]
    assert after.token_ids == text


@pytest.mark.parametrize("method", ["none", "domino"])
def test_a_cancelled_request_leaves_and_disturbs_nobody(model, target, method):
    engine = engine_of(target, drafter_of(target, method), slots=2)
    first, second, queued, last = (engine.submit(r) for r in requests_of(PROMPTS[:4], [30] * 4))
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    engine.cancel(queued)
    written = list(first.token_ids)
    while engine.busy:
        engine.step()
    assert first.finish_reason == queued.finish_reason == "cancelled"
    assert first.token_ids == written == plain_greedy(model, PROMPTS[0], 30)[: len(written)] and written
    assert second.token_ids == plain_greedy(model, PROMPTS[1], 30)
    assert last.token_ids == plain_greedy(model, PROMPTS[3], 30)


@pytest.mark.parametrize("method", EACH)
def test_values_that_are_not_finite_end_their_own_request_alone(method):
    """A poisoned token, also as the last of a prompt, in slots that are looked at while nobody has them."""
    model, clean, poison = tiny_model(), tiny_model(), VOCAB - 3
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    target = as_target(model)
    target._lm_head = as_target(clean)._lm_head
    options = {} if method == "none" else dict(draft_vocab_ids=torch.arange(VOCAB - 4))
    draft = draft_for(method, target, **options)
    engine = engine_of(target, make_drafter(method, draft, requests=1, device=target.device), slots=4)
    several = random_prompts([5, 26, 7, 4, 3, 9, 6, 12, 8, 2], vocab=VOCAB - 4)
    sound = [p for p in several if poison not in plain_greedy(clean, p, 12)]
    sick = [[*several[0], poison, *several[0]], [*several[1], poison]]
    assert len(sound) > 4, "their texts do not come upon it either"
    prompts = [sound[0], *sick, *sound[1:3], *sick, *sound[3:]]
    generations = decoded(engine, requests_of(prompts, [12] * len(prompts)))
    for generation in generations:
        if poison in generation.prompt_ids:
            assert generation.finish_reason == "error"
        else:
            assert generation.token_ids == plain_greedy(clean, generation.prompt_ids, 12)


def test_log_probabilities_take_ordinary_cycles_and_static_ones_go_on_after_them(target):
    """Whoever is decoded beside such a request has ordinary cycles too, and static ones before and after it."""
    texts = []
    for static in (False, True):
        engine = engine_of(target, drafter_of(target, "domino"), static)
        going = engine.submit(requests_of([PROMPTS[0]], [40])[0])
        for _ in range(5):
            engine.step()
        flights = engine.static.launched if engine.static else 0
        limits = Limits(6, stop_token_ids=ENDLESS)
        wanting = engine.submit(Request(PROMPTS[1], limits=limits, top_logprobs=2))
        while not wanting.finish_reason:
            engine.step()
        assert len(wanting.logprobs) == 6 and not going.finish_reason
        assert not static or engine.static.launched == flights > 0
        while engine.busy:
            engine.step()
        assert not static or engine.static.launched > flights
        texts.append(told([going, wanting]))
    assert texts[0] == texts[1]


def test_texts_that_ended_are_kept_for_prompts_that_continue_them(target):
    prefixes = PrefixCache(10**8)
    engine = engine_of(target, drafter_of(target, "domino"), slots=2, prefixes=prefixes)
    talks = PROMPTS[2:4]
    for turn in range(3):
        answers = decoded(engine, requests_of(talks, [12, 9]))
        fresh = decoded(engine_of(target, drafter_of(target, "domino"), static=False), requests_of(talks, [12, 9]))
        assert [a.token_ids for a in answers] == [f.token_ids for f in fresh]
        assert all(a.cached_tokens > 0 for a in answers) or turn == 0
        talks = [[*talk, *answer.token_ids, 5, turn] for talk, answer in zip(talks, answers, strict=True)]


# What it is for


def test_what_searches_on_the_host_has_ordinary_cycles_and_says_so(target, caplog):
    for method in METHODS:
        assert is_static(drafter_of(target, method)) == (method in STATIC)
    assert not is_static(drafter_of(target, "domino", min_confidence=0.1)), "on a CPU"
    with caplog.at_level(logging.WARNING):
        engine = engine_of(target, drafter_of(target, "domino-best-first"))
    assert engine.static is None and "ordinary" in caplog.text


class Moody:
    """Any number of drafts at any time."""

    def __init__(self) -> None:
        self.random, self.observed = random.Random(1), []

    def plan(self, requests: int, most: int) -> DraftPlan:
        drafts = self.random.choice([0, 0, most, most, 2])
        trial = drafts == 0 and self.random.random() < 0.5
        return DraftPlan(requests, drafts, self.random.randint(0, drafts), trial)

    def observe(self, cycle: ObservedCycle) -> None:
        accepted, drafts = cycle.verdict.num_accepted, cycle.proposal.num_drafts
        assert drafts.shape == accepted.shape and (accepted <= drafts).all() and (accepted >= 0).all()
        assert cycle.seconds is None if cycle.plan.trial else cycle.seconds > 0
        assert (cycle.offered.tokens.shape[1] > 0) == (cycle.plan.trial or cycle.plan.drafts > 0)
        self.observed.append(cycle)


@pytest.mark.parametrize("method", ["domino", "domino-tree"])
def test_a_policy_decides_a_cycle_late_and_texts_stay_the_same(model, target, method):
    policy = Moody()
    engine = engine_of(target, drafter_of(target, method), policy=policy)
    for generation, count in zip(decoded(engine, requests_of(PROMPTS, COUNTS)), COUNTS, strict=True):
        assert generation.token_ids == plain_greedy(model, generation.prompt_ids, count)
    widths = {cycle.proposal.tokens.shape[1] for cycle in policy.observed}
    most = engine.num_drafts
    assert len(widths) > 2 and widths <= {0, 1, 2, 4, 8, most}, "few numbers, since each has a graph"
    assert {(c.plan.drafts > 0, c.plan.trial) for c in policy.observed} == {
        (False, False),
        (False, True),
        (True, False),
    }
    trees = [c.verdict.path is not None for c in policy.observed if c.proposal.tokens.shape[1]]
    assert all(is_tree == (method == "domino-tree") for is_tree in trees)
    assert 0 < engine.stats.drafted_cycles < engine.stats.cycles


def test_the_adaptive_policy_drops_drafts_that_are_never_accepted(target):
    from domino_spec.decoding.policy.adaptive import AdaptivePolicy
    from domino_spec.decoding.policy.costs import CostModel

    costs = CostModel((1, 4), (1, 8), ((1.0, 1.2), (1.0, 1.2)), (8,), ((0.05,), (0.05,)))

    class Steady(AdaptivePolicy):
        """Every cycle takes what the cost model says, whatever this machine does."""

        def observe(self, cycle: ObservedCycle) -> None:
            super().observe(replace(cycle, seconds=None))

    policy = Steady(costs)
    engine = engine_of(target, drafter_of(target, "domino"), policy=policy)
    generations = decoded(engine, requests_of(PROMPTS[:3], [60] * 3))
    assert max(generations[1].num_drafts) > 0 and generations[1].num_drafts[-10:] == [0] * 10


def test_settings_in_a_table_give_the_same_distributions_bit_for_bit():
    torch.manual_seed(0)
    several = [
        {},
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=5),
        dict(temperature=0.9, top_p=0.6),
        dict(temperature=1.0, min_p=0.1, top_k=20, top_p=0.95),
        EVERYTHING,
        dict(repetition_penalty=1.4, frequency_penalty=0.2),
        dict(logit_bias={1: 5.0, 8: -3.0}),
    ]
    settings = [SamplingSettings(seed=i, **s) for i, s in enumerate(several)]
    count, table = len(settings), Sampling([SamplingSettings()] * (len(settings) + 2))
    logits = torch.randn(count, 4, VOCAB) * 3
    logits[:, :, 10] = logits[:, :, 20]  # equal ones
    tokens, lengths = torch.randint(0, VOCAB, (count, 30)), torch.full((count,), 20)
    on_path = torch.ones(4, 3, dtype=torch.bool).tril(-1).expand(count, -1, -1)
    history = path_history(tokens, lengths, lengths - 9, tokens[:, :3], on_path, VOCAB)
    positions = lengths[:, None] + torch.arange(4)
    for part in (slice(0, count), slice(1, 5), slice(6, 8), slice(0, 1)):
        own = settings[part]
        ours, theirs = table.view(len(own), table.load(own, VOCAB)), Sampling(own)
        past = type(history)(history.in_text[part], history.seen[part])
        assert (ours.greedy, ours.plain_greedy, ours.warpers) == (
            theirs.greedy,
            theirs.plain_greedy,
            theirs.warpers,
        )
        assert torch.equal(ours.probs(logits[part], past), theirs.probs(logits[part], past))
        assert torch.equal(ours.warp(logits[part], past), theirs.warp(logits[part], past))
        choices = [s.choices(logits[part], positions[part], past) for s in (ours, theirs)]
        assert torch.equal(*choices)


def test_an_extent_holds_the_rows_and_little_more(monkeypatch):
    monkeypatch.setattr(cycles_module, "STEP", 256)
    extents = [extent_of(rows) for rows in range(1, 40_000)]
    assert all(rows <= extent for rows, extent in enumerate(extents, 1))
    assert all(extent <= max(256, rows + 256, 1.25 * rows + 1) for rows, extent in enumerate(extents, 1))
    assert extents == sorted(extents) and len(set(extents)) < 32
    assert {extent % 256 for extent in extents} == {0}
