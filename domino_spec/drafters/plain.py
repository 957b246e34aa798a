"""`none`: nothing is drafted, so every cycle is one step of plain decoding on the same engine: the honest baseline."""

from __future__ import annotations

from domino_spec.decoding.state import Proposal, State, Verdict


class PlainDecoding:
    """Proposes nothing."""

    feature_layers: tuple[int, ...] = ()
    max_drafts = 0

    def start(self, state: State) -> None:
        """Nothing to cache."""

    def propose(self, state: State, own: None, num_drafts: int) -> Proposal:
        """An empty proposal."""
        return Proposal.empty(len(state.lengths), state.lengths.device)

    def advance(self, own: None, verdict: Verdict) -> None:
        """Nothing to cache."""
