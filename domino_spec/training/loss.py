"""The loss of drafted tokens: its objectives, and the blended loss with one LM-head product for both kinds of logits.

    base = h W^T,  final = base + u W2^T,  L = sum_t w_t [(1 - lambda) l(final_t) + lambda l(base_t)]

where l is one of the objectives (paper 4.2 has cross-entropy). `blended_loss` runs in training: both losses share the
product `h W^T`, and the gradient of their sum reaches `h` through one product too (docs/design.md, section 6).
[tokens, vocabulary] never exists for a whole batch: forward turns the logits of a chunk into losses and, in their
place, gradients (`ops.blended`), and backward only scales these. `blended_loss_reference` is the same in plain
autograd; tests hold the two equal in value and gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.blended import Terms, blended_rows_

OBJECTIVES: dict[str, Terms] = {
    "cross_entropy": Terms(cross_entropy=1.0),
    "kl": Terms(kl=1.0),
    "tv": Terms(total_variation=1.0),
    "ce_tv": Terms(cross_entropy=0.1, total_variation=0.9),
    "lk_alpha": Terms(log_acceptance=1.0),
    "lk_hybrid": Terms(adaptive_eta=3.0),
}
"""cross_entropy: on the target's text (the paper). The others compare with the target's own distribution, over the
tokens that the draft can propose: kl, its divergence; tv, one minus the probability that a sampled draft is accepted;
ce_tv, DSpark's mixture of both kinds; lk_alpha and lk_hybrid, the LK losses of arXiv 2602.23881 (eta 3 is theirs)."""
CHUNK_LOGITS = 2_000_000
"""Logits in one chunk on CPU: 8 MB in float32."""
CHUNK_LOGITS_CUDA = 160_000_000
"""The same on CUDA, where a product over few rows would leave the device idle: 320 MB in bfloat16."""


class BlendedLoss(NamedTuple):
    """Weighted sums over tokens; divide by the denominator of the whole optimizer step."""

    loss: Tensor
    """Scalar, differentiable: (1 - lambda) final + lambda base."""
    base: Tensor
    """Scalar, detached: weighted loss of the base logits."""
    final: Tensor
    """Scalar, detached: weighted loss of the final logits."""


def token_losses(logits: Tensor, labels: Tensor, target_logits: Tensor | None, terms: Terms) -> Tensor:
    """The objective itself, token by token, in plain autograd: logits [M, V] and labels [M] to losses [M]."""
    logits = logits.float()
    losses = terms.cross_entropy * F.cross_entropy(logits, labels, reduction="none")
    if not terms.needs_target:
        return losses
    assert target_logits is not None
    probs, target_probs = logits.softmax(-1), target_logits.float().softmax(-1)
    alpha = torch.minimum(probs, target_probs).sum(-1)
    kl = F.kl_div(logits.log_softmax(-1), target_probs, reduction="none").sum(-1)
    losses = losses + terms.kl * kl + terms.total_variation * (1 - alpha) - terms.log_acceptance * alpha.log()
    if terms.adaptive_eta is not None:
        weight = torch.exp(-terms.adaptive_eta * alpha.detach())
        losses = losses + weight * kl + (1 - weight) * (1 - alpha)
    return losses


def blended_loss_reference(
    hidden: Tensor,
    low_rank: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lm_head: Tensor,
    correction_weight: Tensor | None,
    lambda_base: float,
    target_hidden: Tensor | None = None,
    terms: Terms = OBJECTIVES["cross_entropy"],
) -> BlendedLoss:
    """Plain form of `blended_loss`, same arguments and returns; materialises all logits."""
    base = F.linear(hidden, lm_head).float()
    target = None if target_hidden is None else F.linear(target_hidden, lm_head)
    index = labels.clamp(min=0)
    base_loss = final_loss = (token_losses(base, index, target, terms) * weights).sum()
    if low_rank is not None and correction_weight is not None:
        final = base + F.linear(low_rank, correction_weight).float()
        final_loss = (token_losses(final, index, target, terms) * weights).sum()
    blended = (1 - lambda_base) * final_loss + lambda_base * base_loss
    return BlendedLoss(blended, base_loss.detach(), final_loss.detach())


