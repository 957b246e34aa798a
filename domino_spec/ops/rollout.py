"""Drafting with the head by the fastest twin: Triton for chains on CUDA, C on a CPU, else plain PyTorch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from domino_spec.ops.embedding import EmbeddingTable
from domino_spec.ops.native.rollout import head_rollout_cpu, head_tree_cpu, takes
from domino_spec.ops.reference import Rollout, draft_distribution, draw
from domino_spec.ops.reference import head_rollout as reference_rollout
from domino_spec.ops.trees import Tree
from domino_spec.ops.trees import head_tree as reference_tree

if TYPE_CHECKING:
    from domino_spec.draft.domino import DominoHead

_log = logging.getLogger(__name__)


def head_rollout(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None = None,
    temperature: float | Tensor = 0.0,
    uniform: Tensor | None = None,
    min_confidence: float = 0.0,
) -> Rollout:
    """`reference.head_rollout`, with the same arguments.

    On CUDA it never looks at the device, so that a graph can capture it; N then does not shrink where nobody's
    confidence reaches `min_confidence`. The kernels need `embed_choice` to be an `EmbeddingTable`.
    """
    given = (head, hidden, base_logits, anchor_embedding, embed_choice, candidates, temperature, uniform)
    if not hidden.is_cuda:
        twin = head_rollout_cpu if takes(head, hidden, base_logits, embed_choice) else reference_rollout
        return twin(*given, min_confidence)
    if head is None:
        return headless_rollout(base_logits, candidates, temperature, uniform, min_confidence)
    reason = _why_not(head, hidden, base_logits, embed_choice, candidates)
    if reason is not None:
        _say(reason)
        return reference_rollout(*given, min_confidence)
    from domino_spec.ops.triton.rollout import head_rollout_triton

    assert isinstance(embed_choice, EmbeddingTable)
    return head_rollout_triton(
        head, hidden, base_logits, anchor_embedding, embed_choice, candidates, temperature, uniform, min_confidence
    )


def head_tree(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
    budget: int,
    width: int | None,
    min_confidence: float = 0.0,
) -> Tree:
    """`trees.head_tree` without a depth penalty, with the same arguments."""
    twin = head_tree_cpu if takes(head, hidden, base_logits, embed_choice) else reference_tree
    return twin(head, hidden, base_logits, anchor_embedding, embed_choice, candidates, budget, width, min_confidence)


def headless_rollout(
    base_logits: Tensor,
    candidates: int | None = None,
    temperature: float | Tensor = 0.0,
    uniform: Tensor | None = None,
    min_confidence: float = 0.0,
) -> Rollout:
    """`reference.head_rollout` without a head: slots do not wait for each other, so all are decided at once."""
    requests, drafts, width = base_logits.shape
    logits, ids = base_logits, torch.arange(width, device=base_logits.device).expand(base_logits.shape)
    if candidates is not None and candidates < width:
        logits, ids = base_logits.topk(candidates, dim=-1)
    confidence = logits.float().softmax(-1).amax(-1).cumprod(1) if min_confidence > 0 else None
    if uniform is None:
        return Rollout(ids.gather(-1, logits.argmax(-1, keepdim=True))[..., 0], None, None, confidence)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((requests,), float(temperature), device=logits.device)
    of_rows = temperature.float().repeat_interleave(drafts, output_size=requests * drafts)[:, None]
    probs = draft_distribution(logits.flatten(0, 1), of_rows).view(logits.shape)
    return Rollout(ids.gather(-1, draw(probs, uniform)[..., None])[..., 0], ids, probs, confidence)


def _why_not(
    head: DominoHead,
    hidden: Tensor,
    base_logits: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
) -> str | None:
    """What keeps the kernels from taking a rollout on CUDA; None where nothing does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not isinstance(embed_choice, EmbeddingTable):
        return "the target's embedding is not a plain table"
    if embed_choice.weight.device != hidden.device:
        return "the target's embedding is on another device"
    if not hidden.dtype == base_logits.dtype == head.input_weight.dtype == embed_choice.dtype:
        return "weights and logits are of several types"
    from domino_spec.ops.triton.rollout import Shape, suits

    config = head.config
    requests, drafts, width = base_logits.shape
    sizes = (hidden.shape[-1], config.gru_hidden_dim, config.low_rank)
    shape = Shape(requests, drafts, width, candidates, *sizes, hidden.dtype)
    if not suits(shape) or embed_choice.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels do not take {hidden.dtype} with a state of {config.gru_hidden_dim}"
    return None


@functools.cache
def _say(reason: str) -> None:
    _log.warning("the head rollout runs step by step in PyTorch, which is slower: %s", reason)
