"""Trees in the loop: who descends from whom, which path is walked, and that caches and features follow that path."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.cycle import (
    Proposal,
    State,
    Verdict,
    best_drafts,
    commit,
    keep_drafts,
    start,
    tree_ancestors,
    verify,
    walk_tree,
)
from domino_spec.decoding.request import Limits
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.lookup import PlainDecoding
from tests.tiny import (
    ARCHITECTURES,
    TreeOracle,
    as_target,
    assert_close,
    plain_greedy,
    prefill,
    random_prompts,
    run,
    tiny_model,
)

COUNT, DRAFTS = 24, 9
LENGTHS = [3, 11, 1]


def random_parents(requests: int, drafts: int, seed: int) -> torch.Tensor:
    """[R, N], parents first; from bushes to chains, request by request."""
    generator = torch.Generator().manual_seed(seed)
    bushiness = torch.rand(requests, 1, generator=generator)
    indices = torch.arange(drafts)
    anywhere = (torch.rand(requests, drafts, generator=generator) * (indices + 1)).long() - 1
    return torch.where(torch.rand(requests, drafts, generator=generator) < bushiness, anywhere, indices - 1)


def naive_path(parents: list[int], draft: int) -> list[int]:
    """Drafts from the anchor's child down to `draft`."""
    path = []
    while draft >= 0:
        path.insert(0, draft)
        draft = parents[draft]
    return path


@pytest.mark.parametrize("drafts", [0, 1, 2, 3, 7, 8, 16, 23])
def test_ancestors_are_the_rows_above(drafts):
    parents = random_parents(6, drafts, seed=drafts)
    parents[0] = torch.arange(drafts) - 1  # as deep as can be
    parents[1] = -1  # as wide as can be
    ancestors = tree_ancestors(parents)
    assert ancestors.shape == (6, drafts + 1, drafts + 1) and ancestors.dtype == torch.bool
    for r in range(6):
        for draft in range(-1, drafts):
            above = {0, *(1 + j for j in naive_path(parents[r].tolist(), draft))}
            assert set(ancestors[r, draft + 1].nonzero()[:, 0].tolist()) == above


def naive_walk(choices: list[int], tokens: list[int], parents: list[int], count: int) -> tuple[list[int], list[int]]:
    """Committed tokens and the rows of the pass that were walked, by going down one step at a time."""
    committed, rows = [], [0]
    while True:
        wanted = choices[rows[-1]]
        committed.append(wanted)
        following = [j for j in range(count) if parents[j] == rows[-1] - 1 and tokens[j] == wanted]
        if not following:
            return committed, rows
        rows.append(following[0] + 1)


def random_trees(requests: int, drafts: int, vocab: int, seed: int) -> Proposal:
    """Trees of different numbers of drafts, whose siblings differ; what lies past is as random as the rest."""
    parents = random_parents(requests, drafts, seed)
    tokens = torch.zeros(requests, drafts, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed + 1)
    counts = torch.randint(0, drafts + 1, (requests,), generator=generator)
    for r in range(requests):
        for j in range(drafts):
            siblings = tokens[r, :j][parents[r, :j] == parents[r, j]].tolist()
            free = sorted(set(range(vocab)) - set(siblings))
            tokens[r, j] = free[torch.randint(len(free), (1,), generator=generator)]
    return Proposal(tokens, counts, parents)


def check_walk(choices: torch.Tensor, proposal: Proposal) -> list[tuple[list[int], list[int]]]:
    """Compare every request's walk with the naive one, which is returned."""
    tokens, num_accepted, path = walk_tree(choices, proposal, tree_ancestors(proposal.parents))
    requests, drafts = proposal.tokens.shape
    assert tokens.shape == path.shape == (requests, drafts + 1)
    walks = []
    for r, count in enumerate(proposal.num_drafts.tolist()):
        expected = naive_walk(choices[r].tolist(), proposal.tokens[r].tolist(), proposal.parents[r].tolist(), count)
        kept = num_accepted[r].item() + 1
        assert (tokens[r, :kept].tolist(), path[r, :kept].tolist()) == expected
        assert ((path[r] >= 0) & (path[r] <= drafts)).all(), "rows without a meaning must still be rows"
        walks.append(expected)
    return walks


@pytest.mark.parametrize("drafts, vocab", [(1, 2), (6, 7), (11, 12), (20, 21)])
def test_the_walk_follows_the_targets_choices(drafts, vocab):
    """Choices that are a child's token half of the time, so that walks of every length come up."""
    proposal = random_trees(400, drafts, vocab, seed=drafts)
    generator = torch.Generator().manual_seed(5)
    choices = torch.randint(0, vocab, (400, drafts + 1), generator=generator)
    rows = proposal.parents + 1
    likely = torch.rand(400, drafts, generator=generator) < 0.7
    # Later children overwrite earlier ones: any child is as good.
    choices.scatter_(1, rows, torch.where(likely, proposal.tokens, choices.gather(1, rows)))
    walks = check_walk(choices, proposal)
    lengths = {len(rows) for _, rows in walks}
    assert lengths >= set(range(1, min(drafts, 6) + 2))
    unlimited = Proposal(proposal.tokens, torch.full_like(proposal.num_drafts, drafts), proposal.parents)
    further = [len(a[1]) < len(b[1]) for a, b in zip(walks, check_walk(choices, unlimited), strict=True)]
    assert any(further), "drafts past a request's own would have matched"


