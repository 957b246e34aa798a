"""The lossless check over HTTP: at temperature 0 a server's texts beside the baseline's, character by character.

Servers may round differently, and the same server rounds differently with other requests beside one, so texts can part
at near ties without a fault. What is found is reported, not judged: the baseline is compared with itself at its lowest
concurrency too, which says how much of that there is without any draft.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest

from domino_spec.bench.server.rows import Measured, RequestRow

_CONTEXT = 24
"""Characters shown from where texts part."""


@dataclass(frozen=True)
class Equality:
    """The greedy texts of one server at one concurrency, compared with a reference's."""

    server: str
    concurrency: int
    reference: str
    reference_concurrency: int
    compared: int
    equal: int


@dataclass(frozen=True)
class Difference:
    """A prompt whose texts part, where they do so first."""

    server: str
    concurrency: int
    reference: str
    reference_concurrency: int
    suite: str
    id: str
    times: int
    """Requests of this prompt whose texts part, over rounds and repeats; the rest describes the first of them."""
    position: int
    """Characters that are equal before."""
    wrote: str
    """What follows there; empty where the text has ended."""
    reference_wrote: str


def first_difference(text: str, other: str) -> int | None:
    """How many characters are equal before two texts part; None where they never do."""
    return next((i for i, (a, b) in enumerate(zip_longest(text, other)) if a != b), None)


def compare_texts(measured: Measured, baseline: str) -> tuple[list[Equality], list[Difference]]:
    """All greedy texts beside the baseline's: of other servers at the same concurrency, of its own at its lowest."""
    greedy = [
        row
        for window in measured.windows
        if window.temperature == 0
        for row in measured.requests[window.key]
        if row.error is None
    ]
    own = {row.asked: row for row in greedy if row.server == baseline}
    lowest = min((key.concurrency for key in own), default=0)
    first: dict[tuple[str, str], RequestRow] = {}
    for key, row in own.items():
        if key.concurrency == lowest:
            first.setdefault((key.suite, key.id), row)
    counts: dict[tuple[str, int, int], list[int]] = {}
    parting: dict[tuple[str, int, str, str], Difference] = {}
    for row in greedy:
        reference = own.get(row.asked) if row.server != baseline else first.get((row.suite, row.id))
        if reference is None or reference is row:
            continue
        counted = counts.setdefault((row.server, row.concurrency, reference.concurrency), [0, 0])
        position = first_difference(row.text, reference.text)
        counted[0] += 1
        counted[1] += position is None
        if position is not None:
            known = parting.get((row.server, row.concurrency, row.suite, row.id))
            parting[row.server, row.concurrency, row.suite, row.id] = _difference(row, reference, position, known)
    equalities = [
        Equality(server, concurrency, baseline, at, compared, equal)
        for (server, concurrency, at), (compared, equal) in counts.items()
    ]
    return sorted(equalities, key=lambda e: (e.server != baseline, e.server, e.concurrency)), list(parting.values())


def _difference(row: RequestRow, reference: RequestRow, position: int, known: Difference | None) -> Difference:
    if known is not None:
        return replace(known, times=known.times + 1)
    return Difference(
        *(row.server, row.concurrency, reference.server, reference.concurrency, row.suite, row.id, 1, position),
        row.text[position : position + _CONTEXT],
        reference.text[position : position + _CONTEXT],
    )
