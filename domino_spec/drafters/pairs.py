"""Keys and values of committed pairs: the cache that EAGLE-3 and DART draft from.

Pair t joins the target's feature of position t with the token at t + 1, so a text of L tokens has L - 1 pairs, the last
of them with the anchor. Only the last pair's output says anything new; of the others, keys and values are all that is
ever read.

Shapes: R requests, n new pairs, H hidden, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.decoding.cycle import Verdict
from domino_spec.draft.single_layer import PairKV, SingleLayerDraft


@dataclass
class PairCache:
    """The pairs of every request, in memory allocated once; rows behind them are for drafting and mean nothing."""

    keys: Tensor
    """[R, kv_heads, capacity, D], rotated."""
    values: Tensor
    lengths: Tensor
    """[R], committed pairs: tokens without one. A prompt of one token has none."""
    last: Tensor
    """[R, 1, 2H], each request's last pair, as attention reads it."""
    last_feature: Tensor
    """[R, 1, H], its feature before the norm."""

    @staticmethod
    def allocate(draft: SingleLayerDraft, requests: int, capacity: int) -> PairCache:
        """Memory for so many requests of `capacity` rows, all empty."""
        config = draft.config
        shape = (requests, config.num_key_value_heads, capacity, config.head_dim)
        keys = torch.zeros(shape, dtype=draft.dtype, device=draft.device)
        nothing = torch.zeros(requests, dtype=torch.long, device=keys.device)
        last = keys.new_zeros(requests, 1, 2 * config.hidden_size)
        return PairCache(keys, torch.zeros_like(keys), nothing, last, keys.new_zeros(requests, 1, config.hidden_size))

    def view(self, start: int, stop: int) -> PairCache:
        """The requests `start .. stop - 1` as a cache of their own, in the same memory."""
        everything = (self.keys, self.values, self.lengths, self.last, self.last_feature)
        return PairCache(*(tensor[start:stop] for tensor in everything))

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, whose pairs are lost."""
        rows = int(self.lengths[source])
        for stored in (self.keys, self.values):
            stored[destination, :, :rows] = stored[source, :, :rows]
        for tensor in (self.lengths, self.last, self.last_feature):
            tensor[destination] = tensor[source]

    def clear(self, request: int) -> None:
        """Forget a request."""
        self.lengths[request] = 0

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Copies of a request's first rows, [..., rows, D] each."""
        return tuple(stored[request, :, :rows].clone() for stored in (self.keys, self.values))

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Make the first `rows` rows of `rows_of` a request's own; its last pair is known once more are read."""
        for own, kept in zip((self.keys, self.values), stored, strict=True):
            own[request, :, :rows] = kept[..., :rows, :]
        self.lengths[request] = rows

    def wipe(self, request: int, rows: int) -> None:
        """Zero a request's memory, of which drafting may have used a little more than `rows`."""
        for stored in (self.keys, self.values, self.last, self.last_feature):
            stored[request] = 0

    def append(self, draft: SingleLayerDraft, features: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Add pairs behind the committed ones; the first `counts` [R] of each request are meant.

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
    """Rows of a cache from each request's `first` [R] on, to be written and looked at."""

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

    def mask(self, own: Tensor) -> Tensor:
        """What pairs may look at: every row before `first`, and of the m rows from there on what `own` says.

        Args:
            own: [R, n, m] bool.

        Returns:
            [R, 1, n, extent], for the extent that `write` returned last.
        """
        if self._equal:
            return F.pad(own, (self._longest, 0), value=True)[:, None]
        count = own.shape[2]
        place = torch.arange(self._longest + count, device=own.device) - self.first[:, None, None]  # [R, 1, extent]
        inside = own.gather(2, place.clamp(0, count - 1).expand(-1, own.shape[1], -1))
        return ((place < 0) | ((place < count) & inside))[:, None]


def advance_pairs(draft: SingleLayerDraft, own: PairCache, verdict: Verdict) -> None:
    """Add the pairs of what was committed: features of the anchor and the accepted drafts, each with its next token."""
    assert verdict.features is not None
    counts = verdict.num_accepted + 1
    fresh = int(counts.max())
    # The text of a request that has ended stays where it is; so must its pairs, or they would outgrow the cache.
    own.lengths.copy_(verdict.anchor_positions)
    own.append(draft, verdict.features[:, :fresh], verdict.tokens[:, :fresh], counts)
