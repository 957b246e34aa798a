"""A whole run: what it leaves on disk, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from domino_spec import files, load_draft, load_target
from domino_spec.draft.checkpoint import read_draft
from domino_spec.files import load_tensors
from domino_spec.recipe import Recipe, load_recipe
from domino_spec.settings import UserError
from domino_spec.training.loop import recipe_digest
from domino_spec.training.run import run_training
from tests.tiny import assert_close


def changed(recipe: Recipe, **parts: dict) -> Recipe:
    """The recipe with other settings in some of its parts."""
    return dataclasses.replace(
        recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in parts.items()}
    )


def saved_state(out: Path):
    return load_tensors(out / "state.safetensors")


def assert_same_run(out: Path, expected: Path) -> None:
    """Weights, moments, step, the exported draft and every recorded number, bit for bit."""
    (actual, metadata), (tensors, expected_metadata) = saved_state(out), saved_state(expected)
    assert metadata == expected_metadata
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(actual[name], tensor), name
    for file in ("model.safetensors", "config.json"):
        assert (out / "draft" / file).read_bytes() == (expected / "draft" / file).read_bytes()
    assert metrics(out) == metrics(expected)


def metrics(out: Path) -> list[dict]:
    """Rows without wall-clock times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(setup, tmp_path_factory) -> Path:
    """An uninterrupted run of twelve steps, in this process."""
    out = tmp_path_factory.mktemp("finished")
    run_training(setup.recipe(), out, device="cpu")
    return out


def test_a_run_leaves_draft_state_metrics_and_recipe(setup, finished):
    assert saved_state(finished)[1]["step"] == "12"
    rows = metrics(finished)
    assert [r["step"] for r in rows if "final_loss" in r] == list(range(1, 13))
    assert [r["step"] for r in rows if "tau" in r] == [5, 10, 12]
    assert all(1 <= r["tau"] <= 5 and 1 <= r["tau_head_off"] <= 5 for r in rows if "tau" in r)
    assert all(r["candidates"] == 128 and r["candidate_recall"] == 1 for r in rows if "tau" in r), "40 logits in all"
    assert [r["lambda_base"] for r in rows if "final_loss" in r][::11] == [1.0, 0.0]
    assert list((finished / "tensorboard").iterdir())


def test_the_recipe_beside_a_run_is_the_recipe(setup, finished):
    assert load_recipe(finished / "recipe.yaml") == setup.recipe()


def test_the_trained_draft_is_bfloat16_whole_and_fits_its_target(setup, finished):
    target = load_target(setup.target, device="cpu")
    draft = load_draft(finished / "draft", target)
    saved = read_draft(finished / "draft")
    assert saved.dtype == torch.bfloat16
    master, _ = saved_state(finished)
    for name, parameter in saved.named_parameters():
        weight = master[f"weight/{name}"]
        if name == "backbone.fc.weight":
            weight = weight * master["feature_scale"]
        assert torch.equal(parameter, weight.bfloat16()), name
    assert draft.head.correction_weight.any(), "the head was trained and saved"
    assert torch.equal(saved.draft_vocab_ids, master["draft_vocab_ids"])


def test_a_draft_trained_on_shorter_blocks_says_so(setup, finished, tmp_path):
    run_training(changed(setup.recipe(steps=2), training=dict(block_schedule=(2,))), tmp_path, device="cpu")
    assert read_draft(tmp_path / "draft").config.short_blocks and not read_draft(finished / "draft").config.short_blocks


