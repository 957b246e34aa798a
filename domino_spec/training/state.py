"""The state of a training run on disk: everything that the next step depends on, written atomically.

Data order, anchors and schedules are functions of seed and step, so weights, optimizer moments and the step number
are all there is to save, and a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.draft.model import Draft
from domino_spec.files import load_tensors, save_tensors

STATE_FILE = "state.safetensors"


def save_state(draft: Draft, optimizer: torch.optim.AdamW, step: int, recipe_digest: str, directory: Path) -> None:
    """Write weights, moments and `step` (optimizer steps done).

    Raises:
        UserError: it could not be written; the previous state survives.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in draft.named_parameters():
        tensors[f"weight/{name}"] = parameter
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    if draft.draft_vocab_ids is not None:
        tensors["draft_vocab_ids"] = draft.draft_vocab_ids
    if draft.backbone.feature_scale is not None:
        tensors["feature_scale"] = draft.backbone.feature_scale  # export needs it: it belongs into fc.weight
    save_tensors(tensors, directory / STATE_FILE, {"step": str(step), "recipe": recipe_digest})


def load_state(draft: Draft, optimizer: torch.optim.AdamW, recipe_digest: str, directory: Path) -> int:
    """Restore a run into a fresh draft and optimizer; returns the steps done (0 where nothing was saved).

    Raises:
        UserError: the state is unreadable or belongs to another recipe.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    if metadata.get("recipe") != recipe_digest:
        raise UserError(f"{directory} holds a run of another recipe or other data; choose another --out or remove it")
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(tensors[f"weight/{name}"])
            moments = {k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors}
            if moments:
                optimizer.state[parameter] = moments
        if draft.draft_vocab_ids is not None:
            draft.draft_vocab_ids.copy_(tensors["draft_vocab_ids"])
    return int(metadata["step"])
