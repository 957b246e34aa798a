"""`domino+ngram`: prompt look-up where its match is long, the draft everywhere else.

A long repeat is copied for nothing, so on text that repeats itself the draft's own pass can be saved; a text in a loop
is copied in full blocks, however short the loop. It is a method of its own and reported apart: what look-up gains is
never counted as the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.drafter import Drafter
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.drafters.ngram import NgramIndices


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
