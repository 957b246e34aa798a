"""Code that lies in a checkpoint never runs, whatever stands on standard input, and nothing is asked there."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest
import torch

from domino_spec.files import WEIGHTS_FILE, load_tensors
from tests.cli_fixtures import (  # noqa: F401
    make_draft_dir,
    make_target_dir,
    run,
    write_prompts,
    write_recipe,
)

UNKNOWN = {"model_type": "payload", "architectures": ["Payload"]}
MAP = {
    "AutoConfig": "payload.Config",
    "AutoModel": "payload.Model",
    "AutoModelForCausalLM": "payload.Model",
    "AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"],
    "AutoProcessor": "payload.Processor",
}
SPOILED = {
    "a configuration of an unknown family": {"config.json": {**UNKNOWN, "auto_map": MAP}},
    "a configuration of a known family": {"config.json": {"auto_map": MAP}},
    "a tokenizer of an unknown class": {"tokenizer_config.json": {"tokenizer_class": "Payload", "auto_map": MAP}},
    "a tokenizer of a known class": {"tokenizer_config.json": {"auto_map": MAP}},
    "a processor": {
        "processor_config.json": {"processor_class": "Payload", "auto_map": MAP},
        "preprocessor_config.json": {"processor_class": "Payload", "auto_map": MAP},
    },
    "a generation configuration": {"generation_config.json": {"custom_generate": "payload", "auto_map": MAP}},
}


def plant(directory, marker, files) -> None:
    """Put a module into a checkpoint that leaves a mark when it is imported, and name it in these files."""
    payload = f"open({str(marker)!r}, 'w').close()\n"
    (directory / "payload.py").write_text(payload)
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(payload)
    for name, values in files.items():
        path = directory / name
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**held, **values}))


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Whatever is asked on standard input; the answer is yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": questions.append(prompt) or "y")
    return questions


def commands(target, draft, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml", target, prompts="p.jsonl", responses=str(tmp_path / "answers.jsonl")
    )
    return [
        ("generate", "-", "--target", target, "--max-new-tokens", 2, "--method", "none"),
        ("generate", "w3", "--target", target, "--draft", draft, "--max-new-tokens", 2),
        ("inspect", draft, "--target", target),
        ("serve", "--check", "--target", target, "--draft", draft, "--capacity", 64, "--prefix-cache", 0),
        ("train", recipe, "--dry-run"),
        ("regenerate", recipe),
        ("train", recipe, "--out", tmp_path / "run"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("where", ["target", "draft"])
def test_a_payload_never_runs(tmp_path, target_dir, draft_dir, asked, spoiled, where):
    places = {"target": target_dir, "draft": draft_dir}
    copy = shutil.copytree(places[where], tmp_path / where)
    marker = tmp_path / "it ran"
    plant(copy, marker, SPOILED[spoiled])
    places[where] = copy
    for command in commands(places["target"], places["draft"], tmp_path):
        result = run(*command, input="y\ny\ny\n")
        assert not marker.exists() and not asked, command
        assert result.exit_code in (0, 2)
        if result.exit_code:
            assert len(result.stderr.splitlines()) == 1
            assert "trust_remote_code" not in result.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_the_refusal_says_that_code_is_never_run_and_what_to_do(tmp_path, target_dir, name):
    copy = shutil.copytree(target_dir, tmp_path / "target")
    files = {"config.json": UNKNOWN, "tokenizer_config.json": {"tokenizer_class": "Payload"}}
    plant(copy, tmp_path / "it ran", {name: {**files[name], "auto_map": MAP}})
    result = run("generate", "w3", "--target", copy, input="y\n")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "code from a checkpoint is never run; give a model" in result.stderr and str(copy) in result.stderr


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, marker) -> None:
        self._marker = marker

    def __reduce__(self):
        return open, (str(self._marker), "w")


@pytest.mark.parametrize("named_by", ["nothing", "the index", "config.json"])
def test_pickled_weights_are_never_loaded(tmp_path, target_dir, named_by):
    copy = shutil.copytree(target_dir, tmp_path / "target")
    tensors, _ = load_tensors(copy / WEIGHTS_FILE)
    torch.save({**tensors, "payload": Payload(tmp_path / "it ran")}, copy / "pytorch_model.bin")
    (copy / WEIGHTS_FILE).unlink()
    if named_by == "the index":
        index = {"weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    if named_by == "config.json":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "transformers_weights": "pytorch_model.bin"}))
    for command in ("generate", "w3", "--target", copy), ("serve", "--check", "--target", copy):
        result = run(*command)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "safetensors" in result.stderr
    assert not (tmp_path / "it ran").exists()
