"""Training recipes: the YAML files that say which draft is trained, on what, and how.

A recipe is ours, so an unknown key, a wrong type or a value out of range is an error that names the key.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator

from domino_spec.config import SINGLE_LAYER_METHODS, HeadConfig, Settings, UserError, parse_settings, require


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _read_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_read_number)]
"""YAML 1.1 reads `6e-4` (no dot) as a string; people write learning rates that way."""
Word = Annotated[str, BeforeValidator(lambda value: "off" if value is False else value)]
"""YAML 1.1 reads `off` without quotes as false."""


@dataclass(frozen=True)
class HeadRecipe(Settings):
    """The Domino head to train. What is left out is `draft.init_from`'s, else as in `HeadConfig`."""

    gru_hidden_dim: int | None = None
    low_rank: int | None = None
    pure_draft_prefix_len: int | None = None

    def __post_init__(self) -> None:
        self.over(HeadConfig())  # checks the ranges

    def over(self, head: HeadConfig) -> HeadConfig:
        """`head` with what this recipe states in its place."""
        return replace(head, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class DraftRecipe(Settings):
    """The draft to train. What is left out is `init_from`'s, else the default that is named here, else the target's."""

    model: str = "block"
    """block: a DFlash backbone, with the Domino head or without; or eagle3 or dart: one layer over pairs of a token and
    a feature, as those methods publish it."""
    block_size: int | None = None
    """B, slots of a block, the anchor's included; 16. Of eagle3, steps of its training-time test, 7; of dart, its
    masked positions and one, 8."""
    num_layers: int | None = None
    """Layers of the backbone; 5."""
    mask_token_id: int | None = None
    """A token that the target's tokenizer reserves and never produces; needed where it has no mask token."""
    target_layer_ids: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    shift_label: bool | None = None
    """Whether slot k predicts the token one position later; true."""
    head: HeadRecipe | None = field(default_factory=HeadRecipe)
    """null trains a plain DFlash draft."""
    draft_vocab_size: int | None = None
    """Tokens that the draft can propose, the most frequent of the answers; all of them."""
    init_layers_from_target: tuple[int, ...] | None = None
    """Decoder layers of the target whose weights start the draft's layers, one per draft layer (warm start)."""
    init_from: str | None = None
    """A draft to start from: a directory or hub id in a published layout. Its shape must be this recipe's; a head is
    taken over where it has one, and fresh where it has none."""
    init_from_other_target: bool = False
    """Start from a draft that was made for other weights of the target's shape, such as the model it was tuned from."""

    def __post_init__(self) -> None:
        require(
            self.init_from is None or self.init_layers_from_target is None,
            "give either init_from or init_layers_from_target: the layers can start from one of them",
        )
        _one_of("model", self.model, ("block", *SINGLE_LAYER_METHODS))
        if self.model != "block":
            require(self.head is None, f"a draft of model {self.model} has no Domino head: set head to null")
            for name in ("num_layers", "mask_token_id", "shift_label", "init_from"):
                require(getattr(self, name) is None, f"{name} is for drafts of model block; leave it out")


@dataclass(frozen=True)
class DataRecipe(Settings):
    """Where answers come from and how much of them is used."""

    prompts: str | None = None
    """What `regenerate` answers: a JSONL of conversations ({"id", "turns"}, {"messages"} or {"conversations"} a line),
    or open-perfectblend, sharegpt, ultrachat. Answers that it may hold are left aside."""
    responses: str = "responses.jsonl"
    """What is trained on: the JSONL that `regenerate` writes, {"id", "prompt_ids", "response_ids"} a line; or
    conversations as they are, from a JSONL or by name as for `prompts`."""
    limit: int | None = None
    """Conversations used of prompts or responses, the first ones; null uses all."""
    exclude: tuple[str, ...] | None = None
    """Evaluation suites whose prompts are left out: benchmarks by name or JSONL files. null stands for gsm8k, math500,
    aime25, humaneval, mbpp and mt-bench where conversations come by name, and for none where they come from a file."""
    thinking: bool | None = False
    """`enable_thinking` of the chat template, for those that know it; null leaves the template's own default."""
    max_length: int = 3072
    """Tokens of prompt and answer together; longer sequences are cut at the end."""
    held_out: int = 64
    """Sequences kept out of training to measure simulated tau."""
    max_new_tokens: int = 256
    """Longest answer that `regenerate` asks for."""
    keep_truncated: bool = True
    """Keep answers that were cut at `max_new_tokens`."""
    temperature: Number = 0.0
    """Temperature of regenerated answers."""
    batch_size: int = 16
    """Prompts that `regenerate` decodes together."""
    server: str | None = None
    """URL of an OpenAI-compatible server of the target, which then answers instead of the engine of this package."""
    server_model: str | None = None
    """What the server calls the target; null takes the only model that it names."""
    concurrency: int = 32
    """Conversations that a server is asked to answer at once."""
    features: str = "disk"
    """disk: captured once and read back, for several epochs on one machine. online: computed by the target for every
    step, for data that would not fit on a disk."""
    feature_dtype: str = "bfloat16"
    """Precision of features and of the pass that captures them."""

    def __post_init__(self) -> None:
        require(self.max_length >= 16, f"max_length must be at least 16, got {self.max_length}")
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        for name in ("held_out", "max_new_tokens", "batch_size", "concurrency", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.server is None or self.server.startswith(("http://", "https://")),
            f"server must be a URL such as http://localhost:8000, got {self.server!r}",
        )
        _one_of("features", self.features, ("disk", "online"))
        _one_of("feature_dtype", self.feature_dtype, ("bfloat16", "float32"))


@dataclass(frozen=True)
class OptimizationRecipe(Settings):
    """How the draft is trained (DESIGN section 6; paper 4.2 and A.1)."""

    steps: int | None = None
    """Optimizer steps. The curriculum and the learning rate are functions of step / steps, so this or `epochs` must be
    given."""
    epochs: Number | None = None
    """Passes over the data, instead of `steps`."""
    trained: str = "all"
    """all, or head: the backbone stays as `draft.init_from` gave it."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch_size: int = 4
    """Sequences per forward pass; a step accumulates batch_size / micro_batch_size of them."""
    anchors: int = 512
    """A, blocks trained per sequence."""
    block_schedule: tuple[int, ...] = ()
    """Shorter blocks for equal parts of the run before the draft's own size, such as [2, 4]; anchors grow to match."""
    learning_rate: Number = 6e-4
    warmup_ratio: Number = 0.04
    weight_decay: Number = 0.0
    clip_norm: Number = 1.0
    causal_encoder: str = "teacher_forcing"
    """What the head's prefix encoder reads in training: teacher_forcing, the target's text; training_time_test, the
    draft's own greedy tokens (paper 4.2)."""
    curriculum: Word = "linear"
    """Weight of the base loss over the run: linear, from lambda_base_start to lambda_base_end; constant, at
    lambda_base_start; off, 0 (the final loss only)."""
    lambda_base_start: Number = 1.0
    lambda_base_end: Number = 0.0
    lambda_base_fraction: Number = 1.0
    """Share of the run over which a linear curriculum moves; it stays at its end afterwards."""
    objective: str = "cross_entropy"
    """What a token's loss is: cross_entropy on the target's text; or a distance to the target's own distribution: kl,
    tv (total variation), ce_tv, lk_alpha or lk_hybrid (see `training.losses`)."""
    position_weights: str = "exponential"
    """Weight of the k-th drafted token: exponential, exp(-k / position_decay); or acceptance, from the draft's own
    confidence (D-PACE)."""
    position_decay: Number = 7.0
    """In drafted tokens, k counted from 0."""
    confidence_floor: Number = 0.5
    """Of position_weights acceptance: confidences are moved up into [floor, 1], so that late tokens are trained too."""
    precision: str = "bfloat16"
    """Compute type of the matrix products; master weights are always float32."""
    attention: str = "auto"
    """Attention over anchors: flex (FlexAttention, CUDA), sdpa (chunks of anchors, everywhere), or auto."""
    activation_checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass: less memory for about a third more time."""
    parallel: str = "ddp"
    """With several processes: ddp (whole copies), or fsdp (weights and optimizer state sharded over them)."""
    trackers: tuple[str, ...] = ()
    """Besides TensorBoard: wandb, trackio."""
    checkpoint_minutes: Number = 3.0
    eval_every: int = 500
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            "give either steps or epochs: the curriculum and the learning rate need to know where the run ends",
        )
        require(self.epochs is None or self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        for name in ("batch_size", "micro_batch_size", "anchors", "eval_every", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        require(
            self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}",
        )
        require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        require(self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}")
        require(self.position_decay > 0, f"position_decay must be positive, got {self.position_decay}")
        require(0 <= self.warmup_ratio < 1, f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        require(
            all(size >= 2 for size in self.block_schedule),
            f"block_schedule must hold sizes of at least 2, got {list(self.block_schedule)}",
        )
        for name in ("lambda_base_start", "lambda_base_end"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1], got {getattr(self, name)}")
        require(
            0 < self.lambda_base_fraction <= 1,
            f"lambda_base_fraction must be in (0, 1], got {self.lambda_base_fraction}",
        )
        require(0 < self.confidence_floor <= 1, f"confidence_floor must be in (0, 1], got {self.confidence_floor}")
        _one_of("trained", self.trained, ("all", "head"))
        _one_of("causal_encoder", self.causal_encoder, ("teacher_forcing", "training_time_test"))
        _one_of("curriculum", self.curriculum, ("linear", "constant", "off"))
        _one_of("objective", self.objective, ("cross_entropy", "kl", "tv", "ce_tv", "lk_alpha", "lk_hybrid"))
        _one_of("position_weights", self.position_weights, ("exponential", "acceptance"))
        _one_of("precision", self.precision, ("bfloat16", "float32"))
        _one_of("attention", self.attention, ("auto", "flex", "sdpa"))
        _one_of("parallel", self.parallel, ("ddp", "fsdp"))
        for tracker in self.trackers:
            _one_of("trackers", tracker, ("wandb", "trackio"))

    @property
    def total_steps(self) -> int:
        """`steps`, once known (`with_steps`)."""
        assert self.steps is not None, "epochs are turned into steps when the data are known"
        return self.steps

    def with_steps(self, sequences: int) -> OptimizationRecipe:
        """The same with `epochs` over that many sequences turned into steps."""
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, round(self.epochs * sequences / self.batch_size)), epochs=None)


@dataclass(frozen=True)
class Recipe(Settings):
    """A whole training run: one YAML file, one draft."""

    target: str
    draft: DraftRecipe
    data: DataRecipe
    training: OptimizationRecipe

    def __post_init__(self) -> None:
        if self.draft.model != "block":
            require(
                self.training.trained == "all" and not self.training.activation_checkpointing,
                f"training.trained head and activation_checkpointing are for drafts of model block, not "
                f"{self.draft.model}",
            )
        if self.training.trained == "head":
            require(
                self.draft.init_from is not None,
                "training.trained head keeps the backbone of a trained draft: name that draft in draft.init_from",
            )
            require(self.draft.head is not None, "training.trained head needs a head, but draft.head is null")
            require(
                self.training.curriculum == "off",
                "training.trained head leaves the base loss as it is: set training.curriculum to off, "
                f"not {self.training.curriculum}",
            )


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
