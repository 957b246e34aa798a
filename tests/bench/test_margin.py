"""The margin between the two best tokens, and what counts as a near tie."""

from __future__ import annotations

import torch

from domino_spec.bench.ties import top_two
from tests import tiny


def test_the_two_best_tokens_are_those_of_transformers(model, target):
    prompt, text = [3, 4, 5], [6, 7, 8, 9]
    with torch.inference_mode():
        best = model(torch.tensor([prompt + text])).logits[0, -1].topk(2)
    found = top_two(target, prompt, text)
    assert found.tokens == tuple(best.indices.tolist())
    tiny.assert_close(torch.tensor(found.margin), best.values[0] - best.values[1])
    assert not found.near_tie and 0 <= found.rounding < found.margin


def test_a_text_may_be_empty(target):
    assert top_two(target, [3], []).rounding == 0


def test_two_tokens_with_the_same_logit_are_a_near_tie():
    model = tiny.tiny_model(seed=5)
    target = tiny.as_target(model)
    first, _ = top_two(target, [3, 4], [5]).tokens
    twin = (first + 1) % tiny.VOCAB
    with torch.no_grad():
        target.lm_head_weight[twin] = target.lm_head_weight[first]
    found = top_two(target, [3, 4], [5])
    assert set(found.tokens) == {first, twin} and found.margin == 0 and found.near_tie
