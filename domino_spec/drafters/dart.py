"""`dart`: all slots' logits from one causal pass over masked positions, and a tree through them that counts of text
prune (DART, arXiv 2601.19278).

The last committed pair and the masks after it say independently of each other what comes at each of the next
positions. The search goes slot by slot, keeps the best few prefixes, and scores a prefix by the slots' probabilities
and by those of an N-gram model, which alone knows which tokens follow each other. The best of all scored prefixes
become the tree.

The tokens are chosen, at any temperature, and the target walks the tree along its own choices. That accepts a node's
children with the same probability as the published rule, which tries siblings one after the other.

Shapes: R requests, S slots, K best tokens of each, W prefixes that are extended, C tokens of context, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State, Verdict, scope
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.drafters.pairs import PairCache, Rows, advance_pairs
from domino_spec.settings import UserError

TOTAL, TOP, BEAM = 60, 25, 20
"""Drafts of a tree, tokens of a slot and prefixes that are extended: the published defaults."""
LEVEL_POWER, SLOT_DECAY, NGRAM_WEIGHT = -0.7, 0.9, 0.5
FLOOR = 1e-10
"""Added to every probability before its logarithm; all as published."""


class DartCache(PairCache):
    """The pairs of every request, and where its last cycle began."""

    request_fields: ClassVar[tuple[str, ...]] = (*PairCache.request_fields, "round_start")

    def __init__(self, draft: SingleLayerDraft, requests: int, capacity: int, scratch_rows: int) -> None:
        super().__init__(draft, requests, capacity, scratch_rows)
        self.round_start = torch.zeros_like(self.lengths)
        """[R], position of the last cycle's anchor; 0 at first."""


class DartTree(NamedTuple):
    """A tree for every request, level by level, parents before children."""

    tokens: np.ndarray
    """[R, N] absolute ids."""
    parents: np.ndarray
    """[R, N], -1 for children of the anchor."""
    scores: np.ndarray
    """[R, N]."""


