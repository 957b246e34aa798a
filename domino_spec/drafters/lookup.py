"""`ngram`: prompt look-up. The longest recent n-gram that occurred before is followed by what followed it then.

A copy that reaches the end of the text goes on with what it has copied itself, so that a loop is drafted for as many
turns as fit. Needs no training and no features; strong on text that repeats its prompt or itself. It runs on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import Drafter, NoCache, Proposal, State, Verdict, scope


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
        with scope("head"):
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


# ----------------------------------------------------------------------
# `domino+ngram`: prompt look-up where its match is long, the draft everywhere else.
#
# A long repeat is copied for nothing, so on text that repeats itself the draft's own pass can be saved; a text in a
# loop is copied in full blocks, however short the loop. It is a method of its own and reported apart: what look-up
# gains is never counted as the draft's.


@dataclass(frozen=True)
class LookupCache:
    """The n-grams of every request, and what the inner drafter keeps."""

    indices: NgramIndices
    inner: Any

    def view(self, start: int, stop: int) -> LookupCache:
        """The requests `start .. stop - 1`, in the same memory."""
        return LookupCache(self.indices.view(start, stop), self.inner.view(start, stop))

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, which is lost."""
        self.indices.move(source, destination)
        self.inner.move(source, destination)

    def clear(self, request: int) -> None:
        """Forget a request."""
        self.indices.clear(request)
        self.inner.clear(request)

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Copies of a request's first rows, [..., rows, D] each."""
        return self.inner.rows_of(request, rows)

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Make the first `rows` rows of `rows_of` a request's own."""
        self.inner.put_rows(request, rows, stored)

    def wipe(self, request: int, rows: int) -> None:
        """Zero the inner drafter's memory of a request."""
        self.inner.wipe(request, rows)


class LookupFirst:
    """Copies the continuation of a recurring n-gram; requests without a long match get the inner drafter's proposal.

    Args:
        inner: a drafter of *chosen* drafts.
        shortest: shortest n-gram whose continuation is trusted over the inner drafter.
        longest: longest n-gram to look for.
    """

    samples = False

    def __init__(self, inner: Drafter, shortest: int = 3, longest: int = 6) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-gram lengths must satisfy 1 <= shortest <= longest, got {shortest} and {longest}")
        self.inner, self.shortest, self.longest = inner, shortest, longest
        self.feature_layers = inner.feature_layers
        self.max_drafts = inner.max_drafts

    def allocate(self, requests: int, capacity: int) -> LookupCache:
        """An n-gram index per request, and the inner drafter's caches."""
        return LookupCache(NgramIndices.empty(self.longest, requests), self.inner.allocate(requests, capacity))

    def read(self, own: LookupCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """The inner drafter reads."""
        self.inner.read(own.inner, tokens, features, counts)

    def propose(self, state: State, own: LookupCache, num_drafts: int) -> Proposal:
        """Copied drafts where the match is long; the inner drafter runs only if some request needs it."""
        with scope("head"):
            copied = own.indices.continuations(state, self.shortest, num_drafts)
        if all(copied):
            proposal = Proposal.empty(len(copied), state.tokens.device)
        else:
            proposal = self.inner.propose(state, own.inner, num_drafts)
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

    def advance(self, own: LookupCache, verdict: Verdict) -> None:
        """The inner drafter's caches move on, whoever drafted."""
        self.inner.advance(own.inner, verdict)


# ----------------------------------------------------------------------
# `none`: nothing is drafted, so every cycle is one step of plain decoding on the same engine: the honest baseline.


class PlainDecoding:
    """Proposes nothing."""

    feature_layers: tuple[int, ...] = ()
    max_drafts = 0
    samples = False
    static = True

    def allocate(self, requests: int, capacity: int) -> NoCache:
        """Nothing to cache."""
        return NoCache()

    def read(self, own: NoCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Nothing to read."""

    def propose(self, state: State, own: NoCache, num_drafts: int) -> Proposal:
        """An empty proposal."""
        return Proposal.empty(len(state.lengths), state.lengths.device)

    def advance(self, own: NoCache, verdict: Verdict) -> None:
        """Nothing to cache."""
