"""Trees from the head: against every prefix there is, written out one by one, and against worked examples."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from domino_spec.kernels.reference import Tree, head_rollout, head_tree
from tests.tiny import tiny_draft, tiny_target

VOCAB, DEPTHS, REQUESTS = 5, 3, 4
EVERYTHING = VOCAB + VOCAB**2 + VOCAB**3

Prefix = tuple[int, ...]


@pytest.fixture(scope="module")
def small_target():
    return tiny_target(vocab_size=VOCAB)


@pytest.fixture(scope="module", params=[0, 1, None], ids=["prefix0", "prefix1", "no head"])
def draft(request, small_target):
    if request.param is None:
        return tiny_draft(small_target, head=False)
    return tiny_draft(small_target, prefix=request.param, std=0.8)  # whose prefixes change much of what follows


def inputs(draft, seed: int = 0, depths: int = DEPTHS):
    """Hidden states of a scale that leaves the probabilities neither flat nor sharp."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(REQUESTS, depths, 32, generator=generator) / 4
    anchors = torch.randint(0, VOCAB, (REQUESTS,), generator=generator)
    return hidden, draft.base_logits(hidden), draft.embed(anchors)


def grow(draft, given, candidates: int | None, budget: int, width: int, **options) -> Tree:
    return head_tree(draft.head, *given, draft.embed, candidates, budget, width, **options)


def every_prefix(draft, given, candidates: int | None, r: int) -> dict[Prefix, float]:
    """Log probability of each prefix of request r, its whole text run through the GRU each time."""
    hidden, base, anchor = (part[r] for part in given)
    scores: dict[Prefix, float] = {(): 0.0}
    for depth in range(len(hidden)):
        allowed = base[depth].topk(candidates or VOCAB).indices.tolist()
        for prefix in [p for p in scores if len(p) == depth]:
            logits = base[depth]
            if draft.head is not None and depth >= draft.head.config.pure_draft_prefix_len:
                consumed = torch.stack([anchor, *(draft.embed(torch.tensor(t)) for t in prefix)])
                logits = logits + draft.head.correction(hidden[depth], draft.head.block(consumed)[-1])
            for token, log_prob in zip(allowed, logits[allowed].log_softmax(-1).tolist(), strict=True):
                scores[(*prefix, token)] = scores[prefix] + log_prob
    del scores[()]
    return scores


def best_first(scores: dict[Prefix, float], budget: int) -> list[Prefix]:
    """The most probable prefixes, parents before children that are as probable; rounding must not decide."""
    ranked = sorted(scores, key=lambda p: (-scores[p], len(p)))
    kept, left_out = ranked[:budget], ranked[budget : budget + 1]
    for first in left_out:
        certain_child = first[:-1] in kept and scores[first] == scores[first[:-1]]
        assert certain_child or scores[kept[-1]] - scores[first] > 1e-5, "choose another seed"
    return kept


def prefixes(tree: Tree, r: int) -> list[Prefix]:
    """The texts of request r's drafts, read along their parents, in the order of the drafts."""
    found: list[Prefix] = []
    choices, parents = tree.choices[r].tolist(), tree.parents[r].tolist()
    for j in range(int(tree.num_drafts[r])):
        assert -1 <= parents[j] < j, "parents come first"
        found.append((*(found[parents[j]] if parents[j] >= 0 else ()), choices[j]))
    assert len(set(found)) == len(found), "siblings differ"
    assert [len(p) for p in found] == sorted(len(p) for p in found), "in order of depth"
    return found


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
            assert set(prefixes(tree, r)) == set(best_first(scores, budget))


@torch.inference_mode()
@pytest.mark.parametrize("candidates, everything", [(None, EVERYTHING), (2, 2 + 4 + 8)])
def test_a_budget_beyond_what_exists_takes_everything(draft, candidates, everything):
    given = inputs(draft)
    for budget in (everything - 1, everything, everything + 50):
        tree = grow(draft, given, candidates, budget, EVERYTHING)
        assert tree.num_drafts.tolist() == [min(budget, everything)] * REQUESTS
        for r in range(REQUESTS):
            best = best_first(every_prefix(draft, given, candidates, r), budget)
            assert set(prefixes(tree, r)) == set(best)


