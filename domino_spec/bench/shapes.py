"""Targets and Domino drafts of a given shape with random weights: what a cycle costs, without a download.

Time depends on shapes, not on what the weights say, except for how many drafts are accepted: random drafts never are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from domino_spec.devices import choose_device, free_memory
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.initialize import fresh_config
from domino_spec.files import read_json
from domino_spec.recipe import DraftRecipe, HeadRecipe
from domino_spec.settings import UserError
from domino_spec.target.cache import ATTENTION_NAME
from domino_spec.target.model import Target
from domino_spec.target.native import can_pack
from domino_spec.target.outline import KNOWN_TARGETS

STD = 0.02
"""Of random weights."""


@dataclass(frozen=True)
class PairShape:
    """What a pair is made from."""

    name: str
    target: Mapping[str, Any]
    """A configuration in transformers' form, `model_type` included."""
    draft: DraftRecipe = field(default_factory=DraftRecipe)
    """What is left out is the paper's, else the target's."""


SHAPES = {
    "qwen3-8b": PairShape("qwen3-8b", KNOWN_TARGETS["Qwen/Qwen3-8B"]),
    "smollm2-135m": PairShape(
        "smollm2-135m",
        KNOWN_TARGETS["smollm2-135m"],
        DraftRecipe(
            num_layers=2,
            block_size=8,
            target_layer_ids=(1, 8, 15, 22, 29),
            head=HeadRecipe(gru_hidden_dim=256, low_rank=128),
            draft_vocab_size=8192,
        ),
    ),
    "tiny": PairShape(
        "tiny",
        {
            "model_type": "qwen3",
            "num_hidden_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "tie_word_embeddings": False,
        },
        DraftRecipe(
            num_layers=2,
            block_size=4,
            target_layer_ids=(1, 2),
            head=HeadRecipe(gru_hidden_dim=16, low_rank=16),
        ),
    ),
}
"""Shapes by name: Qwen3-8B and the paper's draft for it; the embedded default pair; one for tests."""


def find_shape(name_or_path: str, draft_vocab_size: int | None = None) -> PairShape:
    """A shape by its name, or that of a config.json of transformers with the paper's draft.

    Args:
        name_or_path: a key of `SHAPES`, or a file.
        draft_vocab_size: tokens that the draft can propose, in place of the shape's.

    Raises:
        UserError: there is no such shape, or the file does not describe a target.
    """
    shape = SHAPES.get(name_or_path)
    if shape is None:
        path = Path(name_or_path)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise UserError(
                f"unknown shape {name_or_path!r}: give {', '.join(SHAPES)}, or the config.json of a transformers model"
            )
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise UserError(f"{path} does not describe a model: it has no model_type")
        shape = PairShape(str(path), values)
    if draft_vocab_size is not None:
        shape = replace(shape, draft=replace(shape.draft, draft_vocab_size=draft_vocab_size))
    return shape


@dataclass(frozen=True)
class PairPlan:
    """A pair that is not made yet: what it will be, and what it takes."""

    shape: PairShape
    config: Any
    """The target's configuration, as transformers reads it."""
    draft: Draft
    """Without contents."""
    dtype: torch.dtype
    device: torch.device
    weights: int
    """Bytes of both models."""

    @property
    def text_config(self) -> Any:
        """The target's text configuration."""
        return self.config.get_text_config()


def plan_pair(shape: PairShape, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto") -> PairPlan:
    """Work out a pair without making it.

    Args:
        shape: of `find_shape`.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.
        device: "auto" is CUDA if there is one, else CPU.

    Raises:
        UserError: the shape is no model that this package can decode with, or there is no such device.
    """
    device = choose_device(device)
    if isinstance(dtype, str):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        config = AutoConfig.for_model(**dict(shape.target))
        with _making(torch.device("meta"), dtype):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"shape {shape.name}: {' '.join(str(error).split())[:200]}") from error
    text = config.get_text_config()
    draft_config = _draft_config(shape, text)
    with _making(torch.device("meta"), dtype):
        draft = Draft(draft_config, _vocabulary(draft_config))
    weights = sum(weight.numel() for part in (model, draft) for weight in part.parameters())
    if can_pack(device, dtype):  # a packed copy of each LM head is kept in addition to the LM head itself
        weights += (text.vocab_size + draft_config.logits_size) * text.hidden_size
    return PairPlan(shape, config, draft, dtype, device, weights * dtype.itemsize)


def make_pair(plan: PairPlan) -> tuple[Target, Draft]:
    """The pair that was planned, its weights random, drawn on its device."""
    with torch.random.fork_rng([plan.device] if plan.device.type == "cuda" else []):
        torch.manual_seed(0)
        with _making(plan.device, plan.dtype):
            model: Any = AutoModelForCausalLM.from_config(
                plan.config, attn_implementation=ATTENTION_NAME, dtype=plan.dtype, trust_remote_code=False
            )
            draft = Draft(plan.draft.config, _vocabulary(plan.draft.config))
            for module in draft.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=STD)
    target = Target(model.requires_grad_(False), None, plan.shape.name)
    packs = can_pack(target.device, target.dtype)
    if packs:
        target.pack()
    draft = draft.requires_grad_(False).eval().bind(target)
    return target, draft.pack() if packs else draft


def _draft_config(shape: PairShape, config: Any) -> DraftConfig:
    try:
        return fresh_config(shape.draft, config, config.vocab_size - 1)
    except AttributeError as error:  # a configuration that is no language model's
        raise UserError(f"shape {shape.name}: {error}") from error


def _vocabulary(config: DraftConfig) -> torch.Tensor | None:
    """Any tokens will do."""
    return None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)


@contextmanager
def _making(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made meanwhile have their weights on a device and in a type from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse what a device cannot hold.

    Args:
        needed: bytes.
        device: where.
        what: needs them, for the message.

    Raises:
        UserError: fewer are free.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: choose a smaller shape, "
            "batch or context, or another device"
        )
