"""The acceptance rule on worked examples, with random numbers laid out on a grid so that shares are exact."""

from __future__ import annotations

from dataclasses import replace

import torch

from domino_spec.decoding.cycle import Proposal, accept_chain
from domino_spec.decoding.sampling import RandomStreams, SamplingSettings, draw
from domino_spec.ops.acceptance import match_chain
from tests.tiny import target_probs

GRID = 100


class Grid:
    """Streams whose ACCEPT and RESIDUAL numbers run over a GRID x GRID square, one request per point."""

    def __init__(self) -> None:
        points = (torch.arange(GRID).double() + 0.5) / GRID
        self.accept, self.residual = (x.flatten() for x in torch.meshgrid(points, points, indexing="ij"))

    def uniform(self, positions, use):
        numbers = self.accept if use == RandomStreams.ACCEPT else self.residual
        return numbers[:, None].expand(-1, positions.shape[1])


def shares(probs, proposal_of) -> tuple[torch.Tensor, torch.Tensor]:
    """First committed token's distribution, and the share of requests that accepted each number of drafts."""
    requests = GRID * GRID
    probs = torch.tensor(probs)[None].expand(requests, -1, -1)
    proposal = proposal_of(requests)
    positions = torch.arange(probs.shape[1]).expand(requests, -1)
    tokens, accepted = accept_chain(probs, proposal, Grid(), positions)
    first = tokens[:, 0].bincount(minlength=probs.shape[2]).double() / requests
    return first, accepted.bincount(minlength=proposal.tokens.shape[1] + 1).double() / requests


def one_hot(*tokens, vocab=3):
    """Drafts of a request that chooses among others that sample."""

    def make(r):
        drafts = torch.tensor(tokens).expand(r, -1)
        ids = torch.arange(vocab).expand(r, len(tokens), -1)
        counts = torch.full((r,), len(tokens))
        return Proposal(drafts, counts, candidate_ids=ids, draft_probs=(ids == drafts[..., None]).float())

    return make


def sampled(token, ids, probs):
    def make(r):
        return Proposal(
            torch.full((r, 1), token),
            torch.ones(r, dtype=torch.long),
            candidate_ids=torch.tensor(ids).expand(r, 1, -1),
            draft_probs=torch.tensor(probs).expand(r, 1, -1),
        )

    return make


A, B, C = 0, 1, 2
LATER = [0.2, 0.2, 0.6]


def close(actual, expected, grid=GRID):
    """Whether every boundary of the square falls within one grid line."""
    return bool((actual - torch.tensor(expected, dtype=torch.double)).abs().max() <= 1.5 / grid)


def test_a_one_hot_draft_is_accepted_with_the_targets_probability():
    """p = {a .5, b .3, c .2}, draft b: accepted .3; rejected, a comes with .714 of the rest and c with .286."""
    first, accepted = shares([[0.5, 0.3, 0.2], LATER], one_hot(B))
    assert close(accepted, [0.7, 0.3])
    assert close(first, [0.5, 0.3, 0.2])


def test_a_rejected_one_hot_draft_never_comes_back():
    probs = torch.tensor([[[0.5, 0.3, 0.2], LATER]]).expand(GRID * GRID, -1, -1)
    tokens, accepted = accept_chain(probs, one_hot(B)(GRID * GRID), Grid(), torch.zeros(GRID * GRID, 2).long())
    assert not (tokens[accepted == 0, 0] == B).any()
    rejected = tokens[accepted == 0, 0].bincount(minlength=3).double()
    assert close(rejected / rejected.sum(), [0.714, 0.0, 0.286])


def test_a_sampled_draft_is_accepted_with_the_ratio_and_its_share_taken_away():
    """target {.5, .3, .2}, draft {.2, .7, .1}: b accepted with 3/7, else a : c as .3 : .1; a and c always accepted."""
    target = [[0.5, 0.3, 0.2], LATER]
    ids, probs = [A, B, C], [0.2, 0.7, 0.1]
    first, accepted = shares(target, sampled(B, ids, probs))
    assert close(accepted, [4 / 7, 3 / 7])
    assert close(first, [4 / 7 * 0.75, 3 / 7, 4 / 7 * 0.25])
    for token in (A, C):
        _, accepted = shares(target, sampled(token, ids, probs))
        assert close(accepted, [0.0, 1.0])
    # Over the draft's own draws the token follows the target exactly.
    mixture = sum(q * shares(target, sampled(token, ids, probs))[0] for token, q in zip(ids, probs, strict=True))
    assert close(mixture, [0.5, 0.3, 0.2])


def test_candidates_may_be_few_and_in_any_order():
    target = [[0.5, 0.3, 0.2], LATER]
    ids, probs = [C, A], [0.6, 0.4]
    mixture = sum(q * shares(target, sampled(token, ids, probs))[0] for token, q in zip(ids, probs, strict=True))
    assert close(mixture, [0.5, 0.3, 0.2])
    _, accepted = shares(target, sampled(C, ids, probs))
    assert close(accepted, [2 / 3, 1 / 3])


