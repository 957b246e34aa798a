"""Every weight of a target comes from its files, and nothing in them is left out: else it is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from domino_spec.draft.checkpoint import save_draft
from domino_spec.files import WEIGHTS_FILE
from domino_spec.settings import UserError
from domino_spec.target.load import check_loaded, check_stored, load_target
from domino_spec.target.outline import outline_target
from tests import tiny
from tests.cli_fixtures import fail, new_draft, save_target

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path):
    return save_target(tmp_path / "target")


def edited(directory, edit):
    """The tensors of a directory, put back as `edit` returns them."""
    save_file(edit(load_file(directory / WEIGHTS_FILE)), directory / WEIGHTS_FILE, {"format": "pt"})
    return directory


def refusal(directory, capfd, caplog) -> str:
    """The line with which a target is refused: loaded or outlined alike, and nothing else is said."""
    lines = []
    for read in (lambda: load_target(directory, device="cpu"), lambda: outline_target(directory)):
        with pytest.raises(UserError) as error:
            read()
        lines.append(str(error.value))
    assert lines[0] == lines[1] and "\n" not in lines[0] and lines[0].count(str(directory)) == 1
    captured = capfd.readouterr()
    assert "MISSING" not in captured.out + captured.err + caplog.text
    return lines[0]


def test_one_missing_tensor_is_named(directory, capfd, caplog):
    edited(directory, lambda tensors: {name: t for name, t in tensors.items() if name != NAME})
    assert f"target {directory}: tensor {NAME} is missing" in refusal(directory, capfd, caplog)


def test_of_many_missing_tensors_the_first_is_named_and_all_are_counted(directory, capfd, caplog):
    count = len(load_file(directory / WEIGHTS_FILE))
    edited(directory, lambda tensors: {NAME: tensors[NAME]})
    assert f"{count - 1} tensors are missing, first lm_head.weight" in refusal(directory, capfd, caplog)


def test_a_layer_under_other_names_is_missing_and_has_no_place(directory, capfd, caplog):
    def prefixed(tensors):
        return {("old." if ".layers.2." in name else "") + name: tensor for name, tensor in tensors.items()}

    line = refusal(edited(directory, prefixed), capfd, caplog)
    assert "9 tensors are missing, first model.layers.2." in line
    assert "9 tensors have no place in the model, first old.model.layers.2." in line


def test_a_tensor_of_another_shape_is_named_with_both(directory, capfd, caplog):
    edited(directory, lambda tensors: {**tensors, NAME: tensors[NAME][:5].clone()})
    line = refusal(directory, capfd, caplog)
    assert f"tensor {NAME} has another shape than config.json means ([5, 32], not [48, 32])" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_codes_are_refused_by_name(directory, capfd, caplog, dtype):
    edited(directory, lambda tensors: {**tensors, NAME: tensors[NAME].to(dtype)})
    line = refusal(directory, capfd, caplog)
    assert f"tensor {NAME} is stored as {str(dtype).removeprefix('torch.')}: expected bfloat16, float16" in line


def test_all_weights_that_are_codes_are_counted(directory, tmp_path, capfd, caplog):
    save_draft(new_draft(directory), tmp_path / "draft")
    edited(directory, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    count = len(load_file(directory / WEIGHTS_FILE))
    assert f"{count} tensors are stored as int8 or other codes, first lm_head.weight: expected" in refusal(
        directory, capfd, caplog
    )
    for line in (
        fail("inspect", tmp_path / "draft", "--target", directory),
        fail("serve", "--check", "--target", directory),
    ):
        assert "stored as int8" in line


def test_integers_that_the_model_holds_itself_are_no_weights():
    model = tiny.tiny_model()
    model.register_buffer("positions", torch.arange(4))
    model.to("meta")
    stored = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    check_stored(model, stored, "target a/b")


def test_the_commands_say_the_same(directory, tmp_path):
    edited(directory, lambda tensors: {name: t for name, t in tensors.items() if name != NAME})
    for line in (fail("generate", "w3", "--target", directory), fail("serve", "--check", "--target", directory)):
        assert NAME in line
    assert "It will work" not in line


def test_tied_weights_are_not_missing(tmp_path):
    directory = save_target(tmp_path / "target", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(directory / WEIGHTS_FILE)
    target = load_target(directory, device="cpu", pack=False)
    assert target.lm_head_weight is target.embedding.weight
    outline_target(directory)


def test_what_is_computed_may_lie_in_old_files(directory):
    """Releases of transformers before 4.32 saved these."""
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(directory, lambda tensors: {**tensors, old: torch.ones(4)})
    load_target(directory, device="cpu")
    outline_target(directory)


def test_tensors_that_are_joined_on_loading_count_one_by_one(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = Qwen3MoeConfig(**sizes, intermediate_size=24, moe_intermediate_size=8, num_experts=4, head_dim=8)
    directory = tmp_path / "target"
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    tiny.word_tokenizer().save_pretrained(directory)
    outline_target(directory)
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    edited(directory, lambda tensors: {name: t for name, t in tensors.items() if name != expert})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj is missing"):
        outline_target(directory)


def test_what_transformers_reports_is_enough_where_no_headers_were_read():
    """A target of the hub is loaded before anything is known of its files."""
    none = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    check_loaded(none, "target a/b")
    for found in (
        {**none, "missing_keys": {"x"}},
        {**none, "unexpected_keys": {"x"}},
        {**none, "mismatched_keys": {("x", torch.Size([1]), torch.Size([2]))}},
    ):
        with pytest.raises(UserError, match="target a/b: tensor x "):
            check_loaded(found, "target a/b")
