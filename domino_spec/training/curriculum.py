"""The schedules of a run: the base-anchored curriculum and the learning rate, both functions of step / steps."""

from __future__ import annotations

import math

from domino_spec.config import OptimizationRecipe


def lambda_base(step: int, recipe: OptimizationRecipe) -> float:
    """Weight of the base loss at `step` (from 0): linear from start to end over the run (paper 4.2)."""
    progress = step / max(1, recipe.steps - 1)
    return recipe.lambda_base_start + (recipe.lambda_base_end - recipe.lambda_base_start) * min(1.0, progress)


def learning_rate(step: int, recipe: OptimizationRecipe) -> float:
    """Linear warm-up, then cosine to zero (paper A.1)."""
    warmup = round(recipe.steps * recipe.warmup_ratio)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
