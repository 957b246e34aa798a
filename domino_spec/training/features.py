"""The target's features for every training sequence, captured once and kept in shards on disk.

Capturing costs a full pass of the target, so a draft that is trained for several epochs reads them back instead.
A shard holds whole sequences; it is written atomically, so an interrupted capture goes on at the next shard. Any number
of processes may read while one captures; a second one that has something to capture waits for the first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceType
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from domino_spec.files import read_json, save_tensors, write_json
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.training.data import Batch, Sequence, pack_batch
from domino_spec.training.integrity import only_writer, remove_scratch

SETTINGS_FILE, LOCK_FILE = "settings.json", "capture.lock"
SHARD_TOKENS = 50_000
BATCH_TOKENS = 4096
LARGE_BYTES = 10_000_000_000
"""A capture of more than this is announced with a warning."""
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Types of features, by their names in headers of safetensors files."""

_log = logging.getLogger(__name__)


class FeatureSource(Protocol):
    """Where training takes its features from: a cache on disk, or the target itself."""

    layers: tuple[int, ...]
    """The tapped layers, in the order in which their hidden states are concatenated."""

    def read(self, sequence: Sequence) -> Tensor:
        """Features [T, layers * H] of one sequence."""

    def batch(self, sequences: SequenceType[Sequence]) -> Batch:
        """Some sequences with their features."""


class OnlineFeatures:
    """Features computed by the target whenever they are asked for.

    Args:
        target: loaded in the precision that the features should have.
        layers: tapped decoder layers.
    """

    def __init__(self, target: Target, layers: SequenceType[int]) -> None:
        self.target, self.layers = target, tuple(layers)

    def read(self, sequence: Sequence) -> Tensor:
        """Features [T, layers * H] of one sequence."""
        return self.batch([sequence]).features

    def batch(self, sequences: SequenceType[Sequence]) -> Batch:
        """Run the target over some sequences; they should be of like length."""
        return pack_batch(sequences, compute_features(self.target, sequences, self.layers))


class SelectedFeatures:
    """Some of the layers that another source holds: one cache serves several drafts.

    Args:
        source: of features of at least these layers.
        layers: wanted, in this order.
        hidden_size: H of the target.
    """

    def __init__(self, source: FeatureSource, layers: SequenceType[int], hidden_size: int) -> None:
        self.source, self.layers = source, tuple(layers)
        offsets = [source.layers.index(layer) * hidden_size for layer in layers]
        self._columns = torch.cat([torch.arange(offset, offset + hidden_size) for offset in offsets])

    def read(self, sequence: Sequence) -> Tensor:
        """Features [T, layers * H] of one sequence."""
        return self.source.read(sequence)[:, self._columns]

    def batch(self, sequences: SequenceType[Sequence]) -> Batch:
        """Some sequences with their features."""
        batch = self.source.batch(sequences)
        return dataclasses.replace(batch, features=batch.features[:, self._columns.to(batch.features.device)])


class _Place(NamedTuple):
    """Where a sequence's features are."""

    shard: Path
    start: int
    end: int
    digest: str | None = None
    """Of the tokens: a sequence of the same id and other tokens is captured anew. Absent in older shards."""
    checksum: int | None = None
    """Of the features' bytes (CRC-32). Absent in older shards, which are read as they are."""


