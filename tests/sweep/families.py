"""Every causal LM family of the installed transformers as a tiny random model that hides nothing.

`SIZES` holds values of keys that many families have, `FAMILIES` what one needs beyond that. Whatever changes the
mathematics is switched on: sinks, caps, scales and multipliers are not neutral, windows are shorter than the texts,
layers of several kinds are mixed, experts are routed, biases and the gains of norms are random.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 60
WINDOW = 5
LAYERS = 4
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    unpadded_vocab_size=VOCAB,
    hidden_size=32,
    d_model=32,
    n_embd=32,
    emb_dim=32,
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
    use_sliding_window=True,
    index_topk=4,
    index_block_size=2,
    index_topk_blocks=1,
    clip_qkv=2.0,
    mup_enabled=True,
    swiglu_limit=1.0,
    route_scale=1.7,
    router_scaling_factor=1.7,
    moe_routed_scaling_factor=1.7,
    moe_router_logit_softcapping=2.0,
    lm_head_bias=True,
    attention_out_bias=True,
    index_head_dim=8,
    index_n_heads=2,
    final_logit_softcapping=10.0,
    attn_logit_softcapping=3.0,
    logits_soft_cap=10.0,
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
    # vision and audio parts, which no text reaches
    depth=1,
    num_channels=3,
    image_size=28,
    patch_size=14,
    # no token has a meaning of its own
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
"""Values of the keys that a configuration has, whatever its family."""

DEFAULT = object()
"""Keeps the family's own value of a key that `SIZES` has."""

PARTS = dict(
    vision_config="siglip_vision_model", audio_config="whisper", audio_encoder="encodec", audio_encoder_config="mimi"
)
"""Which model a part of a family is, where its configuration leaves that open."""

