"""Settings of a draft: its shape, its label convention, and what its published `config.json` may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from domino_spec.settings import Settings, require

DEFAULT_CANDIDATES = 128
"""K: how many of the best base logits the head corrects. Of the full vocabulary's best tokens along accepted prefixes
99.4% are among them, measured on the demo draft (docs/log.md)."""


@dataclass(frozen=True)
class HeadConfig(Settings):
    """The Domino head: a GRU over drafted tokens and a low-rank correction of the base logits (paper 4.1.2)."""

    gru_hidden_dim: int = 1024
    """G, width of the causal encoder's state."""
    low_rank: int = 256
    """L, width between W1 and W2; `emb_dim` in published configurations."""
    pure_draft_prefix_len: int = 1
    """How many of the first drafted tokens use the base logits alone."""

    def __post_init__(self) -> None:
        require(self.gru_hidden_dim >= 1, f"gru_hidden_dim must be at least 1, got {self.gru_hidden_dim}")
        require(self.low_rank >= 1, f"low_rank (emb_dim) must be at least 1, got {self.low_rank}")
        require(
            self.pure_draft_prefix_len >= 0,
            f"pure_draft_prefix_len must not be negative, got {self.pure_draft_prefix_len}",
        )


@dataclass(frozen=True)
class DraftConfig:
    """Everything that defines a draft's shape and its label convention (DESIGN section 4)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """V, size of the target's vocabulary (not of the draft vocabulary)."""
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    """Decoder layers of the target whose outputs are the features, counted from 0."""
    mask_token_id: int
    block_size: int = 16
    """B, slots of a block, the anchor's included."""
    shift_label: bool = False
    """True: slot k predicts the token one position later, so B slots draft. False: its own position, B - 1 draft."""
    short_blocks: bool = False
    """Whether it was trained on shorter blocks, too: where fewer drafts are asked for, the block then ends with the
    last of them. Otherwise all B slots are run, since attention inside a block is bidirectional."""
    last_tap_normed: bool = False
    """Whether the output of the target's last layer, where it is among the taps, is read after the target's final norm,
    as in the released code of DFlash and Domino. Drafts trained here read it as it is."""
    head: HeadConfig | None = None
    """None for a plain DFlash draft."""
    draft_vocab_size: int | None = None
    """Size of the frequent-token subset that the draft can propose; None for the whole vocabulary."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    """RoPE settings beyond theta, in the form transformers reads (`rope_type` and its parameters)."""
    max_position_embeddings: int = 32768
    target_fingerprint: str | None = None
    """Identifies the exact target weights that the draft was trained for; absent in published drafts."""
    published: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The configuration file as read, so that keys we do not know are written back."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        require(self.block_size >= 2, f"block_size must be at least 2, got {self.block_size}")
        require(self.num_hidden_layers >= 1, f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}")
        require(len(self.target_layer_ids) >= 1, "target_layer_ids must name at least one layer")
        for layer in self.target_layer_ids:
            require(
                0 <= layer < self.num_target_layers,
                f"target_layer_ids holds {layer}, but the target's layers are 0 to {self.num_target_layers - 1}",
            )
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}",
        )

    @property
    def reads_last_layer(self) -> bool:
        """Whether the target's last layer is among the taps."""
        return self.num_target_layers - 1 in self.target_layer_ids

    @property
    def max_drafts(self) -> int:
        """Drafted tokens in a full block: B with shifted labels, B - 1 without."""
        return self.block_size if self.shift_label else self.block_size - 1

    @property
    def first_draft_slot(self) -> int:
        """The slot whose hidden state predicts the first drafted token."""
        return 0 if self.shift_label else 1

    @property
    def logits_size(self) -> int:
        """Width of the draft's logits: the draft vocabulary where there is one, else V."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def feature_size(self) -> int:
        """Width of one token's features: tapped layers times hidden size."""
        return len(self.target_layer_ids) * self.hidden_size