class _Blended(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        low_rank: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        lm_head: Tensor,
        correction_weight: Tensor | None,
        lambda_base: float,
        target_hidden: Tensor | None,
        target_lm_head: Tensor,
        terms: Terms,
    ) -> tuple[Tensor, Tensor, Tensor]:
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        # A frozen backbone spares the product that leads back to it.
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_lm_head = torch.zeros_like(lm_head, dtype=torch.float32) if ctx.needs_input_grad[4] else None
        grad_low_rank = grad_correction = None
        if low_rank is not None:
            assert correction_weight is not None
            grad_low_rank = torch.empty_like(low_rank)
            grad_correction = torch.zeros_like(correction_weight, dtype=torch.float32)
        for start in range(0, len(hidden), chunk := _chunk_rows(lm_head)):
            rows = slice(start, start + chunk)
            base = hidden[rows] @ lm_head.t()
            correction = None
            if low_rank is not None and correction_weight is not None:
                correction = low_rank[rows] @ correction_weight.t()
            target = None if target_hidden is None else target_hidden[rows] @ target_lm_head.t()
            losses = blended_rows_(base, correction, target, labels[rows], weights[rows], lambda_base, terms)
            totals += torch.stack([(part * weights[rows]).sum(dtype=torch.float64) for part in losses])
            # `base` and `correction` now hold gradients.
            if grad_hidden is not None:
                torch.mm(base, lm_head, out=grad_hidden[rows])
            if grad_lm_head is not None:
                grad_lm_head += base.t() @ hidden[rows]
            if correction is not None:
                assert low_rank is not None and correction_weight is not None
                assert grad_low_rank is not None and grad_correction is not None
                torch.mm(correction, correction_weight, out=grad_low_rank[rows])
                grad_correction += correction.t() @ low_rank[rows]
        ctx.save_for_backward(grad_hidden, grad_low_rank, grad_lm_head, grad_correction)
        ctx.weight_dtype = lm_head.dtype
        base_total, final_total = totals.float()
        blended = (1 - lambda_base) * final_total + lambda_base * base_total  # equal totals without a head
        ctx.mark_non_differentiable(base_total, final_total)
        return blended, base_total, final_total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_low_rank, grad_lm_head, grad_correction = (
            None if saved is None else saved * grad for saved in ctx.saved_tensors
        )
        # Weights' gradients were added up in float32.
        grad_lm_head, grad_correction = (
            None if g is None else g.to(ctx.weight_dtype) for g in (grad_lm_head, grad_correction)
        )
        return grad_hidden, grad_low_rank, None, None, grad_lm_head, grad_correction, None, None, None, None


def _chunk_rows(lm_head: Tensor) -> int:
    logits = CHUNK_LOGITS_CUDA if lm_head.device.type == "cuda" else CHUNK_LOGITS
    return max(1, logits // len(lm_head))


def blended_loss(
    hidden: Tensor,
    low_rank: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lm_head: Tensor,
    correction_weight: Tensor | None,
    lambda_base: float,
    target_hidden: Tensor | None = None,
    terms: Terms = OBJECTIVES["cross_entropy"],
    target_lm_head: Tensor | None = None,
) -> BlendedLoss:
    """Weighted sum of blended losses over M drafted tokens (paper 4.2).

    Args:
        hidden: [M, H], the slot that predicts each token.
        low_rank: [M, L], `head.low_rank` of each, zero rows if the base logits are used alone; None without a head.
        labels: [M], indices into the logits; -1 if the label cannot be proposed (its weight must be 0).
        weights: [M] float32.
        lm_head: [V, H], the draft's output projection: the target's, frozen, or its own.
        correction_weight: W2 [V, L]; None without a head.
        lambda_base: weight of the base loss, 0 to 1.
        target_hidden: [M, H], the target's own final hidden state before each label, for objectives that need its
            distribution.
        terms: of the objective.
        target_lm_head: [V, H'], rows of the target's output projection for the same tokens; None if it is `lm_head`.
    """
    dtype = hidden.dtype
    weight = lm_head.to(dtype)
    target_weight = weight.detach() if target_lm_head is None else target_lm_head.to(dtype)
    return BlendedLoss(
        *_Blended.apply(
            hidden,
            None if low_rank is None else low_rank.to(dtype),
            labels.clamp(min=0),
            weights,
            weight,
            None if correction_weight is None else correction_weight.to(dtype),
            lambda_base,
            None if target_hidden is None else target_hidden.to(dtype),
            target_weight,
            terms,
        )
    )


@torch.no_grad()
def label_probabilities(
    hidden: Tensor, low_rank: Tensor | None, labels: Tensor, lm_head: Tensor, correction_weight: Tensor | None
) -> Tensor:
    """What the draft gives each label: arguments as in `blended_loss`, [M] float32 in chunks."""
    lm_head = lm_head.to(hidden.dtype)
    found = []
    for start in range(0, len(hidden), chunk := _chunk_rows(lm_head)):
        rows = slice(start, start + chunk)
        logits = (hidden[rows] @ lm_head.t()).float()
        if low_rank is not None and correction_weight is not None:
            logits += low_rank[rows] @ correction_weight.to(low_rank.dtype).t()
        chosen = logits.gather(1, labels[rows].clamp(min=0)[:, None])[:, 0]
        found.append(torch.exp(chosen - logits.logsumexp(-1)))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)
