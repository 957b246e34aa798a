"""Simulated tau: how long the accepted prefix would be on held-out answers, with the head on and off.

On the target's own greedy text, a chosen draft is accepted while it equals the text, and along that prefix the head
has consumed exactly the text. So one teacher-forced pass gives the acceptance that decoding would see from every
anchor, without decoding. Here the head corrects every base logit; candidate recall says how often the token it then
chooses is one that decoding, which corrects only the K best (DESIGN section 5), could have chosen too.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import AnyDraft
from domino_spec.settings import UserError
from domino_spec.target.model import Target
from domino_spec.training.blocks import DraftedTokens, forward_blocks
from domino_spec.training.data import Sequence
from domino_spec.training.features import FeatureSource

TEXT_ROWS = 256
"""Tokens whose logits over the whole vocabulary exist at once."""


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
    """Share of the corrected slots whose best final logit is among the K best base logits; None where the head corrects
    nothing."""


@torch.inference_mode()
def simulated_tau(
    draft: AnyDraft,
    sequences: SequenceType[Sequence],
    source: FeatureSource,
    anchors_per_sequence: int = 32,
    batch_size: int = 4,
    candidates: int = DEFAULT_CANDIDATES,
) -> SimulatedTau:
    """Measure acceptance at evenly spaced anchors that are followed by a whole block of answer tokens.

    Args:
        draft: bound to its target.
        sequences: held-out answers; those too short for a whole block are passed over.
        source: of their features.
        anchors_per_sequence: at most this many blocks each.
        batch_size: sequences per pass.
        candidates: K, for the recall of restricted candidates.

    Raises:
        UserError: every sequence is too short.
    """
    num_drafts = draft.config.max_drafts
    accepted: list[Tensor] = []
    accepted_off: list[Tensor] = []
    recalled: list[Tensor] = []
    for _, drafted, base, final in block_logits(draft, sequences, source, anchors_per_sequence, batch_size):
        if draft.head is not None:
            corrected = slice(draft.head.config.pure_draft_prefix_len, None)
            recalled.append(base_rank_of_best(base[:, corrected], final[:, corrected]) < candidates)
        accepted.append(accepted_drafts(final, drafted.choices))
        accepted_off.append(accepted_drafts(base, drafted.choices))
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
    )


class BlockLogits(NamedTuple):
    """Logits of all blocks of some sequences."""

    sequences: list[int]
    """Which, with repetition: one index per block, [A]."""
    drafted: DraftedTokens
    base: Tensor
    """[A, N, V]."""
    final: Tensor
    """[A, N, V]; `base` itself without a head."""


def block_logits(
    draft: AnyDraft,
    sequences: SequenceType[Sequence],
    source: FeatureSource,
    anchors_per_sequence: int,
    batch_size: int,
) -> Iterator[BlockLogits]:
    """Run the draft at evenly spaced anchors that are followed by a whole block of the same answer's tokens.

    Arguments as in `simulated_tau`; sequences without such an anchor are passed over.
    """
    num_drafts = draft.config.max_drafts
    anchors = []
    for sequence in sequences:
        # The last num_drafts - 1 anchors of an answer have no whole block behind them.
        ranges = [torch.arange(start - 1, max(start - 1, end - num_drafts)) for start, end in sequence.answers]
        allowed = torch.cat(ranges)
        count = min(anchors_per_sequence, len(allowed))
        anchors.append(allowed[torch.linspace(0, len(allowed) - 1, count).round().long()] if count else allowed)
    usable = [i for i, found in enumerate(anchors) if len(found)]
    for start in range(0, len(usable), batch_size):
        chunk = usable[start : start + batch_size]
        batch = source.batch([sequences[i] for i in chunk]).to(draft.device)
        batch = replace(batch, features=batch.features.to(draft.dtype))
        drafted = forward_blocks(draft, batch, [anchors[i] for i in chunk])
        base = final = draft.base_logits(drafted.hidden)
        if draft.head is not None and drafted.low_rank is not None:
            final = base + F.linear(drafted.low_rank, draft.head.correction_weight)
        yield BlockLogits([i for i in chunk for _ in anchors[i]], drafted, base, final)


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
    for start in range(0, len(tokens) - 1, TEXT_ROWS):
        rows = features[start : min(start + TEXT_ROWS, len(tokens) - 1)]
        logits = (target.final_norm(rows.to(weight.dtype)) @ weight.t()).float()
        chosen = tokens[start + 1 : start + 1 + len(rows), None]
        found.append(torch.exp(logits.gather(1, chosen)[:, 0] - logits.logsumexp(-1)))
    return torch.cat(found)


def expected_acceptance(draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Accepted tokens that sampled drafts can expect, from text that the target sampled: both [A, N] to [A].

    A sampled draft is accepted with probability sum_x min(target(x), draft(x)). Text drawn from the target meets x with
    probability target(x), so the mean of min(1, draft(x) / target(x)) over such text is the same, and along a prefix
    the product of these ratios is the probability that the prefix is drafted and accepted.
    """
    return (draft_probs / target_probs).clamp(max=1).cumprod(-1).sum(-1)


