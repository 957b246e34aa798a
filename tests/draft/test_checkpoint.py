"""Published checkpoints load and save unchanged; what is broken or foreign is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from domino_spec.draft.checkpoint import read_config, read_draft, save_draft
from domino_spec.draft.load import draft_directory, load_draft
from domino_spec.files import load_tensors
from domino_spec.settings import UserError
from tests.tiny import VOCAB, random_prompts, tiny_draft

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, GRU, RANK, TAPS = 2, 32, 4, 2, 8, 40, 12, 6, 2
HEAD_NAMES = ("prefix_gru.weight_ih_l0", "prefix_gru.weight_hh_l0", "embed_proj.0.weight", "embed_proj.2.weight")


def published_json(head: bool = True, **changes) -> dict:
    """A config.json by hand in the published layout (docs/design.md, section 4), with keys unknown to this package."""
    nested = {"mask_token_id": 59, "target_layer_ids": [0, 3]}
    if head:
        nested |= {
            "projector_type": "domino",
            "emb_dim": RANK,
            "gru_hidden_dim": GRU,
            "pure_draft_prefix_len": 1,
            "shift_label": True,
        }
    return {
        "architectures": ["DominoDraftModel" if head else "DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "block_size": 5,
        "num_target_layers": 4,
        "dflash_config": nested | {"a_key_of_tomorrow": [1, 2]},
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        "layer_types": ["full_attention"] * LAYERS,
        "sliding_window": None,
        "use_sliding_window": False,
        "transformers_version": "4.57.0",
        **changes,
    }


def published_tensors(head: bool = True, head_prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict:
    """Tensors under their published names."""
    shapes = {
        "fc.weight": (HIDDEN, TAPS * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
    }
    for n in range(LAYERS):
        shapes |= {
            f"layers.{n}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"layers.{n}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"layers.{n}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"layers.{n}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"layers.{n}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"layers.{n}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"layers.{n}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"layers.{n}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"layers.{n}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"layers.{n}.input_layernorm.weight": (HIDDEN,),
            f"layers.{n}.post_attention_layernorm.weight": (HIDDEN,),
        }
    if head:
        head_shapes = ((3 * GRU, HIDDEN), (3 * GRU, GRU), (RANK, HIDDEN + GRU), (VOCAB, RANK))
        shapes |= {head_prefix + name: shape for name, shape in zip(HEAD_NAMES, head_shapes, strict=True)}
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(directory: Path, config: dict, tensors: dict | None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def assert_same_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("head", [True, False], ids=["domino", "dflash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_published_checkpoint_survives_a_round_trip(tmp_path, head, dtype):
    config, tensors = published_json(head), published_tensors(head, dtype=dtype)
    draft = read_draft(write(tmp_path / "published", config, tensors))
    assert draft.dtype == dtype
    save_draft(draft, tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), tensors)
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config


def test_an_older_checkpoint_keeps_its_nested_head_names(tmp_path):
    tensors = published_tensors(head_prefix="logit_head.")
    draft = read_draft(write(tmp_path / "published", published_json(), tensors))
    assert torch.equal(draft.head.correction_weight, tensors["logit_head.embed_proj.2.weight"])
    save_draft(draft, tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), tensors)


def test_mixed_dtypes_are_kept(tmp_path):
    tensors = published_tensors()
    tensors["norm.weight"] = tensors["norm.weight"].float()
    save_draft(read_draft(write(tmp_path / "published", published_json(), tensors)), tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), tensors)


def test_settings_of_the_published_layout_are_understood(tmp_path):
    config = read_config(write(tmp_path, published_json(), None))
    assert (config.block_size, config.shift_label, config.max_drafts, config.first_draft_slot) == (5, True, 5, 0)
    assert (config.head.gru_hidden_dim, config.head.low_rank, config.head.pure_draft_prefix_len) == (GRU, RANK, 1)
    assert (config.target_layer_ids, config.mask_token_id, config.rope_theta) == ((0, 3), 59, 1e6)
    plain = read_config(write(tmp_path, published_json(head=False), None))
    assert (plain.shift_label, plain.max_drafts, plain.first_draft_slot, plain.head) == (False, 4, 1, None)


def test_taps_that_are_left_out_are_never_guessed(tmp_path):
    """The rule of the released code is wrong for most published drafts, and a wrong guess accepts nothing."""
    config = published_json(head=False, num_target_layers=36, num_hidden_layers=5)
    del config["dflash_config"]["target_layer_ids"]
    del config["layer_types"]
    with pytest.raises(UserError, match="missing key 'target_layer_ids' of dflash_config; add the target's layers"):
        read_config(write(tmp_path, config, None))


@pytest.mark.parametrize("key, value", [("target_layer_ids", [0, 3]), ("mask_token_id", 59), ("shift_label", True)])
def test_keys_that_some_files_hold_at_the_top_are_read_there(tmp_path, key, value):
    config = published_json(head=False)
    config["dflash_config"].pop(key, None)
    config[key] = value
    read = getattr(read_config(write(tmp_path, config, None)), key)
    assert (list(read) if key == "target_layer_ids" else read) == value
    config["dflash_config"][key] = [1, 3] if key == "target_layer_ids" else 7
    with pytest.raises(UserError, match=f"{key}: found .* here, but it is read in dflash_config, where it is .*(7|3)"):
        read_config(write(tmp_path, config, None))


@pytest.mark.parametrize("key, value", [("rope_theta", 5e5), ("sliding_window", 64), ("block_size", 7)])
def test_keys_in_an_object_where_nobody_reads_them_are_refused(tmp_path, key, value):
    config = published_json(head=False)
    config["dflash_config"][key] = value
    with pytest.raises(UserError, match=f"dflash_config: {key}: found .* here, but it is read beside dflash_config"):
        read_config(write(tmp_path, config, None))


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path):
    tensors = published_tensors()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    write(tmp_path, published_json(), None)
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_draft(read_draft(tmp_path), tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), tensors)


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 9, 30])], ids=["full", "subset"])
@pytest.mark.parametrize("shift_label", [True, False])
def test_a_draft_made_here_loads_as_it_was(tmp_path, target, vocabulary, shift_label):
    draft = tiny_draft(target, shift_label=shift_label, prefix=2, draft_vocab_ids=vocabulary)
    save_draft(draft, tmp_path)
    again = load_draft(tmp_path, target)
    assert again.config == draft.config
    assert_same_tensors(dict(again.state_dict()), dict(draft.state_dict()))
    save_draft(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_the_head_is_in_the_saved_checkpoint(tmp_path, target):
    draft = tiny_draft(target)
    save_draft(draft, tmp_path, dtype=torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in draft.head.state_dict().items():
        assert torch.equal(saved[name], tensor.bfloat16())
    nested = json.loads((tmp_path / "config.json").read_text())["dflash_config"]
    head = draft.config.head
    forwarded = (nested["projector_type"], nested["emb_dim"], nested["gru_hidden_dim"], nested["pure_draft_prefix_len"])
    assert forwarded == ("domino", head.low_rank, head.gru_hidden_dim, head.pure_draft_prefix_len)
    assert (nested["shift_label"], nested["mask_token_id"]) == (draft.config.shift_label, draft.config.mask_token_id)


@torch.inference_mode()
def test_a_loaded_draft_computes_what_the_saved_one_did(tmp_path, target):
    from domino_spec.drafters.block import BlockDrafter
    from tests.tiny import run

    draft = tiny_draft(target)
    save_draft(draft, tmp_path)
    prompts = random_prompts([6, 9])

    def proposals(d):
        drafter, seen = BlockDrafter(d), []
        original = drafter.propose
        drafter.propose = lambda *a: seen.append(original(*a)) or seen[-1]
        run(target, drafter, prompts, 6)
        return [p.tokens.tolist() for p in seen]

    assert proposals(load_draft(tmp_path, target)) == proposals(draft)


# What cannot be used is refused, in one line that names the place.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "not a DFlash or Domino draft"),
        ({"dflash_config": None}, "not a DFlash or Domino draft"),
        ({"hidden_size": None}, "missing key 'hidden_size'"),
        ({"num_target_layers": None}, "missing key 'num_target_layers'"),
        ({"block_size": 1}, "block_size must be at least 2, got 1"),
        (
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types: expected full_attention alone, found 'sliding_attention'",
        ),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window: expected null, found 4096"),
        ({"attention_bias": True}, "attention_bias: expected false, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected .silu. or .swish., found 'gelu'"),
        ({"num_target_layers": 3}, "target_layer_ids holds 3"),
        ({"vocab_size": 10}, "mask_token_id 59 is outside"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read_config(write(tmp_path, published_json(**changes), None))
    assert "\n" not in str(error.value)


def test_an_unknown_projector_is_refused(tmp_path):
    config = published_json()
    config["dflash_config"]["projector_type"] = "waterfall"
    with pytest.raises(UserError, match="projector_type: expected domino or null, found 'waterfall'"):
        read_config(write(tmp_path, config, None))


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("fc.weight"), "tensor fc.weight is missing"),
        (without("prefix_gru.weight_hh_l0"), "tensor prefix_gru.weight_hh_l0 is missing"),
        (lambda t: t | {"embed_proj.2.weight": torch.zeros(3, 3)}, "embed_proj.2.weight has shape"),
        (lambda t: t | {"layers.7.norm.weight": torch.zeros(3)}, "unexpected tensor layers.7.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_refused(tmp_path, change, message):
    write(tmp_path, published_json(), change(published_tensors()))
    with pytest.raises(UserError, match=message):
        read_draft(tmp_path)


def test_a_draft_vocabulary_needs_both_its_size_and_its_ids(tmp_path):
    write(tmp_path, published_json(), published_tensors() | {"draft_vocab_ids": torch.arange(4)})
    with pytest.raises(UserError, match="draft_vocab_size and the tensor draft_vocab_ids"):
        read_draft(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, 2000])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    write(tmp_path, published_json(), published_tensors())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_draft(tmp_path)


def test_a_pickle_is_never_loaded(tmp_path):
    write(tmp_path, published_json(), None)
    torch.save(published_tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle checkpoint"):
        read_draft(tmp_path)


def test_directories_that_are_not_drafts_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        draft_directory(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config.json"):
        read_draft(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(UserError, match="not valid JSON"):
        read_draft(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_draft(tmp_path)
    write(tmp_path, published_json(), None)
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        read_draft(tmp_path)


def test_saving_is_plain_safetensors_without_code(tmp_path, target):
    save_draft(tiny_draft(target), tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    _, metadata = load_tensors(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_is_honoured_under_its_old_and_new_names(tmp_path, key, place):
    scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    scaled = read_draft(write(tmp_path / "scaled", published_json() | {place: scaling}, published_tensors()))
    plain = read_draft(write(tmp_path / "plain", published_json(), published_tensors()))
    positions = torch.tensor([[2000]])
    assert not torch.allclose(scaled.backbone.rotary(positions).cos, plain.backbone.rotary(positions).cos, atol=1e-2)
    save_draft(scaled, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[place] == scaling


def test_a_rope_that_is_unknown_is_refused(tmp_path):
    config = published_json(rope_scaling={"rope_type": "spiral", "factor": 2.0})
    with pytest.raises(UserError, match="spiral"):
        read_draft(write(tmp_path, config, published_tensors()))
