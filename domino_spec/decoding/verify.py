"""Verification: one target pass over the anchor and the drafts, then which drafts stay and what follows them.

Lossless for any proposal (DESIGN section 5). A *chosen* draft x is accepted with probability target_probs[x] and, once
rejected, is removed from the distribution that the next token is drawn from. A *sampled* draft is accepted with
probability min(1, target_prob / draft_prob), else the next token comes from norm(max(0, target_probs - draft_probs))
(Leviathan et al. 2023). Temperature 0 is the one-hot case of the same rules; `_greedy_chain` is its faster twin. Trees,
whose drafts are all chosen, are walked along the target's own choices (`tree`), at any temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from domino_spec.decoding.sampling import (
    History,
    RandomStreams,
    SamplingSettings,
    draw,
    path_history,
    target_probs,
    warp_logits,
)
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.decoding.tree import tree_ancestors, walk_tree
from domino_spec.target.model import Target


def verify(
    target: Target,
    state: State,
    proposal: Proposal,
    settings: SamplingSettings,
    streams: RandomStreams,
    feature_layers: tuple[int, ...] = (),
    matching_rule: bool = False,
) -> Verdict:
    """Run the target once over [anchor, drafts] of every request and decide.

    Writes the rows of the pass into `state.cache` without committing them.

    Args:
        target: the frozen model.
        state: committed text; not changed here.
        proposal: drafts of this cycle, a chain or a tree.
        settings: the distribution that the output must follow.
        streams: random numbers, keyed by request and position.
        feature_layers: decoder layers whose outputs the drafter needs.
        matching_rule: accept a draft only if an independent draw of the target equals it, the rule of the released
            implementation: also lossless, never accepts more (kept for comparison). Trees are always walked so.
    """
    tokens = torch.cat((state.anchors[:, None], proposal.tokens), dim=1)  # [R, N + 1]
    drafted = proposal.tokens.shape[1] > 0  # nothing drafted is a chain and a tree alike
    ancestors = tree_ancestors(proposal.parents) if drafted and proposal.parents is not None else None
    output = target.forward(tokens, state.cache, feature_layers, ancestors)
    logits = target.lm_head(output.hidden)  # [R, N + 1, V]
    history = None
    if settings.reads_history:
        num_drafts = proposal.tokens.shape[1]
        if ancestors is None:
            on_path = torch.ones(num_drafts + 1, num_drafts, dtype=torch.bool, device=tokens.device).tril(-1)
            on_path = on_path.expand(len(tokens), -1, -1)
        else:
            on_path = ancestors[:, :, 1:]
        history = path_history(
            state.tokens,
            state.lengths,
            state.prompt_lengths,
            proposal.tokens,
            on_path,
            logits.shape[-1],
        )
    if ancestors is not None:
        choices = _choices(logits, settings, history, streams, state.lengths[:, None] + ancestors.sum(-1) - 1)
        committed, num_accepted, path = walk_tree(choices, proposal, ancestors)
        features = output.features
        if features is not None:
            features = features.gather(1, path[..., None].expand_as(features))
        return Verdict(committed, num_accepted, features, state.lengths - 1, path)
    if settings.greedy:
        committed, num_accepted = _greedy_chain(warp_logits(logits, settings, history), proposal)
    else:
        probs = target_probs(logits, settings, history)
        positions = state.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if matching_rule:
            committed, num_accepted = _matching_chain(probs, proposal, streams, positions)
        else:
            committed, num_accepted = accept_chain(probs, proposal, streams, positions)
    return Verdict(committed, num_accepted, output.features, state.lengths - 1)


def _choices(
    logits: Tensor, settings: SamplingSettings, history: History | None, streams: RandomStreams, positions: Tensor
) -> Tensor:
    """One choice of the target at every row: argmax, or a draw with the number of the row's position. [R, n]."""
    if settings.greedy:
        return warp_logits(logits, settings, history).argmax(-1)
    return draw(target_probs(logits, settings, history), streams.uniform(positions, RandomStreams.RESIDUAL))


def _accepted_prefix(accepted: Tensor, proposal: Proposal) -> Tensor:
    """Length of the leading run of True within each request's own drafts: [R, N] to [R]."""
    proposed = torch.arange(accepted.shape[1], device=accepted.device) < proposal.num_drafts[:, None]
    return (accepted & proposed).long().cumprod(1).sum(1)


