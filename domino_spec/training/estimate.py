"""What a training run would take, before it starts: parameters, memory per process, steps, operations, hours.

Everything is built on meta tensors from configurations alone, so no weights are loaded or downloaded, and the shapes of
the targets that shipped recipes name come with the package. Parameters, weights and optimizer state are exact. The
draft's own code runs on tensors without contents: PyTorch's hooks for saved tensors count its activations, and
`torch.utils.flop_counter` counts its matrix products, forward and backward. Memory that kernels need briefly is not
counted. Hours follow from the operations at a stated rate: an estimate, not a measurement.

Operations, for an honest share of what a device can do:

- A multiply-add is two operations. Norms, activations, softmax and the optimizer are not counted (about 1%).
- Attention counts the keys that a slot may see: the context before its anchor, and its own block. Kernels that compute
  masked scores, and activation checkpointing, take longer and reach a lower share.
- The target's pass over the text is listed apart; its logits, if the objective needs them, count as `lm_head`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from domino_spec.draft.backbone import ContextKV
from domino_spec.draft.checkpoint import read_config
from domino_spec.draft.config import SINGLE_LAYER_KINDS, DraftConfig, SingleLayerConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.initialize import continued_config, fresh_config, single_layer_config
from domino_spec.draft.load import AnyDraft, draft_directory, empty_draft, shape_mismatch
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.recipe import DataRecipe, DraftRecipe, OptimizationRecipe, Recipe
from domino_spec.settings import UserError, require
from domino_spec.target.load import outlined_model, target_config
from domino_spec.target.outline import KNOWN_TARGETS, known_config
from domino_spec.training.blocks import Blocks, gather_blocks, sample_anchors
from domino_spec.training.chains import run_chains
from domino_spec.training.data import Sequence, load_sequences, pack_batch, split_held_out
from domino_spec.training.loss import CHUNK_LOGITS_CUDA, OBJECTIVES
from domino_spec.training.parallel import Processes, micro_batches
from domino_spec.training.step import check_block_schedule, tapped_layers

DEVICE, MATRIX_RATE = "H100", 989e12
"""What hours are given for: its dense bfloat16 rate in operations per second, by its data sheet."""
ACHIEVED = 0.4
"""Share of that rate which training is taken to reach; a published trainer of such drafts reaches 0.435."""
ASSUMED_CONVERSATIONS = 100_000
ASSUMED_TOKENS, ASSUMED_PROMPT = 1024, 256
"""Length of a conversation if there are no data yet, and how much of it is prompt."""
_DFLASH = DraftRecipe(num_layers=5, block_size=16, mask_token_id=151669, shift_label=False, head=None)
KNOWN_DRAFTS = {f"z-lab/{name}-DFlash-b16": (f"Qwen/{name}", _DFLASH) for name in ("Qwen3-4B", "Qwen3-8B")}
"""The published drafts that shipped recipes start from: target and shape."""
SAMPLED_SEQUENCES = 256
"""Sequences whose operations are counted, evenly spaced over the data."""


@dataclass(frozen=True)
class Data:
    """What is trained on in one epoch, held-out sequences left out."""

    counted: str | None
    """The file that holds it; None if `sequences` and `tokens` are assumptions."""
    sequences: int
    tokens: int
    """Prompts included."""
    cached_tokens: int
    """Those of held-out sequences too."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take; memory in bytes, operations multiply and add counted separately."""

    processes: int
    parallel: str
    """single, ddp or fsdp."""
    parameters: dict[str, int]
    """Of the draft: backbone, gru, w1, w2, head (their sum), total, trained; of a single layer: layer, lm_head, ..."""
    target_parameters: int
    memory: dict[str, int]
    """Per process, by what takes it, and their total: with the longest sequences that the recipe allows."""
    feature_cache: int
    """Bytes on disk; 0 with online features."""
    data: Data
    steps: int
    epochs: float
    step_tokens: float
    """Tokens of text in a step on average."""
    tokens: float
    """Of the whole run."""
    step_operations: dict[str, float]
    """Of one step of all processes on average, by part of the draft; `target`, its pass for the features; `total`."""
    operations: float
    """Of the whole run, the features' capture included."""
    device: str
    rate: float
    """Operations per second that one device is taken to reach."""
    device_hours: float
    hours: float
    """With one device per process."""


