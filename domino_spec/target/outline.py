"""What is known of a target without its weights: from its configuration and the headers of its files.

The outline of a target is the model itself on PyTorch's meta device. So everything that asks for shapes (whether it can
be a target, what its cache takes, whether a draft fits) asks the same code that decoding uses. The targets that shipped
recipes and benchmarks name are known without any files (`known_config`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from domino_spec.files import weight_files
from domino_spec.target.load import (
    load_config,
    load_generation_config,
    outlined_model,
    stored_tensors,
    target_source,
)
from domino_spec.target.model import Target, weights_fingerprint


@dataclass(frozen=True)
class TargetOutline:
    """What is known of a target before its weights are loaded."""

    target: Target
    """On the meta device, in the type its weights are stored in; its fingerprint is empty if it is not known."""
    architecture: str
    """The model's class."""
    quantization: str | None
    """How its weights are quantised, or None."""
    weight_bytes: int | None
    """Bytes of its weights as they are stored; None if the files are not on this machine."""

    @property
    def parameters(self) -> int:
        """How many there are, those that are tied once."""
        return sum(parameter.numel() for parameter in self.target.model.parameters())


def outline_target(name_or_path: str | Path) -> TargetOutline:
    """What a target is, without its weights; of a hub id only the configuration is fetched.

    Raises:
        UserError: as `load_target`, except what only loading can show.
    """
    name = str(name_or_path)
    source = target_source(name)
    directory = Path(source) if Path(source).is_dir() else _downloaded(source)
    what = f"target {name}"
    stored = None if directory is None else stored_tensors(directory)
    config = load_config(source, what, stored)
    model = outlined_model(config, stored, what)
    load_generation_config(source, what, config)
    quantization = getattr(config, "quantization_config", None)
    tensors = list((stored or {}).values())
    if dtypes := {tensor.dtype for tensor in tensors if tensor.is_floating_point()}:
        if len(dtypes) == 1 and not quantization:
            model = model.to(dtypes.pop())
    elif getattr(config, "dtype", None):
        model = model.to(config.dtype)
    files = [] if directory is None else weight_files(directory)
    known = _fingerprint(model, files) if files and not quantization else None
    return TargetOutline(
        target=Target(model, None, name, fingerprint=known or ""),
        architecture=type(model).__name__,
        quantization=None if not quantization else str(dict(quantization).get("quant_method", "yes")),
        weight_bytes=None if stored is None else sum(tensor.nbytes for tensor in tensors),
    )


def _downloaded(hub_id: str) -> Path | None:
    """The directory of a hub id's weights on this machine; None if they were not all downloaded."""
    try:
        snapshot = Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, LocalEntryNotFoundError):
        return None
    files = weight_files(snapshot)
    return snapshot if files and all(file.is_file() for file in files) else None


def _fingerprint(model: Any, files: list[Path]) -> str | None:
    """The fingerprint of the weights in files, from a few values of each; None if names or shapes differ.

    Names differ if transformers joins or splits tensors while it loads them (mixtures of experts).
    """
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder), "")
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        holding = {key: file for file in opened for key in file.keys()}  # noqa: SIM118

        def stored() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in decoder.named_parameters():
                key = prefix + name if prefix + name in holding else name
                tensor = holding[key].get_tensor(key)  # mapped into memory, not read
                if tensor.shape != parameter.shape:
                    raise KeyError(key)
                yield name, tensor

        try:
            return weights_fingerprint(stored())
        except KeyError:
            return None


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
