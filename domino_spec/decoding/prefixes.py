"""Texts that ended, kept with their cache rows, so that a prompt that begins with the same tokens reads only the rest.

The next turn of a conversation repeats all turns before it. When a request ends, its rows of the target's cache and of
the drafter's are copied out of its slot. All copies together take a limited number of bytes; the least recently used
are dropped first.

A row depends only on the tokens up to it, so the text is the same as without. (If products round differently for other
numbers of rows, so do rows that were read in another pass; `Target.check_exact` says when they do not.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]
"""Tensors [..., rows, D] of one request."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text and the rows computed for it, all but its last token's."""

    tokens: Tensor
    """[L], on the host."""
    target_rows: Rows
    draft_rows: Rows

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.target_rows, *self.draft_rows))


class PrefixCache:
    """Prefixes, the most recently used last.

    Args:
        most_bytes: memory for all of them; a text that needs more is not kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._prefixes: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, prefix: Prefix) -> None:
        """Keep a text; drop those that it continues, and the least recently used ones if there is no room."""
        if prefix.num_bytes > self.most_bytes:
            return
        length = len(prefix.tokens)
        for other in [p for p in self._prefixes if len(p.tokens) <= length]:
            if common_length(other.tokens, prefix.tokens) == len(other.tokens):
                self._drop(other)
        self._prefixes.append(prefix)
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.most_bytes:
            self._drop(self._prefixes[0])

    def longest(self, prompt: Sequence[int]) -> tuple[Prefix, int] | None:
        """The text that shares the most tokens with a prompt, and how many of its rows the prompt can use, if any.

        The last two tokens of a prompt are always read: the first cycle verifies the last one, and the drafter must
        have read at least one token of this request.
        """
        wanted = torch.tensor(prompt)
        best, rows = None, 0
        for prefix in self._prefixes:
            # A drafter's row may hold the token after its position, so the last token in common gives no row.
            usable = min(common_length(prefix.tokens, wanted) - 1, len(prompt) - 2)
            if usable > rows:
                best, rows = prefix, usable
        if best is None:
            return None
        self._prefixes.remove(best)
        self._prefixes.append(best)
        return best, rows

    def _drop(self, prefix: Prefix) -> None:
        self._prefixes.remove(prefix)
        self.num_bytes -= prefix.num_bytes


def common_length(ours: Tensor, theirs: Tensor) -> int:
    """How many tokens at their beginning two texts [L] have in common."""
    length = min(len(ours), len(theirs))
    different = (ours[:length] != theirs[:length]).nonzero()
    return int(different[0, 0]) if len(different) else length
