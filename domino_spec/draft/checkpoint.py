"""Published checkpoint layouts: config.json and safetensors to a `Draft`, and back unchanged.

Tensor names, dtypes and configuration keys survive a round trip, keys that this package does not know included. Only
safetensors is read: never a pickle, never code from the checkpoint (DESIGN section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from domino_spec.config import DraftConfig, HeadConfig, UserError, default_target_layer_ids
from domino_spec.draft.model import Draft
from domino_spec.files import load_tensors, outline_tensors, read_json, save_tensors, write_json

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
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
        UserError: it is not a DFlash or Domino draft, or lacks a setting, or asks for something unsupported.
    """
    architectures = published.get("architectures") or ["none"]
    nested = published.get("dflash_config")
    if architectures[0] not in ARCHITECTURES or not isinstance(nested, Mapping):
        raise UserError(
            f"{where} is not a DFlash or Domino draft (architectures {architectures}); it may be an ordinary model"
        )

    def need(source: Mapping[str, Any], key: str) -> Any:
        if source.get(key) is None:
            raise UserError(f"{where}: missing key {key!r}")
        return source[key]

    hidden_size, heads = need(published, "hidden_size"), need(published, "num_attention_heads")
    num_layers, num_target_layers = need(published, "num_hidden_layers"), need(published, "num_target_layers")
    layer_types = published.get("layer_types")
    if layer_types and set(layer_types) != {"full_attention"}:
        raise UserError(f"{where}: layer_types {sorted(set(layer_types))} are not supported, only full_attention")
    if published.get("use_sliding_window") and published.get("sliding_window"):
        raise UserError(f"{where}: sliding_window {published['sliding_window']} is not supported in a draft")
    if published.get("attention_bias"):
        raise UserError(f"{where}: attention_bias is not supported in a draft")
    if published.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {published['hidden_act']!r} is not supported in a draft, only silu")
    head = None
    projector = nested.get("projector_type")
    if projector == "domino":
        head = HeadConfig(
            gru_hidden_dim=need(nested, "gru_hidden_dim"),
            low_rank=need(nested, "emb_dim"),
            pure_draft_prefix_len=nested.get("pure_draft_prefix_len", 0),
        )
    elif projector not in (None, "dflash", "none"):
        raise UserError(f"{where}: projector_type {projector!r} is not supported, only domino")
    theta, rope = parse_rope(published, where)
    try:
        return DraftConfig(
            hidden_size=hidden_size,
            intermediate_size=need(published, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=published.get("num_key_value_heads") or heads,
            head_dim=published.get("head_dim") or hidden_size // heads,
            vocab_size=need(published, "vocab_size"),
            num_target_layers=num_target_layers,
            target_layer_ids=tuple(
                nested.get("target_layer_ids") or default_target_layer_ids(num_target_layers, num_layers)
            ),
            mask_token_id=need(nested, "mask_token_id"),
            block_size=need(published, "block_size"),
            shift_label=bool(nested.get("shift_label", False)),
            short_blocks=bool(nested.get("short_blocks", False)),
            head=head,
            draft_vocab_size=nested.get("draft_vocab_size"),
            rms_norm_eps=published.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=rope,
            max_position_embeddings=published.get("max_position_embeddings", 32768),
            target_fingerprint=nested.get("target_fingerprint"),
            published=dict(published),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_rope(published: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base of RoPE and, where it is scaled, its settings beyond that, of a published configuration.

    Raises:
        UserError: an unknown kind of scaling.
    """
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or published.get("rope_theta") or 10000.0
    rope_type = rope.setdefault("rope_type", rope.pop("type", "default"))  # older configurations say "type"
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        raise UserError(f"{where}: rope_type {rope_type!r} is not supported in a draft")
    return float(theta), None if rope_type == "default" else rope


def published_config(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration file of a draft: as it was read, or in the published layout for one trained here."""
    if config.published:
        return dict(config.published)
    nested: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "shift_label": config.shift_label,
    }
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
    return {
        "architectures": ["DominoDraftModel" if config.head is not None else "DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "dflash_config": nested,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling else None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def draft_tensors(draft: Draft) -> dict[str, Tensor]:
    """The draft's tensors under their published names.

    Raises:
        ValueError: the draft is packed for decoding.
    """
    if draft.packed:
        raise ValueError("a draft packed for decoding cannot be saved; load it with a target that is not packed")
    tensors = {name: p for name, p in draft.backbone.state_dict().items() if not name.startswith("rotary_emb.")}
    tensors["fc.weight"] = draft.backbone.fc_weight
    if draft.head is not None:
        prefix = _OLD_HEAD_PREFIX if draft.nested_head_names else ""
        tensors |= {prefix + name: p for name, p in draft.head.state_dict().items()}
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
    published = read_json(directory / CONFIG_FILE)
    if not isinstance(published, dict):
        raise UserError(f"{directory / CONFIG_FILE}: expected an object")
    return published


def read_draft(directory: Path, *, outline: bool = False) -> Draft:
    """A draft from a directory, its tensors in the dtype they were saved in; not bound to a target yet.

    Args:
        directory: of the draft.
        outline: read headers alone; parameters are on the meta device.

    Raises:
        UserError: a missing, truncated or corrupted file, a pickle checkpoint, or tensors that do not fit the
            configuration.
    """
    config = read_config(directory)
    tensors = read_weights(directory, outline=outline)
    nested_head_names = any(name.startswith(_OLD_HEAD_PREFIX) for name in tensors)
    tensors = {name.removeprefix(_OLD_HEAD_PREFIX): tensor for name, tensor in tensors.items()}
    vocabulary = tensors.pop(_VOCABULARY, None)
    if (vocabulary is None) != (config.draft_vocab_size is None):
        raise UserError(
            f"{directory}: draft_vocab_size and the tensor draft_vocab_ids must both be there or both be missing"
        )
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
    draft.nested_head_names = nested_head_names
    return draft.requires_grad_(False).eval()


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: Path) -> None:
    """Compare tensors with the names and shapes that a configuration asks for.

    Raises:
        UserError: one is missing, has another shape, or is not expected.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, but {CONFIG_FILE} means {tuple(shape)}"
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
    if (directory / WEIGHTS_FILE).is_file():
        return read(directory / WEIGHTS_FILE)
    if (directory / INDEX_FILE).is_file():
        files = sorted(set(read_json(directory / INDEX_FILE)["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= read(directory / Path(file).name)
        return tensors
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern)]
    if pickles:
        raise UserError(
            f"{directory} holds a pickle checkpoint ({pickles[0]}), which is never loaded; {_HOW_TO_CONVERT}"
        )
    raise UserError(f"{directory} holds no {WEIGHTS_FILE}; if it is published as a pickle, {_HOW_TO_CONVERT}")
