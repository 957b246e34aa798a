"""The check at load sees what differs from transformers: own modules run where replacements differ, or it refuses."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPTNeoXJapaneseConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import PackedLinear
from domino_spec.settings import UserError
from domino_spec.target import model as target_model
from domino_spec.target import native as fusing
from domino_spec.target.cache import ATTENTION_NAME, TargetCache, folded_attention, pass_mask
from domino_spec.target.check import Misfit, check_target, checked_target, read_reference
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from domino_spec.target.native import FusedAttention, FusedMLP
from tests.tiny import (
    ARCHITECTURES,
    as_target,
    plain_greedy,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
    tiny_target,
    word_tokenizer,
)

native = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")

SHAPE = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.25,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


def family(config_class: type[PreTrainedConfig], **specific) -> Target:
    """A random target of any family, its sinks and the gains of its norms far from neutral."""
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **specific})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.5)
    return Target(model.requires_grad_(False), None, "tiny")


def gpt_oss() -> Target:
    return family(GptOssConfig, sliding_window=7, num_local_experts=4, num_experts_per_tok=2)


def gemma2() -> Target:
    return family(Gemma2Config, sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=4)


def deepseek_v3() -> Target:
    latent = dict(kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, head_dim=8)
    latent["num_key_value_heads"] = 4
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=24)
    return family(DeepseekV3Config, **latent, **experts)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_targets_that_are_right_pass(kind, dtype, packed):
    target = as_target(tiny_model(kind).to(dtype))
    before = target.model.config.to_dict()
    reference = read_reference(target)
    if packed:
        target.pack()
    check_target(target, reference)
    assert target.no_features is None
    assert target.model.config._attn_implementation == ATTENTION_NAME
    assert target.model.config.to_dict() == before, "windows are as they were"


@pytest.mark.parametrize("make", [gpt_oss, gemma2])
def test_sinks_and_caps_are_honoured(make):
    target = make()
    reference = read_reference(target)
    check_target(target.pack(), reference)
    assert not any(isinstance(m, FusedAttention) for m in target.model.modules())


def ignoring(*names: str):
    """Our attention with a fault: it does not look at some arguments."""

    def attention(*arguments, **named):
        return folded_attention(*arguments, **{name: given for name, given in named.items() if name not in names})

    return attention


@pytest.fixture
def attention_with_a_fault():
    yield lambda *names: AttentionInterface.register(ATTENTION_NAME, ignoring(*names))
    AttentionInterface.register(ATTENTION_NAME, folded_attention)


@pytest.mark.parametrize(
    ("make", "ignored"), [(gpt_oss, "s_aux"), (gemma2, "softcap"), (gemma2, "scaling")], ids=["sink", "cap", "scale"]
)
def test_an_argument_that_attention_ignores_is_caught(make, ignored, attention_with_a_fault):
    target = make()
    reference = read_reference(target)
    attention_with_a_fault(ignored)
    with pytest.raises(Misfit, match=r"hidden states of .* differ"):
        check_target(target, reference)


def window_off_by_one(target: Target, monkeypatch) -> None:
    def off_by_one(lengths, num_tokens, extent, ancestors=None, window=None):
        return pass_mask(lengths, num_tokens, extent, ancestors, None if window is None else window + 1)

    monkeypatch.setattr(target_model, "pass_mask", off_by_one)


def ancestors_ignored(target: Target, monkeypatch) -> None:
    def chain(lengths, num_tokens, extent, ancestors=None, window=None):
        return pass_mask(lengths, num_tokens, extent, None, window)

    monkeypatch.setattr(target_model, "pass_mask", chain)


def norm_on_the_wrong_side(target: Target, monkeypatch) -> None:
    norm = target.layers[1].input_layernorm
    target.layers[1].register_forward_hook(lambda module, arguments, output: norm(output))


def other_rope(target: Target, monkeypatch) -> None:
    target.decoder.rotary_emb.inv_freq *= 1.01


def one_residual_scale_dropped(target: Target, monkeypatch) -> None:
    target.layers[2].residual_multiplier = 1.0


def keys_of_a_neighbour(target: Target, monkeypatch) -> None:
    update = TargetCache.update

    def mixed(cache, keys, values, layer, **others):
        return update(cache, keys.flip(0), values.flip(0), layer)

    monkeypatch.setattr(TargetCache, "update", mixed)


def logits_without_the_cap(target: Target, monkeypatch) -> None:
    target._softcap = None


def granite() -> Target:
    return family(GraniteConfig, residual_multiplier=0.5, logits_scaling=1.0, attention_multiplier=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "plant"),
    [
        (lambda: tiny_target("mistral", sliding_window=300), window_off_by_one),
        (lambda: tiny_target("gemma3"), window_off_by_one),
        (lambda: tiny_target("qwen3"), ancestors_ignored),
        (lambda: tiny_target("qwen3"), keys_of_a_neighbour),
        (lambda: tiny_target("llama"), norm_on_the_wrong_side),
        (granite, one_residual_scale_dropped),
        (lambda: tiny_target("gemma3", final_logit_softcapping=2.0), logits_without_the_cap),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_planted_fault_is_caught(make, plant, dtype, monkeypatch):
    target = make()
    target.model.to(dtype)
    reference = read_reference(target)
    check_target(target, reference)
    plant(target, monkeypatch)
    with pytest.raises(Misfit, match=r"tiny is not supported: the .* differ from transformers' own") as error:
        check_target(target, reference)
    assert "\n" not in str(error.value)


def test_a_slightly_wrong_rope_is_caught(monkeypatch):
    target = tiny_target("llama")
    reference = read_reference(target)
    other_rope(target, monkeypatch)
    with pytest.raises(Misfit):
        check_target(target, reference)


def test_layers_that_cannot_be_tapped_leave_decoding_without_drafts():
    target = tiny_target("llama")
    reference = read_reference(target)
    torch.manual_seed(0)
    others = [dataclasses.replace(o, layers=torch.randn_like(o.layers)) for o in reference.outputs]
    check_target(target, dataclasses.replace(reference, outputs=tuple(others)))
    assert "layers' outputs differ" in target.no_features
    tokens = torch.tensor(random_prompts([5]))
    assert target.forward(tokens, target.new_cache(1, 8)).features is None
    with pytest.raises(UserError, match="gives no features"):
        target.forward(tokens, target.new_cache(1, 8), (1,))
    with pytest.raises(UserError, match="decodes without a draft only"):
        tiny_draft(target)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@native
def test_replacements_that_differ_give_way_to_the_models_own_modules_with_one_warning(directory, monkeypatch, caplog):
    ordinary = FusedMLP.forward
    monkeypatch.setattr(FusedMLP, "forward", lambda self, x: 1.01 * ordinary(self, x))
    monkeypatch.setattr(fusing, "_agree", lambda *arguments: True)
    monkeypatch.setattr(target_model, "fused_layers", lambda *arguments: None)
    with caplog.at_level(logging.WARNING, "domino_spec"):
        target = load_target(directory, device="cpu")
    assert [record.getMessage().endswith("its own modules run instead, which is slower") for record in caplog.records]
    assert len(caplog.records) == 1
    kinds = {type(m) for m in target.model.modules()}
    assert PackedLinear in kinds and not kinds & {FusedMLP, FusedAttention}
    (prompt,) = random_prompts([9])
    assert run(target, PlainDecoding(), [prompt], 16)[0].token_ids == plain_greedy(tiny_model("llama"), prompt, 16)


@native
@pytest.mark.parametrize("name", ["past_key_values", "cache", "kept_rows"])
def test_the_cache_may_have_any_name(name):
    """transformers 5.24 renamed it; the next name is found too."""
    target = as_target(tiny_model("llama", head_dim=16))
    attention = target.layers[0].self_attn
    cache = target.new_cache(1, 8)
    cache.begin_pass(5)
    x, angles = torch.randn(1, 5, 32), torch.randn(1, 5, 16)
    options = {"rotary": (angles.cos(), angles.sin()), name: cache, "mask": torch.ones(1, 1, 5, 5).tril().bool()}
    got, _ = FusedAttention(attention)(x, **options)
    assert cache.keys[0].any(), "keys went to the cache"
    expected = FusedAttention(attention)(x, options["rotary"], options["mask"], cache)[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (deepseek_v3, "expected keys of 4 heads of 8, .* found 1 of 16 in layer 0: layers that cache other shapes"),
        (
            lambda: family(GPTNeoXJapaneseConfig, intermediate_multiple_size=2),
            "GPTNeoXJapaneseForCausalLM cannot be exchanged",
        ),
    ],
    ids=["other heads than the configuration says", "attention that does not come from transformers' table"],
)
def test_what_is_too_different_is_refused_in_one_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        checked_target(make, pack=False)
    assert "\n" not in str(error.value) and "tiny" in str(error.value)


def test_a_model_that_gives_no_numbers_is_refused():
    target = tiny_target("llama")
    target.layers[1].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite in float32"):
        read_reference(target)


def test_without_the_check_a_target_loads_as_it_is(directory, monkeypatch):
    monkeypatch.setattr("domino_spec.target.load.checked_target", lambda *arguments: pytest.fail("checked"))
    assert load_target(directory, device="cpu", check=False).packed == (cpu.library() is not None)


def test_attention_of_another_kind_is_refused_by_name(attention_with_a_fault):
    target = tiny_target("llama")

    def with_more(*arguments, **named):
        return folded_attention(*arguments, **named, position_bias=torch.ones(1))

    AttentionInterface.register(ATTENTION_NAME, with_more)
    with pytest.raises(UserError, match=r"LlamaAttention gives its attention .* not supported: position_bias"):
        checked_target(lambda: target, pack=False)


def test_a_configuration_without_a_length_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(target_model, "_LENGTHS", ("a_key_that_it_lacks",))
    with pytest.raises(UserError, match="how long a text may be"):
        Target(model, None, "tiny")


@native
def test_exact_decoding_refuses_experts():
    """Their products are PyTorch's own, whose result depends on the number of rows."""
    target = family(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32).pack()
    with pytest.raises(UserError, match="experts"):
        target.check_exact()
    family(LlamaConfig).pack().check_exact()
