"""A whole training run from a recipe: data, features, loop, logs, and the finished draft in its directory.

OUT/recipe.yaml          the recipe as run, with versions
OUT/features/            the feature cache (may be shared or removed afterwards)
OUT/state.safetensors    weights and optimizer, to resume, with their checksum
OUT/metrics.jsonl        losses, lambda, learning rate, pace, simulated tau, per-slot acceptance
OUT/tensorboard/         the same for TensorBoard
OUT/trackers.json        the id under which trackers know the run, if the recipe names any
OUT/report.md            the figures, the cost and the settings on a page, with training.png (`report.write_report`)
OUT/draft/               the draft with the weights of the last save, in the published layout
OUT/draft.json           which state the draft was made from
OUT/.lock                held by the process that trains
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from domino_spec.devices import choose_device, free_memory
from domino_spec.draft.initialize import new_draft
from domino_spec.draft.load import AnyDraft, save_any_draft
from domino_spec.files import atomic_path
from domino_spec.recipe import Recipe
from domino_spec.settings import UserError, require_extra
from domino_spec.target.load import load_target, target_config
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence, frequent_tokens, split_held_out
from domino_spec.training.datasets import load_training_data
from domino_spec.training.estimate import planned_draft, state_memory
from domino_spec.training.evaluate import SimulatedTau
from domino_spec.training.features import FeatureSource, OnlineFeatures, capture_features, feature_scale
from domino_spec.training.integrity import only_writer, remove_scratch
from domino_spec.training.loop import recipe_digest, train
from domino_spec.training.parallel import Processes, joined_processes, whole_draft
from domino_spec.training.state import draft_is_of_state, record_draft, refuse_other_run
from domino_spec.training.step import StepResult, Trainer, tapped_layers
from domino_spec.training.watch import Metrics, RunFacts, run_facts, tracker_modules

_log = logging.getLogger(__name__)


def run_training(
    recipe: Recipe,
    out: Path,
    *,
    device: str = "auto",
    features: Path | None = None,
    check: bool = True,
    on_start: Callable[[RunFacts], None] = lambda facts: None,
    on_features: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[StepResult], None] = lambda result: None,
    on_evaluation: Callable[[int, SimulatedTau], None] = lambda step, tau: None,
) -> AnyDraft:
    """Train the recipe's draft into `out`; repeating the same call resumes it, with any number of processes.

    Args:
        recipe: what to train.
        out: directory of the run.
        device: "auto", "cpu" or "cuda".
        features: directory of the feature cache; `out/features` if not given.
        check: as `load_target` takes it.
        on_start: called once data and device are known.
        on_features: called with captured and total tokens.
        on_step: called after every optimizer step.
        on_evaluation: called with every held-out measurement.

    Raises:
        UserError: bad data, a run of another recipe in `out`, another process that trains in it, or a file that cannot
            be read or written.
    """
    for option, directory in (("--out", out), ("--features", features)):
        if directory is not None and os.path.isfile(directory):
            raise UserError(f"{option} {directory} is a file: give a directory")
    require_extra("train", "training")
    tracker_modules(recipe.training.trackers)
    with contextlib.ExitStack() as stack:
        processes, local_device = stack.enter_context(joined_processes(device))
        if processes.is_first:
            stack.enter_context(only_writer(out, out / ".lock", "choose another --out"))
            remove_scratch(out)
            remove_scratch(out / "draft")
        options = on_start, on_features, on_step, on_evaluation
        return _train(recipe, out, processes, local_device, features, check, *options)


def _train(
    recipe: Recipe,
    out: Path,
    processes: Processes,
    device: str,
    features: Path | None,
    check: bool,
    on_start: Callable[[RunFacts], None],
    on_features: Callable[[int, int], None],
    on_step: Callable[[StepResult], None],
    on_evaluation: Callable[[int, SimulatedTau], None],
) -> AnyDraft:
    _check_fit(recipe, processes, device)
    dtype = getattr(torch, recipe.data.feature_dtype)
    target = load_target(recipe.target, dtype=dtype, device=device, pack=False, check=check)
    sequences = load_training_data(recipe.data, target)
    training, held_out = split_held_out(sequences, recipe.data.held_out)
    vocabulary = None
    if recipe.draft.draft_vocab_size is not None:
        vocabulary = frequent_tokens(training, recipe.draft.draft_vocab_size, target.stop_token_ids).to(target.device)
    draft = new_draft(recipe.draft, target, vocabulary, recipe.training.seed).float().to(target.device)
    if recipe.training.block_schedule:
        draft.config = draft.config.for_short_blocks()
    if all(end - start < draft.config.max_drafts for s in held_out for start, end in s.answers):
        raise UserError(f"no held-out answer is long enough for {draft.config.max_drafts} drafts; raise data.held_out")

    digest = recipe_digest(recipe, training, target.fingerprint)
    settings = recipe.training.with_steps(len(training))
    refuse_other_run(out, digest, settings.total_steps)
    if processes.is_first:
        facts = run_facts(recipe, draft, training, held_out, processes.count)
        _save_recipe(recipe, out, target.fingerprint, facts)
        on_start(facts)
    source = _feature_source(recipe, target, sequences, draft, features or out / "features", processes, on_features)
    scale = feature_scale(source, training)[: draft.config.feature_size]
    # A random `fc` is simply trained on scaled features. One from a checkpoint must keep computing what it did.
    pretrained = recipe.draft.init_from is not None or recipe.draft.model != "block"
    draft.scale_features(scale.to(target.device), trained=pretrained)
    trainer = Trainer(draft, settings, training, source, processes)
    trainer.resume(out, digest)
    if trainer.step:
        _log.info("resuming after step %d", trainer.step)
    metrics = Metrics(out, trainer.step, recipe) if processes.is_first else None

    def record_step(result: StepResult) -> None:
        if metrics is not None:
            metrics.step(result)
            on_step(result)

    def record_evaluation(step: int, tau: SimulatedTau) -> None:
        if metrics is not None:
            metrics.evaluation(step, tau)
            on_evaluation(step, tau)

    def save_draft() -> None:
        whole = whole_draft(draft)
        if processes.is_first:
            save_any_draft(whole, out / "draft", dtype=torch.bfloat16)
            record_draft(out, trainer.step, trainer.state_checksum)

    with metrics or contextlib.nullcontext():
        stale = trainer.step > 0 and processes.is_first and not draft_is_of_state(out, trainer.state_checksum)
        # All processes take part in writing a draft, so all must know what the first one has found.
        if processes.sum(torch.tensor(float(stale), device=target.device)) > 0:
            _log.info(
                "%s lacks the weights of step %d, the last that was saved: it is written anew",
                out / "draft",
                trainer.step,
            )
            save_draft()
        train(trainer, held_out, out, digest, record_step, record_evaluation, save_draft)
    return draft


def _check_fit(recipe: Recipe, processes: Processes, device: str) -> None:
    """Check what can be checked before weights are loaded or made.

    Raises:
        UserError: the recipe does not fit its target or itself, or the state of its draft does not fit into memory.
    """
    draft = planned_draft(recipe, target_config(recipe.target), processes.count)
    total = sum(p.numel() for p in draft.parameters())
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    needed = sum(state_memory(total, trained, recipe.training, processes.count).values())
    chosen = choose_device(device)
    free = free_memory(chosen)
    if free is not None and needed > free:
        raise UserError(
            f"the draft has {total:,} parameters: weights, gradients and optimizer take {needed / 1e9:.1f} GB, and "
            f"{chosen} has {free / 1e9:.1f} GB free; make the draft smaller"
        )


def _feature_source(
    recipe: Recipe,
    target: Target,
    sequences: list[Sequence],
    draft: AnyDraft,
    directory: Path,
    processes: Processes,
    on_features: Callable[[int, int], None],
) -> FeatureSource:
    """Features online, or from the cache, which the first process fills while the others wait."""
    layers = tapped_layers(draft, recipe.training)
    if recipe.data.features == "online":
        return OnlineFeatures(target, layers)
    done, total = 0, sum(len(s.tokens) for s in sequences)

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        on_features(done, total)

    if processes.is_first:
        capture_features(target, sequences, layers, directory, count)
    processes.wait()
    return capture_features(target, sequences, layers, directory)


def _save_recipe(recipe: Recipe, out: Path, fingerprint: str, facts: RunFacts) -> None:
    """The whole configuration beside the run, as YAML that `load_recipe` reads, with versions in its comments."""
    notes = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "target fingerprint": fingerprint,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **facts.notes(),
        "commit": _commit(),
    }
    header = "".join(f"# {key}: {value}\n" for key, value in notes.items())
    with atomic_path(out / "recipe.yaml") as scratch:
        scratch.write_text(header + yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False), "utf-8")


def _commit() -> str:
    """Commit of this package's source, if it is in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value
