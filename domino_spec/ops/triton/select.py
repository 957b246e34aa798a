"""The K best of every row of logits, exactly and in order: the first part of the head rollout on a GPU.

A radix select on the numbers' bits, read as integers of the same order: bfloat16 has two digits of 8 bits, float32
four. Phases, each over chunks of all rows:

1. `count`, once per digit: how many numbers of a chunk have which digit, among those whose higher digits are the ones
   that the K-th best number has. Every program finds those by adding up the counts of the row's chunks.
2. `collect`: numbers above the K-th best, and as many equal to it as there is room for, the first ones. The counts
   say at which place each chunk writes, so the result does not depend on who comes first.
3. `rank`: every number found is put at its place in descending order, equal ones in the order of their indices.

What is promised: exactly the numbers of a descending sort, -0 equal to 0 and nan above all; among equal numbers lower
indices are taken, and come, first. (`torch.topk` promises nothing about equal numbers.)

Shapes: M rows, V numbers of a row, K chosen.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from domino_spec.ops.triton.grid import grid_barrier, interpreted, new_counters

_MAX_BLOCK = 4096
"""Numbers that a program reads together: 16 a thread."""
_RANKED = 64
"""Numbers that a program ranks."""


@dataclass(frozen=True)
class SelectPlan:
    """How M rows of V numbers are spread over programs."""

    chunks: int
    """Parts of a row."""
    span: int
    """Numbers of a part."""
    block: int
    passes: int
    """Digits of a number."""

    @staticmethod
    def of(rows: int, width: int, dtype: torch.dtype, programs: int) -> SelectPlan:
        """Parts as many as keep the programs busy, none without numbers."""
        chunks = min(max(1, programs // max(1, rows)), triton.cdiv(width, 256))
        span = triton.cdiv(triton.cdiv(width, chunks), 8) * 8  # 16 bytes, one load, of bfloat16
        block = min(_MAX_BLOCK, triton.next_power_of_2(span))
        return SelectPlan(triton.cdiv(width, span), span, block, 2 if dtype == torch.bfloat16 else 4)


@dataclass(frozen=True)
class SelectWorkspace:
    """Memory of one selection, reused by the next."""

    counts: Tensor
    """[M, passes, chunks, 256] int32."""
    found: Tensor
    """[2, M, K] int32, keys and indices before they are ranked."""
    counter: Tensor
    """[1] int64, of the barrier."""

    @staticmethod
    def allocate(plan: SelectPlan, rows: int, wanted: int, device: torch.device) -> SelectWorkspace:
        """For so many rows and chosen numbers."""
        counts = torch.empty(rows, plan.passes, plan.chunks, 256, dtype=torch.int32, device=device)
        found = torch.empty(2, rows, wanted, dtype=torch.int32, device=device)
        return SelectWorkspace(counts, found, new_counters(1, torch.int64, device))


def select_best(
    logits: Tensor, wanted: int, plan: SelectPlan, workspace: SelectWorkspace, programs: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """The K best of each row of logits [R, N, V], best first: values [R, N, K] float32 and indices [R, N, K] int64.

    Args:
        logits: float32 or bfloat16, numbers of one row contiguous.
        wanted: K, 1 to V.
        plan: of R * N rows.
        workspace: made for them; no other launch may use it meanwhile.
        programs: of every launch.
        fused: one cooperative launch instead of one per phase.
    """
    requests, drafts, width = logits.shape
    assert logits.stride(2) == 1 or width == 1
    values = torch.empty(requests, drafts, wanted, dtype=torch.float32, device=logits.device)
    ids = torch.empty(requests, drafts, wanted, dtype=torch.int64, device=logits.device)
    keys, places = workspace.found
    given = (logits, workspace.counts, keys, places, values, ids, logits.stride(0), logits.stride(1), requests * drafts)
    sizes = dict(
        DRAFTS=drafts, V=width, K=wanted, PASSES=plan.passes, CHUNKS=plan.chunks,
        CHUNK_BLOCK=triton.next_power_of_2(plan.chunks), SPAN=plan.span, BLOCK=plan.block,
        RANKED=min(_RANKED, triton.next_power_of_2(wanted)), RANK_BLOCK=min(512, triton.next_power_of_2(wanted)),
        num_warps=8,
    )  # fmt: skip
    if fused:
        cooperative = {} if interpreted() else {"launch_cooperative_grid": True}
        _select_kernel[(programs,)](*given, workspace.counter, **sizes, **cooperative)
    else:
        for digit in range(plan.passes):
            _count_kernel[(programs,)](*given, **sizes, DIGIT=digit)
        _collect_kernel[(programs,)](*given, **sizes)
        _rank_kernel[(programs,)](*given, **sizes)
    return values, ids


@triton.jit
def _key(x, PASSES: tl.constexpr):
    """Numbers to int32 in the same order, of as many bits as the numbers have."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return key >> (32 - 8 * PASSES)


