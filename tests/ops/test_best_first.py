"""Trees grown best first: against heaps in plain Python, states of all children computed at once, worked examples."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import replace

import pytest
import torch

from domino_spec.ops.best_first import best_first_tree
from domino_spec.ops.heads import Draw, HeadInputs, HeadWeights, Tree, head_tree
from tests.ops.prefixes import (
    CONDITIONAL,
    EVERYTHING,
    LETTERS,
    REQUESTS,
    VOCAB,
    Prefix,
    TableHead,
    every_prefix,
    following,
    inputs,
    marginal_inputs,
    mass,
    no_near_ties,
    plain_best_first,
    prefixes,
    texts,
)
from tests.tiny import tiny_draft, tiny_target

AHEAD = [1, 2, 4, 99]


@pytest.fixture(scope="module")
def small_target():
    return tiny_target(vocab_size=VOCAB)


@pytest.fixture(scope="module", params=[0, 1, None], ids=["prefix0", "prefix1", "no head"])
def draft(request, small_target):
    if request.param is None:
        return tiny_draft(small_target, head=False)
    return tiny_draft(small_target, prefix=request.param, std=0.8)


def grow(draft, given, candidates: int | None, budget: int, min_confidence: float = 0.0, **options) -> Tree:
    how = Draw(candidates, min_confidence=min_confidence)
    return best_first_tree(draft.head_weights, HeadInputs(*given), how, budget, **options)


def equal(tree: Tree, other: Tree) -> bool:
    """All but the last bits of the probabilities: products of more rows at once may round differently."""
    torch.testing.assert_close(tree.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)
    return all(torch.equal(getattr(tree, part), getattr(other, part)) for part in ("choices", "parents", "num_drafts"))


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3, 1])
@pytest.mark.parametrize("seed", range(2))
def test_prefixes_are_taken_in_the_order_of_a_plain_heap(draft, seed, candidates):
    given = inputs(draft, seed)
    tables = [every_prefix(draft, given, candidates, r) for r in range(REQUESTS)]
    for budget, ahead in itertools.product((1, 2, 5, 16, EVERYTHING + 9), AHEAD):
        tree = grow(draft, given, candidates, budget, ahead=ahead)
        assert tree.choices.dtype == tree.parents.dtype == torch.long
        for r, scores in enumerate(tables):
            if candidates != 1:  # one certain child after another: all are as probable
                no_near_ties(scores)
            assert prefixes(tree, r) == plain_best_first(following(scores), budget)
            assert tree.num_drafts[r] == min(budget, len(scores))


@torch.inference_mode()
@pytest.mark.parametrize("ahead", [1, 4])
def test_every_prefix_has_a_gru_state_of_its_own(draft, ahead):
    """All prefixes there are: the whole distribution after each equals the head's, run over that path alone."""
    given = inputs(draft, seed=5)
    tree = grow(draft, given, None, EVERYTHING, ahead=ahead)
    hidden, base, anchors = given
    for r in range(REQUESTS):
        found = prefixes(tree, r)
        assert len(found) == EVERYTHING
        table = dict(zip(found, tree.log_probs[r].tolist(), strict=True))
        for path in [(), *(p for p in found if len(p) < hidden.shape[1])]:
            logits = base[r, len(path)]
            if draft.head is not None and len(path) >= draft.head.config.pure_draft_prefix_len:
                consumed = torch.stack([anchors[r], *draft.embed(torch.tensor(path, dtype=torch.long))])
                logits = logits + draft.head.correction(hidden[r, len(path)], draft.head.block(consumed)[-1])
            after = [table[(*path, t)] - table.get(path, 0.0) for t in range(VOCAB)]
            assert after == pytest.approx(logits.log_softmax(-1).tolist(), abs=2e-5)


def watch(monkeypatch) -> list[int]:
    """How many GRU states each step computes, from now on."""
    rows: list[int] = []
    step = HeadWeights.step
    monkeypatch.setattr(HeadWeights, "step", lambda self, e, state: rows.append(len(e)) or step(self, e, state))
    return rows


