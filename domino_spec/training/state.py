"""The state of a training run on disk: everything that the next step depends on, written atomically.

Data order, anchors and schedules are functions of seed and step, so weights, optimizer moments and the step number
are all there is to save: a resumed run repeats an uninterrupted one bit for bit, and since sharded tensors are saved
whole, it may go on with another number of processes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.draft.load import AnyDraft
from domino_spec.files import load_metadata, load_tensors, save_tensors
from domino_spec.training.parallel import ALONE, Processes, like, whole

STATE_FILE = "state.safetensors"


def save_state(
    draft: AnyDraft,
    optimizer: torch.optim.AdamW,
    step: int,
    recipe_digest: str,
    directory: Path,
    processes: Processes = ALONE,
) -> None:
    """Write weights, moments and `step` (optimizer steps done); the first process writes, all take part.

    Raises:
        UserError: it could not be written; the previous state survives.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in draft.named_parameters():
        parts = {"weight": parameter, **optimizer.state.get(parameter, {})}
        for part, value in parts.items():
            gathered = whole(value)
            if processes.is_first:
                tensors[f"{part}/{name}"] = gathered
    if not processes.is_first:
        return
    if draft.draft_vocab_ids is not None:
        tensors["draft_vocab_ids"] = draft.draft_vocab_ids
    if draft.feature_scale is not None:
        tensors["feature_scale"] = draft.feature_scale  # export needs it: it belongs into fc.weight
    save_tensors(tensors, directory / STATE_FILE, {"step": str(step), "recipe": recipe_digest})


def refuse_other_run(directory: Path, recipe_digest: str) -> None:
    """Before anything is written to `directory`.

    Raises:
        UserError: it holds a run of another recipe, or a state that cannot be read.
    """
    path = directory / STATE_FILE
    if path.exists() and load_metadata(path).get("recipe") != recipe_digest:
        raise UserError(f"{directory} holds a run of another recipe or other data; choose another --out or remove it")


def load_state(draft: AnyDraft, optimizer: torch.optim.AdamW, recipe_digest: str, directory: Path) -> int:
    """Restore a run into a fresh draft and optimizer; returns the steps done (0 where nothing was saved).

    Raises:
        UserError: the state is unreadable or belongs to another recipe.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return 0
    refuse_other_run(directory, recipe_digest)
    tensors, metadata = load_tensors(path)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(like(tensors[f"weight/{name}"], parameter))
            moments = {k: tensors[f"{k}/{name}"] for k in ("exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors}
            if moments:
                optimizer.state[parameter] = {
                    "step": tensors[f"step/{name}"],
                    **{k: like(moment, parameter) for k, moment in moments.items()},
                }
        if draft.draft_vocab_ids is not None:
            draft.draft_vocab_ids.copy_(tensors["draft_vocab_ids"])
    return int(metadata["step"])