def estimate_training(recipe: Recipe, processes: int | None = None) -> Estimate:
    """Work out what a recipe takes.

    Args:
        recipe: to be trained.
        processes: that share the work; if not given, what `torchrun` says (WORLD_SIZE), else 1.

    Raises:
        UserError: target, draft or data cannot be read, or do not fit each other or the number of processes.
    """
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    training = recipe.training
    text_config = known_config(recipe.target) or target_config(recipe.target)
    draft = planned_draft(recipe, text_config, processes)
    target = _meta_target(text_config, recipe.target)
    parameters = _count_parameters(draft)
    layers = tapped_layers(draft, training)
    data, sample = _data(recipe.data, text_config.vocab_size)
    feature_bytes = getattr(torch, recipe.data.feature_dtype).itemsize
    token_features = len(layers) * text_config.hidden_size * feature_bytes
    online = recipe.data.features == "online"

    settings = training.with_steps(data.sequences)
    operations = step_operations(draft.config, settings, sample)
    step_tokens = training.batch_size * data.tokens / data.sequences
    target_pass = _target_operations(text_config, target["decoder"], sample)  # per token
    operations["target"] = target_pass * step_tokens if online else 0.0
    operations["total"] = sum(operations.values())
    everything = settings.total_steps * operations["total"] + (0.0 if online else target_pass * data.tokens)

    memory = state_memory(parameters["total"], parameters["trained"], training, processes)
    memory |= {f"target_{name}": count * feature_bytes for name, count in target.items()}
    memory |= work_memory(draft.config, training, recipe.data.max_length, token_features)
    seconds = everything / (MATRIX_RATE * ACHIEVED)
    return Estimate(
        processes=processes,
        parallel=training.parallel if processes > 1 else "single",
        parameters=parameters,
        target_parameters=sum(target.values()),
        memory={**memory, "total": sum(memory.values())},
        feature_cache=0 if online else data.cached_tokens * token_features,
        data=data,
        steps=settings.total_steps,
        epochs=settings.total_steps * training.batch_size / data.sequences,
        step_tokens=step_tokens,
        tokens=settings.total_steps * step_tokens,
        step_operations=operations,
        operations=everything,
        device=DEVICE,
        rate=MATRIX_RATE * ACHIEVED,
        device_hours=seconds / 3600,
        hours=seconds / 3600 / processes,
    )


def planned_draft(recipe: Recipe, text_config: Any, processes: int) -> AnyDraft:
    """The draft that a recipe would train, without contents, once all is checked that needs no data and no weights.

    Args:
        recipe: to be trained.
        text_config: of its target (transformers).
        processes: that share the work.

    Raises:
        UserError: parts of the recipe do not fit each other, the target, the draft that it starts from, or the number
            of processes.
    """
    training = recipe.training
    micro_batches(training.batch_size, training.micro_batch_size, Processes(count=processes))
    shape = draft_shape(recipe, text_config)
    check_block_schedule(training, shape.block_size)
    return meta_draft(shape, trained=training.trained)


def draft_shape(recipe: Recipe, text_config: Any) -> DraftConfig | SingleLayerConfig:
    """The configuration that training would give the draft, but for a mask token that the tokenizer would name.

    Raises:
        UserError: the recipe does not fit the target, or the draft that it starts from.
    """
    shape = _draft_shape(recipe, text_config)
    copied = recipe.draft.init_layers_from_target
    if copied is not None:
        layers = shape.num_hidden_layers
        depth = text_config.num_hidden_layers
        what = "draft.init_layers_from_target"
        require(len(copied) == layers, f"{what} names {len(copied)} layers, but the draft has {layers}")
        require(max(copied) < depth, f"{what} holds {max(copied)}; the target's layers are 0 to {depth - 1}")
    return shape


