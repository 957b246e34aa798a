"""What a run records while it trains: metrics.jsonl, TensorBoard, and the trackers that its recipe asks for.

`metrics.jsonl` is the record that reports are made from (`training.report`). The others show the same figures, and none
of them can stop a run: a tracker that fails is switched off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from domino_spec.draft.load import AnyDraft
from domino_spec.files import atomic_path, read_json, read_jsonl, write_json
from domino_spec.recipe import Recipe
from domino_spec.settings import UserError
from domino_spec.training.data import Sequence
from domino_spec.training.estimate import step_operations
from domino_spec.training.evaluate import SimulatedTau
from domino_spec.training.integrity import mend_last_line
from domino_spec.training.step import StepResult

METRICS_FILE = "metrics.jsonl"
IDENTITY_FILE = "trackers.json"
"""Keeps the id under which trackers know the run."""
PROJECT = "domino-spec"
"""Of the trackers, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""

BENCHMARK_SECONDS = 0.2
PRODUCTS = 4
"""Products that are timed together, so that starting them hardly counts."""
LARGEST_PRODUCT = 8192
"""Rows of the largest matrix that `matrix_rate` multiplies: 128 MB in bfloat16."""

OPERATIONS_SAMPLE = 64
"""Training sequences whose operations are counted."""

Row = dict[str, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that its recipe does not hold, known once data and device are known."""

    draft: str
    """Shape of the draft in words."""
    steps: int
    """Optimizer steps of the whole run."""
    training_sequences: int
    training_tokens: int
    """Prompts included."""
    answer_tokens: int
    """Of the training sequences: the tokens that are learned."""
    held_out_sequences: int
    parameters: int
    """Of the draft."""
    device: str
    processes: int
    matrix_rate: float
    """Rate that the devices of all processes reach on large products, in floating-point operations per second."""
    step_operations: float
    """Floating-point operations of a step of all processes, on average (`training.estimate`)."""

    def notes(self) -> dict[str, str]:
        """For the comments above the recipe that is saved with the run; `training.report` reads them."""
        values = {f.name.replace("_", " "): getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in values.items()}


def run_facts(
    recipe: Recipe,
    draft: AnyDraft,
    training: SequenceType[Sequence],
    held_out: SequenceType[Sequence],
    processes: int = 1,
) -> RunFacts:
    """Count data and operations, and measure the device (about a second).

    Args:
        recipe: of the run.
        draft: to be trained, on its device.
        training: sequences trained on.
        held_out: sequences for simulated tau.
        processes: that share the work, each with a device like this one's.
    """
    device, settings = draft.device, recipe.training.with_steps(len(training))
    vocabulary = None if draft.draft_vocab_ids is None else draft.draft_vocab_ids.cpu()
    sample = training[:: max(1, len(training) // OPERATIONS_SAMPLE)]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
    return RunFacts(
        draft=draft.config.training_summary,
        steps=settings.total_steps,
        training_sequences=len(training),
        training_tokens=sum(len(s.tokens) for s in training),
        answer_tokens=sum(s.num_answer_tokens for s in training),
        held_out_sequences=len(held_out),
        parameters=sum(p.numel() for p in draft.parameters()),
        device=name,
        processes=processes,
        matrix_rate=matrix_rate(device, getattr(torch, recipe.training.precision)) * processes,
        step_operations=sum(step_operations(draft.config, settings, sample, vocabulary).values()),
    )


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate at which the device multiplied large square matrices of that type, in operations per second.

    Sizes double while the next one still fits into the time; all of it takes well under a second. What else runs on the
    device lowers the result.
    """
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers alone
    size, seconds, best = 128, 0.0, 0.0
    while size < LARGEST_PRODUCT and 8 * (PRODUCTS + 1) * seconds < BENCHMARK_SECONDS:
        size *= 2
        left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = left @ right  # the first product of a size also chooses its kernel
        seconds = _seconds_of_a_product(left, right, out)
        best = max(best, 2.0 * size**3 / seconds)
    deadline = time.perf_counter() + BENCHMARK_SECONDS
    while time.perf_counter() < deadline:
        best = max(best, 2.0 * size**3 / _seconds_of_a_product(left, right, out))
    return best


def _seconds_of_a_product(left: Tensor, right: Tensor, out: Tensor) -> float:
    out[0, 0].item()  # waits for what the device still has to do
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=out)
    out[0, 0].item()
    return (time.perf_counter() - started) / PRODUCTS