@torch.inference_mode()
def test_a_narrow_tree_extends_the_best_prefixes_of_each_depth(draft):
    """Beam search, written out: of the prefixes of one depth, the `width` most probable get children."""
    given, width = inputs(draft), 2
    tree = grow(draft, given, None, EVERYTHING, width)
    for r in range(REQUESTS):
        scores, beam, expected = every_prefix(draft, given, None, r), [()], []
        for _ in range(DEPTHS):
            children = {(*p, t): scores[(*p, t)] for p in beam for t in range(VOCAB)}
            beam = best_first(children, width)
            expected += beam
        assert set(prefixes(tree, r)) == set(expected)


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
def test_width_one_is_the_greedy_chain(draft, candidates):
    given = inputs(draft, depths=5)
    chain = head_rollout(draft.head, *given, draft.embed, candidates).choices
    tree = grow(draft, given, candidates, budget=5, width=1)
    assert torch.equal(tree.choices, chain)
    assert torch.equal(tree.parents, torch.arange(-1, 4).expand(REQUESTS, -1))
    assert tree.num_drafts.tolist() == [5] * REQUESTS


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [None, 3])
@pytest.mark.parametrize("min_confidence", [0.9, 0.3, 0.15, 0.05])
def test_what_is_less_probable_than_asked_for_is_left_out_request_by_request(draft, candidates, min_confidence):
    given, budget = inputs(draft), 11
    tree = grow(draft, given, candidates, budget, budget, min_confidence=min_confidence)
    for r in range(REQUESTS):
        scores = every_prefix(draft, given, candidates, r)
        assert min(abs(s - math.log(min_confidence)) for s in scores.values()) > 1e-5, "choose another confidence"
        expected = [p for p in best_first(scores, budget) if scores[p] >= math.log(min_confidence)]
        assert tree.num_drafts[r] == len(expected)
        assert set(prefixes(tree, r)) == set(expected)
    assert tree.choices.shape[1] <= budget
    if min_confidence == 0.15:
        assert len(set(tree.num_drafts.tolist())) > 1, "requests that doubt alike show little"


@torch.inference_mode()
def test_nobody_sure_enough_is_an_empty_tree(draft):
    tree = grow(draft, inputs(draft), None, 11, 6, min_confidence=0.999)
    assert tree.choices.shape == tree.parents.shape == (REQUESTS, 0) and tree.choices.dtype == torch.long
    assert tree.num_drafts.tolist() == [0] * REQUESTS


@torch.inference_mode()
@pytest.mark.parametrize("min_confidence", [0.0, 0.1, 0.3])
def test_requests_do_not_influence_each_other(draft, min_confidence):
    """Each alone and all together, one of them far surer than the others."""
    hidden, base, anchor = inputs(draft)
    base[2] *= 6
    together = grow(draft, (hidden, base, anchor), 4, 7, 3, min_confidence=min_confidence)
    for r in range(REQUESTS):
        given = tuple(part[r : r + 1] for part in (hidden, base, anchor))
        alone = grow(draft, given, 4, 7, 3, min_confidence=min_confidence)
        assert prefixes(alone, 0) == prefixes(together, r)
    assert min_confidence == 0 or len(set(together.num_drafts.tolist())) > 1


# Worked examples (a, b, .. are tokens 0, 1, ..).

LETTERS = "abcdef"


def named(tree: Tree) -> set[str]:
    return {"".join(LETTERS[t] for t in prefix) for prefix in prefixes(tree, 0)}


def table_logits(probs: dict[str, float]) -> torch.Tensor:
    """[6], log probabilities; letters that are not named are all but impossible."""
    return torch.tensor([math.log(probs.get(letter, 1e-9)) for letter in LETTERS])


