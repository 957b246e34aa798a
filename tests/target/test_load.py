"""Targets come from directories as they were saved; what is not a model is refused in one line."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from domino_spec.cli.group import prepare
from domino_spec.settings import UserError, cache_directory
from domino_spec.target import load
from domino_spec.target.load import load_target, load_target_text, target_config
from domino_spec.target.outline import outline_target
from tests.cli_fixtures import fail, run
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


@pytest.fixture
def copy(directory, tmp_path):
    """A copy of the directory that a test may spoil."""
    return shutil.copytree(directory, tmp_path / "target")


def change(path, **values):
    """Set keys of a file in JSON."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


BAD_VALUES = {
    "hidden_size": ["32", 32.5, None, -1, 2**63, [32], True],
    "num_hidden_layers": [2**31, 10**6, 2**63, 0, "4", 5],
    "num_attention_heads": [0, -4, 3, 2**31, "4"],
    "num_key_value_heads": [0, -2, 2**31, [2]],
    "head_dim": [0, 2**40, 8.0],
    "vocab_size": [0, 2**31, 2**63, "60"],
    "max_position_embeddings": [0, -1, "many", 1.5],
    "layer_types": ["full_attention", ["full_attention"], ["bogus"] * 4, 5, [1, 2, 3, 4]],
    "sliding_window": ["8", -8, 0, 1.5],
    "rope_parameters": [5, {"rope_type": "nope"}, {"rope_type": "yarn", "rope_theta": "x", "factor": 2.0}],
    "rms_norm_eps": ["small", [1e-6]],
    "hidden_act": ["nope", 3],
    "dtype": ["nope", "load", 3, 1.5, ["float32"]],
    "pad_token_id": [2**31, "x"],
    "eos_token_id": ["58", 58.5, -1, [[58]], 60, [58, 60], True],
    "num_labels": [2**31],
    "auto_map": [5, None],
    "quantization_config": [5, [8]],
    "transformers_weights": ["other.safetensors", 5],
    "model_type": ["nope", {}, None],
    "text_config": [{"num_hidden_layers": 2**31}, "", [], 0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_a_bad_value_of_the_configuration_is_one_line_before_anything_is_allocated(copy, monkeypatch, key, value):
    change(copy / "config.json", **{key: value})
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", None)
    for read in (lambda: load_target(copy, device="cpu"), lambda: outline_target(copy)):
        with pytest.raises(UserError) as error:
            read()
        assert "\n" not in str(error.value) and str(error.value).count(str(copy)) == 1
        assert "NoneType' object is not callable" not in str(error.value)


def test_the_line_names_the_key_what_was_found_and_what_is_expected(copy):
    change(copy / "config.json", hidden_size="32")
    with pytest.raises(UserError, match=r"config\.json: hidden_size: expected integer, found '32' \(str\)"):
        load_target(copy)
    change(copy / "config.json", hidden_size=32, num_hidden_layers=2**31)
    with pytest.raises(UserError, match=r"num_hidden_layers: found 2147483648, more than its files can hold"):
        target_config(copy)
    change(copy / "config.json", num_hidden_layers=4, text_config="")
    with pytest.raises(UserError, match=r"config\.json: text_config: expected mapping, found '' \(str\)"):
        target_config(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(dtype=1.5), r"dtype: expected a type such as float32 or bfloat16, found 1\.5 \(float\)"),
        (dict(rope_parameters=7), r"rope_parameters: expected mapping, found 7 \(int\)"),
        (
            dict(rope_parameters={"rope_type": "magic"}),
            r"rope_type: expected one of default, .*, found 'magic' \(str\)",
        ),
    ],
)
def test_a_type_or_rope_that_nobody_knows_is_named(copy, changes, said):
    change(copy / "config.json", **changes)
    for read in (load_target, outline_target):
        with pytest.raises(UserError, match=rf"target .*: config\.json: {said}$"):
            read(copy)


def test_attention_that_cannot_be_exchanged_is_refused_by_family(copy):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    FalconForCausalLM(FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(copy)
    for read in (load_target, outline_target):
        with pytest.raises(UserError, match=r"target .* is not supported: families of type falcon have attention of"):
            read(copy)


@pytest.mark.parametrize("value", ["58", 58.5, -1, [[58]], 60, [58, 60], True])
def test_tokens_that_cannot_end_an_answer_are_refused(copy, value):
    change(copy / "generation_config.json", eos_token_id=value)
    for read in (load_target, load_target_text, outline_target):
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: expected tokens from 0 to 59"):
            read(copy)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("generation_config.json", "[]", r"generation_config\.json: expected an object"),
        ("generation_config.json", "{", r"generation_config\.json is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected an object"),
        ("tokenizer.json", "[]", r"tokenizer\.json: expected an object, found \[\]"),
        ("tokenizer.json", "{}", "cannot read the tokenizer of target"),
        ("tokenizer.json", '{"model": ', r"tokenizer\.json is not valid JSON"),
    ],
)
def test_a_bad_file_beside_the_configuration_is_one_line(copy, file, content, said):
    (copy / file).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        load_target(copy)
    assert "\n" not in str(error.value)
    assert run("serve", "--check", "--target", copy).exit_code == 2


def test_a_quirk_of_a_library_is_no_users_fault(copy, monkeypatch):
    """Only what transformers and tokenizers raise while they read is taken for a bad file."""

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load_target(copy)


def test_verbose_shows_where_an_error_came_from(copy):
    (copy / "tokenizer.json").write_text("{}")
    log = logging.getLogger("domino_spec")
    try:
        shown = run("generate", "w3", "--target", copy, "--verbose")
    finally:
        prepare(verbose=False)
    assert shown.exit_code == 2 and "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("domino-spec: error: cannot read the tokenizer")
    assert not log.isEnabledFor(logging.INFO)
    assert "Traceback" not in fail("generate", "w3", "--target", copy)


def test_a_file_that_is_no_directory_is_not_said_to_be_missing(copy):
    with pytest.raises(UserError, match="is a file: give the directory that it is in"):
        load_target(copy / "model.safetensors")


def test_a_gguf_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMINO_SPEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(UserError, match=r"cannot read target .*model\.gguf") as error:
        load_target(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs accelerate and gguf: pip install accelerate gguf"):
        load_target(tmp_path / "model.gguf")
