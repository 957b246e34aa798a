"""`domino+ngram`: prompt look-up where its match is long, the draft everywhere else.

A long repeat is copied for nothing, so on text that repeats itself the draft's own pass can be saved; a text in a loop
is copied in full blocks, however short the loop. It is a method of its own and reported apart: what look-up gains is
never counted as the draft's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from domino_spec.decoding.drafter import Drafter
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.drafters.ngram import NgramIndex


class LookupFirst:
    """Copies the continuation of a recurring n-gram; requests without a long match get the inner drafter's proposal.

    Args:
        inner: a drafter of *chosen* drafts.
        shortest: shortest n-gram whose continuation is trusted over the inner drafter.
        longest: longest n-gram to look for.
    """

    def __init__(self, inner: Drafter, shortest: int = 3, longest: int = 6) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-gram lengths must satisfy 1 <= shortest <= longest, got {shortest} and {longest}")
        self.inner, self.shortest, self.longest = inner, shortest, longest
        self.feature_layers = inner.feature_layers
        self.max_drafts = inner.max_drafts

    def start(self, state: State) -> tuple[list[NgramIndex], Any]:
        """An n-gram index per request, and the inner drafter's caches."""
        return [NgramIndex(self.longest) for _ in range(len(state.lengths))], self.inner.start(state)

    def propose(self, state: State, own: tuple[list[NgramIndex], Any], num_drafts: int) -> Proposal:
        """Copied drafts where the match is long; the inner drafter runs only if some request needs it."""
        indices, inner_own = own
        copied = []
        for index, row, length in zip(indices, state.tokens, state.lengths.tolist(), strict=True):
            index.extend(row[index.length : length].tolist())
            copied.append(index.continuation(self.shortest, num_drafts))
        # Even where nothing is asked of it, the inner drafter says whether it makes trees: other random numbers decide
        # trees than chains, and which ones decide a copy must not depend on its neighbours.
        proposal = self.inner.propose(state, inner_own, 0 if all(copied) else num_drafts)
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

    def advance(self, own: tuple[list[NgramIndex], Any], verdict: Verdict) -> tuple[list[NgramIndex], Any]:
        """The inner drafter's caches move on, whoever drafted."""
        return own[0], self.inner.advance(own[1], verdict)
