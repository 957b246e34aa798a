"""Is a greedy text that differs from plain decoding's a fault, or a near tie that rounding decided?

A pass over several tokens and a pass over one round differently (docs/design.md, section 5), so two texts may differ
where the target's two best tokens are almost equal. For every text that differs, the target is run once more up to the
first difference: the margin between its two best logits there, and how far rounding moves logits on that text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from domino_spec.bench.rows import Measured, RequestRow, Row
from domino_spec.bench.suites import EncodedPrompt
from domino_spec.files import read_json, write_json
from domino_spec.settings import Settings, parse_settings
from domino_spec.target.model import Target

TIES_FILE = "ties.json"
REFERENCES = ("none", "transformers")
"""Methods whose greedy texts the others must equal."""


@dataclass(frozen=True)
class Parting(Settings):
    """Where a greedy text first differs from a reference's, as raw.jsonl shows it."""

    suite: str
    id: str
    method: str
    budget: int
    repeat: int
    reference: str
    """Method that it is compared with."""
    position: int
    """Generated tokens that are equal before it."""
    token: int | None
    """What the method wrote there; None if its text had ended."""
    reference_token: int | None


@dataclass(frozen=True)
class Tie(Settings):
    """What the target says at a parting."""

    parting: Parting
    top_tokens: tuple[int, ...]
    """The target's two best tokens there."""
    margin: float
    """The best logit less the second best, as plain decoding sees them."""
    rounding: float
    """Largest change of any logit there when the text is read in one pass instead of token by token."""
    near_tie: bool
    """Whether rounding can reverse the order of the two."""


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """Index of the first token, or character, in which two texts differ; None if they are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def compared_texts(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Every greedy run beside the run of each reference for the same prompt and repeat."""
    greedy = [row for row in rows if row.temperature == 0]
    references = {(r.suite, r.id, r.repeat, r.method): r for r in greedy if r.method in REFERENCES}
    pairs = []
    for row in greedy:
        # `transformers` is compared with `none`; the other way round would say the same twice.
        for reference in REFERENCES if row.method not in REFERENCES else REFERENCES[: REFERENCES.index(row.method)]:
            other = references.get((row.suite, row.id, row.repeat, reference))
            if other is not None:
                pairs.append((row, other))
    return pairs


class TextCheck:
    """Compares greedy texts as they are measured, so that a fault shows at its first run and not in the report."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Starts with rows that were measured before."""
        self._tasks: defaultdict[tuple[str, str, int], list[Row]] = defaultdict(list)
        self._compared = self._different = 0
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> list[str]:
        """Compare a new row with what is there of its prompt and repeat; returns a line for each text that differs."""
        task = self._tasks[row.suite, row.id, row.repeat]
        task.append(row)
        found = []
        for compared, reference in compared_texts(task):
            if compared is not row and reference is not row:
                continue
            self._compared += 1
            position = first_difference(compared.token_ids, reference.token_ids)
            if position is not None:
                self._different += 1
                name = compared.method + (f"({compared.budget})" if compared.budget else "")
                found.append(
                    f"the text of {name} differs from that of {reference.method} after {position} equal tokens; "
                    f"so far {self._different} of {self._compared} greedy texts differ"
                )
        return found


def find_partings(rows: Sequence[Row]) -> list[Parting]:
    """Every greedy text that differs from a reference's, from the rows alone."""
    found = []
    for row, reference in compared_texts(rows):
        position = first_difference(row.token_ids, reference.token_ids)
        if position is not None:
            found.append(
                Parting(
                    row.suite,
                    row.id,
                    row.method,
                    row.budget,
                    row.repeat,
                    reference.method,
                    position,
                    row.token_ids[position] if position < len(row.token_ids) else None,
                    reference.token_ids[position] if position < len(reference.token_ids) else None,
                )
            )
    return found


def measure_ties(target: Target, requests: Sequence[EncodedPrompt], rows: Sequence[Row]) -> list[Tie]:
    """The target's margin at every parting; each costs as much as decoding the text before it plainly.

    Args:
        target: the model that the rows were measured with.
        requests: the prompts of the rows.
        rows: of raw.jsonl.
    """
    prompts = {(request.suite, request.id): request.token_ids for request in requests}
    references = {(r.suite, r.id, r.repeat, r.method): r for r in rows if r.temperature == 0 and r.method in REFERENCES}
    ties = []
    for parting in find_partings(rows):
        reference = references[parting.suite, parting.id, parting.repeat, parting.reference]
        best = top_two(target, prompts[parting.suite, parting.id], reference.token_ids[: parting.position])
        ties.append(Tie(parting, best.tokens, best.margin, best.rounding, best.near_tie))
    return ties


def save_ties(ties: Sequence[Tie], out: Path) -> None:
    """Write ties.json into a bench directory."""
    write_json([asdict(tie) for tie in ties], out / TIES_FILE)


