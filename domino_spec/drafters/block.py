"""`domino` and `dflash`: blocks drafted in parallel by the backbone, then corrected token by token by the head.

One cycle is one backbone pass over the anchor and the masks, one LM-head product, and one rollout of the head
(paper section 4). `dflash` is the same without the head: a DFlash checkpoint, or a Domino draft with its head off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State, Verdict
from domino_spec.decoding.sampling import RandomStreams
from domino_spec.draft.domino import Draft
from domino_spec.ops.best_first import best_first_tree
from domino_spec.ops.heads import Draw, HeadInputs, HeadOps
from domino_spec.settings import UserError
from domino_spec.target.cache import RequestRows


@dataclass
class ContextCache(RequestRows):
    """Keys and values of the context of every request, in memory allocated once."""

    keys: Tensor
    """[layers, R, kv_heads, capacity + behind, D]."""
    values: Tensor
    lengths: Tensor
    """[R], valid rows: committed tokens without the anchor."""
    extent: int | None = None
    """Rows that the backbone reads, whatever the lengths are; None reads as many as the longest request needs, which
    takes a look at the device."""
    behind: int = 0
    """Rows of a block, which may stand behind a request's own."""

    def view(self, start: int, stop: int, extent: int | None = None) -> ContextCache:
        """The requests `start .. stop - 1` as a cache of their own, in the same memory, with this `extent`."""
        keys, values = self.keys[:, start:stop], self.values[:, start:stop]
        return ContextCache(keys, values, self.lengths[start:stop], extent, self.behind)

    def clear(self, request: int) -> None:
        """Forget a request."""
        self.lengths[request] = 0

    def wipe(self, request: int, rows: int, first: int = 0) -> None:
        """As of any cache."""
        super().wipe(request, rows + self.behind, first)


