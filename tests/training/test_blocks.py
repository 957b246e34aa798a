"""What the head consumes while it is trained: the target's text, or what the draft itself would have written."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from domino_spec.draft.domino import Draft
from domino_spec.training import blocks as blocks_module
from domino_spec.training.blocks import DraftedTokens, forward_blocks
from domino_spec.training.data import Batch
from tests.tiny import (
    MemoryCache,
    as_sequences,
    assert_close,
    block_rows,
    conversation,
    make_trainer,
    random_prompts,
    step_gradients,
    tiny_draft,
)

MODES = ("teacher_forcing", "training_time_test")
SUBSET = torch.arange(0, 60, 2)
ANCHORS = [torch.tensor([3, 9, 15]), torch.tensor([5, 11])]
"""So far apart that blocks of five do not overlap."""

every_draft = pytest.mark.parametrize(
    "options",
    [
        dict(prefix=0),
        dict(prefix=1),
        dict(prefix=2, draft_vocab_ids=SUBSET),
        dict(prefix=0, shift_label=False, draft_vocab_ids=SUBSET),
    ],
    ids=lambda o: "-".join("subset" if k == "draft_vocab_ids" else f"{k}={v}" for k, v in o.items()),
)


def draft_and_batch(target, **options) -> tuple[Draft, Batch]:
    """A draft whose corrections decide much, and two sequences."""
    draft = tiny_draft(target, std=0.5, **options)
    sequences = as_sequences(random_prompts([4, 6]), random_prompts([20, 14], seed=5))
    return draft, MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences)


def slow_rollout(draft: Draft, drafted: DraftedTokens) -> tuple[Tensor, Tensor]:
    """Own drafts [A, N] and correction inputs [A, N, L]: slot by slot, every final logit computed."""
    all_tokens, all_low_rank = [], []
    for hidden, anchor in zip(drafted.hidden, drafted.blocks.tokens[:, 0], strict=True):
        state, token, tokens, low_rank = draft.head.initial_state(like=hidden), anchor, [], []
        for i, h in enumerate(hidden):
            state = draft.head.step(draft.embed(token), state)
            logits = draft.ends.lm_head @ h
            low_rank.append(draft.head.low_rank(h, state) * (i >= draft.head.config.pure_draft_prefix_len))
            token = draft.to_token_ids((logits + draft.head.correction_weight @ low_rank[-1]).argmax())
            tokens.append(token)
        all_tokens.append(torch.stack(tokens))
        all_low_rank.append(torch.stack(low_rank))
    return torch.stack(all_tokens), torch.stack(all_low_rank)


@every_draft
@torch.no_grad()
def test_in_training_time_test_the_head_consumes_its_own_greedy_tokens(target, options):
    draft, batch = draft_and_batch(target, **options)
    forced = forward_blocks(draft, batch, ANCHORS)
    own = forward_blocks(draft, batch, ANCHORS, causal_encoder="training_time_test")
    tokens, low_rank = slow_rollout(draft, own)
    assert_close(own.low_rank, low_rank)
    # For that to mean something, the draft must differ from the text, and the head from the base logits.
    assert (tokens != own.blocks.labels).float().mean() > 0.5
    base = draft.to_token_ids(draft.base_logits(own.hidden).argmax(-1))
    assert (tokens != base).any()
    assert (own.low_rank - forced.low_rank)[:, 2:].abs().max() > 0.1


@every_draft
@torch.no_grad()
def test_the_first_token_consumed_is_the_anchor_whatever_the_mode(target, options):
    draft, batch = draft_and_batch(target, **options)
    forced, own = (forward_blocks(draft, batch, ANCHORS, causal_encoder=c) for c in MODES)
    assert torch.equal(own.low_rank[:, 0], forced.low_rank[:, 0])


@every_draft
@torch.no_grad()
def test_labels_and_hidden_states_are_the_same_in_both_modes(target, options):
    """The draft is asked for the target's text, also where it has left it."""
    draft, batch = draft_and_batch(target, **options)
    forced, own = (forward_blocks(draft, batch, ANCHORS, causal_encoder=c) for c in MODES)
    assert torch.equal(own.hidden, forced.hidden) and torch.equal(own.choices, forced.choices)
    for name in ("anchors", "tokens", "labels", "valid"):
        assert torch.equal(getattr(own.blocks, name), getattr(forced.blocks, name))


def as_drafted(draft: Draft, batch: Batch) -> Batch:
    """The batch with the draft's own words behind every anchor, its features as they were."""
    with torch.no_grad():
        written, _ = slow_rollout(draft, forward_blocks(draft, batch, ANCHORS))
    tokens = batch.tokens.clone()
    for (s, anchor), words in zip(block_rows(ANCHORS), written, strict=True):
        first = int(batch.starts[s]) + anchor + 1
        room = int(batch.starts[s + 1]) - first
        tokens[first : first + len(words)] = words[:room]
    return dataclasses.replace(batch, tokens=tokens)


