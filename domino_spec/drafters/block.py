"""Blocks drafted in parallel by the backbone, then corrected token by token by the head: a chain, or a tree.

One cycle is one backbone pass over the anchor and the masks, one LM-head product, and one run of the head over its
logits (paper section 4). Methods `domino` and `dflash` take the most probable token of each slot, or sample it; the
others (`domino-tree`, `dflash-tree`, `domino-best-first`) take the best few prefixes, each with a separate GRU state.
`dflash` is the same without the head, from a DFlash checkpoint or a Domino draft: the slots' probabilities are then
multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State, Verdict, scope
from domino_spec.decoding.sampling import RandomStreams
from domino_spec.draft.domino import Draft
from domino_spec.ops.best_first import best_first_tree
from domino_spec.ops.heads import Draw, HeadInputs, HeadOps
from domino_spec.settings import UserError
from domino_spec.target.cache import RowCache

BUILDERS = ("depth", "best-first", "quota")
"""Orders in which trees grow (`ops/`)."""


@dataclass(frozen=True)
class TreeShape:
    """How a tree of drafts grows.

    Raises:
        ValueError: an unknown builder, a budget or a width below 1, or a width for a builder that has none.
    """

    budget: int
    """Drafts of a tree at most."""
    width: int | None = None
    """For the builder "depth": prefixes that are extended at each depth, and no more of a depth are proposed. None is a
    third of the budget, at least 4 (docs/log.md)."""
    builder: str = "depth"
    """Depth by depth with a fixed width; "best-first", as DominoTree and DDTree grow them; or a "quota" per depth."""

    def __post_init__(self) -> None:
        if self.builder not in BUILDERS:
            raise ValueError(f"unknown builder {self.builder!r}; known builders are {', '.join(BUILDERS)}")
        if self.builder == "depth" and self.width is None:
            object.__setattr__(self, "width", max(4, -(-self.budget // 3)))
        elif self.builder != "depth" and self.width is not None:
            raise ValueError(f"builder {self.builder} has no width; only depth has one")
        if self.budget < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"a tree needs a budget and a width of at least 1, got {self.budget} and {self.width}")


class ContextCache(RowCache):
    """Keys and values of the context of every request: its committed tokens without the anchor.

    Args:
        keys: [layers, R, kv_heads, capacity + scratch_rows, D] of zeros.
        scratch_rows: rows of a block, which `Backbone.over_cache` may write past a request's context.
    """

    def __init__(self, keys: Tensor, scratch_rows: int = 0) -> None:
        self.keys, self.values, self.scratch_rows = keys, torch.zeros_like(keys), scratch_rows
        self.lengths = torch.zeros(keys.shape[1], dtype=torch.long, device=keys.device)


class BlockDrafter:
    """Drafts with a DFlash backbone, with or without a Domino head.

    Args:
        draft: bound to its target.
        use_head: False drafts from the base logits alone.
        candidates: K, how many of the best base logits the head corrects; None corrects all.
        samples: sample the drafts of requests above temperature 0, and report their probabilities; False chooses the
            most probable token always. A tree's drafts are always chosen.
        temperature: of sampled drafts; None for each request's temperature.
        min_confidence: leave out drafts whose path the draft itself believes in less than this (the product of its
            largest probabilities); 0 proposes always as many as asked for. A draft that will be rejected still costs a
            row of the verify pass.
        tree: draft trees of this shape; None drafts chains.

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
        tree: TreeShape | None = None,
    ) -> None:
        if use_head and draft.head is None:
            raise UserError(
                "method domino needs a draft with a Domino head; this one is a plain DFlash draft (use dflash)"
            )
        assert tree is None or not samples, "siblings are chosen, not sampled"
        self.draft, self.head = draft, draft.head if use_head else None
        self.ops = draft.head_ops if use_head else HeadOps(None, draft.device, draft.dtype)
        self.candidates, self.min_confidence, self.tree = candidates, min_confidence, tree
        self.samples, self.temperature = samples, temperature
        self.feature_layers = draft.config.target_layer_ids
        self.max_depth = draft.config.max_drafts
        """Drafts of a path at most."""
        self.max_drafts = self.max_depth
        if tree is not None:
            self.max_drafts = tree.budget if tree.width is None else min(tree.budget, tree.width * self.max_depth)

    @property
    def static(self) -> bool:
        """Whether it can be part of a static cycle (`graphs/`).

        Not if the host searches the tree (best-first), or ends a run of the head early (`min_confidence` on a CPU).
        """
        if self.tree is not None and self.tree.builder == "best-first":
            return False
        return self.min_confidence == 0 or self.draft.device.type != "cpu"

    def allocate(self, requests: int, capacity: int) -> ContextCache:
        """Memory for `requests` requests of `capacity` tokens."""
        draft, config, scratch_rows = self.draft, self.draft.config, self.draft.backbone.rows_behind
        size = (config.num_key_value_heads, capacity + scratch_rows, config.head_dim)
        keys = torch.zeros(config.num_hidden_layers, requests, *size, dtype=draft.dtype, device=draft.device)
        return ContextCache(keys, scratch_rows)

    def read(self, cache: ContextCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Project features [R, n, F] to context rows."""
        assert features is not None
        features = self.draft.read_features(features).to(self.draft.dtype)
        self.draft.backbone.append_context(features, cache.keys, cache.values, cache.lengths)
        cache.lengths += counts

    def propose(self, state: State, cache: ContextCache, num_drafts: int) -> Proposal:
        """A chain of `num_drafts` tokens for every request, or a tree of as many."""
        if num_drafts == 0:
            return Proposal.empty(len(state.lengths), state.lengths.device)
        hidden = self.slots(state, cache, min(num_drafts, self.max_depth))
        if self.tree is None:
            return self._chain(state, hidden)
        return self._tree(state, hidden, self.tree, num_drafts)

    def slots(self, state: State, cache: ContextCache, num_drafts: int) -> Tensor:
        """Hidden states of the slots that predict the first `num_drafts` drafts of a path, [R, num_drafts, H].

        The backbone runs all slots, as in training. A draft that was trained on shorter blocks too runs only these.
        """
        draft, config = self.draft, self.draft.config
        anchors, first = state.anchors, config.first_draft_slot
        block_size = first + num_drafts if config.short_blocks else config.block_size
        block = draft.block_embeddings(anchors, block_size)
        positions = (state.lengths - 1)[:, None] + torch.arange(block_size, device=anchors.device)
        extent = int(cache.lengths.max()) if cache.fixed_extent is None else cache.fixed_extent
        with scope("backbone"):
            hidden = draft.backbone.over_cache(block, positions, cache.keys, cache.values, cache.lengths, extent)
        return hidden[:, first : first + num_drafts]

    def _chain(self, state: State, hidden: Tensor) -> Proposal:
        draft, num_drafts, uniform = self.draft, hidden.shape[1], None
        if self.samples and not state.sampling.greedy:
            positions = state.lengths[:, None] + torch.arange(num_drafts, device=state.lengths.device)
            uniform = state.sampling.streams.uniform(positions, RandomStreams.DRAFT)
        with scope("lm_head"):
            logits = draft.base_logits(hidden)
        temperature = state.sampling.temperatures if self.temperature is None else self.temperature
        with scope("head"):
            rollout = self.ops.chain(
                HeadInputs(hidden, logits, draft.embed(state.anchors)),
                Draw(self.candidates, temperature, uniform, self.min_confidence),
            )
        if rollout.choices.shape[1] == 0:
            return Proposal.empty(len(state.lengths), state.lengths.device)
        counts = torch.full_like(state.lengths, num_drafts)
        if rollout.confidence is not None:
            counts = (rollout.confidence >= self.min_confidence).sum(1)  # confidence only falls along a path
        return Proposal(
            tokens=draft.to_token_ids(rollout.choices),
            num_drafts=counts,
            candidate_ids=None if rollout.candidates is None else draft.to_token_ids(rollout.candidates),
            draft_probs=rollout.probs,
            confidence=rollout.confidence,
        )

    def _tree(self, state: State, hidden: Tensor, shape: TreeShape, num_drafts: int) -> Proposal:
        draft = self.draft
        with scope("lm_head"):
            logits = draft.base_logits(hidden)
        given = HeadInputs(hidden, logits, draft.embed(state.anchors))
        how = Draw(self.candidates, min_confidence=self.min_confidence)
        with scope("head"):
            if shape.builder == "best-first":
                tree = best_first_tree(self.ops.head, given, how, num_drafts)
            else:
                width = None if shape.width is None else min(shape.width, num_drafts)
                tree = self.ops.tree(given, how, num_drafts, width)
        confidence = None if tree.log_probs is None else tree.log_probs.exp()
        return Proposal(draft.to_token_ids(tree.choices), tree.num_drafts, tree.parents, confidence=confidence)

    def advance(self, cache: ContextCache, verdict: Verdict) -> None:
        """Project the features of what was committed."""
        assert verdict.features is not None
        counts = verdict.num_accepted + 1
        rows = int(counts.max()) if cache.fixed_extent is None else verdict.features.shape[1]
        # The text of a request that has ended does not grow; nor may its context, or it would outgrow the cache.
        cache.lengths.copy_(torch.where(counts > 0, verdict.anchor_positions, cache.lengths))
        self.read(cache, verdict.tokens, verdict.features[:, :rows], counts)
