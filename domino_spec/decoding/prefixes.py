"""Texts that ended, kept with what was computed for them: a prompt that begins like one need not be read anew.

The next turn of a conversation repeats all turns before it. What is kept are rows of the target's cache and of the
drafter's, copied out of the slot that the request leaves, up to a number of bytes; the oldest go first.

A row depends only on the tokens up to it, so the text is the same as without. (Where products round otherwise for other
numbers of rows, so do rows read in another pass; `Target.check_exact` says where they do not.)
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
        """Memory that it holds."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.target_rows, *self.draft_rows))


class PrefixCache:
    """Prefixes, the most recently used last.

    Args:
        most_bytes: memory for all of them; texts that are larger are not kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._prefixes: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, prefix: Prefix) -> None:
        """Keep a text; those that it continues are dropped, and old ones where there is no room."""
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
        """The text that shares the most with a prompt, and how many of its rows the prompt can use; None for none.

        The last two tokens of a prompt are always left to be read: the last one is verified by the first cycle, and a
        drafter may want to have seen a pass end.
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
    """Tokens that two texts [L] begin with alike."""
    length = min(len(ours), len(theirs))
    different = (ours[:length] != theirs[:length]).nonzero()
    return int(different[0, 0]) if len(different) else length
