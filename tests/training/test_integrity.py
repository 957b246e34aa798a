"""What is damaged, doubled or cut is noticed, and said in one line that names the file and what to do."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from domino_spec.files import load_tensors, save_tensors
from domino_spec.recipe import HeadRecipe
from domino_spec.settings import UserError
from domino_spec.training import run as run_module
from domino_spec.training.integrity import only_writer, tensors_checksum
from domino_spec.training.report import write_report
from domino_spec.training.run import run_training
from tests.cli_fixtures import fail, make_target_dir, write_prompts, write_recipe  # noqa: F401
from tests.training.test_run import assert_same_run, changed

STATE = "state.safetensors"


@pytest.fixture(autouse=True)
def _interrupts():
    """Ctrl-C raises here too where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(setup, tmp_path_factory) -> Path:
    """A run of twelve steps that is over."""
    out = tmp_path_factory.mktemp("finished")
    run_training(setup.recipe(), out, device="cpu")
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def resume(setup, run: Path, **options) -> None:
    run_training(setup.recipe(), run, device="cpu", **options)


def refusal(setup, run: Path) -> str:
    """The one line that ends the attempt to resume."""
    with pytest.raises(UserError) as error:
        resume(setup, run)
    line = str(error.value)
    assert "\n" not in line
    return line


# States


@pytest.mark.slow
def test_one_flipped_bit_anywhere_in_a_state_is_noticed(setup, run):
    """In the header, where safetensors or our checks see it, and in every tensor, where the checksum does."""
    path = run / STATE
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    data = range(header, len(whole), (len(whole) - header) // 12)
    for position in (8, header // 3, header // 2, *data, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        line = refusal(setup, run)
        assert STATE in line or str(run) in line
    path.write_bytes(whole)
    resume(setup, run)


def rewrite(run: Path, change=lambda tensors: None, **facts: str) -> None:
    """Another state in its place, whose checksum is right."""
    tensors, metadata = load_tensors(run / STATE)
    change(tensors)
    kept = {name: metadata[name] for name in ("step", "recipe")} | facts
    kept = {name: value for name, value in kept.items() if value}
    save_tensors(tensors, run / STATE, {**kept, "checksum": tensors_checksum(tensors, kept)})


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("weight/head.input_weight", None, "lacks the tensor weight/"),
        ("exp_avg_sq/backbone.fc.weight", None, "lacks the tensor exp_avg_sq/backbone.fc.weight"),
        ("step/backbone.fc.weight", None, "lacks the tensor step/backbone.fc.weight"),
        ("draft_vocab_ids", None, "lacks the tensor draft_vocab_ids"),
        ("feature_scale", None, "lacks the tensor feature_scale"),
        ("weight/backbone.fc.weight", lambda t: t.bfloat16(), "is torch.bfloat16 [32, 64], expected torch.float32"),
        ("weight/backbone.fc.weight", lambda t: t[:, :3], "is torch.float32 [32, 3], expected torch.float32 [32, 64]"),
        ("exp_avg/backbone.fc.weight", lambda t: t[None], "tensor exp_avg/backbone.fc.weight is"),
        ("draft_vocab_ids", lambda t: t.float(), "tensor draft_vocab_ids is torch.float32"),
        ("weight/other", lambda t: torch.ones(2), "holds the unexpected tensor weight/other"),
    ],
)
def test_a_state_without_what_it_needs_is_refused_by_name(setup, run, name, change, message):
    def alter(tensors):
        found = name if name in tensors else next((n for n in tensors if n.startswith(name.split(".")[0])), None)
        if change is None:
            del tensors[found]
        else:
            tensors[name] = change(tensors.get(name)).contiguous()

    rewrite(run, alter)
    line = refusal(setup, run)
    assert message in line and str(run / STATE) in line and "remove it to train from the start" in line


@pytest.mark.parametrize("step", ["", "13", "-1", "x", "1.0", "9" * 5000, "\u0663"])
def test_a_step_that_is_none_of_the_recipes_is_refused(setup, run, step):
    rewrite(run, step=step)
    line = refusal(setup, run)
    assert "expected a number up to 12" in line and len(line) < 600


def test_a_state_of_an_earlier_version_is_resumed_with_a_warning(setup, run, caplog):
    tensors, metadata = load_tensors(run / STATE)
    save_tensors(tensors, run / STATE, {name: metadata[name] for name in ("step", "recipe")})
    resume(setup, run)
    assert [r.levelname for r in caplog.records if "has no checksum" in r.getMessage()] == ["WARNING"]