def _with_bonus(proposal: Proposal, num_accepted: Tensor, bonus: Tensor) -> Tensor:
    """Drafts with the bonus token written after the accepted prefix: [R, N + 1]."""
    tokens = torch.cat((proposal.tokens, bonus[:, None]), dim=1)
    return tokens.scatter(1, num_accepted[:, None], bonus[:, None])


def _greedy_chain(logits: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    choices = logits.argmax(-1)  # [R, N + 1]
    num_accepted = _accepted_prefix(choices[:, :-1] == proposal.tokens, proposal)
    bonus = choices.gather(1, num_accepted[:, None])[:, 0]
    return _with_bonus(proposal, num_accepted, bonus), num_accepted


def accept_chain(probs: Tensor, proposal: Proposal, streams: RandomStreams, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling of a chain.

    Args:
        probs: [R, N + 1, V], the target's distribution after the anchor and after every draft.
        proposal: chosen or sampled drafts.
        streams: random numbers.
        positions: [R, N + 1], absolute position of the token that each row of `probs` predicts.

    Returns:
        Committed tokens [R, N + 1] (accepted drafts, then the bonus) and the number of accepted drafts [R].
    """
    drafts = proposal.tokens
    target_prob = probs[:, :-1].gather(2, drafts[..., None])[..., 0].double()  # [R, N]
    if proposal.draft_probs is None:
        ratio = target_prob
    else:
        assert proposal.candidate_ids is not None
        drawn = (proposal.candidate_ids == drafts[..., None]) * proposal.draft_probs
        ratio = target_prob / drawn.sum(-1).double()
    accepted = streams.uniform(positions[:, :-1], RandomStreams.ACCEPT) < ratio
    num_accepted = _accepted_prefix(accepted, proposal)

    # The bonus comes from the row after the accepted prefix; a rejected draft first takes its share away.
    row = num_accepted[:, None, None].expand(-1, 1, probs.shape[-1])
    residual = probs.gather(1, row)[:, 0].double()  # [R, V]
    rejected = num_accepted < proposal.num_drafts
    if drafts.shape[1] > 0:
        index = num_accepted.clamp(max=drafts.shape[1] - 1)[:, None]
        if proposal.draft_probs is None:
            removed_ids = drafts.gather(1, index)  # [R, 1]
            removed = torch.full_like(removed_ids, 1, dtype=torch.double)
        else:
            assert proposal.candidate_ids is not None
            at_row = index[..., None].expand(-1, 1, proposal.draft_probs.shape[-1])
            removed_ids = proposal.candidate_ids.gather(1, at_row)[:, 0]  # [R, K]
            removed = proposal.draft_probs.gather(1, at_row)[:, 0].double()
        removed = torch.where(rejected[:, None], removed, 0.0)
        left = residual.scatter_add(1, removed_ids, -removed).clamp_(min=0)
        # Rounding can leave nothing where the two distributions are all but equal; a rejection there has no weight.
        residual = torch.where(left.sum(1, keepdim=True) > 0, left, residual)
    bonus_position = positions.gather(1, num_accepted[:, None])
    bonus = draw(residual, streams.uniform(bonus_position, RandomStreams.RESIDUAL)[:, 0])
    return _with_bonus(proposal, num_accepted, bonus), num_accepted


def _matching_chain(
    probs: Tensor, proposal: Proposal, streams: RandomStreams, positions: Tensor
) -> tuple[Tensor, Tensor]:
    choices = draw(probs, streams.uniform(positions, RandomStreams.RESIDUAL))  # [R, N + 1]
    num_accepted = _accepted_prefix(choices[:, :-1] == proposal.tokens, proposal)
    return _with_bonus(proposal, num_accepted, choices.gather(1, num_accepted[:, None])[:, 0]), num_accepted


def commit(state: State, verdict: Verdict) -> None:
    """Append what was decided and crop the target's cache to it: lengths change, and only a tree's path is copied.

    Requests that are no longer active stay as they are.
    """
    width = verdict.tokens.shape[1]
    offsets = torch.arange(width, device=verdict.tokens.device)
    index = (state.lengths[:, None] + offsets).clamp(max=state.tokens.shape[1] - 1)
    fresh = (offsets <= verdict.num_accepted[:, None]) & state.active[:, None]
    kept = torch.where(fresh, verdict.tokens, state.tokens.gather(1, index))
    state.tokens.scatter_(1, index, kept)
    if verdict.path is not None:
        state.cache.keep_path(verdict.path[:, : int(verdict.num_accepted.max()) + 1])
    advance = (verdict.num_accepted + 1) * state.active
    state.lengths += advance
    state.cache.lengths += advance
