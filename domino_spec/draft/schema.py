"""What the `config.json` of a draft may say: keys that are read, with their types, and keys that are not.

A published configuration belongs to others. Keys that are read are checked for their types (`parse_settings`). A key
that changes what a draft computes, and that is not supported here, is refused by name unless its value changes nothing
(`refuse_unsupported`). All other keys are kept and written back; those that are not known to be harmless are named once
when the draft is loaded (`unknown_keys`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from domino_spec.draft.config import EXTRA_KEY, AnyConfig
from domino_spec.settings import Settings, UserError, distinct, found, parse_settings, require, shortened

K = TypeVar("K", bound=Settings)

Size = Annotated[int, Field(ge=1, le=2**20)]
"""One side of a matrix. No draft comes near the limit, which keeps absurd sizes from being allocated."""
Rows = Annotated[int, Field(ge=1, le=2**24)]
"""Tokens of a vocabulary."""
Slots = Annotated[int, Field(ge=1, le=1024)]
"""Slots of a block: a draft as long as the limit costs more than the target."""
LayerId = Annotated[int, Field(ge=0, le=4096)]
LayerIds = Annotated[tuple[LayerId, ...], Field(min_length=1, max_length=256), AfterValidator(distinct)]
LayerIdsOrRule = Annotated[
    tuple[LayerId, ...], Field(max_length=256), AfterValidator(lambda ids: distinct(ids) or None)
]
"""An empty list means that the key is left out: the layers are those of the published rule."""
Fingerprint = Annotated[str, Field(min_length=1, max_length=64)]
Positive = Annotated[float, Field(gt=0)]

BEFORE_NORM, AFTER_NORM = "before_norm", "after_norm"
"""Values of `last_layer_tap`: the output of the target's last layer as it is, or after the target's final norm."""


@dataclass(frozen=True, kw_only=True)
class LayerKeys(Settings):
    """Keys of the draft's decoder layers."""

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Annotated[int, Field(ge=1, le=4096)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=4096)] | None = None
    head_dim: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 1
    vocab_size: Rows
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    max_position_embeddings: Annotated[int, Field(ge=1)] = 32768
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    query_pre_attn_scalar: float | None = None

    def __post_init__(self) -> None:
        require(
            self.head_dim is not None or self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"missing key 'head_dim': hidden_size {self.hidden_size} does not give {self.num_attention_heads} heads of "
            "an even width",
        )
        kinds = sorted(set(self.layer_types) - {"full_attention"})
        require(not kinds, f"layer_types: expected full_attention alone, found {', '.join(map(repr, kinds))}")
        scale = self.query_pre_attn_scalar
        require(
            scale in (None, self.width),
            f"query_pre_attn_scalar: expected {self.width}, the width of a head, found {scale}",
        )

    def refuse_window(self, used_if_unsaid: bool) -> None:
        """Raise `UserError` if attention would be limited to a window.

        Args:
            used_if_unsaid: whether a window without `use_sliding_window` is used (Llama, Mistral) or not (Qwen3).
        """
        used = used_if_unsaid if self.use_sliding_window is None else self.use_sliding_window
        window = self.sliding_window if used else None
        require(window is None, f"sliding_window: expected null, found {window}; a draft attends to its whole context")

    @property
    def width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def shape(self) -> dict[str, Any]:
        """The fields of a `BaseConfig` that these keys give."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.width,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
        }


@dataclass(frozen=True)
class DFlashKeys(Settings):
    """The object `dflash_config`."""

    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    target_layer_ids: LayerIds | None = None
    shift_label: bool | None = None
    short_blocks: bool = False
    projector_type: str | None = None
    gru_hidden_dim: Size | None = None
    emb_dim: Size | None = None
    pure_draft_prefix_len: Annotated[int, Field(ge=0, le=1024)] | None = None
    draft_vocab_size: Rows | None = None
    target_fingerprint: Fingerprint | None = None
    last_layer_tap: Literal["before_norm", "after_norm"] | None = None


@dataclass(frozen=True, kw_only=True)
class BlockKeys(LayerKeys):
    """Keys of a DFlash or Domino draft."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=256)]
    num_target_layers: Annotated[int, Field(ge=1, le=4096)]
    block_size: Slots
    dflash_config: DFlashKeys


@dataclass(frozen=True)
class EagleKeys(Settings):
    """The object `eagle_config` of SGLang's form."""

    eagle_aux_hidden_state_layer_ids: LayerIdsOrRule | None = None