class FeatureCache:
    """Features of a list of sequences, on disk.

    Args:
        directory: holds `settings.json` and shards; made when missing.
        settings: what the features depend on (see `read_settings`); a directory with other settings is refused.

    Raises:
        UserError: the directory belongs to other settings, or holds a file that cannot be read as what it should be.
    """

    def __init__(self, directory: Path, settings: dict) -> None:
        self.directory = directory
        self.layers: tuple[int, ...] = tuple(settings["layers"])
        self._settings_digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._dtype, self._width = settings["dtype"], len(self.layers) * settings["hidden_size"]
        self._places: dict[str, _Place] = {}
        self._open: dict[Path, safe_open] = {}
        self._verified: dict[str, Sequence] = {}
        """Sequences whose tokens and features were compared with what the shards say of them, by id."""
        if not os.path.exists(directory / SETTINGS_FILE):
            with only_writer(directory, directory / LOCK_FILE):  # two processes with other settings must not both begin
                if not os.path.exists(directory / SETTINGS_FILE):
                    write_json(settings, directory / SETTINGS_FILE)
        if read_settings(directory) != settings:
            raise UserError(f"feature cache {directory} was made with other settings; remove it or choose another")
        self.refresh()

    def refresh(self) -> None:
        """Read the index of shards that were written since the last call.

        Raises:
            UserError: one of them is damaged.
        """
        numbers: dict[Path, int] = {}
        for shard in self.directory.glob("shard-*.safetensors"):
            if (named := re.fullmatch(r"shard-([0-9]{5,9})\.safetensors", shard.name)) is None:
                raise UserError(f"{shard} has not the name of a shard, such as shard-00000.safetensors: remove it")
            numbers[shard] = int(named[1])
        for shard in sorted(numbers, key=numbers.__getitem__):
            if shard not in self._open:
                self._index(shard)
        self._next_number = max(numbers.values(), default=-1) + 1

    def _index(self, shard: Path) -> None:
        try:
            file = safe_open(shard, framework="pt")
            metadata = file.metadata()
            if metadata.get("settings", self._settings_digest) != self._settings_digest:  # absent in older shards
                raise ValueError("it was captured with other settings")
            features = file.get_slice("features")
            rows, width = features.get_shape()
            if (_TYPES.get(features.get_dtype()), width) != (self._dtype, self._width):
                raise ValueError(f"its features are {features.get_dtype()} of width {width}")
            places = {id_: _Place(shard, *place) for id_, *place in json.loads(metadata["sequences"])}
            for id_, place in places.items():
                if not (type(place.start) is type(place.end) is int and 0 <= place.start <= place.end <= rows):
                    raise ValueError(f"it has no rows {place.start} to {place.end} of {id_}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(shard, error) from None
        self._open[shard] = file
        self._places |= places
        for id_ in places:
            self._verified.pop(id_, None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Become the only process that may add shards; waits, with a warning, while another process is.

        Raises:
            UserError: the directory cannot be written to.
        """
        with only_writer(self.directory, self.directory / LOCK_FILE):
            remove_scratch(self.directory)
            self.refresh()
            yield

    def __contains__(self, sequence: Sequence) -> bool:
        place = self._places.get(sequence.id)
        if place is None or place.end - place.start != len(sequence.tokens):
            return False
        return place.digest in (None, sequence.digest)

    def write_shard(self, sequences: SequenceType[Sequence], features: SequenceType[Tensor]) -> None:
        """Add the features [T, F] of some sequences as one shard."""
        shard = self.directory / f"shard-{self._next_number:05d}.safetensors"
        table, start = [], 0
        for sequence, rows in zip(sequences, features, strict=True):
            table.append((sequence.id, start, start + len(rows), sequence.digest, _checksum(rows)))
            start += len(rows)
        metadata = {"sequences": json.dumps(table), "settings": self._settings_digest}
        save_tensors({"features": torch.cat(list(features))}, shard, metadata)
        self._next_number += 1
        self._index(shard)

    def read(self, sequence: Sequence) -> Tensor:
        """Features [T, F] of one sequence, checked against their checksum when they are read for the first time.

        Raises:
            UserError: the shard is damaged.
        """
        verified = self._verified.get(sequence.id) is sequence
        if not verified and sequence not in self:
            self.refresh()  # another process may have captured it
            assert sequence in self, f"{sequence.id} was not captured"
        place = self._places[sequence.id]
        try:
            rows = self._open[place.shard].get_slice("features")[place.start : place.end]
        except (SafetensorError, OSError) as error:
            raise _damaged(place.shard, error) from None
        if not verified:
            if place.checksum is not None and place.checksum != _checksum(rows):
                raise _damaged(place.shard, f"the features of {sequence.id} do not match their checksum")
            self._verified[sequence.id] = sequence
        return rows

    def batch(self, sequences: SequenceType[Sequence]) -> Batch:
        """Read and pack some sequences."""
        return pack_batch(sequences, [self.read(s) for s in sequences])


def _checksum(rows: Tensor) -> int:
    return zlib.crc32(rows.cpu().contiguous().view(torch.uint8).numpy().data)


def _damaged(shard: Path, reason: object) -> UserError:
    what = " ".join(str(reason).split())[:200]
    return UserError(f"{shard} is damaged ({what}); remove it, and what it held is captured again")


def read_settings(directory: Path) -> dict[str, Any]:
    """What the features of a cache depend on: fingerprint of the target, tapped layers, type, hidden size.

    Raises:
        UserError: the file is not one that a feature cache writes.
    """
    path = directory / SETTINGS_FILE
    settings = read_json(path)
    layers = settings.get("layers") if isinstance(settings, dict) else None
    if not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise UserError(f"{path} holds no settings of a feature cache: remove {directory}, and it is captured again")
    return settings


def feature_scale(cache: FeatureSource, sequences: SequenceType[Sequence], sample: int = 64) -> Tensor:
    """One over the root mean square of every feature dimension, [F] float32, over the first `sample` sequences.

    The first token of each is left out: in many models it has huge activations.
    """
    squares = [cache.read(s)[1:].float().square() for s in sequences[:sample]]
    return torch.cat(squares).mean(0).clamp(min=1e-8).rsqrt()


@torch.inference_mode()
def compute_features(target: Target, sequences: SequenceType[Sequence], layers: SequenceType[int]) -> list[Tensor]:
    """Features [T, F] of each sequence from one batched pass of the target."""
    lengths = torch.tensor([len(s.tokens) for s in sequences], device=target.device)
    tokens = torch.nn.utils.rnn.pad_sequence([s.tokens for s in sequences], batch_first=True).to(target.device)
    cache = target.new_cache(len(sequences), tokens.shape[1])
    features = target.prefill(tokens, lengths, cache, layers)
    assert features is not None
    return [rows[: len(s.tokens)] for rows, s in zip(features, sequences, strict=True)]


def capture_features(
    target: Target,
    sequences: SequenceType[Sequence],
    layers: SequenceType[int],
    directory: Path,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> FeatureSource:
    """Fill a feature cache with what it still lacks.

    A cache of more layers than are wanted is filled with all of its layers, and the wanted ones are read.

    Args:
        target: loaded in the precision that the features should have.
        sequences: what to capture; ids must be unique.
        layers: tapped decoder layers.
        directory: of the cache.
        on_progress: called with the tokens just done.

    Raises:
        UserError: the cache is damaged, was made with other settings, cannot be written, or does not fit on the disk.
    """
    settings = {
        "target": target.fingerprint,
        "layers": list(layers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "hidden_size": target.hidden_size,
    }
    held = read_settings(directory)["layers"] if os.path.exists(directory / SETTINGS_FILE) else []
    if set(held) >= set(layers):
        settings["layers"] = held
    cache = FeatureCache(directory, settings)
    source = cache if cache.layers == tuple(layers) else SelectedFeatures(cache, layers, target.hidden_size)
    if all(s in cache for s in sequences):
        on_progress(sum(len(s.tokens) for s in sequences))
        return source
    with cache.writing():
        on_progress(sum(len(s.tokens) for s in sequences if s in cache))
        _capture_missing(target, [s for s in sequences if s not in cache], cache.layers, cache, on_progress)
    return source


def _capture_missing(
    target: Target,
    sequences: SequenceType[Sequence],
    layers: SequenceType[int],
    cache: FeatureCache,
    on_progress: Callable[[int], None],
) -> None:
    _check_space(sum(len(s.tokens) for s in sequences), target, layers, cache.directory)
    pending: list[Sequence] = []
    rows: list[Tensor] = []
    # Sequences of like length share a batch, so that little of it is padding.
    for batch in _batches(sorted(sequences, key=lambda s: len(s.tokens)), BATCH_TOKENS):
        pending += batch
        rows += [features.cpu() for features in compute_features(target, batch, layers)]
        if sum(map(len, rows)) >= SHARD_TOKENS:
            cache.write_shard(pending, rows)
            pending, rows = [], []
        on_progress(sum(len(s.tokens) for s in batch))
    if pending:
        cache.write_shard(pending, rows)


def feature_bytes(tokens: int, layers: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Size of the features of so many tokens."""
    return tokens * layers * hidden_size * dtype.itemsize


def _check_space(tokens: int, target: Target, layers: SequenceType[int], directory: Path) -> None:
    needed = feature_bytes(tokens, len(layers), target.hidden_size, target.dtype)
    free = shutil.disk_usage(directory).free
    size = f"the features of {tokens:,} tokens need {needed / 1e9:.1f} GB"
    if needed > free:
        raise UserError(
            f"{size}, and {directory} has {free / 1e9:.1f} GB left; "
            "use another directory (--features), or no disk at all (data.features: online)"
        )
    level = logging.WARNING if needed > LARGE_BYTES else logging.INFO
    _log.log(level, "%s in %s, which has %.1f GB left", size, directory, free / 1e9)


def _batches(sequences: SequenceType[Sequence], max_tokens: int) -> list[list[Sequence]]:
    """Cut a list sorted by length into batches of at most `max_tokens` padded tokens (at least one sequence each)."""
    batches: list[list[Sequence]] = []
    for sequence in sequences:
        if batches and (len(batches[-1]) + 1) * len(sequence.tokens) <= max_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches
