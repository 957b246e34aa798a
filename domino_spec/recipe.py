"""Training recipes: the YAML files that say which draft is trained, on what, and how.

A recipe is ours, so an unknown key, a wrong type or a value out of range is an error that names the key. What a single
value may be stands in its annotation, what several must be together in `__post_init__`.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator

from domino_spec.draft.config import HeadConfig
from domino_spec.settings import Settings, UserError, distinct, parse_settings, require, shortened

LARGEST_FILE = 32_768
"""Bytes of a recipe. One fills a page, and PyYAML reads this many in a second or two."""


def _from(low: float, high: float) -> AfterValidator:
    """A number in [low, high]."""

    def check(value: Any) -> Any:
        require(low <= value <= high, f"expected {low:,} to {high:,}, found {shortened(value)}")
        return value

    return AfterValidator(check)


def _above(low: float, high: float) -> AfterValidator:
    """A number in (low, high]."""

    def check(value: Any) -> Any:
        require(low < value <= high, f"expected more than {low:,}, at most {high:,}, found {shortened(value)}")
        return value

    return AfterValidator(check)


def _distinct(values: tuple[int, ...]) -> tuple[int, ...]:
    require(len(values) >= 1, "expected at least one, found an empty list")
    return distinct(values)


def _short(values: tuple[int, ...]) -> tuple[int, ...]:
    require(len(values) <= 64, f"expected at most 64 values, found {len(values)}")
    return values


def _name(value: str) -> str:
    """Text that can be a path or the name of something: what is longer, or not printed, no system can open."""
    require(bool(value.strip()), "expected a path or name, found an empty one")
    require(value.isprintable(), f"expected a path or name without control characters, found {shortened(value)}")
    parts = value.encode("utf-8", "surrogatepass").split(b"/")
    fits = max(map(len, parts)) <= 255 and sum(map(len, parts)) <= 4000
    require(fits, f"expected a path or name of at most 255 characters between slashes, found {shortened(value)}")
    return value


def check_url(value: str) -> str:
    """The URL of a server, as it is.

    Raises:
        UserError: it is none.
    """
    wrong = f"server must be a URL such as http://localhost:8000, found {shortened(value)}"
    try:
        parts = urllib.parse.urlsplit(_name(value))
        require(parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0, wrong)
    except ValueError:  # of a port or an address; `UserError` is one too, so that every fault reads alike
        raise UserError(wrong) from None
    require(" " not in value, wrong)
    return value


def _read_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_read_number)]
"""YAML 1.1 reads `6e-4` (no dot) as a string; people write learning rates that way."""
Name = Annotated[str, AfterValidator(_name)]
Width = Annotated[int, _from(1, 65_536)]
"""Of hidden states."""
Slots = Annotated[int, _from(1, 64)]
"""Of a block."""
Layers = Annotated[tuple[Annotated[int, _from(0, 9_999)], ...], AfterValidator(_distinct)]
"""Decoder layers of the target, counted from 0."""
Count = Annotated[int, _from(1, 1_000_000_000)]
Tokens = Annotated[int, _from(1, 1_048_576)]
"""Of one text."""
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class HeadRecipe(Settings):
    """The Domino head to train. What is left out is `draft.init_from`'s, else as in `HeadConfig`."""

    gru_hidden_dim: Width | None = None
    low_rank: Width | None = None
    pure_draft_prefix_len: Annotated[int, _from(0, 63)] | None = None

    def over(self, head: HeadConfig) -> HeadConfig:
        """`head` with what this recipe states in its place."""
        return replace(head, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class DraftRecipe(Settings):
    """The draft to train. What is left out is `init_from`'s, else the default that is named here, else the target's."""

    model: Literal["block", "eagle3", "dart"] = "block"
    """block: a DFlash backbone, with the Domino head or without; or eagle3 or dart: one layer over pairs of a token and
    a feature, as those methods publish it."""
    block_size: Slots | None = None
    """B, slots of a block, the anchor's included; 16. Of eagle3, steps of its training-time test, 7; of dart, its
    masked positions and one, 8."""
    num_layers: Annotated[int, _from(1, 256)] | None = None
    """Layers of the backbone; 5."""
    mask_token_id: Annotated[int, _from(0, 2**31 - 1)] | None = None
    """A token that the target's tokenizer reserves and never produces; needed if it has no mask token."""
    target_layer_ids: Layers | None = None
    intermediate_size: Annotated[int, _from(1, 262_144)] | None = None
    shift_label: bool | None = None
    """Whether slot k predicts the token one position later; true with a head, false without one."""
    head: HeadRecipe | None = field(default_factory=HeadRecipe)
    """null trains a plain DFlash draft."""
    draft_vocab_size: Annotated[int, _from(1, 16_777_216)] | None = None
    """Tokens that the draft can propose, the most frequent of the answers; all of them."""
    init_layers_from_target: tuple[Annotated[int, _from(0, 9_999)], ...] | None = None
    """Decoder layers of the target whose weights start the draft's layers, one per draft layer (warm start)."""
    init_from: Name | None = None
    """A draft to start from: a directory or hub id in a published layout. Its shape must be this recipe's; a head is
    taken over if it has one, and new if it has none."""
    init_from_other_target: bool = False
    """Start from a draft that was made for other weights of the target's shape, such as the model it was tuned from."""

    def __post_init__(self) -> None:
        require(
            self.init_from is None or self.init_layers_from_target is None,
            "give either init_from or init_layers_from_target: the layers can start from one of them",
        )
        slots = self.block_size
        if self.model == "block" and slots is not None:
            require(slots >= 2, f"block_size must be at least 2 for drafts of model block, got {slots}")
            prefix = None if self.head is None else self.head.pure_draft_prefix_len
            require(
                prefix is None or prefix < slots,
                f"head.pure_draft_prefix_len {prefix} leaves no token of a block of {slots} to the head",
            )
        if self.model != "block":
            require(self.head is None, f"a draft of model {self.model} has no Domino head: set head to null")
            for name in ("num_layers", "mask_token_id", "shift_label", "init_from"):
                require(getattr(self, name) is None, f"{name} is for drafts of model block; leave it out")
        require(
            self.head is not None or not self.shift_label,
            "shift_label true needs a head: a draft without one is read as DFlash's, whose slots predict their own "
            "position",
        )


@dataclass(frozen=True)
class DataRecipe(Settings):
    """Where answers come from and how much of them is used."""

    prompts: Name | None = None
    """What `regenerate` answers: a JSONL of conversations ({"id", "turns"}, {"messages"} or {"conversations"} a line),
    or open-perfectblend, sharegpt, ultrachat. Answers that it may hold are left aside."""
    responses: Name = "responses.jsonl"
    """What is trained on: the JSONL that `regenerate` writes, {"id", "prompt_ids", "response_ids"} a line; or
    conversations as they are, from a JSONL or by name as for `prompts`."""
    limit: Count | None = None
    """Conversations used of prompts or responses, the first ones; null uses all."""
    exclude: tuple[Name, ...] | None = None
    """Evaluation suites whose prompts are left out: benchmarks by name or JSONL files. null means gsm8k, math500,
    aime25, humaneval, mbpp and mt-bench if conversations come by name, and none if they come from a file."""
    thinking: bool | None = False
    """`enable_thinking` of the chat template, for those that know it; null leaves the template's default."""
    max_length: Annotated[int, _from(16, 1_048_576)] = 3072
    """Tokens of prompt and answer together; longer sequences are cut at the end."""
    held_out: Count = 64
    """Sequences kept out of training to measure simulated tau."""
    max_new_tokens: Tokens = 256
    """Longest answer that `regenerate` asks for."""
    keep_truncated: bool = True
    """Keep answers that were cut at `max_new_tokens`."""
    temperature: Annotated[Number, _from(0, 100)] = 0.0
    """Temperature of regenerated answers."""
    batch_size: Annotated[int, _from(1, 4096)] = 16
    """Prompts that `regenerate` decodes together."""
    server: Annotated[str, AfterValidator(check_url)] | None = None
    """URL of an OpenAI-compatible server of the target, which then answers instead of the engine of this package."""
    server_model: Name | None = None
    """What the server calls the target; null takes the only model that it names."""
    concurrency: Annotated[int, _from(1, 4096)] = 32
    """Conversations that a server is asked to answer at once."""
    features: Literal["disk", "online"] = "disk"
    """disk: captured once and read back, for several epochs on one machine. online: computed by the target for every
    step, for data that would not fit on a disk."""
    feature_dtype: Precision = "bfloat16"
    """Precision of features and of the pass that captures them."""


@dataclass(frozen=True)
class OptimizationRecipe(Settings):
    """How the draft is trained (docs/design.md, section 6; paper 4.2 and A.1)."""

    steps: Count | None = None
    """Optimizer steps. The curriculum and the learning rate are functions of step / steps, so this or `epochs` must be
    given."""
    epochs: Annotated[Number, _above(0, 1_000_000)] | None = None
    """Passes over the data, instead of `steps`."""
    trained: Literal["all", "head"] = "all"
    """all, or head: the backbone stays as `draft.init_from` gave it."""
    batch_size: Annotated[int, _from(1, 65_536)] = 16
    """Sequences per optimizer step."""
    micro_batch_size: Annotated[int, _from(1, 1024)] = 4
    """Sequences per forward pass; a step accumulates batch_size / micro_batch_size of them."""
    anchors: Annotated[int, _from(1, 65_536)] = 512
    """A, blocks trained per sequence."""
    block_schedule: Annotated[tuple[Annotated[int, _from(2, 64)], ...], AfterValidator(_short)] = ()
    """Shorter blocks for equal parts of the run before the draft's own size, such as [2, 4]; anchors grow to match."""
    learning_rate: Annotated[Number, _above(0, 10)] = 6e-4
    warmup_ratio: Annotated[Number, _from(0, 1)] = 0.04
    weight_decay: Annotated[Number, _from(0, 10)] = 0.0
    clip_norm: Annotated[Number, _above(0, 1e12)] = 1.0
    causal_encoder: Literal["teacher_forcing", "training_time_test"] = "teacher_forcing"
    """What the head's prefix encoder reads in training: teacher_forcing, the target's text; training_time_test, the
    draft's own greedy tokens (paper 4.2)."""
    curriculum: Annotated[
        Literal["linear", "constant", "off"],
        BeforeValidator(lambda value: "off" if value is False else value),  # as YAML 1.1 reads off without quotes
    ] = "linear"
    """Weight of the base loss over the run: linear, from lambda_base_start to lambda_base_end; constant, at
    lambda_base_start; off, 0 (the final loss only)."""
    lambda_base_start: Annotated[Number, _from(0, 1)] = 1.0
    lambda_base_end: Annotated[Number, _from(0, 1)] = 0.0
    lambda_base_fraction: Annotated[Number, _above(0, 1)] = 1.0
    """Share of the run over which a linear curriculum moves; it stays at its end afterwards."""
    objective: Literal["cross_entropy", "kl", "tv", "ce_tv", "lk_alpha", "lk_hybrid"] = "cross_entropy"
    """What a token's loss is: cross_entropy on the target's text; or a distance to the target's own distribution: kl,
    tv (total variation), ce_tv, lk_alpha or lk_hybrid (see `training.loss`)."""
    position_weights: Literal["exponential", "acceptance"] = "exponential"
    """Weight of the k-th drafted token: exponential, exp(-k / position_decay); or acceptance, from the draft's own
    confidence (D-PACE)."""
    position_decay: Annotated[Number, _above(0, 1_000_000)] = 7.0
    """In drafted tokens, k counted from 0."""
    confidence_floor: Annotated[Number, _above(0, 1)] = 0.5
    """Of position_weights acceptance: confidences are moved up into [floor, 1], so that late tokens are trained too."""
    precision: Precision = "bfloat16"
    """Compute type of the matrix products; master weights are always float32."""
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    """Attention over anchors: flex (FlexAttention, CUDA), sdpa (chunks of anchors, everywhere), or auto."""
    activation_checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass: less memory for about a third more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp (whole copies), or fsdp (weights and optimizer state sharded over them)."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Besides TensorBoard: wandb, trackio."""
    checkpoint_minutes: Annotated[Number, _from(0, 1_000_000_000)] = 3.0
    eval_every: Count = 500
    log_every: Count = 10
    seed: Annotated[int, _from(0, 2**32 - 1)] = 0

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            "give either steps or epochs: the curriculum and the learning rate need to know where the run ends",
        )
        require(
            self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}",
        )
        require(self.warmup_ratio < 1, "warmup_ratio must be less than 1: the learning rate falls after the warm-up")

    @property
    def total_steps(self) -> int:
        """`steps`, once known (`with_steps`)."""
        assert self.steps is not None, "epochs are turned into steps when the data are known"
        return self.steps

    def with_steps(self, sequences: int) -> OptimizationRecipe:
        """The same with `epochs` over that many sequences turned into steps.

        Raises:
            UserError: there are fewer sequences than a step takes.
        """
        require(
            self.batch_size <= sequences,
            f"training.batch_size is {self.batch_size}, but there are only {sequences} sequences to train on: "
            "lower it, or get more answers",
        )
        if self.epochs is None:
            return self
        return replace(self, steps=max(1, round(self.epochs * sequences / self.batch_size)), epochs=None)


@dataclass(frozen=True)
class Recipe(Settings):
    """A whole training run: one YAML file, one draft."""

    target: Name
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
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} is no recipe: it has more than {LARGEST_FILE:,} bytes")
    try:
        values = yaml.load(content.decode("utf-8"), _RecipeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark, reasons = error.problem_mark or error.context_mark, (error.context, error.problem)
        line = "" if mark is None else f"line {mark.line + 1}: "
        what = ", ".join(" ".join(reason.split()) for reason in reasons if reason)
        raise UserError(f"recipe {path} is not valid YAML: {line}{what}") from None
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        # PyYAML lets through what Python says of a number, a date or a tagged value that it cannot make.
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    return parse_settings(Recipe, values, str(path))


class _RecipeLoader(yaml.SafeLoader):
    """YAML without what hides a mistake, or grows without end: keys that stand twice, aliases, endless nesting."""

    DEEPEST = 32
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"write the value out in place of the alias *{event.anchor}"
        if self._depth > self.DEEPEST:
            problem = "it is nested too deep"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {shortened(key.value)} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
