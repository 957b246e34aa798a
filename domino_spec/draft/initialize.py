"""A fresh draft for a target: its shape from a recipe, its first weights random or from the target's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from domino_spec.config import DraftConfig, DraftRecipe, UserError, default_target_layer_ids
from domino_spec.draft.model import Draft
from domino_spec.target.model import Target


def draft_config(recipe: DraftRecipe, target: Target) -> DraftConfig:
    """The configuration that a recipe means for a target.

    Raises:
        UserError: the recipe does not fit the target, or no mask token can be found.
    """
    config = target.config
    mask_token_id = recipe.mask_token_id
    if mask_token_id is None:
        mask_token_id = getattr(target.tokenizer, "mask_token_id", None)
    if mask_token_id is None:
        raise UserError(
            f"{target.name} has no mask token: set draft.mask_token_id to an id that its tokenizer reserves and "
            "never produces"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in rope:  # one set per attention kind (Gemma 3): the draft attends fully
        rope = dict(rope.get("full_attention") or {})
    theta = rope.pop("rope_theta", 10000.0)
    if rope.get("rope_type", "default") == "default":
        rope = {}
    return DraftConfig(
        hidden_size=config.hidden_size,
        intermediate_size=recipe.intermediate_size or config.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        target_layer_ids=recipe.target_layer_ids or default_target_layer_ids(target.num_layers, recipe.num_layers),
        mask_token_id=mask_token_id,
        block_size=recipe.block_size,
        shift_label=recipe.shift_label,
        head=recipe.head,
        draft_vocab_size=recipe.draft_vocab_size,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=rope or None,
        max_position_embeddings=config.max_position_embeddings,
        target_fingerprint=target.fingerprint,
    )


def new_draft(recipe: DraftRecipe, target: Target, draft_vocab_ids: Tensor | None, seed: int) -> Draft:
    """A draft in float32, bound to its target, with reproducible first weights.

    Raises:
        UserError: the recipe does not fit the target.
    """
    config = draft_config(recipe, target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = Draft(config, draft_vocab_ids)
        for module in draft.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        # The LM head reads what the target's last norm gives; starting elsewhere starts at a far larger loss.
        draft.backbone.norm.weight.data.copy_(_norm_scale(target.decoder.norm))
    if recipe.init_layers_from_target is not None:
        _copy_layers(draft, target, recipe.init_layers_from_target)
    return draft.bind(target)


@torch.no_grad()
def _copy_layers(draft: Draft, target: Target, layer_ids: tuple[int, ...]) -> None:
    if len(layer_ids) != len(draft.backbone.layers):
        raise UserError(
            f"init_layers_from_target names {len(layer_ids)} layers, but the draft has {len(draft.backbone.layers)}"
        )
    for layer, source_id in zip(draft.backbone.layers, layer_ids, strict=True):
        if not 0 <= source_id < target.num_layers:
            raise UserError(
                f"init_layers_from_target holds {source_id}; the target's layers are 0 to {target.num_layers - 1}"
            )
        source: dict[str, Tensor] = dict(target.layers[source_id].named_parameters())
        for name, module in target.layers[source_id].named_modules():
            if name.endswith("norm"):
                source[f"{name}.weight"] = _norm_scale(module)
        for name, parameter in layer.named_parameters():
            # Targets without q/k norm (Llama) leave the draft's own at one.
            if name in source and source[name].shape == parameter.shape:
                parameter.copy_(source[name])


def _norm_scale(norm: nn.Module) -> Tensor:
    """What an RMS norm multiplies by: its weight, or that plus one where the weight is an offset (Gemma)."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight + (norm(torch.ones_like(weight)) - weight).mean().round()
