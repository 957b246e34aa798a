"""A finished run becomes a draft for other tools, and a picture for its author."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from domino_spec import load_draft, load_target
from domino_spec.draft.checkpoint import read_draft, save_draft
from domino_spec.draft.load import check_fit, describe_draft
from domino_spec.files import load_tensors, save_tensors
from domino_spec.settings import UserError
from domino_spec.training.export import export_draft
from domino_spec.training.integrity import tensors_checksum
from domino_spec.training.report import plot_training
from domino_spec.training.run import run_training
from domino_spec.training.watch import last_metrics
from tests.tiny import tiny_draft


@pytest.fixture(scope="module")
def run_directory(setup, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run_training(setup.recipe(), out, device="cpu")
    return out


def test_bfloat16_export_is_what_the_run_saved(run_directory, tmp_path):
    export_draft(run_directory, tmp_path, torch.bfloat16)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (run_directory / "draft" / file).read_bytes()


def test_float32_export_holds_the_master_weights(run_directory, tmp_path, setup):
    draft = export_draft(run_directory, tmp_path, torch.float32)
    state, _ = load_tensors(run_directory / "state.safetensors")
    assert draft.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    for name, parameter in draft.named_parameters():
        scale = state["feature_scale"] if name == "backbone.fc.weight" else 1
        assert torch.equal(parameter, state[f"weight/{name}"] * scale), name
    load_draft(tmp_path, load_target(setup.target, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_draft_that_is_not_of_the_last_state_is_not_exported(run_directory, tmp_path, dtype):
    other = tmp_path / "run"
    shutil.copytree(run_directory, other)
    tensors, metadata = load_tensors(other / "state.safetensors")
    name = next(n for n in tensors if n.startswith("weight/head"))
    tensors[name] = tensors[name] + 1
    facts = {name: metadata[name] for name in ("step", "recipe")}
    save_tensors(tensors, other / "state.safetensors", {**facts, "checksum": tensors_checksum(tensors, facts)})
    with pytest.raises(UserError, match="is not the state that"):
        export_draft(other, tmp_path / "out", dtype)


def test_what_is_not_a_run_is_refused(run_directory, tmp_path):
    with pytest.raises(UserError, match="holds no trained draft"):
        export_draft(tmp_path, tmp_path / "out", torch.bfloat16)
    with pytest.raises(UserError, match="choose another directory"):
        export_draft(run_directory, run_directory / "draft", torch.bfloat16)


@pytest.mark.parametrize("published", [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}])
def test_another_model_is_not_overwritten(run_directory, tmp_path, published):
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(UserError, match=r"holds another model, which the draft would overwrite.*choose another dir"):
        export_draft(run_directory, tmp_path, torch.bfloat16)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == published


def test_a_draft_is_overwritten_by_another(run_directory, tmp_path):
    export_draft(run_directory, tmp_path, torch.float32)
    assert export_draft(run_directory, tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_a_description_counts_every_parameter(run_directory):
    draft = read_draft(run_directory / "draft")
    description = describe_draft(run_directory / "draft")
    assert description.method == "domino" and description.dtypes == ("bfloat16",)
    assert description.parameters["total"] == sum(p.numel() for p in draft.parameters())
    assert description.parameters["gru"] == 3 * 8 * (32 + 8)
    assert description.parameters["w1"] == 4 * (32 + 8) and description.parameters["w2"] == 40 * 4
    assert description.file_bytes == (run_directory / "draft" / "model.safetensors").stat().st_size


def test_fit_compares_shape_and_weights(run_directory, setup, tmp_path):
    from tests.tiny import tiny_model, word_tokenizer

    config = read_draft(run_directory / "draft").config
    assert check_fit(config, "mine", str(setup.target)).fits
    for name, model in (("tuned", tiny_model(seed=8)), ("wide", tiny_model(hidden_size=48))):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    tuned, wide = (check_fit(config, "mine", str(tmp_path / name)) for name in ("tuned", "wide"))
    assert not tuned.fits and "fingerprint" in tuned.sentence
    assert not wide.fits and "hidden size 32, the target has 48" in wide.sentence


def test_a_run_is_drawn_from_its_metrics(run_directory, tmp_path):
    plot_training(run_directory / "metrics.jsonl", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    latest = last_metrics(run_directory / "metrics.jsonl")
    assert latest["step"] == 12 and latest["tau"] >= 1 and "final_loss" in latest


@pytest.mark.parametrize("lines", [[], ['{"step": 1, "base_loss": 2.0, "final_loss": 2.0, "lambda_base": 1.0}']])
def test_a_run_that_has_hardly_begun_can_be_drawn(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + '{"step": 2, "ba')
    plot_training(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0


def test_a_draft_that_others_would_misread_is_refused_or_named(tmp_path, target, caplog):
    """Readers of DFlash drafts know neither shifted labels without a head nor our tap of the last layer."""
    save_draft(tiny_draft(target, head=False), tmp_path / "shifted" / "draft")
    with pytest.raises(UserError, match="has no head and shift_label true: readers of DFlash drafts"):
        export_draft(tmp_path / "shifted", tmp_path / "out", torch.bfloat16)
    assert not (tmp_path / "out").exists()
    for taps, warnings in (((0, 2), 0), ((0, 3), 1)):
        run = tmp_path / f"run{warnings}"
        save_draft(tiny_draft(target, taps=taps), run / "draft")
        export_draft(run, tmp_path / "out", torch.bfloat16)
        assert caplog.text.count("readers that do not know that key read it after the norm") == warnings
