"""EAGLE-3's trees against a worked example, a plain growth over paths, and the plain layer without a cache."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch

from domino_spec.decoding.cycle import Proposal, start, tree_ancestors
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.eagle3 import Eagle3Drafter, grow_tree
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from tests.decoding.test_lossless import exact_joint, p_value
from tests.plain_eagle3 import PlainEagle3, plain_tree
from tests.tiny import (
    VOCAB,
    Beside,
    TreeOracle,
    as_target,
    plain_greedy,
    prefill,
    random_prompts,
    run,
    tiny_model,
    tiny_single_layer,
)

SUBSET = torch.arange(0, VOCAB, 3)


class Paths:
    """`expand` of a draft that is a function of a path: keeps track of which path every node stands for.

    Args:
        log_probs: one function for each request.
    """

    def __init__(self, log_probs) -> None:
        self.log_probs = log_probs
        self.nodes: list[list[tuple[int, ...]]] = [[()] for _ in log_probs]
        self.expanded = 0

    def first(self) -> torch.Tensor:
        return torch.tensor([f(()) for f in self.log_probs])

    def expand(self, choices: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.expanded += choices.shape[1]
        self.nodes = [
            [(*nodes[p], c) for c, p in zip(row.tolist(), above.tolist(), strict=True)]
            for nodes, row, above in zip(self.nodes, choices, parents, strict=True)
        ]
        return torch.tensor([[f(path) for path in nodes] for f, nodes in zip(self.log_probs, self.nodes, strict=True)])


def paths_of(choices: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    """The path of every node of a tree."""
    found: list[tuple[int, ...]] = []
    for choice, parent in zip(choices, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), choice))
    assert len(set(found)) == len(found), "siblings differ"
    return found


def proposed(proposal: Proposal, r: int = 0) -> list[tuple[int, ...]]:
    """Request r's tree as paths of tokens."""
    if proposal.parents is None:
        assert proposal.tokens.shape[1] == 0
        return []
    count = proposal.num_drafts[r]
    return paths_of(proposal.tokens[r, :count].tolist(), proposal.parents[r, :count].tolist())


@torch.inference_mode()
def fresh_proposal(target: Target, drafter: Eagle3Drafter, text: list[int], num_drafts: int | None = None) -> Proposal:
    """What is proposed after `text` where all of it is the prompt."""
    state = prefill(target, [text], drafter, 1)
    return drafter.propose(state, start(drafter, state), drafter.max_drafts if num_drafts is None else num_drafts)


# Growth


WORKED = {"": dict(a=0.6, b=0.4), "a": dict(c=0.7, d=0.3), "b": dict(c=0.9, d=0.1)}
WORKED |= {"ac": dict(e=0.98, f=0.02), "bc": dict(e=0.9, f=0.1)}


def worked_log_probs(path: tuple[int, ...]) -> list[float]:
    following = WORKED["".join("abcdef"[choice] for choice in path)]
    return [math.log(following[name]) if name in following else -math.inf for name in "abcdef"]


@pytest.mark.parametrize("prune", [True, False])
def test_growth_and_reranking_of_a_worked_example(prune):
    """Two children of two nodes, twice: 10 nodes are scored, the best 5 kept (a total of 6)."""
    draft = Paths([worked_log_probs])
    everything = grow_tree(draft.first(), draft.expand, budget=10, depth=2, top_k=2, prune=prune)
    names = [
        "".join("abcdef"[c] for c in path)
        for path in paths_of(everything.choices[0].tolist(), everything.parents[0].tolist())
    ]
    assert names == ["a", "b", "ac", "ad", "bc", "bd", "ace", "acf", "bce", "bcf"]
    draft = Paths([worked_log_probs])
    kept = grow_tree(draft.first(), draft.expand, budget=5, depth=2, top_k=2, prune=prune)
    assert kept.num_drafts.tolist() == [5]
    assert ["abcdef"[c] for c in kept.choices[0].tolist()] == ["a", "b", "c", "c", "e"]  # nodes 0, 1, 2, 4, 6
    assert (kept.parents[0] + 1).tolist() == [0, 0, 1, 2, 3]
    ancestors = tree_ancestors(kept.parents)[0]
    rows = ["".join(str(int(x)) for x in row) for row in ancestors]
    assert rows == ["100000", "110000", "101000", "110100", "101010", "110101"]
    assert (ancestors.sum(-1) - 1).tolist() == [0, 1, 1, 2, 2, 3]


