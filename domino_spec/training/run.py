"""A whole training run from a recipe: data, features, loop, logs, and the finished draft in its directory.

OUT/recipe.yaml          the recipe as run, with versions
OUT/features/            the feature cache (may be shared or removed afterwards)
OUT/state.safetensors    weights and optimizer, to resume
OUT/metrics.jsonl        losses, lambda, learning rate, simulated tau
OUT/tensorboard/         the same for TensorBoard
OUT/training.png         the same as plots
OUT/draft/               the draft with the weights of the last save, in the published layout
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from domino_spec.config import Recipe, UserError
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.initialize import new_draft
from domino_spec.draft.model import Draft
from domino_spec.files import atomic_path, read_jsonl
from domino_spec.target.load import load_target
from domino_spec.training.data import frequent_tokens, load_sequences, split_held_out
from domino_spec.training.evaluate import SimulatedTau
from domino_spec.training.features import capture_features, feature_scale
from domino_spec.training.loop import StepResult, Trainer, recipe_digest, train

_log = logging.getLogger(__name__)


class Metrics:
    """Appends metrics to `metrics.jsonl` and TensorBoard; a resumed run first drops what lies past its state."""

    def __init__(self, directory: Path, resumed_step: int, log_every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = directory / "metrics.jsonl"
        self._log_every = log_every
        kept = []
        if self._path.exists():
            kept = [row for row in read_jsonl(self._path, {"step": int}, True) if row["step"] <= resumed_step]
        with atomic_path(self._path) as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._writer = SummaryWriter(directory / "tensorboard", purge_step=resumed_step + 1)

    def step(self, result: StepResult) -> None:
        """Record one optimizer step (every `log_every`)."""
        if result.step % self._log_every == 0 or result.step == 1:
            self._write(result.step, {k: v for k, v in dataclasses.asdict(result).items() if k != "step"})

    def evaluation(self, step: int, tau: SimulatedTau) -> None:
        """Record simulated tau and candidate recall."""
        values: dict[str, Any] = {"tau": tau.tau, "tau_head_off": tau.tau_head_off, "acceptance": tau.acceptance}
        values |= {"blocks": len(tau.accepted), "candidates": tau.candidates, "candidate_recall": tau.candidate_recall}
        self._write(step, values)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)


def run_training(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    features: Path | None = None,
    on_features: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_evaluation: Callable[[int, SimulatedTau], None] = lambda step, tau: None,
) -> Draft:
    """Train the recipe's draft into `out`; repeating the same call resumes it.

    Args:
        recipe: what to train.
        out: directory of the run.
        device: "auto", "cpu" or "cuda".
        features: directory of the feature cache, `out/features` where not given.
        on_features: called with captured and total tokens.
        on_step: called after every optimizer step.
        on_evaluation: called with every held-out measurement.

    Raises:
        UserError: bad data, a run of another recipe in `out`, or a file that cannot be read or written.
    """
    target = load_target(recipe.target, dtype=getattr(torch, recipe.data.feature_dtype), device=device, pack=False)
    sequences = load_sequences(recipe.data.responses, recipe.data.max_length, target.vocab_size)
    training, held_out = split_held_out(sequences, recipe.data.held_out)
    vocabulary = None
    if recipe.draft.draft_vocab_size is not None:
        vocabulary = frequent_tokens(training, recipe.draft.draft_vocab_size, target.stop_token_ids).to(target.device)
    draft = new_draft(recipe.draft, target, vocabulary, recipe.training.seed).float().to(target.device)
    if recipe.training.objective == "kl" and target.num_layers - 1 not in draft.config.target_layer_ids:
        raise UserError(f"objective kl needs the target's last layer {target.num_layers - 1} in target_layer_ids")
    if all(len(s.tokens) - s.prompt_length < draft.config.max_drafts for s in held_out):
        raise UserError(f"no held-out answer is long enough for {draft.config.max_drafts} drafts; raise data.held_out")

    out.mkdir(parents=True, exist_ok=True)
    _save_recipe(recipe, out, target.fingerprint)
    done, total = 0, sum(len(s.tokens) for s in sequences)

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_features(done, total)

    cache = capture_features(target, sequences, draft.config.target_layer_ids, features or out / "features", count)
    draft.backbone.scale_features(feature_scale(cache, training).to(target.device))
    digest = recipe_digest(recipe, training, target.fingerprint)
    trainer = Trainer(draft, recipe.training, training, cache)
    trainer.resume(out, digest)
    if trainer.step:
        _log.info("resuming after step %d", trainer.step)
    metrics = Metrics(out, trainer.step, recipe.training.log_every)

    def record_step(result: StepResult) -> None:
        metrics.step(result)
        on_step(result)

    def record_evaluation(step: int, tau: SimulatedTau) -> None:
        metrics.evaluation(step, tau)
        on_evaluation(step, tau)

    def save() -> None:
        save_draft(draft, out / "draft", dtype=torch.bfloat16)

    train(trainer, held_out, out, digest, record_step, record_evaluation, save)
    return draft


def _save_recipe(recipe: Recipe, out: Path, fingerprint: str) -> None:
    """The whole configuration beside the run, as YAML that `load_recipe` reads, with versions in its comments."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    notes = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "target fingerprint": fingerprint,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or "unknown",
    }
    header = "".join(f"# {key}: {value}\n" for key, value in notes.items())
    with atomic_path(out / "recipe.yaml") as scratch:
        scratch.write_text(header + yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False), "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
