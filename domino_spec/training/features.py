"""The target's features for every training sequence, captured once and kept in shards on disk.

Capturing costs a full pass of the target, so a draft that is trained for several epochs reads them back instead.
A shard holds whole sequences; it is written atomically, so an interrupted capture goes on at the next shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.files import read_json, save_tensors, write_json
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence

SHARD_TOKENS = 50_000
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Sequences of unequal length, right-padded, with their features."""

    tokens: Tensor
    """[S, T] int64."""
    lengths: Tensor
    """[S]."""
    prompt_lengths: Tensor
    """[S]."""
    features: Tensor
    """[S, T, layers * H]; zero past a sequence's length."""


class _Place(NamedTuple):
    """Where a sequence's features are."""

    shard: Path
    start: int
    end: int
    digest: str | None = None
    """Of the tokens: a sequence of the same id and other tokens is captured anew. Absent in older shards."""


class FeatureCache:
    """Features of a list of sequences, on disk.

    Args:
        directory: holds `settings.json` and shards; made when missing.
        settings: what the features depend on; a directory with other settings is refused.

    Raises:
        UserError: the directory belongs to other settings.
    """

    def __init__(self, directory: Path, settings: dict) -> None:
        self.directory = directory
        self._places: dict[str, _Place] = {}
        self._open: dict[Path, safe_open] = {}
        known = directory / "settings.json"
        if known.exists():
            if read_json(known) != settings:
                raise UserError(f"feature cache {directory} was made with other settings; remove it or choose another")
        else:
            write_json(settings, known)
        shards = sorted(directory.glob("shard-*.safetensors"))
        for shard in shards:
            self._index(shard)
        self._next_number = int(shards[-1].stem.removeprefix("shard-")) + 1 if shards else 0

    def _index(self, shard: Path) -> None:
        try:
            self._open[shard] = file = safe_open(shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard} is damaged ({error}); remove it, and what it held is captured again") from None
        for id_, *place in json.loads(file.metadata()["sequences"]):
            self._places[id_] = _Place(shard, *place)

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
            table.append((sequence.id, start, start + len(rows), sequence.digest))
            start += len(rows)
        save_tensors({"features": torch.cat(list(features))}, shard, {"sequences": json.dumps(table)})
        self._next_number += 1
        self._index(shard)

    def read(self, sequence: Sequence) -> Tensor:
        """Features [T, F] of one sequence."""
        place = self._places[sequence.id]
        return self._open[place.shard].get_slice("features")[place.start : place.end]

    def batch(self, sequences: SequenceType[Sequence]) -> Batch:
        """Read and pad some sequences."""
        return pad_batch(sequences, [self.read(s) for s in sequences])


def pad_batch(sequences: SequenceType[Sequence], features: SequenceType[Tensor]) -> Batch:
    """Right-pad sequences and their features to one length."""
    return Batch(
        tokens=torch.nn.utils.rnn.pad_sequence([s.tokens for s in sequences], batch_first=True),
        lengths=torch.tensor([len(s.tokens) for s in sequences]),
        prompt_lengths=torch.tensor([s.prompt_length for s in sequences]),
        features=torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True),
    )


def feature_scale(cache: FeatureCache, sequences: SequenceType[Sequence], sample: int = 64) -> Tensor:
    """One over the root mean square of every feature dimension, [F] float32, over the first `sample` sequences.

    The first token of each is left out: many models park huge activations there.
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
    return [rows[: len(s.tokens)].cpu() for rows, s in zip(features, sequences, strict=True)]


def capture_features(
    target: Target,
    sequences: SequenceType[Sequence],
    layers: SequenceType[int],
    directory: Path,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> FeatureCache:
    """Fill a feature cache with what it still lacks.

    Args:
        target: loaded in the precision that the features should have.
        sequences: what to capture; ids must be unique.
        layers: tapped decoder layers.
        directory: of the cache.
        on_progress: called with the tokens just done.
    """
    settings = {
        "target": target.fingerprint,
        "layers": list(layers),
        "dtype": str(target.dtype).removeprefix("torch."),
        "hidden_size": target.hidden_size,
    }
    cache = FeatureCache(directory, settings)
    on_progress(sum(len(s.tokens) for s in sequences if s in cache))
    # Sequences of like length share a batch, so that little of it is padding.
    missing = sorted((s for s in sequences if s not in cache), key=lambda s: len(s.tokens))
    pending: list[Sequence] = []
    rows: list[Tensor] = []
    for batch in _batches(missing, BATCH_TOKENS):
        pending += batch
        rows += compute_features(target, batch, layers)
        if sum(map(len, rows)) >= SHARD_TOKENS:
            cache.write_shard(pending, rows)
            pending, rows = [], []
        on_progress(sum(len(s.tokens) for s in batch))
    if pending:
        cache.write_shard(pending, rows)
    return cache


def _batches(sequences: SequenceType[Sequence], max_tokens: int) -> list[list[Sequence]]:
    """Cut a list sorted by length into batches of at most `max_tokens` padded tokens (at least one sequence each)."""
    batches: list[list[Sequence]] = []
    for sequence in sequences:
        if batches and (len(batches[-1]) + 1) * len(sequence.tokens) <= max_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches
