"""The Triton twin of `blended_rows_torch_`: one program a row, which writes it once and holds only numbers in between.

A program passes over its row in blocks: sums of the softmaxes; with a target, how far the two distributions lie apart;
the gradients. From the second pass on, the row comes out of a cache. Arithmetic is float32.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from domino_spec.ops.blended import Terms

_MAX_BLOCK = 2048
"""Logits of one tensor that a program holds at once: 8 a thread, of bfloat16 16 bytes, one load."""
_LOWEST = tl.constexpr(-1e30)
"""Stands for logits past the end and for -inf: its exponential is 0, its products are finite."""
_SMALLEST_ALPHA = tl.constexpr(1e-30)
"""`blended.SMALLEST_ALPHA`."""


def blended_rows_triton_(
    base: Tensor,
    correction: Tensor | None,
    target: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    lambda_base: float,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """`blended_rows_` on a GPU; it needs no memory besides its results. Logits of one row must be neighbours."""
    rows, width = base.shape
    assert target is not None or not terms.needs_target
    # A tensor that is missing is replaced by one that is there, and never read.
    others = [base if logits is None else logits for logits in (correction, target)]
    assert width == 1 or all(logits.stride(1) == 1 for logits in (base, *others))
    base_losses = torch.empty(rows, dtype=torch.float32, device=base.device)
    final_losses = base_losses if correction is None else torch.empty_like(base_losses)
    if rows == 0:
        return base_losses, final_losses
    block = min(_MAX_BLOCK, max(32, triton.next_power_of_2(width)))
    with torch.cuda.device_of(base):  # Triton launches on the current device
        _rows_kernel[(rows,)](
            base, *others, labels.contiguous(), weights.contiguous(), base_losses, final_losses,
            base.stride(0), others[0].stride(0), others[1].stride(0),
            *map(float, (lambda_base, *terms[:-1], terms.adaptive_eta or 0.0)),  # an int would be compiled anew
            HAS_CORRECTION=correction is not None, HAS_TARGET=terms.needs_target,
            ADAPTIVE=terms.adaptive_eta is not None, WIDTH=width, BLOCK=block, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
    return base_losses, final_losses


@triton.jit
def _read(row, columns, WIDTH: tl.constexpr):
    """[BLOCK] float32 logits."""
    logits = tl.load(row + columns, mask=columns < WIDTH, other=_LOWEST).to(tl.float32)
    return tl.where(logits < _LOWEST, _LOWEST, logits)  # nan stays


@triton.jit
def _read_draft(base_row, correction_row, columns, CORRECTED: tl.constexpr, WIDTH: tl.constexpr):
    logits = _read(base_row, columns, WIDTH)
    if CORRECTED:
        logits += _read(correction_row, columns, WIDTH)
    return logits


@triton.jit
def _softmax(base_row, correction_row, CORRECTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, and the sum of exp(z - largest)."""
    top, total = tl.full((), _LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        logits = _read_draft(base_row, correction_row, start + tl.arange(0, BLOCK), CORRECTED, WIDTH)
        new_top = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top), 0)
        top = new_top
    return top, total