def test_a_damaged_draft_is_written_again_from_the_state(setup, run, finished):
    content = bytearray((run / "draft" / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (run / "draft" / "model.safetensors").write_bytes(content)
    resume(setup, run)
    assert_same_run(run, finished)


def test_weights_belong_to_the_scale_of_features_that_they_were_trained_with(setup, run, finished):
    """Features captured anew may round otherwise; a resumed run keeps the scale of its state."""
    rewrite(run, lambda tensors: tensors["feature_scale"].mul_(2))
    resume(setup, run)
    tensors, _ = load_tensors(finished / STATE)
    expected = (tensors["weight/backbone.fc.weight"] * tensors["feature_scale"] * 2).bfloat16()
    assert torch.equal(load_tensors(run / "draft" / "model.safetensors")[0]["fc.weight"], expected)


# Ctrl-C


@pytest.mark.parametrize("signals", [1, 2])
def test_a_step_that_is_cut_in_its_middle_is_not_saved(setup, tmp_path, finished, monkeypatch, caplog, signals):
    """Twice Ctrl-C while the optimizer has written some of the weights: a state of neither step."""
    original, steps = torch.optim.AdamW.step, 0

    def interrupted_step(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == 7:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
            with torch.no_grad():
                self.param_groups[0]["params"][0].sub_(1.0)
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted_step)
    recipe = setup.recipe()
    with pytest.raises(KeyboardInterrupt):
        run_training(recipe, tmp_path, device="cpu")
    if signals == 1:
        assert load_tensors(tmp_path / STATE)[1]["step"] == "7", "the step in progress is finished and saved"
    else:
        assert not (tmp_path / STATE).exists() and "cut in the middle of a step" in caplog.text
    monkeypatch.undo()
    run_training(recipe, tmp_path, device="cpu")
    if signals == 2:  # one Ctrl-C moves a weight by rounding here
        assert_same_run(tmp_path, finished)


# Other files of a run


def test_a_cut_metrics_file_is_mended_and_said(setup, run, finished, caplog):
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-30])
    resume(setup, run)
    assert path.read_text() == whole[: whole.rstrip("\n").rindex("\n") + 1]
    (said,) = [r for r in caplog.records if "metrics.jsonl" in r.getMessage()]
    assert said.levelname == "WARNING" and "ended in the middle of a line" in said.getMessage()
    write_report(run)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "line 1: expected an object"),
        ('{"step": "3"}', "line 1: key 'step' must be int"),
        ('{"step": 3, "base_loss": "x", "final_loss": 1}', "line 1: key 'base_loss' must hold numbers"),
        ('{"step": 3, "base_loss": NaN, "final_loss": 1}', "line 1: key 'base_loss' must hold numbers"),
        ('{"step": 3, "base_loss": 1}', "line 1: key 'final_loss' is missing"),
        ('{"step": 3, "tau": [1], "tau_head_off": 1, "acceptance": []}', "line 1: key 'tau' must not be a list"),
        ('{"step": 3, "tau": 1, "tau_head_off": 1, "acceptance": 2}', "line 1: key 'acceptance' must be a list"),
    ],
)
def test_metrics_that_no_run_writes_are_one_line(setup, run, line, message):
    (run / "metrics.jsonl").write_text(line + "\n")
    found = refusal(setup, run)
    assert message in found and "remove what is wrong, or the file" in found
    with pytest.raises(UserError, match="remove what is wrong"):
        write_report(run)


@pytest.mark.parametrize("name", ["state.safetensors", "metrics.jsonl", "recipe.yaml"])
def test_a_directory_in_place_of_a_file_is_one_line(setup, run, name):
    (run / name).unlink()
    (run / name).mkdir()
    assert name in refusal(setup, run)


@pytest.mark.parametrize("name", ["tensorboard", "features", "draft"])
def test_a_file_in_place_of_a_directory_is_one_line(setup, run, name):
    shutil.rmtree(run / name)
    (run / name).write_text("")
    assert name in refusal(setup, run)


def test_out_and_features_must_be_directories(setup, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"--out .*/file is a file: give a directory"):
        run_training(setup.recipe(), file, device="cpu")
    with pytest.raises(UserError, match=r"cannot write to .*/file/run: Not a directory"):
        run_training(setup.recipe(), file / "run", device="cpu")
    with pytest.raises(UserError, match=r"--features .*/file is a file: give a directory"):
        run_training(setup.recipe(), tmp_path / "run", device="cpu", features=file)
    for options in (dict(out=tmp_path / ("x" * 300)), dict(out=tmp_path / "run", features=tmp_path / ("x" * 300))):
        with pytest.raises(UserError, match=r"cannot write to .*/x+: File name too long"):
            run_training(setup.recipe(), **options, device="cpu")


@pytest.mark.parametrize("content", ["[]", "3", '{"id": 3}', "{}"])
def test_a_tracker_id_that_is_none_is_one_line(setup, tmp_path, monkeypatch, content):
    monkeypatch.setitem(sys.modules, "trackio", types.ModuleType("trackio"))
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(UserError, match=r"trackers.json does not hold the id of a run: remove it"):
        run_training(setup.recipe(trackers=("trackio",)), tmp_path, device="cpu")


# The feature cache


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "holds no settings of a feature cache"),
        ('{"layers": "0, 3"}', "holds no settings of a feature cache"),
        ('{"layers": [0, 3.0]}', "holds no settings of a feature cache"),
        ('{"layers": [[]]}', "holds no settings of a feature cache"),
        ('{"layers": [0, 3]}', "was made with other settings"),
        ("{", "not valid JSON"),
    ],
)
def test_settings_of_features_that_are_none_are_one_line(setup, run, content, message):
    (run / "features" / "settings.json").write_text(content)
    assert message in refusal(setup, run)


