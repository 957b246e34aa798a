"""A whole training set-up on disk: a tiny target with its tokenizer, its answers, and recipes for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from domino_spec.recipe import DataRecipe, DraftRecipe, HeadRecipe, OptimizationRecipe, Recipe
from tests.tiny import MASK, plain_greedy, random_prompts, word_tokenizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where things are, and recipes that use them."""

    target: Path
    responses: Path

    def recipe(self, **training) -> Recipe:
        """A recipe whose draft trains in milliseconds a step; keyword arguments change its `training` part."""
        options = dict(
            steps=12,
            batch_size=4,
            micro_batch_size=2,
            anchors=4,
            learning_rate=5e-3,
            precision="float32",
            checkpoint_minutes=60.0,
            eval_every=5,
            log_every=1,
        )
        return Recipe(
            target=str(self.target),
            draft=DraftRecipe(
                block_size=4,
                num_layers=1,
                mask_token_id=MASK,
                target_layer_ids=(0, 3),
                head=HeadRecipe(gru_hidden_dim=8, low_rank=4),
                draft_vocab_size=40,
            ),
            data=DataRecipe(responses=str(self.responses), max_length=64, held_out=4, feature_dtype="float32"),
            training=OptimizationRecipe(**{**options, **training}),
        )


@pytest.fixture(scope="session")
def setup(tmp_path_factory, model) -> Setup:
    """Target, answers, recipes."""
    directory = tmp_path_factory.mktemp("setup")
    model.save_pretrained(directory / "target")
    word_tokenizer().save_pretrained(directory / "target")
    prompts = random_prompts([3, 6, 4, 5] * 5, seed=2)
    rows = [
        {"id": f"p{i}", "prompt_ids": p, "response_ids": plain_greedy(model, p, 12 + i)} for i, p in enumerate(prompts)
    ]
    responses = directory / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Setup(directory / "target", responses)
