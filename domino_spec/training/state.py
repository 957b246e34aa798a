"""The state of a training run on disk: everything that the next step depends on, written atomically.

Data order, anchors and schedules are functions of seed and step, so weights, optimizer moments and the step number
are all there is to save: a resumed run repeats an uninterrupted one bit for bit, and since sharded tensors are saved
whole, it may go on with another number of processes.

A state carries a checksum, which also names it: `draft.json` beside `draft/` says which state the draft was made from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from domino_spec.draft.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from domino_spec.draft.load import AnyDraft
from domino_spec.files import load_metadata, load_tensors, read_json, save_tensors, write_json
from domino_spec.settings import UserError, shortened
from domino_spec.training.integrity import file_checksum, tensors_checksum
from domino_spec.training.parallel import ALONE, Processes, like, whole

STATE_FILE = "state.safetensors"
DRAFT_RECORD = "draft.json"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_REMEDY = "remove it to train from the start, or choose another --out"

_log = logging.getLogger(__name__)


class SavedState(NamedTuple):
    """A state as it was read, its checksum verified."""

    tensors: dict[str, Tensor]
    """weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, step/NAME for every trained parameter; draft_vocab_ids,
    feature_scale."""
    metadata: dict[str, str]
    checksum: str


def save_state(
    draft: AnyDraft,
    optimizer: torch.optim.AdamW,
    step: int,
    recipe_digest: str,
    directory: Path,
    processes: Processes = ALONE,
) -> str:
    """Write weights, moments and `step` (optimizer steps done); the first process writes, all take part.

    Returns:
        The state's checksum; empty in processes that do not write.

    Raises:
        UserError: it could not be written; the previous state survives.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in draft.named_parameters():
        parts = {"weight": parameter, **optimizer.state.get(parameter, {})}
        for part, value in parts.items():
            gathered = whole(value)
            if processes.is_first:
                tensors[f"{part}/{name}"] = gathered.detach().cpu()
    if not processes.is_first:
        return ""
    if draft.draft_vocab_ids is not None:
        tensors["draft_vocab_ids"] = draft.draft_vocab_ids.cpu()
    if draft.feature_scale is not None:
        tensors["feature_scale"] = draft.feature_scale.cpu()  # export multiplies it into fc.weight
    facts = {"step": str(step), "recipe": recipe_digest}
    checksum = tensors_checksum(tensors, facts)
    save_tensors(tensors, directory / STATE_FILE, {**facts, "checksum": checksum})
    return checksum


def read_state(path: Path) -> SavedState:
    """All of a state.

    Raises:
        UserError: it is missing, cannot be read, or is not what was written.
    """
    tensors, metadata = load_tensors(path)
    facts = {name: value for name, value in metadata.items() if name in ("step", "recipe")}
    checksum = tensors_checksum(tensors, facts)
    if "checksum" not in metadata:
        _log.warning("%s has no checksum (an earlier version wrote it): damage to it would go unnoticed", path)
    elif metadata["checksum"] != checksum:
        raise UserError(f"{path} is damaged: its content does not match its checksum; {_REMEDY}")
    return SavedState(tensors, metadata, checksum)


def refuse_other_run(directory: Path, recipe_digest: str, total_steps: int) -> None:
    """Check a state's metadata before anything is written to `directory` or captured.

    Raises:
        UserError: it holds a run of another recipe, a state that cannot be read, or one whose step is none of the
            recipe's.
    """
    path = directory / STATE_FILE
    if path.exists():
        _saved_step(path, load_metadata(path), recipe_digest, total_steps)


def _saved_step(path: Path, metadata: dict[str, str], recipe_digest: str, total_steps: int) -> int:
    if metadata.get("recipe") != recipe_digest:
        raise UserError(f"{path.parent} holds a run of another recipe or other data; choose another --out or remove it")
    step = metadata.get("step", "")
    if not (step.isascii() and step.isdecimal() and len(step) < 20 and int(step) <= total_steps):
        raise UserError(
            f"{path} says that it is of step {shortened(step)}, expected a number up to {total_steps}; {_REMEDY}"
        )
    return int(step)


def load_state(
    draft: AnyDraft, optimizer: torch.optim.AdamW, recipe_digest: str, directory: Path, total_steps: int
) -> tuple[int, str]:
    """Restore a run into a fresh draft and optimizer; nothing is restored unless all of it can be.

    Returns:
        The steps done and the state's checksum; 0 and an empty text if nothing was saved.

    Raises:
        UserError: the state is unreadable, damaged, lacks a tensor, or belongs to another recipe.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return 0, ""
    tensors, metadata, checksum = read_state(path)
    step = _saved_step(path, metadata, recipe_digest, total_steps)
    _check_tensors(path, tensors, draft, step)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(like(tensors[f"weight/{name}"], parameter))
            if f"step/{name}" in tensors:
                optimizer.state[parameter] = {
                    "step": tensors[f"step/{name}"].to(parameter.device),
                    **{k: like(tensors[f"{k}/{name}"], parameter) for k in ("exp_avg", "exp_avg_sq")},
                }
        if draft.draft_vocab_ids is not None:
            draft.draft_vocab_ids.copy_(tensors["draft_vocab_ids"])
        if (
            draft.feature_scale is not None
        ):  # the weights were trained with this scale, even if features were captured again
            draft.feature_scale.copy_(tensors["feature_scale"])
    return step, checksum


def _check_tensors(path: Path, tensors: dict[str, Tensor], draft: AnyDraft, step: int) -> None:
    """Compare with what `save_state` writes for this draft.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape or type.
    """
    expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, parameter in draft.named_parameters():
        expected[f"weight/{name}"] = parameter.shape, torch.float32
        # A parameter that no loss has reached yet has no moments: all three are there, or none.
        if (parameter.requires_grad and step > 0) and any(f"{part}/{name}" in tensors for part in _MOMENTS):
            for part in _MOMENTS:
                shape = torch.Size() if part == "step" else parameter.shape
                expected[f"{part}/{name}"] = shape, torch.float32
    if draft.draft_vocab_ids is not None:
        expected["draft_vocab_ids"] = draft.draft_vocab_ids.shape, torch.int64
    if draft.feature_scale is not None:
        expected["feature_scale"] = draft.feature_scale.shape, torch.float32
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            raise UserError(f"{path} lacks the tensor {name}; {_REMEDY}")
        found = tensors[name]
        if (found.shape, found.dtype) != (shape, dtype):
            raise UserError(
                f"{path}: tensor {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}; {_REMEDY}"
            )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{path} holds the unexpected tensor {unknown[0]}; {_REMEDY}")


def record_draft(directory: Path, step: int, checksum: str) -> None:
    """Record that `draft/` now holds the weights of a state.

    Args:
        directory: of the run.
        step: of the state.
        checksum: of the state.

    Raises:
        UserError: it cannot be written.
    """
    try:
        files = {name: file_checksum(directory / "draft" / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}, which was just written: {error.strerror}") from None
    write_json({"step": step, "state": checksum, "files": files}, directory / DRAFT_RECORD)


def draft_is_of_state(directory: Path, checksum: str) -> bool:
    """Whether `draft/` holds the weights of this state, undamaged, by `draft.json`.

    A record that cannot be read counts as none: the draft can always be written again from the state.
    """
    try:
        record = read_json(directory / DRAFT_RECORD)
        return record["state"] == checksum and all(
            file_checksum(directory / "draft" / name) == record["files"][name] for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
    except (UserError, OSError, KeyError, TypeError):
        return False