@triton.jit
def _loss_and_factors(
    base_row, correction_row, target_row, target_top, target_total, label,
    cross_entropy, kl, total_variation, log_acceptance, adaptive_eta,
    CORRECTED: tl.constexpr, HAS_TARGET: tl.constexpr, ADAPTIVE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One distribution's softmax, loss, and factors of its gradient: of q, of p, and of q where q < p."""
    top, total = _softmax(base_row, correction_row, CORRECTED, WIDTH, BLOCK)
    label_logit = tl.load(base_row + label).to(tl.float32)
    if CORRECTED:
        label_logit += tl.load(correction_row + label).to(tl.float32)
    loss = cross_entropy * (tl.log(total) - (label_logit - top))
    of_probs, of_target, of_below = cross_entropy, 0.0, 0.0
    if HAS_TARGET:
        divergence, alpha = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        below = tl.full((), 0.0, tl.float32)  # sum of q where q < p
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            gaps = _read_draft(base_row, correction_row, columns, CORRECTED, WIDTH) - top
            target_gaps = _read(target_row, columns, WIDTH) - target_top
            probs, target_probs = tl.exp(gaps) / total, tl.exp(target_gaps) / target_total
            divergence += tl.sum(target_probs * (target_gaps - gaps), 0)
            alpha += tl.sum(tl.minimum(probs, target_probs), 0)
            below += tl.sum(tl.where(probs < target_probs, probs, 0.0), 0)
        divergence += tl.log(total) - tl.log(target_total)
        alpha = tl.maximum(alpha, _SMALLEST_ALPHA)
        if ADAPTIVE:
            far = tl.exp(-adaptive_eta * alpha)
            kl += far
            total_variation += 1 - far
        loss += kl * divergence + total_variation * (1 - alpha) - log_acceptance * tl.log(alpha)
        of_target = kl
        of_below = total_variation + log_acceptance / alpha
        of_probs += kl + of_below * below
    return top, total, loss, of_probs, of_target, of_below


@triton.jit
def _gradient(
    logits, top, total, target_probs, at_label, of_probs, of_target, of_below, cross_entropy, HAS_TARGET: tl.constexpr
):
    probs = tl.exp(logits - top) / total
    gradient = of_probs * probs - tl.where(at_label, cross_entropy, 0.0)
    if HAS_TARGET:
        gradient -= of_target * target_probs + tl.where(probs < target_probs, of_below * probs, 0.0)
    return gradient


@triton.jit
def _rows_kernel(
    base_ptr, correction_ptr, target_ptr, labels_ptr, weights_ptr, base_losses_ptr, final_losses_ptr,
    base_stride, correction_stride, target_stride, lambda_base,
    cross_entropy, kl, total_variation, log_acceptance, adaptive_eta,
    HAS_CORRECTION: tl.constexpr, HAS_TARGET: tl.constexpr, ADAPTIVE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base_row = base_ptr + row * base_stride
    correction_row = correction_ptr + row * correction_stride
    target_row = target_ptr + row * target_stride
    label = tl.load(labels_ptr + row)
    weight = tl.load(weights_ptr + row)
    target_top, target_total = 0.0, 1.0
    if HAS_TARGET:
        target_top, target_total = _softmax(target_row, target_row, False, WIDTH, BLOCK)

    top, total, loss, of_probs, of_target, of_below = _loss_and_factors(
        base_row, correction_row, target_row, target_top, target_total, label,
        cross_entropy, kl, total_variation, log_acceptance, adaptive_eta, False, HAS_TARGET, ADAPTIVE, WIDTH, BLOCK,
    )  # fmt: skip
    tl.store(base_losses_ptr + row, loss)
    if HAS_CORRECTION:
        final_top, final_total, final_loss, final_of_probs, final_of_target, final_of_below = _loss_and_factors(
            base_row, correction_row, target_row, target_top, target_total, label,
            cross_entropy, kl, total_variation, log_acceptance, adaptive_eta, True, HAS_TARGET, ADAPTIVE, WIDTH, BLOCK,
        )  # fmt: skip
        tl.store(final_losses_ptr + row, final_loss)

    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside, at_label = columns < WIDTH, columns == label
        logits = _read(base_row, columns, WIDTH)
        target_probs = logits
        if HAS_TARGET:
            target_probs = tl.exp(_read(target_row, columns, WIDTH) - target_top) / target_total
        gradient = weight * _gradient(
            logits, top, total, target_probs, at_label, of_probs, of_target, of_below, cross_entropy, HAS_TARGET
        )
        if HAS_CORRECTION:
            final = logits + _read(correction_row, columns, WIDTH)
            final_gradient = (1 - lambda_base) * weight * _gradient(
                final, final_top, final_total, target_probs, at_label,
                final_of_probs, final_of_target, final_of_below, cross_entropy, HAS_TARGET,
            )  # fmt: skip
            gradient = lambda_base * gradient + final_gradient
        tl.debug_barrier()  # all threads have read what the stores overwrite, whichever of them holds which column
        tl.store(base_row + columns, gradient.to(base_ptr.dtype.element_ty), mask=inside)
        if HAS_CORRECTION:
            tl.store(correction_row + columns, final_gradient.to(correction_ptr.dtype.element_ty), mask=inside)
