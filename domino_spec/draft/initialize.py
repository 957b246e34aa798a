"""A new draft for a target: its shape from a recipe, its first weights random, the target's own layers, or a draft's.

A draft that starts from another (`init_from`) computes exactly what that one computes: it takes over its backbone, its
head if it has one, and its label convention. If recipe and checkpoint disagree about any of that, nothing starts.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from domino_spec.draft.checkpoint import read_draft
from domino_spec.draft.config import (
    DraftConfig,
    HeadConfig,
    SingleLayerConfig,
    default_target_layer_ids,
    feature_levels,
)
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import check_finite, check_pairing, draft_directory
from domino_spec.draft.schema import ROPES
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.recipe import DraftRecipe
from domino_spec.settings import UserError
from domino_spec.target.model import Target

DEFAULT_BLOCK_SIZE, DEFAULT_NUM_LAYERS = 16, 5  # the paper's (5.1)
DEFAULT_STEPS = {"eagle3": 7, "dart": 8}  # EAGLE-3's training-time test; DART's masked positions and one


def draft_config(recipe: DraftRecipe, target: Target, start: DraftConfig | None = None) -> DraftConfig:
    """The configuration that a recipe gives for a target.

    Args:
        recipe: of the draft.
        target: that it is for.
        start: of the draft that `recipe.init_from` names.

    Raises:
        UserError: the recipe does not fit the target or that draft, or no mask token can be found.
    """
    if start is not None:
        return replace(continued_config(recipe, start), target_fingerprint=target.fingerprint)
    mask_token_id = recipe.mask_token_id
    if mask_token_id is None:
        mask_token_id = getattr(target.tokenizer, "mask_token_id", None)
    if mask_token_id is None:
        raise UserError(
            f"{target.name} has no mask token: set draft.mask_token_id to an id that its tokenizer reserves and "
            "never produces"
        )
    config = fresh_config(recipe, target.config, mask_token_id)
    return replace(config, vocab_size=target.vocab_size, target_fingerprint=target.fingerprint)


def single_layer_config(recipe: DraftRecipe, target_config: Any) -> SingleLayerConfig:
    """The configuration of a new EAGLE-3 or DART draft.

    Args:
        recipe: of the draft.
        target_config: text configuration of the target (transformers).

    Raises:
        UserError: the recipe does not fit the target.
    """
    config = target_config
    return SingleLayerConfig(
        **_layers_like(config, recipe),
        kind=recipe.model,
        target_hidden_size=config.hidden_size,
        target_layer_ids=recipe.target_layer_ids or feature_levels(config.num_hidden_layers),
        num_target_layers=config.num_hidden_layers,
        block_size=DEFAULT_STEPS[recipe.model] if recipe.block_size is None else recipe.block_size,
    )


def _layers_like(config: Any, recipe: DraftRecipe) -> dict[str, Any]:
    """The fields of a `BaseConfig` for layers as wide as those of a target with this text configuration."""
    theta, rope = _rope(config)
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": recipe.intermediate_size or config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": recipe.draft_vocab_size,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _rope(config: Any) -> tuple[float, dict[str, Any] | None]:
    """Base and further RoPE settings of a target, for a draft that attends fully.

    If the target's angles depend on the length of the text, or are of a kind that drafts do not have, only the base is
    taken over.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:  # one set per attention kind (Gemma 3): the draft attends fully
        rope = dict(rope.get("full_attention") or {})
    theta, kind = rope.get("rope_theta") or 10000.0, rope.get("rope_type", "default")
    if kind == "default" or kind not in ROPES:
        return theta, None
    needed, optional = ROPES[kind]
    numbers = {name: rope[name] for name in (*needed, *optional) if rope.get(name) is not None}
    return theta, {"rope_type": kind, **numbers}


