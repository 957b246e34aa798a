"""Published checkpoint layouts: config.json and safetensors to a `Draft`, and back unchanged.

Tensor names, dtypes and configuration keys survive a round trip, keys that this package does not know included. Only
safetensors is read: never a pickle, never code from the checkpoint (docs/design.md, section 4).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domino_spec.draft.config import DraftConfig, HeadConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.schema import (
    AFTER_NORM,
    BEFORE_NORM,
    ROPE_NAMES,
    BlockKeys,
    DFlashKeys,
    names_of,
    published_layers,
    read_keys,
    read_rope,
    refuse_misplaced,
    refuse_unsupported,
)
from domino_spec.files import (
    WEIGHTS_FILE,
    gather_tensors,
    load_tensors,
    outline_tensors,
    read_object,
    save_tensors,
    weight_files,
    write_json,
)
from domino_spec.settings import UserError, shortened

_log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
ARCHITECTURES = ("DFlashDraftModel", "DominoDraftModel")
_HEAD_PREFIXES = ("prefix_gru.", "embed_proj.")
_OLD_HEAD_PREFIX = "logit_head."
_VOCABULARY = "draft_vocab_ids"
_HOW_TO_CONVERT = (
    'convert it to safetensors, where you trust it: python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('pytorch_model.bin', map_location='cpu', weights_only=True), 'model.safetensors')\""
)


def parse_config(published: Mapping[str, Any], where: str = "config.json") -> DraftConfig:
    """Our settings from a published configuration.

    Raises:
        UserError: it is not a DFlash or Domino draft, or a key is missing, wrong, contradicts another, or asks for
            something unsupported.
    """
    architectures = published.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else "none"
    nested = published.get("dflash_config")
    if first not in ARCHITECTURES or not isinstance(nested, Mapping):
        raise UserError(
            f"{where} is not a DFlash or Domino draft (architectures {shortened(architectures)}); it may be an "
            "ordinary model"
        )
    refuse_unsupported(published, where, block=True)
    refuse_unsupported(nested, f"{where}: dflash_config", block=True)
    # Layers are described beside `dflash_config`. In some files, keys that belong into it are beside it.
    of_layers = names_of(BlockKeys) | set(ROPE_NAMES)
    refuse_misplaced(nested, published, of_layers, f"{where}: dflash_config", "beside dflash_config")
    beside = {name: published[name] for name in names_of(DFlashKeys) if published.get(name) is not None}
    given = {name: value for name, value in nested.items() if value is not None}
    refuse_misplaced(beside, given, set(given) & set(beside), where, "in dflash_config")
    if beside.get("draft_vocab_size") == published.get(
        "vocab_size"
    ):  # some files state the size of the whole vocabulary
        beside.pop("draft_vocab_size", None)
    keys = read_keys(BlockKeys, {**published, "dflash_config": {**beside, **given}}, where)
    rope = read_rope(published, where, default_theta=None)
    try:
        keys.refuse_window(used_if_unsaid=False)
        return _draft_config(keys, {**keys.shape(), **rope, "published": dict(published)})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _draft_config(keys: BlockKeys, shape: dict[str, Any]) -> DraftConfig:
    nested = keys.dflash_config
    config = DraftConfig(
        **shape,
        num_hidden_layers=keys.num_hidden_layers,
        num_target_layers=keys.num_target_layers,
        target_layer_ids=_stated(nested, "target_layer_ids"),
        mask_token_id=_stated(nested, "mask_token_id"),
        block_size=keys.block_size,
        shift_label=bool(nested.shift_label),
        short_blocks=nested.short_blocks,
        head=_head_config(nested),
        draft_vocab_size=nested.draft_vocab_size,
        target_fingerprint=nested.target_fingerprint,
    )
    return replace(config, last_tap_normed=config.last_layer_tap is not None and _stated_tap(nested) == AFTER_NORM)


def _head_config(nested: DFlashKeys) -> HeadConfig | None:
    projector = nested.projector_type
    if projector in (None, "dflash", "none"):
        return None
    if projector != "domino":
        raise UserError(f"dflash_config.projector_type: expected domino or null, found {shortened(projector)}")
    _stated(nested, "shift_label")
    return HeadConfig(
        gru_hidden_dim=_stated(nested, "gru_hidden_dim"),
        low_rank=_stated(nested, "emb_dim"),
        pure_draft_prefix_len=_stated(nested, "pure_draft_prefix_len"),
    )


def _stated(nested: DFlashKeys, name: str) -> Any:
    """A setting that must be stated, because readers differ in what they assume."""
    value = getattr(nested, name)
    if value is None:
        raise UserError(f"missing key {name!r} of dflash_config; {_MEANING[name]}")
    return value


_MEANING = {
    "target_layer_ids": "add the target's layers that the draft was trained to read, counted from 0",
    "mask_token_id": "add the token that it was trained with in empty slots",
    "gru_hidden_dim": "add the width of the head's GRU",
    "emb_dim": "add the head's low rank",
    "pure_draft_prefix_len": "add how many drafts the head leaves uncorrected (1 in the released ones)",
    "shift_label": "add true if slot 0 predicts the first draft (as in the released ones), false if slot 1 does",
}


def _stated_tap(nested: DFlashKeys) -> str:
    """Whether the target's last layer is read before its final norm or after it.

    Files of others do not say: the released code of Domino, of DFlash and of transformers reads `hidden_states[N]`,
    which is normed. Drafts made here carry a fingerprint, and the first of them read the layer's output as it is
    without saying so.
    """
    return nested.last_layer_tap or (AFTER_NORM if nested.target_fingerprint is None else BEFORE_NORM)


def published_config(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration file of a draft: as it was read, or in the published layout for one trained here."""
    if config.published:
        kept = dict(config.published)
        if config.last_layer_tap and config.target_fingerprint is not None:  # made here, perhaps before it was said
            kept["dflash_config"] = {**kept["dflash_config"], "last_layer_tap": config.last_layer_tap}
        return kept
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "shift_label": config.shift_label,
    }
    if config.last_layer_tap:
        nested["last_layer_tap"] = config.last_layer_tap
    if config.short_blocks:
        nested["short_blocks"] = True
    if config.head is not None:
        nested |= {
            "projector_type": "domino",
            "emb_dim": config.head.low_rank,
            "gru_hidden_dim": config.head.gru_hidden_dim,
            "pure_draft_prefix_len": config.head.pure_draft_prefix_len,
        }
    if config.draft_vocab_size is not None:
        nested["draft_vocab_size"] = config.draft_vocab_size
    if config.target_fingerprint is not None:
        nested["target_fingerprint"] = config.target_fingerprint
    rest = {
        **published_layers(config, str(dtype).removeprefix("torch.")),
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "dflash_config": nested,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "num_target_layers": config.num_target_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    architecture = "DFlashDraftModel" if config.head is None else "DominoDraftModel"
    return {"architectures": [architecture], "model_type": "qwen3", **dict(sorted(rest.items()))}


def draft_tensors(draft: Draft) -> dict[str, Tensor]:
    """The draft's tensors under their published names.

    Raises:
        ValueError: the draft is packed for decoding.
    """
    if draft.packed:
        raise ValueError("a draft packed for decoding cannot be saved; load it with a target that is not packed")
    tensors = {name: p for name, p in draft.backbone.state_dict().items() if not name.startswith("rotary_emb.")}
    tensors["fc.weight"] = draft.fc_weight
    if draft.head is not None:
        tensors |= {draft.layout + name: p for name, p in draft.head.state_dict().items()}
    if draft.draft_vocab_ids is not None:
        tensors[_VOCABULARY] = draft.draft_vocab_ids
    return tensors


def save_draft(draft: Draft, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, each atomically.

    Args:
        draft: what to write.
        directory: made when missing.
        dtype: of the floating-point tensors; None keeps what they are.

    Raises:
        UserError: a file could not be written; what was there before survives.
    """
    published = published_config(draft.config, dtype or draft.dtype)
    write_checkpoint(draft_tensors(draft), published, Path(directory), dtype)


def write_checkpoint(
    tensors: Mapping[str, Tensor], published: Mapping[str, Any], directory: Path, dtype: torch.dtype | None
) -> None:
    """Write tensors and configuration of a draft of any kind; arguments and errors as `save_draft`."""
    converted = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_tensors(converted, directory / WEIGHTS_FILE)
    write_json(published, directory / CONFIG_FILE)


def read_config(directory: Path) -> DraftConfig:
    """The configuration of a DFlash or Domino draft directory.

    Raises:
        UserError: the directory or its config.json is missing or malformed.
    """
    return parse_config(read_published(directory), str(directory / CONFIG_FILE))


def read_published(directory: Path) -> dict[str, Any]:
    """The configuration file of a draft directory.

    Raises:
        UserError: the directory or its config.json is missing or malformed.
    """
    if not directory.is_dir():
        raise UserError(f"draft {directory} does not exist")
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not a draft: it has no {CONFIG_FILE}")
    return read_object(directory / CONFIG_FILE)


def read_draft(directory: Path, *, outline: bool = False) -> Draft:
    """A draft from a directory, its tensors in the dtype they were saved in; not bound to a target yet.

    Args:
        directory: of the draft.
        outline: read headers alone; parameters are on the meta device.

    Raises:
        UserError: a missing, truncated or corrupted file, a pickle checkpoint, or tensors that do not fit the
            configuration.
    """
    if not outline:
        read_draft(directory, outline=True)  # what does not fit is refused before gigabytes are read
    config = read_config(directory)
    saved = read_weights(directory, outline=outline)
    layout = _OLD_HEAD_PREFIX if any(name.startswith(_OLD_HEAD_PREFIX) for name in saved) else ""
    tensors = {name.removeprefix(_OLD_HEAD_PREFIX): tensor for name, tensor in saved.items()}
    if len(tensors) < len(saved):
        raise UserError(f"{directory / WEIGHTS_FILE}: the head is there twice, with {_OLD_HEAD_PREFIX} and without")
    vocabulary = tensors.pop(_VOCABULARY, None)
    if (vocabulary is None) != (config.draft_vocab_size is None):
        raise UserError(
            f"{directory}: draft_vocab_size and the tensor draft_vocab_ids must both be there or both be missing"
        )
    if vocabulary is not None:
        check_vocabulary(vocabulary, config, directory / WEIGHTS_FILE)
    with torch.device("meta"):
        draft = Draft(config, None if vocabulary is None else torch.empty_like(vocabulary, device="meta"))
    expected = {name: tensor.shape for name, tensor in draft_tensors(draft).items() if name != _VOCABULARY}
    check_tensors(tensors, expected, directory / WEIGHTS_FILE)
    with torch.device("meta") if outline else nullcontext():
        draft = Draft(config, vocabulary)
    head = {name: t for name, t in tensors.items() if name.startswith(_HEAD_PREFIXES)}
    draft.backbone.load_state_dict({n: t for n, t in tensors.items() if n not in head}, strict=False, assign=True)
    if draft.head is not None:
        draft.head.load_state_dict(head, assign=True)
    draft.layout = layout
    return draft.requires_grad_(False).eval()


def check_vocabulary(token_ids: Tensor, config: DraftConfig, where: Path) -> None:
    """Refuse what is not a list of `draft_vocab_size` tokens of the target, ascending and so all different.

    With a token twice, a tree would hold two siblings alike and draw more of the target's distribution than there is.

    Raises:
        UserError: says what was expected and what was found.
    """
    if token_ids.dtype != torch.int64 or token_ids.shape != (config.draft_vocab_size,):
        raise UserError(
            f"{where}: tensor {_VOCABULARY}: expected int64 [{config.draft_vocab_size}] (draft_vocab_size), found "
            f"{_dtype_name(token_ids)} {list(token_ids.shape)}"
        )
    least, most = int(token_ids.min()), int(token_ids.max())
    if least < 0 or most >= config.vocab_size:
        raise UserError(
            f"{where}: tensor {_VOCABULARY}: expected tokens from 0 to {config.vocab_size - 1}, found "
            f"{least if least < 0 else most}"
        )
    if (falling := (token_ids.diff() <= 0).nonzero()).numel():
        place = int(falling[0, 0])
        raise UserError(
            f"{where}: tensor {_VOCABULARY}: expected ascending tokens, found {int(token_ids[place])} before "
            f"{int(token_ids[place + 1])}"
        )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: Path) -> None:
    """Compare tensors with the names and shapes that a configuration asks for.

    Raises:
        UserError: one is missing, has another shape or no floating-point type, or is not expected.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, but {CONFIG_FILE} means {tuple(shape)}"
            )
        dtype = tensors[name].dtype
        if name != _VOCABULARY and not (dtype.is_floating_point and dtype.itemsize >= 2):
            raise UserError(
                f"{where}: tensor {name}: expected floating point of 16 bits or more, found "
                f"{_dtype_name(tensors[name])}; quantised drafts are not supported"
            )
    if unknown := sorted(set(tensors) - set(expected)):
        raise UserError(f"{where}: unexpected tensor {unknown[0]}")


def read_weights(directory: Path, *, outline: bool = False) -> dict[str, Tensor]:
    """All tensors of a draft directory, from one safetensors file or several.

    Args:
        directory: of the draft.
        outline: read headers alone (`files.outline_tensors`).

    Raises:
        UserError: there is none, it is truncated or corrupted, or there are pickles only.
    """
    read = outline_tensors if outline else lambda path: load_tensors(path)[0]
    if files := weight_files(directory):
        return gather_tensors(files, read)
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern)]
    if pickles:
        raise UserError(
            f"{directory} holds a pickle checkpoint ({pickles[0]}), which is never loaded; {_HOW_TO_CONVERT}"
        )
    raise UserError(f"{directory} holds no {WEIGHTS_FILE}; if it is published as a pickle, {_HOW_TO_CONVERT}")
