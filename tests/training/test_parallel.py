"""Several processes train as one does: same losses, same weights, whatever their number, also after a restart."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from domino_spec.draft.checkpoint import read_draft
from domino_spec.settings import UserError
from domino_spec.training.parallel import Processes, micro_batches
from domino_spec.training.run import run_training

STEPS = 6


def write_recipe(setup, directory: Path, **training) -> Path:
    """A recipe as a file, for other processes."""
    options = dict(steps=STEPS, batch_size=4, micro_batch_size=1, checkpoint_minutes=60.0, eval_every=3)
    recipe = setup.recipe(**{**options, **training})
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe)))))
    return path


def train(recipe: Path, out: Path, processes: int, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Train in processes of their own; returns the saved state."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from domino_spec.recipe import load_recipe\n"
        "from domino_spec.training import loop\n"
        "from domino_spec.training.run import run_training\n"
        "recipe, out, stop = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])\n"
        "original = loop.Trainer.train_step\n"
        "def step(self):\n"
        "    if self.step == stop:\n"
        "        raise KeyboardInterrupt\n"
        "    return original(self)\n"
        "loop.Trainer.train_step = step\n"
        "try:\n"
        "    run_training(recipe, out, device='cpu')\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    arguments = ["-c", script, str(recipe), str(out), str(-1 if stop_after is None else stop_after)]
    command = [sys.executable, *arguments]
    if processes > 1:
        launcher = Path(out.parent, "worker.py")
        launcher.write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(launcher), *arguments[2:]]
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "state.safetensors")


def losses(out: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["base_loss"], row["final_loss"]) for row in rows if "base_loss" in row]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Equal up to rounding: sums over micro-batches are taken in another order."""
    assert len(losses(expected)) == STEPS
    for one, other in zip(losses(actual), losses(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    states = [load_file(out / "state.safetensors") for out in (actual, expected)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    drafts = [dict(read_draft(out / "draft").named_parameters()) for out in (actual, expected)]
    for name, parameter in drafts[1].items():
        torch.testing.assert_close(drafts[0][name], parameter, rtol=2e-2, atol=1e-4)


@pytest.fixture(scope="module")
def alone(setup, tmp_path_factory) -> Path:
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone")
    train(write_recipe(setup, directory), directory / "run", 1)
    return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_reach_the_losses_and_weights_of_one(setup, alone, tmp_path, kind):
    train(write_recipe(setup, tmp_path, parallel=kind), tmp_path / "run", 2)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(setup, alone, tmp_path):
    """Two sharded processes, then one, then two whole ones: data order and optimizer state carry over."""
    out = tmp_path / "run"
    train(write_recipe(setup, tmp_path, parallel="fsdp"), out, 2, stop_after=2)
    train(write_recipe(setup, tmp_path, micro_batch_size=2), out, 1, stop_after=4)
    train(write_recipe(setup, tmp_path, parallel="ddp"), out, 2)
    assert_same_run(out, alone)
    assert "# processes: 2" in (out / "recipe.yaml").read_text()


def test_micro_batches_are_shared_out_evenly_or_refused():
    shares = [micro_batches(16, 2, Processes(rank, 4)) for rank in range(4)]
    rows = sorted(i for share in shares for part in share for i in range(part.start, part.stop))
    assert rows == list(range(16)) and {len(share) for share in shares} == {2}
    with pytest.raises(UserError, match="8 of them, which 3 processes cannot share evenly"):
        micro_batches(16, 2, Processes(0, 3))


def test_one_process_needs_no_launcher(setup, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run_training(setup.recipe(steps=1, parallel="fsdp"), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()