@dataclass(frozen=True)
class SingleLayerConfig:
    """Shape of an EAGLE-3 or DART draft: one decoder layer over pairs of a token's embedding and a fused feature."""

    method: str
    """eagle3 or dart."""
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """V, size of the target's vocabulary (not of the draft vocabulary)."""
    target_hidden_size: int
    """Width of each of the target's tapped hidden states."""
    target_layer_ids: tuple[int, ...] | None = None
    """Decoder layers of the target whose outputs are the features; None where the checkpoint leaves them to the
    published rule (`feature_levels`), which needs the target's depth."""
    num_target_layers: int | None = None
    """Depth of the target; None where the checkpoint does not say."""
    block_size: int = 8
    """Drafts in a row that training teaches: EAGLE-3's training-time test steps; DART's `draft_length` + 1."""
    draft_vocab_size: int | None = None
    """Size of the frequent-token subset that the draft can propose; None for the whole vocabulary."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 32768
    target_fingerprint: str | None = None
    """Identifies the exact target weights that the draft was trained for; absent in published drafts."""
    published: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The configuration file as read, so that keys we do not know are written back."""

    def __post_init__(self) -> None:
        require(self.method in SINGLE_LAYER_METHODS, f"method must be eagle3 or dart, got {self.method!r}")
        _check_sizes(self)
        require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        ids, depth = self.target_layer_ids, self.num_target_layers
        require(
            ids is None or len(ids) == FEATURE_LEVELS,
            f"{self.method} fuses {FEATURE_LEVELS} layers of the target, target_layer_ids has {len(ids or ())}",
        )
        for layer in ids or ():
            require(
                layer >= 0 and (depth is None or layer < depth),
                f"target_layer_ids holds {layer}, but the target's layers are 0 to {(depth or 1) - 1}",
            )

    @property
    def max_drafts(self) -> int:
        """Drafted tokens of a block in training."""
        return self.block_size

    @property
    def head(self) -> None:
        """No Domino head."""
        return None

    @property
    def num_masks(self) -> int:
        """Masked positions behind the last real pair that one pass predicts from: DART's `draft_length`."""
        return self.block_size - 1 if self.method == "dart" else 0

    @property
    def logits_size(self) -> int:
        """Width of the draft's logits: the draft vocabulary where there is one, else V."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def feature_size(self) -> int:
        """Width of one token's features: tapped layers times the target's hidden size."""
        return FEATURE_LEVELS * self.target_hidden_size


def _check_sizes(config: DraftConfig | SingleLayerConfig) -> None:
    """Raise `UserError` where layers of these sizes cannot be built."""
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        require(getattr(config, name) >= 1, f"{name} must be at least 1, got {getattr(config, name)}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    require(
        config.head_dim >= 2 and config.head_dim % 2 == 0,
        f"head_dim must be even, since rotary embeddings turn pairs, got {config.head_dim}",
    )
    size = config.draft_vocab_size
    require(
        size is None or 1 <= size <= config.vocab_size,
        f"draft_vocab_size must be between 1 and {config.vocab_size}, got {size}",
    )


SINGLE_LAYER_METHODS = ("eagle3", "dart")


FEATURE_LEVELS = 3
"""A low, a middle and a high layer of the target."""


def feature_levels(num_target_layers: int) -> tuple[int, int, int]:
    """Decoder layers whose outputs EAGLE-3 and DART fuse, by the published rule: 36 layers give (1, 17, 32).

    EAGLE names them as inputs of layers 2, N // 2 and N - 3.
    """
    require(num_target_layers >= 5, f"a target of {num_target_layers} layers is too shallow for three feature levels")
    return 1, num_target_layers // 2 - 1, num_target_layers - 4


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Evenly spaced taps from layer 1 to `num_target_layers - 3`, one per draft layer (DFlash's rule).

    36 layers and 5 taps give (1, 9, 17, 25, 33); a single tap is the middle layer.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    require(
        last - first >= num_draft_layers - 1,
        f"a target of {num_target_layers} layers is too shallow for {num_draft_layers} evenly spaced taps; "
        "set target_layer_ids",
    )
    step = (last - first) / (num_draft_layers - 1)
    return tuple(round(first + i * step) for i in range(num_draft_layers))