class DartDrafter:
    """Grows DART's N-gram-guided trees.

    Args:
        draft: bound to its target.
        ngrams: counts of the training answers; None scores prefixes by the slots alone.
        total: drafts of a tree: a nominal 60 verifies 61 rows.
        top: best tokens of each slot.
        beam: prefixes of a level that are extended. 1 and `top` 1 make a chain.
        stop_token_ids: tokens that end an answer; prefixes that end in one are extended last.
        round_context: show the N-gram model no text before the last cycle's anchor, as the released code does after
            its first cycle. With the published order of 3 that changes nothing: the anchor and one drafted token are
            all the context there is.

    Raises:
        UserError: the draft is another method's.
        ValueError: sizes out of range.
    """

    samples = False

    def __init__(
        self,
        draft: SingleLayerDraft,
        ngrams: NgramModel | None,
        *,
        total: int = TOTAL,
        top: int = TOP,
        beam: int = BEAM,
        stop_token_ids: Iterable[int] = (),
        round_context: bool = False,
    ) -> None:
        if draft.kind != "dart":
            raise UserError(f"method dart needs a DART draft; this one is made for {draft.kind}")
        if min(total, top, beam) < 1:
            raise ValueError(f"a tree needs a total, a top and a beam of at least 1, got {total}, {top} and {beam}")
        self.draft, self.ngrams, self.beam, self.round_context = draft, ngrams, beam, round_context
        self.top = min(top, draft.config.logits_size)
        self.stop_token_ids = np.array(sorted(stop_token_ids), dtype=np.int64)
        self.feature_layers = draft.feature_layers
        scored = level = self.top
        for _ in range(draft.config.num_masks):
            level = min(beam, level) * self.top
            scored += level
        self.max_drafts = min(total, scored)

    def allocate(self, requests: int, capacity: int) -> DartCache:
        """Memory for pairs, and after them for the masks."""
        return DartCache(self.draft, requests, capacity, self.draft.config.num_masks)

    def read(self, cache: DartCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Add the pairs of known text."""
        assert features is not None
        cache.append(self.draft, features, tokens, counts)

    def slots(self, cache: PairCache, num_masks: int) -> Tensor:
        """Logits of the last committed pair and of `num_masks` masks after it, [R, num_masks + 1, V].

        The masks' keys and values are written after the committed ones; the next pairs overwrite them.
        """
        draft, requests = self.draft, len(cache.lengths)
        masks, residual = draft.mask_pairs(requests, num_masks)
        rows = Rows(cache, (cache.lengths - 1).clamp(min=0))
        offsets = torch.arange(num_masks + 1, device=cache.lengths.device)
        causal = torch.ones(len(offsets), len(offsets), dtype=torch.bool, device=cache.lengths.device).tril()
        with scope("backbone"):
            out = draft.extend(
                torch.cat((cache.last, masks.to(cache.last.dtype)), dim=1),
                torch.cat((cache.last_feature, residual.to(cache.last_feature.dtype)), dim=1),
                rows.first[:, None] + offsets,
                rows.writer(0),
                rows.mask(causal.expand(requests, -1, -1)),
            )
        with scope("lm_head"):
            return draft.logits(out)

    def propose(self, state: State, cache: DartCache, num_drafts: int) -> Proposal:
        """A tree for every request; requests whose text has one token, and so no feature yet, get none."""
        ready, device = cache.lengths > 0, state.tokens.device
        if num_drafts == 0 or not ready.any():
            return Proposal.empty(len(ready), device)
        # No path is longer than the tree has nodes, and a mask does not see those after it.
        logits = self.slots(cache, min(self.draft.config.num_masks, num_drafts - 1))
        with scope("head"):
            best = logits.topk(self.top)
            tree = search_tree(
                self.draft.to_token_ids(best.indices).cpu().numpy(),
                best.values.float().softmax(-1).cpu().double().numpy(),
                self.ngrams,
                self._context(state, cache).cpu().numpy(),
                num_drafts,
                self.beam,
                self.stop_token_ids,
            )
        tokens, parents = torch.from_numpy(tree.tokens).to(device), torch.from_numpy(tree.parents).to(device)
        return Proposal(tokens, tokens.shape[1] * ready, parents)

    def _context(self, state: State, cache: DartCache) -> Tensor:
        """The tokens before the first slot that the N-gram model may see, -1 if there are none: [R, C]."""
        count = 0 if self.ngrams is None else self.ngrams.order - 1
        index = state.lengths[:, None] + torch.arange(-count, 0, device=state.tokens.device)
        known = index >= (cache.round_start[:, None] if self.round_context else 0)
        return torch.where(known, state.tokens.gather(1, index.clamp(min=0)), -1)

    def advance(self, cache: DartCache, verdict: Verdict) -> None:
        """Pairs of what was committed; the masks are dropped."""
        advance_pairs(self.draft, cache, verdict)
        cache.round_start.copy_(verdict.anchor_positions)


def search_tree(
    tokens: np.ndarray,
    probs: np.ndarray,
    ngrams: NgramModel | None,
    context: np.ndarray,
    budget: int,
    beam: int = BEAM,
    stop_token_ids: np.ndarray | tuple[int, ...] = (),
) -> DartTree:
    """DART's search, on the host.

    A prefix that is extended by a token of slot l (from 0), with probabilities p of the slot and g of the N-gram
    model, scores (l + 1)^-0.7 * (0.9^l * ln(p + 1e-10) + 0.5 * ln(g + 1e-10)) more than before; slot 0 has no g. The
    `beam` best of a level are extended, those that end in a stop token last.

    Args:
        tokens: [R, S, K] absolute ids, the best of each slot.
        probs: [R, S, K], their probabilities among the K.
        ngrams: None leaves its term out.
        context: [R, C] committed tokens in reading order, -1 if there are none; C = order - 1, or 0 without it.
        budget: drafts of the tree at most.
        beam: W, prefixes of a level that are extended.
        stop_token_ids: tokens that end an answer.

    Returns:
        The `budget` best of all prefixes scored. If two are equal, the one scored first is better, so that a prefix
        is never kept without those it extends.
    """
    requests, slots, top = tokens.shape
    log_probs = np.log(probs + FLOOR)
    # With the floor a token of probability 1 adds a little more than 0; a child must not rank above its parent.
    scores, level_tokens = np.minimum(log_probs[:, 0], 0.0), tokens[:, 0]  # [R, W * K] of one level
    pool = [(level_tokens, scores, np.full_like(level_tokens, -1))]
    contexts, size = context[:, None], 0  # [R, W, C] of the prefixes extended last, and prefixes of earlier levels
    for slot in range(1, slots):
        ended = np.isin(level_tokens, stop_token_ids)
        best = np.lexsort((-scores, ended), axis=-1)[:, :beam]  # [R, W]
        chosen, above = (np.take_along_axis(part, best, 1) for part in (level_tokens, scores))
        term = SLOT_DECAY**slot * log_probs[:, slot, None]  # [R, 1, K]
        following = np.broadcast_to(tokens[:, slot, None], (*best.shape, top))
        if ngrams is not None:
            contexts = np.take_along_axis(contexts, (best // top)[..., None], 1)
            contexts = np.concatenate((contexts[..., 1:], chosen[..., None]), axis=-1)
            term = term + NGRAM_WEIGHT * np.log(ngrams.probabilities(contexts, following) + FLOOR)
        scored = above[..., None] + (slot + 1) ** LEVEL_POWER * np.broadcast_to(np.minimum(term, 0.0), following.shape)
        parents = np.broadcast_to((best + size)[..., None], following.shape)
        size += level_tokens.shape[1]
        level_tokens, scores = following.reshape(requests, -1), scored.reshape(requests, -1)
        pool.append((level_tokens, scores, parents.reshape(requests, -1)))
    everything = [np.concatenate(parts, axis=1) for parts in zip(*pool, strict=True)]
    return _keep(everything[0], everything[1], everything[2], budget)


def _keep(tokens: np.ndarray, scores: np.ndarray, parents: np.ndarray, budget: int) -> DartTree:
    """The `budget` best nodes in their order, with parents renumbered; each [R, M], parents before children."""
    kept = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :budget], axis=1)  # [R, N]
    number = np.full((len(kept), scores.shape[1] + 1), -1)  # the last is of the anchor, whose place is -1
    np.put_along_axis(number, kept, np.arange(kept.shape[1])[None], axis=1)
    above = np.take_along_axis(parents, kept, 1)
    renumbered = np.take_along_axis(number, np.where(above < 0, scores.shape[1], above), 1)
    return DartTree(np.take_along_axis(tokens, kept, 1), renumbered, np.take_along_axis(scores, kept, 1))