def test_the_loss_falls(setup, tmp_path):
    run_training(setup.recipe(steps=40), tmp_path, device="cpu")
    losses = [r["base_loss"] for r in metrics(tmp_path) if "base_loss" in r]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, dict(objective="kl"), dict(causal_encoder="training_time_test", position_weights="acceptance")],
    ids=["default", "kl", "own tokens and confidence"],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(setup, tmp_path, settings):
    recipe = setup.recipe(**settings, steps=8)
    run_training(recipe, tmp_path / "whole", device="cpu")
    for stop_at in (3, 4, None):

        def interrupt(result, stop_at=stop_at):
            if result.step == stop_at:
                raise KeyboardInterrupt

        if stop_at is None:
            run_training(recipe, tmp_path / "parts", device="cpu")
        else:
            with pytest.raises(KeyboardInterrupt):
                run_training(recipe, tmp_path / "parts", device="cpu", on_step=interrupt)
            assert saved_state(tmp_path / "parts")[1]["step"] == str(stop_at), "Ctrl-C loses nothing"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(setup, finished, tmp_path):
    before = (finished / "state.safetensors").read_bytes()
    steps = []
    run_training(setup.recipe(), finished, device="cpu", on_step=steps.append)
    assert not steps
    assert (finished / "state.safetensors").read_bytes() == before


def test_cadences_may_change_when_resuming_but_nothing_else(setup, finished):
    run_training(setup.recipe(checkpoint_minutes=1.0, eval_every=3, log_every=2), finished, device="cpu")
    for change in (dict(learning_rate=1e-4), dict(seed=1), dict(steps=13), dict(anchors=5)):
        with pytest.raises(UserError, match="another recipe or other data"):
            run_training(setup.recipe(**change), finished, device="cpu")


def test_other_data_is_another_run(setup, finished, tmp_path):
    rows = setup.responses.read_text().splitlines()[:-1]
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows) + "\n")
    fewer = changed(setup.recipe(), data=dict(responses=str(tmp_path / "fewer.jsonl")))
    with pytest.raises(UserError, match="another recipe or other data"):
        run_training(fewer, finished, device="cpu")


