"""The caches of requests (`RowCache`, `TargetCache`), and the target's attention over them: masks and function.

The target's attention layers write their keys and values by `TargetCache.update`. The decoding loop alone decides how
many rows of each request are kept, by setting `lengths`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from domino_spec.settings import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


class RowCache:
    """What is kept of R requests of unequal length between two passes, in memory allocated once.

    The base of the target's cache and of every drafter's. A subclass has the tensors that it names in `row_fields` and
    `request_fields`, and `lengths`; a drafter that caches nothing has `lengths` alone. Rows past a request's length
    hold what the last pass left there.
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
    """Rows past a request's rows that a draft pass may write."""

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
        for memory, kept in zip(self._memory_of(request), stored, strict=True):
            memory[..., :rows, :] = kept[..., :rows, :]
        self.lengths[request] = rows

    def _memory_of(self, request: int) -> tuple[Tensor, ...]:
        """Views [..., heads, capacity, D] of a request's memory."""
        return tuple(getattr(self, name)[..., request, :, :, :] for name in self.row_fields)


class TargetCache(RowCache, Cache):
    """The target's keys and values, behind the interface that transformers models call.

    A forward pass over N tokens writes rows `lengths[r] .. lengths[r] + N - 1` of request r and reads rows
    `0 .. extent - 1`; an attention mask hides what lies beyond each request's rows. The next pass overwrites rows
    past `lengths`.

    Args:
        shape: layers, R, kv_heads, capacity, D.
        dtype: of keys and values.
        device: of keys and values.
    """

    keys: Tensor
    """[layers, R, kv_heads, capacity, D], rotated."""
    values: Tensor
    rows: Tensor
    """[R, N], where the pass that was begun writes."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(shape[1], dtype=torch.long, device=device)
        self.capacity = shape[3]
        """Rows that there is memory for."""
        self._extent = 0
        self._contiguous: slice | None = None
        """The rows that all requests write, if they are the same ones."""

    def begin_pass(self, num_tokens: int) -> int:
        """Prepare to write `num_tokens` rows per request; returns `extent`, the rows that attention will read.

        With a `fixed_extent` nothing is checked: the caller makes sure that the rows of all active requests fit.

        Raises:
            ValueError: the rows would not fit; the caller sized the cache wrongly or must stop.
        """
        self.rows = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        self._requests = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        self._contiguous = None
        if self.fixed_extent is not None:
            self._extent = self.fixed_extent
            return self._extent
        longest = int(self.lengths.max())
        self._extent = longest + num_tokens
        if self._extent > self.capacity:
            raise ValueError(f"cache of {self.capacity} rows cannot hold {self._extent}")
        if bool((self.lengths == longest).all()):
            self._contiguous = slice(longest, self._extent)
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
                    f"expected {kind} of {keys.shape[1]} heads of {keys.shape[3]}, as its configuration says, found "
                    f"{new.shape[1]} of {new.shape[3]} in layer {layer_idx}: layers that cache other shapes (latent "
                    "attention, say) are not supported"
                )
        if self._contiguous is not None:
            keys[:, :, self._contiguous] = key_states
            values[:, :, self._contiguous] = value_states
        else:
            # Advanced indices around a slice put R and N first: the target of the assignment is [R, N, kv_heads, D].
            keys[self._requests, :, self.rows] = key_states.transpose(1, 2)
            values[self._requests, :, self.rows] = value_states.transpose(1, 2)
        return keys[:, :, : self._extent], values[:, :, : self._extent]

    def keep_path(self, path: Tensor) -> None:
        """Move rows of the last pass to the places of a chain.

        Args:
            path: [R, n], increasing rows of the pass; row `path[r, i]` goes to `lengths[r] + i`.
        """
        places = torch.arange(path.shape[1], device=path.device)
        if self.fixed_extent is None and bool((path == places).all()):
            return
        requests = torch.arange(len(path), device=path.device)[:, None]
        source, destination = self.lengths[:, None] + path, self.lengths[:, None] + places
        for stored in (self.keys, self.values):
            # Advanced indices around a slice put R and n first, on both sides alike; the right side is copied first.
            stored[:, requests, :, destination] = stored[:, requests, :, source]

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        """Rows before this pass, as transformers asks for it; positions and masks are always given explicitly here."""
        return int(self.lengths.max()) if self.fixed_extent is None else self.fixed_extent


# Attention over the cache: the mask of a pass, and the function that transformers modules call. Queries that share a
# key/value head are folded into rows of that head, so keys and values are read once and never repeated in memory.
# Plain decoding and verification use the same function, so a ratio between them is fair.

ATTENTION_NAME = "domino_spec"


def pass_mask(
    lengths: Tensor, num_tokens: int, extent: int, ancestors: Tensor | None = None, window: int | None = None
) -> Tensor:
    """What each token of a pass may attend to.

    Args:
        lengths: [R], cached rows before the pass.
        num_tokens: N, tokens in the pass, written to rows `lengths[r] + i`.
        extent: rows of the cache that attention reads.
        ancestors: [R, N, N], True where token i of the pass descends from token j or is it; None for a chain.
        window: tokens further back than this are hidden (sliding-window layers).

    Returns:
        [R, 1, N, extent] bool, True where seen.
    """
    rows = torch.arange(extent, device=lengths.device)
    offset = torch.arange(num_tokens, device=lengths.device)
    relative = rows - lengths[:, None, None]  # [R, 1, extent]: 0 is the first token of the pass
    if ancestors is None:
        seen = relative <= offset[:, None]
        depth = offset[None, :]
    else:
        in_pass = relative.clamp(0, num_tokens - 1)
        seen = (relative < 0) | ((relative < num_tokens) & ancestors.gather(2, in_pass.expand(-1, num_tokens, -1)))
        depth = ancestors.sum(-1) - 1  # [R, N]
        # A window counts positions, and a tree's rows have the position of their depth, not of their row number.
        relative = torch.where(relative < 0, relative, depth.gather(1, in_pass[:, 0])[:, None])
    if window is not None:
        seen = seen & (relative > depth[..., None] - window)
    return seen[:, None]


_HARMLESS = frozenset(
    (
        "cache_position",
        "is_causal",
        "logits_to_keep",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
"""Arguments that reach attention because transformers passes them to every module; they do not change its result.
`is_causal` is among them because every mask says what is seen; without a mask, `folded_attention` reads it."""

_watchers: list[list[dict[str, Any]]] = []


@contextmanager
def watch_attention() -> Iterator[list[dict[str, Any]]]:
    """Collect, from every call of `folded_attention`, the arguments that change its result: scaling, softcap, s_aux."""
    calls: list[dict[str, Any]] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers.pop()


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over grouped heads.

    Args:
        module: the attention module that calls; errors name its class.
        query: [R, heads, N, D].
        key: [R, kv_heads, T, D].
        value: [R, kv_heads, T, D'].
        attention_mask: [R or 1, 1, N, T], bool (True where seen) or what is added to scores; None is causal.
        scaling: of the products of queries and keys; None is 1 / sqrt(D).
        dropout: must be 0.
        softcap: scores are `softcap * tanh(scores / softcap)`.
        s_aux: [heads], attention sinks: a score for each head that takes a share of the softmax and gives no value.
        sliding_window: tokens seen, itself included, if there is no mask; a mask holds it already.
        others: may be what does not change the result.

    Returns:
        [R, N, heads, D'], and None for the attention weights.

    Raises:
        UserError: an argument that this function does not know, which would change the result.
    """
    family = type(module).__name__
    if dropout:
        raise UserError(f"{family} drops {dropout} of its attention at random: only dropout 0 gives one text")
    for name, given in others.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise UserError(f"{family} gives its attention an argument that is not supported: {name}")
    for calls in _watchers:
        calls.append({"scaling": scaling, "softcap": softcap, "s_aux": s_aux})
    requests, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if attention_mask is None and others.get("is_causal", True) is not False:
        # transformers leaves out a purely causal mask; folded rows need one.
        attention_mask = _causal_mask(tokens, key.shape[2], sliding_window, key.device)
    if attention_mask is not None and groups > 1 and tokens > 1:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    query = query.reshape(requests, kv_heads, groups * tokens, head_dim)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        sinks = None if s_aux is None else s_aux.reshape(kv_heads, groups).repeat_interleave(tokens, dim=1)
        out = _spelled_out(query, key, value, attention_mask, scaling or head_dim**-0.5, softcap, sinks)
    return out.reshape(requests, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


def _causal_mask(tokens: int, extent: int, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, N, T], the last N of T tokens attend to themselves and what is before; None if that hides nothing."""
    if tokens == 1 and (window is None or window >= extent):
        return None
    seen = torch.ones(tokens, extent, dtype=torch.bool, device=device).tril(extent - tokens)
    return (seen if window is None else seen.triu(extent - tokens - window + 1))[None, None]


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what PyTorch's function lacks: a cap on scores, and sinks [kv_heads, rows of `query`]."""
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[None, :, :, None].expand(len(scores), -1, -1, 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return weights[..., : key.shape[2]] @ value


AttentionInterface.register(ATTENTION_NAME, folded_attention)
# Without a mask function of the same name, transformers' own `generate` would pass no mask at all to our attention.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
