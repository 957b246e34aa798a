"""Keys and values of committed pairs: the cache that EAGLE-3 and DART draft from.

Pair t joins the target's feature of position t with the token at t + 1, so a text of L tokens has L - 1 pairs, the last
of them with the anchor. Only the last pair's output says anything new; of the others, keys and values are all that is
ever read.

Shapes: R requests, n new pairs, H hidden, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import Verdict
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.target.cache import RowCache


class PairCache(RowCache):
    """The pairs of every request; rows after them are scratch for drafting.

    Args:
        draft: whose pairs they are.
        requests: R.
        capacity: rows of each request.
        scratch_rows: rows after them that drafting may write.
    """

    request_fields: ClassVar[tuple[str, ...]] = ("last", "last_feature")

    def __init__(self, draft: SingleLayerDraft, requests: int, capacity: int, scratch_rows: int) -> None:
        config = draft.config
        shape = (requests, config.num_key_value_heads, capacity + scratch_rows, config.head_dim)
        self.scratch_rows = scratch_rows
        self.keys = torch.zeros(shape, dtype=draft.dtype, device=draft.device)
        """[R, kv_heads, capacity, D], rotated."""
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(requests, dtype=torch.long, device=self.keys.device)
        """[R], committed pairs: tokens without one. A prompt of one token has none."""
        self.last = self.keys.new_zeros(requests, 1, 2 * config.hidden_size)
        """[R, 1, 2H], each request's last pair, as attention reads it."""
        self.last_feature = self.keys.new_zeros(requests, 1, config.hidden_size)
        """[R, 1, H], its feature before the norm."""

    def append(self, draft: SingleLayerDraft, features: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Add pairs after the committed ones; the first `counts` [R] of each request are valid.

        Args:
            draft: whose pairs they are.
            features: [R, n, 3 * target H], of the target, at the positions before `tokens`.
            tokens: [R, n].
            counts: [R].
        """
        fused = draft.fuse(features.to(draft.dtype))
        pairs = draft.pair(tokens, fused)
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        Rows(self, self.lengths).write(draft.keys_values(pairs, self.lengths[:, None] + offsets), 0)
        at = (counts - 1).clamp(min=0)[:, None, None]
        fresh = (counts > 0)[:, None, None]
        for kept, new in ((self.last, pairs), (self.last_feature, fused)):
            kept.copy_(torch.where(fresh, new.gather(1, at.expand(-1, 1, new.shape[-1])), kept))
        self.lengths += counts


class Rows:
    """Rows of a cache from each request's `first` [R] on, to be written and attended to."""

    def __init__(self, cache: PairCache, first: Tensor) -> None:
        self._cache, self.first = cache, first
        self._longest = int(first.max())
        self._equal = bool((first == self._longest).all())

    def write(self, new: PairKV, offset: int) -> PairKV:
        """Store keys and values [R, kv_heads, n, D] at `first + offset` and on; returns all rows so far."""
        cache, count = self._cache, new.keys.shape[2]
        extent = self._longest + offset + count
        if self._equal:
            cache.keys[:, :, extent - count : extent] = new.keys
            cache.values[:, :, extent - count : extent] = new.values
        else:
            rows = self.first[:, None] + torch.arange(offset, offset + count, device=self.first.device)
            requests = torch.arange(len(rows), device=rows.device)[:, None]
            # Advanced indices around a slice put R and n first: [R, n, kv_heads, D].
            cache.keys[requests, :, rows] = new.keys.transpose(1, 2).to(cache.keys.dtype)
            cache.values[requests, :, rows] = new.values.transpose(1, 2).to(cache.values.dtype)
        return PairKV(cache.keys[:, :, :extent], cache.values[:, :, :extent])

    def writer(self, offset: int) -> Callable[[PairKV], PairKV]:
        """`write` at `offset`, for `SingleLayerDraft.extend`."""
        return lambda new: self.write(new, offset)

    def mask(self, among: Tensor) -> Tensor:
        """What pairs may attend to: every row before `first`, and of the m rows from there on what `among` says.

        Args:
            among: [R, n, m] bool.

        Returns:
            [R, 1, n, extent], for the extent that `write` returned last.
        """
        if self._equal:
            return F.pad(among, (self._longest, 0), value=True)[:, None]
        count = among.shape[2]
        place = torch.arange(self._longest + count, device=among.device) - self.first[:, None, None]  # [R, 1, extent]
        inside = among.gather(2, place.clamp(0, count - 1).expand(-1, among.shape[1], -1))
        return ((place < 0) | ((place < count) & inside))[:, None]


def advance_pairs(draft: SingleLayerDraft, cache: PairCache, verdict: Verdict) -> None:
    """Add the pairs of what was committed: features of the anchor and the accepted drafts, each with its next token."""
    assert verdict.features is not None
    counts = verdict.num_accepted + 1
    fresh = int(counts.max())
    # The text of a request that has ended does not grow; nor may its pairs, or they would outgrow the cache.
    cache.lengths.copy_(verdict.anchor_positions)
    cache.append(draft, verdict.features[:, :fresh], verdict.tokens[:, :fresh], counts)