class Metrics:
    """Writes a run's metrics wherever they are wanted; to be used in a `with` statement, which closes the trackers.

    A resumed run first drops from `metrics.jsonl` and TensorBoard the steps after its state: it repeats them.

    Args:
        directory: of the run.
        resumed_step: steps that its state has done.
        recipe: of the run.

    Raises:
        UserError: the metrics cannot be read or written, or a tracker is not installed.
    """

    def __init__(self, directory: Path, resumed_step: int, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        modules = tracker_modules(recipe.training.trackers)
        self._path = directory / METRICS_FILE
        self._log_every = recipe.training.log_every
        mend_last_line(self._path, "a step that is not repeated lacks its figures")
        rows = read_metrics(self._path) if self._path.exists() else []
        # A resumed run repeats the numbers of the one that was stopped, so trackers need them only once.
        self._tracked = {(row["step"], "tau" in row) for row in rows}
        with atomic_path(self._path) as scratch:
            kept = (row for row in rows if row["step"] <= resumed_step)
            scratch.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        try:
            self._tensorboard = SummaryWriter(directory / "tensorboard", purge_step=resumed_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {directory / 'tensorboard'}: {error.strerror}") from None
        self._trackers = []
        if modules:
            identity, config = _identity(directory), json.loads(json.dumps(dataclasses.asdict(recipe)))
            self._trackers = [_Tracker(name, module, directory, identity, config) for name, module in modules.items()]

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.finish(failed=kind is not None)

    def step(self, result: StepResult) -> None:
        """Record one optimizer step (every `log_every`)."""
        if result.step % self._log_every == 0 or result.step == 1:
            self._write(result.step, {k: v for k, v in dataclasses.asdict(result).items() if k != "step"})

    def evaluation(self, step: int, tau: SimulatedTau) -> None:
        """Record simulated tau, per-slot acceptance and candidate recall."""
        values: dict[str, Any] = {
            "tau": tau.tau,
            "tau_head_off": tau.tau_head_off,
            "acceptance": tau.acceptance,
            "acceptance_head_off": tau.acceptance_head_off,
            "blocks": len(tau.accepted),
            "candidates": tau.candidates,
            "candidate_recall": tau.candidate_recall,
        }
        self._write(step, values)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; the run resumes from its state") from None
        scalars = dict(_scalars(values))
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        if (step, "tau" in values) not in self._tracked:
            for tracker in self._trackers:
                tracker.log(scalars, step)


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name; those of a list are numbered from 1, as drafted tokens are."""
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}/{number:02d}", item) for number, item in enumerate(value, 1))
        elif isinstance(value, (int, float)):
            yield name, value


def tracker_modules(names: SequenceType[str]) -> dict[str, ModuleType]:
    """Import the trackers that a recipe names; called early too, so that a missing one is not found out late.

    Raises:
        UserError: one is not installed.
    """
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            missing = f"{name} cannot be imported ({error})"
            raise UserError(f"{missing}; pip install {name}, or take it out of training.trackers") from None
    return modules


def _identity(directory: Path) -> str:
    """The id under which trackers know the run of this directory, made when it has none yet."""
    path = directory / IDENTITY_FILE
    if not path.exists():
        write_json({"id": secrets.token_hex(4)}, path)
    identity = read_json(path)
    if not (isinstance(identity, dict) and isinstance(identity.get("id"), str)):
        raise UserError(f"{path} does not hold the id of a run: remove it, and trackers get a new one")
    return identity["id"]


class _Tracker:
    """One tracker. If it fails, one warning is logged, and it is off.

    Args:
        name: wandb or trackio, whose functions have the same names.
        module: imported.
        directory: of the run.
        identity: of the run.
        config: the recipe as plain values.
    """

    def __init__(self, name: str, module: ModuleType, directory: Path, identity: str, config: dict[str, Any]) -> None:
        self._name, self._module, self._run = name, module, None
        title = directory.resolve().name
        options: dict[str, Any] = dict(project=os.environ.get(f"{name.upper()}_PROJECT", PROJECT), config=config)
        if name == "wandb":
            # It would otherwise capture standard output, which has the progress bar.
            options |= dict(name=title, id=identity, dir=str(directory), settings={"console": "off"})
        else:
            options |= dict(name=f"{title}-{identity}")  # trackio finds the run to resume by its name
        self._run = self._attempt("start", lambda: module.init(resume="allow", **options))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Send some numbers."""
        run = self._run
        if run is not None:
            self._attempt("log", lambda: run.log(dict(scalars), step=step))

    def finish(self, failed: bool) -> None:
        """End the session."""
        if self._run is not None:
            self._run, outcome = None, {"exit_code": int(failed)} if self._name == "wandb" else {}
            # The module's function: after the run's own, trackio would finish it once more when Python exits.
            self._attempt("finish", lambda: self._module.finish(**outcome))

    def _attempt(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is ours: a bar, or one JSON object
                return call()
        except Exception as error:  # whatever it is, training goes on
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s could not %s and is off from here on: %s", self._name, what, reason)
            return None


def last_metrics(metrics: Path) -> dict[str, Any]:
    """The latest losses and simulated tau of a run, by name; empty for a run without any.

    Raises:
        UserError: the metrics cannot be read.
    """
    latest: dict[str, Any] = {}
    for row in read_metrics(metrics):
        latest |= row
    return latest


def read_metrics(path: Path) -> list[Row]:
    """The rows of `metrics.jsonl`, without a last line that a kill has cut.

    Raises:
        UserError: it cannot be read, or a line holds what no run writes.
    """
    try:
        return read_jsonl(path, {"step": int}, skip_partial_end=True, fault=_row_fault)
    except UserError as error:
        raise UserError(f"{error}; remove what is wrong, or the file: the run itself does not need it") from None


def _row_fault(row: Row) -> str | None:
    for key, value in row.items():
        items = value if isinstance(value, list) else [value]
        if isinstance(value, list) is not key.startswith("acceptance"):
            return f"key {key!r} must {'not ' if isinstance(value, list) else ''}be a list"
        if not all(item is None or (isinstance(item, (int, float)) and math.isfinite(item)) for item in items):
            return f"key {key!r} must hold numbers"
    for kind, others in (("base_loss", ("final_loss",)), ("tau", ("tau_head_off", "acceptance"))):
        for other in others if kind in row else ():
            if other not in row:
                return f"key {other!r} is missing"
    return None