def _draft_shape(recipe: Recipe, text_config: Any) -> DraftConfig | SingleLayerConfig:
    if recipe.draft.model != "block":
        return single_layer_config(recipe.draft, text_config)
    if recipe.draft.init_from is None:
        return fresh_config(recipe.draft, text_config, recipe.draft.mask_token_id or 0)
    start = _start_config(recipe.draft.init_from)
    shape = text_config.hidden_size, text_config.vocab_size, text_config.num_hidden_layers
    if mismatch := shape_mismatch(start, *shape):
        raise UserError(f"draft {recipe.draft.init_from} does not fit target {recipe.target}: {mismatch}")
    return continued_config(recipe.draft, start)


def _start_config(name: str) -> DraftConfig:
    """The configuration of the draft that `init_from` names."""
    if name in KNOWN_DRAFTS and not Path(name).is_dir():
        target, draft = KNOWN_DRAFTS[name]
        assert draft.mask_token_id is not None
        return fresh_config(draft, AutoConfig.for_model(**KNOWN_TARGETS[target]), draft.mask_token_id)
    return read_config(draft_directory(name, weights=False))


def meta_draft(config: DraftConfig | SingleLayerConfig, trained: str = "all") -> AnyDraft:
    """A draft without contents."""
    size = config.draft_vocab_size
    with torch.device("meta"):
        vocabulary = None if size is None else torch.empty(size, dtype=torch.int64)
        draft = empty_draft(config, vocabulary)
    draft.prepare_training(trained)
    return draft


def _meta_target(text_config: Any, name: str) -> dict[str, int]:
    """Parameters of the target's decoder, and of its two ends (one if they are tied)."""
    model = outlined_model(text_config, None, f"target {name}")
    total = sum(p.numel() for p in model.parameters())  # tied weights count once
    embedding = model.get_input_embeddings()
    decoder = sum(p.numel() for p in model.get_decoder().parameters()) - embedding.weight.numel()
    return {"decoder": decoder, "ends": total - decoder}


def _count_parameters(draft: AnyDraft) -> dict[str, int]:
    parts = draft.count_parameters()
    if "fc" in parts:
        parts["layer"] += parts.pop("fc")
    head = sum(parts.get(name, 0) for name in ("gru", "w1", "w2"))
    total = sum(p.numel() for p in draft.parameters())
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    return {**parts, **({"head": head} if "backbone" in parts else {}), "total": total, "trained": trained}