def fresh_config(recipe: DraftRecipe, target_config: Any, mask_token_id: int) -> DraftConfig:
    """The configuration of a draft that starts from nothing.

    Args:
        recipe: of the draft.
        target_config: text configuration of the target (transformers).
        mask_token_id: for empty slots.

    Raises:
        UserError: the recipe does not fit the target.
    """
    config = target_config
    num_layers = DEFAULT_NUM_LAYERS if recipe.num_layers is None else recipe.num_layers
    return DraftConfig(
        **_layers_like(config, recipe),
        num_hidden_layers=num_layers,
        num_target_layers=config.num_hidden_layers,
        target_layer_ids=recipe.target_layer_ids or default_target_layer_ids(config.num_hidden_layers, num_layers),
        mask_token_id=mask_token_id,
        block_size=DEFAULT_BLOCK_SIZE if recipe.block_size is None else recipe.block_size,
        shift_label=recipe.head is not None if recipe.shift_label is None else recipe.shift_label,
        head=None if recipe.head is None else recipe.head.over(HeadConfig()),
    )


def continued_config(recipe: DraftRecipe, start: DraftConfig) -> DraftConfig:
    """The configuration of a draft that starts from another: the same, with the recipe's head if it had none.

    Raises:
        UserError: the recipe states another value than the checkpoint holds.
    """
    for name in (
        "block_size",
        "num_layers",
        "mask_token_id",
        "target_layer_ids",
        "intermediate_size",
        "shift_label",
        "draft_vocab_size",
    ):
        held = getattr(start, "num_hidden_layers" if name == "num_layers" else name)
        # A head over the whole vocabulary can be cut to a part of it.
        if not (name == "draft_vocab_size" and held is None):
            _agree(recipe, name, getattr(recipe, name), held)
    head = None
    if recipe.head is not None:
        head = recipe.head.over(start.head or HeadConfig())
        if start.head is not None:
            for f in fields(start.head):
                _agree(recipe, f"head.{f.name}", getattr(head, f.name), getattr(start.head, f.name))
    if head is None and start.shift_label:
        raise UserError(
            f"draft.head is null, but slots of {recipe.init_from} predict the token one position later (shift_label), "
            "which readers of drafts without a head do not expect"
        )
    size = start.draft_vocab_size or recipe.draft_vocab_size
    return replace(start, head=head, draft_vocab_size=size, published={})


