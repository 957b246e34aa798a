"""The head's drafting in C against the plain PyTorch of `reference` and `trees`, over many shapes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from domino_spec.decoding.cycle import start
from domino_spec.draft.config import HeadConfig
from domino_spec.draft.domino import DominoHead
from domino_spec.drafters.block import BlockDrafter
from domino_spec.ops import reference, rollout, trees
from domino_spec.ops.embedding import EmbeddingTable
from domino_spec.ops.native import steps as cpu
from domino_spec.ops.native.rollout import head_rollout_cpu, head_tree_cpu, takes
from tests.tiny import prefill, random_prompts, tiny_draft, tree_of

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")

HIDDEN = 32
SHAPES = list(itertools.product((1, 3), (1, 5), (16, 48), (16, 32), (5, 300)))
"""Requests, depths, GRU width, low rank, logits."""
CANDIDATES = (None, 1, 3, 40)
CONFIDENCES = (0.0, 0.01, 0.3)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def block(shape, prefix: int = 1, seed: int = 0):
    """A random head and what it drafts from: arguments of both twins up to `embed_choice`."""
    requests, depths, state, low_rank, vocabulary = shape
    torch.manual_seed(seed)
    head = DominoHead(HeadConfig(state, low_rank, prefix), HIDDEN, vocabulary)
    nn.init.normal_(head.correction_weight, std=0.5)
    tokens = torch.randperm(vocabulary + 10)
    table = EmbeddingTable(torch.randn(len(tokens), HIDDEN), tokens[:vocabulary].sort().values, torch.float32, 1.5)
    hidden, base = torch.randn(requests, depths, HIDDEN), torch.randn(requests, depths, vocabulary)
    return head, hidden, base, torch.randn(requests, HIDDEN), table


def assert_same_chains(found: reference.Rollout, expected: reference.Rollout) -> None:
    assert torch.equal(found.choices, expected.choices)
    assert (found.candidates is None) == (expected.candidates is None)
    if expected.candidates is not None:
        assert torch.equal(found.candidates, expected.candidates)
    for ours, theirs in ((found.probs, expected.probs), (found.confidence, expected.confidence)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1, 9, None], ids=lambda p: "no head" if p is None else f"prefix{p}")
def test_chains_are_those_of_the_reference(shape, prefix):
    head, *given = block(shape, prefix or 0)
    head = None if prefix is None else head
    assert takes(head, given[0], given[1], given[3])
    for candidates, confidence in itertools.product(CANDIDATES, CONFIDENCES):
        expected = reference.head_rollout(head, *given, candidates, min_confidence=confidence)
        assert_same_chains(head_rollout_cpu(head, *given, candidates, min_confidence=confidence), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True], ids=["one temperature", "each its own"])
def test_sampled_chains_are_those_of_the_reference(shape, own):
    given = block(shape)
    uniform = torch.rand(shape[:2], dtype=torch.float64)
    temperature = torch.tensor([0.7, 0.0, 1.3])[: shape[0]] if own else 0.9
    for candidates, confidence in itertools.product(CANDIDATES, CONFIDENCES):
        how = (candidates, temperature, uniform, confidence)
        found = head_rollout_cpu(*given, *how)
        assert_same_chains(found, reference.head_rollout(*given, *how))
        if found.probs is not None:
            torch.testing.assert_close(found.probs.sum(-1), torch.ones(found.choices.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1, None], ids=lambda p: "no head" if p is None else f"prefix{p}")
def test_trees_are_those_of_the_reference(shape, prefix):
    head, *given = block(shape, prefix or 0)
    head = None if prefix is None else head
    for candidates, confidence in itertools.product(CANDIDATES, (0.0, 0.001, 0.05, 0.9)):
        for budget, width in ((1, 1), (4, 4), (11, 3), (20, None), (90, 30)):
            expected = trees.head_tree(head, *given, candidates, budget, width, confidence)
            found = head_tree_cpu(head, *given, candidates, budget, width, confidence)
            assert torch.equal(found.num_drafts, expected.num_drafts)
            assert found.choices.shape == expected.choices.shape
            for r, number in enumerate(expected.num_drafts.tolist()):
                for ours, theirs in ((found.choices, expected.choices), (found.parents, expected.parents)):
                    assert torch.equal(ours[r, :number], theirs[r, :number])
                assert found.log_probs is not None and expected.log_probs is not None
                ours, theirs = found.log_probs[r, :number], expected.log_probs[r, :number]
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_request_is_drafted_alike_alone_and_among_others():
    head, hidden, base, anchors, table = block((5, 6, 48, 32, 300))
    together = head_tree_cpu(head, hidden, base, anchors, table, 40, 12, 4)
    for r in range(5):
        one = slice(r, r + 1)
        alone = head_tree_cpu(head, hidden[one], base[one], anchors[one], table, 40, 12, 4)
        for ours, theirs in zip(vars(alone).values(), vars(together).values(), strict=True):
            assert torch.equal(ours[0], theirs[r]), "to the last bit"


@pytest.mark.parametrize("count, width", [(5, 3), (16, 7), (100, 33), (4099, 128), (20_000, 20)])
def test_candidates_are_the_best_logits_in_order(count, width):
    torch.manual_seed(count)
    base = torch.randn(3, 2, count)
    base[1] = base[1].round(decimals=1)  # many of them equal
    base[2, 0, ::2] = -torch.inf
    base[2, 1, : count // 2] = torch.inf
    found = head_rollout_cpu(None, base, base, base[:, 0], int, width, 1.0, torch.rand(3, 2, dtype=torch.float64))
    assert found.candidates is not None
    values, expected = base.sort(stable=True, dim=-1, descending=True)
    real = values[..., :width] > -torch.inf  # those that cannot be drafted stand last, in any order
    assert torch.equal(found.candidates.where(real, -1), expected[..., :width].where(real, -1))


def test_logits_that_are_no_number_break_nothing_beyond_their_request():
    head, hidden, base, anchors, table = block((2, 4, 16, 16, 300))
    expected = head_rollout_cpu(head, hidden, base, anchors, table, 40).choices[1]
    for lost in (slice(None), slice(0, 299)):
        base[0, :, lost] = torch.nan
        for candidates in (40, None):
            choices = head_rollout_cpu(head, hidden, base, anchors, table, candidates).choices
            assert ((choices >= 0) & (choices < 300)).all()
        assert torch.equal(head_rollout_cpu(head, hidden, base, anchors, table, 40).choices[1], expected)
        everywhere = torch.full_like(base, torch.nan)
        assert head_rollout_cpu(head, hidden, everywhere, anchors, table, 40).choices.shape == (2, 4)
        tree = head_tree_cpu(head, hidden, base, anchors, table, 40, 8, 3)
        assert ((tree.choices >= 0) & (tree.choices < 300)).all() and (tree.parents < 8).all()


def test_what_the_loops_cannot_take_is_left_to_the_reference():
    head, hidden, base, anchors, table = block((2, 3, 16, 16, 40))
    assert takes(head, hidden, base, table)
    assert not takes(head, hidden.bfloat16(), base.bfloat16(), table), "other types"
    assert not takes(head, hidden, base, table.__call__), "an embedding that is only a function"
    assert not takes(head, hidden, base, replace(table, weight=table.weight.bfloat16()))
    assert table.token_ids is not None
    assert not takes(head, hidden, base, replace(table, token_ids=table.token_ids.int())), "ids of another width"
    assert not takes(block((2, 3, 12, 16, 40))[0], hidden, base, table), "a state that is no whole number of vectors"
    with torch.inference_mode(False), torch.enable_grad():
        wanted = torch.randn(2, 3, HIDDEN, requires_grad=True)
        assert not takes(head, wanted, torch.randn(2, 3, 40), table), "a gradient is asked for"
    expected = reference.head_rollout(head, hidden, base, anchors, table.__call__).choices
    assert torch.equal(rollout.head_rollout(head, hidden, base, anchors, table.__call__).choices, expected)
    odd, *given = block((2, 3, 12, 6, 40))
    assert rollout.head_tree(odd, *given, None, 8, 3).num_drafts.tolist() == [8, 8]


@pytest.mark.parametrize("confidence", [0.0, 0.02])
@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_drafters_draft_in_c_what_they_draft_in_pytorch(target, monkeypatch, tree, candidates, confidence):
    """Through a draft vocabulary, whose indices are not token ids."""
    draft = tiny_draft(target, head_sizes=(32, 16), draft_vocab_ids=torch.arange(0, target.vocab_size, 2))
    block = BlockDrafter(draft, candidates=candidates, min_confidence=confidence)
    drafter = tree_of(block, 9) if tree else block
    state = prefill(target, random_prompts([5, 2, 9]), drafter, 3, None)
    answers = []

    def asked(*given):
        answers.append(takes(*given))
        return answers[-1]

    monkeypatch.setattr(rollout, "takes", asked)
    found = drafter.propose(state, start(drafter, state), drafter.max_drafts)
    monkeypatch.setattr(rollout, "takes", lambda *given: False)
    expected = drafter.propose(state, start(drafter, state), drafter.max_drafts)
    assert answers == [True]
    assert torch.equal(found.num_drafts, expected.num_drafts) and int(found.num_drafts.sum()) > 0
    for r, number in enumerate(expected.num_drafts.tolist()):
        assert torch.equal(found.tokens[r, :number], expected.tokens[r, :number])
        if tree:
            assert torch.equal(found.parents[r, :number], expected.parents[r, :number])
