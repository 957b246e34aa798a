"""Simulated tau of any drafter: its proposals compared with cached answers of the target, without a target pass.

On text that the target wrote, a *chosen* draft is accepted exactly while it follows the text. The loop here is the
decoding loop with the text in the target's place: propose, compare, commit what the text says, advance the drafter's
caches with cached features. So chains, trees and look-up are measured by their own code, and thousands of anchors cost
what their drafts cost.

With `every`, anchors are evenly spaced and the same for all drafters, so differences are paired. Without, each anchor
follows what was accepted at the one before, and tau is the one that decoding would report.

*Sampled* drafts are random: `training.compare.accepted_by_answer` gives what they can expect.

Everything up to `follow` depends on the loop and on training's data alone; the rest keeps and reports the results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from domino_spec.bench.figures import Cluster, Draws, Record, Samples, Sums, mean_of, with_intervals
from domino_spec.bench.page import number, table, with_interval
from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, commit, start, tree_ancestors, walk_tree
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.files import atomic_path, read_jsonl
from domino_spec.settings import UserError
from domino_spec.target.cache import TargetCache
from domino_spec.training.data import Sequence, conversation_id
from domino_spec.training.features import FeatureSource

HORIZON = 16
"""Tokens of its answer that follow every anchor."""


@dataclass(frozen=True)
class Simulated:
    """What a drafter's proposals are worth along some answers: [A] per answer, empty if it has no anchor."""

    anchors: list[Tensor]
    """Positions of the last committed token."""
    accepted: list[Tensor]
    """Drafts that follow the text."""
    proposed: list[Tensor]
    """Drafts proposed, of a tree those of all its branches."""


class _Span(NamedTuple):
    """One answer of a sequence: a request."""

    sequence: int
    start: int
    end: int


@torch.inference_mode()
def simulate(
    drafter: Drafter,
    answers: SequenceType[Sequence],
    source: FeatureSource,
    *,
    num_drafts: int | None = None,
    every: int | None = 4,
    horizon: int = HORIZON,
    batch: int = 8,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda anchors: None,
) -> Simulated:
    """Accepted drafts of each proposal, had the target written these answers while the drafter drafted.

    Args:
        drafter: of *chosen* drafts; requests of unequal length are drafted together.
        answers: the target's own text, greedy or sampled.
        source: of its features, at the drafter's layers and perhaps more.
        num_drafts: drafts per proposal at most; None for the drafter's most.
        every: tokens from one anchor to the next, from the last token of the prompt on, for any drafter. None puts the
            next anchor behind what was accepted, as decoding does.
        horizon: only anchors that so many tokens of their answer follow are counted. A draft past the end of the answer
            counts as rejected, so it should be no less than a proposal is deep.
        batch: R, answers that are drafted for together.
        device: of the draft.
        on_progress: called with the number of anchors just done.

    Raises:
        UserError: the features lack a layer that the drafter reads.
        ValueError: the drafter samples, or `every`, `horizon` or `batch` is less than 1.
    """
    if min(horizon, batch, 1 if every is None else every) < 1:
        raise ValueError(f"every, horizon and batch must be at least 1, got {every}, {horizon} and {batch}")
    layers = _places(source, drafter.feature_layers)
    num_drafts = drafter.max_drafts if num_drafts is None else min(num_drafts, drafter.max_drafts)
    spans = [_Span(i, *s) for i, a in enumerate(answers) for s in a.answers if s[0] + horizon <= s[1]]
    spans.sort(key=lambda s: s.end - s.start)  # those that end together run together
    found: list[list[tuple[int, int, int]]] = [[] for _ in answers]
    for first in range(0, len(spans), batch):
        chunk = spans[first : first + batch]
        text = _Text.read(chunk, answers, source, layers, device)
        for row in _follow(drafter, text, num_drafts, every, horizon):
            for span, active, *values in zip(chunk, *(part.tolist() for part in row), strict=True):
                if active:
                    found[span.sequence].append(tuple(values))
            on_progress(int(row[0].sum()))
    columns = [torch.tensor(sorted(rows), dtype=torch.long).view(-1, 3).unbind(1) for rows in found]
    return Simulated(*([c[i] for c in columns] for i in range(3)))


def _places(source: FeatureSource, wanted: SequenceType[int]) -> list[int]:
    """Where the wanted layers lie in a source's features."""
    if missing := [layer for layer in wanted if layer not in source.layers]:
        raise UserError(
            f"the features hold layers {', '.join(map(str, source.layers))}, and the drafter also reads "
            f"{', '.join(map(str, missing))}: capture features that hold them too"
        )
    return [source.layers.index(layer) for layer in wanted]