def _agree(recipe: DraftRecipe, name: str, stated: Any, held: Any) -> None:
    if stated is not None and stated != held:
        raise UserError(
            f"draft.{name} is {_plain(stated)} in the recipe and {_plain(held)} in {recipe.init_from}: they must be "
            "equal, or left out of the recipe"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def new_draft(
    recipe: DraftRecipe, target: Target, draft_vocab_ids: Tensor | None, seed: int
) -> Draft | SingleLayerDraft:
    """A draft in float32, bound to its target, with reproducible first weights.

    Args:
        recipe: of the draft.
        target: that it is for.
        draft_vocab_ids: [draft_vocab_size], if the recipe states that size.
        seed: of random weights.

    Raises:
        UserError: the recipe does not fit the target, or `init_from` cannot be read, fits neither, or was made for
            other weights.
    """
    if recipe.model != "block":
        return _new_single_layer(recipe, target, draft_vocab_ids, seed)
    if recipe.init_from is not None:
        return _continued_draft(recipe, target, draft_vocab_ids, seed).bind(target)
    draft = _random_draft(draft_config(recipe, target), draft_vocab_ids, seed)
    # The LM head reads what the target's last norm gives; any other start has a far larger loss.
    draft.backbone.norm.weight.data.copy_(_norm_scale(target.final_norm))
    if recipe.init_layers_from_target is not None:
        _copy_layers(draft, target, recipe.init_layers_from_target)
    return draft.bind(target)


@torch.no_grad()
def _new_single_layer(
    recipe: DraftRecipe, target: Target, draft_vocab_ids: Tensor | None, seed: int
) -> SingleLayerDraft:
    config = replace(
        single_layer_config(recipe, target.config),
        vocab_size=target.vocab_size,
        target_fingerprint=target.fingerprint,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = SingleLayerDraft(config, draft_vocab_ids)
        for name, parameter in draft.named_parameters():
            if not name.endswith("norm.weight"):
                nn.init.normal_(parameter, std=0.02)
    draft.norm.weight.copy_(_norm_scale(target.final_norm))
    draft.bind(target)
    draft.lm_head.weight.copy_(draft.ends.lm_head)
    # The feature begins as the highest level, as it is; what lower levels add is learned (docs/log.md).
    draft.fc.weight.zero_()
    torch.nn.init.eye_(draft.fc.weight[:, -config.target_hidden_size :])
    if recipe.init_layers_from_target is not None:
        _copy_pair_layer(draft, target, recipe.init_layers_from_target)
    return draft


def _copy_pair_layer(draft: SingleLayerDraft, target: Target, layer_ids: tuple[int, ...]) -> None:
    """A layer of the target reads features as it reads its own residual; what reads embeddings stays random."""
    if len(layer_ids) != 1:
        raise UserError(f"init_layers_from_target names {len(layer_ids)} layers, but the draft has 1")
    source = _layer_weights(target, layer_ids[0])
    source["hidden_norm.weight"] = source.pop("input_layernorm.weight")
    width = draft.config.hidden_size
    for name, parameter in draft.midlayer.named_parameters():
        if name not in source:
            continue
        part = parameter[:, width:] if parameter.shape[-1] == 2 * width else parameter
        if source[name].shape == part.shape:
            part.copy_(source[name])


def _random_draft(config: DraftConfig, draft_vocab_ids: Tensor | None, seed: int) -> Draft:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = Draft(config, draft_vocab_ids)
        for module in draft.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    return draft


@torch.no_grad()
def _continued_draft(recipe: DraftRecipe, target: Target, draft_vocab_ids: Tensor | None, seed: int) -> Draft:
    name = str(recipe.init_from)
    start = read_draft(draft_directory(name))
    check_finite(start, name)
    check_pairing(start.config, name, target, recipe.init_from_other_target, "draft.init_from_other_target: true")
    config = draft_config(recipe, target, start.config)
    vocabulary, known = draft_vocab_ids, start.draft_vocab_ids
    if vocabulary is not None and known is not None and not torch.equal(vocabulary.cpu(), known):
        raise UserError(
            f"draft.draft_vocab_size gives other tokens than {name} can propose; leave it out to keep that draft's"
        )
    draft = _random_draft(config, known if vocabulary is None else vocabulary, seed)
    draft.backbone.load_state_dict(start.backbone.state_dict())
    if draft.head is not None and start.head is not None:
        weights = start.head.state_dict()
        if vocabulary is not None and known is None:
            weights["embed_proj.2.weight"] = weights["embed_proj.2.weight"][vocabulary.cpu()]
        draft.head.load_state_dict(weights)
    return draft


@torch.no_grad()
def _copy_layers(draft: Draft, target: Target, layer_ids: tuple[int, ...]) -> None:
    if len(layer_ids) != len(draft.backbone.layers):
        raise UserError(
            f"init_layers_from_target names {len(layer_ids)} layers, but the draft has {len(draft.backbone.layers)}"
        )
    for layer, source_id in zip(draft.backbone.layers, layer_ids, strict=True):
        source = _layer_weights(target, source_id)
        for name, parameter in layer.named_parameters():
            # Targets without q/k norm (Llama) leave the draft's at one.
            if name in source and source[name].shape == parameter.shape:
                parameter.copy_(source[name])


def _layer_weights(target: Target, layer_id: int) -> dict[str, Tensor]:
    if not 0 <= layer_id < target.num_layers:
        raise UserError(
            f"init_layers_from_target holds {layer_id}; the target's layers are 0 to {target.num_layers - 1}"
        )
    source: dict[str, Tensor] = dict(target.layers[layer_id].named_parameters())
    for name, module in target.layers[layer_id].named_modules():
        if name.endswith("norm"):
            source[f"{name}.weight"] = _norm_scale(module)
    return source


def _norm_scale(norm: nn.Module) -> Tensor:
    """The gain of an RMS norm: its weight, or one plus its weight (Gemma)."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight + (norm(torch.ones_like(weight)) - weight).mean().round()