@triton.jit
def _row(logits_ptr, row, request_stride, draft_stride, DRAFTS: tl.constexpr):
    row = tl.full((), 0, tl.int64) + row  # all logits together may be more than int32 counts
    return logits_ptr + row // DRAFTS * request_stride + row % DRAFTS * draft_stride


@triton.jit
def _leading(
    counts_ptr, row, DONE: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first DONE digits of the K-th best number, as one number; how many of those that share them are wanted."""
    digits, chunks = tl.arange(0, 256), tl.arange(0, CHUNK_BLOCK)
    leading, wanted = row * 0, row * 0 + K
    for done in tl.static_range(DONE):
        at = ((row * PASSES + done) * CHUNKS + chunks)[:, None] * 256 + digits[None, :]
        counts = tl.sum(tl.load(counts_ptr + at, mask=(chunks < CHUNKS)[:, None], other=0), 0)
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        leading = leading * 256 + digit
        if done == 0:
            leading -= 128  # the highest digit holds the sign
    return leading, wanted


@triton.jit
def _count(
    item, logits_ptr, counts_ptr, request_stride, draft_stride, DIGIT: tl.constexpr, DRAFTS: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = item // CHUNKS, item % CHUNKS
    leading, _ = _leading(counts_ptr, row, DIGIT, K, PASSES, CHUNKS, CHUNK_BLOCK)
    first = leading * 256
    if DIGIT == 0:
        first -= 128
    numbers = _row(logits_ptr, row, request_stride, draft_stride, DRAFTS)
    counts = tl.zeros([256], tl.int32)
    for start in range(0, SPAN, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        columns = chunk * SPAN + offsets
        inside = (columns < V) & (offsets < SPAN)
        key = _key(tl.load(numbers + columns, mask=inside, other=0.0), PASSES)
        digit = (key >> (8 * (PASSES - 1 - DIGIT))) - first
        alike = inside & (digit >= 0) & (digit < 256)
        counts += tl.histogram(tl.where(alike, digit, 0), 256, mask=alike)
    tl.store(counts_ptr + ((row * PASSES + DIGIT) * CHUNKS + chunk) * 256 + tl.arange(0, 256), counts)


@triton.jit
def _collect(
    item, logits_ptr, counts_ptr, keys_ptr, places_ptr, request_stride, draft_stride, DRAFTS: tl.constexpr,
    V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = item // CHUNKS, item % CHUNKS
    last, _ = _leading(counts_ptr, row, PASSES, K, PASSES, CHUNKS, CHUNK_BLOCK)  # the K-th best number's key
    digits, chunks = tl.arange(0, 256), tl.arange(0, CHUNK_BLOCK)
    above, equal = tl.zeros([CHUNK_BLOCK], tl.int32), tl.zeros([CHUNK_BLOCK], tl.int32)
    for done in tl.static_range(PASSES):
        at = ((row * PASSES + done) * CHUNKS + chunks)[:, None] * 256 + digits[None, :]
        counts = tl.load(counts_ptr + at, mask=(chunks < CHUNKS)[:, None], other=0)
        digit = (last >> (8 * (PASSES - 1 - done))) & 255
        if done == 0:
            digit = digit ^ 128
        above += tl.sum(tl.where((digits > digit)[None, :], counts, 0), 1)
        if done == PASSES - 1:
            equal = tl.sum(tl.where((digits == digit)[None, :], counts, 0), 1)
    next_above = tl.sum(tl.where(chunks < chunk, above, 0), 0)
    next_equal = tl.sum(above, 0) + tl.sum(tl.where(chunks < chunk, equal, 0), 0)
    numbers = _row(logits_ptr, row, request_stride, draft_stride, DRAFTS)
    for start in range(0, SPAN, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        columns = chunk * SPAN + offsets
        inside = (columns < V) & (offsets < SPAN)
        key = _key(tl.load(numbers + columns, mask=inside, other=0.0), PASSES)
        is_above, is_equal = inside & (key > last), inside & (key == last)
        both = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)  # two counts, one scan
        so_far = tl.cumsum(both, 0)
        place = tl.where(is_above, next_above + (so_far & 0xFFFF), next_equal + (so_far >> 16)) - 1
        taken = (is_above | is_equal) & (place < K)
        tl.store(keys_ptr + row * K + place, key, mask=taken)
        tl.store(places_ptr + row * K + place, columns, mask=taken)
        counted = tl.sum(both, 0)
        next_above += counted & 0xFFFF
        next_equal += counted >> 16


@triton.jit
def _rank(
    item, logits_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, DRAFTS: tl.constexpr,
    K: tl.constexpr, RANKED: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(K, RANKED)
    row, part = item // parts, item % parts
    ranked = part * RANKED + tl.arange(0, RANKED)
    key = tl.load(keys_ptr + row * K + ranked, mask=ranked < K, other=0)
    rank = tl.zeros([RANKED], tl.int32)
    for start in range(0, K, RANK_BLOCK):
        other = start + tl.arange(0, RANK_BLOCK)
        other_key = tl.load(keys_ptr + row * K + other, mask=other < K, other=0)[None, :]
        first = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other[None, :] < ranked[:, None]))
        rank += tl.sum((first & (other < K)[None, :]).to(tl.int32), 1)
    column = tl.load(places_ptr + row * K + ranked, mask=ranked < K, other=0)
    numbers = _row(logits_ptr, row, request_stride, draft_stride, DRAFTS)
    value = tl.load(numbers + column, mask=ranked < K, other=0.0).to(tl.float32)
    tl.store(values_ptr + row * K + rank, value, mask=ranked < K)
    tl.store(ids_ptr + row * K + rank, column.to(tl.int64), mask=ranked < K)


@triton.jit
def _count_kernel(
    logits_ptr, counts_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, rows,
    DRAFTS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, RANK_BLOCK: tl.constexpr,
    DIGIT: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), rows * CHUNKS, tl.num_programs(0)):
        _count(item, logits_ptr, counts_ptr, request_stride, draft_stride, DIGIT, DRAFTS, V, K, PASSES, CHUNKS,
               CHUNK_BLOCK, SPAN, BLOCK)  # fmt: skip


@triton.jit
def _collect_kernel(
    logits_ptr, counts_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, rows,
    DRAFTS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), rows * CHUNKS, tl.num_programs(0)):
        _collect(item, logits_ptr, counts_ptr, keys_ptr, places_ptr, request_stride, draft_stride, DRAFTS, V, K, PASSES,
                 CHUNKS, CHUNK_BLOCK, SPAN, BLOCK)  # fmt: skip


@triton.jit
def _rank_kernel(
    logits_ptr, counts_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, rows,
    DRAFTS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), rows * tl.cdiv(K, RANKED), tl.num_programs(0)):
        _rank(item, logits_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, DRAFTS, K,
              RANKED, RANK_BLOCK)  # fmt: skip


@triton.jit
def _select_kernel(
    logits_ptr, counts_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, rows, counter_ptr,
    DRAFTS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, PASSES: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, RANKED: tl.constexpr, RANK_BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    for digit in tl.static_range(PASSES):
        for item in range(program, rows * CHUNKS, programs):
            _count(item, logits_ptr, counts_ptr, request_stride, draft_stride, digit, DRAFTS, V, K, PASSES, CHUNKS,
                   CHUNK_BLOCK, SPAN, BLOCK)  # fmt: skip
        grid_barrier(counter_ptr)
    for item in range(program, rows * CHUNKS, programs):
        _collect(item, logits_ptr, counts_ptr, keys_ptr, places_ptr, request_stride, draft_stride, DRAFTS, V, K, PASSES,
                 CHUNKS, CHUNK_BLOCK, SPAN, BLOCK)  # fmt: skip
    grid_barrier(counter_ptr)
    for item in range(program, rows * tl.cdiv(K, RANKED), programs):
        _rank(item, logits_ptr, keys_ptr, places_ptr, values_ptr, ids_ptr, request_stride, draft_stride, DRAFTS, K,
              RANKED, RANK_BLOCK)  # fmt: skip
