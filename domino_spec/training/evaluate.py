"""Simulated tau: how long accepted prefixes would be on text that the target wrote, without decoding it again.

Verification walks along the target's own choices, so on the target's text a *chosen* draft is accepted while it equals
the text: the most probable tokens at temperature 0, and at temperature 1 a draw from the law that decoding draws from.

`simulate` measures any drafter (chains, trees, look-up) with its own code, in the decoding loop with the text in the
target's place: propose, compare, commit what the text says, advance the drafter's caches with stored features.
`simulated_tau` measures a draft in training, in one teacher-forced pass over all blocks of a text: along an accepted
prefix, the head has read exactly the text. Tests hold the two equal. In the pass the head corrects every base logit;
candidate recall tells how often the token that it then chooses is among the K best base logits, which are all that
decoding corrects (docs/design.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, commit, start, tree_ancestors, walk_tree
from domino_spec.decoding.sampling import Sampling, SamplingSettings
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.settings import UserError
from domino_spec.target.cache import TargetCache
from domino_spec.target.model import Target
from domino_spec.training.blocks import DraftedTokens, forward_blocks
from domino_spec.training.data import Sequence
from domino_spec.training.features import FeatureSource

HORIZON = 16
"""Tokens of its answer that follow every anchor."""
TEXT_ROWS = 256
"""Tokens whose logits over the whole vocabulary exist at once."""


# A draft in training: one teacher-forced pass.


@dataclass(frozen=True)
class SimulatedTau:
    """Acceptance on held-out text."""

    tau: float
    """Mean accepted prefix + 1 over all blocks, with the head."""
    tau_head_off: float
    """The same from the base logits alone."""
    accepted: Tensor
    """[blocks] accepted drafts of each block, with the head: the raw data for paired comparisons."""
    accepted_head_off: Tensor
    """[blocks]."""
    acceptance: list[float]
    """Share of blocks whose first k drafts were all accepted, k = 1 .. N, with the head."""
    acceptance_head_off: list[float]
    """The same from the base logits alone."""
    candidates: int
    """K of `candidate_recall`."""
    candidate_recall: float | None
    """Share of the corrected slots whose best final logit is among the K best base logits; None if the head corrects
    nothing."""
    sequences: Tensor
    """[blocks], which sequence each block belongs to."""


@torch.inference_mode()
def simulated_tau(
    draft: AnyDraft,
    sequences: SequenceType[Sequence],
    source: FeatureSource,
    anchors_per_sequence: int = 32,
    batch_size: int = 4,
    candidates: int = DEFAULT_CANDIDATES,
    sampled_by: Target | None = None,
) -> SimulatedTau:
    """Measure acceptance at evenly spaced anchors that are followed by a whole block of answer tokens.

    Args:
        draft: bound to its target.
        sequences: held-out answers; those too short for a whole block are passed over.
        source: of their features; with `sampled_by`, of the target's last layer too.
        anchors_per_sequence: at most this many blocks each.
        batch_size: sequences per pass.
        candidates: K, for the recall of restricted candidates.
        sampled_by: the target, if the text was sampled at temperature 1: gives what *sampled* drafts can expect there,
            instead of what the most probable drafts reach.

    Raises:
        UserError: every sequence is too short.
    """
    num_drafts = draft.config.max_drafts
    accepted: list[Tensor] = []
    accepted_off: list[Tensor] = []
    recalled: list[Tensor] = []
    measured: list[int] = []
    for indices, drafted in _drafted_blocks(draft, sequences, source, anchors_per_sequence, batch_size):
        base = final = draft.base_logits(drafted.hidden)  # [A, N, V]
        if draft.head is not None and drafted.low_rank is not None:
            final = base + F.linear(drafted.low_rank, draft.head.correction_weight)
            corrected = slice(draft.head.config.pure_draft_prefix_len, None)
            recalled.append(base_rank_of_best(base[:, corrected], final[:, corrected]) < candidates)
        if sampled_by is None:
            accepted.append(accepted_drafts(final, drafted.choices))
            accepted_off.append(accepted_drafts(base, drafted.choices))
        else:
            target_probs = _label_probabilities(sampled_by, indices, drafted, sequences, source)
            accepted.append(expected_acceptance(_chosen(final, drafted.choices), target_probs))
            accepted_off.append(expected_acceptance(_chosen(base, drafted.choices), target_probs))
        measured += indices
    if not accepted:
        raise UserError(f"no held-out answer is long enough for a block of {num_drafts} drafts; raise data.held_out")
    with_head, head_off = torch.cat(accepted), torch.cat(accepted_off)
    slots = sum(part.numel() for part in recalled)
    return SimulatedTau(
        tau=with_head.double().mean().item() + 1,
        tau_head_off=head_off.double().mean().item() + 1,
        accepted=with_head,
        accepted_head_off=head_off,
        acceptance=_survival(with_head, num_drafts),
        acceptance_head_off=_survival(head_off, num_drafts),
        candidates=candidates,
        candidate_recall=sum(int(part.sum()) for part in recalled) / slots if slots else None,
        sequences=torch.tensor(measured),
    )


def _drafted_blocks(
    draft: AnyDraft,
    sequences: SequenceType[Sequence],
    source: FeatureSource,
    anchors_per_sequence: int,
    batch_size: int,
) -> Iterator[tuple[list[int], DraftedTokens]]:
    """The draft's pass over every batch, and the sequence of each block [A]."""
    num_drafts = draft.config.max_drafts
    anchors = []
    for sequence in sequences:
        # The last num_drafts - 1 anchors of an answer have no whole block after them.
        ranges = [torch.arange(start - 1, max(start - 1, end - num_drafts)) for start, end in sequence.answers]
        allowed = torch.cat(ranges)
        count = min(anchors_per_sequence, len(allowed))
        anchors.append(allowed[torch.linspace(0, len(allowed) - 1, count).round().long()] if count else allowed)
    usable = [i for i, found in enumerate(anchors) if len(found)]
    for first in range(0, len(usable), batch_size):
        chunk = usable[first : first + batch_size]
        batch = source.batch([sequences[i] for i in chunk]).to(draft.device)
        batch = replace(batch, features=batch.features.to(draft.dtype))
        yield [i for i in chunk for _ in anchors[i]], forward_blocks(draft, batch, [anchors[i] for i in chunk])