def load_ties(out: Path) -> list[Tie]:
    """What `save_ties` wrote; nothing if it has not."""
    path = out / TIES_FILE
    if not path.exists():
        return []
    return [parse_settings(Tie, value, str(path)) for value in read_json(path)]


# How close the target's two best tokens are after a text: the evidence for calling a difference a near tie.
# Rounding is measured on the text itself: read in one pass, and token by token.


@dataclass(frozen=True)
class TopTwo:
    """The two best next tokens after a text, as plain decoding sees them."""

    tokens: tuple[int, int]
    """Best and second best."""
    margin: float
    """Difference of their logits."""
    rounding: float
    """Largest change of any logit when the text is read in one pass instead of token by token."""

    @property
    def near_tie(self) -> bool:
        """True if rounding can reverse the order: each of the two logits may move by `rounding`."""
        return self.margin <= 2 * self.rounding


@torch.inference_mode()
def top_two(target: Target, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> TopTwo:
    """The two best next tokens after a prompt and the text so far.

    Costs as much as decoding `token_ids` plainly, since that is what it repeats.

    Args:
        target: the model.
        prompt_ids: at least one token.
        token_ids: what was generated after it, possibly nothing.
    """
    one_by_one = _next_logits(target, prompt_ids, token_ids, width=1)
    at_once = _next_logits(target, prompt_ids, token_ids, width=len(token_ids) + 1)
    best = one_by_one.topk(2)
    first, second = best.indices.tolist()
    margin = (best.values[0] - best.values[1]).item()
    return TopTwo((first, second), margin, (one_by_one - at_once).abs().max().item())


def _next_logits(target: Target, prompt_ids: Sequence[int], token_ids: Sequence[int], width: int) -> Tensor:
    """Logits [V] after prompt and text, the text read in passes of `width` tokens (the prompt's last one included)."""
    tokens = torch.tensor([[*prompt_ids, *token_ids]], device=target.device)
    cached = len(prompt_ids) - 1
    cache = target.new_cache(1, tokens.shape[1])
    target.prefill(tokens[:, :cached], torch.full((1,), cached, device=target.device), cache)
    hidden = None
    for start in range(cached, tokens.shape[1], width):
        part = tokens[:, start : start + width]
        hidden = target.forward(part, cache).hidden
        cache.lengths += part.shape[1]
    assert hidden is not None
    return target.lm_head(hidden)[0, -1].float()


# The same check over HTTP: a server's greedy texts beside the baseline's, character by character.
#
# Two servers may round differently, and one server rounds differently with other requests in the batch, so texts can
# differ at near ties without a fault. Differences are reported, not judged. The baseline is also compared with itself
# at its lowest concurrency: that is the rate of differences without any draft.


_CONTEXT = 24
"""Characters shown from where two texts differ."""


@dataclass(frozen=True)
class ServerEquality:
    """The greedy texts of one server at one concurrency, compared with a reference's."""

    server: str
    concurrency: int
    reference: str
    reference_concurrency: int
    compared: int
    equal: int


@dataclass(frozen=True)
class ServerDifference:
    """A prompt whose texts differ, and where they first do."""

    server: str
    concurrency: int
    reference: str
    reference_concurrency: int
    suite: str
    id: str
    times: int
    """Requests of this prompt whose texts differ, over rounds and repeats; the rest describes the first of them."""
    position: int
    """Characters that are equal before."""
    wrote: str
    """What follows there; empty if the text has ended."""
    reference_wrote: str


def compare_texts(measured: Measured, baseline: str) -> tuple[list[ServerEquality], list[ServerDifference]]:
    """All greedy texts beside the baseline's: other servers at the same concurrency, its other runs at its lowest."""
    greedy = [
        row
        for window in measured.windows
        if window.temperature == 0
        for row in measured.requests[window.key]
        if row.error is None
    ]
    expected = {row.asked: row for row in greedy if row.server == baseline}
    lowest = min((key.concurrency for key in expected), default=0)
    first: dict[tuple[str, str], RequestRow] = {}
    for key, row in expected.items():
        if key.concurrency == lowest:
            first.setdefault((key.suite, key.id), row)
    counts: dict[tuple[str, int, int], list[int]] = {}
    parting: dict[tuple[str, int, str, str], ServerDifference] = {}
    for row in greedy:
        reference = expected.get(row.asked) if row.server != baseline else first.get((row.suite, row.id))
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
        ServerEquality(server, concurrency, baseline, at, compared, equal)
        for (server, concurrency, at), (compared, equal) in counts.items()
    ]
    return sorted(equalities, key=lambda e: (e.server != baseline, e.server, e.concurrency)), list(parting.values())


def _difference(
    row: RequestRow, reference: RequestRow, position: int, known: ServerDifference | None
) -> ServerDifference:
    if known is not None:
        return replace(known, times=known.times + 1)
    return ServerDifference(
        *(row.server, row.concurrency, reference.server, reference.concurrency, row.suite, row.id, 1, position),
        row.text[position : position + _CONTEXT],
        reference.text[position : position + _CONTEXT],
    )
