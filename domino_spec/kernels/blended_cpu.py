"""The C twin of `blended_rows_torch_`, over the loops in blended.c: one pass over memory instead of a dozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from domino_spec.kernels.blended import RowLosses, Terms
from domino_spec.kernels.cpu import address, library, loaded

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
    rows, width = base.shape
    assert target is not None or not terms.needs_target
    assert rows == 0 or 0 <= int(labels.min()) <= int(labels.max()) < width, "C would write beyond the row"
    labels, weights = labels.contiguous(), weights.contiguous()
    assert labels.dtype == torch.int64 and weights.dtype == torch.float32
    target = target if terms.needs_target else None
    base_losses = weights.new_empty(rows)
    final_losses = base_losses if correction is None else torch.empty_like(base_losses)
    loaded().blended_rows(
        base.dtype == torch.bfloat16, base.data_ptr(), address(correction),
        target is not None and target.dtype == torch.bfloat16, address(target),
        labels.data_ptr(), weights.data_ptr(), rows, width, lambda_base,
        terms.cross_entropy, terms.kl, terms.total_variation, terms.log_acceptance,
        math.nan if terms.adaptive_eta is None else terms.adaptive_eta,
        base_losses.data_ptr(), final_losses.data_ptr(),
    )  # fmt: skip
    return RowLosses(base_losses, final_losses)
