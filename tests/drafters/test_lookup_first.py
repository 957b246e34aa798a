"""`domino+ngram` copies where a long match is found and asks the draft everywhere else."""

from __future__ import annotations

import pytest

from domino_spec.drafters.domino import BlockDrafter
from domino_spec.drafters.lookup_first import LookupFirst
from tests.tiny import plain_greedy, random_prompts, run, tiny_draft


class Counting(BlockDrafter):
    """Counts its own backbone passes."""

    calls = 0

    def propose(self, state, own, num_drafts):
        self.calls += 1
        return super().propose(state, own, num_drafts)


REPEATING = [5, 6, 7, 8, 9, 10, 11] * 2 + [5, 6, 7]


def first_proposal(target, drafter, prompts):
    seen = []
    original = drafter.propose
    drafter.propose = lambda *a: seen.append(original(*a)) or seen[-1]
    run(target, drafter, prompts, 1)
    return seen[0]


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
