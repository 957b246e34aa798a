"""One cycle of speculative decoding: a drafter proposes, the target verifies, and what it decided is committed.

`State` is the committed text, `Proposal` the drafts, `Verdict` the target's decision about them. The loop that runs the
cycle is `engine.Engine`.

Shapes: R requests, N drafted tokens, K candidates, F feature width, V vocabulary. A pass of the target has N + 1 rows:
the anchor (row 0), which is the last committed token, and the drafts (row 1 + j).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from domino_spec.decoding.sampling import History, RandomStreams, Sampling, path_history
from domino_spec.ops.acceptance import greedy_chain, match_chain, sampled_chain
from domino_spec.target.cache import RowCache, TargetCache
from domino_spec.target.model import Target

_NO_SCOPE = nullcontext()


def scope(name: str) -> AbstractContextManager[object]:
    """Mark a stage of the cycle as `domino::NAME` for torch's profiler; it costs nothing while none runs."""
    return record_function(f"domino::{name}") if torch.autograd._profiler_enabled() else _NO_SCOPE


@dataclass
class State:
    """Committed text of R requests, in tensors allocated once.

    Between cycles `cache.lengths == lengths - 1`, because the next pass verifies the last committed token.
    """

    tokens: Tensor
    """[R, capacity] int64, prompt and committed tokens."""
    lengths: Tensor
    """[R], committed tokens, prompt included."""
    prompt_lengths: Tensor
    """[R]."""
    active: Tensor
    """[R] bool, False once a request has ended."""
    cache: TargetCache
    sampling: Sampling
    """How their tokens are drawn."""
    features: Tensor | None = None
    """[R, T, F], features of freshly read prompts without their last token; None if the drafter taps nothing."""

    @property
    def anchors(self) -> Tensor:
        """[R], the last committed token of every request: clean token in slot 0 of the next block."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    def view(self, start: int, stop: int, sampling: Sampling, extent: int | None = None) -> State:
        """The requests `start .. stop - 1` as a state that shares this memory; for `extent` see `RowCache.view`."""
        tokens, lengths = self.tokens[start:stop], self.lengths[start:stop]
        prompt_lengths, active = self.prompt_lengths[start:stop], self.active[start:stop]
        return State(tokens, lengths, prompt_lengths, active, self.cache.view(start, stop, extent), sampling)

    def put(self, request: int, prompt: Sequence[int]) -> None:
        """Make this the text of a request, of which nothing was read yet."""
        self.tokens[request, : len(prompt)] = torch.tensor(prompt, device=self.tokens.device)
        self.lengths[request] = self.prompt_lengths[request] = len(prompt)
        self.cache.lengths[request] = 0

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of request `destination`, which is lost."""
        for tensor in (self.tokens, self.lengths, self.prompt_lengths, self.active):
            tensor[destination] = tensor[source]
        self.cache.move(source, destination)


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of one cycle."""

    tokens: Tensor
    """[R, N]; entries past a request's `num_drafts` are ignored."""
    num_drafts: Tensor
    """[R], how many of them are proposed, 0 .. N."""
    parents: Tensor | None = None
    """[R, N], index of each token's parent, -1 for a child of the anchor, parents first; None for a chain. The tokens
    of a tree are chosen, and siblings differ."""
    candidate_ids: Tensor | None = None
    """[R, N, K] absolute ids that a *sampled* token could have been; None for chosen tokens (argmax, look-up)."""
    draft_probs: Tensor | None = None
    """[R, N, K] probability with which each candidate would have been drawn; None for chosen tokens."""
    confidence: Tensor | None = None
    """[R, N] float32, probability that the draft gives to the text up to each token; it only falls along a path."""

    @staticmethod
    def empty(requests: int, device: torch.device) -> Proposal:
        """Nothing drafted: the pass then is one step of plain decoding."""
        return Proposal(
            torch.zeros(requests, 0, dtype=torch.long, device=device),
            torch.zeros(requests, dtype=torch.long, device=device),
        )