def _data(recipe: DataRecipe, vocab_size: int) -> tuple[Data, list[Sequence]]:
    """What is trained on, and a sample of its sequences: of the assumed length if their tokens are not known yet."""
    path, rows = Path(recipe.responses), ASSUMED_CONVERSATIONS
    if path.is_file():
        try:
            with path.open("rb") as file:
                first, others = file.readline(), sum(1 for line in file if line.strip())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        row = None
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is counted in lines
            row = json.loads(first)
        if isinstance(row, dict) and "response_ids" in row:
            everything = load_sequences(path, recipe.max_length, vocab_size, recipe.thinking, recipe.limit)
            sequences, _ = split_held_out(everything, recipe.held_out)
            stride = max(1, len(sequences) // SAMPLED_SEQUENCES)
            tokens, cached = (sum(len(s.tokens) for s in part) for part in (sequences, everything))
            return Data(str(path), len(sequences), tokens, cached), sequences[::stride]
        rows = max(1, min(1 + others, recipe.limit or 1 + others) - recipe.held_out)
    length = min(ASSUMED_TOKENS, recipe.max_length)
    answer = (length * ASSUMED_PROMPT // ASSUMED_TOKENS, length)
    cached = (rows + recipe.held_out) * length
    return Data(None, rows, rows * length, cached), [Sequence("", torch.zeros(length, dtype=torch.int64), (answer,))]


# Memory of a process.


def state_memory(total: int, trained: int, recipe: OptimizationRecipe, processes: int) -> dict[str, int]:
    """Bytes of weights and optimizer in each process (`training.parallel`).

    Args:
        total: parameters of the draft.
        trained: those of them that are trained.
        recipe: precision, and how processes share the state.
        processes: of the run.
    """
    share = processes if recipe.parallel == "fsdp" else 1
    low_precision = recipe.precision == "bfloat16"
    if processes > 1 and recipe.parallel == "fsdp":
        # The draft whole for a step, and whole gradients, which add up over its micro-batches.
        copies = (2 if low_precision else 4) * total + 4 * trained
    else:
        copies = 2 * trained if low_precision else 0  # autocast's; gradients are in DDP's buckets
    return {
        "master_weights": 4 * total // share,
        "gradients": 4 * trained // share,
        "optimizer_moments": 8 * trained // share,
        "step_copies": copies,
    }


def work_memory(
    config: DraftConfig | SingleLayerConfig, recipe: OptimizationRecipe, max_length: int, token_features: int
) -> dict[str, int]:
    """Bytes that a micro-batch of the longest sequences takes on a GPU; without the activations of a single layer.

    Args:
        config: of the draft.
        recipe: of the training.
        max_length: tokens of a sequence.
        token_features: bytes of one token's features.
    """
    rows = recipe.micro_batch_size * max_length
    sizes = (*recipe.block_schedule, config.block_size)
    blocks, size = max(
        ((recipe.micro_batch_size * min(anchor_count(config, recipe, size), max_length), size) for size in sizes),
        key=lambda pair: pair[0] * pair[1],
    )
    # The loss holds logits of a chunk (base, correction and the target's), and what backward needs of every label.
    element = 2 if recipe.precision == "bfloat16" else 4
    held = 1 + (config.head is not None) + OBJECTIVES[recipe.objective].needs_target
    labels = blocks * replace(config, block_size=size).max_drafts
    width = config.hidden_size + (0 if config.head is None else config.head.low_rank)
    logits = min(CHUNK_LOGITS_CUDA, labels * config.logits_size)
    activations = 0  # a single layer's are few beside features and loss
    if config.kind not in SINGLE_LAYER_KINDS:
        activations = activation_bytes(cast(DraftConfig, config), recipe, rows, blocks, size)
    return {
        "features": rows * token_features,
        "activations": activations,
        "loss": element * (held * logits + 2 * labels * width),
    }


def anchor_count(config: DraftConfig | SingleLayerConfig, recipe: OptimizationRecipe, block_size: int) -> int:
    """Blocks per sequence: shorter ones are more (`step.block_size`)."""
    return recipe.anchors * config.block_size // block_size


def activation_bytes(config: DraftConfig, recipe: OptimizationRecipe, rows: int, blocks: int, block_size: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, without weights and copies of them.

    Args:
        config: of the draft.
        recipe: precision, what is trained, and whether layers are recomputed.
        rows: of context.
        blocks: of all sequences.
        block_size: slots per block.
    """
    inputs = 0
    if recipe.activation_checkpointing and recipe.trained == "all":
        # Every layer keeps its input and its context; one layer at a time is recomputed.
        context = 2 * 2 * rows * config.num_key_value_heads * config.head_dim
        inputs = (config.num_hidden_layers - 1) * (4 * blocks * block_size * config.hidden_size + context)
        config = replace(config, num_hidden_layers=1)
    # What an empty batch keeps is weights and copies of them.
    kept = _saved_bytes(config, recipe, rows, blocks, block_size) - _saved_bytes(config, recipe, 0, 0, block_size)
    return inputs + kept


def _saved_bytes(config: DraftConfig, recipe: OptimizationRecipe, rows: int, blocks: int, block_size: int) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16")
    with FakeTensorMode(), precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        draft = Draft(replace(config, rope_scaling=None, draft_vocab_size=None))
        draft.backbone.requires_grad_(recipe.trained == "all")
        draft.feature_scale = torch.empty(config.feature_size)
        features = torch.empty(1, rows, config.feature_size, dtype=torch.bfloat16)
        context = draft.backbone.project_context(draft.read_features(features), torch.zeros(1, rows, dtype=torch.int64))
        block = torch.empty(1, blocks * block_size, config.hidden_size)
        positions = torch.zeros(1, blocks * block_size, dtype=torch.int64)
        hidden = draft.backbone(block, positions, context, _FusedAttention.apply)
        first = config.first_draft_slot
        drafts = hidden.view(blocks, block_size, config.hidden_size)[:, first : first + config.max_drafts]
        low_rank = None  # as `hidden`, held until its graph is counted
        if draft.head is not None:
            low_rank = draft.head.low_rank(drafts, draft.head.block(torch.empty(drafts.shape)))
        total = sum(storages.values())
        del hidden, low_rank
    return total


class _FusedAttention(torch.autograd.Function):
    """Stands for attention in one kernel: keeps its inputs, its output and a normaliser per query. Computes nothing.

    The operations of attention are counted by the keys that each slot may see.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


# Operations of a step: the draft's own code on meta tensors, watched by PyTorch's counter.


@dataclass(frozen=True)
class _Work:
    """How much some sequences give a step to do."""

    rows: int
    """T, tokens of text whose features become context."""
    blocks: int
    """A, blocks of all sequences."""
    block_size: int
    """B."""
    pairs: int
    """Slots times the keys that each of them may see, in one head of one layer."""
    labels: int
    """M, drafted tokens that have a loss."""


def step_operations(
    config: DraftConfig | SingleLayerConfig,
    recipe: OptimizationRecipe,
    sample: SequenceType[Sequence],
    draft_vocab_ids: Tensor | None = None,
) -> dict[str, float]:
    """Operations of one optimizer step on average, forward and backward, by part of the draft.

    Args:
        config: of the draft.
        recipe: of the training.
        sample: sequences like those that are trained on.
        draft_vocab_ids: of the draft, on the CPU: labels outside of them have no loss.

    Returns:
        context (`fc` and the context's keys and values), layers (their products over all slots), attention, lm_head
        (all products with an LM head), head (GRU, W1 and W2).
    """
    sizes = (*recipe.block_schedule, config.block_size)
    count = _count_single_layer if config.kind in SINGLE_LAYER_KINDS else _count_block_draft
    totals: dict[str, float] = defaultdict(float)
    for size in sizes:
        for name, operations in count(config, recipe, _work_of(config, recipe, sample, size, draft_vocab_ids)).items():  # type: ignore[arg-type]
            totals[name] += operations * recipe.batch_size / len(sample) / len(sizes)
    return dict(totals)


def _work_of(
    config: DraftConfig | SingleLayerConfig,
    recipe: OptimizationRecipe,
    sample: SequenceType[Sequence],
    size: int,
    draft_vocab_ids: Tensor | None,
) -> _Work:
    count = anchor_count(config, recipe, size)
    anchors = [sample_anchors(s, count, torch.Generator().manual_seed(0)) for s in sample]
    batch = pack_batch(sample, [torch.empty(len(s.tokens), 0) for s in sample])
    blocks = gather_blocks(batch, anchors, replace(config, block_size=size).max_drafts)
    usable = blocks.valid
    if draft_vocab_ids is not None:
        usable = usable & torch.isin(blocks.labels, draft_vocab_ids)
    pairs = size * (int(blocks.positions.sum()) + size * len(blocks.anchors))
    return _Work(len(batch.tokens), len(blocks.anchors), size, pairs, int(usable.sum()))


def _count(run: Callable[[], Tensor]) -> float:
    """Operations of `run` and of the backward pass from its result."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        out = run()
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


def _count_block_draft(config: DraftConfig, recipe: OptimizationRecipe, work: _Work) -> dict[str, float]:
    """Of a step over `work`, by part."""
    trained, hidden_size = recipe.trained == "all", config.hidden_size
    draft = cast(Draft, meta_draft(replace(config, rope_scaling=None), recipe.trained))
    backbone, head = draft.backbone, draft.head
    short = replace(config, block_size=work.block_size)
    slots, num_drafts = work.blocks * work.block_size, short.max_drafts

    def rows(*shape: int, grad: bool = False) -> Tensor:
        return torch.empty(*shape, device="meta", requires_grad=grad)

    def positions(count: int) -> Tensor:
        return torch.empty(1, count, dtype=torch.int64, device="meta")

    def project() -> Tensor:
        return torch.stack(
            list(backbone.project_context(rows(1, work.rows, config.feature_size), positions(work.rows)))
        )

    def layers() -> Tensor:
        context = rows(2, config.num_hidden_layers, 1, config.num_key_value_heads, work.rows, config.head_dim)
        block = rows(1, slots, hidden_size)
        return backbone(block, positions(slots), ContextKV(*context), _FusedAttention.apply)

    def logits() -> Tensor:
        return F.linear(rows(work.labels, hidden_size, grad=trained), rows(config.logits_size, hidden_size))

    products = 2 * 2.0 * work.pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    once = 2.0 * work.labels * hidden_size * config.logits_size
    further = OBJECTIVES[recipe.objective].needs_target + (recipe.position_weights == "acceptance")
    found = {
        "context": _count(project),
        "layers": _count(layers),
        "attention": products * (3 if trained else 1),
        "lm_head": _count(logits) + once * further,
        "head": 0.0,
    }
    if head is not None:
        drafted = work.blocks, num_drafts

        def prefixes() -> Tensor:
            states = head.block(rows(*drafted, hidden_size))
            return head.low_rank(rows(*drafted, hidden_size, grad=trained), states)

        def correction(labels: int, grad: bool = True) -> Callable[[], Tensor]:
            return lambda: F.linear(rows(labels, head.config.low_rank, grad=grad), head.correction_weight)

        found["head"] = _count(prefixes) + _count(correction(work.labels))
        with torch.no_grad():
            if recipe.position_weights == "acceptance":
                found["head"] += _count(correction(work.labels, False))
            if recipe.causal_encoder == "training_time_test":  # it drafts its prefixes first
                uncorrected = work.blocks * min(num_drafts, head.config.pure_draft_prefix_len)
                corrected = work.blocks * num_drafts - uncorrected
                found["head"] += _count(prefixes) + _count(correction(corrected, False))
                found["head"] -= 2.0 * uncorrected * head.config.gru_hidden_dim * head.config.low_rank
                found["lm_head"] += 2.0 * work.blocks * num_drafts * hidden_size * config.logits_size
    return found


def _count_single_layer(config: SingleLayerConfig, recipe: OptimizationRecipe, work: _Work) -> dict[str, float]:
    """Of a step over `work`, by part."""
    draft = cast(SingleLayerDraft, meta_draft(config))
    hidden_size, heads = config.hidden_size, config.num_key_value_heads
    with torch.device("meta"):
        target = SimpleNamespace(
            embedding=nn.Embedding(config.vocab_size, hidden_size).requires_grad_(False),
            lm_head_weight=torch.empty(config.vocab_size, config.target_hidden_size),
            final_norm=nn.Identity(),
            hidden_size=hidden_size,
            num_layers=config.num_target_layers,
            stop_token_ids=frozenset(),
        )
        draft.bind(target)  # type: ignore[arg-type]
        draft.config = config
        tokens = torch.zeros(work.blocks, work.block_size, dtype=torch.int64)
        anchors = torch.zeros(work.blocks, dtype=torch.int64)
        text = torch.zeros(1, work.rows, dtype=torch.int64)
        features = torch.empty(1, work.rows, draft.fc.in_features)
        past = [torch.empty(1, heads, work.rows, config.head_dim, requires_grad=True) for _ in range(2)]
        fused = torch.empty(1, work.blocks, hidden_size, requires_grad=True)
        labelled = torch.empty(work.labels, hidden_size, requires_grad=True)
    blocks = Blocks(anchors, anchors, tokens, tokens, tokens)

    def project() -> Tensor:
        return torch.stack(list(draft.keys_values(draft.pair(text, draft.fuse(features)), text)))

    def chains() -> Tensor:
        pairs = draft.pair(tokens[None, :, 0], fused)
        return run_chains(draft, blocks, fused, pairs, anchors, PairKV(*past), _Unmasked())  # type: ignore[arg-type]

    target_width = OBJECTIVES[recipe.objective].needs_target * config.target_hidden_size
    return {
        "context": _count(project),
        "layers": _count(chains),
        "attention": 3 * 2 * 2.0 * work.pairs * config.num_attention_heads * config.head_dim,
        "lm_head": _count(lambda: draft.base_logits(labelled)) + 2.0 * work.labels * target_width * config.logits_size,
        "head": 0.0,
    }


class _Unmasked:
    """Stands for the attention of chains, whose operations are counted by what they may see."""

    def steps(self, count: int) -> Any:
        """Attention of one step of every chain."""
        return _FusedAttention.apply

    slots = steps


def _target_operations(text_config: Any, decoder_parameters: int, sample: SequenceType[Sequence]) -> float:
    """Operations of the target's pass per token of text: its products, and attention to the tokens before."""
    config = text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mean_context = sum(len(s.tokens) ** 2 for s in sample) / sum(len(s.tokens) for s in sample) / 2
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * width * mean_context
    return 2.0 * decoder_parameters + attention


def estimate_lines(estimate: Estimate) -> list[str]:
    """The estimate in words."""
    parameters, data = estimate.parameters, estimate.data
    parts = ", ".join(
        f"{label} {with_prefix(parameters[key]).replace('G', 'B')}"
        for key, label in _PARTS.items()
        if key in parameters
    )
    trained = (
        "" if parameters["trained"] == parameters["total"] else f"; {with_prefix(parameters['trained'])} are trained"
    )
    mean = f"{data.tokens / data.sequences:,.0f} tokens"
    source = f"counted in {data.counted}" if data.counted else "an assumption: there are no tokens on disk yet"
    features = (
        f"{with_prefix(estimate.feature_cache)}B on disk" if estimate.feature_cache else "computed for every step"
    )
    processes = "1 process" if estimate.processes == 1 else f"each of {estimate.processes} processes"
    shared = "" if estimate.processes == 1 else f", {_hours(estimate.hours)} of {estimate.processes}"
    lines = {
        "draft": f"{parameters['total']:,} parameters: {parts}{trained}",
        "target": f"{estimate.target_parameters:,} parameters, frozen",
        "data": f"{data.sequences:,} sequences of {mean} ({source})",
        "steps": f"{estimate.steps:,}: {estimate.epochs:.3g} epochs, {with_prefix(estimate.tokens)} tokens",
        "features": features,
        "memory": f"{with_prefix(estimate.memory['total'])}B in {processes} ({estimate.parallel}):",
        **{_row(name): f"{with_prefix(size)}B" for name, size in estimate.memory.items() if name != "total" and size},
        "operations": f"{with_prefix(estimate.step_operations['total'])}FLOP a step:",
        **{
            _row(name): f"{with_prefix(count)}FLOP"
            for name, count in estimate.step_operations.items()
            if name != "total" and count
        },
        "time": f"{_hours(estimate.device_hours)} of one {estimate.device}{shared}",
    }
    width = max(map(len, lines)) + 2
    return [
        *(f"{name:{width}}{text}" for name, text in lines.items()),
        "",
        f"The time is an estimate from counted operations at {ACHIEVED:.0%} of {with_prefix(MATRIX_RATE)}FLOP/s, not a "
        "measurement.",
        "Regenerating answers is not in it. Memory is for the longest sequences, without what kernels need briefly.",
    ]


def _row(name: str) -> str:
    return "  " + _ROWS.get(name, name.replace("_", " "))


def _hours(hours: float) -> str:
    return f"{hours:,.3g} hours" if hours >= 0.1 else f"{3600 * hours:,.3g} seconds"


_ROWS = {"step_copies": "copies for a step", "target_ends": "target embedding and LM head", "lm_head": "LM head"}
_PARTS = {
    "backbone": "backbone",
    "gru": "GRU",
    "w1": "W1",
    "w2": "W2",
    "layer": "layer and feature fusion",
    "lm_head": "its own LM head",
}


def with_prefix(value: float) -> str:
    """1234567 as `1.23 M`; ends in a space if there is no prefix, so that a unit may follow."""
    prefixes = iter(" kMGTPEZ")
    prefix = next(prefixes).strip()
    while abs(value) >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"