def random_table(seed: int, vocab: int, sharpness: float):
    """Log-probabilities after any path, the same whenever asked."""

    def log_probs(path: tuple[int, ...]) -> list[float]:
        rng = random.Random(f"{seed} {path}")
        logits = torch.tensor([rng.gauss(0, sharpness) for _ in range(vocab)], dtype=torch.double)
        return logits.log_softmax(0).tolist()

    return log_probs


@pytest.mark.parametrize("top_k, depth, budget", [(1, 4, 5), (2, 3, 6), (3, 4, 15), (4, 2, 40), (7, 3, 59), (3, 0, 2)])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_growth_equals_a_plain_one_over_paths(top_k, depth, budget, sharpness):
    """Three requests together, whose trees differ, with and without leaving out what cannot reach the tree."""
    tables = [random_table(seed, 7, sharpness) for seed in range(3)]
    for prune in (True, False):
        draft = Paths(tables)
        tree = grow_tree(draft.first(), draft.expand, budget, depth, top_k, prune)
        for r, table in enumerate(tables):
            count = int(tree.num_drafts[r])
            found = paths_of(tree.choices[r, :count].tolist(), tree.parents[r, :count].tolist())
            assert found == plain_tree(table, top_k, depth, budget), (r, prune)


def test_leaving_out_hopeless_nodes_saves_work_and_changes_nothing():
    tables = [random_table(5, 30, 3.0)]
    trees, expanded = [], []
    for prune in (True, False):
        draft = Paths(tables)
        tree = grow_tree(draft.first(), draft.expand, budget=15, depth=7, top_k=10, prune=prune)
        trees.append((tree.choices.tolist(), tree.parents.tolist()))
        expanded.append(draft.expanded)
    assert trees[0] == trees[1]
    assert expanded[1] == 70 and expanded[0] < 35


def test_certain_children_do_not_push_out_their_parents():
    """Where rounding makes every child as good as its parent, parents still come first and stay in the tree."""
    tree = grow_tree(
        torch.tensor([[40.0, 0.0, -1.0]]),
        lambda choices, parents: torch.tensor([40.0, 0.1, -1.0]).expand(1, choices.shape[1], 3),
        budget=4,
        depth=5,
        top_k=2,
        prune=True,
    )
    assert tree.parents.tolist() == [[-1, 0, 1, 2]] and tree.choices.tolist() == [[0, 0, 0, 0]]


# The draft's trees


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("vocabulary", [None, SUBSET], ids=["full", "subset"])
def test_trees_equal_plain_ones_without_cache_or_mask(target, vocabulary, packed):
    """Every path of the plain growth is run through the plain layer from the first pair on; the larger tree keeps all
    30 nodes, so that every level's scores show."""
    draft = tiny_single_layer(target, draft_vocab_ids=vocabulary, std=0.2)
    plain = PlainEagle3(draft)
    ids = range(VOCAB) if vocabulary is None else vocabulary.tolist()
    drafter = Eagle3Drafter(draft.pack() if packed else draft, total=31, depth=3, top_k=3)
    for text in random_prompts([2, 7]):
        state = prefill(target, [text], drafter, 1)

        def log_probs(path: tuple[int, ...], state=state, text=text) -> list[float]:
            out = plain.continued(state.features[0], text[1:], [ids[c] for c in path])[-1]
            return plain.logits(out).log_softmax(-1).tolist()

        log_probs = functools.cache(log_probs)
        for budget in (12, 30):
            expected = [tuple(ids[c] for c in path) for path in plain_tree(log_probs, 3, 3, budget)]
            assert proposed(fresh_proposal(target, drafter, text, budget)) == expected


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("lengths", [[7, 3, 1], [5]], ids=["unequal", "one"])
def test_trees_of_every_cycle_equal_a_fresh_computation(model, target, lengths, prune):
    """Pairs grown along accepted paths of trees are those of the text: features of the path, not of its neighbours."""
    drafter = Eagle3Drafter(tiny_single_layer(target), total=16, depth=3, top_k=4, prune=prune)
    prompts, count = random_prompts(lengths), 12
    texts = [p + plain_greedy(model, p, count + 12) for p in prompts]
    watched = Beside(drafter, TreeOracle(texts, 8))
    generations = run(target, watched, prompts, count)
    assert max(n for g in generations for n in g.acceptance_lengths) > 2
    compared = 0
    for committed, proposal in watched.proposals:
        for r, text in enumerate(committed):
            assert proposed(proposal, r) == proposed(fresh_proposal(target, drafter, text))
            compared += 1
    assert compared >= 3 * len(prompts)


