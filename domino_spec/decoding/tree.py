"""Trees of drafts: who descends from whom, and which path the target's own choices walk.

Every node of a tree is a *chosen* token. The target chooses once at each row of the pass (argmax, or one draw), and
the walk follows children that equal the choice; the choice that no child equals is the bonus token. So the text is
made of the target's choices alone, whatever the tree, and a node's children are accepted with their probability.

Shapes: R requests, N drafted tokens; rows of a pass are the anchor (row 0) and the drafts (row 1 + j).
"""

from __future__ import annotations

import torch
from torch import Tensor

from domino_spec.decoding.state import Proposal


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
        ancestors: of `tree_ancestors`.

    Returns:
        Committed tokens [R, N + 1] (accepted drafts, then the bonus), the number of accepted drafts [R], and the path
        [R, N + 1]: the anchor's row and the accepted drafts' rows, later entries meaningless.
    """
    assert proposal.parents is not None
    num_drafts = proposal.tokens.shape[1]
    index = torch.arange(num_drafts, device=choices.device)
    wanted = choices.gather(1, proposal.parents + 1) == proposal.tokens
    wanted &= index < proposal.num_drafts[:, None]
    # A draft is accepted where nobody on the way down to it was refused.
    refused = torch.bmm(ancestors[:, 1:, 1:].float(), (~wanted).float()[..., None])[..., 0]
    accepted = refused == 0
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

    Entries past a request's own number of drafts may be among them and stay invalid.
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
