"""Bytes that stages must move, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from domino_spec.bench.profile import Cycle
from domino_spec.bench.roofline import (
    Work,
    cache_bytes,
    draft_bytes,
    fill_state,
    filled_caches,
    new_state,
    synthetic_text,
    target_bytes,
    weight_bytes,
)
from domino_spec.drafters.methods import make_drafter
from tests import tiny

CPU = torch.device("cpu")
H, INNER, L, HEADS, KV, D, V = 32, 48, 4, 4, 2, 8, 60  # the tiny Llama
T, R, N = 12, 2, 3
"""Committed tokens, requests, drafts."""
B, DI, DL, DD, G, LOW, TAPS = 5, 40, 2, 16, 12, 6, 2  # the tiny draft


def counted(target, draft, method, requests=R, **options):
    """Bytes of a cycle of a method on two requests of twelve tokens."""
    drafter = make_drafter(method, draft, requests=requests, device=CPU, **{"candidates": 10, **options})
    state = new_state(target, synthetic_text(target, T, requests), 64)
    fill_state(state)
    with torch.inference_mode():
        cycle = Cycle(target, state, drafter, filled_caches(target, drafter, state), N, draft)
        work = cycle.sample().work
    moved = target_bytes(target, work, requests, T) | draft_bytes(draft, drafter, work, requests, T)
    return work, moved


@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_every_stage_against_a_count_by_hand(target, method):
    work, moved = counted(target, tiny.tiny_draft(target), method)
    rows, committed = R * (N + 1), work.committed
    assert work == Work(rows, committed, draft_passes=1, lm_head_passes=1, logits=R * N * V)
    layer = H * (HEADS + 2 * KV) * D + HEADS * D * H + 3 * H * INNER + 2 * H
    draft_layer = H * (HEADS + 2 * KV) * DD + HEADS * DD * H + 3 * H * DI + 2 * H + 2 * DD
    head = 3 * G * H + 3 * G * G + LOW * (H + G) + R * (N - 1) * 10 * LOW  # ten candidates of the corrected slots
    expected = {
        "verify": L * layer + H + 2 * L * KV * D * (R * (T - 1) + rows),
        "verify_lm_head": V * H + rows * V,
        "accept_commit": rows * V,
        "context": H * TAPS * H + H + 2 * DL * KV * DD * H + committed * (TAPS * H + 2 * DL * KV * DD),
        "backbone": DL * draft_layer + H + R * (T - 1) * 2 * DL * KV * DD,
        "lm_head": V * H + R * N * V,
        "rollout": R * N * V + (head if method == "domino" else 0),
    }
    assert moved == {name: 4 * values for name, values in expected.items()}


def test_of_w2_only_the_candidates_rows_count_and_all_rows_once(target):
    draft = tiny.tiny_draft(target, block_size=4)
    base = 3 * G * H + 3 * G * G + LOW * (H + G) + N * V
    for candidates, rows in ((2, 2 * (N - 1)), (10, 10 * (N - 1)), (50, V), (None, V)):
        _, moved = counted(target, draft, "domino", requests=1, candidates=candidates)
        assert moved["rollout"] == 4 * (base + rows * LOW)


def test_a_tree_reads_the_logits_of_the_slots_that_its_paths_can_reach(target):
    draft = tiny.tiny_draft(target)
    assert N < B
    work, moved = counted(target, draft, "domino-tree", num_drafts=6)
    assert work.logits == R * N * V and moved["lm_head"] == 4 * (V * H + R * N * V)


def test_a_draft_vocabulary_makes_the_lm_head_smaller(target):
    draft = tiny.tiny_draft(target, draft_vocab_ids=torch.arange(0, V, 3))
    _, moved = counted(target, draft, "domino")
    assert moved["lm_head"] == 4 * (20 * H + R * N * 20)


def test_a_draft_that_runs_level_by_level_reads_its_weights_at_each(target):
    draft = tiny.tiny_single_layer(target)
    work, moved = counted(target, draft, "eagle3", num_drafts=20)
    layer = 2 * H * (HEADS + 2 * KV) * DD + HEADS * DD * H + 3 * H * DI + 3 * H + H
    assert work.draft_passes > 1
    assert moved["backbone"] == 4 * work.draft_passes * (layer + R * (T - 1) * 2 * KV * DD)
    assert moved["lm_head"] == 4 * (work.lm_head_passes * V * H + work.logits)
    fc = H * 3 * H + 2 * H + 2 * H * 2 * KV * DD
    assert moved["context"] == 4 * (fc + work.committed * (3 * H + 2 * KV * DD))


def test_plain_decoding_has_the_targets_stages_alone(target):
    work, moved = counted(target, None, "none")
    assert set(moved) == {"verify", "verify_lm_head", "accept_commit"} and work.rows == R and work.logits == 0


def test_layers_with_a_window_read_what_is_inside_it():
    """Windows of 6 of 11 cached rows on two layers of four."""
    rows = {}
    for kind in ("qwen2", "qwen2-mixed"):
        target = tiny.tiny_target(kind)
        _, moved = counted(target, None, "none", requests=1)
        rows[kind] = moved["verify"]
    assert rows["qwen2"] - rows["qwen2-mixed"] == 4 * 2 * KV * D * 2 * (11 - 6)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packing_changes_no_count(kind):
    plain, packed = tiny.tiny_target(kind, hidden_size=64), tiny.tiny_target(kind, hidden_size=64)
    drafts = tiny.tiny_draft(plain), tiny.tiny_draft(packed)
    _, before = counted(plain, drafts[0], "domino")
    _, after = counted(packed.pack(), drafts[1].pack(), "domino")
    norms = 4 * 2 * 16 * (L if kind == "qwen3" else 0)  # of heads, which fused attention keeps outside its modules
    assert before["verify"] - norms <= after["verify"] <= before["verify"]
    assert after["verify_lm_head"] == before["verify_lm_head"] and after["lm_head"] == before["lm_head"]
    assert after["backbone"] == pytest.approx(before["backbone"], rel=0.02)


def test_tied_weights_are_counted_once():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    assert weight_bytes(nn.ModuleList([embedding, head])) == weight_bytes(embedding) == 160


def test_of_a_mixture_of_experts_those_of_one_token_count():
    config = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=60)
    made = {}
    for experts in (2, 8):
        torch.manual_seed(0)
        full = Qwen3MoeConfig(**shape, **{**config, "num_experts": experts}, head_dim=16, intermediate_size=16)
        target = tiny.as_target(AutoModelForCausalLM.from_config(full, dtype=torch.float32))
        work = Work(rows=4, committed=1, draft_passes=0, lm_head_passes=0, logits=0)
        made[experts] = target_bytes(target, work, 1, T)["verify"]
    router = 4 * 2 * 32  # of one more expert, on two layers
    assert made[8] - made[2] == 6 * router


def test_caches_take_what_tensors_of_that_shape_take(target):
    draft = tiny.tiny_draft(target)
    drafter = make_drafter("domino", draft, requests=3, device=CPU)
    cache, own = target.new_cache(3, 20), drafter.allocate(3, 20)
    taken = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values, own.keys, own.values))
    assert cache_bytes(target.config, [draft.config], torch.float32, 3 * 20) == taken