@dataclass
class _Text:
    """R answers with the text before them, in the target's place."""

    tokens: Tensor
    """[R, L], -1 past the end of each."""
    starts: Tensor
    """[R], first token of the answer."""
    ends: Tensor
    """[R]."""
    features: Tensor | None
    """[R, L, F]."""

    @staticmethod
    def read(
        spans: SequenceType[_Span],
        answers: SequenceType[Sequence],
        source: FeatureSource,
        layers: list[int],
        device: torch.device | str,
    ) -> _Text:
        tokens = [torch.cat((answers[s.sequence].tokens[: s.end], torch.tensor([-1]))) for s in spans]
        features = None
        if layers:
            rows = [source.read(answers[s.sequence])[: s.end] for s in spans]
            rows = [r.view(len(r), len(source.layers), -1)[:, layers].flatten(1) for r in rows]
            features = pad_sequence(rows, batch_first=True).to(device)
        return _Text(
            pad_sequence(tokens, batch_first=True, padding_value=-1).to(device),
            torch.tensor([s.start for s in spans], device=device),
            torch.tensor([s.end for s in spans], device=device),
            features,
        )

    def after(self, lengths: Tensor, count: int) -> Tensor:
        """The next `count` tokens after `lengths` [R] tokens, -1 past the end: [R, count]."""
        index = lengths[:, None] + torch.arange(count, device=lengths.device)
        return self.tokens.gather(1, index.clamp(max=self.tokens.shape[1] - 1))

    def state(self, room: int) -> State:
        """The prompts, as `decoding.generate.prefill` leaves them; the target's cache has no layers."""
        requests, longest = len(self.starts), int(self.starts.max())
        capacity = self.tokens.shape[1] + room
        device = self.tokens.device
        cache = TargetCache(
            num_layers=0,
            requests=requests,
            kv_heads=1,
            capacity=capacity,
            head_dim=1,
            dtype=torch.float32,
            device=device,
        )
        cache.lengths = self.starts - 1
        index = torch.arange(capacity, device=device).expand(requests, -1)
        known = index < self.starts[:, None]
        tokens = self.tokens.gather(1, index.clamp(max=self.tokens.shape[1] - 1)).where(known, 0)
        features = self.features
        if features is not None:
            features = features[:, : longest - 1] * known[:, 1:longest, None]  # a row less than there are tokens
        lengths = self.starts.clone()
        active = torch.ones_like(lengths, dtype=torch.bool)
        sampling = Sampling.alike(SamplingSettings(), requests, device)
        return State(tokens, lengths, lengths.clone(), active, cache, sampling, features)

    def verdict(self, lengths: Tensor, counts: Tensor) -> Verdict:
        """The next `counts` [R] tokens, committed as a chain: all but the last as accepted drafts."""
        width = int(counts.max())
        offsets = torch.arange(width, device=lengths.device)
        kept = offsets < counts[:, None]
        features = self.features
        if features is not None:
            index = (lengths[:, None] - 1 + offsets).clamp(max=features.shape[1] - 1)
            requests = torch.arange(len(lengths), device=lengths.device)[:, None]
            features = features[requests, index] * kept[..., None]
        tokens = self.after(lengths, width).where(kept, 0).clamp(min=0)
        return Verdict(tokens, counts - 1, features, lengths - 1, torch.ones_like(counts, dtype=torch.bool))


