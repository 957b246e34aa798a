"""`domino` and `dflash` inside the loop: what they are given, and what they hand over, cycle by cycle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from domino_spec.decoding.cycle import start
from domino_spec.decoding.request import Limits
from domino_spec.drafters.block import BlockDrafter
from domino_spec.settings import UserError
from tests.tiny import (
    VOCAB,
    Beside,
    Oracle,
    assert_close,
    plain_greedy,
    prefill,
    random_prompts,
    run,
    tiny_draft,
    whose,
)


@torch.inference_mode()
def fresh_block(target, draft, text: list[int]) -> torch.Tensor:
    """[N], the drafts after `text`, everything computed anew: features, context, block, and the head on its own."""
    config = draft.config
    rows = len(text) - 1
    tokens = torch.tensor([text])
    features = torch.zeros(1, 0, config.feature_size)
    if rows:
        features = target.forward(tokens[:, :rows], target.new_cache(1, rows), config.target_layer_ids).features
    context = draft.backbone.project_context(features, torch.arange(rows)[None])
    anchor = tokens[:, -1]
    hidden = draft.backbone(
        draft.block_embeddings(anchor),
        rows + torch.arange(config.block_size)[None],
        context,
        torch.ones(1, 1, config.block_size, rows + config.block_size, dtype=torch.bool),
    )[0]
    consumed = [draft.embed(anchor[0])]
    drafts = []
    for i in range(config.max_drafts):
        slot = i if config.shift_label else i + 1
        logits = draft.base_logits(hidden[slot])
        if draft.head is not None and i >= draft.head.config.pure_draft_prefix_len:
            logits = logits + draft.head.correction(hidden[slot], draft.head.block(torch.stack(consumed))[-1])
        drafts.append(draft.to_token_ids(logits.argmax(-1)))
        consumed.append(draft.embed(drafts[-1]))
    return torch.stack(drafts)


SUBSET = torch.arange(0, VOCAB, 3)


@pytest.mark.parametrize(
    "shift_label, prefix, vocabulary",
    [(True, 1, None), (True, 0, SUBSET), (True, 2, None), (False, 1, SUBSET), (False, 0, None)],
    ids=["shifted-1", "shifted-0-subset", "shifted-2", "unshifted-1-subset", "unshifted-0"],
)
def test_drafts_of_every_cycle_equal_a_fresh_computation(model, target, shift_label, prefix, vocabulary):
    """Context grown by 1 .. N + 1 rows per cycle and request, as the oracle's acceptance goes, is the context."""
    draft = tiny_draft(target, shift_label=shift_label, prefix=prefix, draft_vocab_ids=vocabulary)
    prompts = random_prompts([7, 3, 1])
    count = 24
    texts = [p + plain_greedy(model, p, count + 10) for p in prompts]
    watched = Beside(BlockDrafter(draft), Oracle(texts, 5))
    generations = run(target, watched, prompts, count)
    assert set(generations[0].acceptance_lengths) >= {1, 2, 3, 4, 5}
    compared = 0
    for committed, proposal in watched.proposals:
        for text, proposed in zip(committed, proposal.tokens, strict=True):
            assert torch.equal(proposed, fresh_block(target, draft, text))
            compared += 1
    assert compared >= 20


def test_the_convention_decides_how_many_drafts_a_block_gives(target):
    shifted, unshifted = tiny_draft(target, shift_label=True), tiny_draft(target, shift_label=False)
    for draft, drafts in ((shifted, 5), (unshifted, 4)):
        (generation,) = run(target, BlockDrafter(draft), random_prompts([4]), 3)
        assert set(generation.num_drafts) == {drafts}


def test_fewer_drafts_come_from_the_same_full_block(target):
    """Attention inside the block is bidirectional, so the backbone must run all its slots however few are asked for."""
    draft = tiny_draft(target)
    drafter = BlockDrafter(draft)
    prompts = random_prompts([6])
    seen = {}
    for n in (2, 5):
        first = []
        original = drafter.propose
        wrapped = BlockDrafter(draft)
        wrapped.propose = lambda *a, original=original, first=first: first.append(original(*a)) or first[-1]
        run(target, wrapped, prompts, 1, num_drafts=n)
        seen[n] = first[0].tokens[0].tolist()
    assert len(seen[2]) == 2 and seen[2] == seen[5][:2]


