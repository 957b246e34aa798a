"""Settings of a draft, and how settings are read: frozen dataclasses that validate themselves.

A *recipe* (`recipe.py`) is ours, so an unknown key or a wrong type is an error that names the key. A *published draft
configuration* belongs to others, so keys that this package does not know are kept and written back unchanged (DESIGN:
checkpoints must load and save unchanged).
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

DEFAULT_CANDIDATES = 128
"""K: how many of the best base logits the head corrects. Of the full vocabulary's best tokens along accepted prefixes
99.4% are among them, measured on the demo draft (docs/log.md)."""

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


def cache_directory() -> Path:
    """Where converted models and compiled loops are kept: $DOMINO_SPEC_CACHE, else ~/.cache/domino-spec."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "domino-spec"
    return Path(os.environ.get("DOMINO_SPEC_CACHE", default))


def parse_settings(cls: type[T], values: object, where: str) -> T:
    """Build the dataclass `cls` from plain YAML/JSON `values`, refusing unknown keys and wrong types.

    Args:
        cls: a dataclass whose annotations are int, float, bool, str, tuples of those, optionals, or dataclasses.
        values: what the file held; must be a mapping.
        where: the path of keys so far, for the error text, such as ``recipe.yaml: training``.

    Raises:
        UserError: naming the key and what was expected.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in fields)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(fields))}")
    parsed = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in parsed:
            raise UserError(f"{where}: missing key {name!r}")
    try:
        return cls(**parsed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse_settings(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(inner, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads "6e-4" (no dot) as a string; people write learning rates that way.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is str and value is False:
        return "off"  # how YAML 1.1 reads that word without quotes
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class HeadConfig:
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
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        if self.draft_vocab_size is not None:
            require(
                1 <= self.draft_vocab_size <= self.vocab_size,
                f"draft_vocab_size must be between 1 and {self.vocab_size}, got {self.draft_vocab_size}",
            )

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
        require(self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
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
        if self.draft_vocab_size is not None:
            require(
                1 <= self.draft_vocab_size <= self.vocab_size,
                f"draft_vocab_size must be between 1 and {self.vocab_size}, got {self.draft_vocab_size}",
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
