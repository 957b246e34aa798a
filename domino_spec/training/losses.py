"""What a drafted token's loss is: the objectives, and the blended loss in plain autograd.

    base = h W^T,  final = base + u W2^T,  L = sum_t w_t [(1 - lambda) l(final_t) + lambda l(base_t)]

where l is one of the objectives (paper 4.2 has cross-entropy). What runs in training is `fused_loss`; tests hold the
two equal in value and gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops.blended import Terms

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
    """Plain form of `fused_loss.blended_loss`, same arguments and returns; materialises all logits."""
    base = F.linear(hidden, lm_head).float()
    target = None if target_hidden is None else F.linear(target_hidden, lm_head)
    index = labels.clamp(min=0)
    base_loss = final_loss = (token_losses(base, index, target, terms) * weights).sum()
    if low_rank is not None and correction_weight is not None:
        final = base + F.linear(low_rank, correction_weight).float()
        final_loss = (token_losses(final, index, target, terms) * weights).sum()
    blended = (1 - lambda_base) * final_loss + lambda_base * base_loss
    return BlendedLoss(blended, base_loss.detach(), final_loss.detach())
