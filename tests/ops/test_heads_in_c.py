"""The head's drafting in C against plain PyTorch, over many shapes, and what is left to PyTorch."""

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
from domino_spec.ops import heads
from domino_spec.ops.heads import (
    Draw,
    EmbeddingTable,
    HeadInputs,
    HeadOps,
    HeadWeights,
    Rollout,
    Tree,
    head_rollout,
    head_tree,
)
from domino_spec.ops.native import bindings as cpu
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


def block(shape, prefix: int = 1, seed: int = 0) -> tuple[HeadWeights, HeadInputs]:
    """A random head and what it drafts from."""
    requests, depths, state, low_rank, vocabulary = shape
    torch.manual_seed(seed)
    head = DominoHead(HeadConfig(state, low_rank, prefix), HIDDEN, vocabulary)
    nn.init.normal_(head.correction_weight, std=0.5)
    tokens = torch.randperm(vocabulary + 10)
    table = EmbeddingTable(torch.randn(len(tokens), HIDDEN), tokens[:vocabulary].sort().values, torch.float32, 1.5)
    hidden, base = torch.randn(requests, depths, HIDDEN), torch.randn(requests, depths, vocabulary)
    return head.weights(table), HeadInputs(hidden, base, torch.randn(requests, HIDDEN))


def ops(head: HeadWeights | None) -> HeadOps:
    return HeadOps(head, torch.device("cpu"), torch.float32)


def in_c(found: HeadOps) -> bool:
    """Whether the loops were chosen."""
    return found._chain.func is heads._rollout_in_c and found._tree.func is heads._tree_in_c


def chain_in_c(head, given, *how, **more) -> Rollout:
    chosen = ops(head)
    assert in_c(chosen)
    return chosen.chain(given, Draw(*how, **more))


def tree_in_c(head, given, candidates=None, budget=8, width=3, confidence=0.0) -> Tree:
    chosen = ops(head)
    assert in_c(chosen)
    return chosen.tree(given, Draw(candidates, min_confidence=confidence), budget, width)


def assert_same_chains(found: Rollout, expected: Rollout) -> None:
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
    head, given = block(shape, prefix or 0)
    head = None if prefix is None else head
    for candidates, confidence in itertools.product(CANDIDATES, CONFIDENCES):
        expected = head_rollout(head, given, Draw(candidates, min_confidence=confidence))
        assert_same_chains(chain_in_c(head, given, candidates, min_confidence=confidence), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True], ids=["one temperature", "each its own"])
def test_sampled_chains_are_those_of_the_reference(shape, own):
    given = block(shape)
    uniform = torch.rand(shape[:2], dtype=torch.float64)
    temperature = torch.tensor([0.7, 0.0, 1.3])[: shape[0]] if own else 0.9
    for candidates, confidence in itertools.product(CANDIDATES, CONFIDENCES):
        how = (candidates, temperature, uniform, confidence)
        found = chain_in_c(*given, *how)
        assert_same_chains(found, head_rollout(*given, Draw(*how)))
        if found.probs is not None:
            torch.testing.assert_close(found.probs.sum(-1), torch.ones(found.choices.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1, None], ids=lambda p: "no head" if p is None else f"prefix{p}")
def test_trees_are_those_of_the_reference(shape, prefix):
    head, given = block(shape, prefix or 0)
    head = None if prefix is None else head
    for candidates, confidence in itertools.product(CANDIDATES, (0.0, 0.001, 0.05, 0.9)):
        for budget, width in ((1, 1), (4, 4), (11, 3), (20, None), (90, 30)):
            expected = head_tree(head, given, Draw(candidates, min_confidence=confidence), budget, width)
            found = tree_in_c(head, given, candidates, budget, width, confidence)
            assert torch.equal(found.num_drafts, expected.num_drafts)
            assert found.choices.shape == expected.choices.shape
            for r, number in enumerate(expected.num_drafts.tolist()):
                for ours, theirs in ((found.choices, expected.choices), (found.parents, expected.parents)):
                    assert torch.equal(ours[r, :number], theirs[r, :number])
                assert found.log_probs is not None and expected.log_probs is not None
                ours, theirs = found.log_probs[r, :number], expected.log_probs[r, :number]
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_request_is_drafted_alike_alone_and_among_others():
    head, given = block((5, 6, 48, 32, 300))
    together = tree_in_c(head, given, 40, 12, 4)
    for r in range(5):
        one = HeadInputs(*(part[r : r + 1] for part in vars(given).values()))
        alone = tree_in_c(head, one, 40, 12, 4)
        for ours, theirs in zip(vars(alone).values(), vars(together).values(), strict=True):
            assert torch.equal(ours[0], theirs[r]), "to the last bit"


