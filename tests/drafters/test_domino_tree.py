"""`domino-tree`, `dflash-tree` and `domino-best-first` inside the loop: what they propose, and on which context."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.cycle import Proposal, start
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.block import BUILDERS, BlockDrafter, TreeShape
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.drafters.methods import TREE_BUDGET, make_drafter
from tests.decoding.test_lossless import (  # noqa: F401
    FALSE_ALARM,
    NUCLEUS,
    PROMPT,
    REQUESTS,
    TOKENS,
    exact_joint,
    p_value,
    small,
)
from tests.tiny import (
    VOCAB,
    Beside,
    TreeOracle,
    as_target,
    plain_greedy,
    prefill,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
    tree_of,
)

SUBSET = torch.arange(0, VOCAB, 3)


@torch.inference_mode()
def fresh_proposal(target, drafter, text: list[int], num_drafts: int | None = None, settings=None) -> Proposal:
    """What is proposed after `text` where all of it is the prompt."""
    state = prefill(target, [text], drafter, 1, settings)
    return drafter.propose(state, start(drafter, state), drafter.max_drafts if num_drafts is None else num_drafts)


def drafts(proposal: Proposal, r: int = 0) -> list[tuple[int, int]]:
    """Request r's own drafts as (parent, token)."""
    assert proposal.parents is not None
    count = proposal.num_drafts[r]
    return list(zip(proposal.parents[r, :count].tolist(), proposal.tokens[r, :count].tolist(), strict=True))


@pytest.mark.parametrize("min_confidence, builder", [(0.0, "depth"), (0.03, "depth"), (0.03, "best-first")])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(prefix=0, draft_vocab_ids=SUBSET), dict(shift_label=False), dict(head=False)],
    ids=["head", "subset", "unshifted", "no head"],
)
def test_trees_of_every_cycle_equal_a_fresh_computation(model, target, options, min_confidence, builder):
    """Context grown along accepted paths of trees, by another number of rows for each request, is the context."""
    block = BlockDrafter(
        tiny_draft(target, **options), use_head=options.get("head", True), candidates=8, min_confidence=min_confidence
    )
    drafter = tree_of(block, TREE_BUDGET, builder=builder)
    prompts, count = random_prompts([7, 3, 1]), 12
    texts = [p + plain_greedy(model, p, count + 12) for p in prompts]
    watched = Beside(drafter, TreeOracle(texts, 8))
    run(target, watched, prompts, count)
    compared = 0
    for committed, proposal in watched.proposals:
        for r, text in enumerate(committed):
            assert drafts(proposal, r) == drafts(fresh_proposal(target, drafter, text))
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_a_tree_of_width_one_is_the_chain(target, head):
    block = BlockDrafter(tiny_draft(target, head=head), use_head=head, candidates=9)
    for text in random_prompts([1, 6, 20]):
        chain = fresh_proposal(target, block, text)
        tree = fresh_proposal(target, tree_of(block, budget=block.max_drafts, width=1), text)
        assert drafts(tree) == list(enumerate(chain.tokens[0].tolist(), start=-1))


@pytest.mark.parametrize("builder", ["depth", "best-first"])
def test_a_tree_is_as_large_as_asked_for(target, builder):
    """However few drafts are asked for, the most probable ones come first, from the same full block."""
    drafter = tree_of(BlockDrafter(tiny_draft(target)), TREE_BUDGET, builder=builder)
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
    drafter = tree_of(BlockDrafter(tiny_draft(target, draft_vocab_ids=SUBSET)), TREE_BUDGET)
    assert torch.isin(fresh_proposal(target, drafter, [1, 2, 3]).tokens, SUBSET).all()


def test_without_drafts_a_tree_is_plain_decoding(model, target):
    prompts = random_prompts([6, 4])
    doubting = tree_of(BlockDrafter(tiny_draft(target), min_confidence=0.999), TREE_BUDGET)
    asked_for_none = tree_of(BlockDrafter(tiny_draft(target)), TREE_BUDGET)
    for drafter, num_drafts in ((doubting, None), (asked_for_none, 0)):
        for generation, prompt in zip(run(target, drafter, prompts, 8, num_drafts=num_drafts), prompts, strict=True):
            assert generation.token_ids == plain_greedy(model, prompt, 8)
            assert generation.num_drafts == [0] * 8 and generation.acceptance_lengths == [1] * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["domino-tree", "dflash-tree", "domino-best-first", "domino-tree+ngram"])
def test_trees_choose_their_drafts_at_any_temperature(target, method, temperature):
    drafter = make_drafter(method, tiny_draft(target), requests=1, device=target.device)
    tree = getattr(drafter, "inner", drafter)
    assert tree.max_drafts == drafter.max_drafts == TREE_BUDGET
    assert not drafter.samples and (tree.head is None) == (method == "dflash-tree")
    proposal = fresh_proposal(target, drafter, [1, 2, 3], settings=SamplingSettings(temperature=temperature))
    assert proposal.parents is not None and proposal.draft_probs is None and proposal.candidate_ids is None


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("budget", [1, 16, 60, 64])
def test_budgets_up_to_64_are_spent_whole(target, builder, budget):
    drafter = tree_of(BlockDrafter(tiny_draft(target, block_size=8)), budget, builder=builder)
    assert drafter.max_drafts == budget
    proposal = fresh_proposal(target, drafter, [1, 2, 3])
    assert proposal.num_drafts.tolist() == [budget] and len(paths(drafts(proposal))) == budget