def test_the_digest_sees_everything_that_changes_a_number(setup):
    recipe = setup.recipe()
    digests = {recipe_digest(recipe, [], "f"), recipe_digest(recipe, [], "g")}
    for change in (
        dict(position_decay=2.0),
        dict(lambda_base_end=0.1),
        dict(precision="bfloat16"),
        dict(objective="kl"),
        dict(causal_encoder="training_time_test"),
        dict(curriculum="off"),
        dict(position_weights="acceptance"),
        dict(lambda_base_fraction=0.5),
    ):
        digests.add(recipe_digest(setup.recipe(**change), [], "f"))
    digests.add(recipe_digest(changed(recipe, draft=dict(block_size=5)), [], "f"))
    assert len(digests) == 11
    assert recipe_digest(setup.recipe(eval_every=99, log_every=3, checkpoint_minutes=9.0), [], "f") in digests


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(setup, tmp_path, monkeypatch):
    recipe = setup.recipe(steps=8, checkpoint_minutes=0.0)
    run_training(recipe, tmp_path / "whole", device="cpu")
    original, saves = files.save_file, 0

    def filling(tensors, path, metadata):
        nonlocal saves
        if Path(path).name.startswith(".state"):
            saves += 1
            if saves > 3:
                Path(path).write_bytes(b"half a file")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", filling)
    with pytest.raises(UserError, match="No space left on device; what was there before is kept"):
        run_training(recipe, tmp_path / "parts", device="cpu")
    assert saved_state(tmp_path / "parts")[1]["step"] == "3"
    monkeypatch.undo()
    run_training(recipe, tmp_path / "parts", device="cpu")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_state_is_one_line(setup, finished, tmp_path):
    (tmp_path / "state.safetensors").write_bytes((finished / "state.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match=r"state.safetensors is not a readable") as error:
        run_training(setup.recipe(), tmp_path, device="cpu", features=finished / "features")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("features", ["disk", "online"])
def test_an_objective_that_needs_the_target_leaves_the_draft_as_the_recipe_says(setup, tmp_path, features):
    """The last layer is tapped for the loss alone: neither the draft's taps nor its checkpoint know of it."""
    recipe = changed(setup.recipe(objective="kl", steps=4), draft=dict(target_layer_ids=(0, 2)))
    run_training(changed(recipe, data=dict(features=features)), tmp_path / "run", device="cpu")
    draft = load_draft(tmp_path / "run" / "draft", load_target(setup.target, device="cpu"))
    assert draft.config.target_layer_ids == (0, 2)
    assert read_draft(tmp_path / "run" / "draft").backbone.fc.weight.shape == (32, 2 * 32)
    plain = changed(setup.recipe(steps=1), draft=dict(target_layer_ids=(0, 2)))
    run_training(plain, tmp_path / "plain", device="cpu")
    scales = [saved_state(tmp_path / name)[0]["feature_scale"] for name in ("run", "plain")]
    assert_close(*scales)
    assert all(row["tau"] >= 1 for row in metrics(tmp_path / "run") if "tau" in row)


def test_online_features_give_the_same_run_as_stored_ones(setup, finished, tmp_path):
    run_training(changed(setup.recipe(), data=dict(features="online")), tmp_path, device="cpu")
    assert not (tmp_path / "features").exists()
    compared = 0
    for online, stored in zip(metrics(tmp_path), metrics(finished), strict=True):
        for name in ("base_loss", "final_loss", "tau", "tau_head_off"):
            if name in stored:
                # Batches of other lengths round otherwise; twelve steps of Adam magnify that.
                assert online[name] == pytest.approx(stored[name], rel=1e-3), name
                compared += 1
    assert compared == 2 * 12 + 2 * 3


def test_epochs_are_counted_in_the_sequences_that_are_trained_on(setup, tmp_path):
    """Sixteen, as four of the twenty are held out: half of them in steps of four make two steps."""
    run_training(setup.recipe(steps=None, epochs=0.5), tmp_path, device="cpu")
    rows = [row for row in metrics(tmp_path) if "final_loss" in row]
    assert [(row["step"], row["lambda_base"]) for row in rows] == [(1, 1.0), (2, 0.0)]
    assert saved_state(tmp_path)[1]["step"] == "2"


def test_a_block_longer_than_every_held_out_answer_is_refused_at_the_start(setup, tmp_path):
    recipe = changed(setup.recipe(), draft=dict(block_size=64))
    with pytest.raises(UserError, match="no held-out answer is long enough"):
        run_training(recipe, tmp_path, device="cpu")


# A real process, really killed.

STEPS = 60


def start(context, recipe, out: Path):
    process = context.Process(target=run_training, args=(recipe, out), kwargs=dict(device="cpu"))
    process.start()
    return process


def steps_done(out: Path) -> int:
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@pytest.mark.slow
def test_a_run_killed_three_times_equals_an_uninterrupted_one(setup, tmp_path):
    """kill -9 at random steps, with a checkpoint after every step so that some kills meet a save."""
    context = multiprocessing.get_context("forkserver")  # imports once, then forks fresh processes
    context.set_forkserver_preload(["domino_spec.training.run"])
    recipe = setup.recipe(steps=STEPS, checkpoint_minutes=0.0, eval_every=20)
    whole = start(context, recipe, tmp_path / "whole")
    whole.join(300)
    assert whole.exitcode == 0

    out = tmp_path / "killed"
    for kill_at in sorted(random.Random(7).sample(range(5, STEPS - 15), 3)):
        process = start(context, recipe, out)
        deadline = time.monotonic() + 300
        while steps_done(out) < kill_at and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = int(saved_state(out)[1]["step"])
        assert kill_at - 1 <= done < STEPS
    last = start(context, recipe, out)
    last.join(300)
    assert last.exitcode == 0
    assert_same_run(out, tmp_path / "whole")


# Recipes.


def recipe_values(setup) -> dict:
    values = json.loads(json.dumps(dataclasses.asdict(setup.recipe())))
    return values


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("training", "stepps"), 3, r"training: unknown key 'stepps'; known keys are"),
        (("speed",), 3, r"unknown key 'speed'"),
        (("draft", "head", "width"), 3, r"draft.head: unknown key 'width'"),
        (("training", "steps"), "many", r"training.steps: expected integer, found 'many'"),
        (("training", "steps"), True, r"training.steps: expected integer, found True"),
        (("training", "steps"), 2.5, r"training.steps: expected integer, found 2.5"),
        (("training", "learning_rate"), "fast", r"training.learning_rate: expected number, found 'fast'"),
        (("draft", "shift_label"), 1, r"draft.shift_label: expected true or false, found 1"),
        (("draft", "target_layer_ids"), 3, r"draft.target_layer_ids: expected list"),
        (("draft", "target_layer_ids"), [1, "x"], r"draft.target_layer_ids\[1\]: expected int"),
        (("draft", "head"), 3, r"draft.head: expected mapping"),
        (("target",), None, r"target: expected string"),
        (("training", "steps"), 0, r"training.steps: expected 1 to 1,000,000,000, found 0"),
        (("training", "micro_batch_size"), 3, r"batch_size 4 is not a multiple of micro_batch_size 3"),
        (("training", "learning_rate"), -1.0, r"training.learning_rate: expected more than 0, at most 10, found -1.0"),
        (("training", "lambda_base_start"), 1.5, r"training.lambda_base_start: expected 0 to 1, found 1.5"),
        (("training", "warmup_ratio"), 1.0, r"training: warmup_ratio must be less than 1"),
        (
            ("training", "precision"),
            "float16",
            r"training.precision: expected 'bfloat16' or 'float32', found 'float16'",
        ),
        (("training", "objective"), "magic", r"objective: expected 'cross_entropy', 'kl', 'tv', .*, found 'magic'"),
        (("training", "causal_encoder"), "none", r"causal_encoder: expected 'teacher_forcing' or 'training_time_test'"),
        (("training", "curriculum"), "cosine", r"curriculum: expected 'linear', 'constant' or 'off'"),
        (("training", "position_weights"), "flat", r"position_weights: expected 'exponential' or 'acceptance'"),
        (("training", "confidence_floor"), 0.0, r"confidence_floor: expected more than 0, at most 1, found 0.0"),
        (("training", "attention"), "eager", r"attention: expected 'auto', 'flex' or 'sdpa'"),
        (("training", "trained"), "tail", r"trained: expected 'all' or 'head', found 'tail'"),
        (("training", "epochs"), 1.0, r"give either steps or epochs"),
        (("data", "features"), "tape", r"features: expected 'disk' or 'online'"),
        (("training", "block_schedule"), [1], r"training.block_schedule\[0\]: expected 2 to 64, found 1"),
        (("data", "max_length"), 3, r"data.max_length: expected 16 to 1,048,576, found 3"),
        (("data", "held_out"), 0, r"data.held_out: expected 1 to .*, found 0"),
        (("data", "temperature"), -1, r"data.temperature: expected 0 to 100, found -1.0"),
        (("data", "feature_dtype"), "int8", r"feature_dtype: expected 'bfloat16' or 'float32'"),
        (("draft", "head", "low_rank"), 0, r"draft.head.low_rank: expected 1 to 65,536, found 0"),
        (
            ("draft", "head", "pure_draft_prefix_len"),
            -1,
            r"draft.head.pure_draft_prefix_len: expected 0 to 63, found -1",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_naming_file_and_key(setup, tmp_path, place, value, message):
    values = recipe_values(setup)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_key_is_named(setup, tmp_path):
    values = recipe_values(setup)
    del values["target"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"missing key 'target'"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_that_does_not_say_where_it_ends_is_refused(setup, tmp_path):
    values = recipe_values(setup)
    del values["training"]["steps"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"recipe.yaml: training: give either steps or epochs"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text, message", [("a: [", "not valid YAML"), ("- 1", "expected mapping"), ("", "expected mapping")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_learning_rates_may_be_written_without_a_dot(setup, tmp_path):
    """YAML reads 6e-4 as text."""
    values = recipe_values(setup)
    text = yaml.safe_dump(values).replace("learning_rate: 0.005", "learning_rate: 6e-4")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").training.learning_rate == 6e-4


def test_off_may_be_written_without_quotes(setup, tmp_path):
    """YAML reads it as false."""
    text = yaml.safe_dump(recipe_values(setup)).replace("curriculum: linear", "curriculum: off")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").training.curriculum == "off"


def test_the_recipes_of_this_repository_are_valid():
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_recipe(recipe)