def probe_gradients(draft: Draft, drafted: DraftedTokens) -> dict[str, Tensor]:
    """Gradients of some function of the correction inputs with respect to the draft's parameters."""
    probe = torch.randn(drafted.low_rank.shape, generator=torch.Generator().manual_seed(0))
    named = {n: p for n, p in draft.named_parameters() if "embed_proj.2" not in n}
    (drafted.low_rank * drafted.blocks.valid[..., None] * probe).sum().backward()
    return {n: p.grad.clone() for n, p in named.items()}


@every_draft
def test_where_the_draft_is_always_right_both_modes_are_one(target, options):
    """In value, and in gradient: own tokens are constants to it, as those of a text are.

    A way for gradients through the choice of tokens, or a detour past the head's weights, would show here.
    """
    found = {}
    for mode in MODES:
        draft, batch = draft_and_batch(target, **options)
        right = as_drafted(draft, batch)
        draft.requires_grad_(True)
        drafted = forward_blocks(draft, right, ANCHORS, causal_encoder=mode)
        found[mode] = drafted.low_rank.detach(), probe_gradients(draft, drafted)
    (forced, forced_gradients), (own, own_gradients) = (found[mode] for mode in MODES)
    valid = forward_blocks(draft, right, ANCHORS).blocks.valid
    assert_close(own[valid], forced[valid])
    assert own_gradients.keys() == forced_gradients.keys()
    for name, gradient in forced_gradients.items():
        assert_close(own_gradients[name], gradient)
    assert all(forced_gradients[n].any() for n in forced_gradients), "head and backbone alike"


@torch.no_grad()
def test_own_drafts_are_made_in_pieces_of_bounded_size(target, monkeypatch):
    draft, batch = draft_and_batch(target)
    whole = forward_blocks(draft, batch, ANCHORS, causal_encoder="training_time_test")
    seen, base_logits = [], draft.base_logits
    monkeypatch.setattr(draft, "base_logits", lambda h: seen.append(len(h)) or base_logits(h))
    monkeypatch.setattr(blocks_module, "ROLLOUT_LOGITS", 2 * 5 * 60)
    pieces = forward_blocks(draft, batch, ANCHORS, causal_encoder="training_time_test")
    assert seen == [2, 2, 1]
    assert_close(pieces.low_rank, whole.low_rank)


@torch.no_grad()
def test_shorter_blocks_consume_their_own_tokens_too(target):
    """Blocks of three slots; attention inside a block is bidirectional, so they draft something else."""
    draft, batch = draft_and_batch(target, prefix=0)
    own = forward_blocks(draft, batch, ANCHORS, block_size=3, causal_encoder="training_time_test")
    assert own.hidden.shape[:2] == (5, 3)
    assert_close(own.low_rank, slow_rollout(draft, own)[1])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_draft_without_a_head_consumes_nothing(target, mode):
    draft, batch = draft_and_batch(target, head=False)
    drafted = forward_blocks(draft, batch, ANCHORS, causal_encoder=mode)
    assert drafted.low_rank is None and drafted.hidden.shape == (5, 5, 32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [None, SUBSET], ids=["full", "subset"])
def test_a_draft_trained_on_its_own_tokens_trains_every_parameter(target, precision, vocabulary):
    recipe = dict(
        causal_encoder="training_time_test", curriculum="constant", lambda_base_start=0.5, precision=precision
    )
    sequences = as_sequences(random_prompts([3, 5, 2, 7] * 2), random_prompts([9, 12, 20, 6] * 2, seed=9))
    trainer = make_trainer(target, sequences, recipe, draft_vocab_ids=vocabulary)
    gradients, result = step_gradients(trainer)
    assert {n for n, g in gradients.items() if g.any()} == {n for n, _ in trainer.draft.named_parameters()}
    # Full logits differ by rounding between precisions, and a token that is chosen otherwise changes what follows.
    recipe["precision"] = "float32"
    exact = make_trainer(target, sequences, recipe, draft_vocab_ids=vocabulary).train_step()
    assert result.final_loss == pytest.approx(exact.final_loss, rel=0.1)


@torch.no_grad()
def test_blocks_of_a_conversation_end_with_their_turn(target):
    """Labels of both answers, none of the question between them; and the second answer sees the whole first turn."""
    draft = tiny_draft(target)
    prompts, answers = random_prompts([3, 4], seed=10), random_prompts([6, 9], seed=11)
    sequence = conversation("c", list(zip(prompts, answers, strict=True)))
    batch = MemoryCache(target, [sequence], draft.config.target_layer_ids).batch([sequence])
    anchors = sequence.anchors
    assert anchors.tolist() == [2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    drafted = forward_blocks(draft, batch, [anchors])
    text = sequence.tokens.tolist()
    for row, anchor in enumerate(anchors.tolist()):
        end = 9 if anchor < 9 else 22
        valid = drafted.blocks.valid[row]
        assert drafted.choices[row][valid].tolist() == text[anchor + 1 : end][:5]
        assert valid.tolist() == [anchor + 1 + k < end for k in range(5)]
    features = batch.features.clone()
    features[4] += 3.0
    moved = forward_blocks(draft, dataclasses.replace(batch, features=features), [anchors]).hidden - drafted.hidden
    assert (moved.abs().amax((1, 2)) > 1e-3).tolist() == [anchor > 4 for anchor in anchors]
