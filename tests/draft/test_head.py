"""The Domino head: one recurrence with two drivers, and the low-rank correction of paper 4.1.2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from domino_spec.draft.config import HeadConfig
from domino_spec.draft.domino import DominoHead
from tests.tiny import assert_close

HIDDEN, GRU, RANK, LOGITS = 10, 7, 4, 23


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = DominoHead(HeadConfig(gru_hidden_dim=GRU, low_rank=RANK), HIDDEN, LOGITS)
    torch.nn.init.normal_(head.correction_weight)
    return head.requires_grad_(False)


def test_step_and_block_drivers_and_pytorchs_gru_agree(head):
    embeddings = torch.randn(3, 6, HIDDEN)
    reference = torch.nn.GRU(HIDDEN, GRU, bias=False, batch_first=True)
    reference.load_state_dict(head.prefix_gru.state_dict())  # the names of published checkpoints are PyTorch's
    expected = reference(embeddings)[0]
    assert_close(head.block(embeddings), expected)
    state = head.initial_state(3, like=embeddings)
    assert not state.any()
    for position in range(6):
        state = head.step(embeddings[:, position], state)
        assert_close(state, expected[:, position])


def test_block_driver_takes_any_leading_shape(head):
    embeddings = torch.randn(2, 3, 4, HIDDEN)
    assert_close(head.block(embeddings).flatten(0, 1), head.block(embeddings.flatten(0, 1)))


def test_correction_is_w2_silu_w1_of_hidden_and_state(head):
    hidden, state = torch.randn(5, HIDDEN), torch.randn(5, GRU)
    w1, w2 = head.embed_proj[0].weight, head.embed_proj[2].weight
    expected = F.silu(torch.cat((hidden, state), dim=-1) @ w1.T) @ w2.T
    assert_close(head.correction(hidden, state), expected)
    assert expected.shape == (5, LOGITS)


def test_a_fresh_head_corrects_nothing():
    head = DominoHead(HeadConfig(gru_hidden_dim=GRU, low_rank=RANK), HIDDEN, LOGITS)
    assert not head.correction(torch.randn(5, HIDDEN), torch.randn(5, GRU)).any()


def test_the_head_has_no_biases(head):
    assert {n: tuple(t.shape) for n, t in head.state_dict().items()} == {
        "prefix_gru.weight_ih_l0": (3 * GRU, HIDDEN),
        "prefix_gru.weight_hh_l0": (3 * GRU, GRU),
        "embed_proj.0.weight": (RANK, HIDDEN + GRU),
        "embed_proj.2.weight": (LOGITS, RANK),
    }
