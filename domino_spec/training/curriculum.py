"""The schedules of a run: the base-anchored curriculum and the learning rate, functions of step / steps."""

from __future__ import annotations

import math

from domino_spec.recipe import OptimizationRecipe
from domino_spec.settings import require


def lambda_base(step: int, recipe: OptimizationRecipe) -> float:
    """Weight of the base loss at `step` (from 0): linear over the run, constant, or off (paper 4.2)."""
    if recipe.curriculum == "off":
        return 0.0
    if recipe.curriculum == "constant":
        return recipe.lambda_base_start
    moving = max(1.0, recipe.lambda_base_fraction * (recipe.total_steps - 1))
    progress = min(1.0, step / moving)
    return recipe.lambda_base_start + (recipe.lambda_base_end - recipe.lambda_base_start) * progress


def learning_rate(step: int, recipe: OptimizationRecipe) -> float:
    """Linear warm-up, then cosine to zero (paper A.1)."""
    warmup = round(recipe.total_steps * recipe.warmup_ratio)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.total_steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def block_size(step: int, recipe: OptimizationRecipe, full: int) -> int:
    """Slots per block at `step`: `block_schedule` spreads shorter blocks evenly over the run, the full size last.

    A block's first tokens decide whether the others count at all, and a block of B slots spends 1 / B of its compute on
    the first. Short blocks around more anchors (their product is kept) teach the first tokens for the same compute.
    """
    sizes = [*recipe.block_schedule, full]
    return sizes[min(len(sizes) - 1, step * len(sizes) // recipe.total_steps)]


def check_block_schedule(recipe: OptimizationRecipe, full: int) -> None:
    """Look at `block_schedule` once the draft's own block size is known.

    Raises:
        UserError: it holds a block that is not shorter than the draft's.
    """
    for size in recipe.block_schedule:
        require(size < full, f"training.block_schedule holds {size}, but the draft's own blocks have {full} slots")
