"""One optimizer step: what is summed, what it is divided by, and which parameters it reaches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from domino_spec.draft.backbone import Layer
from domino_spec.recipe import OptimizationRecipe
from domino_spec.settings import UserError
from domino_spec.training.blocks import forward_blocks, position_weights
from domino_spec.training.features import OnlineFeatures
from domino_spec.training.loss import OBJECTIVES, token_losses
from domino_spec.training.step import Trainer, block_size, step_sequences
from tests.tiny import (
    MemoryCache,
    as_sequences,
    assert_close,
    block_rows,
    conversation,
    make_trainer,
    random_prompts,
    step_gradients,
)

SUBSET = torch.arange(0, 60, 2)
NEED_TARGET = [name for name, terms in OBJECTIVES.items() if terms.needs_target]


@pytest.fixture(scope="module")
def sequences():
    """Answers of very different lengths, one of them in two turns."""
    lengths = [4, 25, 9, 3, 17, 12, 30]
    single = as_sequences(random_prompts([3, 5, 2, 7, 4, 6, 2]), random_prompts(lengths, seed=9))
    prompts, answers = random_prompts([3, 4], seed=10), random_prompts([6, 9], seed=11)
    return [*single, conversation("two turns", list(zip(prompts, answers, strict=True)))]


def assert_same_gradients(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("vocabulary", [None, SUBSET], ids=["full", "subset"])
@pytest.mark.parametrize("weights", ["exponential", "acceptance"])
def test_a_step_does_not_depend_on_its_micro_batches(target, sequences, vocabulary, weights):
    """Sequences hold very different numbers of labels, so dividing per micro-batch or by tokens would show."""
    recipe = dict(position_weights=weights)
    whole, result = step_gradients(make_trainer(target, sequences, recipe, draft_vocab_ids=vocabulary))
    for size in (1, 2):
        recipe["micro_batch_size"] = size
        parts, part_result = step_gradients(make_trainer(target, sequences, recipe, draft_vocab_ids=vocabulary))
        assert_same_gradients(parts, whole)
        assert part_result.base_loss == pytest.approx(result.base_loss, rel=1e-5)
        assert part_result.final_loss == pytest.approx(result.final_loss, rel=1e-5)
        assert part_result.grad_norm == pytest.approx(result.grad_norm, rel=1e-4)


def plain_step(model, trainer: Trainer, lambda_base: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients, base loss and final loss of the trainer's next step, token by token from the definitions.

    Paper 4.2, the target's distribution being that of transformers' own model; D-PACE as `acceptance_weights` says.
    """
    draft, recipe = trainer.draft, trainer.recipe
    step = step_sequences(trainer.sequences, trainer.step, recipe)
    anchors = trainer.step_anchors(step, draft.config.block_size)
    drafted = forward_blocks(draft, trainer.source.batch(step), anchors, causal_encoder=recipe.causal_encoder)
    decay = position_weights(draft.config.max_drafts, recipe.position_decay)
    base_sum = final_sum = denominator = torch.zeros(())
    for row, (s, anchor) in enumerate(block_rows(anchors)):
        sequence = step[s]
        (end,) = (end for start, end in sequence.answers if start <= anchor + 1 < end)
        labels = draft.to_choices(sequence.tokens[anchor + 1 : end][: draft.config.max_drafts])
        with torch.no_grad():
            target = model(sequence.tokens[None]).logits[0, anchor : anchor + len(labels)]
        if draft.draft_vocab_ids is not None:
            target = target[:, draft.draft_vocab_ids]
        base = draft.base_logits(drafted.hidden[row, : len(labels)])
        final = base + drafted.low_rank[row, : len(labels)] @ draft.head.correction_weight.T
        weights, reachable = decay[: len(labels)], labels >= 0
        if recipe.position_weights == "acceptance":
            found = final.detach().softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * reachable
            products = (recipe.confidence_floor + (1 - recipe.confidence_floor) * found).cumprod(0)
            weights = torch.stack([products[k:].sum() for k in range(len(labels))])
            denominator = denominator + 1
        else:
            denominator = denominator + (weights * reachable).sum()
        losses = [token_losses(x, labels.clamp(min=0), target, OBJECTIVES[recipe.objective]) for x in (base, final)]
        base_sum, final_sum = (
            total + (loss * weights * reachable).sum()
            for total, loss in zip((base_sum, final_sum), losses, strict=True)
        )
    loss = (lambda_base * base_sum + (1 - lambda_base) * final_sum) / denominator
    named = {n: p for n, p in draft.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
    return gradients, (base_sum / denominator).item(), (final_sum / denominator).item()


@pytest.mark.parametrize(
    "recipe, options",
    [
        ({}, {}),
        ({}, dict(shift_label=False)),
        ({}, dict(draft_vocab_ids=SUBSET)),
        ({}, dict(shift_label=False, draft_vocab_ids=SUBSET)),
        (dict(causal_encoder="training_time_test"), dict(draft_vocab_ids=SUBSET)),
        (dict(position_weights="acceptance"), dict(draft_vocab_ids=SUBSET)),
        (dict(position_weights="acceptance", confidence_floor=0.1, objective="lk_hybrid"), {}),
        *((dict(objective=name), dict(draft_vocab_ids=SUBSET)) for name in NEED_TARGET),
    ],
    ids=lambda o: "-".join("subset" if k == "draft_vocab_ids" else f"{k}={v}" for k, v in o.items()) or "default",
)
def test_the_step_is_the_weighted_mean_of_the_paper(model, target, sequences, recipe, options):
    """Recomputed plainly: weighted losses over the weights of labels that can be proposed, or over the blocks."""
    recipe = dict(lambda_base_start=0.4, curriculum="constant", **recipe)
    expected, base_loss, final_loss = plain_step(model, make_trainer(target, sequences, recipe, **options), 0.4)
    actual, result = step_gradients(make_trainer(target, sequences, recipe, **options))
    assert_same_gradients(actual, expected)
    assert result.base_loss == pytest.approx(base_loss, rel=1e-4)
    assert result.final_loss == pytest.approx(final_loss, rel=1e-4)


def test_every_parameter_is_trained(target, sequences):
    """While lambda is neither 0 nor 1; the head's tensors included."""
    recipe = dict(lambda_base_start=0.5, lambda_base_end=0.5)
    trainer = make_trainer(target, sequences, recipe)
    gradients, _ = step_gradients(trainer)
    assert {n for n, g in gradients.items() if g.any()} == {n for n, _ in trainer.draft.named_parameters()}


def test_the_targets_weights_get_no_gradient(target, sequences):
    trainer = make_trainer(target, sequences, {})
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    trainer.train_step()
    assert all(p.grad is None for p in target.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in target.model.named_parameters())


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_anchors_slot_trains_the_backbone_when_labels_are_shifted(target, sequences, prefix):
    """With all weight on the first draft, only slot 0 has a loss: the backbone must feel it.

    The head must not while the first draft belongs to the pure prefix.
    """
    recipe = dict(position_decay=1e-3, lambda_base_start=0.5, lambda_base_end=0.5)  # exp(-1000) is 0 in float32
    gradients, _ = step_gradients(make_trainer(target, sequences, recipe, shift_label=True, prefix=prefix))
    backbone = [g.abs().max().item() for n, g in gradients.items() if n.startswith("backbone.")]
    assert min(backbone) > 0
    head = [g.abs().max().item() for n, g in gradients.items() if n.startswith("head.")]
    assert (max(head) == 0) == (prefix == 1)


def test_an_unreachable_label_neither_trains_nor_counts(target, sequences):
    """Changing labels outside the draft vocabulary among themselves changes no gradient.

    The tokens themselves still feed the prefix encoder and the features, so only final answers tokens are changed.
    """
    ids = torch.arange(0, 30)
    inside = as_sequences([[1, 2]] * 4, [[3, 4, 5, outside] for outside in (40, 41, 42, 43)])
    changed = as_sequences([[1, 2]] * 4, [[3, 4, 5, outside] for outside in (50, 51, 52, 53)])
    recipe = dict(batch_size=4, micro_batch_size=4)
    first, one = step_gradients(make_trainer(target, inside, recipe, draft_vocab_ids=ids))
    second, two = step_gradients(make_trainer(target, changed, recipe, draft_vocab_ids=ids))
    assert_same_gradients(first, second)
    assert one.final_loss == pytest.approx(two.final_loss, rel=1e-5)


def test_a_vocabulary_without_any_label_is_an_error(target):
    data = as_sequences([[1, 2]] * 8, [[40, 41, 42, 43]] * 8)
    with pytest.raises(UserError, match="no trainable token"):
        make_trainer(target, data, {}, draft_vocab_ids=torch.arange(30)).train_step()


def test_a_loss_that_is_not_finite_is_an_error_and_no_step(target, sequences):
    trainer = make_trainer(target, sequences, {})
    trainer.draft.backbone.norm.weight.data[0] = math.nan
    before = trainer.draft.backbone.fc.weight.clone()
    with pytest.raises(UserError, match="not finite at step 1"):
        trainer.train_step()
    assert torch.equal(trainer.draft.backbone.fc.weight, before)


def test_gradients_are_clipped_to_the_norm_asked_for(target, sequences):
    gradients, result = step_gradients(make_trainer(target, sequences, dict(clip_norm=0.01)))
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert result.grad_norm > 0.1, "reported before clipping"
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_master_weights_are_float32_and_keep_tiny_updates(target, sequences):
    """At a rate of 1e-6 a bfloat16 weight near one would never move."""
    recipe = dict(learning_rate=1e-6, warmup_ratio=0.0, precision="bfloat16")
    trainer = make_trainer(target, sequences, recipe)
    before = {n: p.clone() for n, p in trainer.draft.named_parameters()}
    trainer.train_step()
    for name, parameter in trainer.draft.named_parameters():
        assert parameter.dtype == torch.float32
        if name.endswith("norm.weight"):
            moved = (parameter - before[name]).abs().max().item()
            assert 0 < moved <= 2e-6
            assert torch.equal(parameter.bfloat16(), before[name].bfloat16())
    with pytest.raises(AssertionError, match="master weights"):
        Trainer(trainer.draft.bfloat16(), trainer.recipe, sequences, trainer.source)


def test_bfloat16_computes_nearly_the_same_loss(target, sequences):
    _, full = step_gradients(make_trainer(target, sequences, {}))
    _, half = step_gradients(make_trainer(target, sequences, dict(precision="bfloat16")))
    # Eight bits of mantissa through a few layers: logits are off by a few percent of their size.
    assert half.final_loss == pytest.approx(full.final_loss, rel=0.05)


@pytest.mark.parametrize("objective", NEED_TARGET)
def test_the_last_layer_is_tapped_beside_the_drafts_own_where_its_distribution_is_needed(
    model, target, sequences, objective
):
    """The draft reads its own layers as ever, and the loss is that of the target's distribution."""
    recipe = dict(objective=objective, lambda_base_start=0.4, curriculum="constant")
    trainer = make_trainer(target, sequences, recipe, taps=(0, 1))
    assert trainer.source.layers == (0, 1, 3) and trainer.draft.config.target_layer_ids == (0, 1)
    assert trainer.draft.backbone.fc.weight.shape == (32, 2 * 32)
    expected, base_loss, final_loss = plain_step(model, trainer, 0.4)
    actual, result = step_gradients(trainer)
    assert_same_gradients(actual, expected)
    assert (result.base_loss, result.final_loss) == pytest.approx((base_loss, final_loss), rel=1e-4)


def test_a_layer_tapped_besides_changes_nothing_for_the_draft(target, sequences):
    own, wider = (MemoryCache(target, sequences, layers) for layers in ((0, 1), (0, 1, 3)))
    results = [step_gradients(make_trainer(target, sequences, {}, source, taps=(0, 1))) for source in (own, wider)]
    assert results[0][1].final_loss == results[1][1].final_loss
    assert all(torch.equal(g, results[1][0][name]) for name, g in results[0][0].items())


@pytest.mark.parametrize("objective", ["cross_entropy", "kl"])
def test_online_features_train_as_stored_ones(target, sequences, objective):
    recipe, layers = dict(objective=objective, learning_rate=1e-3), (0, 3)
    stored = make_trainer(target, sequences, recipe)
    online = make_trainer(target, sequences, recipe, OnlineFeatures(target, layers))
    for _ in range(3):
        one, other = stored.train_step(), online.train_step()
        # Batches of other lengths round otherwise, and Adam magnifies that where a gradient is nearly zero.
        assert other.final_loss == pytest.approx(one.final_loss, rel=1e-4)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)


