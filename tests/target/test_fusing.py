"""Fused modules stand in only for what they equal, and make a token's logits independent of the pass it is in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from domino_spec.drafters.plain import PlainDecoding
from domino_spec.kernels import cpu
from domino_spec.target.fusing import FusedAttention, FusedMLP, FusedNorm, fuse
from tests.tiny import ARCHITECTURES, VOCAB, as_target, plain_greedy, random_prompts, run, tiny_model

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")

WIDE = dict(hidden_size=64, intermediate_size=96, head_dim=32, num_attention_heads=4, num_key_value_heads=2)


def wide_model(kind: str):
    """Wide enough for the processor's vectors; norms and biases far from their neutral start."""
    overrides = dict(WIDE, query_pre_attn_scalar=32) if kind == "gemma3" else WIDE
    model = tiny_model(kind, **overrides)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("bias"):
            nn.init.normal_(parameter, mean=0.8, std=0.3)
    return model


def kinds(module: nn.Module) -> set[type]:
    return {type(m) for m in module.modules()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_familiar_module_is_fused_and_the_text_stays(kind):
    model = wide_model(kind)
    target = as_target(model).pack()
    layer = target.layers[1]
    assert isinstance(layer.self_attn, FusedAttention) and isinstance(layer.input_layernorm, FusedNorm)
    assert isinstance(target.decoder.norm, FusedNorm)
    # Gemma's MLP is gated by another function than SiLU.
    assert isinstance(layer.mlp, FusedMLP) == (kind != "gemma3")
    prompts = random_prompts([7, 23])
    for prompt, generation in zip(prompts, run(target, PlainDecoding(), prompts, 24), strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, 24)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_verify_pass_gives_every_token_the_bits_of_a_plain_step(kind):
    target = as_target(wide_model(kind)).pack()
    prompts = torch.randint(0, VOCAB, (2, 30))
    lengths = torch.tensor([30, 17])
    drafts = torch.randint(0, VOCAB, (2, 9))
    together, alone = target.new_cache(2, 64), target.new_cache(2, 64)
    for cache in (together, alone):
        target.prefill(prompts, lengths, cache)
    expected = target.lm_head(target.forward(drafts, together).hidden)
    for i in range(drafts.shape[1]):
        step = target.lm_head(target.forward(drafts[:, i : i + 1], alone).hidden)
        assert torch.equal(step, expected[:, i : i + 1])
        alone.lengths += 1
    written = alone.lengths.max()
    assert torch.equal(alone.keys[..., :written, :][:, 0], together.keys[..., :written, :][:, 0])


class _Doubled(nn.Module):
    """Looks like a SwiGLU MLP, and is not."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(nn.functional.silu(2 * self.gate_proj(x)) * self.up_proj(x))


def test_what_only_looks_familiar_stays():
    model = wide_model("llama")
    layers = model.get_decoder().layers
    layers[0].mlp = _Doubled(layers[0].mlp)
    layers[1].input_layernorm = nn.LayerNorm(64)
    layers[2].self_attn.scaling *= 1.01  # fused with its own scale, so this one is fine
    fuse(model)
    assert type(layers[0].mlp) is _Doubled and type(layers[1].input_layernorm) is nn.LayerNorm
    assert isinstance(layers[2].self_attn, FusedAttention)
    assert {FusedAttention, FusedMLP, FusedNorm} <= kinds(model)


def test_narrow_modules_stay():
    model = tiny_model("llama", hidden_size=24, intermediate_size=20, num_attention_heads=4)
    assert fuse(model) == 0


@torch.inference_mode()
def test_attention_without_a_cache_or_with_an_additive_mask_still_works():
    model = wide_model("llama")
    attention = model.get_decoder().layers[0].self_attn
    fused = FusedAttention(attention)
    x, angles = torch.randn(1, 5, 64), torch.randn(1, 5, 32)
    rotary = (angles.cos(), angles.sin())
    seen = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~seen, -1e9)
    expected = attention(x, position_embeddings=rotary, attention_mask=seen)[0]
    for mask in (seen, additive, None):
        got = fused(x, position_embeddings=rotary, attention_mask=mask)[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
