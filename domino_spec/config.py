"""Settings of a draft, and the typed door that settings of every kind come through (`parse_settings`).

A *recipe* (`recipe.py`) is ours, so an unknown key or a wrong type is an error that names the key. A *published draft
configuration* belongs to others, so keys that this package does not know are kept and written back unchanged (DESIGN:
checkpoints must load and save unchanged).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import reprlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

DEFAULT_CANDIDATES = 128
"""K: how many of the best base logits the head corrects. Of the full vocabulary's best tokens along accepted prefixes
99.4% are among them, measured on the demo draft (docs/log.md)."""


class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


def cache_directory() -> Path:
    """Where converted models and compiled loops are kept: $DOMINO_SPEC_CACHE, else ~/.cache/domino-spec."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "domino-spec"
    return Path(os.environ.get("DOMINO_SPEC_CACHE", default))


class Settings:
    """Base of the dataclasses that are read from files: pydantic checks them in `parse_settings`, and only there.

    Inside the program they are ordinary dataclasses, with `__post_init__` for what one annotation cannot say.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)

_EXPECTED = {
    "int_type": "integer",
    "float_type": "number",
    "finite_number": "finite number",
    "bool_type": "true or false",
    "string_type": "string",
    "tuple_type": "list",
    "mapping_type": "mapping",
    "dict_type": "mapping",
    "dataclass_type": "mapping of settings",
    "too_short": "list of at least {min_length}",
    "too_long": "list of at most {max_length}",
    "string_too_short": "string of at least {min_length} characters",
    "string_too_long": "string of at most {max_length} characters",
}
"""Pydantic's kinds of error, in the words of YAML and JSON; limits in braces."""


def parse_settings(cls: type[S], values: object, where: str) -> S:
    """Build the dataclass `cls` from what a YAML or JSON file held; refuse unknown keys, wrong types and wrong ranges.

    Lists become tuples and whole numbers become floats where `cls` asks for them; nothing else is converted.

    Args:
        cls: a dataclass over `Settings`; its annotations may carry constraints (`Annotated[int, Field(ge=1)]`).
        values: what the file held.
        where: what is read, for the error text, such as the file's path.

    Raises:
        UserError: one line with the key, what was found and what was expected.
    """
    try:
        for key, number in _integers(values, ""):
            if number.bit_length() > 63:  # what tensors hold; Python itself refuses to write much longer ones
                bits = number.bit_length()
                raise UserError(f"{where}: {key}: expected integer of at most 64 bits, found one of {bits + 1} bits")
        text = json.dumps(values, default=str)  # strict validation takes lists for tuples in JSON alone
    except (TypeError, RecursionError):
        raise UserError(f"{where}: expected plain settings, found keys of other kinds or endless nesting") from None
    try:
        return _adapter(cls).validate_json(text)  # type: ignore[arg-type,no-any-return]
    except ValidationError as error:
        # A misspelt key is unknown, and its right name missing: the first says more.
        first = {"unexpected_keyword_argument": 0, "missing": 1}
        worst = min(error.errors(include_url=False), key=lambda one: first.get(one["type"], 2))
        raise UserError(f"{where}: {_describe(worst, cls, json.loads(text))}") from None


@functools.cache
def _adapter(cls: type[Settings]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _integers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _integers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _integers(item, f"{key}[{index}]")


def _describe(error: ErrorDetails, cls: type[Settings], values: object) -> str:
    """One of pydantic's errors about `values` as `key: expected this, found that`."""
    kind, path = error["type"], _keys(error["loc"], error["type"], values)
    if kind == "unexpected_keyword_argument":
        known = ", ".join(sorted(f.name for f in dataclasses.fields(_class_at(cls, path[:-1]))))
        return f"{_prefix(path[:-1])}unknown key {shortened(path[-1])}; known keys are {known}"
    if kind == "missing":
        return f"{_prefix(path[:-1])}missing key {path[-1]!r}"
    if kind == "value_error":  # raised by `__post_init__` or a validator
        return f"{_prefix(path)}{error['ctx']['error']}"
    if kind == "json_invalid":  # such as a half of a surrogate pair
        return f"not valid text: {error['ctx']['error']}"
    expected = _EXPECTED.get(kind, "").format(**error.get("ctx", {})) or error["msg"].removeprefix("Input should be ")
    return f"{_prefix(path)}expected {expected}, found {found(error['input'])}"


def _keys(path: tuple[int | str, ...], kind: str, values: Any) -> tuple[int | str, ...]:
    """The keys and indices of one of pydantic's paths, which also names the members of unions that it tried."""
    keys: list[int | str] = []
    part: Any
    for part in path:
        if isinstance(values, list if isinstance(part, int) else dict) and (isinstance(part, int) or part in values):
            values = values[part]
        elif kind != "missing" or part != path[-1]:
            continue
        keys.append(part)
    return tuple(keys)


def _prefix(path: tuple[int | str, ...]) -> str:
    """`training.trackers[1]: `, or nothing for the whole file."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{key}: " if key else ""


def _class_at(cls: Any, path: tuple[int | str, ...]) -> Any:
    """The dataclass that stands under the keys `path` of `cls`."""
    for name in path:
        hint = typing.get_type_hints(cls)[str(name)]
        cls = next(c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c))
    return cls


def found(value: object) -> str:
    """A value from a file for an error text, with its type: `'x' (str)`."""
    return "null" if value is None else f"{shortened(value)} ({type(value).__name__})"


def shortened(value: object) -> str:
    """`value` as Python writes it, on one line and cut where it is long or deep."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    """`values`; raises `UserError` where one of them stands twice."""
    require(len(set(values)) == len(values), f"expected each only once, found {shortened(list(values))}")
    return values


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