def eager_tree(draft, given, candidates: int, budget: int, r: int) -> tuple[list[Prefix], int]:
    """As DominoTree: at every pop the GRU advances for all children at once; the prefixes and how often it did."""
    hidden, base, anchors = (part[r] for part in given)
    head, steps = draft.head, 0

    def children(prefix: Prefix, score: float, state: torch.Tensor):
        nonlocal steps
        depth = len(prefix)
        ids = base[depth].topk(candidates).indices
        logits = base[depth][ids]
        if depth >= head.config.pure_draft_prefix_len:
            logits = logits + head.correction(hidden[depth], state)[ids]
        states = head.step(draft.embed(ids), state.expand(len(ids), -1))
        steps += len(ids)
        for token, log_prob, after in zip(ids.tolist(), logits.log_softmax(-1).tolist(), states, strict=True):
            yield -(score + log_prob), (*prefix, token), after

    heap = list(children((), 0.0, head.step(anchors, head.initial_state(like=hidden))))
    heapq.heapify(heap)
    popped = []
    while len(popped) < budget:
        cost, prefix, state = heapq.heappop(heap)
        popped.append(prefix)
        if len(prefix) < len(hidden):
            for child in children(prefix, -cost, state):
                heapq.heappush(heap, child)
    return popped, steps


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_states_computed_late_give_the_tree_of_states_computed_at_once(small_target, monkeypatch, seed):
    """DominoTree advances the GRU for every child of what it takes; only those whose children are asked for need it."""
    draft, candidates, budget = tiny_draft(small_target, prefix=1, std=0.8), 4, 16
    given = inputs(draft, seed, depths=5)
    eager = [eager_tree(draft, given, candidates, budget, r) for r in range(REQUESTS)]
    rows = watch(monkeypatch)
    for ahead, most in ((1, 1.0), (4, 2.0)):
        rows.clear()
        tree = grow(draft, given, candidates, budget, ahead=ahead)
        assert [prefixes(tree, r) for r in range(REQUESTS)] == [found for found, _ in eager]
        assert sum(rows) <= most * REQUESTS * budget < sum(steps for _, steps in eager)


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
def test_looking_ahead_saves_steps_and_changes_no_tree(small_target, monkeypatch, candidates):
    draft, budget = tiny_draft(small_target, std=0.8), 24
    given = inputs(draft, depths=6)
    rows = watch(monkeypatch)
    steps, trees = [], []
    for ahead in AHEAD:
        rows.clear()
        trees.append(grow(draft, given, candidates, budget, ahead=ahead))
        steps.append(len(rows))
    assert all(equal(tree, trees[0]) for tree in trees[1:])
    assert steps[0] <= budget and steps == sorted(steps, reverse=True) and steps[2] < 0.6 * steps[0]


def test_of_a_prefix_that_is_not_extended_no_state_is_computed():
    """The last draft needs no children, nor do those of the last depth; nothing is computed ahead in vain here."""
    head = TableHead()
    tree = best_first_tree(head, head.inputs(), Draw(), 5, ahead=1)
    assert texts(tree) == ["a", "ac", "ace", "b", "bc"]
    assert head.read == ["", "a", "ac", "b"]


@torch.inference_mode()
@pytest.mark.parametrize("budget", [3, 7, 16, 40])
def test_no_tree_of_its_size_holds_more_probability(draft, budget):
    given = inputs(draft, seed=9, depths=4)
    best = mass(grow(draft, given, 4, budget))
    narrow = []
    for width, penalty in ((budget, 0.0), (2, 0.0), (4, 0.2), (None, 0.0)):
        tree = head_tree(draft.head_weights, HeadInputs(*given), Draw(4), budget, width, penalty)
        narrow.append(mass(tree))
        assert all(b >= m - 1e-5 for b, m in zip(best, narrow[-1], strict=True))
        if width == budget:
            assert narrow[-1] == pytest.approx(best, abs=1e-5)
    assert budget == 3 or sum(best) > sum(narrow[-1]) + 1e-3, "quotas should cost something"


