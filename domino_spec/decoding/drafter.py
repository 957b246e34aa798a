"""The protocols of drafters and of draft policies: what the loop asks of them (DESIGN section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from domino_spec.decoding.state import Proposal, State, Verdict


class DraftCache(Protocol):
    """What a drafter keeps of the requests between two cycles, in memory allocated once."""

    def view(self, start: int, stop: int) -> Any:
        """The requests `start .. stop - 1` as a cache of their own, in the same memory."""
        ...

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, which is lost."""
        ...

    def clear(self, request: int) -> None:
        """Forget a request."""
        ...

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Copies of what was read of a request's first `rows` positions, [..., rows, D] each."""
        ...

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Make the first `rows` rows of `rows_of` a request's own; more of its text will be read."""
        ...

    def wipe(self, request: int, rows: int) -> None:
        """Zero what a text of so many rows may have left, so that nothing in it is not finite."""
        ...


class Drafter(Protocol):
    """Proposes drafts for the requests of a `State`."""

    feature_layers: tuple[int, ...]
    """Decoder layers of the target whose outputs it reads; prefill and verification tap these."""
    max_drafts: int
    """The most it can propose in one cycle."""
    samples: bool
    """Whether it samples drafts for requests above temperature 0: how many it proposes then decides which text a seed
    gives. *Chosen* drafts never change a text."""

    def allocate(self, requests: int, capacity: int) -> Any:
        """Its own caches, a `DraftCache` for so many requests of up to `capacity` tokens; they start empty."""
        ...

    def read(self, own: Any, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Take in text that it did not draft: a prompt, or what was committed without drafts.

        Args:
            own: its caches.
            tokens: [R, n], the token that follows each position.
            features: [R, n, F], of positions behind those already read; None where it taps nothing.
            counts: [R], how many of them are meant.
        """
        ...

    def propose(self, state: State, own: Any, num_drafts: int) -> Proposal:
        """Up to `num_drafts` drafts per request, `num_drafts <= max_drafts`."""
        ...

    def advance(self, own: Any, verdict: Verdict) -> None:
        """Take in a commit; `verdict` carries the features of what was committed."""
        ...


@dataclass(frozen=True)
class DraftPlan:
    """What one cycle does, as a policy wants it."""

    requests: int
    """R."""
    drafts: int
    """Drafts per request to ask the drafter for; 0 for a plain cycle."""
    verified: int
    """The best of them that a static cycle verifies, which does not `cut` (`decoding.static`)."""
    trial: bool = False
    """Whether a plain cycle also drafts for a few requests, without verifying, to see whether drafting would pay."""

    def cut(self, proposal: Proposal) -> Proposal:
        """The proposal with only the drafts that pay; here all of them."""
        return proposal


@dataclass(frozen=True)
class Cycle:
    """What a cycle did, for the policy."""

    plan: DraftPlan
    offered: Proposal
    """What the drafter proposed: for every request, or for a few of them in a trial; empty if it was not asked."""
    proposal: Proposal
    """What was verified."""
    verdict: Verdict
    """Its tokens and features are not read."""
    seconds: float | None
    """Of the cycle, without the trial; None if nobody measured them apart."""
    trial_seconds: float | None = None
    """Of the trial; None if there was none or nobody measured it apart."""


class DraftPolicy(Protocol):
    """Decides how many drafts a cycle has."""

    def plan(self, requests: int, most: int) -> DraftPlan:
        """What to ask the drafter for in the next cycle of so many requests: at most `most` drafts of each."""
        ...

    def observe(self, cycle: Cycle) -> None:
        """Learn from a cycle. A static cycle is observed after the next one was planned."""
        ...


class NoCache:
    """The caches of a drafter that keeps nothing."""

    def view(self, start: int, stop: int, extent: int | None = None) -> NoCache:
        """Nothing to see."""
        return self

    def move(self, source: int, destination: int) -> None:
        """Nothing to move."""

    def clear(self, request: int) -> None:
        """Nothing to forget."""

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Nothing to copy."""
        return ()

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Nothing to put back."""

    def wipe(self, request: int, rows: int, first: int = 0) -> None:
        """Nothing to zero."""


def is_static(drafter: Drafter) -> bool:
    """Whether a drafter can be part of a static cycle (`decoding.static`); those that say nothing cannot.

    Its `propose` and `advance` then never look at the device, what they allocate has shapes that depend on the number
    of requests, the extent and `num_drafts` alone. `view` of its caches takes an `extent`, the rows to read whatever
    the lengths are, and `wipe` the first row to zero. Requests with `num_accepted` -1 have ended: `advance` leaves
    theirs alone.
    """
    return bool(getattr(drafter, "static", False))


def cycle_room(drafter: Drafter) -> int:
    """Rows that caches need beyond a text's own: a cycle may overshoot by a whole block before it is cut."""
    return 2 * (drafter.max_drafts + 1)


def start(drafter: Drafter, state: State) -> Any:
    """A drafter's caches for freshly prefilled requests."""
    requests, capacity = state.tokens.shape
    own = drafter.allocate(requests, capacity)
    longest = int(state.lengths.max()) - 1
    if longest:
        drafter.read(own, state.tokens[:, 1 : longest + 1], state.features, state.lengths - 1)
    return own