def test_worked_walks():
    """One tree, a over b and c, b over d; row 0 is the anchor's."""
    a, b, c, d, other = 10, 11, 12, 13, 19
    tokens, parents = torch.tensor([[a, b, c, d]]), torch.tensor([[-1, 0, 0, 1]])
    cases = [
        ([a, b, d, other, 7], 4, [a, b, d, 7], [0, 1, 2, 4]),  # a whole path; the bonus follows its last row
        ([a, c, d, 7, other], 4, [a, c, 7], [0, 1, 3]),  # the other branch
        ([7, b, d, other, other], 4, [7], [0]),  # nothing: children of what was refused match, and stay refused
        ([a, 7, d, other, other], 4, [a, 7], [0, 1]),  # b refused, its child d would match
        ([a, b, d, other, 7], 3, [a, b, d], [0, 1, 2]),  # d is past the request's own drafts: it comes as the bonus
        ([a, b, d, other, 7], 0, [a], [0]),
    ]
    for choices, count, committed, rows in cases:
        proposal = Proposal(tokens, torch.tensor([count]), parents)
        assert check_walk(torch.tensor([choices]), proposal) == [(committed, rows)]


def texts_of(model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Prompts with their plain continuation, long enough for a tree to reach past the end."""
    return [p + plain_greedy(model, p, count + DRAFTS + 4) for p in prompts]


def check_against_oracle(generations, oracle: TreeOracle, prompts: list[list[int]], count: int) -> None:
    """Texts are the oracle's, and every pass accepted what the oracle had hidden in its tree."""
    for r, (generation, prompt) in enumerate(zip(generations, prompts, strict=True)):
        assert generation.token_ids == oracle.texts[r][len(prompt) : len(prompt) + count]
        passes = generation.num_verify_passes
        asked = generation.num_drafts != [0] * passes or oracle.hidden[r]  # for no drafts, nobody is asked
        assert generation.acceptance_lengths == ([n + 1 for n in oracle.hidden[r][:passes]] if asked else [1] * passes)
        assert generation.num_drafts == (oracle.proposed[r][:passes] if asked else [0] * passes)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_text_with_trees_equals_plain_decoding(kind):
    """Unequal lengths, sliding windows crossed, the continuation hidden anywhere in the tree."""
    model = tiny_model(kind)
    prompts = random_prompts(LENGTHS)
    accepted = set()
    for seed in range(2):
        oracle = TreeOracle(texts_of(model, prompts, COUNT), DRAFTS, seed=seed)
        generations = run(as_target(model), oracle, prompts, COUNT)
        check_against_oracle(generations, oracle, prompts, COUNT)
        accepted |= {n for g in generations for n in g.acceptance_lengths}
    assert accepted == {1, 2, 3, 4, 5}


def test_a_long_text_and_any_number_of_drafts(model, target):
    prompts = random_prompts([5, 2])
    count = 90
    texts = texts_of(model, prompts, count)
    for num_drafts in (0, 1, 2, 7, None):
        oracle = TreeOracle(texts, DRAFTS, seed=7)
        generations = run(target, oracle, prompts, count, num_drafts=num_drafts)
        check_against_oracle(generations, oracle, prompts, count)
        limit = DRAFTS if num_drafts is None else num_drafts
        assert max(n for g in generations for n in g.num_drafts) <= limit


def test_requests_that_ended_do_not_disturb_the_others(model, target):
    prompts = random_prompts([5, 8, 3])
    texts = texts_of(model, prompts, 60)
    stop = texts[1][8 + 3]
    oracle = TreeOracle(texts, DRAFTS)
    generations = run(target, oracle, prompts, 60, limits=Limits(60, stop_token_ids=frozenset({stop})))
    for generation, prompt, text in zip(generations, prompts, texts, strict=True):
        expected = text[len(prompt) : len(prompt) + 60]
        assert generation.token_ids == (expected[: expected.index(stop) + 1] if stop in expected else expected)
    assert len({g.num_tokens for g in generations}) > 1


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(repetition_penalty=1.5),
        SamplingSettings(presence_penalty=0.7, frequency_penalty=1.1, logit_bias={3: 4.0, 9: -100.0}),
    ],
    ids=["repetition", "presence"],
)
def test_penalties_count_the_drafts_above_and_not_those_beside(target, settings):
    """Every hidden token is accepted only if the history of its row is that of its own path."""
    prompts = random_prompts([4, 7])
    plain = [g.token_ids for g in run(target, PlainDecoding(), prompts, COUNT + DRAFTS + 4, settings=settings)]
    assert plain != [g.token_ids for g in run(target, PlainDecoding(), prompts, COUNT + DRAFTS + 4)]
    for seed in range(3):
        oracle = TreeOracle([p + t for p, t in zip(prompts, plain, strict=True)], DRAFTS, seed=seed)
        check_against_oracle(run(target, oracle, prompts, COUNT, settings=settings), oracle, prompts, COUNT)


