"""`domino-tree` and `dflash-tree`: a tree of the prefixes that the draft believes in most.

The same draft and the same backbone pass as the chain; then, instead of one most probable token per slot, the best few
prefixes of every depth, each with a GRU state of its own (`kernels.reference.head_tree`). Without a head the slots'
probabilities are multiplied, which is how DDTree grows trees on DFlash.
"""

from __future__ import annotations

from dataclasses import replace

from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.drafters.domino import BlockDrafter, ContextCache
from domino_spec.kernels.reference import head_tree


class TreeDrafter:
    """Proposes trees of *chosen* tokens.

    Args:
        block: the drafter of chains whose backbone pass is used; its candidates and least confidence hold here too.
        budget: drafts of a tree at most; no more than `width` at each depth exist.
        width: prefixes that are extended at each depth.
    """

    def __init__(self, block: BlockDrafter, budget: int, width: int = 4) -> None:
        assert block.temperature == 0, "siblings are chosen, not sampled"
        if budget < 1 or width < 1:
            raise ValueError(f"a tree needs a budget and a width of at least 1, got {budget} and {width}")
        self.block, self.width = block, width
        self.feature_layers = block.feature_layers
        self.max_drafts = min(budget, width * block.max_drafts)  # the cache makes room for so many rows

    def start(self, state: State) -> ContextCache:
        """The context caches of the chain's drafter."""
        return self.block.start(state)

    def propose(self, state: State, own: ContextCache, num_drafts: int) -> Proposal:
        """A tree of up to `num_drafts` tokens for every request."""
        block, draft, anchors = self.block, self.block.draft, state.anchors
        if num_drafts == 0:
            nothing = Proposal.empty(len(anchors), anchors.device)
            return replace(nothing, parents=nothing.tokens)  # a tree all the same: who drafts beside it must see that
        hidden = block.slots(state, own)
        tree = head_tree(
            block.head,
            hidden,
            draft.base_logits(hidden),
            draft.embed(anchors),
            draft.embed_choices,
            block.candidates,
            num_drafts,
            self.width,
            block.min_confidence,
        )
        return Proposal(draft.to_token_ids(tree.choices), tree.num_drafts, tree.parents)

    def advance(self, own: ContextCache, verdict: Verdict) -> ContextCache:
        """The chain's drafter's caches move on along the accepted path."""
        return self.block.advance(own, verdict)
