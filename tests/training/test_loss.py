"""The blended loss equals its plain form in value and gradient, whatever the objective and the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from domino_spec.training import loss as loss_module
from domino_spec.training.loss import (
    OBJECTIVES,
    blended_loss,
    blended_loss_reference,
    label_probabilities,
    token_losses,
)
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
        target_hidden=noise(TOKENS, HIDDEN) if OBJECTIVES[objective].needs_target else None,
        terms=OBJECTIVES[objective],
    )


def gradients(function, arguments: dict, lambda_base: float):
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    result = function(**arguments, lambda_base=lambda_base)
    return result, torch.autograd.grad(result.loss * 1.7, leaves)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lambda_base", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000], ids=lambda r: f"{r} rows a chunk")
def test_value_and_gradient_equal_the_plain_form(monkeypatch, objective, lambda_base, head, rows):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", rows * VOCAB)
    arguments = inputs(head, objective)
    fast, fast_gradients = gradients(blended_loss, arguments, lambda_base)
    plain, plain_gradients = gradients(blended_loss_reference, arguments, lambda_base)
    for a, b in zip(fast, plain, strict=True):
        assert_close(a, b)
    assert len(fast_gradients) == (3 if head else 1)
    for a, b in zip(fast_gradients, plain_gradients, strict=True):
        assert_close(a, b)
    assert plain_gradients[0].abs().max() > 0.01


def test_no_chunk_holds_more_logits_than_it_may(monkeypatch):
    """[tokens, vocabulary] never exists for the whole batch."""
    seen, rows_of = [], loss_module.blended_rows_

    def record(base, *rest):
        seen.append(base.numel())
        return rows_of(base, *rest)

    monkeypatch.setattr(loss_module, "blended_rows_", record)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * VOCAB + 3)
    gradients(blended_loss, inputs(True, "kl"), 0.3)
    assert max(seen) == 5 * VOCAB and sum(seen) == TOKENS * VOCAB


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


def test_the_objectives_are_the_definitions():
    """Of one token, in numbers: draft (0.7, 0.2, 0.1), target (0.5, 0.1, 0.4), label 1."""
    draft, target = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.1, 0.4])
    entropy, alpha = -torch.tensor(0.2).log(), torch.tensor(0.5 + 0.1 + 0.1)
    kl = 0.5 * torch.tensor(5 / 7).log() + 0.1 * torch.tensor(1 / 2).log() + 0.4 * torch.tensor(4.0).log()
    adaptive = torch.exp(-3 * alpha)
    expected = {
        "cross_entropy": entropy,
        "kl": kl,
        "tv": 1 - alpha,
        "ce_tv": 0.1 * entropy + 0.9 * (1 - alpha),
        "lk_alpha": -alpha.log(),
        "lk_hybrid": adaptive * kl + (1 - adaptive) * (1 - alpha),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, value in expected.items():
        found = token_losses(draft.log()[None], torch.tensor([1]), target.log()[None], OBJECTIVES[name])
        assert_close(found[0], value)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lambda_base", [0.0, 1.0])
def test_the_schedules_ends_train_one_loss_only(objective, lambda_base):
    """lambda 1: the head gets no gradient at all; lambda 0: the value is the final loss."""
    arguments = inputs(True, objective)
    result, (_, grad_low_rank, grad_correction) = gradients(blended_loss, arguments, lambda_base)
    if lambda_base == 1:
        assert not grad_low_rank.any() and not grad_correction.any()
        assert_close(result.loss, result.base)
    else:
        assert grad_correction.abs().max() > 0
        assert_close(result.loss, result.final)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_lm_head_of_the_draft_s_own_is_trained(monkeypatch, objective):
    """And the target's, which gives the distribution to compare with, is not."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * VOCAB)
    arguments = inputs(False, objective)
    target_lm_head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    arguments["lm_head"].requires_grad_(True)
    result = blended_loss(**arguments, lambda_base=0.5, target_lm_head=target_lm_head)
    found = torch.autograd.grad(result.loss, [arguments["hidden"], arguments["lm_head"]], retain_graph=True)
    logits = arguments["hidden"] @ arguments["lm_head"].T
    target = None
    if arguments["target_hidden"] is not None:
        target = (arguments["target_hidden"] @ target_lm_head.T).detach()
    losses = token_losses(logits, arguments["labels"].clamp(min=0), target, arguments["terms"])
    plain = (losses * arguments["weights"]).sum()
    expected = torch.autograd.grad(plain, [arguments["hidden"], arguments["lm_head"]])
    assert_close(result.loss, plain)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    assert expected[1].abs().max() > 0.01
    assert torch.autograd.grad(result.loss, target_lm_head, allow_unused=True) == (None,)