_LATENT = dict(num_key_value_heads=4)
"""Latent attention (MLA) has as many key heads as query heads."""
_SLIDING_LATENT = dict(
    num_key_value_heads=4,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=12,
    swa_kv_lora_rank=16,
    swa_head_dim=20,
    swa_qk_nope_head_dim=12,
    swa_v_head_dim=10,
)
"""The same again for layers with a window."""
_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8)
_INDEXER = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=4, indexer_compress_ratio=2)
_INPUT_PER_LAYER = dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
_DECODER = dict(is_decoder=True)
"""Encoders that are causal only when told."""
_ENCODER_TOO = dict(encoder_layers=LAYERS)
"""Families that count the decoder's layers by the encoder's."""
_IDS = dict(bos_token_id=1, eos_token_id=2)
"""Families that put numbers beyond the vocabulary where these are left out."""
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_TWO_ROPES = {
    kind: dict(rope_type="default", rope_theta=base) for kind, base in zip(MIXED[:2], (1e3, 1e4), strict=True)
}
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e3,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = dict(rope_type="yarn", rope_theta=1e3, factor=4.0, original_max_position_embeddings=16)
_DYNAMIC = dict(rope_type="dynamic", rope_theta=1e3, factor=4.0)
_LONG = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0 + 0.1 * i for i in range(4)],
    long_factor=[2.0 + i for i in range(4)],
    original_max_position_embeddings=16,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": dict(num_key_value_heads=4, layer_types=_HYBRID),
    "bamba": _MAMBA | dict(attn_layer_indices=[1, 3]),
    "bart": _ENCODER_TOO,
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": dict(is_decoder=True, attention_type="original_full"),
    "bigbird_pegasus": dict(encoder_layers=LAYERS, attention_type="original_full"),
    "blenderbot": _ENCODER_TOO,
    "blenderbot-small": _ENCODER_TOO,
    "blt": dict(encoder_hash_byte_group_vocab=VOCAB),
    "camembert": _DECODER,
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(rope_parameters=_TWO_ROPES),
    "cpmant": dict(dim_head=8, dim_ff=48, prompt_length=2, position_bias_num_buckets=32),
    "ctrl": dict(dff=48),
    "cwm": _IDS,
    "data2vec-text": _DECODER,
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=2.0, rope_theta=1e4), ffn_config=dict(ffn_hidden_size=48, moe_top_k=2)
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dory": dict(n_input_layers=1, n_output_layers=1),
    "dots3_note": dict(
        text_config=_SLIDING_LATENT,
        vision_config=dict(num_hidden_layers=DEFAULT, adapter_in_dim=32, adapter_out_dim=32, mlp_bias=False),
        audio_config=dict(adapter_input_size=32, adapter_out_dim=32),
    ),
    "dots3_note_text": _SLIDING_LATENT,
    "electra": dict(is_decoder=True, embedding_size=32),
    "emu3": dict(text_config=_IDS),
    "ernie": _DECODER,
    "fuyu": dict(text_config=dict(model_type="persimmon")),
    # The composite class leaves out the cap of logits that its text configuration has.
    "gemma3": dict(text_config=dict(final_logit_softcapping=None)),
    "gemma3n_text": _INPUT_PER_LAYER | dict(laurel_rank=4),
    "gemma4": dict(text_config=_INPUT_PER_LAYER),
    "gemma4_text": _INPUT_PER_LAYER,
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)),
    "gemma4_unified": dict(vision_config=dict(mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=8)),
    "gemma4_unified_assistant": dict(text_config=dict(num_kv_shared_layers=DEFAULT)),
    "glm": _IDS,
    "glm4": _IDS,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "got_ocr2": dict(text_config=dict(model_type="qwen2")),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": _MAMBA | dict(layer_types=_HYBRID),
    "helium": dict(head_dim=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(num_key_value_heads=4, layer_types=_HYBRID, linear_num_heads=4, linear_head_dim=8),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(
        num_key_value_heads=4, head_dim=8, ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=2
    ),
    "mamba2": dict(head_dim=16, n_groups=2, state_size=8, chunk_size=8),
    "marian": _ENCODER_TOO,
    "mbart": _ENCODER_TOO,
    "megatron-bert": _DECODER,
    "minicpm3": _LATENT,
    "mllama": dict(text_config=_IDS),
    "modernbert-decoder": _IDS,
    "mvp": _ENCODER_TOO,
    "pegasus": _ENCODER_TOO,
    "phi4_multimodal": _IDS,
    "plbart": _ENCODER_TOO,
    "prophetnet": dict(
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
    "qwen4_exp": dict(text_config=_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "reformer": dict(
        is_decoder=True,
        attention_head_size=8,
        axial_pos_shape=(8, 16),
        axial_pos_embds_dim=(16, 16),
        feed_forward_size=48,
    ),
    "rembert": dict(is_decoder=True, input_embedding_size=32, output_embedding_size=32),
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": dict(
        is_decoder=True,
        pronunciation_vocab_size=VOCAB,
        shape_vocab_size=VOCAB,
        pronunciation_embed_dim=32,
        shape_embed_dim=32,
    ),
    "roformer": dict(is_decoder=True, embedding_size=32),
    "sarvam_mla": _LATENT,
    "whisper": _ENCODER_TOO,
    "xlm": dict(emb_dim=32),
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": dict(d_inner=48),
    "xlstm": dict(hidden_size=64),
    "xmod": dict(is_decoder=True, default_language="en_XX"),
    "youtu": _LATENT,
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"] * 2, mamba_d_state=8, chunk_size=8),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=16),
}
"""What one family needs beyond `SIZES`."""


NOT_TRIED = {
    "gemma3n": "its image part needs the library timm",
    "gemma4_assistant": "is a draft for Gemma 4 that reads its target's cache, and writes no text alone",
    "gemma4_unified_assistant": "is a draft for Gemma 4 that reads its target's cache, and writes no text alone",
    "musicgen": "`AutoModelForCausalLM` cannot make it from its own configuration",
    "musicgen_melody": "`AutoModelForCausalLM` cannot make it from its own configuration",
}
"""Families that cannot be built alone, and why."""


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite (logits_scaling 1)": ("granite", dict(logits_scaling=1.0)),
    "granitemoe_swa (logits_scaling 1)": (
        "granitemoe_swa",
        dict(logits_scaling=1.0, layer_rope_theta=[1e3, 0, 1e4, 1e3]),
    ),
    "cohere (logit_scale 1)": ("cohere", dict(logit_scale=1.0)),
    "cohere2 (logit_scale 1)": ("cohere2", dict(logit_scale=1.0)),
    "llama (tied embeddings)": ("llama", dict(tie_word_embeddings=True)),
    "qwen3 (no windows)": ("qwen3", dict(use_sliding_window=False, sliding_window=None, layer_types=None)),
    "qwen2 (windows from layer 2 on)": ("qwen2", dict(layer_types=None, max_window_layers=2)),
    "gemma2 (no caps)": ("gemma2", dict(attn_logit_softcapping=None, final_logit_softcapping=None)),
    "stablelm (parallel residual)": ("stablelm", dict(use_parallel_residual=True)),
    "gpt_neox (sequential residual)": ("gpt_neox", dict(use_parallel_residual=False)),
    "deepseek_v3 (no rank of queries)": ("deepseek_v3", dict(q_lora_rank=None)),
    "llama (rope llama3)": ("llama", dict(rope_parameters=_LLAMA3)),
    "llama (rope yarn)": ("llama", dict(rope_parameters=_YARN)),
    "llama (rope dynamic)": ("llama", dict(rope_parameters=_DYNAMIC, max_position_embeddings=16)),
    "phi3 (rope longrope)": ("phi3", dict(rope_parameters=_LONG, original_max_position_embeddings=16)),
    "phi3 (rope longrope, within its context)": (
        "phi3",
        dict(rope_parameters=_LONG | dict(original_max_position_embeddings=64), original_max_position_embeddings=64),
    ),
    "lfm2 (attention only)": ("lfm2", dict(layer_types=["full_attention"] * 4)),
    "opt (norms after)": ("opt", dict(do_layer_norm_before=False)),
    "phi3 (no windows)": ("phi3", dict(sliding_window=None)),
    "phi3 (partial rotary)": (
        "phi3",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    ),
}
"""Families a second time, with other settings. Texts of 31 and 36 tokens cross an original context of 16."""


