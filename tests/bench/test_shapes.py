"""Pairs of a shape: of the right size, made in place, refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch

from domino_spec.bench import shapes
from domino_spec.bench.shapes import SHAPES, check_memory, find_shape, free_memory, make_pair, plan_pair
from domino_spec.draft.checkpoint import read_draft
from domino_spec.draft.load import EMBEDDED_DRAFT, draft_directory, shape_mismatch
from domino_spec.drafters.methods import make_drafter
from domino_spec.settings import UserError
from tests import tiny

CPU = torch.device("cpu")


def sizes(module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_large_shape_is_qwen3_8b_with_the_papers_draft():
    plan = plan_pair(SHAPES["qwen3-8b"], torch.bfloat16, "cpu")
    draft = plan.draft
    assert sizes(draft.backbone) == pytest.approx(1.049e9, rel=1e-3) and sizes(draft.head) == pytest.approx(
        55.9e6, rel=1e-3
    )
    assert draft.config.target_layer_ids == (1, 9, 17, 25, 33)
    assert (draft.config.block_size, draft.config.max_drafts) == (16, 16)
    both = 2 * (8.19e9 + 1.105e9)
    assert plan.weights == pytest.approx(both + 2 * 2 * 151936 * 4096, rel=1e-2)  # the LM heads once more: packed
    assert all(weight.device.type == "meta" for weight in draft.parameters())


def test_the_small_shape_is_that_of_the_embedded_pair():
    """The demo draft in the package says what its target looks like, too."""
    plan, demo = plan_pair(SHAPES["smollm2-135m"], device="cpu"), read_draft(draft_directory(EMBEDDED_DRAFT)).config
    made = plan.draft.config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "vocab_size", "num_target_layers", "target_layer_ids", "block_size", "shift_label", "head",
                 "draft_vocab_size", "max_position_embeddings", "rope_theta"):  # fmt: skip
        assert getattr(made, name) == getattr(demo, name), name
    assert plan.weights // 4 == pytest.approx(134.5e6 + sizes(plan.draft) + (49152 + 8192) * 576, rel=1e-3)


def test_a_pair_is_made_and_fits():
    before = torch.random.get_rng_state()
    plan = plan_pair(find_shape("tiny", draft_vocab_size=100), device="cpu")
    target, draft = make_pair(plan)
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert (target.num_layers, target.hidden_size, target.vocab_size, target.max_length) == (4, 32, 512, 2048)
    assert shape_mismatch(draft.config, target.hidden_size, target.vocab_size, target.num_layers) is None
    assert draft.config.logits_size == 100 and draft.packed == target.packed
    (generation,) = tiny.run(target, make_drafter("domino", draft, requests=1, device=CPU), [[1, 2, 3]], 6)
    assert len(generation.token_ids) == 6


def test_a_pair_is_made_in_its_type():
    target, draft = make_pair(plan_pair(SHAPES["tiny"], torch.bfloat16, "cpu"))
    assert target.dtype == draft.dtype == torch.bfloat16
    assert all(module.inv_freq.dtype == torch.float32 for module in draft.modules() if hasattr(module, "inv_freq"))


def test_no_weight_of_the_head_is_zero():
    """A correction of zeros would be a multiplication that hardware may not need to do."""
    _, draft = make_pair(plan_pair(SHAPES["tiny"], device="cpu"))
    assert all(bool((weight != 0).any()) for weight in draft.head.parameters())


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_configuration_of_transformers_is_a_shape(tmp_path, as_directory):
    tiny.tiny_model("qwen2", num_hidden_layers=12).config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path if as_directory else tmp_path / "config.json"))
    plan = plan_pair(shape, device="cpu")
    assert plan.config.model_type == "qwen2" and plan.draft.config.num_target_layers == 12
    assert plan.draft.config.num_hidden_layers == 5 and plan.draft.config.head.gru_hidden_dim == 1024


def test_what_is_no_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown shape 'qwen3-9b': give qwen3-8b, smollm2-135m, tiny, or "):
        find_shape("qwen3-9b")
    path = tmp_path / "config.json"
    for values, message in (
        ([], "no model_type"),
        ({"hidden_size": 4}, "no model_type"),
        ({"model_type": "none-such"}, "none-such"),
        ({"model_type": "qwen3", "num_hidden_layers": 2}, "too shallow"),
        ({"model_type": "vit"}, "shape .*config.json"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            plan_pair(find_shape(str(path)), device="cpu")
    path.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        find_shape(str(path))
    with pytest.raises(UserError, match="draft_vocab_size must be between 1 and 512"):
        plan_pair(find_shape("tiny", draft_vocab_size=513), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="PyTorch sees no CUDA device"):
        plan_pair(SHAPES["tiny"], device="cuda")


def test_more_than_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 2_000_000_000)
    check_memory(2_000_000_000, CPU, "this")
    with pytest.raises(UserError, match=r"this takes 2\.1 GB, and cpu has 2\.0 GB free: choose"):
        check_memory(2_100_000_000, CPU, "this")
    monkeypatch.setattr(shapes, "free_memory", lambda device: None)
    check_memory(1 << 60, CPU, "this")


def test_free_memory_is_what_this_machine_has():
    free = free_memory(CPU)
    assert free is None or 0 < free < 1 << 50
