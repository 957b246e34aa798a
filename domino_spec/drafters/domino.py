"""`domino` and `dflash`: blocks drafted in parallel by the backbone, then corrected token by token by the head.

One cycle is one backbone pass over the anchor and the masks, one LM-head product, and one rollout of the head
(paper section 4). `dflash` is the same without the head: a DFlash checkpoint, or a Domino draft with its head off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.decoding.sampling import RandomStreams
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.draft.model import Draft
from domino_spec.kernels.rollout import head_rollout
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
        rollout = head_rollout(
            self.head,
            hidden,
            draft.base_logits(hidden),
            draft.embed(anchors),
            draft.choice_embedding,
            self.candidates,
            state.sampling.temperatures if self.temperature is None else self.temperature,
            uniform,
            self.min_confidence,
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