@pytest.mark.parametrize("name", ["shard-x.safetensors", "shard-1.safetensors", "shard--0001.safetensors"])
def test_a_file_that_is_named_like_a_shard_is_one_line(setup, run, name):
    shutil.copy(run / "features" / "shard-00000.safetensors", run / "features" / name)
    assert f"{name} has not the name of a shard" in refusal(setup, run)


def shard_with(run: Path, change) -> str:
    path = run / "features" / "shard-00000.safetensors"
    tensors, metadata = load_tensors(path)
    table = json.loads(metadata["sequences"])
    change(tensors, metadata, table)
    if metadata.get("sequences"):
        metadata["sequences"] = json.dumps(table)
    save_tensors(tensors, path, metadata)
    return path.name


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata, table: tensors.update(features=tensors["features"].half()),
        lambda tensors, metadata, table: tensors.update(features=tensors["features"][:, :5].contiguous()),
        lambda tensors, metadata, table: tensors.update(features=tensors["features"].flatten()),
        lambda tensors, metadata, table: tensors.update(other=tensors.pop("features")),
        lambda tensors, metadata, table: metadata.update(settings="another"),
        lambda tensors, metadata, table: metadata.pop("sequences"),
        lambda tensors, metadata, table: table.append(3),
        lambda tensors, metadata, table: table[0].__setitem__(1, 0.0),
        lambda tensors, metadata, table: table[0].__setitem__(2, 10**9),
        lambda tensors, metadata, table: [row.__setitem__(4, "x") for row in table],
    ],
    ids=["type", "width", "one dimension", "name", "settings", "no table", "table", "start", "end", "checksum"],
)
def test_a_shard_that_is_none_is_one_line(setup, run, change):
    name = shard_with(run, change)
    line = refusal(setup, run)
    assert f"{name} is damaged (" in line and "what it held is captured again" in line


def test_a_layer_that_settings_wrongly_claim_is_noticed(setup, run):
    """Layers 0 and 3 were captured; a flipped bit calls them 1 and 3, and a recipe that wants those finds a cache."""
    path = run / "features" / "settings.json"
    path.write_text(path.read_text().replace("0,", "1,"))
    shutil.rmtree(run / "draft")
    (run / STATE).unlink()
    with pytest.raises(UserError, match="captured with other settings"):
        run_training(changed(setup.recipe(), draft=dict(target_layer_ids=(1, 3))), run, device="cpu")


# One writer


def test_a_second_run_in_a_directory_is_refused(setup, run):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    with only_writer(run, run / ".lock", ""):
        assert f"{run} is in use by another process" in refusal(setup, run)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()) == before
    resume(setup, run)


def test_two_recipes_that_are_started_together_do_not_share_a_directory(setup, tmp_path):
    """The second one begins while the first one trains."""
    refused = []

    def start_another(result):
        if result.step == 2:
            with pytest.raises(UserError, match="in use by another process: wait until it ends, or choose another"):
                run_training(setup.recipe(seed=1), tmp_path, device="cpu")
            refused.append(result.step)

    run_training(setup.recipe(), tmp_path, device="cpu", on_step=start_another)
    assert refused == [2]


def test_answers_are_written_by_one_process(tmp_path, target_dir):
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 3), tmp_path / "answers.jsonl"
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts))
    with only_writer(out, tmp_path / ".answers.jsonl.lock", ""):
        line = fail("regenerate", recipe, "--out", out)
    assert f"{out} is in use by another process: wait until it ends, or choose another --out" in line
    assert not out.exists()


def test_a_lock_that_the_file_system_does_not_have_is_said(tmp_path, monkeypatch, caplog):
    def acquire(self, timeout=None):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("domino_spec.training.integrity.FileLock.acquire", acquire)
    with caplog.at_level(logging.WARNING), only_writer(tmp_path, tmp_path / ".lock", ""):
        pass
    assert "has no locks" in caplog.text


# Before anything is loaded


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(draft=dict(init_layers_from_target=(9,))), "draft.init_layers_from_target holds 9"),
        (dict(draft=dict(target_layer_ids=(0, 4))), "target_layer_ids holds 4"),
        (dict(training=dict(block_schedule=(2, 5))), "training.block_schedule holds 5"),
        (dict(draft=dict(head=HeadRecipe(65_536, 65_536))), "parameters: weights, gradients and optimizer take"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_the_target_is_loaded(setup, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(run_module, "load_target", lambda *a, **o: pytest.fail("the target is loaded"))
    monkeypatch.setattr(run_module, "free_memory", lambda device: 100_000_000_000)
    with pytest.raises(UserError, match=message):
        run_training(changed(setup.recipe(), **changes), tmp_path, device="cpu")


def test_a_batch_of_more_than_the_data_is_refused(setup, tmp_path):
    with pytest.raises(UserError, match=r"training.batch_size is 18, but there are only 16 sequences to train on"):
        run_training(setup.recipe(batch_size=18), tmp_path, device="cpu")
