"""The head rollout: the truth that faster twins will be held to, itself held to the plainest recomputation."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.sampling import draw
from domino_spec.ops.heads import Draw, HeadInputs, Rollout, head_rollout, headless_rollout
from tests.tiny import VOCAB, assert_close, tiny_draft

REQUESTS, DRAFTS = 6, 5


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda p: f"prefix{p}")
def draft(request, target):
    return tiny_draft(target, prefix=request.param)


def inputs(draft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(REQUESTS, DRAFTS, 32, generator=generator)
    anchors = torch.randint(0, VOCAB, (REQUESTS,), generator=generator)
    return hidden, draft.base_logits(hidden), draft.embed(anchors)


def drafted(draft, given, *how, **more) -> Rollout:
    """By the draft's head, None for no head, from hidden states, base logits and anchors."""
    return head_rollout(draft and draft.head_weights, HeadInputs(*given), Draw(*how, **more))


def naive_logits(draft, hidden, base, anchor_embedding, chosen):
    """Final logits [R, N, V] of every draft given the chosen ones, the whole prefix run through the GRU each time."""
    rows = []
    for i in range(DRAFTS):
        prefix = torch.stack([anchor_embedding, *(draft.embed(chosen[:, j]) for j in range(i))], dim=1)
        correction = draft.head.correction(hidden[:, i], draft.head.block(prefix)[:, -1])
        rows.append(base[:, i] + (correction if i >= draft.head.config.pure_draft_prefix_len else 0))
    return torch.stack(rows, dim=1)


@torch.inference_mode()
def test_greedy_rollout_equals_step_by_step_recomputation(draft):
    hidden, base, anchor = inputs(draft)
    rollout = drafted(draft, (hidden, base, anchor))
    final = naive_logits(draft, hidden, base, anchor, rollout.choices)
    assert torch.equal(rollout.choices, final.argmax(-1))
    assert rollout.candidates is None and rollout.probs is None
    changed = rollout.choices != base.argmax(-1)
    prefix = draft.head.config.pure_draft_prefix_len
    assert not changed[:, :prefix].any(), "the pure prefix uses base logits alone"
    assert changed[:, prefix:].any(), "a head that changes nothing shows nothing"


@torch.inference_mode()
def test_all_candidates_equal_no_restriction(draft):
    hidden, base, anchor = inputs(draft)
    full = drafted(draft, (hidden, base, anchor))
    for candidates in (VOCAB, VOCAB + 5):
        restricted = drafted(draft, (hidden, base, anchor), candidates)
        assert torch.equal(restricted.choices, full.choices)
    # Every token gathered and corrected, in base-logit order: the gathering path itself.
    most = drafted(draft, (hidden, base, anchor), VOCAB - 1)
    worst = base.argmin(-1)
    agree = (most.choices == full.choices) | (full.choices == worst)
    assert agree.cummin(-1).values.float().mean() > 0.9


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [1, 3, 8, 20])
def test_restricted_greedy_equals_full_while_the_argmax_is_inside(draft, candidates):
    hidden, base, anchor = inputs(draft)
    full = drafted(draft, (hidden, base, anchor)).choices
    restricted = drafted(draft, (hidden, base, anchor), candidates).choices
    inside = (base.topk(candidates, dim=-1).indices == full[..., None]).any(-1)
    reach = inside.long().cumprod(-1).bool()  # from the first miss on, prefixes differ
    assert torch.equal(restricted[reach], full[reach])
    assert reach.any()
    if candidates == 1:
        assert torch.equal(restricted, base.argmax(-1))


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 7])
def test_reported_probabilities_are_those_that_were_drawn_from(draft, candidates):
    hidden, base, anchor = inputs(draft)
    temperature, numbers = 0.7, torch.rand(REQUESTS, DRAFTS, generator=torch.Generator().manual_seed(4)).double()
    rollout = drafted(draft, (hidden, base, anchor), candidates, temperature, numbers)
    assert_close(rollout.probs.sum(-1), torch.ones(REQUESTS, DRAFTS))
    width = candidates or VOCAB
    assert rollout.candidates.shape == rollout.probs.shape == (REQUESTS, DRAFTS, width)
    # The numbers themselves: the softmax of the corrected candidate logits at the draft's temperature.
    final = naive_logits(draft, hidden, base, anchor, rollout.choices)
    expected = (final.gather(-1, rollout.candidates) / temperature).softmax(-1)
    assert_close(rollout.probs, expected)
    drawn = draw(rollout.probs, numbers)
    assert torch.equal(rollout.candidates.gather(-1, drawn[..., None])[..., 0], rollout.choices)
    assert (rollout.candidates.sort(-1).values.diff(dim=-1) > 0).all(), "a candidate must not be listed twice"


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 7])
def test_requests_that_choose_beside_others_that_sample_report_all_weight_on_their_choice(draft, candidates):
    hidden, base, anchor = inputs(draft)
    numbers = torch.rand(REQUESTS, DRAFTS, generator=torch.Generator().manual_seed(4)).double()
    temperatures = torch.tensor([0.0, 0.7, 1.4, 0.0, 0.7, 1.4])
    mixed = drafted(draft, (hidden, base, anchor), candidates, temperatures, numbers)
    for r, temperature in enumerate(temperatures.tolist()):
        one = slice(r, r + 1)
        alone = (draft, (hidden[one], base[one], anchor[one]), candidates)
        if temperature == 0:
            assert torch.equal(mixed.choices[one], drafted(*alone).choices)
            assert torch.equal(mixed.probs[one], (mixed.candidates == mixed.choices[..., None])[one].float())
        else:
            sampled = drafted(*alone, temperature, numbers[one])
            assert torch.equal(mixed.choices[one], sampled.choices)
            assert_close(mixed.probs[one], sampled.probs)


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("temperature", [None, 0.7, torch.tensor([0.0, 0.7, 1.4, 0.0, 0.7, 1.4])], ids=str)
def test_without_a_head_all_slots_at_once_equal_one_after_another(draft, candidates, temperature):
    hidden, base, anchor = inputs(draft)
    numbers = torch.rand(REQUESTS, DRAFTS, generator=torch.Generator().manual_seed(4)).double()
    how = (candidates, 0.0, None) if temperature is None else (candidates, temperature, numbers)
    expected = drafted(None, (hidden, base, anchor), *how, min_confidence=1e-9)
    found = headless_rollout(HeadInputs(hidden, base, anchor), Draw(*how, min_confidence=1e-9))
    assert torch.equal(found.choices, expected.choices)
    assert_close(found.confidence, expected.confidence)
    if temperature is not None:
        assert torch.equal(found.candidates, expected.candidates)
        assert_close(found.probs, expected.probs)
    else:
        assert found.candidates is None and found.probs is None