@pytest.mark.parametrize("encoder", ["teacher_forcing", "training_time_test"])
def test_recomputing_activations_changes_no_gradient(target, sequences, encoder, monkeypatch):
    calls, forward = itertools.count(), Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda *args: (next(calls), forward(*args))[1])
    found = {}
    for recompute in (False, True):
        before = next(calls)
        recipe = dict(activation_checkpointing=recompute, causal_encoder=encoder)
        found[recompute] = step_gradients(make_trainer(target, sequences, recipe))[0]
        assert next(calls) - before - 1 == (4 if recompute else 2), "two layers, run once or twice"
    assert_same_gradients(found[True], found[False])


def test_every_epoch_visits_every_sequence_once_in_another_order(sequences):
    recipe = OptimizationRecipe(steps=10, batch_size=4, micro_batch_size=4, seed=3)
    order = [s.id for step in range(6) for s in step_sequences(sequences, step, recipe)]
    epochs = [order[i : i + 8] for i in range(0, 24, 8)]
    assert all(sorted(e) == sorted(s.id for s in sequences) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = OptimizationRecipe(steps=10, batch_size=4, micro_batch_size=4, seed=4)
    assert [s.id for step in range(2) for s in step_sequences(sequences, step, other)] != epochs[0]


def test_shorter_blocks_early_in_the_run_keep_the_compute(target, sequences):
    recipe = dict(block_schedule=(2,), anchors=2, steps=4, learning_rate=1e-3)
    trainer = make_trainer(target, sequences[-1:] * 8, recipe, block_size=4)

    def anchors():
        size = block_size(trainer.step, trainer.recipe, 4)
        return trainer.step_anchors(trainer.sequences, size)

    short = anchors()
    trainer.train_step()
    trainer.train_step()
    full = anchors()
    assert [len(a) for a in short] == [4] * 8 and [len(a) for a in full] == [2] * 8
    assert math.isfinite(trainer.train_step().final_loss)


def test_anchors_change_from_step_to_step_and_repeat_with_the_seed(target, sequences):
    def anchors(seed, steps):
        trainer = make_trainer(target, sequences[-1:], dict(seed=seed, batch_size=1, micro_batch_size=1))
        seen = []
        for _ in range(steps):
            seen.append(trainer.step_anchors(trainer.sequences, trainer.draft.config.block_size)[0].tolist())
            trainer.step += 1
        return seen

    first = anchors(0, 3)
    assert first[0] != first[1] != first[2]
    assert anchors(0, 3) == first and anchors(1, 3) != first
