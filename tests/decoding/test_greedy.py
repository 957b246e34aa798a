"""Temperature 0: every method writes exactly what transformers' own greedy generation writes."""

from __future__ import annotations

import copy

import pytest
import torch

from domino_spec import generate
from domino_spec.bench.ties import top_two
from domino_spec.decoding.request import Limits
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.lookup import PlainDecoding, PromptLookup
from domino_spec.drafters.methods import METHODS, make_drafter
from tests.tiny import (
    ARCHITECTURES,
    VOCAB,
    Oracle,
    as_target,
    draft_for,
    plain_greedy,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
)

COUNT = 24
LENGTHS = {1: [7], 4: [1, 5, 17, 9]}


def drafter_for(method: str, target, requests: int, candidates: int | None = None, **options):
    return make_drafter(
        method,
        draft_for(method, target),
        requests=requests,
        device=target.device,
        candidates=candidates,
        **options,
    )


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_output_equals_plain_decoding(model, target, method, requests):
    prompts = random_prompts(LENGTHS[requests])
    generations = run(target, drafter_for(method, target, requests), prompts, COUNT)
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, COUNT) for p in prompts]


@pytest.mark.parametrize("requests", [1, 4])
def test_greedy_output_is_exact_at_every_acceptance_length(model, target, requests):
    """A draft that is often right: an oracle spoiled in a different place each cycle."""
    prompts = random_prompts(LENGTHS[requests])
    count = 60
    texts = [p + plain_greedy(model, p, count + 8) for p in prompts]
    generations = run(target, Oracle(texts, 6), prompts, count)
    for generation, prompt, text in zip(generations, prompts, texts, strict=True):
        assert generation.token_ids == text[len(prompt) : len(prompt) + count]
        assert set(generation.acceptance_lengths) == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_decodes_as_transformers_does(kind):
    """Unequal lengths, sliding windows crossed, and caches cropped in every way."""
    model = tiny_model(kind)
    target = as_target(model)
    prompts = random_prompts([3, 11])
    texts = [p + plain_greedy(model, p, COUNT + 8) for p in prompts]
    expected = [plain_greedy(model, p, COUNT) for p in prompts]
    for drafter in (Oracle(texts, 5), BlockDrafter(tiny_draft(target))):
        assert [g.token_ids for g in run(target, drafter, prompts, COUNT)] == expected


@pytest.mark.parametrize("candidates", [1, 5, VOCAB, None])
def test_restricted_candidates_change_no_text(model, target, candidates):
    prompts = random_prompts([6, 9])
    generations = run(target, drafter_for("domino", target, 2, candidates), prompts, COUNT)
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, COUNT) for p in prompts]


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].kinds and m not in ("eagle3", "dart")])
@pytest.mark.parametrize("min_confidence", [0.05, 0.3, 0.99])
def test_leaving_out_doubtful_drafts_changes_no_text(model, target, method, min_confidence):
    """Few, no, and different numbers of drafts in one batch, some requests with a match to copy."""
    prompts = [*random_prompts([6, 9, 4]), [5, 6, 7, 8, 9] * 3]
    drafter = drafter_for(method, target, 4, min_confidence=min_confidence, num_drafts=8)
    generations = run(target, drafter, prompts, COUNT)
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, COUNT) for p in prompts]
    proposed = {n for g in generations for n in g.num_drafts}
    assert len(proposed) > 1 or min_confidence == 0.99


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 99])
def test_the_number_of_drafts_changes_no_text(model, target, num_drafts):
    (prompt,) = random_prompts([6])
    text = prompt + plain_greedy(model, prompt, COUNT + 8)
    (generation,) = run(target, Oracle([text], 5), [prompt], COUNT, num_drafts=num_drafts)
    assert generation.token_ids == text[6 : 6 + COUNT]
    assert set(generation.num_drafts) == {min(num_drafts, 5)}
    assert max(generation.acceptance_lengths) <= min(num_drafts, 5) + 1


@pytest.mark.parametrize("method", ["none", "oracle"])
def test_max_new_tokens_is_exact(model, target, method):
    prompts = random_prompts([4, 6])
    texts = [p + plain_greedy(model, p, COUNT) for p in prompts]
    for count in range(1, 12):
        drafter = PlainDecoding() if method == "none" else Oracle(texts, 6)
        for generation, prompt, text in zip(run(target, drafter, prompts, count), prompts, texts, strict=True):
            assert generation.token_ids == text[len(prompt) : len(prompt) + count]
            assert generation.finish_reason == "length"
            assert len(generation.accepted) == count


def test_a_stop_token_inside_an_accepted_prefix_ends_the_text_there(model, target):
    (prompt,) = random_prompts([6])
    continuation = plain_greedy(model, prompt, COUNT + 8)
    ends_inside = 0
    for at in range(1, 12):
        stop = continuation[at]
        first = continuation.index(stop)
        oracle = Oracle([prompt + continuation], 6)
        oracle._cycle = 6  # the first cycle is unspoiled: seven tokens at once
        (generation,) = run(target, oracle, [prompt], COUNT, limits=Limits(COUNT, stop_token_ids=frozenset({stop})))
        assert generation.token_ids == continuation[: first + 1], "the stop token is kept, nothing after it"
        assert generation.finish_reason == "stop"
        assert generation.acceptance_lengths[0] == 7, "tau counts a pass before the stop cuts it"
        ends_inside += first < 6
    assert ends_inside