def test_builders_spend_a_budget_in_their_own_ways(target):
    """Quotas on every depth alike; best first, where the head is sure, deeper than it is wide or the reverse."""
    block = BlockDrafter(tiny_draft(target, block_size=8))
    depths = {}
    for builder in BUILDERS:
        proposal = fresh_proposal(target, tree_of(block, 20, builder=builder), [1, 2, 3])
        depths[builder] = [len(path) for path in paths(drafts(proposal))]
    assert [depths["quota"].count(d) for d in range(1, 9)] == [3, 3, 3, 3, 2, 2, 2, 2]
    assert max(depths["depth"].count(d) for d in range(1, 9)) <= TreeShape(20).width == 7
    assert sorted(depths["best-first"]) != sorted(depths["quota"]) != sorted(depths["depth"])


@pytest.mark.parametrize("budget, width", [(1, 4), (11, 4), (12, 4), (13, 5), (64, 22)])
def test_the_width_grows_with_the_budget(target, budget, width):
    assert TreeShape(budget).width == width


@pytest.fixture(scope="module")
def few_tokens():
    """A model with few tokens to choose from, so that trees are often right in part, and a draft."""
    model = tiny_model(vocab_size=12)
    target = as_target(model)
    return model, target, tiny_draft(target, block_size=6)


@pytest.mark.slow
@pytest.mark.parametrize("min_confidence", [0.0, 0.1])
@pytest.mark.parametrize("budget", [7, 16, 64])
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder_writes_the_plain_text(few_tokens, builder, budget, min_confidence):
    """Requests of unequal length, each with a tree of its own shape; at temperature 0 and, at one seed, above it."""
    model, target, draft = few_tokens
    prompts, count = random_prompts([6, 1, 11, 4], vocab=12), 24
    drafter = tree_of(BlockDrafter(draft, candidates=9, min_confidence=min_confidence), budget, builder=builder)
    generations = run(target, drafter, prompts, count)
    assert [g.token_ids for g in generations] == [plain_greedy(model, p, count) for p in prompts]
    settings = SamplingSettings(temperature=1.0, top_k=4, seed=3)
    plain = run(target, PlainDecoding(), prompts, count, settings=settings)
    generations = run(target, drafter, prompts, count, settings=settings)
    assert [g.token_ids for g in generations] == [g.token_ids for g in plain]
    assert {n for g in generations for n in g.acceptance_lengths} >= {1, 2}
    sizes = {n for g in generations for n in g.num_drafts}
    assert sizes == {budget} if min_confidence == 0 else len(sizes) > 1


@pytest.mark.parametrize("builder", BUILDERS)
def test_no_row_is_verified_that_no_request_proposes(few_tokens, builder):
    _, target, draft = few_tokens
    drafter = tree_of(BlockDrafter(draft, min_confidence=0.1), 16, builder=builder)
    state = prefill(target, random_prompts([6, 1, 11, 4], vocab=12), drafter, 1)
    proposal = drafter.propose(state, start(drafter, state), 16)
    assert proposal.tokens.shape == proposal.parents.shape == (4, proposal.num_drafts.max())
    assert len(set(proposal.num_drafts.tolist())) > 1 and proposal.num_drafts.max() < 16


@pytest.mark.slow
@pytest.mark.parametrize("builder", BUILDERS)
def test_the_joint_distribution_is_the_targets_own_at_unequal_lengths(small, builder):  # noqa: F811
    """Two prompts of unequal length in one batch, by the statistic of tests/decoding/test_lossless.py.

    The six comparisons together raise a false alarm with probability 1e-4.
    """
    model, target, trained = small
    shorter = PROMPT[:3]
    drafter = tree_of(BlockDrafter(trained["domino"], candidates=5, min_confidence=0.02), 16, builder=builder)
    sampled = run(target, drafter, [PROMPT, shorter] * (REQUESTS // 2), TOKENS, settings=SamplingSettings(**NUCLEUS))
    for prompt, generations in ((PROMPT, sampled[::2]), (shorter, sampled[1::2])):
        places = torch.tensor([g.token_ids for g in generations]) @ torch.tensor([12**2, 12, 1])
        counts = places.bincount(minlength=12**TOKENS).view((12,) * TOKENS)
        assert p_value(counts, exact_joint(model, NUCLEUS, prompt)) > FALSE_ALARM / 6
        other = shorter if prompt == PROMPT else PROMPT
        assert p_value(counts, exact_joint(model, NUCLEUS, other)) < FALSE_ALARM / 6, "the statistic must have power"


@pytest.mark.parametrize("budget, width", [(0, 6), (11, 0)])
def test_sizes_out_of_range_are_refused(target, budget, width):
    with pytest.raises(ValueError, match="a budget and a width of at least 1"):
        tree_of(BlockDrafter(tiny_draft(target)), budget, width)


def test_builders_that_do_not_exist_or_have_no_width_are_refused(target):
    block = BlockDrafter(tiny_draft(target))
    with pytest.raises(ValueError, match="unknown builder 'wide'; known builders are depth, best-first, quota"):
        tree_of(block, 11, builder="wide")
    with pytest.raises(ValueError, match="builder best-first has no width"):
        tree_of(block, 11, 4, "best-first")
