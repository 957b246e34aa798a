"""Verification: one target pass over the anchor and the drafts, then which drafts stay and what follows them.

Lossless for any proposal (DESIGN section 5). The target makes one choice at every row of the pass (its argmax, or one
draw from its distribution, with a number that belongs to the position), and *chosen* drafts, chains and trees alike,
stay while they equal it: a draft x is accepted with probability target_probs[x], and the text is made of the target's
own choices, whatever was drafted. A *sampled* draft is accepted with probability min(1, target_prob / draft_prob), else
the next token comes from norm(max(0, target_probs - draft_probs)) (Leviathan et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from domino_spec.decoding.sampling import History, RandomStreams, path_history
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.decoding.tree import tree_ancestors, walk_tree
from domino_spec.kernels.acceptance import greedy_chain, match_chain, sampled_chain
from domino_spec.target.model import Target


def verify(
    target: Target,
    state: State,
    proposal: Proposal,
    feature_layers: tuple[int, ...] = (),
    matching_rule: bool = False,
) -> Verdict:
    """Run the target once over [anchor, drafts] of every request and decide.

    Writes the rows of the pass into `state.cache` without committing them.

    Args:
        target: the frozen model.
        state: committed text, and the distributions that the output must follow; not changed here.
        proposal: drafts of this cycle, a chain or a tree.
        feature_layers: decoder layers whose outputs the drafter needs.
        matching_rule: accept sampled drafts too only where they equal the target's choice, the rule of the released
            implementation: also lossless, never accepts more (kept for comparison).
    """
    sampling = state.sampling
    tokens = torch.cat((state.anchors[:, None], proposal.tokens), dim=1)  # [R, N + 1]
    drafted = proposal.tokens.shape[1] > 0  # nothing drafted is a chain and a tree alike
    ancestors = tree_ancestors(proposal.parents) if drafted and proposal.parents is not None else None
    output = target.forward(tokens, state.cache, feature_layers, ancestors)
    logits = target.lm_head(output.hidden)  # [R, N + 1, V]
    history = _history(state, proposal, ancestors, logits.shape[-1]) if sampling.reads_history else None
    features, path = output.features, None
    if ancestors is not None:
        positions = state.lengths[:, None] + ancestors.sum(-1) - 1
        committed, num_accepted, path = walk_tree(sampling.choices(logits, positions, history), proposal, ancestors)
        if features is not None:
            features = features.gather(1, path[..., None].expand_as(features))
    elif sampling.plain_greedy and logits.is_cuda:  # one launch instead of a dozen
        committed, num_accepted, _ = greedy_chain(logits, proposal.tokens, proposal.num_drafts)
    else:
        positions = state.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        if proposal.draft_probs is None or sampling.greedy or matching_rule:
            choices = sampling.choices(logits, positions, history)
            committed, num_accepted = match_chain(choices, proposal.tokens, proposal.num_drafts)
        else:
            probs = sampling.probs(logits, history)
            committed, num_accepted = accept_chain(probs, proposal, sampling.streams, positions)
    sound = _sound(output.hidden, logits, num_accepted, path)
    return Verdict(committed, num_accepted, features, state.lengths - 1, sound, path, logits)


def _history(state: State, proposal: Proposal, ancestors: Tensor | None, vocab_size: int) -> History:
    """What penalties read at every row: the committed text and the drafts on the row's path."""
    if ancestors is None:
        num_drafts = proposal.tokens.shape[1]
        on_path = torch.ones(num_drafts + 1, num_drafts, dtype=torch.bool, device=state.tokens.device).tril(-1)
        on_path = on_path.expand(len(state.tokens), -1, -1)
    else:
        on_path = ancestors[:, :, 1:]
    return path_history(state.tokens, state.lengths, state.prompt_lengths, proposal.tokens, on_path, vocab_size)


def _sound(hidden: Tensor, logits: Tensor, num_accepted: Tensor, path: Tensor | None) -> Tensor:
    """Whether the rows that decided something are finite: hidden states [R, n, H] and logits [R, n, V] to [R].

    A target may forbid tokens with minus infinity. So of its logits only the largest must be finite: it is NaN where
    any of them is.
    """
    finite = hidden.isfinite().all(-1) & logits.amax(-1).isfinite()  # [R, n]
    if path is not None:
        finite = finite.gather(1, path)
    unused = torch.arange(finite.shape[1], device=finite.device) > num_accepted[:, None]
    return (finite | unused).all(1)


def accept_chain(probs: Tensor, proposal: Proposal, streams: RandomStreams, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative sampling of a chain.

    Args:
        probs: [R, N + 1, V], the target's distribution after the anchor and after every draft.
        proposal: sampled drafts; a request's may be one-hot, where it chooses.
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
        fixed = state.cache.fixed_extent is not None  # then nobody looks how much of the paths is meant
        state.cache.keep_path(verdict.path if fixed else verdict.path[:, : int(verdict.num_accepted.max()) + 1])
    advance = (verdict.num_accepted + 1) * state.active
    state.lengths += advance
    state.cache.lengths += advance
