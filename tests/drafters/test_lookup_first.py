"""`domino+ngram` and `domino-tree+ngram` copy where a long match is found and ask the draft everywhere else."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.cycle import Proposal, start
from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.lookup import LookupFirst
from tests.tiny import plain_greedy, prefill, random_prompts, run, tiny_draft, tree_of


class Counting(BlockDrafter):
    """Counts its own backbone passes."""

    calls = 0

    def slots(self, state, own, num_drafts):
        self.calls += 1
        return super().slots(state, own, num_drafts)


REPEATING = [5, 6, 7, 8, 9, 10, 11] * 2 + [5, 6, 7]


@torch.inference_mode()
def first_proposal(target, drafter, prompts):
    state = prefill(target, prompts, drafter, 1)
    return drafter.propose(state, start(drafter, state), drafter.max_drafts)


def test_a_long_match_is_copied_without_running_the_draft(target):
    inner = Counting(tiny_draft(target))
    proposal = first_proposal(target, LookupFirst(inner), [REPEATING])
    assert proposal.tokens[0].tolist() == [8, 9, 10, 11, 5] and inner.calls == 0


@pytest.mark.parametrize("loop", [[7], [7, 8, 9]], ids=["period-1", "period-3"])
def test_a_text_in_a_loop_is_copied_in_full_blocks_without_running_the_draft(target, loop):
    inner = Counting(tiny_draft(target))
    proposal = first_proposal(target, LookupFirst(inner), [[1, 2, *loop * 4]])
    assert proposal.tokens[0].tolist() == (loop * 5)[:5] and inner.calls == 0


def test_a_short_match_is_left_to_the_draft(target):
    prompt = [5, 6, 30, 31, 32, 5, 6]  # two tokens recur, three are asked for
    draft = tiny_draft(target)
    proposal = first_proposal(target, LookupFirst(BlockDrafter(draft)), [prompt])
    expected = first_proposal(target, BlockDrafter(draft), [prompt])
    assert proposal.tokens.tolist() == expected.tokens.tolist()


def test_each_request_gets_its_own_kind_of_draft(target):
    (other,) = random_prompts([9])
    draft = tiny_draft(target)
    proposal = first_proposal(target, LookupFirst(BlockDrafter(draft)), [REPEATING, other])
    expected = first_proposal(target, BlockDrafter(draft), [REPEATING, other])
    assert proposal.tokens[0].tolist() == [8, 9, 10, 11, 5]
    assert proposal.tokens[1].tolist() == expected.tokens[1].tolist()


def test_a_copy_longer_than_the_drafts_of_the_others_is_kept_whole(target):
    """A draft that leaves out what it doubts may propose nothing at all beside a long copy."""
    (other,) = random_prompts([9])
    inner = BlockDrafter(tiny_draft(target), min_confidence=0.99)
    proposal = first_proposal(target, LookupFirst(inner), [REPEATING, other])
    assert proposal.tokens[0].tolist() == [8, 9, 10, 11, 5]
    assert proposal.num_drafts.tolist() == [5, 0]


def test_the_drafts_caches_move_on_while_look_up_drafts(model, target):
    """After a stretch of copies the draft must find its context complete: its proposals equal those made alone."""
    (other,) = random_prompts([6], seed=8)
    draft = tiny_draft(target)
    for prompt in (REPEATING, other):
        mixed = LookupFirst(BlockDrafter(draft), shortest=1)
        assert run(target, mixed, [prompt], 24)[0].token_ids == plain_greedy(model, prompt, 24)
        assert mixed.inner.draft is draft


def test_lengths_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match="n-gram lengths"):
        LookupFirst(BlockDrafter(tiny_draft(target)), shortest=3, longest=2)


def drafts(proposal: Proposal, r: int) -> list[tuple[int, int]]:
    """Request r's own drafts as (parent, token)."""
    if proposal.parents is None:
        return chain(proposal.tokens[r, : proposal.num_drafts[r]].tolist())
    count = proposal.num_drafts[r]
    return list(zip(proposal.parents[r, :count].tolist(), proposal.tokens[r, :count].tolist(), strict=True))


def chain(tokens: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(tokens, start=-1))


COPY = [8, 9, 10, 11, 5, 6, 7] * 2
"""What follows `REPEATING`."""


@pytest.mark.parametrize("min_confidence", [0.0, 0.05, 0.99])
def test_in_one_batch_a_copy_is_a_chain_beside_the_trees_of_the_others(target, min_confidence):
    """Also where the copy is longer than every tree, or nobody else proposes anything at all."""
    prompts = [random_prompts([9])[0], REPEATING, *random_prompts([4, 6], seed=5)]
    tree = tree_of(BlockDrafter(tiny_draft(target), min_confidence=min_confidence), budget=11)
    mixed = first_proposal(target, LookupFirst(tree), prompts)
    alone = first_proposal(target, tree, prompts)
    assert drafts(mixed, 1) == chain(COPY[:11])
    for r in (0, 2, 3):
        assert drafts(mixed, r) == drafts(alone, r)
    if min_confidence == 0:
        assert any(parents != list(range(-1, 10)) for parents in mixed.parents[[0, 2, 3]].tolist())
    if min_confidence == 0.99:
        assert mixed.num_drafts.tolist() == [0, 11, 0, 0]


def test_copies_alone_do_not_run_the_draft_of_a_tree(target):
    inner = Counting(tiny_draft(target))
    proposal = first_proposal(target, LookupFirst(tree_of(inner, budget=11)), [REPEATING, [1, 2, *[7] * 6]])
    assert [drafts(proposal, r) for r in (0, 1)] == [chain(COPY[:11]), chain([7] * 11)]
    assert inner.calls == 0


def test_copies_and_trees_write_the_plain_text(model, target):
    prompts = [REPEATING, *random_prompts([6, 3], seed=8)]
    tree = tree_of(BlockDrafter(tiny_draft(target)), budget=11)
    generations = run(target, LookupFirst(tree, shortest=1), prompts, 24)
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, 24) for p in prompts]
