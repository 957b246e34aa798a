"""A target known from its files alone is the one that loading them gives."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.outline import outline_target
from tests import tiny


def saved(tmp_path, model, **options):
    """A model directory with a tokenizer."""
    model.save_pretrained(tmp_path / "target", **options)
    tiny.word_tokenizer().save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_outline_is_the_target_without_its_values(tmp_path, kind):
    directory = saved(tmp_path, tiny.tiny_model(kind))
    outline, target = outline_target(directory), load_target(directory, pack=False)
    theirs = outline.target
    assert theirs.fingerprint == target.fingerprint
    assert (theirs.hidden_size, theirs.vocab_size, theirs.num_layers) == (
        target.hidden_size,
        target.vocab_size,
        target.num_layers,
    )
    assert theirs.device.type == "meta" and theirs.dtype == torch.float32
    assert outline.parameters == sum(p.numel() for p in target.model.parameters())
    assert theirs.new_cache(3, 10).keys.shape == target.new_cache(3, 10).keys.shape


def test_stored_type_and_bytes_come_from_the_headers(tmp_path):
    model = tiny.tiny_model().to(torch.bfloat16)
    outline = outline_target(saved(tmp_path, model))
    assert outline.target.dtype == torch.bfloat16
    assert outline.weight_bytes == 2 * sum(p.numel() for p in model.state_dict().values())
    assert outline.quantization is None and outline.architecture == "LlamaForCausalLM"


def test_weights_in_several_files_have_the_same_fingerprint(tmp_path):
    directory = saved(tmp_path, tiny.tiny_model(), max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert outline_target(directory).target.fingerprint == load_target(directory, pack=False).fingerprint


def test_one_changed_weight_changes_the_fingerprint(tmp_path):
    directory = saved(tmp_path, tiny.tiny_model())
    before = outline_target(directory).target.fingerprint
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert outline_target(directory).target.fingerprint not in (before, "")


def test_tensors_that_are_stored_otherwise_leave_the_fingerprint_unknown(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = Qwen3MoeConfig(**sizes, intermediate_size=24, moe_intermediate_size=8, num_experts=4, head_dim=8)
    outline = outline_target(saved(tmp_path, Qwen3MoeForCausalLM(config)))
    assert outline.target.fingerprint == ""
    assert outline.parameters > 0


def test_what_cannot_be_a_target_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        outline_target(tmp_path / "nowhere")
    directory = saved(tmp_path, tiny.tiny_model())
    (directory / "model.safetensors").write_bytes(b"\x20\x00")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        outline_target(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors weights"):
        outline_target(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=str(directory)):
        outline_target(directory)
