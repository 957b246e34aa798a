"""Losses and gradients of a chunk of logits, row by row: the inside of the blended loss.

The draft is trained on two distributions at once, that of the base logits and that of the final ones (base plus
correction). For every row, this module turns logits into losses and, in place, into gradients; the products with the
LM head around it belong to `training.loss`. `blended_rows_` uses C loops on a CPU and a Triton kernel on CUDA;
the PyTorch version, which explains them, is here too.

For one row, with draft distribution q = softmax(z), target distribution p and label y, the loss is a sum of terms:

    CE = -log q_y    KL = sum p log(p / q)    TV = 1 - alpha    -log alpha,    alpha = sum min(p, q)

alpha is the probability that a token sampled from the draft is accepted. With m = [q < p], their gradients are

    dCE/dz = q - onehot(y)    dKL/dz = q - p    dTV/dz = q (<q, m> - m)    d(-log alpha)/dz = dTV/dz / alpha

Shapes: M rows, V logits (the draft vocabulary if there is one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from domino_spec.ops.native import bindings
from domino_spec.ops.triton import has_triton

SMALLEST_ALPHA = 1e-30
"""A smaller alpha counts as this: it would come from probabilities that float32 cannot hold, or be 0."""


class Terms(NamedTuple):
    """How much of each loss an objective takes."""

    cross_entropy: float = 0.0
    """Share of the cross-entropy on the target's text."""
    kl: float = 0.0
    """Kullback-Leibler divergence from the target's distribution to the draft's."""
    total_variation: float = 0.0
    log_acceptance: float = 0.0
    """Share of -log alpha (LK losses, arXiv 2602.23881)."""
    adaptive_eta: float | None = None
    """Adds weight * KL + (1 - weight) * TV, where weight = exp(-eta * alpha) gets no gradient (that paper's hybrid):
    KL while the distributions are far apart and TV's gradient vanishes, TV later."""

    @property
    def needs_target(self) -> bool:
        """Whether the loss compares with the target's distribution, not only with its text."""
        return any((self.kl, self.total_variation, self.log_acceptance)) or self.adaptive_eta is not None


class RowLosses(NamedTuple):
    """Losses before weighting, each [M] float32."""

    base: Tensor
    final: Tensor
    """Equal to `base` if there is no correction."""


def blended_rows_(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> RowLosses:
    """Losses of every row; logits become gradients of sum_i weights_i (lambda base_i + (1 - lambda) final_i).

    Args:
        base: [M, V] base logits, float32 or bfloat16 (computed in float32); becomes the gradient with respect to them.
        correction: [M, V] of the same type; becomes its gradient. None without a head: base then counts fully.
        target: [M, V] the target's logits for the same tokens, not changed; required if `terms.needs_target`.
        labels: [M] int64, indices into the logits.
        weights: [M] float32.
        lambda_base: weight of the base loss, 0 to 1.
        terms: of the objective.
    """
    given = (base, correction, target)
    contiguous = all(logits is None or logits.is_contiguous() for logits in given)
    types = tuple(None if logits is None else logits.dtype for logits in given)
    compute = _implementation(base.device.type, types, contiguous)
    return RowLosses(*compute(base, correction, target, labels, weights, lambda_base, terms))


@functools.cache
def _implementation(device: str, types: tuple[torch.dtype | None, ...], contiguous: bool) -> Callable[..., tuple]:
    """The fastest one for logits of this kind; `types` are those of base, correction and target."""
    if device == "cuda" and has_triton("the loss"):
        from domino_spec.ops.triton.blended import blended_rows_triton_

        return blended_rows_triton_
    base, correction, target = types
    taken = base in _IN_C and correction in (None, base) and target in (None, *_IN_C)
    native = device == "cpu" and contiguous and taken and bindings.library() is not None
    return blended_rows_in_c_ if native else blended_rows_torch_


_IN_C = (torch.float32, torch.bfloat16)


def blended_rows_in_c_(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> RowLosses:
    """`blended_rows_` in one pass over memory; a thread needs 12 bytes of scratch per logit of one row."""
    target = target if terms.needs_target else None
    given = (base, correction, target, labels.contiguous(), weights.contiguous(), lambda_base, terms)
    return RowLosses(*bindings.blended_rows(*given))


def blended_rows_torch_(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> RowLosses:
    """`blended_rows_` in PyTorch, on any device."""
    target_probs = None if target is None else target.float().softmax(-1)
    base_float = base.float()
    base_losses, base_grad = _losses_and_gradients(base_float, target_probs, labels, terms)
    if correction is None:
        base.copy_(base_grad.mul_(weights[:, None]))
        return RowLosses(base_losses, base_losses)
    final_losses, final_grad = _losses_and_gradients(base_float + correction, target_probs, labels, terms)
    final_grad.mul_((1 - lambda_base) * weights[:, None])
    correction.copy_(final_grad)
    base.copy_(final_grad.addcmul_(base_grad, lambda_base * weights[:, None]))
    return RowLosses(base_losses, final_losses)


def _losses_and_gradients(
    logits: Tensor, target_probs: Tensor | None, labels: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """Losses [M] and their gradients with respect to float32 logits [M, V]."""
    log_probs = logits.log_softmax(-1)
    index = labels[:, None]
    losses = -terms.cross_entropy * log_probs.gather(1, index)[:, 0]
    if target_probs is None:
        grad = log_probs.exp_().mul_(terms.cross_entropy)
        return losses, grad.scatter_add_(1, index, grad.new_full(index.shape, -terms.cross_entropy))

    probs = log_probs.exp()
    alpha = torch.minimum(probs, target_probs).sum(-1, keepdim=True).clamp_(min=SMALLEST_ALPHA)
    kl, tv = torch.full_like(alpha, terms.kl), torch.full_like(alpha, terms.total_variation)
    if terms.adaptive_eta is not None:
        adaptive = torch.exp(-terms.adaptive_eta * alpha)
        kl, tv = kl + adaptive, tv + 1 - adaptive
    divergence = (torch.special.xlogy(target_probs, target_probs) - target_probs * log_probs).sum(-1, keepdim=True)
    losses = losses + (kl * divergence + tv * (1 - alpha) - terms.log_acceptance * alpha.log())[:, 0]
    pull = tv + terms.log_acceptance / alpha
    below = probs * (probs < target_probs)
    grad = probs * (terms.cross_entropy + kl + pull * below.sum(-1, keepdim=True))
    grad -= kl * target_probs + pull * below
    return losses, grad.scatter_add_(1, index, grad.new_full(index.shape, -terms.cross_entropy))
