"""Settings of a draft: its shape and its label convention. Importing them loads neither PyTorch nor transformers.

There are four kinds of draft in two shapes: `domino` and `dflash` draft blocks (`DraftConfig`), `eagle3` and `dart`
have a single layer (`SingleLayerConfig`). Both answer the same questions, so callers need not ask which they have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from domino_spec.settings import Settings, UserError, require

_log = logging.getLogger(__name__)

DEFAULT_CANDIDATES = 128
"""K: how many of the best base logits the head corrects. Of the full vocabulary's best tokens along accepted prefixes
99.4% are among them, measured on the demo draft (docs/log.md)."""
SINGLE_LAYER_KINDS = ("eagle3", "dart")
FEATURE_LEVELS = 3
"""Layers of the target that EAGLE-3 and DART read: a low, a middle and a high one."""


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


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What drafts of every kind have."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """V, size of the target's vocabulary (not of the draft vocabulary)."""
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
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            f"head_dim must be even, since rotary embeddings turn pairs, got {self.head_dim}",
        )
        size = self.draft_vocab_size
        require(
            size is None or 1 <= size <= self.vocab_size,
            f"draft_vocab_size must be between 1 and {self.vocab_size}, got {size}",
        )

    @property
    def logits_size(self) -> int:
        """Width of the draft's logits: the size of the draft vocabulary if there is one, else V."""
        return self.draft_vocab_size or self.vocab_size


@dataclass(frozen=True, kw_only=True)
class DraftConfig(BaseConfig):
    """A Domino or DFlash draft: its shape and its label convention (docs/design.md, section 4)."""

    num_hidden_layers: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    """Decoder layers of the target whose outputs are the features, counted from 0."""
    mask_token_id: int
    block_size: int = 16
    """B, slots of a block, the anchor's included."""
    shift_label: bool = False
    """True: slot k predicts the token one position later, so B slots draft. False: its own position, B - 1 draft."""
    short_blocks: bool = False
    """Whether it was trained on shorter blocks, too. If fewer drafts are asked for, the block then ends with the last
    of them. Otherwise all B slots are run, since attention inside a block is bidirectional."""
    last_tap_normed: bool = False
    """Whether the output of the target's last layer, if it is tapped, is read after the target's final norm, as in the
    released code of DFlash and Domino. Drafts trained here read it as it is."""
    head: HeadConfig | None = None
    """None for a plain DFlash draft."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @cached_property
    def kind(self) -> str:
        """domino or dflash."""
        return "dflash" if self.head is None else "domino"

    @property
    def target_hidden_size(self) -> int:
        """Width of each of the target's tapped hidden states."""
        return self.hidden_size

    @property
    def last_layer_tap(self) -> str | None:
        """How `dflash_config` names the way in which the target's last layer is read; None if it is not tapped."""
        if self.num_target_layers - 1 not in self.target_layer_ids:
            return None
        return "after_norm" if self.last_tap_normed else "before_norm"

    @cached_property
    def max_drafts(self) -> int:
        """Drafted tokens in a full block: B with shifted labels, B - 1 without."""
        return self.block_size if self.shift_label else self.block_size - 1

    @cached_property
    def first_draft_slot(self) -> int:
        """The slot whose hidden state predicts the first drafted token."""
        return 0 if self.shift_label else 1

    @property
    def feature_size(self) -> int:
        """Width of one token's features: tapped layers times hidden size."""
        return len(self.target_layer_ids) * self.hidden_size

    @property
    def training_summary(self) -> str:
        """The draft in one line of a training report."""
        parts = [
            f"{self.num_hidden_layers} layers",
            f"blocks of {self.block_size}",
            f"{self.max_drafts} drafts ({'shifted' if self.shift_label else 'unshifted'} labels)",
            f"taps {' '.join(map(str, self.target_layer_ids))}",
        ]
        if self.last_layer_tap:
            parts[-1] += f" (the last {self.last_layer_tap.replace('_', ' its final ')})"
        if self.draft_vocab_size is not None:
            parts.append(f"draft vocabulary {self.draft_vocab_size}")
        if self.head is None:
            return ", ".join([*parts, "no head"])
        head, prefix = self.head, self.head.pure_draft_prefix_len
        return ", ".join(
            [*parts, f"head with GRU {head.gru_hidden_dim}, low rank {head.low_rank}, pure prefix {prefix}"]
        )

    @property
    def drafting_summary(self) -> str:
        """How it drafts, in one clause."""
        labels = "one position later" if self.shift_label else "of their own position"
        return (
            f"{self.num_hidden_layers} layers; {self.block_size} slots predict the token {labels}, so up to "
            f"{self.max_drafts} drafts a cycle"
        )

    def for_short_blocks(self) -> DraftConfig:
        """The configuration of the same draft, trained on shorter blocks too."""
        return replace(self, short_blocks=True)

    def tap_mismatch(self, num_layers: int) -> str | None:
        """Why it cannot read a target of `num_layers` layers, which is the number that it states: it can."""
        return None

    def check_readers(self, name: str) -> None:
        """What other readers of the published layout, who ignore our keys, would make of the draft.

        Args:
            name: of the draft, for messages.

        Raises:
            UserError: they would draft one slot late.
        """
        if self.head is None and self.shift_label:
            raise UserError(
                f"{name} has no head and shift_label true: readers of DFlash drafts ignore that key and would draft "
                "one slot late; train it with shift_label false"
            )
        if self.last_layer_tap == "before_norm":
            _log.warning(
                "%s reads layer %d, the target's last one, before its final norm (last_layer_tap); readers that do not "
                "know that key read it after the norm, and little of what they draft is accepted",
                name,
                self.num_target_layers - 1,
            )


