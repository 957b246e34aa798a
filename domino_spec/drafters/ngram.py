"""`ngram`: prompt look-up. The longest recent n-gram that occurred before is followed by what followed it then.

A copy that reaches the end of the text goes on with what it has copied itself, so that a loop is drafted for as many
turns as fit. Needs no training and no features; strong on text that repeats its prompt or itself. It runs on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.decoding.state import Proposal, State, Verdict


class PromptLookup:
    """Proposes the continuation of the most recent earlier occurrence of the text's last tokens.

    Wherever there is such an occurrence, as many tokens are proposed as are asked for (see `NgramIndex.continuation`).

    Args:
        longest: longest n-gram to look for.
        shortest: shortest n-gram that may match.
        max_drafts: the most tokens copied in one cycle.
    """

    feature_layers: tuple[int, ...] = ()
    samples = False

    def __init__(self, longest: int = 4, shortest: int = 1, max_drafts: int = 8) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-gram lengths must satisfy 1 <= shortest <= longest, got {shortest} and {longest}")
        self.longest, self.shortest, self.max_drafts = longest, shortest, max_drafts

    def allocate(self, requests: int, capacity: int) -> NgramIndices:
        """An index of the n-grams of every request."""
        return NgramIndices.empty(self.longest, requests)

    def read(self, own: NgramIndices, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Nothing to do: the next proposal reads the committed text."""

    def propose(self, state: State, own: NgramIndices, num_drafts: int) -> Proposal:
        """Drafts copied from earlier text; a request without a match gets none."""
        drafts = own.continuations(state, self.shortest, num_drafts)
        counts = torch.tensor([len(d) for d in drafts])
        tokens = torch.zeros(len(drafts), int(counts.max()), dtype=torch.long)
        for row, draft in zip(tokens, drafts, strict=True):
            row[: len(draft)] = torch.tensor(draft, dtype=torch.long)
        device = state.tokens.device
        return Proposal(tokens.to(device), counts.to(device))

    def advance(self, own: NgramIndices, verdict: Verdict) -> None:
        """Nothing to do: the next proposal reads the committed text."""


@dataclass(frozen=True)
class NgramIndices:
    """An index of n-grams for every request, brought up to its text when a proposal is asked for."""

    indices: list[NgramIndex]

    @staticmethod
    def empty(longest: int, requests: int) -> NgramIndices:
        """Of texts that have not been read."""
        return NgramIndices([NgramIndex(longest) for _ in range(requests)])

    def view(self, start: int, stop: int) -> NgramIndices:
        """The requests `start .. stop - 1`, with the same indices."""
        return NgramIndices(self.indices[start:stop])

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, which leaves its index to be cleared."""
        indices = self.indices
        indices[source], indices[destination] = indices[destination], indices[source]

    def clear(self, request: int) -> None:
        """Forget a request."""
        self.indices[request].clear()

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Nothing to copy."""
        return ()

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Nothing to put back."""

    def wipe(self, request: int, rows: int) -> None:
        """Nothing is kept but tokens."""

    def continuations(self, state: State, shortest: int, count: int) -> list[list[int]]:
        """`NgramIndex.continuation` of every request's text."""
        found = []
        for index, row, length in zip(self.indices, state.tokens, state.lengths.tolist(), strict=True):
            index.extend(row[index.length : length].tolist())
            found.append(index.continuation(shortest, count))
        return found


class NgramIndex:
    """Where each n-gram of one growing text last ended, for look-ups in constant time."""

    def __init__(self, longest: int) -> None:
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._longest = longest

    @property
    def length(self) -> int:
        """Tokens indexed so far."""
        return len(self._text)

    def clear(self) -> None:
        """Forget the text."""
        self._text.clear()
        self._ends.clear()

    def extend(self, tokens: list[int]) -> None:
        """Add tokens to the end of the text."""
        for token in tokens:
            # The n-grams that end the text so far become findable once something follows them.
            end = len(self._text)
            for size in range(1, min(self._longest, end) + 1):
                self._ends[tuple(self._text[end - size :])] = end
            self._text.append(token)

    def continuation(self, shortest: int, count: int) -> list[int]:
        """What followed the longest recurring n-gram (`shortest` or more) that ends the text, where it last occurred.

        The copy runs on into itself: past the end of the text it repeats the tokens since that occurrence, so the tail
        ..abcabc is continued abcabca.. for as long as asked.

        Returns:
            `count` tokens, or none where no such n-gram occurred before.
        """
        for size in range(min(self._longest, len(self._text) - 1), shortest - 1, -1):
            end = self._ends.get(tuple(self._text[-size:]))
            if end is not None:
                period = len(self._text) - end  # at least 1: an n-gram is indexed once something follows it
                return [self._text[end + i % period] for i in range(count)]
        return []