def test_marginals_are_multiplied_without_a_head():
    """Slots a .6 b .4, then c .7 d .3, then e .6 f .4: a .6, ac .42, b .4, bc .28, ace .252, and nothing above .2."""
    slots = [{"a": 0.6, "b": 0.4}, {"c": 0.7, "d": 0.3}, {"e": 0.6, "f": 0.4}]
    base = torch.stack([table_logits(slot) for slot in slots])[None]
    order = ["a", "ac", "b", "bc", "ace"]
    for budget in range(1, 6):
        tree = head_tree(None, torch.zeros(1, 3, 1), base, torch.zeros(1, 1), lambda ids: ids, None, budget, 6)
        assert named(tree) == set(order[:budget])
    assert tree.choices.tolist() == [[0, 1, 2, 2, 4]] and tree.parents.tolist() == [[-1, -1, 0, 1, 2]]
    sure = head_tree(None, torch.zeros(1, 3, 1), base, torch.zeros(1, 1), lambda ids: ids, None, 9, 6, 0.41)
    assert named(sure) == {"a", "ac"}


class TableHead:
    """A head that looks its logits up by the whole prefix; of a real head it has what the rollout and the tree use.

    Its state is one-hot in the prefix, W1 hands it on, and a column of W2 holds the logits after that prefix. The
    embedding of a token is its id, the anchor's is -1.
    """

    ANCHOR = -1.0

    def __init__(self, table: dict[str, dict[str, float]]) -> None:
        self.known = ["".join(p) for n in range(3) for p in itertools.product(LETTERS, repeat=n)]
        size = len(self.known)
        self.config = SimpleNamespace(pure_draft_prefix_len=0, gru_hidden_dim=size)
        self.input_weight = torch.cat((torch.zeros(size, 1), torch.eye(size)), dim=1)
        rows = [table_logits(table.get(prefix, {"e": 0.5, "f": 0.5})) for prefix in self.known]
        self.correction_weight = torch.stack(rows, dim=1) / F.silu(torch.ones(()))

    def initial_state(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(*shape, len(self.known))

    def step(self, embedding: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        following = torch.zeros_like(state)
        flat = following.view(-1, len(self.known))
        for row, token, before in zip(flat, embedding.flatten().tolist(), state.view(flat.shape), strict=True):
            text = "" if token == self.ANCHOR else self.known[int(before.argmax())] + LETTERS[int(token)]
            row[self.known.index(text)] = 1
        return following


CONDITIONAL = {
    "": {"a": 0.6, "b": 0.4},
    "a": {"c": 0.7, "d": 0.3},
    "b": {"c": 0.9, "d": 0.1},
    "ac": {"e": 0.98, "f": 0.02},
    "bc": {"e": 0.9, "f": 0.1},
}


def table_tree(table: dict[str, dict[str, float]], budget: int, width: int) -> Tree:
    given = (torch.zeros(1, 3, 1), torch.zeros(1, 3, 6), torch.full((1, 1), TableHead.ANCHOR))
    return head_tree(TableHead(table), *given, lambda ids: ids[..., None].float(), None, budget, width)


def test_with_a_head_every_prefix_has_its_own_continuations():
    """a .6, ac .42, ace .4116, b .4, bc .36, bce .324, ad .18: most probable first."""
    order = ["a", "ac", "ace", "b", "bc", "bce", "ad"]
    for budget in range(1, len(order) + 1):
        assert named(table_tree(CONDITIONAL, budget, width=8)) == set(order[:budget])
    # Two prefixes a depth are enough for the first six; ad is third of its depth.
    assert named(table_tree(CONDITIONAL, 99, width=2)) == set(order[:6])
    # What follows bc is its own: f, where ac goes on with e.
    assert named(table_tree(CONDITIONAL | {"bc": {"e": 0.1, "f": 0.9}}, 6, width=8)) == {*order[:5], "bcf"}
