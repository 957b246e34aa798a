"""The native loops against the PyTorch functions they stand for, and their bits against the number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from domino_spec.ops.native import bindings as cpu

needs_library = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
ROWS = [0, 1, 2, 5, 9, 12, 13, 40]
"""Below, at and above what one tile of rows holds."""


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@needs_library
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 200), (100, 7), (1, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_equals_pytorchs(rows, inputs, outputs, with_bias):
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if with_bias else None
    got = cpu.linear(x, cpu.pack(weight), outputs, cpu.pack_bias(bias) if bias is not None else None)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == (rows, outputs)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * inputs**0.5)


@needs_library
@pytest.mark.parametrize("rows", [2, 5, 9, 13, 40])
def test_a_row_of_a_product_has_the_same_bits_whatever_stands_beside_it(rows):
    x, panels = torch.randn(rows, 576), cpu.pack(torch.randn(72, 576))
    together = cpu.linear(x, panels, 72)
    assert all(torch.equal(cpu.linear(x[i], panels, 72), together[i]) for i in range(rows))


@needs_library
def test_a_product_does_not_need_contiguous_input():
    x, weight = torch.randn(64, 6).t(), torch.randn(10, 64)
    torch.testing.assert_close(cpu.linear(x, cpu.pack(weight), 10), F.linear(x, weight), rtol=1e-4, atol=1e-4)


@needs_library
def test_norms_equal_pytorchs():
    x, gain = torch.randn(2, 7, 96) * 30, torch.randn(96)
    torch.testing.assert_close(cpu.rms_norm(x, gain, 1e-5), F.rms_norm(x, (96,), gain, 1e-5))


@needs_library
def test_only_the_named_heads_are_normed():
    x, gain = torch.randn(2, 3, 5 * 32), torch.randn(32)
    expected = x.view(2, 3, 5, 32).clone()
    expected[:, :, 1:3] = F.rms_norm(expected[:, :, 1:3], (32,), gain, 1e-6)
    cpu.rms_norm_heads_(x, 1, 2, gain, 1e-6)
    torch.testing.assert_close(x.view(2, 3, 5, 32), expected)


@needs_library
@pytest.mark.parametrize("rotary", [64, 32, 12])
def test_rotation_equals_the_formula_and_spares_other_heads(rotary):
    x = torch.randn(2, 3, 4 * 64)
    angles = torch.randn(1, 3, rotary)
    cos, sin = angles.cos(), angles.sin()
    expected = x.view(2, 3, 4, 64).clone()
    turned = expected[:, :, :3, :rotary]
    left, right = turned.chunk(2, dim=-1)
    expected[:, :, :3, :rotary] = turned * cos[:, :, None] + torch.cat((-right, left), -1) * sin[:, :, None]
    cpu.rotate_(x, 3, 64, cos, sin)
    torch.testing.assert_close(x.view(2, 3, 4, 64), expected)


@needs_library
def test_swiglu_equals_pytorchs_over_the_whole_range():
    gate = torch.cat((torch.linspace(-120, 120, 479), torch.tensor([0.0]))).view(1, -1)
    up = torch.randn(1, 480)
    got = cpu.silu_mul(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(got, F.silu(gate) * up, rtol=1e-6, atol=1e-30)


@needs_library
@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("extent", [1, 31, 150])
def test_attention_equals_pytorchs(tokens, head_dim, extent):
    requests, heads, kv_heads, capacity = 2, 6, 2, 160
    joined = torch.randn(requests, tokens, heads + 3, head_dim)
    query = joined[:, :, :heads]
    keys, values = torch.randn(2, requests, kv_heads, capacity, head_dim)[..., :extent, :]
    mask = torch.rand(requests, 1, tokens, extent) < 0.6
    mask[..., 0] = True
    got = cpu.attend(query, keys, values, mask, 0.2)
    repeated = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
    expected = F.scaled_dot_product_attention(query.transpose(1, 2), *repeated, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@needs_library
def test_attention_of_a_token_has_the_same_bits_alone_and_in_a_pass():
    tokens, extent = 9, 77
    query = torch.randn(1, tokens, 4, 64)
    keys, values = torch.randn(2, 1, 2, 100, 64)
    mask = torch.ones(1, 1, tokens, extent, dtype=torch.bool).tril(extent - tokens)
    together = cpu.attend(query, keys[:, :, :extent], values[:, :, :extent], mask, 0.125)
    for i in range(tokens):
        seen = extent - tokens + i + 1
        alone = cpu.attend(
            query[:, i : i + 1], keys[:, :, :seen], values[:, :, :seen], mask[:, :, i : i + 1, :seen], 0.125
        )
        assert torch.equal(alone, together[:, i : i + 1])
