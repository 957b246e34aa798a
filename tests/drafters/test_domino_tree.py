"""`domino-tree` and `dflash-tree` inside the loop: what they propose, and on which context."""

from __future__ import annotations

import pytest
import torch

from domino_spec.api import TREE_BUDGET, make_drafter
from domino_spec.decoding.generate import prefill
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.decoding.state import Proposal
from domino_spec.drafters.domino import BlockDrafter
from domino_spec.drafters.domino_tree import TreeDrafter
from tests.tiny import VOCAB, TreeOracle, plain_greedy, random_prompts, run, tiny_draft

SUBSET = torch.arange(0, VOCAB, 3)


class Watched:
    """Runs a tree drafter beside an oracle: the oracle's trees are verified, the drafter's own are recorded."""

    def __init__(self, drafter: TreeDrafter, oracle: TreeOracle) -> None:
        self.drafter, self.oracle = drafter, oracle
        self.feature_layers, self.max_drafts = drafter.feature_layers, oracle.max_drafts
        self.proposals: list[tuple[list[int], Proposal]] = []

    def start(self, state):
        return self.drafter.start(state)

    def propose(self, state, own, num_drafts):
        proposal = self.drafter.propose(state, own, self.drafter.max_drafts)
        self.proposals.append((state.lengths.tolist(), proposal))
        return self.oracle.propose(state, None, num_drafts)

    def advance(self, own, verdict):
        return self.drafter.advance(own, verdict)


@torch.inference_mode()
def fresh_proposal(target, drafter, text: list[int], num_drafts: int | None = None) -> Proposal:
    """What is proposed after `text` where all of it is the prompt."""
    state = prefill(target, [text], drafter, 1)
    return drafter.propose(state, drafter.start(state), drafter.max_drafts if num_drafts is None else num_drafts)


def drafts(proposal: Proposal, r: int = 0) -> list[tuple[int, int]]:
    """Request r's own drafts as (parent, token)."""
    assert proposal.parents is not None
    count = proposal.num_drafts[r]
    return list(zip(proposal.parents[r, :count].tolist(), proposal.tokens[r, :count].tolist(), strict=True))


@pytest.mark.parametrize("min_confidence", [0.0, 0.03])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(prefix=0, draft_vocab_ids=SUBSET), dict(shift_label=False), dict(head=False)],
    ids=["head", "subset", "unshifted", "no head"],
)
def test_trees_of_every_cycle_equal_a_fresh_computation(model, target, options, min_confidence):
    """Context grown along accepted paths of trees, by another number of rows for each request, is the context."""
    block = BlockDrafter(
        tiny_draft(target, **options), use_head=options.get("head", True), candidates=8, min_confidence=min_confidence
    )
    drafter = TreeDrafter(block, TREE_BUDGET)
    prompts, count = random_prompts([7, 3, 1]), 12
    texts = [p + plain_greedy(model, p, count + 12) for p in prompts]
    watched = Watched(drafter, TreeOracle(texts, 8))
    run(target, watched, prompts, count)
    compared = 0
    for lengths, proposal in watched.proposals:
        for r, length in enumerate(lengths):
            if length < len(prompts[r]) + count:  # still active
                assert drafts(proposal, r) == drafts(fresh_proposal(target, drafter, texts[r][:length]))
                compared += 1
    assert compared >= 10


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_tree_of_width_one_is_the_chain(target, head):
    block = BlockDrafter(tiny_draft(target, head=head), use_head=head, candidates=9)
    for text in random_prompts([1, 6, 20]):
        chain = fresh_proposal(target, block, text)
        tree = fresh_proposal(target, TreeDrafter(block, budget=block.max_drafts, width=1), text)
        assert drafts(tree) == list(enumerate(chain.tokens[0].tolist(), start=-1))


def test_a_tree_is_as_large_as_asked_for(target):
    """However few drafts are asked for, the most probable ones come first, from the same full block."""
    drafter = TreeDrafter(BlockDrafter(tiny_draft(target)), TREE_BUDGET)
    (text,) = random_prompts([6])
    assert drafter.max_drafts == TREE_BUDGET == 11
    sizes = {n: drafts(fresh_proposal(target, drafter, text, n)) for n in (1, 4, 7, 11)}
    assert [len(tree) for tree in sizes.values()] == [1, 4, 7, 11]
    assert len({parent for parent, _ in sizes[11]}) < 11, "a chain would show little"
    for fewer, more in ((1, 4), (4, 7), (7, 11)):
        assert paths(sizes[fewer]) < paths(sizes[more])


def paths(tree: list[tuple[int, int]]) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for parent, token in tree:
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found), "siblings differ"
    return set(found)


def test_what_is_proposed_belongs_to_the_draft_vocabulary(target):
    drafter = TreeDrafter(BlockDrafter(tiny_draft(target, draft_vocab_ids=SUBSET)), TREE_BUDGET)
    assert torch.isin(fresh_proposal(target, drafter, [1, 2, 3]).tokens, SUBSET).all()


def test_without_drafts_a_tree_is_plain_decoding(model, target):
    prompts = random_prompts([6, 4])
    doubting = TreeDrafter(BlockDrafter(tiny_draft(target), min_confidence=0.999), TREE_BUDGET)
    asked_for_none = TreeDrafter(BlockDrafter(tiny_draft(target)), TREE_BUDGET)
    for drafter, num_drafts in ((doubting, None), (asked_for_none, 0)):
        for generation, prompt in zip(run(target, drafter, prompts, 8, num_drafts=num_drafts), prompts, strict=True):
            assert generation.token_ids == plain_greedy(model, prompt, 8)
            assert generation.num_drafts == [0] * 8 and generation.acceptance_lengths == [1] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["domino-tree", "dflash-tree", "domino-tree+ngram"])
def test_trees_choose_their_drafts_at_any_temperature(target, method, temperature):
    draft, settings = tiny_draft(target), SamplingSettings(temperature=temperature)
    drafter = make_drafter(method, draft, requests=1, settings=settings, device=target.device)
    tree = getattr(drafter, "inner", drafter)
    assert tree.max_drafts == drafter.max_drafts == TREE_BUDGET
    assert tree.block.temperature == 0 and (tree.block.head is None) == (method == "dflash-tree")
    proposal = fresh_proposal(target, drafter, [1, 2, 3])
    assert proposal.parents is not None and proposal.draft_probs is None and proposal.candidate_ids is None


@pytest.mark.parametrize("budget, width", [(0, 6), (11, 0)])
def test_sizes_out_of_range_are_refused(target, budget, width):
    with pytest.raises(ValueError, match="a budget and a width of at least 1"):
        TreeDrafter(BlockDrafter(tiny_draft(target)), budget, width)
