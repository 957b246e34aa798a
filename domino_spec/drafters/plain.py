"""`none`: nothing is drafted, so every cycle is one step of plain decoding on the same engine: the honest baseline."""

from __future__ import annotations

from torch import Tensor

from domino_spec.decoding.drafter import NoCache
from domino_spec.decoding.state import Proposal, State, Verdict


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