@dataclass(frozen=True)
class Verdict:
    """What verification decided in one cycle."""

    tokens: Tensor
    """[R, N + 1], the accepted drafts followed by the bonus token; later entries are meaningless."""
    num_accepted: Tensor
    """[R], accepted drafts, without the bonus."""
    features: Tensor | None
    """[R, N + 1, F], features of the anchor and the accepted drafts in their first `num_accepted + 1` rows."""
    anchor_positions: Tensor
    """[R], position of the first feature row (the anchor's)."""
    finite: Tensor
    """[R] bool, False if the target's hidden states or logits are not finite: the decision is then meaningless."""
    path: Tensor | None = None
    """[R, N + 1], rows of the pass that form the accepted path of a tree, the anchor's first; None for a chain, whose
    path is the first rows."""
    logits: Tensor | None = None
    """[R, N + 1, V], at every row of the pass, before any warper."""


# Verify: one pass of the target over the anchor and the drafts decides which drafts stay and what follows them.


def verify(
    target: Target,
    state: State,
    proposal: Proposal,
    feature_layers: tuple[int, ...] = (),
    matching_rule: bool = False,
) -> Verdict:
    """Run the target once over [anchor, drafts] of every request and decide; lossless for any proposal.

    The target makes one choice at every row of the pass: its argmax, or one draw from its distribution, with a number
    that belongs to the position. *Chosen* drafts, chains and trees alike, stay while they equal it. So the text
    consists of the target's choices, for any drafts. A *sampled* draft is accepted with probability
    min(1, target_prob / draft_prob); after a rejection the token comes from norm(max(0, target_probs - draft_probs))
    (Leviathan et al. 2023; docs/design.md, section 5).

    Writes the rows of the pass into `state.cache` without committing them.

    Args:
        target: the frozen model.
        state: committed text, and the distributions that the output must follow; not changed here.
        proposal: drafts of this cycle, a chain or a tree.
        feature_layers: decoder layers whose outputs the drafter needs.
        matching_rule: accept sampled drafts too only if they equal the target's choice, the rule of the released
            implementation: also lossless, never accepts more (kept for comparison).
    """
    sampling = state.sampling
    tokens = torch.cat((state.anchors[:, None], proposal.tokens), dim=1)  # [R, N + 1]
    drafted = proposal.tokens.shape[1] > 0  # without drafts a chain and a tree are the same
    ancestors = tree_ancestors(proposal.parents) if drafted and proposal.parents is not None else None
    with scope("verify"):
        output = target.forward(tokens, state.cache, feature_layers, ancestors)
    with scope("verify_lm_head"):
        logits = target.lm_head(output.hidden)  # [R, N + 1, V]
    history = _history(state, proposal, ancestors, logits.shape[-1]) if sampling.warpers.penalties else None
    features, path = output.features, None
    if ancestors is not None:
        positions = state.lengths[:, None] + ancestors.sum(-1) - 1
        committed, num_accepted, path = walk_tree(sampling.choices(logits, positions, history), proposal, ancestors)
        if features is not None:
            features = features.gather(1, path[..., None].expand_as(features))
    else:
        committed, num_accepted = _decide_chain(logits, state, proposal, history, matching_rule)
    finite = _finite(output.hidden, logits, num_accepted, path)
    return Verdict(committed, num_accepted, features, state.lengths - 1, finite, path, logits)


def _decide_chain(
    logits: Tensor, state: State, proposal: Proposal, history: History | None, matching_rule: bool
) -> tuple[Tensor, Tensor]:
    """Committed tokens [R, N + 1] and the number of accepted drafts [R] of a chain; see `verify`."""
    sampling = state.sampling
    if sampling.plain_greedy and logits.is_cuda:  # one launch instead of a dozen
        committed, num_accepted, _ = greedy_chain(logits, proposal.tokens, proposal.num_drafts)
        return committed, num_accepted
    positions = state.lengths[:, None] + torch.arange(logits.shape[1], device=logits.device)
    if proposal.draft_probs is None or sampling.greedy or matching_rule:
        choices = sampling.choices(logits, positions, history)
        return match_chain(choices, proposal.tokens, proposal.num_drafts)
    return accept_chain(sampling.probs(logits, history), proposal, sampling.streams, positions)


