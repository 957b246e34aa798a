"""The blended loss of base and final logits, with one LM-head product for both.

    base = h W^T,  final = base + u W2^T,  L = sum_t w_t [(1 - lambda) CE(final_t) + lambda CE(base_t)]

Both cross-entropies share the product `h W^T`, and the gradient of the sum reaches `h` through one product too
(DESIGN section 4). Tokens are taken in chunks, so [tokens, vocabulary] never exists for a whole batch: forward
computes the gradients of a chunk while its logits are at hand, and backward only scales them.

`blended_loss_reference` is the same function in plain autograd; tests hold the two equal in value and gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2_000_000
"""Logits in one chunk: 8 MB in float32."""


class BlendedLoss(NamedTuple):
    """Weighted sums over tokens; divide by the sum of weights of the whole optimizer step."""

    loss: Tensor
    """Scalar, differentiable: (1 - lambda) final + lambda base."""
    base: Tensor
    """Scalar, detached: weighted base cross-entropy."""
    final: Tensor
    """Scalar, detached: weighted final cross-entropy."""


def blended_loss_reference(
    hidden: Tensor,
    low_rank: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lm_head: Tensor,
    correction_weight: Tensor | None,
    lambda_base: float,
    target_hidden: Tensor | None = None,
) -> BlendedLoss:
    """Plain form of `blended_loss`, same arguments and returns; materialises all logits."""
    base = F.linear(hidden, lm_head).float()
    final = base
    if low_rank is not None and correction_weight is not None:
        final = base + F.linear(low_rank, correction_weight).float()
    if target_hidden is None:
        base_loss, final_loss = (
            (F.cross_entropy(x, labels.clamp(min=0), reduction="none") * weights).sum() for x in (base, final)
        )
    else:
        soft = F.linear(target_hidden, lm_head).float().softmax(-1)
        base_loss, final_loss = ((-(soft * x.log_softmax(-1)).sum(-1) * weights).sum() for x in (base, final))
    blended = base_loss if low_rank is None else (1 - lambda_base) * final_loss + lambda_base * base_loss
    return BlendedLoss(blended, base_loss.detach(), final_loss.detach())


class _Blended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, low_rank, labels, weights, lm_head, correction_weight, lambda_base, target_hidden):
        tokens, vocabulary = hidden.shape[0], lm_head.shape[0]
        chunk = max(1, CHUNK_LOGITS // vocabulary)
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_low_rank = None if low_rank is None else torch.empty_like(low_rank)
        grad_correction = None if low_rank is None else torch.zeros_like(correction_weight, dtype=torch.float32)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            weight, label = weights[rows, None], labels[rows, None]
            base = (hidden[rows] @ lm_head.t()).float()
            soft = None if target_hidden is None else (target_hidden[rows] @ lm_head.t()).float().softmax(-1)
            if low_rank is None:
                base_loss, base_grad = _cross_entropy(base, label, weight, soft)
                totals += torch.stack((base_loss, base_loss))
                grad_base = base_grad
            else:
                final = base + (low_rank[rows] @ correction_weight.t()).float()
                base_loss, base_grad = _cross_entropy(base, label, weight, soft)
                final_loss, final_grad = _cross_entropy(final, label, weight, soft)
                totals += torch.stack((base_loss, final_loss))
                final_grad *= 1 - lambda_base
                grad_base = base_grad.mul_(lambda_base).add_(final_grad)
                final_grad = final_grad.to(low_rank.dtype)
                assert grad_low_rank is not None
                grad_low_rank[rows] = final_grad @ correction_weight
                grad_correction += (final_grad.t() @ low_rank[rows]).float()
            grad_hidden[rows] = grad_base.to(hidden.dtype) @ lm_head
        ctx.save_for_backward(grad_hidden, grad_low_rank, grad_correction)
        ctx.correction_dtype = None if low_rank is None else correction_weight.dtype
        base_total, final_total = totals.float()
        blended = (1 - lambda_base) * final_total + lambda_base * base_total  # equal totals without a head
        ctx.mark_non_differentiable(base_total, final_total)
        return blended, base_total, final_total

    @staticmethod
    def backward(ctx, grad, *_):
        grad_hidden, grad_low_rank, grad_correction = ctx.saved_tensors
        if grad_low_rank is None:
            return grad_hidden * grad, None, None, None, None, None, None, None
        return (
            grad_hidden * grad,
            grad_low_rank * grad,
            None,
            None,
            None,
            (grad_correction * grad).to(ctx.correction_dtype),
            None,
            None,
        )


def _cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, soft: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, and its gradient with respect to `logits`; a negative label has weight 0."""
    log_probs = logits.log_softmax(-1)
    index = label.clamp(min=0)
    if soft is None:
        loss = -(log_probs.gather(1, index) * weight).sum(dtype=torch.float64)
        grad = log_probs.exp_().mul_(weight)
        grad.scatter_add_(1, index, -weight)
    else:
        loss = -(torch.linalg.vecdot(soft, log_probs) * weight[:, 0]).sum(dtype=torch.float64)
        grad = log_probs.exp_().sub_(soft).mul_(weight)
    return loss, grad


def blended_loss(
    hidden: Tensor,
    low_rank: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lm_head: Tensor,
    correction_weight: Tensor | None,
    lambda_base: float,
    target_hidden: Tensor | None = None,
) -> BlendedLoss:
    """Weighted sum of blended losses over M drafted tokens (paper 4.2).

    Args:
        hidden: [M, H], the slot that predicts each token.
        low_rank: [M, L], `head.low_rank` of each, zero rows where the base logits are used alone; None without a head.
        labels: [M], indices into the logits; -1 where the label cannot be proposed (its weight must be 0).
        weights: [M] float32.
        lm_head: [V, H], frozen: it gets no gradient.
        correction_weight: W2 [V, L]; None without a head.
        lambda_base: weight of the base loss, 0 to 1.
        target_hidden: [M, H], the target's own final hidden state before each label; given, the loss is the
            cross-entropy to the target's distribution (KL up to a constant) instead of to the label.
    """
    dtype = hidden.dtype
    lm_head = lm_head.to(dtype)
    if low_rank is not None:
        assert correction_weight is not None
        low_rank, correction_weight = low_rank.to(dtype), correction_weight.to(dtype)
    return BlendedLoss(
        *_Blended.apply(
            hidden,
            low_rank,
            labels,
            weights,
            lm_head,
            correction_weight,
            lambda_base,
            None if target_hidden is None else target_hidden.to(dtype),
        )
    )