@dataclass(frozen=True, kw_only=True)
class SingleLayerConfig(BaseConfig):
    """An EAGLE-3 or DART draft: one decoder layer over pairs of a token's embedding and a fused feature."""

    kind: str
    """eagle3 or dart."""
    target_hidden_size: int
    """Width of each of the target's tapped hidden states."""
    target_layer_ids: tuple[int, ...] | None = None
    """Decoder layers of the target whose outputs are the features. None if the checkpoint leaves them to the published
    rule (`feature_levels`), which needs the target's depth."""
    num_target_layers: int | None = None
    """Depth of the target; None if the checkpoint does not say."""
    block_size: int = 8
    """Drafts in a row that training teaches: EAGLE-3's training-time test steps; DART's `draft_length` + 1."""

    num_hidden_layers: ClassVar[int] = 1
    first_draft_slot: ClassVar[int] = 0
    head: ClassVar[None] = None
    shift_label: ClassVar[None] = None
    mask_token_id: ClassVar[None] = None
    last_layer_tap: ClassVar[None] = None
    last_tap_normed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.kind in SINGLE_LAYER_KINDS, f"kind must be eagle3 or dart, got {self.kind!r}")
        super().__post_init__()
        require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        ids, depth = self.target_layer_ids, self.num_target_layers
        require(
            ids is None or len(ids) == FEATURE_LEVELS,
            f"{self.kind} fuses {FEATURE_LEVELS} layers of the target, target_layer_ids has {len(ids or ())}",
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
    def num_masks(self) -> int:
        """Masked positions after the last real pair that one pass predicts from: DART's `draft_length`."""
        return self.block_size - 1 if self.kind == "dart" else 0

    @property
    def feature_size(self) -> int:
        """Width of one token's features: tapped layers times the target's hidden size."""
        return FEATURE_LEVELS * self.target_hidden_size

    @property
    def training_summary(self) -> str:
        """The draft in one line of a training report."""
        taps = " ".join(map(str, self.target_layer_ids or ()))
        vocabulary = "" if self.draft_vocab_size is None else f", draft vocabulary {self.draft_vocab_size}"
        return f"{self.kind}, {self.block_size} drafts in a row, taps {taps}{vocabulary}"

    @property
    def drafting_summary(self) -> str:
        """How it drafts, in one clause."""
        return f"one layer; trained for {self.max_drafts} drafts in a row"

    def for_short_blocks(self) -> SingleLayerConfig:
        """The same: it drafts as many tokens as are asked for."""
        return self

    def tap_mismatch(self, num_layers: int) -> str | None:
        """Why it cannot read a target of `num_layers` layers; None if it can."""
        try:
            deepest = max(self.target_layer_ids or feature_levels(num_layers))
        except UserError as error:
            return f"the draft reads three levels of the target's layers, but {error}"
        if deepest >= num_layers:
            return f"the draft reads layer {deepest}, the target's layers are 0 to {num_layers - 1}"
        if deepest == num_layers - 1 and self.published and EXTRA_KEY not in self.published:
            return (
                f"the draft reads layer {deepest}, the target's last one, and its config.json does not say whether "
                "before the final norm or after it"
            )
        return None

    def check_readers(self, name: str) -> None:
        """As of a `DraftConfig`: other readers use these drafts as they were trained."""


AnyConfig = DraftConfig | SingleLayerConfig

EXTRA_KEY = "domino_spec"
"""Key of the `config.json` of EAGLE-3 and DART drafts made here, for what their layouts have no key for."""


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
