"""Acceptance of chains: the truth against what decoding does, and the Triton twins, interpreted, against the truth."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, accept_chain
from domino_spec.decoding.sampling import RandomStreams
from domino_spec.ops.acceptance import greedy_chain, greedy_chain_torch, sampled_chain, sampled_chain_torch

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def greedy_case(requests: int, drafts: int, width: int, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts that agree for a while with logits of which several are equal and largest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(requests, drafts + 1, width, generator=generator).mul(2).round().to(dtype)
    proposed = logits[:, :-1].float().argmax(-1)
    spoiled = torch.rand(requests, drafts, generator=generator) < 0.25
    proposed = torch.where(spoiled, (proposed + 1) % width, proposed)
    return logits, proposed, torch.randint(0, drafts + 1, (requests,), generator=generator)


def plain_greedy_chain(logits, drafts, num_drafts) -> tuple[list[list[int]], list[int]]:
    """Token by token."""
    texts, counts = [], []
    for rows, proposed, count in zip(logits.float().numpy(), drafts.tolist(), num_drafts.tolist(), strict=True):
        best = rows.argmax(-1).tolist()  # numpy promises the first
        accepted = 0
        while accepted < count and best[accepted] == proposed[accepted]:
            accepted += 1
        texts.append([*proposed[:accepted], best[accepted]])
        counts.append(accepted)
    return texts, counts


def assert_greedy_chain(found, case) -> None:
    texts, counts = plain_greedy_chain(*case)
    assert found.num_accepted.tolist() == counts
    assert [row[: n + 1] for row, n in zip(found.tokens.tolist(), counts, strict=True)] == texts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 5, 9), (3, 0, 7), (1, 8, 2)])
def test_a_greedy_chain_keeps_what_the_target_would_have_written(shape, dtype):
    case = greedy_case(*shape, dtype)
    found = greedy_chain(*case)
    assert_greedy_chain(found, case)
    assert found.finite.all()


def broken_case() -> tuple[Tensor, Tensor, Tensor]:
    """Nan in a used row, in an unused one, and in the bonus row; never where the argmax of others is decided."""
    logits, _, _ = greedy_case(3, 4, 30)
    drafts = logits[:, :-1].argmax(-1)
    drafts[:, 2] = (drafts[:, 2] + 1) % 30  # two are accepted
    for request, row in enumerate((1, 3, 2)):
        logits[request, row, 7] = torch.nan
    return logits, drafts, torch.full((3,), 4)


def test_a_request_is_broken_where_a_row_that_counted_holds_nan():
    assert greedy_chain(*broken_case()).finite.tolist() == [False, True, False]


def sampled_case(requests: int, drafts: int, width: int, wanted: int, seed=0) -> list[Tensor]:
    """Arguments of `sampled_chain`: drafts near the target, some requests one-hot, one draft equal to its target."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(requests, drafts + 1, width, generator=generator) * 2
    probs = logits.softmax(-1)
    noise = torch.randn(requests, drafts, width, generator=generator)
    ids = (logits[:, :-1] + noise).argsort(dim=-1, descending=True)[..., :wanted]
    draft_probs = (logits[:, :-1] + 0.5 * noise).gather(2, ids).softmax(-1)
    draft_probs[::3] = torch.zeros_like(draft_probs[::3]).scatter(2, draft_probs[::3].argmax(-1, keepdim=True), 1.0)
    if wanted == width:
        draft_probs[1::3] = probs[1::3, :-1].gather(2, ids[1::3])
    drawn = torch.multinomial(draft_probs.flatten(0, 1), 1, generator=generator).view(requests, drafts, 1)
    proposed = ids.gather(2, drawn)[..., 0]
    counts = torch.randint(0, drafts + 1, (requests,), generator=generator)
    return [probs, proposed, counts, ids, draft_probs]


def with_numbers(case: list[Tensor], seed: int = 5) -> tuple[list[Tensor], RandomStreams, Tensor]:
    probs, proposed = case[:2]
    streams = RandomStreams(torch.arange(len(probs)) + seed)
    positions = torch.arange(proposed.shape[1] + 1).expand(len(probs), -1) + 11
    accept = streams.uniform(positions[:, :-1], RandomStreams.ACCEPT)
    return [*case, accept, streams.uniform(positions, RandomStreams.RESIDUAL)], streams, positions


@pytest.mark.parametrize("shape", [(60, 4, 12, 5), (60, 3, 10, 10), (30, 5, 8, 1)])
def test_a_sampled_chain_is_decided_as_in_decoding(shape):
    given, streams, positions = with_numbers(sampled_case(*shape))
    probs, proposed, counts, ids, draft_probs = given[:5]
    proposal = Proposal(proposed, counts, candidate_ids=ids, draft_probs=draft_probs)
    tokens, num_accepted = accept_chain(probs, proposal, streams, positions)
    found = sampled_chain(*given)
    assert torch.equal(found.tokens, tokens) and torch.equal(found.num_accepted, num_accepted)
    assert len(num_accepted.unique()) > 3, "many numbers of accepted drafts must occur"


def small_parts(*given):
    """In the process that interprets: rows of several parts, of several blocks each."""
    from domino_spec.ops.triton import acceptance as acceptance_triton

    acceptance_triton._SPAN, acceptance_triton._BLOCK = 64, 32
    twice = [tuple(acceptance_triton.greedy_chain_triton(*given)) for _ in range(2)]
    acceptance_triton._SPAN, acceptance_triton._BLOCK = 8192, 2048
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True)), "what one launch leaves must not hurt the next"
    return twice[1]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 100), (2, 0, 9)])
def test_triton_decides_greedy_chains_like_the_truth(interpreted, shape, dtype):
    case = greedy_case(*shape, dtype, seed=2)
    found, expected = interpreted(small_parts, *case), greedy_chain_torch(*case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@needs_triton
def test_triton_says_where_a_row_that_counted_holds_nan(interpreted):
    found, expected = interpreted(small_parts, *broken_case()), greedy_chain_torch(*broken_case())
    assert found[2].tolist() == [False, True, False]
    assert torch.equal(found[1], expected.num_accepted) and (found[0] >= 0).all()


def sampled_twin(given: list[Tensor], programs: int, fused: bool):
    """In the process that interprets."""
    from domino_spec.ops.triton.acceptance import sampled_chain_triton

    return tuple(sampled_chain_triton(*given, programs=programs, fused=fused))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("shape", "programs", "fused"), [((4, 3, 70, 6), 9, False), ((4, 2, 12, 12), 1, True)])
def test_triton_decides_sampled_chains_like_the_truth(interpreted, shape, programs, fused):
    given, _, _ = with_numbers(sampled_case(*shape, seed=1))
    found, expected = interpreted(sampled_twin, given, programs, fused), sampled_chain_torch(*given)
    assert torch.equal(found[0], expected.tokens) and torch.equal(found[1], expected.num_accepted)
    assert found[2].all()
    assert (expected.num_accepted < given[2]).any() and (expected.num_accepted == given[2]).any()
