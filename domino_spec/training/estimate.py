"""What a training run would take, before it starts: parameters, memory per process, steps, operations, hours.

Everything is built on meta tensors from configurations alone, so no weights are loaded or downloaded, and what shipped
recipes name needs no network: its shapes come with the package. Activations are counted by running the draft's own code
on tensors without contents. Operations are counted as `training.flops` counts them, and hours follow from them at a
stated rate: an estimate, not a measurement.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from domino_spec.draft.checkpoint import read_config
from domino_spec.draft.config import DraftConfig, SingleLayerConfig
from domino_spec.draft.initialize import continued_config, fresh_config, single_layer_config
from domino_spec.draft.load import AnyDraft, draft_directory, empty_draft, shape_mismatch
from domino_spec.recipe import DataRecipe, DraftRecipe, OptimizationRecipe, Recipe
from domino_spec.settings import UserError, require
from domino_spec.target.load import outlined_model, target_config
from domino_spec.target.outline import KNOWN_TARGETS, known_config
from domino_spec.training.anchors import sample_anchors
from domino_spec.training.curriculum import check_block_schedule
from domino_spec.training.data import Sequence, load_sequences, split_held_out
from domino_spec.training.flops import shortened, step_flops, step_work
from domino_spec.training.memory import anchor_count, state_memory, work_memory
from domino_spec.training.parallel import Processes, micro_batches
from domino_spec.training.step import tapped_layers

DEVICE, MATRIX_RATE = "H100", 989e12
"""What hours are given for: its dense bfloat16 rate in operations per second, by its data sheet."""
ACHIEVED = 0.4
"""Share of that rate which training is taken to reach; a published trainer of such drafts reaches 0.435."""
ASSUMED_CONVERSATIONS = 100_000
ASSUMED_TOKENS, ASSUMED_PROMPT = 1024, 256
"""Length of a conversation where there are no data yet, and how much of it is prompt."""
_DFLASH = DraftRecipe(num_layers=5, block_size=16, mask_token_id=151669, shift_label=False, head=None)
KNOWN_DRAFTS = {f"z-lab/{name}-DFlash-b16": (f"Qwen/{name}", _DFLASH) for name in ("Qwen3-4B", "Qwen3-8B")}
"""The published drafts that shipped recipes start from: target and shape."""
SAMPLED_SEQUENCES = 256
"""Sequences whose operations are counted, evenly spaced over the data."""


@dataclass(frozen=True)
class Data:
    """What is trained on in one epoch, held-out sequences left out."""

    counted: str | None
    """The file that holds it; None where `sequences` and `tokens` are assumptions."""
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
        processes: that share the work; what `torchrun` says (WORLD_SIZE) where not given, else 1.

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
    operations = _step_operations(draft.config, settings, sample)
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
    """Parameters of the target's decoder, and of its two ends (one where they are tied)."""
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
    """What is trained on, and a sample of its sequences: of the assumed length where their tokens are not known yet."""
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


def _step_operations(
    config: DraftConfig | SingleLayerConfig, recipe: OptimizationRecipe, sample: SequenceType[Sequence]
) -> dict[str, float]:
    """Operations of a step on average, over the sample and over the block schedule."""
    sizes = (*recipe.block_schedule, config.block_size)
    totals: dict[str, float] = {}
    for size in sizes:
        count = anchor_count(config, recipe, size)
        anchors = [sample_anchors(s, count, torch.Generator().manual_seed(0)) for s in sample]
        counted = step_flops(config, recipe, step_work(config, sample, anchors, size))
        for name, value in vars(counted).items():
            totals[name] = totals.get(name, 0.0) + value * recipe.batch_size / len(sample) / len(sizes)
    return totals


def _target_operations(text_config: Any, decoder_parameters: int, sample: SequenceType[Sequence]) -> float:
    """Operations of the target's pass per token of text: its products, and attention to what lies before."""
    config = text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mean_context = sum(len(s.tokens) ** 2 for s in sample) / sum(len(s.tokens) for s in sample) / 2
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * width * mean_context
    return 2.0 * decoder_parameters + attention


def estimate_lines(estimate: Estimate) -> list[str]:
    """The estimate in words."""
    parameters, data = estimate.parameters, estimate.data
    parts = ", ".join(
        f"{label} {shortened(parameters[key]).replace('G', 'B')}" for key, label in _PARTS.items() if key in parameters
    )
    trained = (
        "" if parameters["trained"] == parameters["total"] else f"; {shortened(parameters['trained'])} are trained"
    )
    mean = f"{data.tokens / data.sequences:,.0f} tokens"
    source = f"counted in {data.counted}" if data.counted else "an assumption: there are no tokens on disk yet"
    features = f"{shortened(estimate.feature_cache)}B on disk" if estimate.feature_cache else "computed for every step"
    processes = "1 process" if estimate.processes == 1 else f"each of {estimate.processes} processes"
    shared = "" if estimate.processes == 1 else f", {_hours(estimate.hours)} of {estimate.processes}"
    lines = {
        "draft": f"{parameters['total']:,} parameters: {parts}{trained}",
        "target": f"{estimate.target_parameters:,} parameters, frozen",
        "data": f"{data.sequences:,} sequences of {mean} ({source})",
        "steps": f"{estimate.steps:,}: {estimate.epochs:.3g} epochs, {shortened(estimate.tokens)} tokens",
        "features": features,
        "memory": f"{shortened(estimate.memory['total'])}B in {processes} ({estimate.parallel}):",
        **{_row(name): f"{shortened(size)}B" for name, size in estimate.memory.items() if name != "total" and size},
        "operations": f"{shortened(estimate.step_operations['total'])}FLOP a step:",
        **{
            _row(name): f"{shortened(count)}FLOP"
            for name, count in estimate.step_operations.items()
            if name != "total" and count
        },
        "time": f"{_hours(estimate.device_hours)} of one {estimate.device}{shared}",
    }
    width = max(map(len, lines)) + 2
    return [
        *(f"{name:{width}}{text}" for name, text in lines.items()),
        "",
        f"The time is an estimate from counted operations at {ACHIEVED:.0%} of {shortened(MATRIX_RATE)}FLOP/s, not a "
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