def test_the_target_is_frozen():
    arguments = inputs(True, "lk_hybrid")
    arguments["target_hidden"].requires_grad_(True)
    blended_loss(**arguments, lambda_base=0.5).loss.backward()
    assert arguments["target_hidden"].grad is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_label_outside_the_vocabulary_with_weight_zero_adds_nothing(objective):
    arguments = inputs(True, objective)
    keep = arguments["labels"] >= 0
    fewer = {
        name: value[keep] if isinstance(value, torch.Tensor) and len(value) == TOKENS else value
        for name, value in arguments.items()
    }
    assert_close(blended_loss(**arguments, lambda_base=0.3).loss, blended_loss(**fewer, lambda_base=0.3).loss)


def test_no_token_at_all_is_a_loss_of_zero():
    arguments = inputs(True, "cross_entropy")
    arguments |= {name: arguments[name][:0] for name in ("hidden", "low_rank", "labels", "weights")}
    result, found = gradients(blended_loss, arguments, 0.5)
    assert result.loss == 0 and not any(g.any() for g in found)


def drawn_from_target(objective: str) -> dict:
    """Arguments without a head whose text is all that the target may say, each token weighed by its probability."""
    generator = torch.Generator().manual_seed(0)
    target_hidden, lm_head = (torch.randn(n, HIDDEN, generator=generator) for n in (TOKENS, VOCAB))
    probs = (target_hidden @ lm_head.T).softmax(-1)
    return dict(
        hidden=target_hidden.repeat_interleave(VOCAB, 0).requires_grad_(),
        low_rank=None,
        labels=torch.arange(VOCAB).repeat(TOKENS),
        weights=probs.flatten(),
        lm_head=lm_head,
        correction_weight=None,
        target_hidden=target_hidden.repeat_interleave(VOCAB, 0) if OBJECTIVES[objective].needs_target else None,
        terms=OBJECTIVES[objective],
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_least_at_the_targets_own_distribution(objective):
    """Its gradient vanishes where the base logits are the target's, and every way from there leads up."""
    arguments = drawn_from_target(objective)
    least, (gradient,) = gradients(blended_loss, arguments, 1.0)
    gradient = gradient.view(TOKENS, VOCAB, HIDDEN).sum(1)  # over the texts of each row
    assert_close(gradient, torch.zeros_like(gradient))
    if not OBJECTIVES[objective].cross_entropy:
        assert_close(least.loss, torch.zeros(()))
    generator = torch.Generator().manual_seed(1)
    for distance in (0.01, 0.1, 1.0):
        way = distance * torch.randn(TOKENS, HIDDEN, generator=generator)
        moved = arguments["hidden"] + way.repeat_interleave(VOCAB, 0)
        assert blended_loss(**{**arguments, "hidden": moved}, lambda_base=1.0).loss > least.loss * (1 + 1e-6) + 1e-6


def test_lk_alpha_against_a_certain_target_is_cross_entropy():
    """Against a one-hot target, alpha is the draft's probability of that token."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    target = torch.full((TOKENS, VOCAB), -torch.inf).scatter(1, labels[:, None], 0.0)
    pairs = [(OBJECTIVES["lk_alpha"], target), (OBJECTIVES["cross_entropy"], None)]
    found = [token_losses(logits, labels, t, terms) for terms, t in pairs]
    assert_close(*found)
    assert_close(*(torch.autograd.grad(losses.sum(), logits)[0] for losses in found))


def test_the_fused_lk_alpha_against_a_certain_target_is_cross_entropy():
    """Certainty here is a logit of some hundreds."""
    arguments = inputs(True, "lk_alpha")
    arguments["target_hidden"] = arguments["lm_head"][arguments["labels"]] * 100
    sure = arguments["target_hidden"] @ arguments["lm_head"].T
    arguments["labels"] = sure.argmax(-1)
    assert (sure.softmax(-1).amax(-1) == 1).all()
    alpha = gradients(blended_loss, arguments, 0.3)
    text = {**arguments, "target_hidden": None, "terms": OBJECTIVES["cross_entropy"]}
    entropy = gradients(blended_loss, text, 0.3)
    for a, b in zip((*alpha[0], *alpha[1]), (*entropy[0], *entropy[1]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_label_probabilities_are_the_softmax_of_the_final_logits(monkeypatch, head):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * VOCAB)
    arguments = inputs(head, "cross_entropy")
    names = ("hidden", "low_rank", "labels", "lm_head", "correction_weight")
    logits = arguments["hidden"] @ arguments["lm_head"].T
    if head:
        logits = logits + arguments["low_rank"] @ arguments["correction_weight"].T
    expected = logits.softmax(-1)[torch.arange(TOKENS), arguments["labels"].clamp(min=0)]
    assert_close(label_probabilities(*(arguments[name] for name in names)), expected)