def families() -> list[str]:
    """Names of all causal LM families, sorted, then of variants of those that the installed transformers has."""
    return [
        *sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        *(name for name in VARIANTS if _family(name) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ]


def class_name(family: str) -> str:
    """The class that transformers makes of a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_family(family)]


def _family(name: str) -> str:
    return VARIANTS[name][0] if name in VARIANTS else name


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a tiny model of a family or variant."""
    own = _family(family)
    config_class = CONFIG_MAPPING[own]
    specific = FAMILIES.get(own, {}) | (VARIANTS[family][1] if family in VARIANTS else {})
    config = config_class(**_values(config_class, specific))
    config.architectures, config.dtype = [class_name(family)], torch.float32
    return config


def _values(config_class: type[PreTrainedConfig], specific: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration: those of `SIZES` that it has, those of its parts, and `specific` over both."""
    keys = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in SIZES.items() if key in keys}
    if "layer_types" in keys and "sliding_window" in keys and _alternates(config_class):
        values["layer_types"] = MIXED
    for key, part_class in config_class.sub_configs.items():
        part = dict(specific.get(key, {}))
        if part_class is AutoConfig:
            part_class = CONFIG_MAPPING[part.pop("model_type", None) or _part_type(config_class, key)]
        values[key] = _values(part_class, part) | {"model_type": part_class.model_type}
    values |= {key: value for key, value in specific.items() if key not in config_class.sub_configs}
    return {key: value for key, value in values.items() if value is not DEFAULT}


def _alternates(config_class: type[PreTrainedConfig]) -> bool:
    """Whether a family's layers are told apart as those with a window and those without."""
    return set(config_class().layer_types or ()) <= set(MIXED)


def _part_type(config_class: type[PreTrainedConfig], key: str) -> str:
    """The model type of a part that may be of any."""
    default = getattr(config_class, "sub_configs_defaults", {}).get(key)
    return getattr(default, "model_type", None) or PARTS[key]


@dataclass(frozen=True)
class Weights:
    """How large random weights are. Models differ in what makes their texts vary instead of repeating one token."""

    attention: float
    """Gain of matrices. More than 2 makes attention pick few tokens, and rounding grow from layer to layer."""
    feed_forward: float
    """Gain of the matrices of feed-forward blocks; plain ones (GELU) forget what they read if it is large."""
    bias: float
    tied: float
    """Size of embeddings that the LM head shares: large ones make every token repeat itself."""


WEIGHTS = (Weights(1.5, 1.5, 0.3, 0.1), Weights(3.0, 1.0, 0.1, 0.3), Weights(6.0, 1.0, 0.1, 0.3))
"""What to try, the gentlest first."""
_FEED_FORWARD = re.compile(r"fc|mlp|intermediate|feed_forward|ffn|(?<!attention\.)output\.dense")


def tiny_model(family: str, seed: int = 0, weights: Weights = WEIGHTS[0]) -> PreTrainedModel:
    """A model of a family in float32, every weight random and far from its neutral start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    randomise(model, seed, weights)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int, weights: Weights) -> None:
    """Random weights that are large enough for texts to vary and for every part to matter."""
    generator = torch.Generator().manual_seed(seed)
    tied = getattr(model.config, "tie_word_embeddings", False)
    kept = model.state_dict()
    tensors = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        norm = "norm" in name.lower() or "ln_" in name
        if "sink" in name:
            tensor.copy_(1 + noise)
        elif tensor.dim() < 2 or norm or "A_log" in name:
            tensor.add_((0.3 if norm else weights.bias) * noise)
        elif "embed" in name or "wte" in name:
            tensor.copy_((weights.tied if tied else 1.0) * noise)
        else:
            gain = weights.feed_forward if _FEED_FORWARD.search(name) else weights.attention
            tensor.copy_(gain * noise / tensor.shape[-1] ** 0.5)
