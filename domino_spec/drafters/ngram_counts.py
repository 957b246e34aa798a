"""The N-gram model that prunes DART's trees (arXiv 2601.19278): how often a token followed the one or two before it.

The slots of DART are filled in one pass and know nothing of each other; counts of text tell which of their tokens go
together. As in the released code: every window of `order` tokens of every text is counted, shorter ones at its end
included, and a child's probability is freq(context + child) / freq(context) for the longest context that the child was
seen after. There is no discount, and no unigram: what followed none of the contexts has probability 0.

A trie in sorted arrays: level k holds the distinct n-grams of k tokens. The key of an n-gram is the place of its first
k - 1 tokens in the level above, times V, plus its last token, so a binary search finds a child and its whole level of
the search is looked up at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from domino_spec.draft.vocabulary import check_tokenizer
from domino_spec.files import load_tensors, save_tensors
from domino_spec.settings import Settings, UserError, parse_settings, require
from domino_spec.target.model import Target

ORDER = 3
"""The published default: contexts of two tokens and of one."""
LARGEST_ORDER = 64
"""Hardly anything longer occurs twice, and every order is another pass over all texts."""
_METADATA = "ngrams"


@dataclass(frozen=True)
class NgramSource(Settings):
    """What an N-gram model was counted in; saved with it."""

    order: int
    """Tokens of the longest n-grams: one more than those of the longest context."""
    vocab_size: int
    """V; ids outside 0 to V - 1 are never seen."""
    num_tokens: int
    """Tokens counted, ends of texts included."""
    source: str
    """What was counted."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None if the target has none."""
    target_fingerprint: str | None = None
    """The target that wrote the texts; another one with the same tokenizer may use them too."""

    def __post_init__(self) -> None:
        require(self.order >= 2, f"an N-gram model needs an order of at least 2, got {self.order}")
        require(self.order <= LARGEST_ORDER, f"an N-gram model needs an order of at most {LARGEST_ORDER}")


