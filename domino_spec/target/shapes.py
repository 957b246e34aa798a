"""Shapes of the targets that shipped recipes and benchmarks name: both work without a hub and without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

_QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

KNOWN_TARGETS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-8B": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    "Qwen/Qwen3-4B": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "smollm2-135m": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "tie_word_embeddings": True,
    },
}
"""Configurations in transformers' form, by the name that `--target` takes: what their published `config.json` says."""


def known_config(name: str) -> Any | None:
    """The configuration of a target in `KNOWN_TARGETS`; None for another, and for a directory that has such a name."""
    if name not in KNOWN_TARGETS or Path(name).is_dir():
        return None
    return AutoConfig.for_model(**KNOWN_TARGETS[name])
