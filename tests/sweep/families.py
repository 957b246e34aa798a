"""Every causal LM family of the installed transformers as a tiny random model that hides nothing.

Sizes are given by key: `SIZES` holds what most configurations call alike, `FAMILIES` what one family needs or has of its
own. Whatever changes the mathematics is switched on: sinks, caps, scales and multipliers are not neutral, windows are
shorter than the texts, layers of several kinds are mixed, experts are routed, biases and the gains of norms are random.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 60
WINDOW = 5
LAYERS = 4
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    d_model=32,
    n_embd=32,
    intermediate_size=48,
    ffn_dim=48,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    n_inner=48,
    num_hidden_layers=LAYERS,
    num_layers=LAYERS,
    encoder_layers=1,
    decoder_layers=LAYERS,
    n_layer=LAYERS,
    n_layers=LAYERS,
    num_attention_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    attention_heads=4,
    num_heads=4,
    n_head=4,
    n_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    n_positions=128,
    n_ctx=128,
    attention_bias=True,
    mlp_bias=True,
    # mixture of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_shared_experts=1,
    num_shared_experts=1,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    shared_intermediate_size=24,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.7,
    first_k_dense_replace=1,
    # latent attention
    kv_lora_rank=16,
    q_lora_rank=12,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
    # what changes the mathematics
    sliding_window=WINDOW,
    final_logit_softcapping=2.0,
    attn_logit_softcapping=3.0,
    logits_soft_cap=2.0,
    query_pre_attn_scalar=5,
    logit_scale=0.7,
    logits_scaling=1.6,
    residual_multiplier=0.6,
    embedding_multiplier=3.0,
    attention_multiplier=0.4,
    qk_layernorm=True,
    use_qk_norm=True,
    use_qkv_bias=True,
    qkv_bias=True,
    use_bias=True,
    scale_embedding=True,
    # no token has a meaning of its own
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
"""Values of the keys that a configuration has, whatever its family."""

FAMILIES: dict[str, dict[str, Any]] = {}
"""What one family needs beyond `SIZES`; a key set to `DEFAULT` keeps the family's own value."""

DEFAULT = object()


def families() -> list[str]:
    """Names of all causal LM families, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(family: str) -> str:
    """The class that transformers makes of a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a family."""
    config_class = CONFIG_MAPPING[family]
    keys = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in SIZES.items() if key in keys} | FAMILIES.get(family, {})
    return config_class(**{key: value for key, value in values.items() if value is not DEFAULT})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of a family in float32, every weight random and far from its neutral start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Random weights that are large enough for texts to vary and for every part to matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        *model.named_parameters(),
        *((name, b) for name, b in model.named_buffers() if name in model.state_dict()),
    ]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "sink" in name:
            tensor.copy_(1 + noise)
        elif tensor.dim() < 2 or "norm" in name or "A_log" in name:
            tensor.add_(0.3 * noise)
        elif "embed" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
