"""Memory that training takes in each process, worked out from shapes before anything is loaded.

What weights and optimizer take is exact. Activations are counted by running the draft's own code on tensors without
contents and adding up what it keeps for the backward pass; what kernels need for a moment is not in it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from domino_spec.draft.config import SINGLE_LAYER_KINDS, DraftConfig, SingleLayerConfig
from domino_spec.draft.domino import Draft
from domino_spec.recipe import OptimizationRecipe
from domino_spec.training.fused_loss import CHUNK_LOGITS_CUDA
from domino_spec.training.losses import OBJECTIVES


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
        copies = 2 * trained if low_precision else 0  # autocast's; gradients lie in DDP's buckets
    return {
        "master_weights": 4 * total // share,
        "gradients": 4 * trained // share,
        "optimizer_moments": 8 * trained // share,
        "step_copies": copies,
    }


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, for this process's container where it runs in one; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError):
        pass
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text("utf-8") for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return min(found) if found else None


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
    activations = 0  # one layer's are few beside the rest
    if config.kind not in SINGLE_LAYER_KINDS:
        activations = activation_bytes(cast(DraftConfig, config), recipe, rows, blocks, size)
    return {
        "features": rows * token_features,
        "activations": activations,
        "loss": element * (held * logits + 2 * labels * width),
    }


def anchor_count(config: DraftConfig | SingleLayerConfig, recipe: OptimizationRecipe, block_size: int) -> int:
    """Blocks per sequence: shorter ones are more (`curriculum.block_size`)."""
    return recipe.anchors * config.block_size // block_size


def activation_bytes(config: DraftConfig, recipe: OptimizationRecipe, rows: int, blocks: int, block_size: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights and their copies left out.

    Args:
        config: of the draft.
        recipe: precision, what is trained, and whether layers are computed anew.
        rows: of context.
        blocks: of all sequences.
        block_size: slots per block.
    """
    inputs = 0
    if recipe.activation_checkpointing and recipe.trained == "all":
        # Every layer keeps its input and its context; only one at a time is computed anew.
        context = 2 * 2 * rows * config.num_key_value_heads * config.head_dim
        inputs = (config.num_hidden_layers - 1) * (4 * blocks * block_size * config.hidden_size + context)
        config = replace(config, num_hidden_layers=1)

    def growing(part: DraftConfig) -> int:
        """What does not grow with the batch is weights and copies of them."""
        return _saved_bytes(part, recipe, rows, blocks, block_size) - _saved_bytes(part, recipe, 0, 0, block_size)

    one = replace(config, num_hidden_layers=1)
    if config.num_hidden_layers == 1:
        return inputs + growing(one)
    # Layers are alike: a second one adds what each further one does.
    bare = replace(one, head=None)
    layer = growing(replace(bare, num_hidden_layers=2)) - growing(bare)
    return inputs + growing(one) + (config.num_hidden_layers - 1) * layer


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
    """Stands for attention in one kernel: keeps its inputs, its output and a normaliser per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out
