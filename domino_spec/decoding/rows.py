"""The cache of R requests: the base of what every drafter keeps between two cycles."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class RowCache:
    """What is kept of R requests of unequal length between two passes, in memory allocated once.

    A subclass has the tensors that it names in `row_fields` and `request_fields`, and `lengths`. Rows past a request's
    length hold whatever the last pass left there.
    """

    row_fields: ClassVar[tuple[str, ...]] = ("keys", "values")
    """Names of tensors [..., R, heads, capacity, D], which hold a row for each token."""
    request_fields: ClassVar[tuple[str, ...]] = ()
    """Names of tensors [R, ...] beside `lengths`."""
    lengths: Tensor
    """[R], valid rows of each request. Dropping rejected drafts is a change of `lengths`."""
    fixed_extent: int | None = None
    """Rows that a pass reads, whatever the lengths are (for CUDA graphs). None reads as many as the longest request
    needs, which makes the host wait for the device."""
    scratch_rows: int = 0
    """Rows past a request's own that a draft pass may write."""

    def view(self, start: int, stop: int, extent: int | None = None) -> Self:
        """The requests `start .. stop - 1` as a cache that shares this memory, with this `fixed_extent`."""
        part = copy.copy(self)
        for name in self.row_fields:
            setattr(part, name, getattr(self, name)[..., start:stop, :, :, :])
        for name in ("lengths", *self.request_fields):
            setattr(part, name, getattr(self, name)[start:stop])
        part.fixed_extent = extent
        return part

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of request `destination`, which is lost."""
        self.put_rows(destination, int(self.lengths[source]), self._memory_of(source))
        for name in self.request_fields:
            stored = getattr(self, name)
            stored[destination] = stored[source]

    def clear(self, request: int) -> None:
        """Forget a request."""
        for name in ("lengths", *self.request_fields):
            getattr(self, name)[request] = 0

    def wipe(self, request: int, rows: int, first: int = 0) -> None:
        """Zero a request's rows `first .. rows - 1`, its scratch rows and its `request_fields`.

        A masked row has weight 0, but 0 * NaN is NaN: values that are not finite must not stay for the next request.
        """
        for stored in self._memory_of(request):
            stored[..., first : rows + self.scratch_rows, :] = 0
        for name in self.request_fields:
            getattr(self, name)[request] = 0

    def rows_of(self, request: int, rows: int) -> tuple[Tensor, ...]:
        """Copies of a request's first rows: for each of `row_fields` [..., heads, rows, D]."""
        return tuple(stored[..., :rows, :].clone() for stored in self._memory_of(request))

    def put_rows(self, request: int, rows: int, stored: tuple[Tensor, ...]) -> None:
        """Make the first `rows` rows of `stored`, which is `rows_of` of a longer text, those of a request."""
        for mine, kept in zip(self._memory_of(request), stored, strict=True):
            mine[..., :rows, :] = kept[..., :rows, :]
        self.lengths[request] = rows

    def _memory_of(self, request: int) -> tuple[Tensor, ...]:
        """Views [..., heads, capacity, D] of a request's memory."""
        return tuple(getattr(self, name)[..., request, :, :, :] for name in self.row_fields)
