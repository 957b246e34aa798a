"""The C twin of `blended_rows_torch_`, over the loops in blended.c: one pass over memory instead of a dozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from domino_spec.ops.blended import RowLosses, Terms
from domino_spec.ops.native import bindings
from domino_spec.ops.native.bindings import library

_TYPES = (torch.float32, torch.bfloat16)


def is_available(base: Tensor, correction: Tensor | None, target: Tensor | None) -> bool:
    """Whether `blended_rows_cpu_` takes these logits."""
    given = [logits for logits in (base, correction, target) if logits is not None]
    taken = all(x.device.type == "cpu" and x.dtype in _TYPES and x.is_contiguous() for x in given)
    return taken and (correction is None or correction.dtype == base.dtype) and library() is not None


def blended_rows_cpu_(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> RowLosses:
    """`blended_rows_` in C, where `is_available`; beside the losses, a thread needs 12 bytes per logit of one row."""
    target = target if terms.needs_target else None
    base_losses = weights.new_empty(len(base))
    final_losses = base_losses if correction is None else torch.empty_like(base_losses)
    adaptive_eta = math.nan if terms.adaptive_eta is None else terms.adaptive_eta
    bindings.blended_rows(
        base, correction, target, labels.contiguous(), weights.contiguous(), lambda_base, terms, adaptive_eta,
        base_losses, final_losses,
    )  # fmt: skip
    return RowLosses(base_losses, final_losses)