@pytest.mark.parametrize("shift_label", [True, False])
@torch.inference_mode()
def test_a_draft_trained_on_short_blocks_runs_no_slot_behind_the_last_draft(target, shift_label):
    """It drafts what one of the same weights whose blocks are that short would."""
    draft = tiny_draft(target, shift_label=shift_label)
    whole = draft.config
    state = prefill(target, random_prompts([6, 3]), BlockDrafter(draft), 4)
    slots: list[int] = []
    draft.backbone.norm.register_forward_hook(lambda module, inputs, out: slots.append(out.shape[1]))
    for n in range(2 if shift_label else 1, whole.max_drafts + 1):
        drafted = []
        for short in (replace(whole, short_blocks=True), replace(whole, block_size=whole.first_draft_slot + n)):
            draft.config = short
            drafter = BlockDrafter(draft)
            drafted.append(drafter.propose(state, start(drafter, state), n).tokens)
        assert drafted[0].shape == (2, n) and torch.equal(*drafted)
        assert slots[-2:] == [whole.first_draft_slot + n] * 2


def test_zero_drafts_is_plain_decoding(model, target):
    prompts = random_prompts([6, 4])
    for drafter in (BlockDrafter(tiny_draft(target)), BlockDrafter(tiny_draft(target, head=False), use_head=False)):
        for generation, prompt in zip(run(target, drafter, prompts, 8, num_drafts=0), prompts, strict=True):
            assert generation.token_ids == plain_greedy(model, prompt, 8)
            assert generation.acceptance_lengths == [1] * 8


def test_a_request_that_ended_does_not_disturb_a_long_one(model, target):
    """Its caches must not grow while the others go on; here for long enough to leave any buffer."""
    prompts = random_prompts([5, 5], seed=12)
    texts = [p + plain_greedy(model, p, 130) for p in prompts]
    stop = texts[0][len(prompts[0])]
    count = 120
    limits = Limits(count, stop_token_ids=frozenset({stop}))
    if stop in texts[1][5 : 5 + count]:
        pytest.skip("the texts must not share the stop token")

    class AlwaysRight(Oracle):
        """Accepts everything for request 0 and nothing for request 1."""

        def propose(self, state, own, num_drafts):
            proposal = super().propose(state, own, num_drafts)
            for row, (r, length) in enumerate(zip(whose(state, self.texts), state.lengths.tolist(), strict=True)):
                right = torch.tensor(self.texts[r][length : length + num_drafts])
                proposal.tokens[row, : len(right)] = right if r == 0 else (right + 1) % VOCAB
            return proposal

    watched = Beside(BlockDrafter(tiny_draft(target)), AlwaysRight(texts, 5))
    ended, long = run(target, watched, prompts, count, limits=limits)
    assert ended.token_ids == [stop]
    assert long.token_ids == texts[1][5 : 5 + count]
    assert len(long.acceptance_lengths) == count


def test_the_head_is_asked_for_by_name(target):
    with pytest.raises(UserError, match="needs a draft with a Domino head"):
        BlockDrafter(tiny_draft(target, head=False))


def test_sampled_drafts_report_absolute_candidate_ids(target):
    from domino_spec.decoding.sampling import SamplingSettings

    ids = torch.arange(1, VOCAB, 4)
    draft = tiny_draft(target, draft_vocab_ids=ids)
    drafter = BlockDrafter(draft, candidates=5, samples=True)
    seen = []
    original = drafter.propose
    drafter.propose = lambda *a: seen.append(original(*a)) or seen[-1]
    run(target, drafter, random_prompts([4, 6]), 6, settings=SamplingSettings(temperature=1.0))
    for proposal in seen:
        assert proposal.candidate_ids.shape[1:] == (5, 5)
        assert torch.isin(proposal.candidate_ids, ids).all()
        assert (proposal.candidate_ids == proposal.tokens[..., None]).sum(-1).eq(1).all()
        assert_close(proposal.draft_probs.sum(-1), torch.ones(2, 5))
