"""Keys of a draft's `config.json`: what changes a draft is honoured or refused by name, and nothing is guessed."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from domino_spec.cli.show import draft_lines, draft_record
from domino_spec.draft.checkpoint import parse_config, read_draft, save_draft
from domino_spec.draft.load import describe_draft, load_draft, save_any_draft
from domino_spec.draft.schema import unknown_keys
from domino_spec.draft.single_layer_checkpoint import parse_single_layer, save_single_layer
from domino_spec.settings import UserError
from tests.draft import test_checkpoint as block
from tests.draft import test_single_layer_checkpoint as pair
from tests.tiny import random_prompts, run, tiny_draft, tiny_single_layer, tiny_target


def refused(parse, config: dict) -> str:
    with pytest.raises(UserError) as error:
        parse(config, "config.json")
    message = str(error.value)
    assert message.startswith("config.json") and message.count("config.json") == 1 and "\n" not in message
    return message


def nested(**changes) -> dict:
    """A Domino draft's configuration with changes inside `dflash_config`; None leaves a key out."""
    config = block.published_json()
    config["dflash_config"] = {k: v for k, v in {**config["dflash_config"], **changes}.items() if v is not None}
    return config


# What is missing and has no one meaning.


@pytest.mark.parametrize(
    "key", ["target_layer_ids", "mask_token_id", "shift_label", "pure_draft_prefix_len", "emb_dim", "gru_hidden_dim"]
)
def test_what_a_domino_draft_must_say_is_never_guessed(key):
    assert f"missing key '{key}'" in refused(parse_config, nested(**{key: None}))


def test_a_draft_without_a_head_has_dflashs_labels():
    assert parse_config(block.published_json(head=False)).shift_label is False


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "linear", "factor": 2.0}])
def test_the_base_of_a_block_drafts_rope_must_be_stated(rope):
    message = refused(parse_config, block.published_json(rope_theta=None, rope_parameters=rope))
    assert "missing key 'rope_theta'" in message


# RoPE.


@pytest.mark.parametrize(
    "changes, theta, scaling",
    [
        ({}, 1e6, None),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 2e6}, "sliding_attention": {}}},
            2e6,
            None,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e6, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}, 1e6, None),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, 1e6, None),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}}, 1e6, None),
        ({"rope_scaling": {"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1}}, 1e6, None),
        ({"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 64}}, 1e6, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 64}},
            1e6,
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True, "partial_rotary_factor": 1.0}},
            1e6,
            {"rope_type": "yarn", "factor": 2.0},
        ),
    ],
)
def test_rope_is_read_wherever_a_file_states_it(changes, theta, scaling):
    config = parse_config(block.published_json(**changes))
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def without(name: str) -> dict:
    return {key: value for key, value in LLAMA3.items() if key != name}


