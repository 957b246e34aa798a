"""RoPE whose angles depend on the length: every way to decode gives transformers' text; longer texts are refused."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.settings import UserError
from domino_spec.target.check import check_target, read_reference
from tests.tiny import Oracle, TreeOracle, as_target, plain_greedy, random_prompts, run

ORIGINAL = 64
_SHAPE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.25,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[4.0, 3.0, 2.5, 2.0]
)


def longrope():
    """As Phi-3 mini and Phi-4 mini: two sets of frequencies."""
    return Phi3Config(
        **_SHAPE,
        max_position_embeddings=4 * ORIGINAL,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={**_LONGROPE, "original_max_position_embeddings": ORIGINAL, "partial_rotary_factor": 1.0},
    )


def dynamic():
    """A base that grows with the text."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaConfig(**_SHAPE, max_position_embeddings=ORIGINAL, rope_parameters=rope)


@pytest.fixture(scope="module", params=[longrope, dynamic])
def pair(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param(), attn_implementation="sdpa", dtype=torch.float32).eval()
    target = as_target(model)
    reference = read_reference(target)
    check_target(target.pack(), reference)
    return model, target


def test_angles_do_depend_on_the_length(pair):
    """Otherwise the tests below would show nothing."""
    model, _ = pair
    rotary, x = model.get_decoder().rotary_emb, torch.zeros(1)
    short = rotary(x, torch.arange(ORIGINAL)[None])[0][:, :40]
    long = rotary(x, torch.arange(ORIGINAL + 9)[None])[0][:, :40]
    assert not torch.allclose(short, long)
    rotary(x, torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("way", ["plain", "chain", "tree"])
def test_every_way_to_decode_writes_transformers_text_up_to_the_last_token(pair, way):
    """The last passes hold drafts for positions beyond the original context, next to other lengths."""
    model, target = pair
    count = 14
    prompts = random_prompts([ORIGINAL - count, 40, 45, ORIGINAL - count - 1])
    expected = [plain_greedy(model, prompt, count) for prompt in prompts]
    assert len({token for text in expected for token in text}) > 8
    texts = [prompt + text + [0] * 12 for prompt, text in zip(prompts, expected, strict=True)]
    drafter = {"plain": PlainDecoding, "chain": lambda: Oracle(texts, 6), "tree": lambda: TreeOracle(texts, 9)}[way]()
    assert [generation.token_ids for generation in run(target, drafter, prompts, count)] == expected
    for prompt, text in zip(prompts, expected, strict=True):
        alone = PlainDecoding() if way == "plain" else Oracle([prompt + text + [0] * 12], 6)
        assert run(target, alone, [prompt], count)[0].token_ids == text


def test_a_text_that_could_cross_the_original_context_is_refused(pair):
    _, target = pair
    for length in (ORIGINAL - 13, ORIGINAL + 1):
        with pytest.raises(UserError, match=f"exceed the context of {ORIGINAL} tokens .* RoPE changes all angles"):
            run(target, PlainDecoding(), random_prompts([length]), 14)
    tokens = torch.tensor(random_prompts([ORIGINAL + 1]))
    with pytest.raises(UserError, match="cannot read a text of 65 tokens: its RoPE"):
        target.prefill(tokens, torch.tensor([ORIGINAL + 1]), target.new_cache(1, 80))


def test_a_shorter_context_than_the_configuration_says_is_said_at_load(caplog):
    model = AutoModelForCausalLM.from_config(longrope())
    with caplog.at_level(logging.WARNING, "domino_spec"):
        target = as_target(model)
    assert target.max_length == ORIGINAL
    assert "longer than 64 tokens" in caplog.text and len(caplog.records) == 1
