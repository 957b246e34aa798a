"""Fused modules stand in only for what they equal, and make a token's logits independent of the pass it is in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import FusedNorm
from domino_spec.target.native import FusedAttention, FusedMLP, fuse
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
    target = as_target(wide_model("llama"))
    model, layers = target.model, target.layers
    layers[0].mlp = _Doubled(layers[0].mlp)
    layers[1].input_layernorm = nn.LayerNorm(64)
    layers[2].self_attn.scaling *= 1.01  # fused with its own scale, so this one is fine
    target.pack()
    assert type(layers[0].mlp) is _Doubled and type(layers[1].input_layernorm) is nn.LayerNorm
    assert isinstance(layers[2].self_attn, FusedAttention)
    assert {FusedAttention, FusedMLP, FusedNorm} <= kinds(model)


def test_narrow_modules_stay():
    model = tiny_model("llama", hidden_size=12, intermediate_size=20, num_attention_heads=2)
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


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "gemma3"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_layersjoined_layers_give_the_bits_of_layers_one_after_another(kind, tree):
    target = as_target(wide_model(kind)).pack()
    one_step, lengths = target.joined_layers, torch.tensor([30, 17, 1])
    assert one_step is not None, "an ordinary decoder"
    prompts, drafts = torch.randint(0, VOCAB, (3, 30)), torch.randint(0, VOCAB, (3, 4))
    ancestors = torch.eye(4, dtype=torch.bool).expand(3, 4, 4).clone()
    ancestors[:, :, 0] = ancestors[0, 3, 1] = True  # all follow the first, and the last of a request its second
    passes, caches = [], []
    for step in (one_step, None):
        target.joined_layers = step
        cache = target.new_cache(3, 40)
        target.prefill(prompts, lengths, cache)
        passes.append(target.forward(drafts, cache, (2, 0, 3), ancestors if tree else None))
        caches.append(cache)
    assert torch.equal(passes[0].hidden, passes[1].hidden)
    assert torch.equal(passes[0].features, passes[1].features)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


@torch.inference_mode()
def test_a_request_that_has_ended_writes_nothing_beyond_its_cache():
    """A static cycle goes on with requests that have ended, whose rows may lie past the last."""
    target = as_target(wide_model("llama")).pack()
    drafts = torch.randint(0, VOCAB, (2, 4))
    caches = [target.new_cache(2, 16) for _ in range(2)]
    for cache, ended in zip(caches, (8, 14), strict=True):
        cache.lengths.copy_(torch.tensor([8, ended]))
    expected = target.forward(drafts, caches[0]).hidden[0]
    caches[1].fixed_extent = 16
    assert torch.equal(target.forward(drafts, caches[1]).hidden[0], expected)
    assert torch.equal(caches[1].keys[:, 0], caches[0].keys[:, 0])
    written = (caches[1].keys[:, 1] != 0).any(-1).any(1).all(0)  # rows of request 1
    assert written.tolist() == [False] * 14 + [True] * 2


@torch.inference_mode()
def test_layers_that_do_more_than_they_seem_to_run_one_after_another():
    model = wide_model("llama")
    target = as_target(model)
    layer = target.layers[2]
    ordinary = layer.forward
    layer.forward = lambda *arguments, **options: 2 * ordinary(*arguments, **options)
    tokens = torch.randint(0, VOCAB, (1, 6))
    expected = target.forward(tokens, target.new_cache(1, 8)).hidden
    target.pack()
    assert isinstance(layer.self_attn, FusedAttention) and target.joined_layers is None
    torch.testing.assert_close(target.forward(tokens, target.new_cache(1, 8)).hidden, expected, rtol=1e-4, atol=1e-4)
    assert as_target(wide_model("gemma3")).pack().joined_layers is None