@pytest.mark.parametrize("parse, published", [(parse_config, block), (parse_single_layer, pair)], ids=["block", "pair"])
@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_type": "yarn"}, "rope_scaling: missing key 'factor', which rope_type yarn needs"),
        ({"rope_type": "linear"}, "missing key 'factor'"),
        *[(without(name), f"missing key '{name}'") for name in LLAMA3 if name != "rope_type"],
        (LLAMA3 | {"factor": "8"}, "rope_scaling.factor: expected number, found '8' (str)"),
        (LLAMA3 | {"factor": 0}, "rope_scaling.factor: expected greater than 0, found 0"),
        (LLAMA3 | {"factor": math.nan}, "rope_scaling.factor: expected finite number, found nan"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor 1.0 must be below high_freq_factor 1.0"),
        (LLAMA3 | {"beta_fast": 3.0}, "rope_type llama3 has no key 'beta_fast'"),
        (LLAMA3 | {"spin": 3.0}, "rope_scaling: unknown key 'spin'"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40}, "beta_slow 40.0 must be below beta_fast 32"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported in a draft: its angles depend"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported in a draft: its angles depend"),
        ({"type": "longrope", "short_factor": [1]}, "'longrope' is not supported in a draft: its angles depend"),
        (LLAMA3 | {"long_factor": [1.0, 2.0]}, "rope_type llama3 has no key 'long_factor'"),
        ({"rope_type": ["yarn"]}, "rope_scaling.rope_type: expected string, found ['yarn'] (list)"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "rope_type and type differ"),
        ({"rope_type": "linear", "type": "mrope", "factor": 2.0}, "rope_type and type differ"),
        ({"rope_type": "default", "factor": 2.0}, "factor: expected 1, since rope_type default does not scale"),
        ({"type": "mrope", "factor": 2.0}, "factor: expected 1, since rope_type default does not scale"),
        ({"type": "yarn", "factor": 2.0, "attn_factor": 1.5}, "rope_scaling: unknown key 'attn_factor'"),
        ({"type": "yarn", "factor": 2.0, "extrapolation_factor": 2.0}, "unknown key 'extrapolation_factor'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected"),
        ({"sliding_attention": {"rope_theta": 1e4}}, "expected settings of full_attention, found those of sliding_"),
        ([1], "rope_scaling: expected mapping, found [1] (list)"),
        ("yarn", "rope_scaling: expected mapping, found 'yarn' (str)"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}, "rope_theta is 7.0, but rope_scaling.rope_theta"),
    ],
)
def test_a_rope_that_is_not_understood_is_one_line(parse, published, rope, message):
    config = published.published_json(rope_scaling=rope, rope_theta=7.0)
    assert message in refused(parse, config)


def test_two_ropes_that_differ_are_refused():
    config = block.published_json(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"})
    assert "rope_parameters and rope_scaling differ" in refused(parse_config, config)
    parse_config(block.published_json(rope_scaling=LLAMA3, rope_parameters=LLAMA3))


@pytest.mark.parametrize(
    "scaling, parameters",
    [
        (LLAMA3, LLAMA3 | {"rope_theta": 1e6}),
        (LLAMA3 | {"rope_theta": 1e6}, LLAMA3 | {"rope_theta": 1000000, "beta_fast": None}),
        (LLAMA3 | {"factor": 8}, {"full_attention": LLAMA3 | {"rope_theta": 1e6}, "sliding_attention": {}}),
        (LLAMA3, {"rope_type": None}),
    ],
)
def test_two_ropes_that_say_the_same_are_one(scaling, parameters):
    for first, second in ((scaling, parameters), (parameters, scaling)):
        config = parse_config(block.published_json(rope_scaling=first, rope_parameters=second))
        assert (config.rope_theta, config.rope_scaling) == (1e6, LLAMA3)


def test_two_ropes_must_agree_on_the_base():
    ropes = {"rope_parameters": LLAMA3 | {"rope_theta": 1e6}, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}}
    message = refused(parse_config, block.published_json(rope_theta=None, **ropes))
    assert "rope_parameters.rope_theta is 1000000.0, but rope_scaling.rope_theta is 500000.0" in message
    assert "rope_theta is 1000000, but rope_scaling" in refused(parse_config, block.published_json(**ropes))


# Keys that change what is computed.


@pytest.mark.parametrize(
    "key, value, neutral",
    [
        ("is_causal", True, False),
        ("final_logit_softcapping", 30.0, None),
        ("attn_logit_softcapping", 50.0, None),
        ("output_multiplier", 0.5, 1.0),
        ("embedding_multiplier", 12.0, 1),
        ("residual_multiplier", 0.22, 1.0),
        ("logits_scaling", 8.0, 1.0),
        ("logit_scale", 0.06, 1.0),
        ("partial_rotary_factor", 0.5, 1.0),
        ("attention_bias", True, False),
        ("mlp_bias", True, False),
        ("hidden_act", "gelu", "silu"),
        ("layer_types", ["sliding_attention", "full_attention"], ["full_attention", "full_attention"]),
        ("query_pre_attn_scalar", 256, block.HEAD_DIM),
        ("norm_eps", 1e-5, None),
        ("use_qk_norm", False, True),
        ("quantization_config", {"bits": 4}, None),
        ("model_type", "gemma3_text", "qwen3"),
    ],
)
def test_a_key_that_matters_is_refused_unless_it_changes_nothing(key, value, neutral):
    message = refused(parse_config, block.published_json(**{key: value}))
    assert f"config.json: {key}: expected " in message
    plain = parse_config(block.published_json(**{key: neutral}))
    assert plain.published[key] == neutral
    if key in ("is_causal", "output_multiplier"):
        assert f"dflash_config: {key}: expected" in refused(parse_config, nested(**{key: value}))


