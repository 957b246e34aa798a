"""Our attention equals the formula for every argument that it takes, and refuses every other by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from domino_spec.settings import UserError
from domino_spec.target.cache import folded_attention, watch_attention
from tests.tiny import assert_close

HEADS, KV_HEADS, TOKENS, EXTENT, WIDTH = 4, 2, 3, 7, 8


class SomeAttention(nn.Module):
    """What errors name."""


@pytest.fixture
def states():
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, TOKENS, WIDTH)
    key, value = torch.randn(2, 2, KV_HEADS, EXTENT, WIDTH)
    return query, key, value


def formula(states, seen, scaling=None, softcap=None, s_aux=None):
    """Attention, head by head and token by token."""
    query, key, value = states
    out = torch.zeros(2, TOKENS, HEADS, WIDTH)
    for r in range(2):
        for head in range(HEADS):
            for token in range(TOKENS):
                mine = head // (HEADS // KV_HEADS)
                scores = key[r, mine] @ query[r, head, token] * (scaling or 1 / math.sqrt(WIDTH))
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = torch.where(seen[min(r, len(seen) - 1), 0, token], scores, -torch.inf)
                if s_aux is not None:
                    scores = torch.cat((scores, s_aux[head : head + 1]))
                out[r, token, head] = scores.softmax(0)[:EXTENT] @ value[r, mine]
    return out


CAUSAL = torch.ones(TOKENS, EXTENT).tril(EXTENT - TOKENS).bool()[None, None]
RANDOM = torch.rand(2, 1, TOKENS, EXTENT, generator=torch.Generator().manual_seed(1)) < 0.5
RANDOM[..., 0] = True


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scaling": 0.7},
        {"softcap": 0.5},
        {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0])},
        {"scaling": 1.3, "softcap": 1.5, "s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    ],
    ids=lambda arguments: "+".join(arguments) or "ordinary",
)
@pytest.mark.parametrize("mask", [RANDOM, None], ids=["mask", "no mask"])
def test_it_equals_the_formula(states, arguments, mask):
    got, _ = folded_attention(SomeAttention(), *states, mask, **arguments)
    assert_close(got, formula(states, CAUSAL if mask is None else mask, **arguments))


def test_a_mask_that_is_added_equals_one_that_says_what_is_seen(states):
    added = torch.zeros(RANDOM.shape).masked_fill(~RANDOM, torch.finfo(torch.float32).min)
    for cap in (None, 0.5):
        expected = formula(states, RANDOM, softcap=cap)
        assert_close(folded_attention(SomeAttention(), *states, added, softcap=cap)[0], expected)


def test_without_a_mask_windows_and_direction_are_read_from_the_arguments(states):
    window = CAUSAL & ~torch.ones(TOKENS, EXTENT).tril(EXTENT - TOKENS - 2).bool()
    assert window[0, 0].sum(-1).tolist() == [2, 2, 2]
    assert_close(folded_attention(SomeAttention(), *states, None, sliding_window=2)[0], formula(states, window))
    everything = torch.ones(1, 1, TOKENS, EXTENT).bool()
    assert_close(folded_attention(SomeAttention(), *states, None, is_causal=False)[0], formula(states, everything))
    query, key, value = states
    last = folded_attention(SomeAttention(), query[:, :, -1:], key, value, None, sliding_window=2)[0]
    assert_close(last, formula(states, window)[:, -1:])


@pytest.mark.parametrize(
    "argument",
    [
        {"position_bias": torch.zeros(1)},
        {"head_mask": torch.ones(HEADS)},
        {"sinks": torch.zeros(HEADS)},
        {"indices": torch.zeros(1)},
        {"output_attentions": True},
        {"cu_seq_lens_q": torch.zeros(2)},
        {"invented_tomorrow": 1.0},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_an_unknown_argument_is_refused_with_family_and_name(states, argument):
    (name,) = argument
    with pytest.raises(UserError, match=f"SomeAttention gives its attention .* not supported: {name}"):
        folded_attention(SomeAttention(), *states, None, **argument)
    folded_attention(SomeAttention(), *states, None, **{name: None})


def test_dropout_is_refused(states):
    folded_attention(SomeAttention(), *states, None, dropout=0.0)
    with pytest.raises(UserError, match=r"SomeAttention drops 0\.1 of its attention"):
        folded_attention(SomeAttention(), *states, None, dropout=0.1)


def test_what_every_module_is_handed_is_no_argument_of_attention(states):
    expected = folded_attention(SomeAttention(), *states, RANDOM)[0]
    harmless = dict(position_ids=torch.zeros(2, TOKENS), use_cache=True, is_causal=True, output_attentions=False)
    with watch_attention() as calls:
        assert torch.equal(folded_attention(SomeAttention(), *states, RANDOM, scaling=None, **harmless)[0], expected)
    assert calls == [{"scaling": None, "softcap": None, "s_aux": None}]
