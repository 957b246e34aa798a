"""The tensors in a target's files against those that its configuration asks for: all are there, and nothing besides.

transformers draws what is missing at random and leaves out what it does not know, with a table in its log. Its own
loading is asked here, on tensors without contents: so its rules for renaming and joining tensors hold, and what it
leaves out on purpose (weights that are tied, positions that are computed) is no fault.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from domino_spec.config import UserError
from domino_spec.files import gather_tensors, outline_tensors, weight_files


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Shapes and types of all tensors of a model directory, from the headers of its files; none where it has no files.

    Raises:
        UserError: one of the files cannot be read.
    """
    return gather_tensors(weight_files(directory), outline_tensors)


def check_stored(model: Any, stored: Mapping[str, Tensor], what: str) -> None:
    """Compare a model on the meta device, whose parameters are replaced, with the tensors in its files.

    Args:
        model: of transformers, made from the configuration.
        stored: of `stored_tensors`.
        what: how the message calls it, such as "target some/path".

    Raises:
        UserError: a tensor is missing, has another shape, has no place in the model, or holds codes of weights.
    """
    integers = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    meta = {name: tensor.to("meta") for name, tensor in stored.items()}
    renamed: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(device_map={"": torch.device("meta")}, weight_mapping=renamed)
    with without_report():
        info, _ = convert_and_load_state_dict_in_model(model, meta, settings)
        unread = set(info.unexpected_keys)  # those that are left out on purpose, too
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    check_loaded(info.to_dict(), what)
    read = {name: tensor.dtype for name, tensor in stored.items() if name not in unread}
    # Some files leave out the prefix of the decoder.
    _check_types({n: t for n, t in read.items() if not any(f".{i}".endswith(f".{n}") for i in integers)}, what)


def _check_types(types: Mapping[str, torch.dtype], what: str) -> None:
    """Refuse weights that are stored as integers or in 8 bits or fewer: without their scales they mean nothing."""
    coded = [name for name, dtype in types.items() if not (dtype.is_floating_point and dtype.itemsize >= 2)]
    if coded:
        found = str(types[min(coded)]).removeprefix("torch.")
        stored, more = f"is stored as {found}", f"are stored as {found} or other codes"
        raise UserError(
            f"{what}: {_count(coded, stored, more)}: expected bfloat16, float16, float32 or float64; "
            "if the weights are quantised, config.json must say so (quantization_config)"
        )


def check_loaded(info: Mapping[str, Collection[Any]], what: str) -> None:
    """Refuse weights that transformers did not find, could not place, or found in another shape.

    Args:
        info: of `from_pretrained(..., output_loading_info=True)`.
        what: as in `check_stored`.

    Raises:
        UserError: names the first of each kind, and how many more there are.
    """
    shapes = {name: (list(stored), list(meant)) for name, stored, meant in info["mismatched_keys"]}
    faults = [
        _count(info["missing_keys"], "is missing", "are missing"),
        _count(shapes, "has another shape than config.json means", "have other shapes than config.json means"),
        _count(info["unexpected_keys"], "has no place in the model", "have no place in the model"),
    ]
    if shapes:
        stored, meant = shapes[min(shapes)]
        faults[1] += f" ({stored}, not {meant})"
    if any(faults):
        raise UserError(
            f"{what}: {', '.join(filter(None, faults))}: its files are not complete, or not of the model that "
            "config.json describes"
        )


def _count(names: Collection[str], one: str, more: str) -> str:
    if not names:
        return ""
    return f"tensor {min(names)} {one}" if len(names) == 1 else f"{len(names)} tensors {more}, first {min(names)}"


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' table of what is missing and unexpected, which is said in one line instead."""
    logger = logging.getLogger("transformers.modeling_utils")

    def silence(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(silence)  # by its level, transformers decides about checks of its own
    try:
        yield
    finally:
        logger.removeFilter(silence)