def _follow(
    drafter: Drafter, text: _Text, num_drafts: int, every: int | None, horizon: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields for each anchor, each [R]: active requests, anchors, and accepted and proposed drafts."""
    longest_commit = drafter.max_drafts + 1  # of decoding: a drafter need not take more at once
    state = text.state(room=2 * longest_commit)
    cache = start(drafter, state)
    while True:
        proposal = drafter.propose(state, cache, num_drafts)
        accepted = follow(proposal, text.after(state.lengths, proposal.tokens.shape[1] + 1))
        yield state.active.clone(), state.lengths - 1, accepted, proposal.num_drafts
        steps = accepted + 1 if every is None else torch.full_like(accepted, every)
        state.active &= state.lengths + steps + horizon <= text.ends
        if not state.active.any():
            return
        # Those that have ended stay where they are, as in decoding.
        while (steps > 0).any():
            counts = steps.clamp(max=longest_commit)
            verdict = text.verdict(state.lengths, counts)
            commit(state, verdict)
            drafter.advance(cache, verdict)
            steps = steps - counts


def follow(proposal: Proposal, text: Tensor) -> Tensor:
    """How many drafts of a proposal follow a text.

    Args:
        proposal: a chain or a tree of N *chosen* tokens.
        text: [R, N + 1], what comes after the anchor; -1 matches nothing.

    Returns:
        [R], 0 .. N.
    """
    num_drafts = proposal.tokens.shape[1]
    if num_drafts and proposal.parents is not None:
        ancestors = tree_ancestors(proposal.parents)
        # On the path that is walked, the choice after a draft at depth d is token d of the text.
        choices = text.gather(1, ancestors.sum(-1) - 1)
        return walk_tree(choices, proposal, ancestors)[1]
    proposed = torch.arange(num_drafts, device=text.device) < proposal.num_drafts[:, None]
    return ((proposal.tokens == text[:, :-1]) & proposed).long().cumprod(1).sum(1)


def save_simulated(simulated: Simulated, ids: SequenceType[str], settings: Mapping[str, Any], path: Path) -> None:
    """Write JSON lines, atomically: the settings, then a line per answer.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [json.dumps({"settings": settings})]
    for id_, *parts in zip(ids, simulated.anchors, simulated.accepted, simulated.proposed, strict=True):
        values = dict(zip(("anchors", "accepted", "proposed"), (part.tolist() for part in parts), strict=True))
        lines.append(json.dumps({"id": id_, **values}))
    with atomic_path(path) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_simulated(ids: SequenceType[str], settings: Mapping[str, Any], path: Path) -> Simulated | None:
    """What `save_simulated` wrote, or None if there is no such file.

    Raises:
        UserError: it was measured with other settings or on other answers, or cannot be read.
    """
    if not path.exists():
        return None
    head, *rows = read_jsonl(path, {})
    held = head.get("settings")
    wanted = json.loads(json.dumps(settings))
    if held != wanted or [row.get("id") for row in rows] != list(ids):
        names = sorted(k for k in wanted | held if wanted.get(k) != held.get(k)) if isinstance(held, dict) else []
        raise UserError(f"{path} was measured with other {', '.join(names) or 'answers'}: give another --out")
    parts = (
        [torch.tensor(row[name], dtype=torch.long) for row in rows] for name in ("anchors", "accepted", "proposed")
    )
    return Simulated(*parts)


def suite_of(id_: str) -> str:
    """gsm8k of gsm8k/17."""
    return id_.split("/")[0]


def summarize(results: Mapping[str, Simulated], ids: SequenceType[str], reference: str) -> list[Record]:
    """tau of every method, and its ratio to one of them on the same resamples of the answers (see `figures`).

    Args:
        results: by method, all on the same answers.
        ids: of the answers; the part before the first slash is the suite.
        reference: the method that ratios are to.

    Returns:
        An entry for each method: `method`, `answers` and `anchors` counted, `drafts` per proposal, and under `suites`
        (by name), `mean` (of the suites, unweighted) and `pooled` (all anchors alike) each `tau`, its `ratio` to the
        reference's, and `tau_interval` and `ratio_interval`, 95%.

    Raises:
        UserError: the reference was not measured, or no answer has an anchor.
        ValueError: methods were measured on different answers.
    """
    if reference not in results:
        raise UserError(f"the reference {reference} was not measured; measured are {', '.join(results)}")
    used = [i for i, anchors in enumerate(results[reference].anchors) if len(anchors)]
    if not used:
        raise UserError("every answer is too short for an anchor: lower the horizon")
    clusters = {i: (suite_of(ids[i]), conversation_id(ids[i])) for i in used}
    draws = Draws.of(clusters.values())
    taus = {}
    for method, result in results.items():
        if [i for i, anchors in enumerate(result.anchors) if len(anchors)] != used:
            raise ValueError(f"{method} and {reference} must be measured on the same answers")
        taus[method] = _taus(result, clusters, draws)
    entries = []
    for method, (suites, mean, pooled) in taus.items():
        other_suites, other_mean, other_pooled = taus[reference]
        proposed = torch.cat(results[method].proposed)
        entries.append(
            {
                "method": method,
                "answers": len(used),
                "anchors": len(proposed),
                "drafts": proposed.double().mean().item(),
                "suites": {
                    name: with_intervals({"tau": tau, "ratio": tau / other_suites[name]})
                    for name, tau in suites.items()
                },
                "mean": with_intervals({"tau": mean, "ratio": mean / other_mean}),
                "pooled": with_intervals({"tau": pooled, "ratio": pooled / other_pooled}),
            }
        )
    return entries


def _taus(
    result: Simulated, clusters: Mapping[int, Cluster], draws: Draws
) -> tuple[dict[str, Samples], Samples, Samples]:
    """By suite, their mean, and over all anchors."""
    amounts: dict[str, list[tuple[Cluster, tuple[float, float]]]] = defaultdict(list)
    for i, cluster in clusters.items():
        lengths = result.accepted[i] + 1
        amounts[cluster[0]].append((cluster, (float(lengths.sum()), float(len(lengths)))))

    def tau(part: list[tuple[Cluster, tuple[float, float]]]) -> Samples:
        return Sums(("lengths", "anchors"), part, draws).ratio("lengths", "anchors")

    suites = {name: tau(part) for name, part in amounts.items()}
    return suites, mean_of(list(suites.values())), tau([a for part in amounts.values() for a in part])


def render(entries: SequenceType[Record], reference: str) -> str:
    """What `summarize` returned, as Markdown."""
    suites = list(entries[0]["suites"])
    headers = [*suites, "mean of suites", "all anchors"]

    def cells(entry: Record, figure: str, digits: int) -> list[str]:
        values = [number(entry["suites"][name][figure], digits) for name in suites]
        return [*values, *(with_interval(entry[part], figure, digits) for part in ("mean", "pooled"))]

    taus = [[e["method"], f"{e['drafts']:.1f}", str(e["anchors"]), *cells(e, "tau", 2)] for e in entries]
    return "\n\n".join(
        (
            f"tau on {entries[0]['answers']} answers; in brackets 95% over conversations:",
            table(["method", "drafts", "anchors", *headers], taus),
            f"tau over that of {reference}, on the same resamples:",
            table(["method", *headers], [[e["method"], *cells(e, "ratio", 3)] for e in entries]),
        )
    )