def test_a_prompt_of_one_token_has_no_feature_and_gets_no_drafts(target):
    drafter = Eagle3Drafter(tiny_single_layer(target), total=8)
    alone, together = run(target, drafter, [[5]], 4), run(target, drafter, [[5], [4, 9, 2]], 4)
    assert [g.num_drafts[:2] for g in alone] == [[0, 7]]
    assert [g.num_drafts[:2] for g in together] == [[0, 7], [7, 7]]
    nothing = fresh_proposal(target, drafter, [5])
    assert nothing.tokens.shape == (1, 0)


def test_any_order_of_the_draft_vocabulary_gives_the_same_trees(target):
    draft = tiny_single_layer(target, draft_vocab_ids=SUBSET)
    turned = tiny_single_layer(target, draft_vocab_ids=SUBSET.flip(0))
    turned.lm_head.weight.copy_(draft.lm_head.weight.flip(0))
    for text in random_prompts([4, 9]):
        trees = [proposed(fresh_proposal(target, Eagle3Drafter(d, total=16, depth=3), text)) for d in (draft, turned)]
        assert trees[0] == trees[1]
        assert {token for path in trees[0] for token in path} <= set(SUBSET.tolist())


def test_one_child_makes_a_chain(target):
    drafter = Eagle3Drafter(tiny_single_layer(target), total=60, depth=4, top_k=1)
    assert drafter.max_drafts == 5
    (path, *_) = reversed(proposed(fresh_proposal(target, drafter, [3, 1, 4, 1, 5])))
    assert len(path) == 5


def test_a_tree_is_as_large_as_asked_for(target):
    """Fewer drafts are the most probable ones of the same growth."""
    drafter = Eagle3Drafter(tiny_single_layer(target))
    assert drafter.max_drafts == 59
    (text,) = random_prompts([6])
    sizes = {n: proposed(fresh_proposal(target, drafter, text, n)) for n in (0, 1, 4, 15, 59)}
    assert [len(tree) for tree in sizes.values()] == [0, 1, 4, 15, 59]
    for fewer, more in ((1, 4), (4, 15), (15, 59)):
        assert set(sizes[fewer]) < set(sizes[more])


def test_sizes_out_of_range_and_other_drafts_are_refused(target):
    draft = tiny_single_layer(target)
    for wrong in (dict(total=1), dict(depth=-1), dict(top_k=0)):
        with pytest.raises(ValueError, match="a total of at least 2"):
            Eagle3Drafter(draft, **wrong)
    with pytest.raises(UserError, match="made for dart"):
        Eagle3Drafter(tiny_single_layer(target, "dart"))


# Lossless


@pytest.mark.parametrize(
    "options, sizes",
    [
        (dict(), dict(total=16)),
        (dict(), dict(total=60)),
        (dict(draft_vocab_ids=SUBSET), dict(total=16, depth=3, top_k=4)),
        (dict(), dict(total=6, depth=4, top_k=1)),
    ],
    ids=["16", "60", "subset", "chain"],
)
def test_greedy_output_equals_plain_decoding(model, target, options, sizes):
    prompts, count = random_prompts([6, 1, 11]), 20
    generations = run(target, Eagle3Drafter(tiny_single_layer(target, **options), **sizes), prompts, count)
    for generation, prompt in zip(generations, prompts, strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, count)


