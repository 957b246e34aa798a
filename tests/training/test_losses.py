"""The blended loss equals its plain form in value and gradient, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from domino_spec.training import losses
from domino_spec.training.losses import blended_loss, blended_loss_reference
from tests.tiny import assert_close

TOKENS, HIDDEN, RANK, VOCAB = 23, 8, 4, 17


def inputs(head: bool, objective: str) -> dict:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape, grad=False):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    labels[3], weights[3] = -1, 0.0  # outside the draft vocabulary
    return dict(
        hidden=noise(TOKENS, HIDDEN, grad=True),
        low_rank=noise(TOKENS, RANK, grad=True) if head else None,
        labels=labels,
        weights=weights,
        lm_head=noise(VOCAB, HIDDEN),
        correction_weight=noise(VOCAB, RANK, grad=True) if head else None,
        target_hidden=noise(TOKENS, HIDDEN) if objective == "kl" else None,
    )


def gradients(function, arguments: dict, lambda_base: float):
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    result = function(**arguments, lambda_base=lambda_base)
    return result, torch.autograd.grad(result.loss * 1.7, leaves)


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
@pytest.mark.parametrize("lambda_base", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000], ids=lambda r: f"{r} rows a chunk")
def test_value_and_gradient_equal_the_plain_form(monkeypatch, objective, lambda_base, head, rows):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", rows * VOCAB)
    arguments = inputs(head, objective)
    fast, fast_gradients = gradients(blended_loss, arguments, lambda_base)
    plain, plain_gradients = gradients(blended_loss_reference, arguments, lambda_base)
    for a, b in zip(fast, plain, strict=True):
        assert_close(a, b)
    assert len(fast_gradients) == (3 if head else 1)
    for a, b in zip(fast_gradients, plain_gradients, strict=True):
        assert_close(a, b)
    assert plain_gradients[0].abs().max() > 0.01


def test_the_plain_form_is_the_definition():
    arguments = inputs(True, "cross_entropy")
    base = arguments["hidden"] @ arguments["lm_head"].T
    final = base + arguments["low_rank"] @ arguments["correction_weight"].T
    expected = 0.0
    for t in range(TOKENS):
        if arguments["weights"][t] > 0:
            label = arguments["labels"][t]
            ce = [-F.log_softmax(x[t], -1)[label] for x in (base, final)]
            expected += arguments["weights"][t] * (0.3 * ce[0] + 0.7 * ce[1])
    assert_close(blended_loss_reference(**arguments, lambda_base=0.3).loss, expected)


@pytest.mark.parametrize("lambda_base", [0.0, 1.0])
def test_the_schedules_ends_train_one_loss_only(lambda_base):
    """lambda 1: the head gets no gradient at all; lambda 0: the value is the final loss."""
    arguments = inputs(True, "cross_entropy")
    result, (_, grad_low_rank, grad_correction) = gradients(blended_loss, arguments, lambda_base)
    if lambda_base == 1:
        assert not grad_low_rank.any() and not grad_correction.any()
        assert_close(result.loss, result.base)
    else:
        assert grad_correction.abs().max() > 0
        assert_close(result.loss, result.final)


def test_the_lm_head_is_frozen():
    arguments = inputs(True, "cross_entropy")
    arguments["lm_head"].requires_grad_(True)
    blended_loss(**arguments, lambda_base=0.5).loss.backward()
    assert arguments["lm_head"].grad is None


def test_a_label_outside_the_vocabulary_with_weight_zero_adds_nothing():
    arguments = inputs(True, "cross_entropy")
    keep = arguments["labels"] >= 0
    fewer = {
        name: value[keep] if name in ("hidden", "low_rank", "labels", "weights") else value
        for name, value in arguments.items()
    }
    assert_close(blended_loss(**arguments, lambda_base=0.3).loss, blended_loss(**fewer, lambda_base=0.3).loss)


def test_kl_objective_is_least_at_the_targets_own_distribution():
    """Its gradient vanishes where the base logits are the target's."""
    arguments = inputs(False, "kl")
    arguments["hidden"] = arguments["target_hidden"].clone().requires_grad_(True)
    _, (gradient,) = gradients(blended_loss, arguments, 1.0)
    assert_close(gradient, torch.zeros_like(gradient))
