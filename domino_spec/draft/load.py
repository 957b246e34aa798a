"""Drafts of any kind: loaded for a target, checked against it, described and saved.

A draft that was made for another target decodes correctly, but nothing that it drafts is accepted, so the pair is
refused. Shapes are always compared. The target's fingerprint is compared if the draft carries one; published drafts do
not, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from domino_spec.draft.checkpoint import CONFIG_FILE, read_draft, read_published, save_draft
from domino_spec.draft.config import SINGLE_LAYER_KINDS, AnyConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.schema import unknown_keys
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.draft.single_layer_checkpoint import is_single_layer, read_single_layer, save_single_layer
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.target.native import can_pack
from domino_spec.target.outline import outline_target

_log = logging.getLogger(__name__)

EMBEDDED_DRAFT = "smollm2-135m-domino"
AnyDraft = Draft | SingleLayerDraft


def draft_directory(name_or_path: str | Path, weights: bool = True) -> Path:
    """Where a draft's files are: the shipped draft's name, a directory, or a hub id (downloaded without any code).

    Args:
        name_or_path: of the draft.
        weights: False downloads its configuration alone.

    Raises:
        UserError: it does not exist, is a file, or cannot be downloaded.
    """
    name = str(name_or_path)
    if name == EMBEDDED_DRAFT:
        directory = Path(__file__).parent.parent / "demo" / EMBEDDED_DRAFT
        if not (directory / CONFIG_FILE).is_file():
            raise UserError(f"this installation does not contain the draft {EMBEDDED_DRAFT}")
        return directory
    path = Path(name)
    if path.is_file():
        raise UserError(f"draft {name} is a file: give the directory that it is in, with config.json and all weights")
    if name == "none" and not path.exists():
        raise UserError(
            "draft none does not exist: to decode without a draft, leave out --draft and give --method none"
        )
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        if not path.is_dir():
            raise UserError(
                f"draft {name} does not exist: give a directory, a hub id such as owner/name, or {EMBEDDED_DRAFT}"
            )
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"] if weights else ["config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot get draft {name} from the hub and it is not a directory here: {reason}") from None


def read_any_draft(directory: Path, *, outline: bool = False) -> AnyDraft:
    """A draft of the kind that its config.json tells; arguments and errors as `checkpoint.read_draft`."""
    read = read_single_layer if is_single_layer(read_published(directory)) else read_draft
    return read(directory, outline=outline)


def save_any_draft(draft: AnyDraft, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a draft in the published layout of its kind; arguments and errors as `checkpoint.save_draft`."""
    save: Callable[..., None] = save_single_layer if draft.kind in SINGLE_LAYER_KINDS else save_draft
    save(draft, directory, dtype)


def empty_draft(config: AnyConfig, draft_vocab_ids: torch.Tensor | None = None) -> AnyDraft:
    """A draft of that shape, its weights not yet read or trained; arguments as of `BaseDraft`."""
    kind: Callable[..., AnyDraft] = SingleLayerDraft if config.kind in SINGLE_LAYER_KINDS else Draft
    return kind(config, draft_vocab_ids)


def load_draft(
    name_or_path: str | Path,
    target: Target,
    *,
    dtype: torch.dtype | str = "auto",
    allow_other_target: bool = False,
) -> AnyDraft:
    """Load a draft of any kind for `target`, on its device.

    Args:
        name_or_path: the shipped draft's name, a directory, or a hub id.
        target: the model it drafts for.
        dtype: "auto" takes the target's.
        allow_other_target: accept a draft trained for other weights of the same shape (a fine-tuned target).

    Raises:
        UserError: it does not exist, cannot be read, holds values that are not finite, or was made for another target.
    """
    draft = read_any_draft(draft_directory(name_or_path))
    check_pairing(draft.config, str(name_or_path), target, allow_other_target)
    if unknown := unknown_keys(draft.config.published):
        _log.warning(
            "draft %s: config.json holds keys that are not known here and have no effect: %s; if one of them changes "
            "what the draft computes, little of what it drafts will be accepted",
            name_or_path,
            ", ".join(unknown),
        )
    draft = draft.to(target.device, target.dtype if isinstance(dtype, str) else dtype)
    check_finite(draft, str(name_or_path))
    draft = draft.bind(target)
    if draft.dtype == torch.float16 and not _sample_logits(draft, target).isfinite().all():
        _log.warning(
            "draft %s overflows in float16, so little or nothing that it drafts is accepted; use bfloat16 or float32",
            name_or_path,
        )
    return draft.pack() if target.packed and can_pack(draft.device, draft.dtype) else draft


def check_finite(draft: AnyDraft, name: str) -> None:
    """Refuse weights that are not finite: nothing that they draft would be accepted.

    Raises:
        UserError: names the tensor, and the type if it could not hold what was saved.
    """
    for tensor_name, tensor in (*draft.named_parameters(), *draft.named_buffers()):
        if not tensor.is_floating_point():
            continue
        least, most = torch.aminmax(tensor)  # NaN if any value is
        if not (least.isfinite() and most.isfinite()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"draft {name}: tensor {tensor_name} holds values that are not finite in {dtype}")