EXPERTS = {"num_experts": 128, "num_local_experts": 8, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def test_expert_keys_are_kept_unread_where_layers_have_no_experts():
    parsed = parse_config(block.published_json(**EXPERTS))
    assert replace(parsed, published={}) == replace(parse_config(block.published_json()), published={})
    assert parsed.published["num_experts"] == 128
    assert unknown_keys(parsed.published) == ["dflash_config.a_key_of_tomorrow"]
    layer = pair.published_json("speculators")
    layer["transformer_layer_config"] |= EXPERTS
    assert parse_single_layer(layer).intermediate_size == pair.INTERMEDIATE
    assert unknown_keys(layer) == ["a_key_of_tomorrow"]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_draft_whose_layers_have_experts_is_refused(family):
    message = refused(parse_config, block.published_json(model_type=family, **EXPERTS))
    assert "model_type: expected qwen3 or" in message and f"found '{family}', whose layers differ" in message


def test_what_is_neutral_depends_on_the_kind_of_draft():
    assert parse_single_layer(pair.published_json(is_causal=True)).kind == "eagle3"
    assert "is_causal: expected true, found False" in refused(parse_single_layer, pair.published_json(is_causal=False))
    layer = pair.published_json("speculators")
    layer["transformer_layer_config"]["mlp_bias"] = True
    assert "transformer_layer_config: mlp_bias: expected false" in refused(parse_single_layer, layer)


def test_keys_that_are_not_known_are_named_and_the_harmless_ones_are_not():
    assert unknown_keys(block.published_json()) == ["dflash_config.a_key_of_tomorrow"]
    assert unknown_keys(pair.published_json("dart")) == ["a_key_of_tomorrow"]
    assert unknown_keys(pair.published_json("speculators", a_key_of_tomorrow=None)) == []


def test_keys_that_name_other_layers_are_refused():
    name = "eagle_aux_hidden_state_layer_ids"
    agreeing = pair.published_json(**{name: [2, 18, 33], "target_layer_ids": [1, 17, 32]})
    assert parse_single_layer(agreeing).target_layer_ids == (1, 17, 32)
    config = pair.published_json(**{name: [2, 18, 33], "eagle_config": {name: [2, 18, 33]}})
    assert "those of [1, 17, 32]" in refused(parse_single_layer, config)


@pytest.mark.parametrize("ids", [None, []])
def test_an_eagle_draft_that_lists_no_layers_follows_the_published_rule(tmp_path, ids):
    name = "eagle_aux_hidden_state_layer_ids"
    for config in (pair.published_json(**{name: ids}), pair.published_json(eagle_config={name: ids})):
        assert parse_single_layer(config) == replace(parse_single_layer(pair.published_json()), published=config)
    pair.write(tmp_path, config, pair.published_tensors())
    assert load_draft(tmp_path, tiny_target(num_hidden_layers=8)).feature_layers == (1, 3, 4)
    other = {name: [2, 18, 33], "eagle_config": {name: ids}}
    assert parse_single_layer(pair.published_json(**other)).target_layer_ids == (1, 17, 32)


# Types and sizes.


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("num_hidden_layers", 2**31, "num_hidden_layers: expected less than or equal to 256, found 2147483648 (int)"),
        ("hidden_size", 2**40, "hidden_size: expected less than or equal to 1048576"),
        ("block_size", 10**9, "block_size: expected less than or equal to 1024"),
        ("vocab_size", 2**63, "vocab_size: expected integer of at most 64 bits"),
        ("vocab_size", -1, "vocab_size: expected greater than or equal to 1, found -1 (int)"),
        ("head_dim", 7, "head_dim: expected a multiple of 2, found 7 (int)"),
        ("num_attention_heads", 4.0, "num_attention_heads: expected integer, found 4.0 (float)"),
        ("num_key_value_heads", 0, "num_key_value_heads: expected greater than or equal to 1"),
        ("rms_norm_eps", math.inf, "rms_norm_eps: expected finite number"),
        ("rms_norm_eps", True, "rms_norm_eps: expected number, found True (bool)"),
        ("architectures", 3, "is not a DFlash or Domino draft (architectures 3)"),
        ("rope_theta", "1e6", "rope_theta: expected number, found '1e6' (str)"),
        ("layer_types", "full", "layer_types: expected list, found 'full' (str)"),
    ],
)
def test_a_wrong_type_or_size_is_one_line(key, value, message):
    assert message in refused(parse_config, block.published_json(**{key: value}))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("shift_label", 1, "dflash_config.shift_label: expected true or false, found 1 (int)"),
        ("target_layer_ids", [0, "3"], "dflash_config.target_layer_ids[1]: expected integer, found '3' (str)"),
        ("target_layer_ids", [True], "dflash_config.target_layer_ids[0]: expected integer, found True (bool)"),
        ("target_layer_ids", [], "dflash_config.target_layer_ids: "),
        ("target_layer_ids", [3, 3], "dflash_config.target_layer_ids: expected each only once, found [3, 3]"),
        ("last_layer_tap", "raw", "dflash_config.last_layer_tap: expected 'before_norm' or 'after_norm', found 'raw'"),
        ("emb_dim", 10**12, "dflash_config.emb_dim: expected less than or equal to 1048576"),
    ],
)
def test_a_wrong_type_inside_dflash_config_is_one_line(key, value, message):
    assert message in refused(parse_config, nested(**{key: value}))


