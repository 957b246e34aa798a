"""The continuous engine: requests come and go, slots are used again, and nobody's text depends on anybody else."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from domino_spec.decoding.cycle import DraftPlan, keep_drafts
from domino_spec.decoding.engine import Engine, decode
from domino_spec.decoding.prefixes import Prefix, PrefixCache
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.methods import METHODS, make_drafter
from domino_spec.settings import UserError
from tests.tiny import (
    VOCAB,
    Oracle,
    as_target,
    draft_for,
    plain_greedy,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
    tiny_single_layer,
)

ENDLESS: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def target(model):
    return as_target(model)


def drafter_of(target, method: str, **options):
    draft = draft_for(method, target)
    return make_drafter(method, draft, requests=1, device=target.device, candidates=8, **options)


def engine_of(target, drafter, slots: int = 3, capacity: int = 80, **options) -> Engine:
    return Engine(target, drafter, slots=slots, capacity=capacity, **options)


def request(prompt: list[int], count: int, **settings) -> Request:
    return Request(prompt, SamplingSettings(**settings), Limits(count, stop_token_ids=ENDLESS))


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("method", METHODS)
def test_more_requests_than_slots_all_write_their_own_text(model, target, method):
    """Twelve requests of unequal prompts and answers pass through three slots, some arriving while others decode."""
    engine = engine_of(target, drafter_of(target, method))
    prompts = random_prompts([7, 1, 30, 4, 2, 12, 9, 1, 5, 17, 3, 8])
    counts = [3, 20, 9, 14, 1, 25, 6, 11, 2, 18, 7, 13]
    generations = []
    for prompt, count in zip(prompts, counts, strict=True):
        generations.append(engine.submit(request(prompt, count)))
        engine.step()
        assert engine.num_running <= 3
    finish(engine)
    for generation, prompt, count in zip(generations, prompts, counts, strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, count)
        assert generation.finish_reason == "length"
    stats = engine.stats
    assert stats.prompt_tokens >= sum(len(p) - 1 for p in prompts)
    assert stats.verify_passes == sum(g.num_verify_passes for g in generations)
    assert stats.committed_tokens == sum(sum(g.acceptance_lengths) for g in generations)
    assert stats.drafts == sum(sum(g.num_drafts) for g in generations)


@pytest.mark.parametrize("method", ["none", "ngram", "domino", "domino-tree", "domino-tree+ngram", "eagle3", "dart"])
def test_a_sampled_text_depends_on_its_own_seed_and_settings_alone(target, method):
    """Greedy and sampled requests, each with settings of its own, write together what each writes by itself."""
    several = [
        dict(temperature=0.8, seed=3),
        dict(),
        dict(temperature=1.2, top_k=5, seed=4),
        dict(temperature=0.7, top_p=0.9, presence_penalty=1.0, seed=5),
        dict(temperature=1.0, min_p=0.05, repetition_penalty=1.3, logit_bias={5: 2.0}, seed=6),
        dict(logit_bias={7: 30.0}),
    ]
    prompts = random_prompts([6, 1, 9, 3, 5, 2], seed=8)
    requests = [request(p, 15, **s) for p, s in zip(prompts, several, strict=True)]
    together = engine_of(target, drafter_of(target, method), slots=4)
    crowd = [together.submit(r) for r in requests]
    finish(together)
    alone = engine_of(target, drafter_of(target, method), slots=1)
    for generation, r in zip(crowd, requests, strict=True):
        single = alone.submit(r)
        finish(alone)
        assert generation.token_ids == single.token_ids
    assert len({tuple(g.token_ids) for g in crowd}) == len(crowd)


def test_chosen_drafts_write_what_plain_decoding_draws(target):
    """At one seed, whatever is drafted: only sampled drafts have a say in which text comes."""
    prompts = random_prompts([6, 3])
    settings = SamplingSettings(temperature=1.0, seed=11)
    plain = [g.token_ids for g in run(target, drafter_of(target, "none"), prompts, 20, settings=settings)]
    for method in ("ngram", "domino-tree", "domino+ngram", "eagle3", "dart"):
        drafter = drafter_of(target, method)
        assert [g.token_ids for g in run(target, drafter, prompts, 20, settings=settings)] == plain
    chosen = drafter_of(target, "domino", sample_drafts=False)
    assert [g.token_ids for g in run(target, chosen, prompts, 20, settings=settings)] == plain


def test_long_prompts_are_read_in_parts_while_others_go_on():
    model = tiny_model(max_position_embeddings=2048)
    target = as_target(model)
    engine = Engine(target, drafter_of(target, "domino-tree"), slots=4, capacity=1300)
    short, *long = random_prompts([5, 1200, 700])
    going = engine.submit(request(short, 60))
    engine.step()
    waiting = [engine.submit(request(p, 5)) for p in long]
    steps = 0
    while not all(g.num_tokens for g in waiting):
        before = going.num_tokens
        engine.step()
        steps += 1
        assert going.num_tokens > before or going.finish_reason, "nobody waits for a whole prompt"
    assert steps >= 3
    finish(engine)
    for generation, prompt, count in zip([going, *waiting], [short, *long], [60, 5, 5], strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, count)


def test_a_cancelled_request_leaves_at_once_and_disturbs_nobody(model, target):
    engine = engine_of(target, drafter_of(target, "domino-tree"), slots=2)
    prompts = random_prompts([6, 8, 3, 4])
    first, second, queued, last = (engine.submit(request(p, 30)) for p in prompts)
    engine.step()
    engine.cancel(first)
    engine.cancel(queued)
    engine.step()
    assert first.finish_reason == queued.finish_reason == "cancelled" and not queued.token_ids
    written = list(first.token_ids)
    finish(engine)
    assert first.token_ids == written == plain_greedy(model, prompts[0], 30)[: len(written)]
    assert second.token_ids == plain_greedy(model, prompts[1], 30)
    assert last.token_ids == plain_greedy(model, prompts[3], 30)
    engine.cancel(last)
    assert last.finish_reason == "length", "what has ended stays as it ended"


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end():
    model = tiny_model(max_position_embeddings=2048)
    engine = Engine(as_target(model), drafter_of(as_target(model), "domino-tree"), slots=4, capacity=1300)
    short, longest, other = random_prompts([5, 1200, 400])
    going = engine.submit(request(short, 60))
    engine.step()
    cancelled, kept = engine.submit(request(longest, 5)), engine.submit(request(other, 5))
    engine.step()
    engine.cancel(cancelled)
    finish(engine)
    assert cancelled.finish_reason == "cancelled" and not cancelled.token_ids
    assert engine.stats.prompt_tokens < 1000, "400 of each, at most one chunk more"
    for generation, prompt, count in ((going, short, 60), (kept, other, 5)):
        assert generation.token_ids == plain_greedy(model, prompt, count)


@pytest.mark.parametrize("method", ["none", "domino", "domino-tree", "eagle3", "dart"])
def test_a_request_with_values_that_are_not_finite_fails_alone(method):
    """A poisoned token in a prompt: its request ends with an error; its slot and its neighbours stay sound."""
    model, harmless = tiny_model(), torch.arange(VOCAB - 4)
    poison = VOCAB - 3
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    clean = tiny_model()
    target = as_target(model)
    target._lm_head = as_target(clean)._lm_head  # only what goes in is poisoned
    draft = None
    if method != "none":  # one that does not draft the poison
        make = tiny_draft if method.startswith("domino") else partial(tiny_single_layer, method=method)
        draft = make(target, draft_vocab_ids=harmless)
    drafter = make_drafter(method, draft, requests=1, device=target.device)
    engine = engine_of(target, drafter, slots=2)
    prompts = random_prompts([5, 6, 7, 4], vocab=VOCAB - 4)
    sick = [*prompts[0], poison, *prompts[0]]
    generations = [engine.submit(request(p, 12)) for p in (prompts[1], sick, prompts[2], sick, prompts[3])]
    finish(engine)
    assert [g.finish_reason for g in generations] == ["length", "error", "length", "error", "length"]
    for generation in generations[::2]:
        text = plain_greedy(clean, generation.prompt_ids, 12)
        assert poison not in text and generation.token_ids == text


def test_a_batch_with_values_that_are_not_finite_says_so_once_the_others_are_done():
    model, clean = tiny_model(), tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 3] = torch.nan
    target = as_target(model)
    target._lm_head = as_target(clean)._lm_head
    prompts, generations = [[1, 2, 3], [1, VOCAB - 3, 3]], []
    with pytest.raises(UserError, match=r"not finite after 0 tokens of request 2 of 2.*float32"):
        limits = Limits(9, stop_token_ids=ENDLESS)
        drafter = drafter_of(target, "none")
        for _ in decode(target, drafter, prompts, settings=SamplingSettings(), limits=limits, generations=generations):
            pass
    assert generations[0].token_ids == plain_greedy(clean, prompts[0], 9)


def test_log_probabilities_are_the_targets_own(model, target):
    """Before temperature and warpers, for every committed token, drafted or not."""
    prompt, count = random_prompts([6])[0], 14
    text = prompt + plain_greedy(model, prompt, count + 8)
    settings = SamplingSettings(logit_bias={4: 1.0})
    for drafter in (Oracle([text, text], 5), drafter_of(target, "domino-tree")):
        engine = engine_of(target, drafter)
        limits = Limits(count, stop_token_ids=ENDLESS)
        generation = engine.submit(Request(prompt, settings, limits, top_logprobs=3))
        silent = engine.submit(Request(prompt, settings, limits))
        finish(engine)
        assert silent.logprobs == [] and silent.token_ids == generation.token_ids
        assert len(generation.logprobs) == count
        with torch.no_grad():
            logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for row, token, found in zip(expected, generation.token_ids, generation.logprobs, strict=True):
            assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
            best = row.topk(3)
            assert [i for i, _ in found.top] == best.indices.tolist()
            assert [v for _, v in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_what_does_not_fit_is_refused_and_nothing_is_queued(target):
    engine = engine_of(target, drafter_of(target, "none"), capacity=20)
    for prompt, count, message in (
        ([], 3, "the prompt is empty"),
        ([VOCAB], 3, "outside the vocabulary"),
        ([1] * 15, 6, "exceed the 20 tokens of a slot"),
        ([1] * 600, 6, "exceed the context"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request(prompt, count))
    assert not engine.busy and engine.step() == []
    with pytest.raises(UserError, match="at least one slot"):
        engine_of(target, drafter_of(target, "none"), slots=0)


@pytest.mark.parametrize("method", ["domino-tree", "domino", "eagle3", "domino+ngram"])
def test_any_schedule_of_drafting_writes_the_same_text(model, target, method):
    """A policy that drafts or not as it likes, any number of drafts: drafters catch up with what they did not see."""

    class Whimsical:
        """Drafts at random, and keeps a random number of the first drafts."""

        def __init__(self) -> None:
            self.random, self.seen = random.Random(1), set()

        def plan(self, requests: int, most: int) -> DraftPlan:
            policy = self

            class Plan(DraftPlan):
                def cut(self, proposal):
                    width = proposal.tokens.shape[1]
                    kept = policy.random.randint(0, width)
                    policy.seen.add(kept)
                    return keep_drafts(proposal, torch.arange(kept).expand(len(proposal.tokens), -1))

            drafts = self.random.choice([0, 0, 0, most, 2])
            return Plan(requests, drafts, drafts, trial=drafts == 0 and self.random.random() < 0.3)

        def observe(self, cycle) -> None:
            assert cycle.seconds > 0 and (cycle.trial_seconds is not None) == cycle.plan.trial
            if cycle.plan.trial:
                self.seen.add(cycle.offered.tokens.shape)

    policy = Whimsical()
    engine = engine_of(target, drafter_of(target, method), policy=policy)
    prompts = random_prompts([7, 1, 12, 4, 9])
    counts = [40, 12, 33, 25, 18]
    generations = [engine.submit(request(p, n)) for p, n in zip(prompts, counts, strict=True)]
    finish(engine)
    for generation, prompt, count in zip(generations, prompts, counts, strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, count)
    assert 0 < engine.stats.drafted_cycles < engine.stats.cycles and len(policy.seen) > 2


@pytest.mark.parametrize("method", ["domino-tree", "domino", "eagle3", "dart"])
def test_requests_in_a_trial_and_those_beside_them_catch_up_together(model, target, method):
    """Nearly at the end of their slots, a few have nothing left to read, and the others all that was written."""

    class Late:
        cycles = 0

        def plan(self, requests: int, most: int) -> DraftPlan:
            self.cycles += 1
            drafts = most if self.cycles > 35 else 0
            return DraftPlan(requests, drafts, drafts, trial=self.cycles == 35)

        def observe(self, cycle) -> None:
            assert not cycle.plan.trial or len(cycle.offered.tokens) < 6

    prompts = random_prompts([6] * 6)
    engine = engine_of(target, drafter_of(target, method), slots=6, capacity=46, policy=Late())
    generations = [engine.submit(request(p, 40)) for p in prompts]
    finish(engine)
    assert engine.stats.drafted_cycles > 0
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, 40) for p in prompts]


def test_the_number_of_sampled_drafts_is_not_left_to_a_policy(target):
    """It would decide which text a seed gives; greedy requests beside them are cut again once they are gone."""

    class Never:
        def plan(self, requests, most):
            return DraftPlan(requests, 0, 0)

        def observe(self, cycle):
            pass

    engine = engine_of(target, drafter_of(target, "domino"), policy=Never())
    sampled = engine.submit(request([1, 2, 3], 10, temperature=1.0))
    greedy = engine.submit(request([1, 2, 3], 40))
    finish(engine)
    most = tiny_draft(target).config.max_drafts
    assert set(sampled.num_drafts) == {most}
    assert greedy.num_drafts[0] == most and greedy.num_drafts[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_follow_up_turn_reads_only_what_is_new(model, target, method):
    """Turns of two conversations, taking turns: rows kept from the turn before give the same text as reading anew."""
    prefixes = PrefixCache(10**8)
    engine = engine_of(target, drafter_of(target, method), slots=2, capacity=200, prefixes=prefixes)
    fresh = engine_of(target, drafter_of(target, method), slots=1, capacity=200)
    talks, earlier = random_prompts([9, 14]), {}
    for turn in range(3):
        settings = dict(temperature=0.8, seed=turn)
        before = engine.stats.prompt_tokens
        answers = [engine.submit(request(talk, 12, **settings)) for talk in talks]
        finish(engine)
        read = engine.stats.prompt_tokens - before
        assert read == sum(len(t) - 1 - a.cached_tokens for t, a in zip(talks, answers, strict=True))
        for talk, answer, asked in zip(talks, answers, random_prompts([4, 7], seed=turn + 20), strict=True):
            alone = fresh.submit(request(talk, 12, **settings))
            finish(fresh)
            assert answer.token_ids == alone.token_ids
            assert (answer.cached_tokens >= len(earlier[id(talk)]) - 1) if turn else answer.cached_tokens == 0
            talk += answer.token_ids
            earlier[id(talk)] = list(talk)
            talk += asked
    assert len(prefixes) == 2, "a text that goes on takes the place of the one it continues"


def test_kept_texts_are_bounded_and_the_least_used_go_first(target):
    def prefix(tokens: list[int]) -> Prefix:
        return Prefix(torch.tensor(tokens), (torch.zeros(len(tokens) - 1, 8),), ())

    size = prefix([1, 2, 3, 4]).num_bytes
    kept = PrefixCache(2 * size)
    kept.add(prefix([1, 2, 3, 4]))
    kept.add(prefix([5, 6, 7, 8]))
    assert kept.longest([1, 2, 3, 9, 9])[1] == 2, "used again, so the other one is older now"
    kept.add(prefix([9, 1, 2, 3]))
    assert len(kept) == 2 and kept.num_bytes == 2 * size
    assert kept.longest([5, 6, 7, 8, 1]) is None and kept.longest([1, 2, 3, 4, 5, 6])[1] == 3
    assert kept.longest([1, 2, 3])[1] == 1, "the last two tokens are always read"
    assert kept.longest([1, 2]) is None
    kept.add(prefix(list(range(100))))
    assert len(kept) == 2, "what is too large is not kept"