LOSSLESS_VOCAB, PROMPT, REQUESTS, FALSE_ALARM = 12, [9, 1, 9, 9, 9, 1], 4000, 1e-4
CASES = [
    (dict(temperature=1.0), dict(total=16, depth=3, top_k=4)),
    (dict(temperature=0.9, top_p=0.85), dict(total=8, depth=2, top_k=3)),
    (dict(temperature=0.8, top_k=6), dict(total=12, depth=2, top_k=3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings, sizes", CASES)
def test_the_joint_distribution_is_the_targets_own(settings, sizes):
    """Counts of all texts of three tokens, 4,000 requests, by the chi-square test of `tests/decoding/test_lossless.py`;
    a lossless decoder fails one of these cases with probability 1e-4."""
    model = tiny_model(
        vocab_size=LOSSLESS_VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        initializer_range=0.35,
        seed=2,
    )
    target = as_target(model)
    draft = tiny_single_layer(target, taps=(0, 0, 1))
    generations = run(
        target, Eagle3Drafter(draft, **sizes), [PROMPT] * REQUESTS, 3, settings=SamplingSettings(**settings)
    )
    texts = torch.tensor([g.token_ids for g in generations])
    places = (texts * torch.tensor([LOSSLESS_VOCAB**2, LOSSLESS_VOCAB, 1])).sum(-1)
    counts = places.bincount(minlength=LOSSLESS_VOCAB**3).view((LOSSLESS_VOCAB,) * 3)
    accepted = torch.tensor([n for g in generations for n in g.acceptance_lengths]).bincount(minlength=4)
    assert (accepted[1:4] > 0.005 * accepted.sum()).all(), "every depth of acceptance must occur"
    assert p_value(counts, exact_joint(model, settings)) > FALSE_ALARM / len(CASES)


# A draft that knows the text


def cycle_target() -> tuple[Target, torch.Tensor]:
    """A target that writes a fixed permutation of its 24 tokens: every hidden state is the last token, one-hot."""
    vocab, hidden = 24, 32
    model = tiny_model(vocab_size=vocab, hidden_size=hidden)
    after = torch.randperm(vocab, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(vocab, hidden))
        model.get_output_embeddings().weight[after] = torch.eye(vocab, hidden)
    return as_target(model), after


def knowing_draft(target: Target, after: torch.Tensor):
    """Its MLP turns token t of the feature into its successor, so its output is the feature that does not exist yet."""
    draft = tiny_single_layer(target)
    hidden, vocab = target.hidden_size, len(after)
    layer = draft.midlayer
    successor = torch.zeros(hidden, hidden)
    successor[after, torch.arange(vocab)] = 1
    for parameter in draft.parameters():
        parameter.zero_()
    for norm in (layer.hidden_norm, layer.input_layernorm, layer.post_attention_layernorm, draft.norm):
        norm.weight.fill_(1)
    draft.fc.weight[:, :hidden] = torch.eye(hidden)
    layer.mlp.gate_proj.weight[:hidden] = torch.eye(hidden)
    layer.mlp.up_proj.weight[:hidden] = torch.eye(hidden)
    height = math.sqrt(hidden)  # of a normed one-hot state
    gated = height * height / (1 + math.exp(-height))
    layer.mlp.down_proj.weight[:, :hidden] = (successor - torch.eye(hidden)) / gated
    draft.lm_head.weight[after] = 3 * torch.eye(vocab, hidden)
    return draft


@pytest.mark.parametrize("sizes, longest", [(dict(total=16), 8), (dict(total=60, depth=5), 6), (dict(top_k=1), 8)])
def test_a_draft_that_knows_the_text_is_accepted_to_the_end(sizes, longest):
    """Its longest path is right in every cycle, and is in the tree."""
    target, after = cycle_target()
    prompts = []
    for first, length in ((0, 5), (7, 2), (3, 9)):
        prompts.append([first])
        while len(prompts[-1]) < length:
            prompts[-1].append(int(after[prompts[-1][-1]]))
    drafter = Eagle3Drafter(knowing_draft(target, after), **sizes)
    for generation, prompt in zip(run(target, drafter, prompts, 30), prompts, strict=True):
        expected = [prompt[-1]]
        while len(expected) <= 30:
            expected.append(int(after[expected[-1]]))
        assert generation.token_ids == expected[1:]
        assert set(generation.acceptance_lengths) == {longest + 1}
