"""Acceptance of a chain: which drafts stay, and the token that follows them, in one go.

The last step of verification, after the target's LM head: greedy chains straight from the target's logits, sampled ones
from its probabilities and the random numbers of their positions. `decoding/cycle.py` explains the rules. The PyTorch
version is here; on CUDA a Triton kernel does the same without a dozen launches in between.

Shapes: R requests, N drafts, V vocabulary, K candidates of a draft.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from domino_spec.ops.heads import draw
from domino_spec.ops.triton import has_triton


class Accepted(NamedTuple):
    """The decision about a chain: accepted drafts and the bonus token."""

    tokens: Tensor
    """[R, N + 1] int64: accepted drafts, then the bonus token; what comes later has no meaning."""
    num_accepted: Tensor
    """[R] int64, without the bonus."""
    finite: Tensor
    """[R] bool, False if a row that decided something holds nan."""


def greedy_chain(logits: Tensor, drafts: Tensor, num_drafts: Tensor) -> Accepted:
    """Keep the drafts that equal the target's argmax; of equal logits the lowest index counts.

    Args:
        logits: [R, N + 1, V], the target's after the anchor and after every draft, float32 or bfloat16.
        drafts: [R, N] int64.
        num_drafts: [R], how many of them are valid.
    """
    if _in_triton(logits):
        from domino_spec.ops.triton.acceptance import greedy_chain_triton

        return Accepted(*greedy_chain_triton(logits, drafts, num_drafts))
    return greedy_chain_torch(logits, drafts, num_drafts)


def sampled_chain(
    probs: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    candidate_ids: Tensor,
    draft_probs: Tensor,
    accept: Tensor,
    residual: Tensor,
) -> Accepted:
    """Speculative sampling: keep a draft with probability target / draft, else draw from what the draft left over.

    Args:
        probs: [R, N + 1, V] float32, the target's distributions after the anchor and after every draft.
        drafts: [R, N] int64.
        num_drafts: [R], how many of them are valid.
        candidate_ids: [R, N, K] int64, what each draft could have been, each token once.
        draft_probs: [R, N, K] float32, how probable that was.
        accept: [R, N] float64 in [0, 1), the number that decides about each draft.
        residual: [R, N + 1] float64 in [0, 1), the number that draws the bonus token at each position.
    """
    given = (probs, drafts, num_drafts, candidate_ids, draft_probs, accept, residual)
    if _in_triton(probs) and probs.dtype == draft_probs.dtype == torch.float32 and drafts.shape[1] > 0:
        from domino_spec.ops.triton.acceptance import sampled_chain_triton

        return Accepted(*sampled_chain_triton(*given))
    return sampled_chain_torch(*given)


def _in_triton(values: Tensor) -> bool:
    """Whether Triton decides about rows of this kind."""
    return values.is_cuda and values.dtype in (torch.float32, torch.bfloat16) and has_triton("acceptance")


def greedy_chain_torch(logits: Tensor, drafts: Tensor, num_drafts: Tensor) -> Accepted:
    """`greedy_chain` in PyTorch, on any device."""
    tokens, num_accepted = match_chain(logits.argmax(-1), drafts, num_drafts)
    return Accepted(tokens, num_accepted, _finite(logits, num_accepted))


def match_chain(choices: Tensor, drafts: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafts that equal the target's choices [R, N + 1]; tokens and number accepted as in `Accepted`."""
    num_accepted = _prefix(choices[:, :-1] == drafts, num_drafts)
    return _with_bonus(drafts, num_accepted, choices.gather(1, num_accepted[:, None])), num_accepted


def sampled_chain_torch(
    probs: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    candidate_ids: Tensor,
    draft_probs: Tensor,
    accept: Tensor,
    residual: Tensor,
) -> Accepted:
    """`sampled_chain` in PyTorch, on any device."""
    target_prob = probs[:, :-1].gather(2, drafts[..., None])[..., 0].double()  # [R, N]
    drawn = ((candidate_ids == drafts[..., None]) * draft_probs).sum(-1).double()
    num_accepted = _prefix(accept < target_prob / drawn, num_drafts)
    left = probs.gather(1, num_accepted[:, None, None].expand(-1, 1, probs.shape[-1]))[:, 0].double()  # [R, V]
    if drafts.shape[1] > 0:
        at = num_accepted.clamp(max=drafts.shape[1] - 1)[:, None, None].expand(-1, 1, draft_probs.shape[-1])
        rejected = (num_accepted < num_drafts)[:, None]
        removed = torch.where(rejected, draft_probs.gather(1, at)[:, 0].double(), 0.0)
        without = left.scatter_add(1, candidate_ids.gather(1, at)[:, 0], -removed).clamp_(min=0)
        # If the two distributions are almost equal, rounding can leave nothing; a rejection then has no weight.
        left = torch.where(without.sum(1, keepdim=True) > 0, without, left)
    bonus = draw(left, residual.gather(1, num_accepted[:, None])[:, 0])
    return Accepted(_with_bonus(drafts, num_accepted, bonus[:, None]), num_accepted, _finite(probs, num_accepted))


def _prefix(accepted: Tensor, num_drafts: Tensor) -> Tensor:
    """Length of the leading run of True within each request's drafts."""
    valid = torch.arange(accepted.shape[1], device=accepted.device) < num_drafts[:, None]
    return (accepted & valid).long().cumprod(1).sum(1)


def _with_bonus(drafts: Tensor, num_accepted: Tensor, bonus: Tensor) -> Tensor:
    """Drafts with the bonus token [R, 1] written after the accepted prefix: [R, N + 1]."""
    return torch.cat((drafts, bonus), dim=1).scatter(1, num_accepted[:, None], bonus)


def _finite(rows: Tensor, num_accepted: Tensor) -> Tensor:
    used = torch.arange(rows.shape[1], device=rows.device) <= num_accepted[:, None]
    return ~(rows.isnan().any(-1) & used).any(1)
