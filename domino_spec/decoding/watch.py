"""Is the draft of any use? Watched while decoding, and said once where it is not.

A draft that does not fit (made for another target, another chat template, read by another convention, overflowing)
changes no word of the output: all that can be seen of it is that almost no pass accepts a draft. A pass that accepts
one or does not is a coin thrown; Wilson's upper bound of how often it lands well is the judge. The passes of a text
resemble each other and the bound is looked at again and again, so it is a wide one (three standard deviations) and
looked at only when the number of passes has doubled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

_log = logging.getLogger(__name__)

FIRST_LOOK = 64
"""Passes with drafts before anything is said."""
USELESS = 0.2
"""Share of passes that accept a draft below which a draft is called useless. One that was trained for its target
accepts one in more than half of them."""
DEVIATIONS = 3.0
"""Standard deviations of the bound."""

CAUSES = (
    "the draft was made for another target or a fine-tuned one (domino-spec inspect DRAFT --target TARGET compares "
    "them), the chat template or thinking mode differs from its training data, its label convention or tapped layers "
    "are read otherwise than it was trained, its values overflow in this precision, or the temperature is high"
)


class DraftWatch:
    """Counts passes with drafts and those that accepted one; warns once where that is hardly ever so.

    Args:
        name: of the method, for the warning.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.passes = 0
        """Verify passes of single requests that had drafts."""
        self.lucky = 0
        """Those of them that accepted at least one."""
        self.accepted = 0
        """Drafts accepted by them."""
        self.warned = False
        self._next_look = FIRST_LOOK

    def count(self, proposed: Iterable[int], accepted: Iterable[int]) -> None:
        """Take in a cycle.

        Args:
            proposed: drafts of each request.
            accepted: how many of them were accepted; below 0 for requests that were not decoded.
        """
        for drafts, kept in zip(proposed, accepted, strict=True):
            if drafts > 0 and kept >= 0:
                self.passes += 1
                self.lucky += kept > 0
                self.accepted += kept
        if self.passes >= self._next_look and not self.warned:
            self._next_look = 2 * self.passes
            if upper_bound(self.lucky, self.passes) < USELESS:
                self.warned = True
                _log.warning("%s", self.sentence)

    @property
    def sentence(self) -> str:
        """What is to be said."""
        return (
            f"drafts are hardly ever accepted: of {self.passes} verify passes with drafts of method {self.name}, "
            f"{self.lucky} accepted one (acceptance length {1 + self.accepted / self.passes:.2f}), so drafting only "
            f"costs time, though no word is wrong. Likely causes: {CAUSES}"
        )


def upper_bound(hits: int, trials: int, deviations: float = DEVIATIONS) -> float:
    """Upper end of Wilson's interval for the chance of a hit."""
    share, weight = hits / trials, deviations**2 / trials
    spread = deviations * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return (share + weight / 2 + spread) / (1 + weight)
