"""Trees grown depth by depth: against every prefix there is, written out one by one, and against worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from domino_spec.ops.heads import Draw, HeadInputs, Tree, head_rollout, head_tree
from tests.ops.prefixes import (
    CONDITIONAL,
    DEPTHS,
    EVERYTHING,
    REQUESTS,
    VOCAB,
    Prefix,
    TableHead,
    every_prefix,
    following,
    inputs,
    marginal_inputs,
    no_near_ties,
    plain_beam,
    plain_quotas,
    prefixes,
    texts,
)
from tests.tiny import tiny_draft, tiny_target


@pytest.fixture(scope="module")
def small_target():
    return tiny_target(vocab_size=VOCAB)


@pytest.fixture(scope="module", params=[0, 1, None], ids=["prefix0", "prefix1", "no head"])
def draft(request, small_target):
    if request.param is None:
        return tiny_draft(small_target, head=False)
    return tiny_draft(small_target, prefix=request.param, std=0.8)  # whose prefixes change much of what follows


def grow(draft, given, candidates: int | None, budget: int, width: int | None, penalty=0.0, **options) -> Tree:
    return head_tree(draft.head_weights, HeadInputs(*given), Draw(candidates, **options), budget, width, penalty)


def by_depth(tree: Tree, r: int) -> set[Prefix]:
    found = prefixes(tree, r)
    assert [len(p) for p in found] == sorted(len(p) for p in found), "in order of depth"
    return set(found)


def best_first(scores: dict[Prefix, float], budget: int) -> list[Prefix]:
    """The most probable prefixes, parents before children that are as probable; rounding must not decide."""
    ranked = sorted(scores, key=lambda p: (-scores[p], len(p)))
    kept, left_out = ranked[:budget], ranked[budget : budget + 1]
    for first in left_out:
        certain_child = first[:-1] in kept and scores[first] == scores[first[:-1]]
        assert certain_child or scores[kept[-1]] - scores[first] > 1e-5, "choose another seed"
    return kept


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, VOCAB, 3, 1])
@pytest.mark.parametrize("budget", [1, 4, 11])
def test_a_tree_holds_the_most_probable_of_all_prefixes(draft, candidates, budget):
    """A width of the budget loses nothing: what is among the best of all has parents among the best of their depth."""
    given = inputs(draft)
    for width in (budget, EVERYTHING):
        tree = grow(draft, given, candidates, budget, width)
        assert tree.choices.shape == tree.parents.shape and tree.choices.dtype == tree.parents.dtype == torch.long
        for r in range(REQUESTS):
            scores = every_prefix(draft, given, candidates, r)
            assert by_depth(tree, r) == set(best_first(scores, budget))


@torch.inference_mode()
@pytest.mark.parametrize("candidates, everything", [(None, EVERYTHING), (2, 2 + 4 + 8)])
def test_a_budget_beyond_what_exists_takes_everything(draft, candidates, everything):
    given = inputs(draft)
    for budget in (everything - 1, everything, everything + 50):
        tree = grow(draft, given, candidates, budget, EVERYTHING)
        assert tree.num_drafts.tolist() == [min(budget, everything)] * REQUESTS
        for r in range(REQUESTS):
            best = best_first(every_prefix(draft, given, candidates, r), budget)
            assert by_depth(tree, r) == set(best)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("penalty", [0.0, 0.2, 1.5])
def test_a_narrow_tree_extends_the_best_prefixes_of_each_depth(draft, seed, penalty):
    """Beam search in plain Python: of the prefixes of one depth, the `width` most probable get children."""
    given = inputs(draft, seed)
    tables = [every_prefix(draft, given, 4, r) for r in range(REQUESTS)]
    for scores in tables:
        no_near_ties({p: score - penalty * len(p) for p, score in scores.items()})
    for width, budget in ((2, EVERYTHING), (2, 4), (3, 5), (4, 11)):
        tree = grow(draft, given, 4, budget, width, penalty=penalty)
        for r, scores in enumerate(tables):
            assert by_depth(tree, r) == plain_beam(following(scores), DEPTHS, width, budget, penalty)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("candidates", [None, 2, 1])
def test_a_tree_without_a_width_keeps_a_share_of_the_budget_at_every_depth(draft, seed, candidates):
    """Also where a depth has fewer prefixes than its share, or the budget fewer drafts than there are depths."""
    given = inputs(draft, seed)
    tables = [following(every_prefix(draft, given, candidates, r)) for r in range(REQUESTS)]
    for budget in (1, 2, 5, 11, 60):
        tree = grow(draft, given, candidates, budget, None)
        for r, after in enumerate(tables):
            assert by_depth(tree, r) == set().union(*plain_quotas(after, DEPTHS, budget))


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
def test_width_one_is_the_greedy_chain(draft, candidates):
    given = inputs(draft, depths=5)
    chain = head_rollout(draft.head_weights, HeadInputs(*given), Draw(candidates)).choices
    for budget, width in ((5, 1), (5, None)):
        tree = grow(draft, given, candidates, budget, width)
        assert torch.equal(tree.choices, chain)
        assert torch.equal(tree.parents, torch.arange(-1, 4).expand(REQUESTS, -1))
        assert tree.num_drafts.tolist() == [5] * REQUESTS


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("min_confidence", [0.9, 0.3, 0.15, 0.05])
def test_what_is_less_probable_than_asked_for_is_left_out_request_by_request(draft, candidates, min_confidence):
    given, budget = inputs(draft), 11
    tree = grow(draft, given, candidates, budget, budget, min_confidence=min_confidence)
    penalised = grow(draft, given, candidates, EVERYTHING, EVERYTHING, min_confidence=min_confidence, penalty=1)
    for r in range(REQUESTS):
        scores = every_prefix(draft, given, candidates, r)
        assert min(abs(s - math.log(min_confidence)) for s in scores.values()) > 1e-5, "choose another confidence"
        expected = [p for p in best_first(scores, budget) if scores[p] >= math.log(min_confidence)]
        assert tree.num_drafts[r] == len(expected)
        assert by_depth(tree, r) == set(expected)
        assert by_depth(penalised, r) == {p for p in scores if scores[p] >= math.log(min_confidence)}
    assert tree.choices.shape[1] <= budget
    if min_confidence == 0.15:
        assert len(set(tree.num_drafts.tolist())) > 1, "requests that doubt alike show little"


@torch.inference_mode()
@pytest.mark.parametrize("min_confidence", [0.9, 0.3, 0.15, 0.05])
@pytest.mark.parametrize("width", [3, None])
def test_no_column_is_left_that_no_request_proposes(draft, min_confidence, width):
    """Every column is a row of the verify pass."""
    tree = grow(draft, inputs(draft), None, 11, width, min_confidence=min_confidence)
    assert tree.choices.shape == tree.parents.shape == tree.log_probs.shape == (REQUESTS, tree.num_drafts.max())


@torch.inference_mode()
def test_nobody_sure_enough_is_an_empty_tree(draft):
    tree = grow(draft, inputs(draft), None, 11, 6, min_confidence=0.999)
    assert tree.choices.shape == tree.parents.shape == (REQUESTS, 0) and tree.choices.dtype == torch.long
    assert tree.num_drafts.tolist() == [0] * REQUESTS


@torch.inference_mode()
@pytest.mark.parametrize("width", [3, None])
@pytest.mark.parametrize("candidates", [4, 1])
@pytest.mark.parametrize("min_confidence", [0.0, 0.1, 0.3])
def test_requests_do_not_influence_each_other(draft, min_confidence, candidates, width):
    """Each alone and all together, one of them far surer than the others."""
    hidden, base, anchor = inputs(draft)
    base[2] *= 6
    together = grow(draft, (hidden, base, anchor), candidates, 7, width, min_confidence=min_confidence)
    for r in range(REQUESTS):
        given = tuple(part[r : r + 1] for part in (hidden, base, anchor))
        alone = grow(draft, given, candidates, 7, width, min_confidence=min_confidence)
        assert prefixes(alone, 0) == prefixes(together, r)
    assert min_confidence == 0 or candidates == 1 or len(set(together.num_drafts.tolist())) > 1


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("width, penalty", [(EVERYTHING, 0.0), (3, 0.0), (3, 0.5), (None, 0.0)])
def test_a_tree_tells_how_probable_its_prefixes_are(draft, candidates, width, penalty):
    """By the head run over each path alone: every prefix has its own GRU state. A penalty changes none of it."""
    given = inputs(draft)
    tree = grow(draft, given, candidates, EVERYTHING, width, penalty=penalty)
    for r in range(REQUESTS):
        scores = every_prefix(draft, given, candidates, r)
        found = prefixes(tree, r)
        assert len(found) == len(scores) or width != EVERYTHING
        assert tree.log_probs[r, : len(found)].tolist() == pytest.approx([scores[p] for p in found], abs=1e-4)


@torch.inference_mode()
def test_a_negative_penalty_is_refused(draft):
    with pytest.raises(ValueError, match="depth_penalty must not be negative"):
        grow(draft, inputs(draft), None, 4, 2, penalty=-0.1)


# Worked examples.


def test_marginals_are_multiplied_without_a_head():
    """Slots a .6 b .4, then c .7 d .3, then e .6 f .4: a .6, ac .42, b .4, bc .28, ace .252, and nothing above .2."""
    order = ["a", "ac", "b", "bc", "ace"]
    for budget in range(1, 6):
        tree = head_tree(None, marginal_inputs(), Draw(), budget, 6)
        assert set(texts(tree)) == set(order[:budget])
    assert tree.choices.tolist() == [[0, 1, 2, 2, 4]] and tree.parents.tolist() == [[-1, -1, 0, 1, 2]]
    sure = head_tree(None, marginal_inputs(), Draw(min_confidence=0.41), 9, 6)
    assert set(texts(sure)) == {"a", "ac"}


def table_tree(budget: int, width: int | None, table: dict[str, dict[str, float]] = CONDITIONAL, penalty=0.0) -> Tree:
    head = TableHead(table)
    return head_tree(head, head.inputs(), Draw(), budget, width, penalty)


def test_with_a_head_every_prefix_has_its_own_continuations():
    """a .6, ac .42, ace .4116, b .4, bc .36, bce .324, ad .18: most probable first."""
    order = ["a", "ac", "ace", "b", "bc", "bce", "ad"]
    for budget in range(1, len(order) + 1):
        assert set(texts(table_tree(budget, width=8))) == set(order[:budget])
    # Two prefixes a depth are enough for the first six; ad is third of its depth.
    assert set(texts(table_tree(99, width=2))) == set(order[:6])
    # What follows bc is its own: f, where ac goes on with e.
    other = CONDITIONAL | {"bc": {"e": 0.1, "f": 0.9}}
    assert set(texts(table_tree(6, width=8, table=other))) == {*order[:5], "bcf"}


def test_a_penalty_for_depth_prefers_short_prefixes():
    """DARTree, pruned: less 0.2 a token a is -0.711, b -1.116, ac -1.268 and ace -1.488; without it ace beats b."""
    assert texts(table_tree(3, width=2, penalty=0.2)) == ["a", "b", "ac"]
    assert texts(table_tree(3, width=2)) == ["a", "ac", "ace"]


def test_quotas_share_the_budget_among_the_depths():
    """DARTree, fixed: of five drafts two, two and one, since 5 / 3, 3 / 2 and 1 / 1 are rounded up."""
    assert texts(table_tree(5, width=None)) == ["a", "b", "ac", "bc", "ace"]
    assert texts(table_tree(2, width=None)) == ["a", "ac"]