def accept_chain(probs: Tensor, proposal: Proposal, streams: RandomStreams, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling of a chain.

    Args:
        probs: [R, N + 1, V], the target's distribution after the anchor and after every draft.
        proposal: sampled drafts; those of a request that chooses are one-hot.
        streams: random numbers.
        positions: [R, N + 1], absolute position of the token that each row of `probs` predicts.

    Returns:
        Committed tokens [R, N + 1] (accepted drafts, then the bonus) and the number of accepted drafts [R].
    """
    assert proposal.candidate_ids is not None and proposal.draft_probs is not None
    accepted = sampled_chain(
        probs,
        proposal.tokens,
        proposal.num_drafts,
        proposal.candidate_ids,
        proposal.draft_probs,
        streams.uniform(positions[:, :-1], RandomStreams.ACCEPT),
        streams.uniform(positions, RandomStreams.RESIDUAL),
    )
    return accepted.tokens, accepted.num_accepted


def _history(state: State, proposal: Proposal, ancestors: Tensor | None, vocab_size: int) -> History:
    """What penalties read at every row: the committed text and the drafts on the row's path."""
    if ancestors is None:
        num_drafts = proposal.tokens.shape[1]
        on_path = torch.ones(num_drafts + 1, num_drafts, dtype=torch.bool, device=state.tokens.device).tril(-1)
        on_path = on_path.expand(len(state.tokens), -1, -1)
    else:
        on_path = ancestors[:, :, 1:]
    return path_history(state.tokens, state.lengths, state.prompt_lengths, proposal.tokens, on_path, vocab_size)


def _finite(hidden: Tensor, logits: Tensor, num_accepted: Tensor, path: Tensor | None) -> Tensor:
    """Whether the rows that decided something are finite: hidden states [R, n, H] and logits [R, n, V] to [R].

    A target may forbid tokens with minus infinity, so only the largest of its logits must be finite. It is NaN if any
    of them is.
    """
    finite = hidden.isfinite().all(-1) & logits.amax(-1).isfinite()  # [R, n]
    if path is not None:
        finite = finite.gather(1, path)
    unused = torch.arange(finite.shape[1], device=finite.device) > num_accepted[:, None]
    return (finite | unused).all(1)


# Walk: a tree's accepted drafts are those that the target's choices lead to. The choice that equals no child of the
# last accepted node is the bonus token. So a node's children are accepted with the probability that the target gives
# them, in any tree.


def tree_ancestors(parents: Tensor) -> Tensor:
    """Which rows of the pass each row descends from, itself and the anchor included.

    Args:
        parents: [R, N], draft index of each draft's parent, -1 for children of the anchor; parents come first.

    Returns:
        [R, N + 1, N + 1] bool: row i descends from row j or is it.
    """
    requests, num_drafts = parents.shape
    rows = torch.arange(num_drafts + 1, device=parents.device)
    ancestors = (rows[:, None] == rows).repeat(requests, 1, 1)
    ancestors[:, 1:] |= rows == (parents + 1)[..., None]
    for _ in range(num_drafts.bit_length()):  # every squaring doubles how far up a row can see
        ancestors = torch.bmm(ancestors.float(), ancestors.float()) > 0
    return ancestors


def walk_tree(choices: Tensor, proposal: Proposal, ancestors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's choices down the tree.

    Args:
        choices: [R, N + 1], the token that the target chose after each row.
        proposal: a tree whose siblings differ.
        ancestors: from `tree_ancestors`.

    Returns:
        Committed tokens [R, N + 1] (accepted drafts, then the bonus), the number of accepted drafts [R], and the path
        [R, N + 1]: the anchor's row and the accepted drafts' rows, later entries meaningless.
    """
    assert proposal.parents is not None
    num_drafts = proposal.tokens.shape[1]
    index = torch.arange(num_drafts, device=choices.device)
    chosen = choices.gather(1, proposal.parents + 1) == proposal.tokens
    chosen &= index < proposal.num_drafts[:, None]
    # A draft is accepted if it and every draft above it were chosen.
    rejected = torch.bmm(ancestors[:, 1:, 1:].float(), (~chosen).float()[..., None])[..., 0]
    accepted = rejected == 0
    num_accepted = accepted.sum(1)
    # Parents come before children, so the path is the accepted rows in their order.
    path = torch.where(accepted, index + 1, num_drafts + 1).sort(dim=1).values.clamp(max=num_drafts)
    path = torch.cat((torch.zeros_like(num_accepted)[:, None], path), dim=1)
    last = path.gather(1, num_accepted[:, None])
    tokens = torch.cat((proposal.tokens.gather(1, path[:, 1:] - 1), choices[:, :1]), dim=1)
    return tokens.scatter(1, num_accepted[:, None], choices.gather(1, last)), num_accepted, path


def best_first(proposal: Proposal) -> Tensor:
    """Drafts of each request from the best on, [R, N]; if they have no confidence, in their order."""
    requests, num_drafts = proposal.tokens.shape
    places = torch.arange(num_drafts, device=proposal.tokens.device)
    if proposal.confidence is None:
        return places.expand(requests, -1)
    # Stable: a parent is never less probable than its child, and comes first if both are equal.
    believed = proposal.confidence * (places < proposal.num_drafts[:, None])
    return believed.sort(dim=1, descending=True, stable=True).indices


def best_drafts(proposal: Proposal, count: int) -> Proposal:
    """The proposal with only the `count` best drafts of every request."""
    if proposal.tokens.shape[1] <= count:
        return proposal
    return keep_drafts(proposal, best_first(proposal)[:, :count])


def keep_drafts(proposal: Proposal, kept: Tensor) -> Proposal:
    """A proposal with only the drafts `kept` [R, n] of each request, distinct, no draft without its parent.

    Entries past a request's number of drafts may be among them and stay invalid.
    """
    if kept.shape[1] == 0:
        return Proposal.empty(len(proposal.tokens), proposal.tokens.device)
    assert proposal.draft_probs is None, "which of sampled drafts are proposed must not depend on anything"
    kept = kept.sort(dim=1).values  # parents first, and valid entries before invalid ones
    parents = proposal.parents
    if parents is not None:
        above = parents.gather(1, kept)
        parents = torch.where(above < 0, -1, torch.searchsorted(kept, above.clamp(min=0)))
    return Proposal(
        proposal.tokens.gather(1, kept),
        (kept < proposal.num_drafts[:, None]).sum(1),
        parents,
        confidence=None if proposal.confidence is None else proposal.confidence.gather(1, kept),
    )


# Commit: append the accepted tokens and crop the cache.


def commit(state: State, verdict: Verdict) -> None:
    """Append what was decided, and crop the target's cache to it: lengths change, and only a tree's path is copied.

    Requests that are no longer active stay as they are.
    """
    width = verdict.tokens.shape[1]
    offsets = torch.arange(width, device=verdict.tokens.device)
    index = (state.lengths[:, None] + offsets).clamp(max=state.tokens.shape[1] - 1)
    fresh = (offsets <= verdict.num_accepted[:, None]) & state.active[:, None]
    kept = torch.where(fresh, verdict.tokens, state.tokens.gather(1, index))
    state.tokens.scatter_(1, index, kept)
    if verdict.path is not None:
        fixed = state.cache.fixed_extent is not None  # then the host must not ask how long the longest path is
        state.cache.keep_path(verdict.path if fixed else verdict.path[:, : int(verdict.num_accepted.max()) + 1])
    advance = (verdict.num_accepted + 1) * state.active
    state.lengths += advance
    state.cache.lengths += advance


# Propose: what the loop asks of every drafting method (docs/design.md, section 5).


class Drafter(Protocol):
    """Proposes drafts for the requests of a `State`.

    What it keeps between two cycles is in a `RowCache`, which the loop holds and passes to it.
    """

    feature_layers: tuple[int, ...]
    """Decoder layers of the target whose outputs it reads; prefill and verification tap these."""
    max_drafts: int
    """The most it can propose in one cycle."""
    samples: bool
    """Whether it samples drafts for requests above temperature 0: how many it proposes then decides which text a seed
    gives. *Chosen* drafts never change a text."""

    def allocate(self, requests: int, capacity: int) -> Any:
        """Its `RowCache` for `requests` requests of up to `capacity` tokens, all empty."""
        ...

    def read(self, cache: Any, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Take in text that it did not draft: a prompt, or what was committed without drafts.

        Args:
            cache: from `allocate`.
            tokens: [R, n], the token that follows each position.
            features: [R, n, F], of the positions after those already read; None if it taps nothing.
            counts: [R], how many of them are valid.
        """
        ...

    def propose(self, state: State, cache: Any, num_drafts: int) -> Proposal:
        """Up to `num_drafts` drafts per request, `num_drafts <= max_drafts`."""
        ...

    def advance(self, cache: Any, verdict: Verdict) -> None:
        """Take in a commit; `verdict` carries the features of what was committed."""
        ...


# How many drafts pay, if a policy decides it.


@dataclass(frozen=True)
class DraftPlan:
    """A policy's plan for one cycle."""

    requests: int
    """R."""
    drafts: int
    """Drafts per request to ask the drafter for; 0 for a plain cycle."""
    verified: int
    """How many of the best of them a static cycle verifies (`graphs/`). An ordinary cycle decides that in `cut`."""
    trial: bool = False
    """Whether a plain cycle also drafts for a few requests, without verifying, to see whether drafting would pay."""

    def cut(self, proposal: Proposal) -> Proposal:
        """The proposal with only the drafts that pay; here all of them."""
        return proposal


@dataclass(frozen=True)
class ObservedCycle:
    """What a cycle did, for the policy."""

    plan: DraftPlan
    offered: Proposal
    """The drafter's proposal for every request, or for a few of them in a trial; empty if it was not asked."""
    proposal: Proposal
    """The drafts that were verified."""
    verdict: Verdict
    """Its tokens and features are not read."""
    seconds: float | None
    """Seconds of the cycle, without the trial; None if they were not measured apart."""
    trial_seconds: float | None = None
    """Seconds of the trial; None if there was none, or it was not measured apart."""


class DraftPolicy(Protocol):
    """Decides how many drafts a cycle has."""

    def plan(self, requests: int, most: int) -> DraftPlan:
        """What to ask the drafter for in the next cycle of `requests` requests: at most `most` drafts each."""
        ...

    def observe(self, cycle: ObservedCycle) -> None:
        """Learn from a cycle. A static cycle is observed after the next one was planned."""
        ...


def cycle_room(drafter: Drafter) -> int:
    """Rows that caches need beyond those of a text: a cycle may overshoot by a whole block before it is cut."""
    return 2 * (drafter.max_drafts + 1)


def start(drafter: Drafter, state: State) -> RowCache:
    """A drafter's cache for freshly prefilled requests."""
    requests, capacity = state.tokens.shape
    cache = drafter.allocate(requests, capacity)
    longest = int(state.lengths.max()) - 1
    if longest:
        drafter.read(cache, state.tokens[:, 1 : longest + 1], state.features, state.lengths - 1)
    return cache
