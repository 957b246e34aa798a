"""A finished run to a draft that other tools read: last stage of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from domino_spec.draft.checkpoint import ARCHITECTURES, CONFIG_FILE, read_published
from domino_spec.draft.load import AnyDraft, read_any_draft, save_any_draft
from domino_spec.draft.single_layer_checkpoint import is_single_layer
from domino_spec.settings import UserError, shortened
from domino_spec.training.state import STATE_FILE, read_state


def export_draft(run: Path, out: Path, dtype: torch.dtype) -> AnyDraft:
    """Write the draft of a training run in the published layout, read back before it is called done.

    Args:
        run: directory of the run (`train --out`).
        out: directory of the draft; made when missing.
        dtype: bfloat16 copies what the run saved; float32 takes the master weights of its last state.

    Raises:
        UserError: the run holds no draft or one that other readers would misread, a file of it cannot be read or is
            damaged, the draft is not that of the run's last state, or `out` holds another model or cannot be written.
    """
    source = run / "draft"
    if not (source / CONFIG_FILE).is_file():
        raise UserError(f"{run} holds no trained draft: give the directory that `domino-spec train` wrote with --out")
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the run's own draft; choose another directory")
    _check_out(out)
    draft = read_any_draft(source)
    draft.config.check_readers(str(source))
    if dtype == torch.float32 or (run / STATE_FILE).is_file():
        masters = _master_weights(draft, run)
    if dtype == torch.float32:
        for name, parameter in draft.float().named_parameters():
            parameter.data = masters[name]
        # The published configuration names the type of the tensors beside it.
        published = {**draft.config.published, "dtype": "float32"}
        draft.config = dataclasses.replace(draft.config, published=published)  # type: ignore[type-var,assignment]
    save_any_draft(draft, out)
    return read_any_draft(out)


def _check_out(out: Path) -> None:
    """Refuse a directory of another model, such as the target's: its configuration and weights would be lost."""
    if not (out / CONFIG_FILE).is_file():
        return
    published = read_published(out)
    architectures = published.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if not is_single_layer(published) and not any(name in ARCHITECTURES for name in names):
        raise UserError(
            f"--out {out} holds another model, which the draft would overwrite: expected a draft's {CONFIG_FILE} or "
            f"none, found architectures {shortened(architectures)}; choose another directory"
        )


def _master_weights(draft: AnyDraft, run: Path) -> dict[str, Tensor]:
    """The float32 weights that a run's bfloat16 ones were rounded from, by parameter.

    Raises:
        UserError: the state cannot be read, is damaged, or is another than the draft was saved from.
    """
    tensors, masters = read_state(run / STATE_FILE).tensors, {}
    for name, parameter in draft.named_parameters():
        master = tensors.get(f"weight/{name}")
        if master is not None and name in ("backbone.fc.weight", "fc.weight") and "feature_scale" in tensors:
            master = master * tensors["feature_scale"]
        if master is None or not torch.equal(master.bfloat16(), parameter.bfloat16()):
            raise UserError(
                f"{run / STATE_FILE} is not the state that {run / 'draft'} was saved from ({name} differs): let the "
                "training go on, or give its command again, which writes the draft of its last state"
            )
        masters[name] = master
    return masters
