"""What a draft on disk is (method, shape, conventions, parameters per part, size) and whether it fits a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from domino_spec.config import DraftConfig, SingleLayerConfig, UserError
from domino_spec.draft.load import AnyDraft, read_any_draft
from domino_spec.draft.pairing import check_pairing, shape_mismatch
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.target.model import Target
from domino_spec.target.outline import outline_target


@dataclass(frozen=True)
class DraftDescription:
    """A draft checkpoint in words and figures."""

    config: DraftConfig | SingleLayerConfig
    method: str
    """`domino` with a head, `dflash` without; `eagle3` or `dart`."""
    dtypes: tuple[str, ...]
    """Types of its parameters as saved."""
    parameters: dict[str, int]
    """Parameters of each part: backbone, gru, w1, w2 (the last three only with a head), or fc, layer, lm_head and
    embed_tokens (where the draft has its own); and total."""
    file_bytes: int
    """Size of its safetensors files."""


def describe_draft(directory: Path) -> DraftDescription:
    """Read a draft and count it.

    Raises:
        UserError: as `checkpoint.read_draft`.
    """
    draft = read_any_draft(directory, outline=True)
    method, parts = _parts(draft)
    return DraftDescription(
        config=draft.config,
        method=method,
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in draft.parameters()})),
        parameters={**parts, "total": sum(parts.values())},
        file_bytes=sum(file.stat().st_size for file in directory.glob("*.safetensors")),
    )


def _parts(draft: AnyDraft) -> tuple[str, dict[str, int]]:
    """The draft's method, and how many parameters each of its parts has."""
    if isinstance(draft, SingleLayerDraft):
        ends = {"fc": draft.fc.weight.numel(), "lm_head": draft.lm_head.weight.numel()}
        layer = sum(p.numel() for p in draft.parameters()) - sum(ends.values())  # norms and DART's mask among them
        parts = {"fc": ends["fc"], "layer": layer, "lm_head": ends["lm_head"]}
        own = draft.embed_tokens
        return draft.config.method, parts if own is None else {**parts, "embed_tokens": own.numel()}
    parts = {"backbone": sum(p.numel() for p in draft.backbone.parameters())}
    if draft.head is None:
        return "dflash", parts
    down, _, up = draft.head.embed_proj
    parts["gru"] = sum(p.numel() for p in draft.head.prefix_gru.parameters())
    parts["w1"] = sum(p.numel() for p in down.parameters())
    parts["w2"] = sum(p.numel() for p in up.parameters())
    return "domino", parts


@dataclass(frozen=True)
class Fit:
    """Whether a draft fits a target."""

    fits: bool
    sentence: str
    """What was compared and what came out."""


def check_fit(config: DraftConfig | SingleLayerConfig, draft_name: str, target_name: str) -> Fit:
    """Compare a draft with a target: shapes for any target, the weights' fingerprint for one that is on this machine.

    A target on the hub is compared by its configuration alone, without its weights being downloaded or loaded.

    Raises:
        UserError: the target cannot be read.
    """
    return fit_of(config, draft_name, outline_target(target_name).target)


def fit_of(
    config: DraftConfig | SingleLayerConfig, draft_name: str, target: Target, allow_other_target: bool = False
) -> Fit:
    """`check_fit` with a target that is outlined or loaded already.

    Args:
        config: of the draft.
        draft_name: for the sentence.
        target: its fingerprint is empty where it is not known.
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
