"""Published layouts of EAGLE-3 and DART drafts: config.json and safetensors to a `SingleLayerDraft`, and back.

Three layouts are read: EAGLE-3's own (a Llama configuration with `draft_vocab_size`, tensors `midlayer.*`), that of
speculators (the layer's configuration nested, tensors `layers.0.*`), and DART's (EAGLE-3's with `draft_length` and
`midlayer.mask_rep`). What they do not hold (the target's layers and fingerprint, the steps of training) stands under
the key `domino_spec`, which other readers ignore.

The draft vocabulary stands in files as offsets: `d2t[i] + i` is the token that row i of the LM head stands for, and
`t2d` says of every token whether it is one of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domino_spec.draft.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensors,
    read_published,
    read_weights,
    write_checkpoint,
)
from domino_spec.draft.config import EXTRA_KEY, FEATURE_LEVELS, SingleLayerConfig
from domino_spec.draft.schema import (
    NESTED_LAYER,
    ROPE_NAMES,
    LayerKeys,
    PairKeys,
    names_of,
    published_layers,
    read_keys,
    read_rope,
    refuse_misplaced,
    refuse_unsupported,
)
from domino_spec.draft.single_layer import SingleLayerDraft, TensorLayout
from domino_spec.settings import UserError, found, require

ARCHITECTURES = {"eagle3": "LlamaForCausalLMEagle3", "dart": "LlamaForCausalLMDart"}
PUBLISHED_STEPS = 7
"""Steps of EAGLE-3's training-time test, if a checkpoint does not say."""
_LAYER, _EMBEDDING, _D2T, _T2D, _MASK = "midlayer", "embed_tokens.weight", "d2t", "t2d", "mask_rep"
_DEEPSPEC = (
    "an EAGLE-3 draft of DeepSpec's kind (five layers of the target, norms of queries and keys), which is another "
    "model than the published EAGLE-3 and not supported"
)


def is_single_layer(published: Mapping[str, Any]) -> bool:
    """Whether a configuration is an EAGLE-3 or DART draft's; EAGLE's released files name an ordinary Llama."""
    if isinstance(published.get("dflash_config"), Mapping):
        return False
    architectures = published.get("architectures")
    names = architectures if isinstance(architectures, list) else ()
    return (
        published.get("draft_length") is not None
        or published.get("draft_vocab_size") is not None
        or published.get("speculators_model_type") == "eagle3"
        or any("eagle3" in str(name).lower() for name in names)
    )


