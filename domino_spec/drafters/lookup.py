"""Drafts that need no draft model: prompt look-up, alone (`ngram`) or before another drafter, and none at all.

Prompt look-up finds the last earlier occurrence of the text's last few tokens and proposes what followed them there. It
needs no training and no features, runs on the host, and is strong on text that repeats its prompt or itself. Before a
draft (`domino+ngram`, `domino-tree+ngram`) it copies long repeats at no cost, so the draft's pass can be saved.
These are separate methods, so that the gain of look-up is never counted as the draft's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, scope
from domino_spec.target.cache import RowCache


class NoCache(RowCache):
    """The cache of a drafter that keeps nothing."""

    row_fields = ()

    def __init__(self, requests: int) -> None:
        self.lengths = torch.zeros(requests, dtype=torch.long)


class PlainDecoding:
    """`none`: proposes nothing, so every cycle is one step of plain decoding: the honest baseline."""

    feature_layers: tuple[int, ...] = ()
    max_drafts = 0
    samples = False
    static = True

    def allocate(self, requests: int, capacity: int) -> NoCache:
        """Nothing to cache."""
        return NoCache(requests)

    def read(self, cache: NoCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Nothing to read."""

    def propose(self, state: State, cache: NoCache, num_drafts: int) -> Proposal:
        """An empty proposal."""
        return Proposal.empty(len(state.lengths), state.lengths.device)

    def advance(self, cache: NoCache, verdict: Verdict) -> None:
        """Nothing to cache."""


class LookupFirst:
    """Copies the continuation of a recurring n-gram; requests without a match get the inner drafter's proposal.

    Args:
        inner: a drafter of *chosen* drafts.
        shortest: shortest n-gram whose continuation is trusted over the inner drafter.
        longest: longest n-gram to look for.
        max_drafts: the most tokens copied in one cycle; None is the inner drafter's most.
    """

    samples = False

    def __init__(self, inner: Drafter, shortest: int = 3, longest: int = 6, max_drafts: int | None = None) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-gram lengths must satisfy 1 <= shortest <= longest, got {shortest} and {longest}")
        self.inner, self.shortest, self.longest = inner, shortest, longest
        self.feature_layers = inner.feature_layers
        self.max_drafts = inner.max_drafts if max_drafts is None else max_drafts

    def allocate(self, requests: int, capacity: int) -> LookupCache:
        """An n-gram index per request, and the inner drafter's cache."""
        indices = [NgramIndex(self.longest) for _ in range(requests)]
        return LookupCache(indices, self.inner.allocate(requests, capacity))

    def read(self, cache: LookupCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """The inner drafter reads; an index reads the committed text when a proposal is asked for."""
        self.inner.read(cache.inner, tokens, features, counts)

    def propose(self, state: State, cache: LookupCache, num_drafts: int) -> Proposal:
        """Copied drafts if there is a match; the inner drafter runs only if some request needs it."""
        copied = []
        with scope("head"):
            for index, row, length in zip(cache.indices, state.tokens, state.lengths.tolist(), strict=True):
                index.extend(row[index.length : length].tolist())
                copied.append(index.continuation(self.shortest, num_drafts))
        if all(copied):
            proposal = Proposal.empty(len(copied), state.tokens.device)
        else:
            proposal = self.inner.propose(state, cache.inner, num_drafts)
        assert proposal.draft_probs is None, "look-up mixes with chosen drafts only"
        # A copy may be longer than what the draft proposes, which leaves out what it doubts.
        missing = max(map(len, copied)) - proposal.tokens.shape[1]
        tokens, counts = F.pad(proposal.tokens, (0, max(0, missing))).clone(), proposal.num_drafts.clone()
        parents = None if proposal.parents is None else F.pad(proposal.parents, (0, max(0, missing)), value=-1).clone()
        for r, draft in enumerate(copied):
            if draft:
                tokens[r, : len(draft)] = torch.tensor(draft, device=tokens.device)
                counts[r] = len(draft)
                if parents is not None:
                    parents[r, : len(draft)] = torch.arange(-1, len(draft) - 1, device=tokens.device)
        return Proposal(tokens, counts, parents)

    def advance(self, cache: LookupCache, verdict: Verdict) -> None:
        """The inner drafter's cache advances, also if look-up drafted."""
        self.inner.advance(cache.inner, verdict)


class PromptLookup(LookupFirst):
    """`ngram`: look-up alone. Whenever its n-gram occurred before, it proposes as many tokens as are asked for."""

    def __init__(self, longest: int = 4, shortest: int = 1, max_drafts: int = 8) -> None:
        super().__init__(PlainDecoding(), shortest, longest, max_drafts)


class LookupCache(RowCache):
    """The n-grams of every request on the host, and the inner drafter's cache."""

    def __init__(self, indices: list[NgramIndex], inner: Any) -> None:
        self.indices, self.inner = indices, inner

    def view(self, start: int, stop: int, extent: int | None = None) -> LookupCache:
        """As `RowCache.view`."""
        return LookupCache(self.indices[start:stop], self.inner.view(start, stop, extent))

    def move(self, source: int, destination: int) -> None:
        """As `RowCache.move`; `source` is left with an index that must be cleared."""
        indices = self.indices
        indices[source], indices[destination] = indices[destination], indices[source]
        self.inner.move(source, destination)

    def clear(self, request: int) -> None:
        """Forget a request."""
        self.indices[request].clear()
        self.inner.clear(request)

    def wipe(self, request: int, rows: int, first: int = 0) -> None:
        """As `RowCache.wipe`; an index keeps nothing but tokens."""
        self.inner.wipe(request, rows, first)

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """As `RowCache.rows_of`; an index is made anew from the text."""
        return self.inner.rows_of(request, rows)

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """As `RowCache.put_rows`."""
        self.inner.put_rows(request, rows, stored)


class NgramIndex:
    """The place where each n-gram of one growing text last ended, for look-ups in constant time."""

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
        """What followed the longest recurring n-gram (`shortest` or more) that ends the text, at its last occurrence.

        The copy runs on into itself: past the end of the text it repeats the tokens since that occurrence, so the tail
        ..abcabc is continued abcabca.. for as long as asked.

        Returns:
            `count` tokens, or none if no such n-gram occurred before.
        """
        for size in range(min(self._longest, len(self._text) - 1), shortest - 1, -1):
            end = self._ends.get(tuple(self._text[-size:]))
            if end is not None:
                period = len(self._text) - end  # at least 1: an n-gram is indexed once something follows it
                return [self._text[end + i % period] for i in range(count)]
        return []