@dataclass(frozen=True)
class ExtraKeys(Settings):
    """The object `domino_spec` of EAGLE-3 and DART drafts made here."""

    target_layer_ids: LayerIds | None = None
    num_target_layers: Annotated[int, Field(ge=1, le=4096)] | None = None
    target_fingerprint: Fingerprint | None = None
    ttt_length: Slots | None = None


@dataclass(frozen=True)
class PairKeys(Settings):
    """Keys of an EAGLE-3 or DART draft, in addition to those of its layer."""

    draft_vocab_size: Rows | None = None
    draft_length: Slots | None = None
    target_hidden_size: Size | None = None
    target_layer_ids: LayerIds | None = None
    eagle_aux_hidden_state_layer_ids: LayerIdsOrRule | None = None
    eagle_config: EagleKeys = EagleKeys()
    domino_spec: ExtraKeys = ExtraKeys()


ROPE_NAMES = ("rope_parameters", "rope_scaling")
_NESTED: dict[str, type[Settings]] = {"dflash_config": DFlashKeys, "eagle_config": EagleKeys, EXTRA_KEY: ExtraKeys}
NESTED_LAYER = "transformer_layer_config"
"""Under this key, speculators keep the configuration of the layer; others have its keys at the top."""


def names_of(*classes: type[Settings]) -> set[str]:
    """Keys of these objects."""
    return {f.name for cls in classes for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def read_keys(cls: type[K], published: Mapping[str, Any], where: str) -> K:
    """The keys of `published` that `cls` has, typed; null counts as a key that is left out.

    Raises:
        UserError: a key is missing, or has a wrong type or range.
    """
    return parse_settings(cls, _known(cls, published), where)


def _known(cls: Any, published: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for f in dataclasses.fields(cls):
        value = published.get(f.name)
        nested = _NESTED.get(f.name)
        if value is not None:
            known[f.name] = _known(nested, value) if nested and isinstance(value, Mapping) else value
    return known


def published_layers(config: AnyConfig, dtype: str) -> dict[str, Any]:
    """What the `config.json` of a draft trained here says of its layers, in the keys of transformers' Llama or Qwen3.

    Args:
        config: of the draft.
        dtype: of its tensors.
    """
    return {
        "attention_bias": False,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def refuse_misplaced(
    misplaced: Mapping[str, Any], right: Mapping[str, Any], names: Iterable[str], where: str, belongs: str
) -> None:
    """Refuse keys in the wrong object, where they are not read, unless they repeat the right value.

    Args:
        misplaced: the object.
        right: where these keys are read.
        names: of the keys.
        where: the object, for messages.
        belongs: where they are read, for messages.

    Raises:
        UserError: names the key.
    """
    for name in sorted(names):
        value = misplaced.get(name)
        if value is not None and value != right.get(name):
            raise UserError(
                f"{where}: {name}: found {found(value)} here, but it is read {belongs}, where it is "
                f"{found(right.get(name))}; keep the right value, and only there"
            )


# RoPE.


@dataclass(frozen=True)
class RopeKeys(Settings):
    """Settings of rotary embeddings, as transformers names them."""

    rope_type: str | None = None
    type: str | None = None
    """Its older name."""
    rope_theta: Annotated[float, Field(gt=1)] | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Annotated[int, Field(ge=1)] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    mrope_section: tuple[int, ...] | None = None
    """How positions of pictures are spread; all are equal for text."""
    mrope_interleaved: bool | None = None
    finetuned: bool | None = None
    """Whether the model was trained with these settings."""

    def __post_init__(self) -> None:
        kind = self.kind
        kinds = {_SAME_KIND.get(name, name) for name in (self.rope_type, self.type) if name is not None}
        require(len(kinds) < 2, "rope_type and type differ")
        require(
            kind not in ROPES_OF_LENGTH,
            f"rope_type {kind!r} is not supported in a draft: its angles depend on the length of the text",
        )
        require(
            kind in ROPES, f"rope_type {shortened(kind)} is not supported in a draft; {', '.join(ROPES)} are supported"
        )
        needed, optional = ROPES[kind]
        for name in needed:
            require(getattr(self, name) is not None, f"missing key {name!r}, which rope_type {kind} needs")
        known = (*needed, *optional, *_WITHOUT_EFFECT.get(kind, ()), *_OF_EVERY_ROPE)
        for f in dataclasses.fields(self):
            require(f.name in known or getattr(self, f.name) is None, f"rope_type {kind} has no key {f.name!r}")
        require(
            kind != "default" or self.factor in (None, 1),
            f"factor: expected 1, since rope_type default does not scale, found {self.factor}",
        )
        if kind == "llama3":
            assert self.low_freq_factor is not None and self.high_freq_factor is not None
            require(
                self.low_freq_factor < self.high_freq_factor,
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}",
            )
        fast, slow = self.beta_fast or 32, self.beta_slow or 1
        require(fast > slow, f"beta_slow {slow} must be below beta_fast {fast}")

    @property
    def kind(self) -> str:
        """`rope_type` by either name; `mrope` is `default` for text."""
        name = self.rope_type or self.type or "default"
        return _SAME_KIND.get(name, name)

    def scaling(self) -> dict[str, Any] | None:
        """What transformers needs beyond theta; None for plain RoPE."""
        if self.kind == "default":
            return None
        needed, optional = ROPES[self.kind]
        numbers = {name: getattr(self, name) for name in (*needed, *optional)}
        return {"rope_type": self.kind, **{name: number for name, number in numbers.items() if number is not None}}


ROPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
"""Supported kinds of RoPE: the keys that each needs, and those that it may have."""
ROPES_OF_LENGTH = ("dynamic", "longrope", "su")
"""Kinds whose angles follow the longest position of a pass, so that cached keys would not fit later ones."""
_SAME_KIND = {"mrope": "default"}
"""Kinds that differ from another only for pictures, whose positions have several parts. A draft's have one."""
_WITHOUT_EFFECT = {
    "default": ("factor", "original_max_position_embeddings"),
    "linear": ("original_max_position_embeddings",),
}
"""Keys that some files have in addition to those in `ROPES`."""
_OF_EVERY_ROPE = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    *("mrope_section", "mrope_interleaved", "finetuned"),
)


@dataclass(frozen=True)
class _RopeFile(Settings):
    rope_parameters: RopeKeys | None = None
    rope_scaling: RopeKeys | None = None


def read_rope(published: Mapping[str, Any], where: str, default_theta: float | None) -> dict[str, Any]:
    """The RoPE of a draft as the fields `rope_theta` and `rope_scaling` of a `BaseConfig`.

    Args:
        published: the configuration, its top-level `rope_theta` already checked.
        where: for messages.
        default_theta: of the layout, if the file does not say it; None if it must.

    Raises:
        UserError: a setting is missing, wrong or contradicts another, or the kind is not supported.
    """
    theta, of_theta, scalings = published.get("rope_theta"), "rope_theta", []
    for name in ROPE_NAMES:
        keys = _rope_keys(published.get(name), name, where)
        if keys is None:
            continue
        scalings.append(keys.scaling())
        if None not in (theta, keys.rope_theta) and theta != keys.rope_theta:
            raise UserError(f"{where}: {of_theta} is {theta}, but {name}.rope_theta is {keys.rope_theta}")
        if theta is None:
            theta, of_theta = keys.rope_theta, f"{name}.rope_theta"
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ; keep the one that is right")
    theta = default_theta if theta is None else theta
    if theta is None:
        raise UserError(f"{where}: missing key 'rope_theta', the base of the draft's rotary embeddings; add it")
    return {"rope_theta": float(theta), "rope_scaling": scalings[0] if scalings else None}


def _rope_keys(value: Any, name: str, where: str) -> RopeKeys | None:
    """What `rope_parameters` or `rope_scaling` says of full attention; None if all of it is null or left out."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name}: expected mapping, found {found(value)}")
    settings: Any = value
    if any(isinstance(part, Mapping) for part in value.values()):  # one set per kind of attention
        settings = value.get("full_attention")
        if not isinstance(settings, Mapping):
            kinds = ", ".join(map(str, value))
            raise UserError(f"{where}: {name}: expected settings of full_attention, found those of {kinds}")
    given = {key: setting for key, setting in settings.items() if setting is not None}
    if not given:
        return None
    keys: RopeKeys | None = getattr(parse_settings(_RopeFile, {name: given}, where), name)
    return keys


# Keys that are not read.

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # projections
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "quantization_config": (),
    # activations and norms
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "norm_type": ("rms_norm", "rmsnorm"),
    "norm_eps": (),
    "layer_norm_eps": (),
    "layernorm_epsilon": (),
    # scales and caps
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scale": (1,),
    "logits_scaling": (1,),
    "lm_head_multiplier": (1,),
    "output_multiplier": (1,),
    "output_multiplier_scale": (1,),
    "embedding_multiplier": (1,),
    "embedding_multiplier_scale": (1,),
    "embedding_scale": (1,),
    "embed_scale": (1,),
    "scale_emb": (1,),
    "scale_embedding": (False,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "attention_scale": (),
    "softmax_scale": (),
    "clip_qkv": (),
    # positions and windows
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_dim": (),
    "rope_interleave": (False,),
    "rope_local_base_freq": (),
    "original_max_position_embeddings": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "attention_chunk_size": (),
    "alibi": (False,),
}
"""Keys that change what a draft computes, with the values besides null that do not."""
_BLOCK_NEUTRAL = {"is_causal": (False,), "causal": (False,), "use_qk_norm": (True,), "qk_norm": (True,)}
"""The block attends to all of itself, and queries and keys are normed."""
_PAIR_NEUTRAL = {
    "is_causal": (True,),
    "causal": (True,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "norm_before_residual": (False,),
    "norm_before_fc": (False,),
    "fc_norm": (False,),
    "norm_output": (False,),
}
_OF_EXPERTS = frozenset(
    {
        *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_layer_freq", "decoder_sparse_step"),
        *("first_k_dense_replace", "mlp_only_layers", "norm_topk_prob", "n_group", "topk_group", "topk_method"),
        *("scoring_func", "routed_scaling_factor", "output_router_logits", "router_aux_loss_coef"),
    }
)
"""Keys left over from a target with experts, without effect on a layer that has none. Drafts with experts are refused
by `model_type`, and their tensors as unexpected."""
_HARMLESS = frozenset(
    {
        *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
        *("attention_dropout", "attn_implementation", "initializer_range", "max_window_layers", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"),
        *("speculators_config", "speculators_model_type", "speculators_version"),
        *_OF_EXPERTS,
    }
)
_ALIKE = ("qwen3", "qwen2", "llama", "mistral")
"""Model types whose layers, given the same tensors, compute what a draft's do."""


def refuse_unsupported(published: Mapping[str, Any], where: str, *, block: bool) -> None:
    """Refuse what would change a draft's computation and is not followed here.

    Args:
        published: the configuration, or an object inside it.
        where: for messages.
        block: whether it is a DFlash or Domino draft's, else an EAGLE-3 or DART draft's.

    Raises:
        UserError: names the key, and which of its values are possible.
    """
    for key, allowed in {**_NEUTRAL, **(_BLOCK_NEUTRAL if block else _PAIR_NEUTRAL)}.items():
        value = published.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(json.dumps, allowed)) or "null"
            raise UserError(
                f"{where}: {key}: expected {expected}, found {found(value)}; it would change what the draft computes, "
                "and is not supported"
            )
    family = published.get("model_type")
    if isinstance(family, str) and family in CONFIG_MAPPING_NAMES and family not in _ALIKE:
        raise UserError(f"{where}: model_type: expected {' or '.join(_ALIKE)}, found {family!r}, whose layers differ")


def unknown_keys(published: Mapping[str, Any]) -> list[str]:
    """Keys that are neither read nor refused nor known to be harmless."""
    of_layer = names_of(LayerKeys) | set(ROPE_NAMES)
    if isinstance(published.get("dflash_config"), Mapping):
        objects = {"": names_of(BlockKeys, DFlashKeys) | of_layer, "dflash_config": names_of(BlockKeys, DFlashKeys)}
    else:
        objects = {"": names_of(PairKeys) | of_layer | {NESTED_LAYER}, NESTED_LAYER: of_layer}
        objects |= {"eagle_config": names_of(EagleKeys), EXTRA_KEY: names_of(ExtraKeys)}
    harmless = {*_NEUTRAL, *_BLOCK_NEUTRAL, *_PAIR_NEUTRAL, *_HARMLESS, *PreTrainedConfig().to_dict()}
    unknown = []
    for place, names in objects.items():
        keys = published.get(place, {}) if place else published
        left = (key for key, value in keys.items() if value is not None and key not in names | harmless)
        unknown += [f"{place}.{key}" if place else str(key) for key in left]
    return sorted(unknown)
