"""The outside baseline's clock, and what it says of passes that bring one token or several."""

from __future__ import annotations

import pytest
import torch

from domino_spec.bench.baseline import TokenClock, transformers_generate
from tests.tiny import EOS, plain_greedy, random_prompts, tiny_model


def test_the_clock_counts_passes_and_their_tokens():
    clock = TokenClock()
    clock.put(torch.tensor([[5, 6, 7, 8]]))
    assert clock.seconds == [] and clock.tokens == [], "the prompt is no pass"
    for tokens in ([1], [[2, 3, 4]], [[5]]):
        clock.put(torch.tensor(tokens))
    clock.end()
    assert clock.tokens == [1, 3, 1] and len(clock.seconds) == 3 and clock.seconds == sorted(clock.seconds)


def test_plain_decoding_takes_a_pass_a_token():
    model = tiny_model()
    (prompt,) = random_prompts([9])
    found = transformers_generate(model, [EOS], prompt, 0.0, 0, 7)
    assert found.token_ids == plain_greedy(model, prompt, 7) and found.finish_reason == "length"
    assert found.acceptance_lengths == [1] * 6 and found.num_drafts == [0] * 6 and not any(found.accepted)


@pytest.mark.parametrize("place", [0, 3])
def test_it_ends_at_a_stop_token(place):
    model = tiny_model()
    (prompt,) = random_prompts([9])
    text = plain_greedy(model, prompt, 7)
    stop = text[place]
    found = transformers_generate(model, {stop}, prompt, 0.0, 0, 7)
    assert found.token_ids == text[: text.index(stop) + 1] and found.finish_reason == "stop"
