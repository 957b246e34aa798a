"""One optimizer step: what is summed, what it is divided by, and which parameters it reaches."""

from __future__ import annotations

import math

import pytest
import torch

from domino_spec.config import OptimizationRecipe, UserError
from domino_spec.training.anchors import position_weights
from domino_spec.training.blocks import forward_blocks
from domino_spec.training.loop import Trainer, step_sequences
from domino_spec.training.losses import blended_loss_reference
from tests.tiny import MemoryCache, as_sequences, assert_close, random_prompts, tiny_draft

SUBSET = torch.arange(0, 60, 2)


@pytest.fixture(scope="module")
def sequences():
    lengths = [4, 25, 9, 3, 17, 12, 5, 30]
    return as_sequences(random_prompts([3, 5, 2, 7, 4, 6, 3, 2]), random_prompts(lengths, seed=9))


def make_trainer(target, sequences, recipe: dict, **draft_options) -> Trainer:
    draft = tiny_draft(target, **draft_options).train().requires_grad_(True)
    defaults = dict(
        steps=10, batch_size=8, micro_batch_size=8, anchors=6, precision="float32", clip_norm=1e9, position_decay=3.0
    )
    cache = MemoryCache(target, sequences, draft.config.target_layer_ids)
    return Trainer(draft, OptimizationRecipe(**{**defaults, **recipe}), sequences, cache)


def step_gradients(trainer: Trainer) -> tuple[dict[str, torch.Tensor], object]:
    """The gradients that one step hands to the optimizer, and its result."""
    seen = {}
    original = trainer.optimizer.step

    def record(*args, **kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.draft.named_parameters() if p.grad is not None})
        return original(*args, **kwargs)

    trainer.optimizer.step = record
    return seen, trainer.train_step()


def assert_same_gradients(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@pytest.mark.parametrize("vocabulary", [None, SUBSET], ids=["full", "subset"])
def test_a_step_does_not_depend_on_its_micro_batches(target, sequences, vocabulary):
    """Sequences hold very different numbers of labels, so dividing per micro-batch or by tokens would show."""
    whole, result = step_gradients(make_trainer(target, sequences, {}, draft_vocab_ids=vocabulary))
    for size in (1, 2):
        recipe = dict(micro_batch_size=size)
        parts, part_result = step_gradients(make_trainer(target, sequences, recipe, draft_vocab_ids=vocabulary))
        assert_same_gradients(parts, whole)
        assert part_result.base_loss == pytest.approx(result.base_loss, rel=1e-5)
        assert part_result.final_loss == pytest.approx(result.final_loss, rel=1e-5)
        assert part_result.grad_norm == pytest.approx(result.grad_norm, rel=1e-4)


@pytest.mark.parametrize("shift_label", [True, False], ids=["shifted", "unshifted"])
@pytest.mark.parametrize("vocabulary", [None, SUBSET], ids=["full", "subset"])
def test_the_step_is_the_weighted_mean_of_the_paper(target, sequences, shift_label, vocabulary):
    """Recomputed plainly: sum of weighted losses over the sum of weights of labels that can be proposed."""
    lambda_base = 0.4
    recipe = dict(lambda_base_start=lambda_base, lambda_base_end=lambda_base)
    options = dict(shift_label=shift_label, draft_vocab_ids=vocabulary)
    actual, result = step_gradients(make_trainer(target, sequences, recipe, **options))

    trainer = make_trainer(target, sequences, recipe, **options)
    draft = trainer.draft
    step = step_sequences(sequences, 0, trainer.recipe)
    anchors = trainer._anchors(step)
    drafted = forward_blocks(draft, trainer.cache.batch(step), anchors)
    losses, weights = [], position_weights(draft.config.max_drafts, 3.0)
    total = sums = 0.0
    for s, sequence in enumerate(step):
        for a, anchor in enumerate(anchors[s].tolist()):
            for k in range(draft.config.max_drafts):
                if anchor + 1 + k >= len(sequence.tokens):
                    continue
                label = draft.to_choices(sequence.tokens[anchor + 1 + k])
                if label < 0:
                    continue
                loss = blended_loss_reference(
                    drafted.hidden[s, a, k][None],
                    drafted.low_rank[s, a, k][None],
                    label[None],
                    weights[k][None],
                    draft.ends.lm_head,
                    draft.head.correction_weight,
                    lambda_base,
                )
                losses.append(loss)
                total += weights[k].item()
                sums += loss.loss
    (sums / total).backward()
    assert_same_gradients(actual, {n: p.grad for n, p in draft.named_parameters() if p.grad is not None})
    assert result.base_loss == pytest.approx(sum(x.base.item() for x in losses) / total, rel=1e-4)
    assert result.final_loss == pytest.approx(sum(x.final.item() for x in losses) / total, rel=1e-4)


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
    with pytest.raises(UserError, match=r"loss is not finite at step 1; lower training.learning_rate"):
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
        Trainer(trainer.draft.bfloat16(), trainer.recipe, sequences, trainer.cache)


def test_bfloat16_computes_nearly_the_same_loss(target, sequences):
    _, full = step_gradients(make_trainer(target, sequences, {}))
    _, half = step_gradients(make_trainer(target, sequences, dict(precision="bfloat16")))
    # Eight bits of mantissa through a few layers: logits are off by a few percent of their size.
    assert half.final_loss == pytest.approx(full.final_loss, rel=0.05)


def test_the_kl_objective_follows_the_targets_distribution_not_the_text(target, sequences):
    """Labels replaced by other tokens of the vocabulary: cross-entropy notices, KL does not."""
    trainer = make_trainer(target, sequences, dict(objective="kl"))
    step = step_sequences(sequences, 0, trainer.recipe)
    drafted = forward_blocks(trainer.draft, trainer.cache.batch(step), trainer._anchors(step))
    rows = drafted.blocks.valid.flatten().nonzero()[:, 0]
    hidden = trainer._target_hidden(trainer.cache.batch(step), drafted, rows)
    soft = target.lm_head(hidden).softmax(-1)
    # Row by row: the target's own distribution after the text up to the label.
    anchors = trainer._anchors(step)
    expected = []
    for s, sequence in enumerate(step):
        with torch.inference_mode():
            tokens = sequence.tokens[None]
            logits = target.lm_head(target.forward(tokens, target.new_cache(1, tokens.shape[1])).hidden)[0]
        for anchor in anchors[s].tolist():
            for k in range(trainer.draft.config.max_drafts):
                if anchor + 1 + k < len(sequence.tokens):
                    expected.append(logits[anchor + k].softmax(-1))
    assert_close(soft, torch.stack(expected))


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
    short = trainer._anchors(trainer.sequences)
    trainer.train_step()
    trainer.train_step()
    full = trainer._anchors(trainer.sequences)
    assert [len(a) for a in short] == [4] * 8 and [len(a) for a in full] == [2] * 8
    assert math.isfinite(trainer.train_step().final_loss)


def test_anchors_change_from_step_to_step_and_repeat_with_the_seed(target, sequences):
    def anchors(seed, steps):
        trainer = make_trainer(target, sequences[-1:], dict(seed=seed, batch_size=1, micro_batch_size=1))
        seen = []
        for _ in range(steps):
            seen.append(trainer._anchors(trainer.sequences)[0].tolist())
            trainer.step += 1
        return seen

    first = anchors(0, 3)
    assert first[0] != first[1] != first[2]
    assert anchors(0, 3) == first and anchors(1, 3) != first
