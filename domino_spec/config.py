"""Settings of a draft and of a training recipe: frozen dataclasses that validate themselves.

Two kinds of file are read here and they are treated differently on purpose. A *recipe* is ours, so an unknown key
or a wrong type is an error that names the key. A *published draft configuration* belongs to others, so keys that
this package does not know are kept and written back unchanged (DESIGN: checkpoints must load and save unchanged).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

DEFAULT_CANDIDATES = 128
"""K: how many of the best base logits the head corrects. Of the full vocabulary's best tokens along accepted prefixes
99.4% are among them, measured on the demo draft (docs/log.md)."""

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


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
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _require(condition: bool, message: str) -> None:
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
        _require(self.gru_hidden_dim >= 1, f"gru_hidden_dim must be at least 1, got {self.gru_hidden_dim}")
        _require(self.low_rank >= 1, f"low_rank (emb_dim) must be at least 1, got {self.low_rank}")
        _require(
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
    head: HeadConfig | None = None
    """None for a plain DFlash draft."""
    draft_vocab_size: int | None = None
    """Size of the frequent-token subset that the draft can propose; None for the whole vocabulary."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    """RoPE settings beyond theta, in the form transformers reads (`rope_type` and its parameters)."""
    max_position_embeddings: int = 32768
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    target_fingerprint: str | None = None
    """Identifies the exact target weights that the draft was trained for; absent in published drafts."""
    published: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The configuration file as read, so that keys we do not know are written back."""

    def __post_init__(self) -> None:
        _require(self.block_size >= 2, f"block_size must be at least 2, got {self.block_size}")
        _require(self.num_hidden_layers >= 1, f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}")
        _require(len(self.target_layer_ids) >= 1, "target_layer_ids must name at least one layer")
        for layer in self.target_layer_ids:
            _require(
                0 <= layer < self.num_target_layers,
                f"target_layer_ids holds {layer}, but the target's layers are 0 to {self.num_target_layers - 1}",
            )
        _require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        if self.draft_vocab_size is not None:
            _require(
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


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Evenly spaced taps from layer 1 to `num_target_layers - 3`, one per draft layer (DFlash's rule).

    36 layers and 5 taps give (1, 9, 17, 25, 33); a single tap is the middle layer.
    """
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    _require(
        last - first >= num_draft_layers - 1,
        f"a target of {num_target_layers} layers is too shallow for {num_draft_layers} evenly spaced taps; "
        "set target_layer_ids",
    )
    step = (last - first) / (num_draft_layers - 1)
    return tuple(round(first + i * step) for i in range(num_draft_layers))


@dataclass(frozen=True)
class DraftRecipe:
    """The draft to train. What is left out is taken from the target."""

    block_size: int = 16
    num_layers: int = 5
    mask_token_id: int | None = None
    """A token that the target's tokenizer reserves and never produces; needed where it has no mask token."""
    target_layer_ids: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    shift_label: bool = True
    head: HeadConfig | None = field(default_factory=HeadConfig)
    """null trains a plain DFlash draft."""
    draft_vocab_size: int | None = None
    init_layers_from_target: tuple[int, ...] | None = None
    """Decoder layers of the target whose weights start the draft's layers, one per draft layer (warm start)."""


@dataclass(frozen=True)
class DataRecipe:
    """Where answers come from and how much of them is used."""

    prompts: str | None = None
    """JSONL of prompts for `regenerate`: {"id", "turns"} a line."""
    responses: str = "responses.jsonl"
    """JSONL of the target's answers: {"id", "prompt_ids", "response_ids"} a line; `regenerate` writes it."""
    max_length: int = 3072
    """Tokens of prompt and answer together; longer sequences are cut at the end."""
    held_out: int = 64
    """Sequences kept out of training to measure simulated tau."""
    max_new_tokens: int = 256
    """Longest answer that `regenerate` asks for."""
    temperature: float = 0.0
    """Temperature of regenerated answers."""
    batch_size: int = 16
    """Prompts that `regenerate` decodes together."""
    feature_dtype: str = "bfloat16"
    """Precision of cached features and of the pass that captures them."""

    def __post_init__(self) -> None:
        _require(self.max_length >= 16, f"max_length must be at least 16, got {self.max_length}")
        _require(self.held_out >= 1, f"held_out must be at least 1, got {self.held_out}")
        _require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        _require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        _require(
            self.feature_dtype in ("bfloat16", "float32"),
            f"feature_dtype must be bfloat16 or float32, got {self.feature_dtype!r}",
        )


@dataclass(frozen=True)
class OptimizationRecipe:
    """How the draft is trained (DESIGN section 6; paper 4.2 and A.1)."""

    steps: int
    """Optimizer steps; the curriculum and the learning rate are functions of step / steps, so it must be known."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch_size: int = 4
    """Sequences per forward pass; a step accumulates batch_size / micro_batch_size of them."""
    anchors: int = 512
    """A, blocks trained per sequence."""
    block_schedule: tuple[int, ...] = ()
    """Shorter blocks for equal parts of the run before the draft's own size, such as [2, 4]; anchors grow to match."""
    learning_rate: float = 6e-4
    warmup_ratio: float = 0.04
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    position_decay: float = 7.0
    """Loss weight of the k-th drafted token is exp(-k / position_decay), k from 0."""
    lambda_base_start: float = 1.0
    lambda_base_end: float = 0.0
    objective: str = "cross_entropy"
    """cross_entropy on the target's text, or kl to the target's own distribution (needs the last layer tapped)."""
    precision: str = "bfloat16"
    """Compute type of the matrix products; master weights are always float32."""
    checkpoint_minutes: float = 3.0
    eval_every: int = 500
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "anchors", "eval_every", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}",
        )
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _require(self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}")
        _require(self.position_decay > 0, f"position_decay must be positive, got {self.position_decay}")
        _require(0 <= self.warmup_ratio < 1, f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        _require(
            all(size >= 2 for size in self.block_schedule),
            f"block_schedule must hold sizes of at least 2, got {list(self.block_schedule)}",
        )
        for name in ("lambda_base_start", "lambda_base_end"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        _require(
            self.precision in ("bfloat16", "float32"),
            f"precision must be bfloat16 or float32, got {self.precision!r}",
        )
        _require(
            self.objective in ("cross_entropy", "kl"),
            f"objective must be cross_entropy or kl, got {self.objective!r}",
        )


@dataclass(frozen=True)
class Recipe:
    """A whole training run: one YAML file, one draft."""

    target: str
    draft: DraftRecipe
    data: DataRecipe
    training: OptimizationRecipe


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        UserError: the file is missing, is not YAML, has an unknown key, a wrong type or a value out of range.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    return parse_settings(Recipe, values, str(path))