def _chosen(logits: Tensor, choices: Tensor) -> Tensor:
    """The draft's probability of every label, 0 if it cannot propose it: [A, N, V] and [A, N] to [A, N]."""
    probs = logits.softmax(-1).gather(-1, choices.clamp(min=0)[..., None])[..., 0]
    return probs * (choices >= 0)


def _label_probabilities(
    target: Target,
    indices: list[int],
    drafted: DraftedTokens,
    sequences: SequenceType[Sequence],
    source: FeatureSource,
) -> Tensor:
    """The target's probability of every label: [A, N]."""
    device = drafted.choices.device
    last = source.layers.index(target.num_layers - 1) * target.hidden_size
    texts = {}
    for index in dict.fromkeys(indices):
        features = source.read(sequences[index])[:, last : last + target.hidden_size]
        texts[index] = text_probabilities(target, features.to(device), sequences[index].tokens.to(device))
    offsets = torch.arange(1, drafted.choices.shape[1] + 1, device=device)
    positions = drafted.blocks.positions[:, None] + offsets
    return torch.stack([texts[index][at] for index, at in zip(indices, positions, strict=True)])


def accepted_drafts(logits: Tensor, choices: Tensor) -> Tensor:
    """How many of the most probable tokens are the text's, up to the first that is not: [A, N, V] and [A, N] to [A]."""
    correct = logits.argmax(-1) == choices  # a label of -1 is a miss
    return correct.long().cumprod(-1).sum(-1)


def _survival(accepted: Tensor, num_drafts: int) -> list[float]:
    """Share of blocks with at least k accepted drafts, k = 1 .. N, of [blocks] accepted drafts."""
    return [(accepted >= k).double().mean().item() for k in range(1, num_drafts + 1)]


def base_rank_of_best(base: Tensor, final: Tensor) -> Tensor:
    """How many base logits exceed that of the best final logit: [..., V] and [..., V] to [...].

    Below K, the best token is among the K best base logits. Counting takes no sort and serves every K at once.
    """
    best = final.argmax(-1, keepdim=True)
    return (base > base.gather(-1, best)).sum(-1)


@torch.inference_mode()
def text_probabilities(target: Target, features: Tensor, tokens: Tensor) -> Tensor:
    """What the target gives each token of a text, at temperature 1: [T] float32, 1 for the first.

    Args:
        target: whose text it is.
        features: [T, H], output of its last decoder layer.
        tokens: [T].
    """
    weight = target.lm_head_weight
    found = [torch.ones(1, device=features.device)]
    for first in range(0, len(tokens) - 1, TEXT_ROWS):
        rows = features[first : min(first + TEXT_ROWS, len(tokens) - 1)]
        logits = (target.final_norm(rows.to(weight.dtype)) @ weight.t()).float()
        chosen = tokens[first + 1 : first + 1 + len(rows), None]
        found.append(torch.exp(logits.gather(1, chosen)[:, 0] - logits.logsumexp(-1)))
    return torch.cat(found)


def expected_acceptance(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Accepted tokens that sampled drafts can expect, from text that the target sampled: both [A, N] to [A].

    A sampled draft is accepted with probability sum_x min(target(x), draft(x)). Text drawn from the target meets x with
    probability target(x), so the mean of min(1, draft(x) / target(x)) over such text is the same, and along a prefix
    the product of these ratios is the probability that the prefix is drafted and accepted.
    """
    return (draft_probs / target_probs).clamp(max=1).cumprod(-1).sum(-1)


# Any drafter: the decoding loop with the text in the target's place.


@dataclass(frozen=True)
class Simulated:
    """How a drafter's proposals did along some answers: [A] per answer, empty if it has no anchor."""

    anchors: list[Tensor]
    """Positions of the last committed token."""
    accepted: list[Tensor]
    """Drafts that follow the text."""
    proposed: list[Tensor]
    """Drafts proposed; for a tree, those of all branches."""


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
        every: distance of anchors in tokens, from the last token of the prompt on, the same for every drafter. None
            puts the next anchor after what was accepted, as decoding does.
        horizon: only anchors that are followed by this many tokens of their answer are counted. A draft past the end of
            the answer counts as rejected, so it should be no less than a proposal is deep.
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
    """Index of each wanted layer in a source's features."""
    if missing := [layer for layer in wanted if layer not in source.layers]:
        raise UserError(
            f"the features hold layers {', '.join(map(str, source.layers))}, and the drafter also reads "
            f"{', '.join(map(str, missing))}: capture features that hold them too"
        )
    return [source.layers.index(layer) for layer in wanted]


@dataclass
class _Text:
    """R answers with their prompts: the text that takes the target's place."""

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
        """The prompts, as the engine's prefill leaves them; the target's cache has no layers."""
        requests, longest = len(self.starts), int(self.starts.max())
        capacity = self.tokens.shape[1] + room
        device = self.tokens.device
        cache = TargetCache((0, requests, 1, capacity, 1), torch.float32, device)
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
    """Yields for each anchor: which requests are active, positions, accepted and proposed drafts, each [R]."""
    longest_commit = drafter.max_drafts + 1  # no more than decoding commits at once
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
        # Requests that have ended keep their place, as in decoding.
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
