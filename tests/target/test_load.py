"""Targets come from directories as they were saved; what is not a model is refused in one line."""

from __future__ import annotations

import pytest
import torch

from domino_spec.config import UserError, cache_directory
from domino_spec.target.load import load_target, target_config
from tests.tiny import VOCAB, random_prompts, tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(eos_token_id=58).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_a_directory_loads_with_its_tokenizer_and_stop_tokens(directory, model):
    target = load_target(directory, device="cpu")
    assert target.dtype == torch.float32
    assert (target.hidden_size, target.vocab_size, target.num_layers) == (32, VOCAB, 4)
    assert target.stop_token_ids == {58}
    assert target.tokenizer("w3 w4")["input_ids"] == [3, 4]
    tokens = torch.tensor(random_prompts([8]))
    hidden = target.forward(tokens, target.new_cache(1, 8)).hidden
    torch.testing.assert_close(target.lm_head(hidden), model(tokens).logits)


def test_the_fingerprint_does_not_depend_on_the_precision_loaded(directory):
    prints = {load_target(directory, dtype=d, device="cpu").fingerprint for d in (torch.float32, torch.bfloat16)}
    assert len(prints) == 1


def test_the_configuration_is_read_without_weights(directory, tmp_path):
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert target_config(tmp_path).hidden_size == 32


def test_a_plain_transformers_generate_still_works_on_the_loaded_model(directory, model):
    """Our attention is installed in the module: ordinary `generate` must get its causal mask."""
    target = load_target(directory, device="cpu")
    tokens = torch.tensor(random_prompts([8]))
    options = dict(attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(target.model.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c"])
def test_a_target_that_does_not_exist_is_one_line(name):
    with pytest.raises(UserError, match="does not exist") as error:
        load_target(name, device="cpu")
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a model directory"):
        load_target(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the configuration of target") as error:
        load_target(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_truncated_weights_are_one_line(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file") as error:
        load_target(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_the_cache_directory_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("DOMINO_SPEC_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


def test_cuda_that_is_not_there_is_refused(directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        load_target(directory, device="cuda")
