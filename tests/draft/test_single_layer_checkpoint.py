"""Published EAGLE-3 and DART checkpoints load and save unchanged; what is broken or foreign is refused in one line."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from domino_spec.cli.show import draft_lines, draft_record
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import check_fit, describe_draft, load_draft, read_any_draft
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.draft.single_layer_checkpoint import parse_single_layer, read_single_layer, save_single_layer
from domino_spec.settings import UserError
from tests.tiny import VOCAB, tiny_model, tiny_single_layer, tiny_target, word_tokenizer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4, 2, 16, 40
IDS = [2, 5, 6, 30, 31, 57]


def published_json(kind: str = "eagle3", **changes) -> dict:
    """A config.json by hand in a published layout, with keys that this package does not know."""
    layer = {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "pretraining_tp": 1,
    }
    if kind == "speculators":
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer,
            "norm_before_residual": False,
            "target_hidden_size": None,
            "speculators_config": {"algorithm": "eagle3"},
        }
    else:
        config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **layer}
    config |= {"draft_vocab_size": len(IDS), "a_key_of_tomorrow": [1, {"x": 2}]}
    config |= {"draft_length": 3} if kind == "dart" else {}
    return {key: value for key, value in {**config, **changes}.items() if value != "left out"}


def published_tensors(kind: str = "eagle3", dtype: torch.dtype = torch.bfloat16, ids: list[int] | None = None) -> dict:
    """Tensors under their published names."""
    ids = IDS if ids is None else ids
    layer = "layers.0" if kind == "speculators" else "midlayer"
    shapes = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (len(ids), HIDDEN),
        f"{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        f"{layer}.hidden_norm.weight": (HIDDEN,),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
    }
    if kind == "dart":
        shapes["midlayer.mask_rep"] = (2 * HIDDEN,)
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["d2t"] = torch.tensor([token - i for i, token in enumerate(ids)])
    tensors["t2d"] = torch.tensor([token in ids for token in range(VOCAB)])
    return tensors


def write(directory: Path, config: dict, tensors: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def assert_saved_as_published(directory: Path, config: dict, tensors: dict) -> None:
    saved = load_file(directory / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name
    assert json.loads((directory / "config.json").read_text()) == config


def without(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


@pytest.mark.parametrize("kind", ["eagle3", "speculators", "dart"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        without("t2d"),
        lambda t: t | {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN).half()},
        lambda t: t | {"norm.weight": t["norm.weight"].float()},
        lambda t: t | {"d2t": t["d2t"].int(), "t2d": t["t2d"].to(torch.uint8)},
    ],
    ids=["as trained", "no t2d", "own embedding", "mixed dtypes", "other integers"],
)
def test_a_published_checkpoint_survives_a_round_trip(tmp_path, kind, change):
    config, tensors = published_json(kind), change(published_tensors(kind))
    draft = read_any_draft(write(tmp_path / "published", config, tensors))
    assert isinstance(draft, SingleLayerDraft)
    assert draft.config.kind == ("dart" if kind == "dart" else "eagle3")
    save_single_layer(draft, tmp_path / "ours")
    assert_saved_as_published(tmp_path / "ours", config, tensors)


def test_a_draft_over_the_whole_vocabulary_needs_no_mapping(tmp_path):
    config = published_json(draft_vocab_size=VOCAB)
    tensors = without("d2t", "t2d")(published_tensors(ids=list(range(VOCAB))))
    draft = read_any_draft(write(tmp_path / "published", config, tensors))
    assert draft.draft_vocab_ids is None and draft.config.logits_size == VOCAB
    save_single_layer(draft, tmp_path / "ours")
    assert_saved_as_published(tmp_path / "ours", config, tensors)


@pytest.mark.parametrize("ids", [IDS, [57, 2, 31, 5, 30, 6]], ids=["ascending", "any order"])
def test_d2t_holds_offsets_from_the_row_and_not_tokens(tmp_path, ids):
    config, tensors = published_json(), published_tensors(ids=ids)
    draft = read_any_draft(write(tmp_path / "published", config, tensors))
    assert draft.to_token_ids(torch.arange(6)).tolist() == ids
    assert draft.to_choices(torch.tensor(ids)).tolist() == list(range(6))
    assert torch.equal(draft.lm_head.weight[2], tensors["lm_head.weight"][2]), "rows stay where they are"
    save_single_layer(draft, tmp_path / "ours")
    assert_saved_as_published(tmp_path / "ours", config, tensors)


def test_settings_of_the_published_layouts_are_understood():
    eagle = parse_single_layer(published_json())
    assert (eagle.kind, eagle.block_size, eagle.num_masks, eagle.rope_theta) == ("eagle3", 7, 0, 10000.0)
    assert (eagle.target_layer_ids, eagle.num_target_layers, eagle.target_fingerprint) == (None, None, None)
    assert (eagle.head_dim, eagle.rms_norm_eps, eagle.target_hidden_size) == (HEAD_DIM, 1e-5, HIDDEN)
    dart = parse_single_layer(published_json("dart", target_hidden_size=48, rope_theta=1000000))
    assert (dart.kind, dart.num_masks, dart.max_drafts, dart.feature_size) == ("dart", 3, 4, 3 * 48)
    assert dart.rope_theta == 1e6
    nested = parse_single_layer(published_json("speculators"))
    assert replace(nested, published={}) == replace(eagle, published={})


def test_layer_ids_are_read_by_the_convention_of_their_key():
    """vLLM names layers whose inputs are read, SGLang those whose outputs are."""
    name = "eagle_aux_hidden_state_layer_ids"
    assert parse_single_layer(published_json(**{name: [2, 18, 33]})).target_layer_ids == (1, 17, 32)
    assert parse_single_layer(published_json(eagle_config={name: [1, 17, 32]})).target_layer_ids == (1, 17, 32)


def test_a_head_dim_that_is_left_out_is_the_tensors(tmp_path):
    """Hidden size over heads would be 8, and wrong."""
    draft = read_any_draft(write(tmp_path, published_json(head_dim="left out"), published_tensors()))
    assert draft.config.head_dim == HEAD_DIM == 2 * HIDDEN // HEADS


@pytest.mark.parametrize("method", ["eagle3", "dart"])
@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 9, 30])], ids=["full", "subset"])
def test_a_draft_made_here_loads_as_it_was(tmp_path, target, method, vocabulary, caplog):
    draft = tiny_single_layer(target, method, block_size=5, draft_vocab_ids=vocabulary)
    save_single_layer(draft, tmp_path)
    again = load_draft(tmp_path, target)
    assert again.config == draft.config and not caplog.records
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in draft.state_dict().items()
    }
    save_single_layer(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    published = json.loads((tmp_path / "config.json").read_text())
    assert published["draft_vocab_size"] == (VOCAB if vocabulary is None else 4)
    assert published.get("draft_length") == (4 if method == "dart" else None)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("d2t" in saved) == ("t2d" in saved) == (vocabulary is not None)


def test_the_scale_of_features_moves_into_fc(tmp_path, target):
    draft, scale = tiny_single_layer(target), torch.linspace(0.5, 2, 96)
    weight = draft.fc.weight.clone()
    draft.scale_features(scale)
    save_single_layer(draft, tmp_path, torch.float32)
    again = load_draft(tmp_path, target)
    assert torch.equal(again.fc.weight, weight * scale) and again.feature_scale is None
    features = torch.randn(3, 96)
    assert torch.allclose(again.fuse(features), draft.fuse(features), atol=1e-4)


def test_a_packed_draft_is_not_saved(tmp_path, target):
    with pytest.raises(ValueError, match="packed"):
        save_single_layer(tiny_single_layer(target).pack(), tmp_path)


# Joining a target


@pytest.mark.parametrize("method", ["eagle3", "dart"])
def test_a_published_draft_is_joined_to_its_target(tmp_path, method, caplog):
    deep = tiny_target(num_hidden_layers=8)
    write(tmp_path, published_json(method), published_tensors(method))
    with caplog.at_level(logging.WARNING):
        draft = load_draft(tmp_path, deep)
    assert draft.feature_layers == (1, 3, 4) and draft.dtype == deep.dtype
    shapes, keys = (record.getMessage() for record in caplog.records)
    assert "only shapes were checked" in shapes and "no effect: a_key_of_tomorrow;" in keys


@pytest.mark.parametrize(
    "changes, shape, message",
    [
        ({}, dict(hidden_size=48), "hidden size 32, the target has 48"),
        ({}, dict(vocab_size=61), "vocabulary 60, the target has 61"),
        ({}, dict(num_hidden_layers=4), "a target of 4 layers is too shallow"),
        ({"domino_spec": {"num_target_layers": 9}}, {}, "number of target layers 9, the target has 8"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 5, 9]}, {}, "reads layer 8, the target's layers are 0 to 7"),
        ({"domino_spec": {"target_fingerprint": "feedface"}}, {}, "fingerprint feedface"),
    ],
)
def test_another_target_is_refused_naming_both_sides(tmp_path, changes, shape, message):
    other = tiny_target(**{"num_hidden_layers": 8, **shape})
    write(tmp_path, published_json(**changes), published_tensors())
    with pytest.raises(UserError, match=message) as error:
        load_draft(tmp_path, other)
    assert str(tmp_path) in str(error.value) and "tiny" in str(error.value) and "\n" not in str(error.value)


def test_block_drafts_are_still_block_drafts(tmp_path, target):
    from domino_spec.draft.checkpoint import save_draft
    from tests.tiny import tiny_draft

    save_draft(tiny_draft(target), tmp_path)
    assert isinstance(load_draft(tmp_path, target), Draft)


# inspect


def test_inspect_tells_an_eagle3_draft_and_counts_it(tmp_path, target):
    draft = tiny_single_layer(target, draft_vocab_ids=torch.tensor(IDS))
    save_single_layer(draft, tmp_path, torch.bfloat16)
    description = describe_draft(tmp_path)
    total = sum(p.numel() for p in draft.parameters())
    assert description.parameters["fc"] == 3 * HIDDEN * HIDDEN and description.parameters["total"] == total
    assert description.parameters["lm_head"] == len(IDS) * HIDDEN and description.dtypes == ("bfloat16",)
    record = draft_record("x", description, None)
    assert (record["method"], record["num_layers"], record["draft_vocab_size"]) == ("eagle3", 1, 6)
    assert (record["target_layer_ids"], record["mask_token_id"]) == ([0, 1, 3], None)
    text = "\n".join(draft_lines("x", description, None))
    assert "EAGLE-3" in text and "layers 0, 1, 3 of 4" in text and "6 frequent ones" in text


def test_inspect_tells_a_published_dart_draft(tmp_path):
    embedding = {"embed_tokens.weight": torch.zeros(VOCAB, HIDDEN)}
    write(tmp_path, published_json("dart"), published_tensors("dart") | embedding)
    description = describe_draft(tmp_path)
    assert description.parameters["embed_tokens"] == VOCAB * HIDDEN
    text = "\n".join(draft_lines("x", description, None))
    assert "DART" in text and "3 masked positions, 4 levels" in text and "by the published rule" in text
    assert draft_record("x", description, None)["target_layer_ids"] is None


def test_inspect_compares_with_a_target(tmp_path):
    for name, layers in (("target", 8), ("shallow", 4)):
        tiny_model(num_hidden_layers=layers).save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    config = describe_draft(write(tmp_path / "draft", published_json(), published_tensors())).config
    assert check_fit(config, "draft", str(tmp_path / "target")).fits
    fit = check_fit(config, "draft", str(tmp_path / "shallow"))
    assert not fit.fits and "too shallow" in fit.sentence


# What cannot be used is refused, in one line that names the place.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"num_hidden_layers": 5}, "has one layer, num_hidden_layers is 5"),
        ({"norm_before_residual": True}, "norm_before_residual: expected false, found True"),
        ({"norm_before_fc": True}, "norm_before_fc: expected false, found True"),
        ({"attention_bias": True}, "attention_bias: expected false, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected .silu. or .swish., found 'gelu'"),
        ({"sliding_window": 512}, "sliding_window: expected null, found 512"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not supported"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"draft_vocab_size": VOCAB + 1}, "draft_vocab_size must be between 1 and 60"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3]}, "fuses 3 layers"),
        ({"target_layer_ids": [1, 9, 17, 25, 33]}, "DeepSpec"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as error:
        parse_single_layer(published_json(**changes), "there/config.json")
    assert "\n" not in str(error.value) and "there/config.json" in str(error.value)


def test_a_window_that_is_switched_off_does_no_harm():
    assert parse_single_layer(published_json(sliding_window=512, use_sliding_window=False)).kind == "eagle3"


@pytest.mark.parametrize(
    "change, message",
    [
        (without("fc.weight"), "tensor fc.weight is missing"),
        (without("midlayer.hidden_norm.weight"), "tensor midlayer.hidden_norm.weight is missing"),
        (lambda t: t | {"fc.weight": torch.zeros(HIDDEN, 5 * HIDDEN)}, r"fc.weight has shape \(32, 160\)"),
        (lambda t: t | {"embed_tokens.weight": torch.zeros(VOCAB, 8)}, "embed_tokens.weight has shape"),
        (lambda t: t | {"verifier_norm.weight": torch.zeros(3)}, "unexpected tensor verifier_norm.weight"),
        (lambda t: t | {"midlayer.self_attn.q_norm.weight": torch.ones(HEAD_DIM)}, "DeepSpec"),
        (without("d2t", "t2d"), "must come together"),
        (without("d2t"), "must come together"),
        (lambda t: t | {"d2t": torch.tensor(IDS)}, "it must hold offsets, not token ids"),
        (lambda t: t | {"d2t": t["d2t"].float()}, "whole offsets"),
        (lambda t: t | {"d2t": torch.zeros(5, dtype=torch.long)}, "must hold 6 whole offsets"),
        (lambda t: t | {"d2t": torch.tensor([0, -1, 0, 0, 0, 0])}, "the same token twice"),
        (lambda t: t | {"t2d": t["t2d"].roll(1)}, "t2d does not name the tokens that d2t leads to"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    write(tmp_path, published_json(), change(published_tensors()))
    with pytest.raises(UserError, match=message) as error:
        read_single_layer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_head_dim_that_the_tensors_contradict_is_refused_by_name(tmp_path):
    """Hidden size over heads, written into a configuration whose model has wider heads."""
    write(tmp_path, published_json(head_dim=HIDDEN // HEADS), published_tensors())
    with pytest.raises(UserError, match="4 heads of head_dim 8, but q_proj has 64 rows"):
        read_single_layer(tmp_path)


def test_a_pickle_is_never_loaded_and_the_way_out_is_named(tmp_path, monkeypatch):
    write(tmp_path, published_json())
    torch.save(published_tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle checkpoint") as error:
        read_any_draft(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    monkeypatch.chdir(tmp_path)
    exec(message.split('python -c "')[1].removesuffix('"'), {})  # the command in the message does what it says
    assert read_any_draft(tmp_path).config.kind == "eagle3"


def test_an_ordinary_model_is_not_a_draft(tmp_path):
    config = published_json(draft_vocab_size="left out")
    with pytest.raises(UserError, match="ordinary model"):
        read_any_draft(write(tmp_path, config))