# FIXME section from domino_spec.training.evaluate:
# Is one draft better than another? Simulated tau answer by answer, and paired ratios with intervals.
#
# Blocks of one answer are alike, so whole answers are drawn anew (a cluster bootstrap), and both drafts are compared on
# the same draw: what makes an answer easy for both cancels out.


class Accepted(NamedTuple):
    """Accepted drafts of every block, one tensor [blocks] for every answer that has any."""

    head_on: list[Tensor]
    head_off: list[Tensor]
    answers: list[int]
    """Which answers these are."""


@torch.inference_mode()
def accepted_by_answer(
    draft: Draft,
    answers: SequenceType[Sequence],
    source: FeatureSource,
    sampled_by: Target | None = None,
    anchors_per_answer: int = 10**6,
) -> Accepted:
    """Run a draft over answers that it was not trained on.

    Args:
        draft: bound to its target.
        answers: the target's own text.
        source: of its features; with `sampled_by`, of the target's last layer too.
        sampled_by: the target, where the text was sampled at temperature 1: gives what *sampled* drafts can expect
            there, instead of what the most probable drafts reach.
        anchors_per_answer: at most this many blocks each.
    """
    on: dict[int, Tensor] = {}
    off: dict[int, Tensor] = {}
    for indices, drafted, base, final in block_logits(draft, answers, source, anchors_per_answer, batch_size=1):
        (index,) = set(indices)
        target_probs = None
        if sampled_by is not None:
            width = draft.config.hidden_size
            last = source.layers.index(sampled_by.num_layers - 1) * width
            features = source.read(answers[index])[:, last : last + width].to(draft.device)
            text = text_probabilities(sampled_by, features, answers[index].tokens.to(draft.device))
            labels = torch.arange(1, drafted.choices.shape[1] + 1, device=draft.device)
            target_probs = text[drafted.blocks.positions[:, None] + labels]
        for logits, into in ((final, on), (base, off)):
            if target_probs is None:
                into[index] = accepted_drafts(logits, drafted.choices)
            else:
                chosen = logits.softmax(-1).gather(-1, drafted.choices.clamp(min=0)[..., None])[..., 0]
                into[index] = expected_acceptance(chosen * (drafted.choices >= 0), target_probs)
    return Accepted(list(on.values()), list(off.values()), list(on))


class Interval(NamedTuple):
    """An estimate with the bounds of its central 95% under resampling."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def tau_interval(accepted: SequenceType[Tensor], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean accepted prefix + 1 over all blocks.

    Args:
        accepted: for every answer, accepted drafts of each of its blocks.
        resamples: of the answers.
        seed: of resampling.
    """
    sums, counts = _sums(accepted)
    means = _draws(len(sums), resamples, seed, sums) / _draws(len(sums), resamples, seed, counts)
    return _interval(sums.sum() / counts.sum() + 1, means + 1)


def tau_ratio(
    accepted: SequenceType[Tensor], against: SequenceType[Tensor], resamples: int = 2000, seed: int = 0
) -> Interval:
    """tau of one draft over that of another on the same blocks, as a ratio; arguments as in `tau_interval`.

    Raises:
        ValueError: the blocks differ.
    """
    sums, counts = _sums(accepted)
    other, other_counts = _sums(against)
    if not torch.equal(counts, other_counts):
        raise ValueError("both drafts must be measured on the same blocks of the same answers")
    total, above, below = (_draws(len(sums), resamples, seed, x) for x in (counts, sums, other))
    ratio = (sums.sum() + counts.sum()) / (other.sum() + counts.sum())
    return _interval(ratio, (above + total) / (below + total))


def _sums(accepted: SequenceType[Tensor]) -> tuple[Tensor, Tensor]:
    sums = torch.stack([blocks.double().sum() for blocks in accepted])
    return sums, torch.tensor([float(len(blocks)) for blocks in accepted], dtype=torch.float64)


def _draws(count: int, resamples: int, seed: int, values: Tensor) -> Tensor:
    """Totals of `values` [count] over draws with replacement, the same draws for the same seed: [resamples]."""
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(count, (resamples, count), generator=generator)].sum(1)


def _interval(value: Tensor, resampled: Tensor) -> Interval:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(value.item(), low, high)
