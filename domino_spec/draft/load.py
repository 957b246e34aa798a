"""Drafts of any kind: loaded from the package, a directory or the hub, checked against a target; and written."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from domino_spec.config import UserError
from domino_spec.draft.checkpoint import CONFIG_FILE, read_draft, read_published, save_draft
from domino_spec.draft.model import Draft
from domino_spec.draft.pairing import check_pairing
from domino_spec.draft.schema import unknown_keys
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.draft.single_layer_checkpoint import is_single_layer, read_single_layer, save_single_layer
from domino_spec.target.model import Target
from domino_spec.target.packing import can_pack

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
    save = save_single_layer if isinstance(draft, SingleLayerDraft) else save_draft
    save(draft, directory, dtype)  # type: ignore[arg-type]


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
    own_dtype = target.dtype if isinstance(dtype, str) else dtype
    draft = draft.to(target.device, own_dtype)
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
        least, most = torch.aminmax(tensor)  # NaN wherever there is one
        if not (least.isfinite() and most.isfinite()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"draft {name}: tensor {tensor_name} holds values that are not finite in {dtype}")


@torch.inference_mode()
def _sample_logits(draft: AnyDraft, target: Target) -> torch.Tensor:
    """Logits after a few tokens, the first of a text among them: its hidden states are the largest."""
    tokens = (torch.arange(8, device=target.device) % target.vocab_size)[None]
    positions = torch.arange(16, device=target.device)[None]
    taps = draft.layers if isinstance(draft, SingleLayerDraft) else draft.config.target_layer_ids
    features = target.forward(tokens, target.new_cache(1, 8), taps).features
    assert features is not None
    if isinstance(draft, SingleLayerDraft):
        fused = draft.fuse(features.to(draft.dtype))
        pairs, causal = draft.pair(tokens, fused), torch.ones(8, 8, dtype=torch.bool, device=target.device).tril()
        cached = PairKV(*(part[:, :, :0] for part in draft.keys_values(pairs, positions[:, :8])))
        return draft.logits(draft(pairs, fused, positions[:, :8], cached, causal[None, None])[0])
    context = draft.backbone.project_context(draft.read_features(features).to(draft.dtype), positions[:, :8])
    seen = torch.ones(1, 1, 8, 16, dtype=torch.bool, device=target.device)
    return draft.base_logits(draft.backbone(draft.block_embeddings(tokens[:, -1], 8), positions[:, 8:], context, seen))
