"""The protocol that every drafting method follows: what the loop asks of a drafter (DESIGN section 5)."""

from __future__ import annotations

from typing import Any, Protocol

from domino_spec.decoding.state import Proposal, State, Verdict


class Drafter(Protocol):
    """Proposes drafts for the requests of a `State`."""

    feature_layers: tuple[int, ...]
    """Decoder layers of the target whose outputs it reads; prefill and verification tap these."""
    max_drafts: int
    """The most it can propose in one cycle."""

    def start(self, state: State) -> Any:
        """Its own caches for freshly prefilled requests."""
        ...

    def propose(self, state: State, own: Any, num_drafts: int) -> Proposal:
        """Up to `num_drafts` drafts per request, `num_drafts <= max_drafts`."""
        ...

    def advance(self, own: Any, verdict: Verdict) -> Any:
        """Its caches after a commit; `verdict` carries the features of what was committed."""
        ...
