"""Configurations of published models, written without weights or tokenizer: enough to work out shapes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3Config

from domino_spec.draft.checkpoint import published_config
from domino_spec.draft.config import DraftConfig

_WIDTHS = {
    "Qwen3-4B": dict(hidden_size=2560, intermediate_size=9728),
    "Qwen3-8B": dict(hidden_size=4096, intermediate_size=12288),
}
_COMMON = dict(vocab_size=151936, num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def save_qwen3(directory: Path, name: str = "Qwen3-8B") -> Path:
    """A target of that size."""
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=36,
        max_position_embeddings=40960,
        tie_word_embeddings=name == "Qwen3-4B",
        **_COMMON,
        **_WIDTHS[name],
    )
    config.save_pretrained(directory)
    return directory


def save_dflash(directory: Path, name: str = "Qwen3-8B", **changes) -> Path:
    """The DFlash draft that is published for it: five layers, blocks of 16, slots that predict their own position."""
    shape = dict(num_hidden_layers=5, num_target_layers=36, target_layer_ids=(1, 9, 17, 25, 33), mask_token_id=151669)
    config = DraftConfig(**{**_COMMON, **_WIDTHS[name], **shape, "block_size": 16, **changes})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(published_config(config, torch.bfloat16)))
    return directory