@torch.inference_mode()
def _sample_logits(draft: AnyDraft, target: Target) -> torch.Tensor:
    """Logits after a few tokens, the first of a text among them: its hidden states are the largest."""
    tokens = (torch.arange(8, device=target.device) % target.vocab_size)[None]
    features = target.forward(tokens, target.new_cache(1, 8), draft.feature_layers).features
    assert features is not None
    return draft.trial_logits(tokens, features)


# Does the draft fit the target?


def shape_mismatch(config: AnyConfig, hidden_size: int, vocab_size: int, num_layers: int) -> str | None:
    """The first way in which a draft's shape does not fit a target's, as a phrase naming both sides, or None."""
    for what, draft_side, target_side in (
        ("hidden size", config.target_hidden_size, hidden_size),
        ("vocabulary", config.vocab_size, vocab_size),
        ("number of target layers", config.num_target_layers, num_layers),
    ):
        if draft_side not in (target_side, None):  # None: a published single-layer draft does not say
            return f"the draft was made for {what} {draft_side}, the target has {target_side}"
    return config.tap_mismatch(num_layers)


def check_pairing(
    config: AnyConfig,
    draft_name: str,
    target: Target,
    allow_other_target: bool = False,
    how_to_allow: str = "--allow-other-target",
) -> None:
    """Refuse a draft that was not made for this target.

    Args:
        config: of the draft.
        draft_name: for the message.
        target: to pair it with.
        allow_other_target: accept a differing fingerprint (a fine-tuned target of the same shape).
        how_to_allow: the option or setting that does so, for the message.

    Raises:
        UserError: one sentence that names both sides.
    """
    mismatch = shape_mismatch(config, target.hidden_size, target.vocab_size, target.num_layers)
    if mismatch:
        raise UserError(f"draft {draft_name} does not fit target {target.name}: {mismatch}")
    if config.target_fingerprint is None:
        _log.warning("draft %s does not say which weights it was trained for; only shapes were checked", draft_name)
    elif config.target_fingerprint != target.fingerprint:
        if not allow_other_target:
            raise UserError(
                f"draft {draft_name} was trained for a target with fingerprint {config.target_fingerprint}, but "
                f"{target.name} has {target.fingerprint}; use the matching target, or allow another one "
                f"({how_to_allow}) for a fine-tuned target"
            )
        _log.warning("draft %s was trained for other weights than those of %s", draft_name, target.name)


@dataclass(frozen=True)
class Fit:
    """Whether a draft fits a target."""

    fits: bool
    sentence: str
    """What was compared, and the result."""


def check_fit(config: AnyConfig, draft_name: str, target_name: str) -> Fit:
    """Compare a draft with a target: shapes for any target, the weights' fingerprint for one that is on this machine.

    A target on the hub is compared by its configuration alone, without its weights being downloaded or loaded.

    Raises:
        UserError: the target cannot be read.
    """
    return fit_of(config, draft_name, outline_target(target_name).target)


def fit_of(config: AnyConfig, draft_name: str, target: Target, allow_other_target: bool = False) -> Fit:
    """`check_fit` with a target that is outlined or loaded already.

    Args:
        config: of the draft.
        draft_name: for the sentence.
        target: its fingerprint is empty if it is not known.
        allow_other_target: other weights of the same shape fit, too (a fine-tuned target).
    """
    mismatch = shape_mismatch(config, target.hidden_size, target.vocab_size, target.num_layers)
    if mismatch:
        return Fit(False, f"draft {draft_name} does not fit target {target.name}: {mismatch}")
    if not target.fingerprint:
        return Fit(True, f"fits the shape of {target.name}; its weights were not compared")
    if config.target_fingerprint is None:
        return Fit(True, f"fits the shape of {target.name}; it does not say which weights it was trained for")
    if allow_other_target and config.target_fingerprint != target.fingerprint:
        return Fit(True, f"fits the shape of {target.name}; trained for other weights, which is allowed")
    try:
        check_pairing(config, draft_name, target)
    except UserError as error:
        return Fit(False, str(error))
    return Fit(True, f"fits {target.name}: same shape, same weights")


# What is on disk


@dataclass(frozen=True)
class DraftDescription:
    """A draft checkpoint in words and figures."""

    config: AnyConfig
    method: str
    """`domino` with a head, `dflash` without; `eagle3` or `dart`."""
    dtypes: tuple[str, ...]
    """Types of its parameters as saved."""
    parameters: dict[str, int]
    """Parameters of each part: backbone, gru, w1, w2 (the last three only with a head), or fc, layer, lm_head and
    embed_tokens (if the draft has its own); and total."""
    file_bytes: int
    """Size of its safetensors files."""


def describe_draft(directory: Path) -> DraftDescription:
    """Read a draft and count it.

    Raises:
        UserError: as `checkpoint.read_draft`.
    """
    draft = read_any_draft(directory, outline=True)
    parts = draft.count_parameters()
    return DraftDescription(
        config=draft.config,
        method=draft.kind,
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in draft.parameters()})),
        parameters={**parts, "total": sum(parts.values())},
        file_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
    )
