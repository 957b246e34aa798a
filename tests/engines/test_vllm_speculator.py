"""The plug-in's part of vLLM's second runner, called on CPU with tensors of the test's own; and sharded matrices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import vllm

from domino_spec.decoding.sampling import RandomStreams
from domino_spec.engines.drafting import draft_tokens, over_vocabulary
from domino_spec.engines.hooks import check_hooks
from domino_spec.engines.vllm import model
from domino_spec.engines.vllm.install import HOOKS_V2
from domino_spec.engines.vllm.served import ServedDraft
from domino_spec.engines.vllm.speculator import DominoSpeculator
from domino_spec.settings import UserError
from tests import tiny
from tests.engines.test_drafting import EVERY_SECOND, parts_of

REQUESTS, MOST = 2, 4


def test_the_second_runner_is_as_the_plugin_expects():
    check_hooks("vllm", vllm.__version__, HOOKS_V2)


def speculator_of(draft, num_drafts: int, states: torch.Tensor, samples: bool) -> DominoSpeculator:
    """As after its construction in a runner, whose backbone gives `states`."""
    speculator = object.__new__(DominoSpeculator)
    speculator.draft = ServedDraft("tiny", draft.config, num_drafts, 8)
    speculator.device, speculator.max_num_reqs = torch.device("cpu"), MOST
    speculator.draft_logits = torch.zeros(MOST, num_drafts, tiny.VOCAB) if samples else None
    speculator._make_buffers()
    block = draft.config.block_size
    speculator.input_buffers = SimpleNamespace(
        input_ids=torch.randint(0, tiny.VOCAB, (MOST * block,), dtype=torch.int32),
        positions=torch.arange(100, 100 + MOST * block),
    )
    speculator.temperature = torch.tensor([0.0, 0.7, 1.0, 1.3])
    speculator.seeds = torch.tensor([3, 5, 7, 11])
    speculator.draft_tokens = torch.full((MOST, num_drafts), -1)
    speculator._run_model = lambda *args: states
    speculator.model = SimpleNamespace(draft=lambda *given: draft_tokens(parts_of(draft, 8), *given))
    return speculator


@pytest.mark.parametrize("shift_label", [True, False])
@pytest.mark.parametrize("fewer", [0, 2])
def test_a_step_reads_the_right_slots_and_anchors(target, shift_label, fewer):
    draft = tiny.tiny_draft(target, shift_label=shift_label)
    num_drafts, block = draft.config.max_drafts - fewer, draft.config.block_size
    states = torch.randn(REQUESTS * block + 3, draft.config.hidden_size)  # rows of padding behind
    speculator = speculator_of(draft, num_drafts, states, samples=False)
    speculator._generate_draft(REQUESTS, len(states), None, None, None)
    first = draft.config.first_draft_slot
    hidden = states[: REQUESTS * block].view(REQUESTS, block, -1)[:, first : first + num_drafts]
    anchors = speculator.input_buffers.input_ids[: REQUESTS * block : block].long()
    assert torch.equal(speculator.draft_tokens[:REQUESTS], draft_tokens(parts_of(draft, 8), hidden, anchors).tokens)
    assert (speculator.draft_tokens[REQUESTS:] == -1).all()


def test_sampled_drafts_are_keyed_by_request_and_leave_their_distribution(target):
    draft = tiny.tiny_draft(target, draft_vocab_ids=EVERY_SECOND)
    block = draft.config.block_size
    states = torch.randn(3 * block, draft.config.hidden_size)
    speculator = speculator_of(draft, block, states, samples=True)
    speculator._request_rows[:REQUESTS] = torch.tensor([3, 1])  # the third row of the batch is a graph's padding
    speculator._generate_draft(3, len(states), None, None, None)
    seeds, temperatures = torch.tensor([11, 5]), torch.tensor([1.3, 0.7])
    positions = torch.tensor([100, 100 + block])[:, None] + torch.arange(1, block + 1)
    uniform = RandomStreams(seeds).uniform(positions, RandomStreams.DRAFT)
    anchors = speculator.input_buffers.input_ids[: REQUESTS * block : block].long()
    hidden = states.view(3, block, -1)[:REQUESTS]
    expected = draft_tokens(parts_of(draft, 8), hidden, anchors, temperatures, uniform)
    assert torch.equal(speculator.draft_tokens[:REQUESTS], expected.tokens)
    found = (speculator.draft_logits[[3, 1]] / temperatures[:, None, None]).softmax(-1)
    tiny.assert_close(found, over_vocabulary(expected, tiny.VOCAB))
    assert speculator.draft_logits[[0, 2]].isinf().all()


def test_a_step_runs_while_memory_is_measured_with_fewer_rows_than_blocks(target):
    draft = tiny.tiny_draft(target)
    speculator = speculator_of(draft, 5, torch.randn(7, draft.config.hidden_size), samples=True)
    speculator._generate_draft(MOST, 7, None, None, None)
    assert (speculator.draft_tokens >= 0).all()
    assert speculator.draft_logits[:-1].isinf().all()  # no request was there


def test_vllms_kernel_finds_room_for_every_mask_of_the_last_request(target):
    """It notes a mask's slot at `request * N + slot - 1`, for all B - 1 masks, however small N is."""
    draft = tiny.tiny_draft(target)
    speculator = speculator_of(draft, 2, torch.randn(1, draft.config.hidden_size), samples=False)
    last = (MOST - 1) * 2 + draft.config.block_size - 2
    assert all(
        len(noted) > last for noted in (speculator.sample_indices, speculator.sample_pos, speculator.sample_idx_mapping)
    )


def shard(weight: torch.Tensor, first: int, stop: int) -> SimpleNamespace:
    """A rank's part of a matrix, with rows of padding behind it as vLLM has them."""
    indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=stop)
    return SimpleNamespace(weight=torch.cat((weight[first:stop], weight.new_full((4, 8), 9.0))), shard_indices=indices)


def test_rows_of_a_sharded_matrix_are_whole_on_every_rank(monkeypatch):
    weight, ids = torch.randn(10, 8), torch.tensor([0, 3, 4, 9])
    shards = [shard(weight, 0, 4), shard(weight, 4, 10)]
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: 1)
    alone = [model.whole_rows(part, ids, "LM head") for part in shards]  # one rank: nothing is summed
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(model, "tensor_model_parallel_all_reduce", lambda rows: alone[0] + alone[1])
    for part in shards:
        assert torch.equal(model.whole_rows(part, ids, "LM head"), weight[ids])


def test_a_quantised_matrix_is_refused_for_a_draft_vocabulary():
    part = shard(torch.randn(10, 8), 0, 10)
    part.weight = part.weight.to(torch.int8)
    with pytest.raises(UserError, match="LM head as a plain matrix, and it is quantised"):
        model.whole_rows(part, torch.tensor([1]), "LM head")