@torch.inference_mode()
def test_the_first_drafts_are_the_tree_of_a_smaller_budget(draft):
    given = inputs(draft)
    large = grow(draft, given, 4, 20)
    for budget in (1, 6, 13):
        small = grow(draft, given, 4, budget)
        parts = (large.choices, large.parents, torch.full((REQUESTS,), budget), large.log_probs)
        assert equal(small, Tree(*(part[:, :budget] if part.dim() == 2 else part for part in parts)))


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("min_confidence", [0.9, 0.3, 0.15, 0.05])
def test_what_is_less_probable_than_asked_for_is_left_out_request_by_request(draft, candidates, min_confidence):
    given = inputs(draft)
    tree = grow(draft, given, candidates, 11, min_confidence=min_confidence)
    for r in range(REQUESTS):
        scores = every_prefix(draft, given, candidates, r)
        assert min(abs(s - math.log(min_confidence)) for s in scores.values()) > 1e-5, "choose another confidence"
        expected = [p for p in plain_best_first(following(scores), 11) if scores[p] >= math.log(min_confidence)]
        assert prefixes(tree, r) == expected and tree.num_drafts[r] == len(expected)
    assert tree.choices.shape == tree.parents.shape == (REQUESTS, tree.num_drafts.max())


@torch.inference_mode()
def test_nobody_sure_enough_is_an_empty_tree(draft):
    tree = grow(draft, inputs(draft), None, 11, min_confidence=0.999)
    assert tree.choices.shape == tree.parents.shape == (REQUESTS, 0) and tree.choices.dtype == torch.long
    assert tree.num_drafts.tolist() == [0] * REQUESTS


@torch.inference_mode()
@pytest.mark.parametrize("min_confidence", [0.0, 0.15, 0.3])
def test_requests_do_not_influence_each_other(draft, min_confidence):
    hidden, base, anchor = inputs(draft)
    base[2] *= 6
    together = grow(draft, (hidden, base, anchor), 4, 7, min_confidence=min_confidence)
    for r in range(REQUESTS):
        given = tuple(part[r : r + 1] for part in (hidden, base, anchor))
        assert prefixes(grow(draft, given, 4, 7, min_confidence=min_confidence), 0) == prefixes(together, r)
    assert min_confidence == 0 or len(set(together.num_drafts.tolist())) > 1


# Worked examples.


@pytest.mark.parametrize("ahead", AHEAD)
def test_dominotrees_order(ahead):
    """a .6, ac .42, ace .4116, b .4, bc .36: a budget of three is spent below a."""
    head = TableHead(CONDITIONAL)
    order = ["a", "ac", "ace", "b", "bc", "bce", "ad"]
    for budget in range(1, len(order) + 1):
        assert texts(best_first_tree(head, head.inputs(), Draw(), budget, ahead=ahead)) == order[:budget]
    tree = best_first_tree(head, head.inputs(), Draw(), 5, ahead=ahead)
    assert tree.parents.tolist() == [[-1, 0, 1, -1, 3]]
    assert tree.log_probs.exp().tolist()[0] == pytest.approx([0.6, 0.42, 0.4116, 0.4, 0.36], abs=1e-6)


def test_ddtrees_order():
    """Marginals a .6 b .4, c .7 d .3, e .6 f .4: a .6, ac .42, b .4, bc .28, ace .252."""
    tree = best_first_tree(None, marginal_inputs(), Draw(), 5)
    assert texts(tree) == ["a", "ac", "b", "bc", "ace"] and tree.parents.tolist() == [[-1, 0, -1, 2, 1]]
    assert tree.log_probs.exp().tolist()[0] == pytest.approx([0.6, 0.42, 0.4, 0.28, 0.252], abs=1e-6)


def test_of_candidates_that_cannot_follow_none_is_proposed():
    """A logit of minus infinity is a probability of nothing."""
    block = marginal_inputs()
    base = block.base_logits.masked_fill(block.base_logits < -9, -math.inf)
    given = (None, replace(block, base_logits=base), Draw(), 99)
    for tree in (best_first_tree(*given), head_tree(*given, width=99)):
        assert len(texts(tree)) == 2 + 4 + 8 and set("".join(texts(tree))) == set(LETTERS)
        assert {text for text in texts(tree) if len(text) == 1} == {"a", "b"}