# Tensors.


@pytest.fixture
def saved(tmp_path, target) -> Path:
    save_draft(tiny_draft(target, draft_vocab_ids=torch.tensor([1, 4, 9, 30])), tmp_path)
    return tmp_path


def change_tensors(directory: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, **changes}, directory / "model.safetensors")


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([1, 4, 4, 30]), "expected ascending tokens, found 4 before 4"),
        (torch.tensor([1, 9, 4, 30]), "expected ascending tokens, found 9 before 4"),
        (torch.tensor([1, 4, 9, 60]), "expected tokens from 0 to 59, found 60"),
        (torch.tensor([-1, 4, 9, 30]), "expected tokens from 0 to 59, found -1"),
        (torch.tensor([1.0, 4, 9, 30]), r"expected int64 \[4\] \(draft_vocab_size\), found float32 \[4\]"),
        (torch.tensor([1, 4, 9, 30], dtype=torch.int32), r"found int32 \[4\]"),
        (torch.tensor([True, False, True, True]), r"found bool \[4\]"),
        (torch.tensor([[1, 4], [9, 30]]), r"found int64 \[2, 2\]"),
        (torch.tensor([1, 4, 9]), r"found int64 \[3\]"),
    ],
)
@pytest.mark.parametrize("outline", [False, True], ids=["read", "outlined"])
def test_a_draft_vocabulary_is_so_many_different_tokens_of_the_target(saved, ids, message, outline):
    change_tensors(saved, draft_vocab_ids=ids)
    with pytest.raises(UserError, match=f"model.safetensors: tensor draft_vocab_ids: .*{message}"):
        read_draft(saved, outline=outline)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_with_a_point_are_refused(saved, dtype):
    change_tensors(saved, **{"fc.weight": torch.ones(32, 64).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"tensor fc.weight: expected floating point of 16 bits or more, found {name}"):
        read_draft(saved)


def test_tensors_of_experts_are_refused(saved):
    change_tensors(saved, **{"layers.0.mlp.experts.0.gate_proj.weight": torch.ones(4, 32)})
    with pytest.raises(UserError, match=r"unexpected tensor layers\.0\.mlp\.experts\.0"):
        read_draft(saved)


def test_a_tensor_that_is_there_twice_is_refused(saved):
    change_tensors(saved, **{"logit_head.embed_proj.0.weight": torch.ones(6, 44)})
    with pytest.raises(UserError, match=r"the head is there twice, with logit_head. and without"):
        read_draft(saved)
    tensors = load_file(saved / "model.safetensors")
    del tensors["logit_head.embed_proj.0.weight"]
    (saved / "model.safetensors").unlink()
    for name in ("a", "b"):
        save_file(tensors, saved / f"{name}.safetensors")
    weight_map = {"weight_map": {"fc.weight": "a.safetensors", "norm.weight": "b.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    with pytest.raises(UserError, match=r"b.safetensors: tensor draft_vocab_ids is in another file, too"):
        read_draft(saved)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(saved, target, wrong):
    weight = load_file(saved / "model.safetensors")["fc.weight"]
    weight[3, 5] = wrong
    change_tensors(saved, **{"fc.weight": weight})
    with pytest.raises(UserError, match=r"tensor backbone.fc.weight holds values that are not finite in float32"):
        load_draft(saved, target)


def test_weights_that_float16_cannot_hold_are_refused(saved, target):
    change_tensors(saved, **{"fc.weight": torch.full((32, 64), 1e5)})
    with pytest.raises(UserError, match="not finite in float16"):
        load_draft(saved, target, dtype=torch.float16)


@pytest.mark.parametrize("make", [tiny_draft, tiny_single_layer], ids=["domino", "eagle3"])
def test_a_draft_that_overflows_in_float16_is_named(tmp_path, make, caplog):
    half = tiny_target()
    half.model.half()
    draft = make(half)
    fc = draft.backbone.fc if make is tiny_draft else draft.fc
    save_any_draft(draft, tmp_path / "good")
    load_draft(tmp_path / "good", half)
    assert not caplog.records
    with torch.no_grad():
        fc.weight.mul_(1e4)
    save_any_draft(draft, tmp_path / "large")
    load_draft(tmp_path / "large", half)
    assert "overflows in float16" in caplog.text


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "weight_map: expected a mapping of tensors to files, found null"),
        ([], "expected an object"),
        ({"weight_map": ["a"]}, r"weight_map: expected .*, found \['a'\] \(list\)"),
        ({"weight_map": {"fc.weight": None}}, "weight_map: expected"),
        ({"weight_map": {"fc.weight": "model-1.safetensors"}}, "model-1.safetensors does not exist"),
    ],
)
def test_an_index_that_names_no_files_is_one_line(saved, index, message):
    (saved / "model.safetensors").rename(saved / "elsewhere.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        read_draft(saved)


# The tap of the target's last layer.


@pytest.mark.parametrize(
    "changes, normed",
    [
        ({}, True),  # as the released code reads hidden_states[N]
        ({"target_fingerprint": "c73004c06fb2cbcb"}, False),  # made here before the key was there
        ({"target_fingerprint": "c73004c06fb2cbcb", "last_layer_tap": "after_norm"}, True),
        ({"last_layer_tap": "before_norm"}, False),
        ({"last_layer_tap": "after_norm", "target_layer_ids": [0, 2]}, False),  # not the last layer
    ],
)
def test_the_file_says_on_which_side_of_the_norm_the_last_layer_is_read(changes, normed):
    assert parse_config(nested(**changes)).last_tap_normed == normed


@pytest.mark.parametrize("normed, name", [(True, "after_norm"), (False, "before_norm")])
def test_a_draft_made_here_says_how_it_reads_the_last_layer(tmp_path, target, normed, name):
    draft = tiny_draft(target, last_tap_normed=normed)
    save_draft(draft, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dflash_config"]["last_layer_tap"] == name
    description = describe_draft(tmp_path)
    assert description.config.last_tap_normed == normed
    assert draft_record("x", description, None)["last_layer_tap"] == name
    reads = next(line for line in draft_lines("x", description, None) if line.startswith("reads"))
    assert reads.endswith(f"layers 0, 3 of 4, the last {name.split('_')[0]} its final norm")


def test_an_older_draft_made_here_says_it_once_it_is_saved_again(tmp_path, target):
    save_draft(tiny_draft(target), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    older = copy.deepcopy(config)
    del older["dflash_config"]["last_layer_tap"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    save_draft(read_draft(tmp_path), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


@pytest.mark.parametrize("packed", [False, True], ids=["as loaded", "packed"])
def test_decoding_norms_the_last_layer_of_drafts_that_read_it_so(packed):
    """Handed the normed features, a draft without the setting drafts the same."""
    from domino_spec.drafters.block import BlockDrafter

    target = tiny_target()
    normed, plain = tiny_draft(target, last_tap_normed=True), tiny_draft(target)
    norm, read = target.decoder.norm, plain.read_features
    plain.read_features = lambda f: torch.cat((read(f)[..., :32], norm(f[..., 32:].contiguous())), dim=-1)
    if packed:
        target.pack()
        normed = normed.bind(target)
    seen: dict[int, list] = {}
    for key, draft in enumerate((normed, plain)):
        drafter = BlockDrafter(draft)
        original = drafter.propose
        drafter.propose = lambda *a, key=key, original=original: (
            seen.setdefault(key, []).append(original(*a)) or (seen[key][-1])
        )
        run(target, drafter, random_prompts([6, 9]), 6)
    assert [p.tokens.tolist() for p in seen[0]] == [p.tokens.tolist() for p in seen[1]]


def test_an_eagle_draft_that_names_the_last_layer_must_say_which_side(tmp_path):
    config = pair.published_json(target_layer_ids=[0, 1, 7])
    pair.write(tmp_path, config, pair.published_tensors())
    with pytest.raises(UserError, match="does not say whether before the final norm or after it"):
        load_draft(tmp_path, tiny_target(num_hidden_layers=8))


def test_engines_refuse_a_last_layer_that_they_cannot_hand_over():
    from domino_spec.engines.sglang.install import check_settings
    from domino_spec.engines.vllm.served import read_settings

    published = nested()
    asked = SimpleNamespace()
    with pytest.raises(UserError, match="after its final norm, which SGLang does not hand over"):
        check_settings(asked, parse_config(published))
    draft = SimpleNamespace(model="x", hf_config=SimpleNamespace(to_dict=lambda: published))
    spec = SimpleNamespace(draft_model_config=draft, num_speculative_tokens=3)
    with pytest.raises(UserError, match="after its final norm, which vLLM does not hand over"):
        read_settings(SimpleNamespace(speculative_config=spec, model_config=None))


# What others would make of it.


def test_a_draft_that_others_would_read_one_slot_late_is_not_exported(target):
    with pytest.raises(UserError, match="run/draft has no head and shift_label true"):
        tiny_draft(target, head=False, taps=(0, 2)).config.check_readers("run/draft")
    tiny_draft(target, head=False, shift_label=False, taps=(0, 2)).config.check_readers("run/draft")
    tiny_draft(target, taps=(0, 2)).config.check_readers("run/draft")


@pytest.mark.parametrize("last, warned", [(2, False), (3, True)])
def test_an_export_that_others_read_after_the_norm_says_so(target, caplog, last, warned):
    tiny_draft(target, taps=(0, last)).config.check_readers("run/draft")
    assert ("readers that do not know that key read it after the norm" in caplog.text) == warned


def test_an_eagle3_export_keeps_the_released_code_reading_the_targets_embedding(tmp_path, target):
    """The released EAGLE takes `target_hidden_size` for a sign that the draft has an embedding of its own."""
    save_single_layer(tiny_single_layer(target), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "target_hidden_size" not in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"target_hidden_size": 32}))  # as the first ones had it
    save_any_draft(load_draft(tmp_path, target), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