class BlockDrafter:
    """Drafts with a DFlash backbone, with or without a Domino head.

    Args:
        draft: bound to its target.
        use_head: False drafts from the base logits alone.
        candidates: K, how many of the best base logits the head corrects; None corrects all.
        samples: sample the drafts of requests above temperature 0, and report their probabilities; False chooses the
            most probable token always.
        temperature: of sampled drafts; None for each request's own.
        min_confidence: leave out drafts whose path the draft itself believes in less than this (the product of its
            largest probabilities); 0 proposes always as many as asked for. A draft that will be rejected still costs a
            row of the verify pass.

    Raises:
        UserError: the head is asked for and the draft has none.
    """

    def __init__(
        self,
        draft: Draft,
        *,
        use_head: bool = True,
        candidates: int | None = None,
        samples: bool = False,
        temperature: float | None = None,
        min_confidence: float = 0.0,
    ) -> None:
        if use_head and draft.head is None:
            raise UserError(
                "method domino needs a draft with a Domino head; this one is a plain DFlash draft (use dflash)"
            )
        self.draft = draft
        self.head = draft.head if use_head else None
        self.ops = draft.head_ops if use_head else HeadOps(None, draft.device, draft.dtype)
        self.candidates = candidates
        self.samples = samples
        self.temperature = temperature
        self.min_confidence = min_confidence
        self.feature_layers = draft.config.target_layer_ids
        self.max_drafts = draft.config.max_drafts

    @property
    def static(self) -> bool:
        """On a CPU the rollout looks where it can end early."""
        return self.min_confidence == 0 or self.draft.device.type != "cpu"

    def allocate(self, requests: int, capacity: int) -> ContextCache:
        """Memory for so many requests of `capacity` tokens."""
        config = self.draft.config
        behind = self.draft.backbone.rows_behind
        shape = (config.num_hidden_layers, requests, config.num_key_value_heads, capacity + behind, config.head_dim)
        keys = torch.zeros(shape, dtype=self.draft.dtype, device=self.draft.device)
        lengths = torch.zeros(requests, dtype=torch.long, device=keys.device)
        return ContextCache(keys, torch.zeros_like(keys), lengths, behind=behind)

    def read(self, own: ContextCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Project features [R, n, F]."""
        assert features is not None
        features = self.draft.read_features(features).to(self.draft.dtype)
        self.draft.backbone.append_context(features, own.keys, own.values, own.lengths)
        own.lengths += counts

    def slots(self, state: State, own: ContextCache, num_drafts: int) -> Tensor:
        """Hidden states of the slots that predict the first `num_drafts` drafts, [R, num_drafts, H].

        The backbone runs all slots, as trained, or ends the block with them where it was trained on shorter ones, too.
        """
        draft, config = self.draft, self.draft.config
        anchors, first = state.anchors, config.first_draft_slot
        block_size = first + num_drafts if config.short_blocks else config.block_size
        slots = torch.arange(block_size, device=anchors.device)
        hidden = draft.backbone.over_cache(
            draft.block_embeddings(anchors, block_size),
            (state.lengths - 1)[:, None] + slots,
            own.keys,
            own.values,
            own.lengths,
            int(own.lengths.max()) if own.extent is None else own.extent,
        )
        return hidden[:, first : first + num_drafts]

    def propose(self, state: State, own: ContextCache, num_drafts: int) -> Proposal:
        """A chain for every request."""
        if num_drafts == 0:
            return Proposal.empty(len(state.lengths), state.lengths.device)
        draft, anchors = self.draft, state.anchors
        hidden = self.slots(state, own, num_drafts)
        uniform = None
        if self.samples and not state.sampling.greedy:
            positions = state.lengths[:, None] + torch.arange(num_drafts, device=anchors.device)
            uniform = state.sampling.streams.uniform(positions, RandomStreams.DRAFT)
        temperature = state.sampling.temperatures if self.temperature is None else self.temperature
        rollout = self.ops.chain(
            HeadInputs(hidden, draft.base_logits(hidden), draft.embed(anchors)),
            Draw(self.candidates, temperature, uniform, self.min_confidence),
        )
        counts = torch.full_like(state.lengths, num_drafts)
        if rollout.confidence is not None:
            counts = (rollout.confidence >= self.min_confidence).sum(1)  # confidence only falls along a path
        if rollout.choices.shape[1] == 0:
            return Proposal.empty(len(anchors), anchors.device)
        return Proposal(
            tokens=draft.to_token_ids(rollout.choices),
            num_drafts=counts,
            candidate_ids=None if rollout.candidates is None else draft.to_token_ids(rollout.candidates),
            draft_probs=rollout.probs,
            confidence=rollout.confidence,
        )

    def advance(self, own: ContextCache, verdict: Verdict) -> None:
        """Project the features of what was committed."""
        assert verdict.features is not None
        counts = verdict.num_accepted + 1
        rows = int(counts.max()) if own.extent is None else verdict.features.shape[1]
        # The text of a request that has ended stays where it is; so must its context, or it would outgrow the cache.
        own.lengths.copy_(torch.where(counts > 0, verdict.anchor_positions, own.lengths))
        self.read(own, verdict.tokens, verdict.features[:, :rows], counts)


# ----------------------------------------------------------------------
# `domino-tree`, `dflash-tree` and `domino-best-first`: a tree of the prefixes that the draft believes in most.
#
# The same draft and the same backbone pass as the chain; then, instead of one most probable token per slot, the best
# few prefixes, each with a GRU state of its own, in one of three orders (`ops.heads`, `ops.best_first`): depth by depth
# with a fixed width (what the first two use), best first as DominoTree and DDTree grow them, or with a quota for each
# depth. Without a head the slots' probabilities are multiplied.


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
        given = HeadInputs(hidden, draft.base_logits(hidden), draft.embed(anchors))
        how = Draw(block.candidates, min_confidence=block.min_confidence)
        if self.builder == "best-first":
            tree = best_first_tree(block.ops.head, given, how, num_drafts)
        else:
            width = None if self.width is None else min(self.width, num_drafts)
            tree = block.ops.tree(given, how, num_drafts, width)
        confidence = None if tree.log_probs is None else tree.log_probs.exp()
        return Proposal(draft.to_token_ids(tree.choices), tree.num_drafts, tree.parents, confidence=confidence)

    def advance(self, own: ContextCache, verdict: Verdict) -> None:
        """The chain's drafter's caches move on along the accepted path."""
        self.block.advance(own, verdict)
