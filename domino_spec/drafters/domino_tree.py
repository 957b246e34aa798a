"""`domino-tree`, `dflash-tree` and `domino-best-first`: a tree of the prefixes that the draft believes in most.

The same draft and the same backbone pass as the chain; then, instead of one most probable token per slot, the best few
prefixes, each with a GRU state of its own, in one of three orders (`kernels.trees`): depth by depth with a fixed width
(what the first two use), best first as DominoTree and DDTree grow them, or with a quota for each depth. Without a head
the slots' probabilities are multiplied.
"""

from __future__ import annotations

from torch import Tensor

from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.drafters.domino import BlockDrafter, ContextCache
from domino_spec.kernels.rollout import head_tree
from domino_spec.kernels.trees import best_first_tree

BUILDERS = ("depth", "best-first", "quota")
"""Orders in which trees grow."""


def default_width(budget: int) -> int:
    """Prefixes that are extended at each depth: a third of the budget, at least 4 (docs/log.md)."""
    return max(4, -(-budget // 3))


class TreeDrafter:
    """Proposes trees of *chosen* tokens.

    Args:
        block: the drafter of chains whose backbone pass is used; its candidates and least confidence hold here too.
        budget: drafts of a tree at most.
        width: of the builder "depth": prefixes that are extended at each depth, and no more of a depth are proposed.
            None for `default_width`.
        builder: of `BUILDERS`.

    Raises:
        ValueError: an unknown builder, a budget or a width below 1, or a width for a builder that has none.
    """

    samples = False

    def __init__(self, block: BlockDrafter, budget: int, width: int | None = None, builder: str = "depth") -> None:
        assert not block.samples, "siblings are chosen, not sampled"
        if builder not in BUILDERS:
            raise ValueError(f"unknown builder {builder!r}; known builders are {', '.join(BUILDERS)}")
        if width is not None and builder != "depth":
            raise ValueError(f"builder {builder} has no width; only depth has one")
        if width is None and builder == "depth":
            width = default_width(budget)
        if budget < 1 or (width is not None and width < 1):
            raise ValueError(f"a tree needs a budget and a width of at least 1, got {budget} and {width}")
        self.block, self.width, self.builder = block, width, builder
        self.feature_layers = block.feature_layers
        # The cache makes room for so many rows.
        self.max_drafts = budget if width is None else min(budget, width * block.max_drafts)

    @property
    def static(self) -> bool:
        """Prefixes in order of their probability are searched on the host."""
        return self.builder != "best-first" and self.block.static

    def allocate(self, requests: int, capacity: int) -> ContextCache:
        """The context caches of the chain's drafter."""
        return self.block.allocate(requests, capacity)

    def read(self, own: ContextCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """As the chain's drafter."""
        self.block.read(own, tokens, features, counts)

    def propose(self, state: State, own: ContextCache, num_drafts: int) -> Proposal:
        """A tree of up to `num_drafts` tokens for every request."""
        block, draft, anchors = self.block, self.block.draft, state.anchors
        if num_drafts == 0:
            return Proposal.empty(len(anchors), anchors.device)
        hidden = block.slots(state, own, min(num_drafts, block.max_drafts))  # no path is longer
        given = (block.head, hidden, draft.base_logits(hidden), draft.embed(anchors), draft.choice_embedding)
        if self.builder == "best-first":
            tree = best_first_tree(*given, block.candidates, num_drafts, block.min_confidence)
        else:
            width = None if self.width is None else min(self.width, num_drafts)
            tree = head_tree(*given, block.candidates, num_drafts, width, block.min_confidence)
        confidence = None if tree.log_probs is None else tree.log_probs.exp()
        return Proposal(draft.to_token_ids(tree.choices), tree.num_drafts, tree.parents, confidence=confidence)

    def advance(self, own: ContextCache, verdict: Verdict) -> None:
        """The chain's drafter's caches move on along the accepted path."""
        self.block.advance(own, verdict)