@dataclass(frozen=True, eq=False)
class NgramModel:
    """Counts of n-grams; see `build` and `load`."""

    about: NgramSource
    keys: tuple[np.ndarray, ...]
    """Per level, [n-grams] int64, ascending: place of the first tokens in the level above (0 for none) * V + last."""
    counts: tuple[np.ndarray, ...]
    """Per level, [n-grams] int32: how often each occurred."""

    @property
    def order(self) -> int:
        """Tokens of the longest n-grams."""
        return self.about.order

    @classmethod
    def build(
        cls,
        texts: Iterable[Iterable[int]],
        order: int = ORDER,
        eos: int | None = None,
        *,
        vocab_size: int | None = None,
        source: str = "texts",
        tokenizer: str | None = None,
        target_fingerprint: str | None = None,
    ) -> NgramModel:
        """Count texts; no window reaches from one into the next.

        Args:
            texts: token ids.
            order: tokens of the longest n-grams.
            eos: appended to every text; None if texts hold their end.
            vocab_size: V; None for what the texts need.
            source: what they are, for the file.
            tokenizer: see `NgramSource`, and so is `target_fingerprint`.

        Raises:
            UserError: an order out of range, no tokens, or ids outside the vocabulary.
        """
        end = [] if eos is None else [eos]
        parts = [np.asarray([*text, *end], dtype=np.int64) for text in texts]
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if len(tokens) == 0:
            raise UserError(f"{source} holds no tokens to count")
        size = int(tokens.max()) + 1 if vocab_size is None else vocab_size
        if tokens.min() < 0 or tokens.max() >= size:
            raise UserError(f"{source} holds token ids outside the vocabulary of {size}")
        about = NgramSource(order, size, len(tokens), source, tokenizer, target_fingerprint)
        ends = np.cumsum([len(part) for part in parts])
        left = np.repeat(ends, [len(part) for part in parts]) - np.arange(len(tokens))  # up to the end of the text
        keys, counts = [], []
        starts, place = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
        for length in range(1, order + 1):
            inside = left[starts] >= length
            starts, place = starts[inside], place[inside]
            level, place, count = np.unique(
                place * size + tokens[starts + length - 1], return_inverse=True, return_counts=True
            )
            keys.append(level)
            counts.append(count.astype(np.int32))
        return cls(about, tuple(keys), tuple(counts))

    def probabilities(self, contexts: np.ndarray, children: np.ndarray) -> np.ndarray:
        """How likely each child follows its context.

        Args:
            contexts: [..., C] tokens in reading order, of which the last `order - 1` matter; -1 if there is none.
            children: [..., K] tokens.

        Returns:
            [..., K] float64, for each child from the longest context after which it was seen; 0 for none.
        """
        size = self.about.vocab_size
        result = np.zeros(children.shape)
        unseen = (children >= 0) & (children < size)
        for length in range(min(self.order - 1, contexts.shape[-1]), 0, -1):
            if len(self.keys[length]) == 0:  # every text is shorter
                continue
            places = self._find(contexts[..., contexts.shape[-1] - length :])
            # A context that never occurred has no children: its keys are negative.
            at, found = self._search(length, np.where(places < 0, -size, places * size)[..., None] + children)
            found &= unseen
            np.divide(self.counts[length][at], self.counts[length - 1][places][..., None], out=result, where=found)
            unseen &= ~found
        return result

    def _find(self, ngrams: np.ndarray) -> np.ndarray:
        """Places of n-grams [..., length] in their level, -1 for those never seen: [...]."""
        places = np.zeros(ngrams.shape[:-1], dtype=np.int64)
        for level in range(ngrams.shape[-1]):
            token = ngrams[..., level]
            at, found = self._search(level, places * self.about.vocab_size + token)
            found &= (places >= 0) & (token >= 0) & (token < self.about.vocab_size)
            places = np.where(found, at, -1)
        return places

    def _search(self, level: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of keys in a level that is not empty, and which are there; the others' mean nothing, but exist."""
        known = self.keys[level]
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return at, known[at] == keys

    def check(self, target: Target) -> None:
        """Refuse a target with another tokenizer.

        Raises:
            UserError: one sentence that names both sides.
        """
        check_tokenizer("this N-gram model", self.about.vocab_size, self.about.tokenizer, target)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, atomically.

        Raises:
            UserError: it could not be written.
        """
        tensors = {
            f"{name}.{level}": torch.from_numpy(array)
            for name, arrays in (("keys", self.keys), ("counts", self.counts))
            for level, array in enumerate(arrays, 1)
        }
        save_tensors(tensors, Path(path), {_METADATA: json.dumps(asdict(self.about))})

    @classmethod
    def load(cls, path: Path | str) -> NgramModel:
        """What `save` wrote.

        Raises:
            UserError: it cannot be read, or is not an N-gram model.
        """
        tensors, metadata = load_tensors(Path(path))
        try:
            described = json.loads(metadata[_METADATA])
        except (KeyError, ValueError):
            raise UserError(
                f"{path} is not an N-gram model: it does not say what was counted; build one from the training answers"
            ) from None
        about = parse_settings(NgramSource, described, str(path))
        levels = range(1, about.order + 1)
        keys = tuple(_array(tensors, f"keys.{level}", torch.int64, path) for level in levels)
        counts = tuple(_array(tensors, f"counts.{level}", torch.int32, path) for level in levels)
        if not _consistent(keys, counts, about.vocab_size):
            raise UserError(f"{path} is not a usable N-gram model: its counts do not fit together; build it again")
        return cls(about, keys, counts)


def _array(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, path: Path | str) -> np.ndarray:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.dim() != 1:
        raise UserError(f"{path} is not a usable N-gram model: {name} is missing or of another type; build it again")
    return tensor.numpy()


def _consistent(keys: Sequence[np.ndarray], counts: Sequence[np.ndarray], vocab_size: int) -> bool:
    """Whether keys ascend and name places that the level above has, and everything counted has a count."""
    places = 1
    for level, count in zip(keys, counts, strict=True):
        if len(level) != len(count) or (count < 1).any() or (np.diff(level) < 1).any():
            return False
        if len(level) and not 0 <= level[0] <= level[-1] < places * vocab_size:
            return False
        places = len(level)
    return True