def test_requests_end_one_by_one_and_the_others_go_on(model, target):
    prompts = random_prompts([5, 8, 3])
    texts = [p + plain_greedy(model, p, COUNT + 8) for p in prompts]
    stop = texts[1][8 + 3]
    limits = Limits(COUNT, stop_token_ids=frozenset({stop}))
    for drafter in (PlainDecoding(), Oracle(texts, 4), BlockDrafter(tiny_draft(target)), PromptLookup()):
        for generation, prompt, text in zip(
            run(target, drafter, prompts, COUNT, limits=limits), prompts, texts, strict=True
        ):
            expected = text[len(prompt) : len(prompt) + COUNT]
            if stop in expected:
                expected = expected[: expected.index(stop) + 1]
            assert generation.token_ids == expected


class Checked(Oracle):
    """Looks at the state of the loop at every cycle."""

    def propose(self, state, own, num_drafts):
        assert torch.equal(state.cache.lengths, state.lengths - 1)
        for length, row in zip(state.lengths.tolist(), state.tokens, strict=True):
            assert any(row[:length].tolist() == text[:length] for text in self.texts)
        self.cycles = getattr(self, "cycles", 0) + 1
        return super().propose(state, own, num_drafts)


def test_cached_rows_are_the_committed_tokens_but_the_last(model, target):
    prompts = random_prompts([1, 5, 9])
    checked = Checked([p + plain_greedy(model, p, COUNT + 8) for p in prompts], 5)
    run(target, checked, prompts, COUNT)
    assert checked.cycles >= 5


def test_counts_and_flags_tell_how_the_text_came_about(model, target):
    (prompt,) = random_prompts([6])
    text = prompt + plain_greedy(model, prompt, COUNT + 8)
    (g,) = run(target, Oracle([text], 5), [prompt], COUNT)
    assert g.num_tokens == COUNT and g.num_verify_passes == len(g.acceptance_lengths) == len(g.num_drafts)
    assert g.acceptance_length == pytest.approx(sum(g.acceptance_lengths) / len(g.acceptance_lengths))
    flags = [i < n - 1 for n in g.acceptance_lengths for i in range(n)]
    assert g.accepted == flags[:COUNT]
    assert g.seconds_decode > 0 and g.tokens_per_second == pytest.approx(COUNT / g.seconds_decode)


def hf_greedy(model, prompt, **options):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", ["none", "oracle", "domino"])
def test_repetition_penalty_counts_the_drafts_on_the_path(model, target, method):
    prompts = random_prompts([4, 7])
    expected = [hf_greedy(model, p, repetition_penalty=1.5) for p in prompts]
    assert expected != [plain_greedy(model, p, COUNT) for p in prompts], "the penalty must matter"
    if method == "oracle":
        drafter = Oracle([p + e + [0] * 8 for p, e in zip(prompts, expected, strict=True)], 5)
    else:
        drafter = drafter_for(method, target, 2)
    generations = run(target, drafter, prompts, COUNT, settings=SamplingSettings(repetition_penalty=1.5))
    assert [g.token_ids for g in generations] == expected
    if method == "oracle":
        # Whole drafts are accepted only if the penalty of draft 5 has seen drafts 1 to 4.
        assert 6 in generations[0].acceptance_lengths


def test_frequency_penalty_and_bias_give_the_same_text_with_and_without_drafts(target):
    prompts = random_prompts([4, 7])
    settings = SamplingSettings(presence_penalty=0.7, frequency_penalty=1.1, logit_bias={3: 4.0, 9: -100.0})
    plain = [g.token_ids for g in run(target, PlainDecoding(), prompts, COUNT, settings=settings)]
    texts = [p + t + [0] * 8 for p, t in zip(prompts, plain, strict=True)]
    drafted = run(target, Oracle(texts, 5), prompts, COUNT, settings=settings)
    assert [g.token_ids for g in drafted] == plain
    assert plain != [g.token_ids for g in run(target, PlainDecoding(), prompts, COUNT)]
    assert not any(9 in t for t in plain) and any(3 in t for t in plain)
    assert 6 in drafted[0].acceptance_lengths


def test_the_python_surface_decodes_token_ids_with_any_method(model, target):
    prompts = random_prompts([4, 9])
    expected = [plain_greedy(model, p, 10) for p in prompts]
    for method in [*METHODS, None]:
        draft = tiny_draft(target) if method is None else draft_for(method, target)
        results = generate(target, draft, prompts, method=method, max_new_tokens=10)
        assert [r.token_ids for r in results] == expected
        assert all(r.text == "" for r in results), "no tokenizer, no text"
    assert [r.token_ids for r in generate(target, None, prompts, max_new_tokens=10)] == expected


@pytest.mark.slow
@torch.inference_mode()
def test_in_bfloat16_every_token_is_the_argmax_up_to_a_near_tie(model):
    """Verify passes and single steps round differently, so texts may part, but only where logits nearly tie."""
    target = as_target(copy.deepcopy(model).to(torch.bfloat16))
    prompts = random_prompts([6, 9])
    plain = run(target, PlainDecoding(), prompts, 12)
    texts = [p + g.token_ids + [0] * 8 for p, g in zip(prompts, plain, strict=True)]
    for drafter in (Oracle(texts, 5), BlockDrafter(tiny_draft(target).bfloat16().bind(target))):
        for prompt, generation in zip(prompts, run(target, drafter, prompts, 12), strict=True):
            for i, token in enumerate(generation.token_ids):
                near = top_two(target, prompt, generation.token_ids[:i])
                assert token == near.tokens[0] or (token == near.tokens[1] and near.near_tie)