@torch.inference_mode()
def test_without_a_head_the_base_logits_decide(target):
    draft = tiny_draft(target, head=False)
    hidden, base, anchor = inputs(draft)
    assert torch.equal(drafted(None, (hidden, base, anchor)).choices, base.argmax(-1))
    assert torch.equal(drafted(None, (hidden, base, anchor), 4).choices, base.argmax(-1))


@torch.inference_mode()
def test_requests_do_not_influence_each_other(draft):
    hidden, base, anchor = inputs(draft)
    together = drafted(draft, (hidden, base, anchor), 6).choices
    for r in range(REQUESTS):
        one = slice(r, r + 1)
        alone = drafted(draft, (hidden[one], base[one], anchor[one]), 6).choices
        assert torch.equal(alone[0], together[r])


@torch.inference_mode()
def test_fewer_drafts_are_the_first_of_more(draft):
    """Asking for fewer drafts shortens the rollout and changes none of those that are left."""
    hidden, base, anchor = inputs(draft)
    full = drafted(draft, (hidden, base, anchor)).choices
    for n in range(1, DRAFTS):
        assert torch.equal(drafted(draft, (hidden[:, :n], base[:, :n], anchor)).choices, full[:, :n])


@torch.inference_mode()
def test_zero_drafts_are_an_empty_rollout(draft):
    hidden, base, anchor = inputs(draft)
    rollout = drafted(draft, (hidden[:, :0], base[:, :0], anchor))
    assert rollout.choices.shape == (REQUESTS, 0)
    assert rollout.choices.dtype == torch.long


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 7])
def test_confidence_is_the_product_of_the_largest_probabilities(draft, candidates):
    hidden, base, anchor = inputs(draft)
    rollout = drafted(draft, (hidden, base, anchor), candidates, min_confidence=1e-9)
    final = naive_logits(draft, hidden, base, anchor, rollout.choices)
    if candidates is not None:
        final = final.gather(-1, base.topk(candidates, dim=-1).indices)
    assert_close(rollout.confidence, final.softmax(-1).amax(-1).cumprod(-1))


@torch.inference_mode()
def test_a_rollout_ends_early_only_where_nobody_would_propose_more(draft):
    hidden, base, anchor = inputs(draft)
    whole = drafted(draft, (hidden, base, anchor), min_confidence=1e-9)
    for threshold in (0.01, 0.1, 0.5, 0.999):
        short = drafted(draft, (hidden, base, anchor), min_confidence=threshold)
        n = short.choices.shape[1]
        assert torch.equal(short.choices, whole.choices[:, :n])
        assert torch.equal((short.confidence >= threshold).sum(1), (whole.confidence >= threshold).sum(1))
