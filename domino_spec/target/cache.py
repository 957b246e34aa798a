"""Keys and values of the target for R requests of unequal length, in memory allocated once.

Stands between the target's attention layers, which call `update`, and the decoding loop, which alone decides how
many rows of each request are kept: `lengths` says so, and cropping rejected drafts is a change of `lengths`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class RequestRows:
    """What is done with single requests of a cache whose rows stand as [layers, R, kv_heads, capacity, D]."""

    keys: Tensor
    values: Tensor
    lengths: Tensor
    """[R], valid rows of each request."""

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, whose rows are lost."""
        rows = int(self.lengths[source])
        for stored in (self.keys, self.values):
            stored[:, destination, :, :rows] = stored[:, source, :, :rows]
        self.lengths[destination] = self.lengths[source]

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Copies of a request's first rows, [..., rows, D] each."""
        return tuple(stored[:, request, :, :rows].clone() for stored in (self.keys, self.values))

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Make the first `rows` rows of `rows_of` a request's own."""
        for own, kept in zip((self.keys, self.values), stored, strict=True):
            own[:, request, :, :rows] = kept[..., :rows, :]
        self.lengths[request] = rows

    def wipe(self, request: int, rows: int, first: int = 0) -> None:
        """Zero a request's rows from `first` on, below `rows`.

        A hidden row is multiplied by zero, which does not silence what is not finite: whoever ends with such values
        must not leave them to the next.
        """
        self.keys[:, request, :, first:rows] = 0
        self.values[:, request, :, first:rows] = 0


class TargetCache(RequestRows, Cache):
    """A preallocated cache with one length per request, behind the interface that transformers models call.

    A forward pass over N tokens writes rows `lengths[r] .. lengths[r] + N - 1` of request r and reads rows
    `0 .. extent - 1`; an attention mask hides what lies beyond each request's own rows. Rows past `lengths` hold
    whatever the last pass left there and are overwritten by the next.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        requests: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        shape = (num_layers, requests, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(requests, dtype=torch.long, device=device)
        """Valid rows of each request, [R]."""
        self.fixed_extent: int | None = None
        """Rows that attention reads, whatever the lengths are; None reads as many as the longest request needs, which
        takes a look at the device."""
        self._requests = torch.arange(requests, device=device)[:, None]
        self._rows = torch.empty(0)
        self._extent = 0
        self._contiguous: slice | None = None

    def begin_pass(self, num_tokens: int) -> int:
        """Prepare to write `num_tokens` rows per request; returns `extent`, the rows that attention will read.

        With a `fixed_extent` nothing is checked: the caller answers for the rows of whoever still decodes being inside.

        Raises:
            ValueError: the rows would not fit; the caller sized the cache wrongly or must stop.
        """
        if self.fixed_extent is not None:
            self._extent, self._contiguous = self.fixed_extent, None
            self._rows = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)  # [R, N]
            return self._extent
        longest = int(self.lengths.max())
        self._extent = longest + num_tokens
        if self._extent > self.capacity:
            raise ValueError(f"cache of {self.capacity} rows cannot hold {self._extent}")
        self._rows = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)  # [R, N]
        equal = bool((self.lengths == longest).all())
        self._contiguous = slice(longest, self._extent) if equal else None
        return self._extent

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write new rows [R, kv_heads, N, D] of one layer; returns all rows up to `extent` [R, kv_heads, extent, D].

        Raises:
            ValueError: the layer has other heads than the cache was made for.
        """
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        for kind, new in (("keys", key_states), ("values", value_states)):
            if new.shape[1::2] != keys.shape[1::2]:
                raise ValueError(
                    f"layer {layer_idx} has {kind} of {new.shape[1]} heads of {new.shape[3]}, the cache holds "
                    f"{keys.shape[1]} of {keys.shape[3]}"
                )
        if self._contiguous is not None:
            keys[:, :, self._contiguous] = key_states
            values[:, :, self._contiguous] = value_states
        else:
            # Advanced indices around a slice put R and N first: the target of the assignment is [R, N, kv_heads, D].
            keys[self._requests, :, self._rows] = key_states.transpose(1, 2)
            values[self._requests, :, self._rows] = value_states.transpose(1, 2)
        return keys[:, :, : self._extent], values[:, :, : self._extent]

    @property
    def rows(self) -> Tensor:
        """[R, N], where the pass that was begun writes."""
        return self._rows

    def keep_path(self, path: Tensor) -> None:
        """Move rows of the last pass to the places of a chain.

        Args:
            path: [R, n], increasing rows of the pass; row `path[r, i]` goes to `lengths[r] + i`.
        """
        places = torch.arange(path.shape[1], device=path.device)
        if self.fixed_extent is None and bool((path == places).all()):
            return
        source, destination = self.lengths[:, None] + path, self.lengths[:, None] + places
        for stored in (self.keys, self.values):
            # Advanced indices around a slice put R and n first, on both sides alike; the right side is copied first.
            stored[:, self._requests, :, destination] = stored[:, self._requests, :, source]

    def view(self, start: int, stop: int, extent: int | None = None) -> TargetCache:
        """The requests `start .. stop - 1` as a cache of their own, in the same memory, with this `fixed_extent`."""
        seen = object.__new__(type(self))
        seen.__dict__.update(self.__dict__)
        seen.keys, seen.values = self.keys[:, start:stop], self.values[:, start:stop]
        seen.lengths = self.lengths[start:stop]
        seen._requests = self._requests[: stop - start]
        seen.fixed_extent = extent
        return seen

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        """Rows before this pass, as transformers asks for it; positions and masks are always given explicitly here."""
        return int(self.lengths.max()) if self.fixed_extent is None else self.fixed_extent