def test_a_draft_that_the_target_excludes_is_always_rejected():
    first, accepted = shares([[0.6, 0.0, 0.4], LATER], one_hot(B))
    assert close(accepted, [1.0, 0.0])
    assert close(first, [0.6, 0.0, 0.4])


def test_after_a_fully_accepted_chain_the_bonus_comes_from_the_next_row():
    requests = GRID * GRID
    probs = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], LATER]).expand(requests, -1, -1)
    tokens, accepted = accept_chain(probs, one_hot(A, B)(requests), Grid(), torch.zeros(requests, 3).long())
    assert accepted.eq(2).all() and tokens[:, 0].eq(A).all() and tokens[:, 1].eq(B).all()
    assert close(tokens[:, 2].bincount(minlength=3).double() / requests, LATER)


def test_drafts_past_a_requests_own_number_are_ignored():
    """Nothing is rejected there, so nothing is taken from the bonus's distribution."""
    requests = GRID * GRID
    probs = torch.tensor([[1.0, 0, 0], LATER, [0, 1.0, 0]]).expand(requests, -1, -1)
    proposal = replace(one_hot(A, C)(requests), num_drafts=torch.ones(requests, dtype=torch.long))
    tokens, accepted = accept_chain(probs, proposal, Grid(), torch.zeros(requests, 3).long())
    assert accepted.eq(1).all()
    assert close(tokens[:, 1].bincount(minlength=3).double() / requests, LATER)


def test_a_request_without_drafts_of_its_own_draws_from_the_target():
    first, accepted = shares(
        [[0.5, 0.3, 0.2], LATER], lambda r: replace(one_hot(B)(r), num_drafts=torch.zeros(r, dtype=torch.long))
    )
    assert close(accepted, [1.0, 0.0])
    assert close(first, [0.5, 0.3, 0.2])


def test_a_chosen_draft_stays_with_the_probability_that_the_target_chooses_it():
    requests = GRID * GRID
    probs = torch.tensor([[0.5, 0.3, 0.2], LATER]).expand(requests, -1, -1)
    choices = draw(probs, Grid().uniform(torch.zeros(requests, 2), RandomStreams.RESIDUAL))
    proposal = Proposal(torch.full((requests, 1), B), torch.ones(requests, dtype=torch.long))
    tokens, accepted = match_chain(choices, proposal.tokens, proposal.num_drafts)
    assert close(accepted.bincount(minlength=2).double() / requests, [0.7, 0.3])
    assert close(tokens[:, 0].bincount(minlength=3).double() / requests, [0.5, 0.3, 0.2])


def both_ways(logits, proposal):
    positions = torch.arange(logits.shape[1]).expand(len(logits), -1)
    streams = RandomStreams(torch.arange(len(logits)))
    one_hot = accept_chain(target_probs(logits, SamplingSettings()), proposal, streams, positions)
    return match_chain(logits.argmax(-1), proposal.tokens, proposal.num_drafts), one_hot


def test_the_greedy_twin_equals_the_one_hot_path():
    generator = torch.Generator().manual_seed(0)
    requests, drafts, vocab = 300, 4, 5
    logits = torch.randn(requests, drafts + 1, vocab, generator=generator)
    tokens = logits[:, :-1].argmax(-1)
    wrong = torch.rand(requests, drafts, generator=generator) < 0.3
    tokens = torch.where(wrong, torch.randint(0, vocab, (requests, drafts), generator=generator), tokens)
    counts = torch.randint(0, drafts + 1, (requests,), generator=generator)
    ids = torch.arange(vocab).expand(requests, drafts, -1)
    probs = torch.rand(requests, drafts, vocab, generator=generator)
    proposal = Proposal(tokens, counts, None, ids, probs / probs.sum(-1, keepdim=True))
    greedy, one_hot = both_ways(logits, proposal)
    assert torch.equal(greedy[1], one_hot[1])
    assert set(greedy[1].tolist()) == {0, 1, 2, 3, 4}
    used = torch.arange(drafts + 1) <= greedy[1][:, None]
    assert torch.equal(greedy[0][used], one_hot[0][used])


def test_a_sampled_draft_cannot_reject_the_targets_own_argmax():
    """Temperature 0 as a plain softmax does that; one-hot never."""
    logits = torch.tensor([[[0.1, 0.2], [0.0, 1.0]]])
    proposal = Proposal(
        torch.tensor([[1]]), torch.tensor([1]), None, torch.tensor([[[0, 1]]]), torch.tensor([[[0.01, 0.99]]])
    )
    for tokens, accepted in both_ways(logits, proposal):
        assert accepted.item() == 1 and tokens[0, 0].item() == 1
