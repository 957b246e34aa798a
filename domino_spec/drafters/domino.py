"""`domino` and `dflash`: blocks drafted in parallel by the backbone, then corrected token by token by the head.

One cycle is one backbone pass over the anchor and the masks, one LM-head product, and one rollout of the head
(paper section 4). `dflash` is the same without the head: a DFlash checkpoint, or a Domino draft with its head off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.config import UserError
from domino_spec.decoding.sampling import RandomStreams, draw
from domino_spec.decoding.state import Proposal, State, Verdict
from domino_spec.draft.backbone import ContextKV
from domino_spec.draft.model import Draft
from domino_spec.kernels.reference import head_rollout


@dataclass
class ContextCache:
    """Keys and values of the context of every request, in memory allocated once."""

    keys: Tensor
    """[layers, R, kv_heads, capacity, D]."""
    values: Tensor
    lengths: Tensor
    """[R], valid rows: committed tokens without the anchor."""

    def append(self, new: ContextKV, counts: Tensor) -> None:
        """Write new rows [layers, R, kv_heads, n, D] after the valid ones; the first `counts` [R] of them are kept."""
        rows = self.lengths[:, None] + torch.arange(new.keys.shape[3], device=counts.device)  # [R, n]
        requests = torch.arange(len(counts), device=counts.device)[:, None]
        # Advanced indices around a slice put R and n first: [R, n, layers, kv_heads, D].
        self.keys[:, requests, :, rows] = new.keys.permute(1, 3, 0, 2, 4)
        self.values[:, requests, :, rows] = new.values.permute(1, 3, 0, 2, 4)
        self.lengths = self.lengths + counts


class BlockDrafter:
    """Drafts with a DFlash backbone, with or without a Domino head.

    Args:
        draft: bound to its target.
        use_head: False drafts from the base logits alone.
        candidates: K, how many of the best base logits the head corrects; None corrects all.
        temperature: 0 chooses the most probable token (a *chosen* draft); above 0 tokens are sampled, and reported
            with their probabilities.
        streams: random numbers for sampled drafts.
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
        temperature: float = 0.0,
        streams: RandomStreams | None = None,
        min_confidence: float = 0.0,
    ) -> None:
        if use_head and draft.head is None:
            raise UserError(
                "method domino needs a draft with a Domino head; this one is a plain DFlash draft (use dflash)"
            )
        assert temperature == 0 or streams is not None
        self.draft = draft
        self.head = draft.head if use_head else None
        self.candidates = candidates
        self.temperature = temperature
        self.streams = streams
        self.min_confidence = min_confidence
        self.feature_layers = draft.config.target_layer_ids
        self.max_drafts = draft.config.max_drafts

    def start(self, state: State) -> ContextCache:
        """Context keys and values of the prompts, without their last token."""
        assert state.features is not None
        config = self.draft.config
        requests, capacity = state.tokens.shape
        backbone = self.draft.backbone
        shape = (config.num_hidden_layers, requests, config.num_key_value_heads, capacity, config.head_dim)
        keys = torch.zeros(shape, dtype=self.draft.dtype, device=self.draft.device)
        empty = torch.zeros(requests, dtype=torch.long, device=keys.device)
        own = ContextCache(keys, torch.zeros_like(keys), empty)
        rows = state.features.shape[1]
        if rows:
            positions = torch.arange(rows, device=keys.device).expand(requests, -1)
            own.append(backbone.project_context(state.features.to(self.draft.dtype), positions), state.lengths - 1)
        return own

    def slots(self, state: State, own: ContextCache) -> Tensor:
        """Hidden states of the slots that predict drafts, [R, config.max_drafts, H].

        The backbone always runs `block_size` slots, as trained.
        """
        draft, config = self.draft, self.draft.config
        anchors = state.anchors
        requests = len(anchors)
        slots = torch.arange(config.block_size, device=anchors.device)
        extent = int(own.lengths.max())
        seen = torch.arange(extent, device=anchors.device) < own.lengths[:, None]
        mask = torch.cat((seen, seen.new_ones(requests, config.block_size)), dim=1)  # [R, T + B]
        hidden = draft.backbone(
            draft.block_embeddings(anchors),
            (state.lengths - 1)[:, None] + slots,
            ContextKV(own.keys[:, :, :, :extent], own.values[:, :, :, :extent]),
            mask[:, None, None].expand(-1, -1, config.block_size, -1),
        )
        return hidden[:, config.first_draft_slot :]

    def propose(self, state: State, own: ContextCache, num_drafts: int) -> Proposal:
        """A chain for every request."""
        if num_drafts == 0:
            return Proposal.empty(len(state.lengths), state.lengths.device)
        draft, anchors = self.draft, state.anchors
        hidden = self.slots(state, own)[:, :num_drafts]  # [R, N, H]
        rollout = head_rollout(
            self.head,
            hidden,
            draft.base_logits(hidden),
            draft.embed(anchors),
            draft.embed_choices,
            self.candidates,
            self.temperature,
            lambda probs, i: self._draw(probs, state.lengths + i),
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
        )

    def _draw(self, probs: Tensor, positions: Tensor) -> Tensor:
        assert self.streams is not None
        return draw(probs, self.streams.uniform(positions[:, None], RandomStreams.DRAFT)[:, 0])

    def advance(self, own: ContextCache, verdict: Verdict) -> ContextCache:
        """Project the features of what was committed."""
        assert verdict.features is not None
        counts = verdict.num_accepted + 1
        features = verdict.features[:, : int(counts.max())].to(self.draft.dtype)
        positions = verdict.anchor_positions[:, None] + torch.arange(features.shape[1], device=features.device)
        # The text of a request that has ended stays where it is; so must its context, or it would outgrow the cache.
        own.lengths = verdict.anchor_positions
        own.append(self.draft.backbone.project_context(features, positions), counts)
        return own