def parse_single_layer(published: Mapping[str, Any], where: str = CONFIG_FILE) -> SingleLayerConfig:
    """Our settings from a published configuration.

    If `head_dim` is left out, hidden size over heads is assumed, and `read_single_layer` compares the tensors. If the
    base of RoPE is left out, it is Llama's, 10,000, as for the other readers of these layouts.

    Raises:
        UserError: a key is missing, wrong, contradicts another, or asks for something unsupported.
    """
    layer, of_layer = published, where
    if published.get(NESTED_LAYER) is not None:
        layer, of_layer = published[NESTED_LAYER], f"{where}: {NESTED_LAYER}"
        if not isinstance(layer, Mapping):
            raise UserError(f"{of_layer}: expected mapping, found {found(layer)}")
        refuse_unsupported(layer, of_layer, block=False)
        of_layers = names_of(LayerKeys) | set(ROPE_NAMES)
        refuse_misplaced(published, layer, of_layers, where, f"in {NESTED_LAYER}")
        refuse_misplaced(layer, published, names_of(PairKeys), of_layer, f"beside {NESTED_LAYER}")
    refuse_unsupported(published, where, block=False)
    shape, keys = read_keys(LayerKeys, layer, of_layer), read_keys(PairKeys, published, where)
    extra, rope = keys.domino_spec, read_rope(layer, of_layer, default_theta=10000.0)
    try:
        shape.refuse_window(used_if_unsaid=True)
        require(
            shape.num_hidden_layers == 1,
            f"an EAGLE-3 or DART draft has one layer, num_hidden_layers is {shape.num_hidden_layers}",
        )
        taps = _target_layer_ids(keys)
        require(len(taps or ()) <= FEATURE_LEVELS, f"this is {_DEEPSPEC}")
        return SingleLayerConfig(
            kind="eagle3" if keys.draft_length is None else "dart",
            **shape.shape(),
            **rope,
            target_hidden_size=keys.target_hidden_size or shape.hidden_size,
            target_layer_ids=taps,
            num_target_layers=extra.num_target_layers,
            block_size=(extra.ttt_length or PUBLISHED_STEPS) if keys.draft_length is None else keys.draft_length + 1,
            draft_vocab_size=keys.draft_vocab_size,
            target_fingerprint=extra.target_fingerprint,
            published=dict(published),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _target_layer_ids(keys: PairKeys) -> tuple[int, ...] | None:
    """Layers whose outputs are read, by whichever convention the file names them; None if it does not.

    Raises:
        UserError: two keys name different layers.
    """
    inputs = keys.eagle_aux_hidden_state_layer_ids
    stated = {
        f"{EXTRA_KEY}.target_layer_ids": keys.domino_spec.target_layer_ids,
        "target_layer_ids": keys.target_layer_ids,
        # As SGLang reads it: layers whose outputs are read.
        "eagle_config.eagle_aux_hidden_state_layer_ids": keys.eagle_config.eagle_aux_hidden_state_layer_ids,
        # As vLLM reads it: layers whose inputs are read, so the output of the layer before.
        "eagle_aux_hidden_state_layer_ids": None if inputs is None else tuple(i - 1 for i in inputs),
    }
    taps = {name: ids for name, ids in stated.items() if ids is not None}
    if len(set(taps.values())) > 1:
        (first, ids), (second, others) = list(taps.items())[:2]
        raise UserError(f"{first} means the outputs of layers {list(ids)}, but {second} those of {list(others)}")
    return next(iter(taps.values()), None)


def published_single_layer(config: SingleLayerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration file of a draft: as it was read, or in the published layout for one trained here."""
    if config.published:
        kept = dict(config.published)
        if EXTRA_KEY in kept and config.target_hidden_size == config.hidden_size:
            kept.pop("target_hidden_size", None)  # the first drafts made here had it
        return kept
    assert config.target_layer_ids is not None
    extra: dict[str, Any] = {
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
        "target_fingerprint": config.target_fingerprint,
    }
    rest = {
        **published_layers(config, str(dtype).removeprefix("torch.")),
        "draft_vocab_size": config.logits_size,
    }
    if config.kind == "dart":
        rest["draft_length"] = config.num_masks
    else:
        extra["ttt_length"] = config.block_size
    if config.target_hidden_size != config.hidden_size:
        # The released EAGLE takes this key for a sign that the draft has an embedding of its own, and reads none.
        rest["target_hidden_size"] = config.target_hidden_size
    architecture = ARCHITECTURES[config.kind]
    return {"architectures": [architecture], "model_type": "llama", **dict(sorted(rest.items())), EXTRA_KEY: extra}


def single_layer_tensors(draft: SingleLayerDraft) -> dict[str, Tensor]:
    """The draft's tensors under their published names.

    Raises:
        ValueError: the draft is packed for decoding.
    """
    if draft.packed:
        raise ValueError("a draft packed for decoding cannot be saved; load it with a target that is not packed")
    layout, config = draft.layout, draft.config
    tensors = dict(draft.state_dict())
    for name in ("draft_vocab_ids", _MASK):
        tensors.pop(name, None)
    tensors = {
        f"{layout.layer}.{name.removeprefix(_LAYER + '.')}" if name.startswith(_LAYER + ".") else name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("rotary_emb.")
    }
    tensors["fc.weight"] = draft.fc_weight
    if draft.mask_rep is not None:
        tensors[f"{layout.layer}.{_MASK}"] = draft.mask_rep
    if draft.embed_tokens is not None:
        tensors[_EMBEDDING] = draft.embed_tokens
    if (ids := draft.draft_vocab_ids) is not None:
        tensors[_D2T] = (ids - torch.arange(len(ids), device=ids.device)).to(layout.d2t)
        if layout.t2d is not None:
            tensors[_T2D] = _membership(ids, config.vocab_size).to(layout.t2d)
    return tensors


def _membership(token_ids: Tensor, vocab_size: int) -> Tensor:
    known = torch.zeros(vocab_size, dtype=torch.bool, device=token_ids.device)
    known[token_ids] = True
    return known


def save_single_layer(draft: SingleLayerDraft, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, each atomically.

    Args:
        draft: what to write; bound to its target, unless it was read from a file.
        directory: made when missing.
        dtype: of the floating-point tensors; None keeps what they are.

    Raises:
        UserError: a file could not be written; what was there before survives.
    """
    published = published_single_layer(draft.config, dtype or draft.dtype)
    write_checkpoint(single_layer_tensors(draft), published, Path(directory), dtype)


def read_single_layer(directory: Path, *, outline: bool = False) -> SingleLayerDraft:
    """A draft from a directory, its tensors in the dtype they were saved in; not bound to a target yet.

    Args:
        directory: of the draft.
        outline: read headers alone; parameters are on the meta device.

    Raises:
        UserError: a missing, truncated or corrupted file, a pickle checkpoint, tensors that do not fit the
            configuration, or another kind of draft.
    """
    if not outline:
        read_single_layer(directory, outline=True)  # what does not fit is refused before gigabytes are read
    published = read_published(directory)
    config = parse_single_layer(published, str(directory / CONFIG_FILE))
    tensors, where = read_weights(directory, outline=outline), directory / WEIGHTS_FILE
    if any(name.endswith((".q_norm.weight", ".k_norm.weight")) for name in tensors):
        raise UserError(f"{directory} is {_DEEPSPEC}")
    layer = next((p for p in (_LAYER, "layers.0") if any(name.startswith(p + ".") for name in tensors)), _LAYER)
    config = _with_head_dim(config, tensors.get(f"{layer}.self_attn.q_proj.weight"), published, where)
    d2t, t2d, embedding = (tensors.pop(name, None) for name in (_D2T, _T2D, _EMBEDDING))
    if d2t is None and config.draft_vocab_size == config.vocab_size:
        config = replace(config, draft_vocab_size=None)
    vocabulary = _draft_vocabulary(config, d2t, t2d, where)
    layout = TensorLayout(
        layer, torch.int64 if d2t is None else d2t.dtype, torch.bool if d2t is None else getattr(t2d, "dtype", None)
    )
    with torch.device("meta"):
        shapes = SingleLayerDraft(config, None if vocabulary is None else torch.empty_like(vocabulary, device="meta"))
        shapes.layout = layout
        expected = {name: tensor.shape for name, tensor in single_layer_tensors(shapes).items()}
    expected = {n: s for n, s in expected.items() if n not in (_D2T, _T2D)}
    if embedding is not None:
        expected[_EMBEDDING] = torch.Size((config.vocab_size, config.hidden_size))
    check_tensors(tensors if embedding is None else tensors | {_EMBEDDING: embedding}, expected, where)
    with torch.device("meta") if outline else nullcontext():
        draft = SingleLayerDraft(config, vocabulary)
    by_name = {
        f"{_LAYER}.{n.removeprefix(layer + '.')}" if n.startswith(layer + ".") else n: t for n, t in tensors.items()
    }
    if draft.mask_rep is not None:
        by_name[_MASK] = by_name.pop(f"{_LAYER}.{_MASK}")
    draft.load_state_dict(by_name, strict=False, assign=True)
    draft.embed_tokens, draft.layout = embedding, layout
    return draft.requires_grad_(False).eval()


def _with_head_dim(
    config: SingleLayerConfig, queries: Tensor | None, published: Mapping[str, Any], where: Path
) -> SingleLayerConfig:
    """`config` with the width of heads that the tensors have, which must be the stated one if one is stated."""
    heads = config.num_attention_heads
    if queries is None or queries.shape[0] == heads * config.head_dim:
        return config
    if (published.get(NESTED_LAYER) or published).get("head_dim") is not None or queries.shape[0] % heads:
        raise UserError(
            f"{where}: {CONFIG_FILE} means {heads} heads of head_dim {config.head_dim}, but q_proj has "
            f"{queries.shape[0]} rows; put right whichever is wrong"
        )
    return replace(config, head_dim=queries.shape[0] // heads)


def _draft_vocabulary(config: SingleLayerConfig, d2t: Tensor | None, t2d: Tensor | None, where: Path) -> Tensor | None:
    """Absolute token ids of the draft vocabulary in the order of the LM head's rows; None for the whole vocabulary."""
    size, vocab_size = config.draft_vocab_size, config.vocab_size
    if (d2t is None) != (size is None) or (d2t is None and t2d is not None):
        raise UserError(f"{where}: draft_vocab_size in {CONFIG_FILE} and the tensors d2t and t2d must come together")
    if d2t is None:
        return None
    if d2t.shape != (size,) or d2t.dtype == torch.bool or d2t.is_floating_point() or d2t.is_complex():
        raise UserError(f"{where}: tensor d2t must hold {size} whole offsets, it is {d2t.dtype} {tuple(d2t.shape)}")
    ids = d2t.long() + torch.arange(len(d2t))
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise UserError(
            f"{where}: d2t leads outside the vocabulary of {vocab_size}; it must hold offsets, not token ids"
        )
    if len(ids.unique()) < len(ids):
        raise UserError(f"{where}: d2t leads to the same token twice; it must hold offsets, not token ids")
    if t2d is not None and (t2d.is_floating_point() or t2d.is_complex()):
        raise UserError(f"{where}: tensor t2d must hold booleans or whole numbers, it is {t2d.dtype}")
    if t2d is not None and not (t2d.shape == (vocab_size,) and torch.equal(t2d.bool(), _membership(ids, vocab_size))):
        raise UserError(f"{where}: t2d does not name the tokens that d2t leads to")
    return ids
