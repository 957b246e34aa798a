"""A run that is killed at any of its file operations, and killed again while it resumes, ends in the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from domino_spec import files, load_target
from domino_spec.files import load_metadata
from domino_spec.recipe import DataRecipe, Recipe
from domino_spec.training import features
from domino_spec.training.answers import regenerate
from domino_spec.training.run import run_training
from tests.training.test_run import assert_same_run

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then forks processes that have not computed yet
CONTEXT.set_forkserver_preload(["tests.training.test_killed", "torch.utils.tensorboard"])


class Killer:
    """Kills this process at its n-th file operation; with n 0, only counts them.

    A write of tensors or of lines is left half done, a file that takes the place of another is met before and after.
    """

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.count = kill_at, 0

    def tick(self, half_done: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.kill_at:
            half_done()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        replace, save_file, open_path = os.replace, files.save_file, pathlib.Path.open

        def replacing(source, target, **options):
            self.tick()
            replace(source, target, **options)
            self.tick()

        def saving(tensors, path, metadata=None):
            self.tick(lambda: Path(path).write_bytes(b"half a file"))
            save_file(tensors, path, metadata)

        def opening(path, mode="r", *arguments, **options):
            file = open_path(path, mode, *arguments, **options)
            if mode != "a":
                return file
            write = file.write

            def appending(text):
                self.tick(lambda: (write(text[: len(text) // 2]), file.flush()))
                return write(text)

            file.write = appending
            return file

        os.replace, files.save_file, pathlib.Path.open = replacing, saving, opening


def child(work: Callable[..., object], arguments: tuple, kill_at: int, counted: Path) -> None:
    """Runs in a process of its own."""
    features.SHARD_TOKENS, features.BATCH_TOKENS = 100, 128  # several shards
    killer = Killer(kill_at)
    killer.install()
    work(*arguments)
    with open(counted, "w") as file:
        file.write(str(killer.count))


def killed(work: Callable[..., object], arguments: tuple, kill_at: int, counted: Path) -> bool:
    """Whether the process was killed before it was done; anything else must end well."""
    process = CONTEXT.Process(target=child, args=(work, arguments, kill_at, counted))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL), "neither killed nor done: see its traceback above"
    return process.exitcode != 0


def train(recipe: Recipe, out: Path) -> None:
    run_training(recipe, out, device="cpu")


def answer(target: Path, prompts: Path, out: Path, recipe: DataRecipe) -> None:
    regenerate(load_target(target, device="cpu"), None, prompts, out, recipe)


@pytest.fixture(scope="module")
def recipe(setup) -> Recipe:
    """Three steps, each saved."""
    return setup.recipe(steps=3, checkpoint_minutes=0.0, eval_every=2)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> tuple[Path, int]:
    """An uninterrupted run, and how many file operations it has."""
    directory = tmp_path_factory.mktemp("whole")
    assert not killed(train, (recipe, directory / "run"), 0, directory / "count")
    assert len(list((directory / "run" / "features").glob("shard-*"))) > 2
    return directory / "run", int((directory / "count").read_text())


def assert_survives(recipe: Recipe, out: Path, kills: list[int], whole: Path) -> None:
    """Kill the run at an operation of every start, then let it end."""
    for kill_at in kills:
        killed(train, (recipe, out), kill_at, out.with_name("count"))
    assert not killed(train, (recipe, out), 0, out.with_name("count"))
    assert_same_run(out, whole)
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_a_run_killed_twice_anywhere_ends_in_the_same_bytes(recipe, whole, tmp_path):
    """Some of the places; the slow test takes all of them."""
    expected, operations = whole
    assert operations > 40
    chosen = random.Random(3)
    for number in range(3):
        kills = [chosen.randrange(1, operations + 1), chosen.randrange(1, 12)]
        assert_survives(recipe, tmp_path / f"run{number}", kills, expected)


@pytest.mark.slow
def test_a_run_killed_between_its_last_state_and_its_draft_writes_the_draft(recipe, whole, tmp_path):
    """The state is of the last step, `draft/` of the step before: the same command must not call it new."""
    expected, operations = whole
    out = tmp_path / "run"
    # From the end: two operations each for draft.json, config.json and the draft's tensors in place; their writing.
    assert killed(train, (recipe, out), operations - 6, tmp_path / "count")
    assert load_metadata(out / "state.safetensors")["step"] == "3"
    assert json.loads((out / "draft.json").read_text())["step"] == 2
    assert_survives(recipe, out, [], expected)
    for lost in ("draft.json", "draft/config.json", "draft/model.safetensors"):
        (out / lost).unlink()
        assert_survives(recipe, out, [], expected)
    (out / "draft" / "model.safetensors").write_bytes(b"an older draft")
    assert_survives(recipe, out, [], expected)


@pytest.mark.slow
def test_every_place_to_be_killed_at(recipe, whole, tmp_path):
    expected, operations = whole
    second = random.Random(5)
    for kill_at in range(1, operations + 1):
        assert_survives(recipe, tmp_path / f"run{kill_at}", [kill_at, second.randrange(1, 20)], expected)


@pytest.mark.slow
def test_a_run_killed_a_little_later_at_every_start(recipe, whole, tmp_path):
    """One directory that sees every kind of kill, one after the other."""
    expected, operations = whole
    assert_survives(recipe, tmp_path / "run", list(range(1, operations + 1)), expected)


@pytest.mark.slow
def test_answers_cut_in_the_middle_twice_are_those_of_an_uninterrupted_run(setup, tmp_path):
    """Sampled, so that they would differ if they depended on the batch they are in; several turns, too."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "turns": [f"w{5 + i} w{6 + i}"] * (1 + i % 2)} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataRecipe(max_new_tokens=6, batch_size=3, temperature=0.8)
    answers = [tmp_path / name for name in ("whole.jsonl", "killed.jsonl")]
    arguments = [(setup.target, prompts, out, data) for out in answers]
    assert not killed(answer, arguments[0], 0, tmp_path / "count")
    for _ in range(2):  # half of the lines that are appended at once
        assert killed(answer, arguments[1], 1, tmp_path / "count")
        assert not answers[1].read_bytes().endswith(b"\n")
    assert not killed(answer, arguments[1], 0, tmp_path / "count")
    assert answers[1].read_bytes() == answers[0].read_bytes()