@pytest.mark.parametrize("count, width", [(5, 3), (16, 7), (100, 33), (4099, 128), (20_000, 20)])
def test_candidates_are_the_best_logits_in_order(count, width):
    torch.manual_seed(count)
    base = torch.randn(3, 2, count)
    base[1] = base[1].round(decimals=1)  # many of them equal
    base[2, 0, ::2] = -torch.inf
    base[2, 1, : count // 2] = torch.inf
    given = HeadInputs(base, base, base[:, 0])
    found = chain_in_c(None, given, width, 1.0, torch.rand(3, 2, dtype=torch.float64))
    assert found.candidates is not None
    values, expected = base.sort(stable=True, dim=-1, descending=True)
    real = values[..., :width] > -torch.inf  # those that cannot be drafted stand last, in any order
    assert torch.equal(found.candidates.where(real, -1), expected[..., :width].where(real, -1))


def test_logits_that_are_no_number_break_nothing_beyond_their_request():
    head, given = block((2, 4, 16, 16, 300))
    base = given.base_logits
    expected = chain_in_c(head, given, 40).choices[1]
    for lost in (slice(None), slice(0, 299)):
        base[0, :, lost] = torch.nan
        for candidates in (40, None):
            choices = chain_in_c(head, given, candidates).choices
            assert ((choices >= 0) & (choices < 300)).all()
        assert torch.equal(chain_in_c(head, given, 40).choices[1], expected)
        everywhere = replace(given, base_logits=torch.full_like(base, torch.nan))
        assert chain_in_c(head, everywhere, 40).choices.shape == (2, 4)
        tree = tree_in_c(head, given, 40, 8, 3)
        assert ((tree.choices >= 0) & (tree.choices < 300)).all() and (tree.parents < 8).all()


def test_a_head_that_the_loops_cannot_take_is_left_to_pytorch(caplog):
    head, given = block((2, 3, 16, 16, 40))
    assert in_c(ops(head)) and not caplog.records
    table = head.embed_choice
    assert isinstance(table, EmbeddingTable) and table.token_ids is not None
    heads._log_once.cache_clear()
    for changed in (
        replace(head, embed_choice=table.__call__),
        replace(head, embed_choice=replace(table, weight=table.weight.bfloat16())),
        replace(head, embed_choice=replace(table, token_ids=table.token_ids.int())),
        replace(head, correction=head.correction.bfloat16()),
        replace(head, correction=head.correction.t().contiguous().t()),
        block((2, 3, 12, 16, 40))[0],
    ):
        assert not in_c(ops(changed))
        assert "the head drafts step by step in PyTorch, which is slower" in caplog.records[-1].getMessage()
    assert "a list of int64" in caplog.text and f"not multiples of {cpu.lanes()}" in caplog.text
    caplog.clear()
    expected = head_rollout(head, given).choices
    function = ops(replace(head, embed_choice=table.__call__))
    assert torch.equal(function.chain(given, Draw()).choices, expected) and not caplog.records, "said once"
    assert not in_c(HeadOps(head, torch.device("cpu"), torch.bfloat16))
    odd, given = block((2, 3, 12, 6, 40))
    assert ops(odd).tree(given, Draw(), 8, 3).num_drafts.tolist() == [8, 8]


def test_a_block_that_the_loops_cannot_take_is_left_to_pytorch():
    head, given = block((2, 3, 16, 16, 40))
    assert in_c(ops(head))
    mixed = replace(given, base_logits=given.base_logits.double())
    assert torch.equal(ops(head).chain(mixed, Draw()).choices, head_rollout(head, mixed).choices)
    with torch.inference_mode(False), torch.enable_grad():
        wanted = torch.randn(2, 3, 40, requires_grad=True)
        uniform = torch.rand(2, 3, dtype=torch.float64)
        found = ops(None).chain(
            HeadInputs(torch.randn(2, 3, HIDDEN), wanted, torch.randn(2, HIDDEN)), Draw(5, 1.0, uniform)
        )
        assert found.probs is not None and found.probs.requires_grad, "a gradient is asked for"


def test_weights_that_are_replaced_leave_no_address_behind():
    """`module.to` gives a parameter other memory; the loops keep what they were made with."""
    module = DominoHead(HeadConfig(16, 16, 0), HIDDEN, 40)
    table = EmbeddingTable(torch.randn(40, HIDDEN), None, torch.float32)
    _, given = block((2, 3, 16, 16, 40))
    chosen = ops(module.weights(table))
    expected = chosen.chain(given, Draw()).choices
    module.double().float()
    torch.randn(100_000)
    assert torch.equal(chosen.chain(given, Draw()).choices, expected)


@pytest.mark.parametrize("confidence", [0.0, 0.02])
@pytest.mark.parametrize("candidates", [None, 7])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_drafters_draft_in_c_what_they_draft_in_pytorch(target, monkeypatch, tree, candidates, confidence):
    """Through a draft vocabulary, whose indices are not token ids."""
    draft = tiny_draft(target, head_sizes=(32, 16), draft_vocab_ids=torch.arange(0, target.vocab_size, 2))

    def proposal(native: bool):
        block = BlockDrafter(draft, candidates=candidates, min_confidence=confidence)
        assert in_c(block.ops) == native
        drafter = tree_of(block, 9) if tree else block
        state = prefill(target, random_prompts([5, 2, 9]), drafter, 3, None)
        return drafter.propose(state, start(drafter, state), drafter.max_drafts)

    found = proposal(native=True)
    monkeypatch.setattr(heads, "_why_no_loop", lambda head: "a test asks for PyTorch")
    expected = proposal(native=False)
    assert torch.equal(found.num_drafts, expected.num_drafts) and int(found.num_drafts.sum()) > 0
    for r, number in enumerate(expected.num_drafts.tolist()):
        assert torch.equal(found.tokens[r, :number], expected.tokens[r, :number])
        if tree:
            assert torch.equal(found.parents[r, :number], expected.parents[r, :number])