def test_keeping_a_path_moves_its_rows_and_no_others(target):
    """Also where a path's rows overlap the places that they go to."""
    generator = torch.Generator().manual_seed(0)
    lengths, path = [4, 0, 9], [[0, 2, 3, 7], [0, 1, 2, 3], [0, 4, 5, 6]]
    cache = target.new_cache(3, 20)
    cache.lengths.copy_(torch.tensor(lengths))
    for stored in (cache.keys, cache.values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    before = cache.keys.clone(), cache.values.clone()
    cache.keep_path(torch.tensor(path))
    assert cache.lengths.tolist() == lengths
    for stored, old in zip((cache.keys, cache.values), before, strict=True):
        expected = old.clone()
        for r, (length, rows) in enumerate(zip(lengths, path, strict=True)):
            for place, row in enumerate(rows):
                expected[:, r, :, length + place] = old[:, r, :, length + row]
        assert torch.equal(stored, expected)


class Tapping(TreeOracle):
    """Keeps the features of what was committed, as a drafter that reads them is given them."""

    feature_layers = (0, 2)

    def __init__(self, texts: list[list[int]], max_drafts: int, seed: int = 0) -> None:
        super().__init__(texts, max_drafts, seed=seed)
        self.features: list[dict[int, torch.Tensor]] = [{} for _ in texts]
        """Per request, by position."""

    def advance(self, own, verdict: Verdict) -> None:
        assert verdict.features is not None
        for row, first in enumerate(verdict.anchor_positions.tolist()):
            for i in range(verdict.num_accepted[row].item() + 1):
                self.features[self.order[row]][first + i] = verdict.features[row, i]


def cycles(target, drafter, prompts: list[list[int]], count: int) -> State:
    """The loop itself, without an end: `count` cycles for every request."""
    state = prefill(target, prompts, drafter, 5 * count)
    own = start(drafter, state)
    for _ in range(count):
        proposal = drafter.propose(state, own, drafter.max_drafts)
        verdict = verify(target, state, proposal, drafter.feature_layers)
        commit(state, verdict)
        drafter.advance(own, verdict)
    return state


@torch.inference_mode()
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cache_and_features_after_trees_are_those_of_plain_decoding(kind):
    """Row by row and layer by layer: the accepted path's keys, values and features, at their places in the text."""
    model = tiny_model(kind)
    target, prompts = as_target(model), random_prompts(LENGTHS)
    tapping = Tapping(texts_of(model, prompts, 50), DRAFTS, seed=3)
    state = cycles(target, tapping, prompts, 10)
    assert torch.equal(state.cache.lengths, state.lengths - 1)
    assert len(set(state.lengths.tolist())) == 3
    for r, (prompt, length) in enumerate(zip(prompts, state.lengths.tolist(), strict=True)):
        text = tapping.texts[r][:length]
        assert state.tokens[r, :length].tolist() == text
        plain = target.new_cache(1, length - 1)
        features = target.forward(torch.tensor([text[:-1]]), plain, tapping.feature_layers).features
        assert_close(state.cache.keys[:, r, :, : length - 1], plain.keys[:, 0])
        assert_close(state.cache.values[:, r, :, : length - 1], plain.values[:, 0])
        positions = range(len(prompt) - 1, length - 1)
        assert set(tapping.features[r]) == set(positions), "each committed row once, the anchor's own among them"
        assert_close(torch.stack([tapping.features[r][p] for p in positions]), features[0, len(prompt) - 1 :])


def test_the_best_of_every_request_are_kept_with_their_parents():
    proposal = Proposal(
        torch.arange(10).view(2, 5),
        torch.tensor([5, 4]),
        torch.tensor([[-1, -1, 0, 1, 2], [-1, 0, 0, 1, 0]]),
        confidence=torch.tensor([[0.9, 0.3, 0.8, 0.2, 0.75], [0.5, 0.5, 0.1, 0.45, 0.0]]),
    )
    kept = best_drafts(proposal, 3)
    assert kept.tokens.tolist() == [[0, 2, 4], [5, 6, 8]]
    assert kept.parents.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert kept.num_drafts.tolist() == [3, 3]
    torch.testing.assert_close(kept.confidence, torch.tensor([[0.9, 0.8, 0.75], [0.5, 0.5, 0.45]]))
    fewer = keep_drafts(proposal, torch.tensor([[0, 1, 2, 3, 4]] * 2))
    assert fewer.num_drafts.tolist() == [5, 4], "what was not valid stays invalid"
