"""The Triton kernels of `acceptance`.

A greedy chain is one launch: programs find the largest logit of a part of a row, and the last of a request's programs
to finish decides. A sampled chain has phases between which all programs meet (`grid`), since the bonus token is
drawn from a row that is known only once the drafts are decided: decide; copy that row; take the draft's share away; sum
by parts; draw.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from domino_spec.ops.triton.grid import LOWEST, NOWHERE, grid_barrier, interpreted, new_counters, resident_programs

_SPAN = 8192
"""Logits of one part of a row."""
_BLOCK = 2048
"""Numbers that a program reads together."""


def _accepted(requests: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the fields of `acceptance.Accepted`."""
    tokens = torch.empty(requests, rows, dtype=torch.int64, device=device)
    return tokens, torch.empty_like(tokens[:, 0]), torch.empty(requests, dtype=torch.bool, device=device)


@functools.cache
def _arrivals(requests: int, device: torch.device) -> Tensor:
    """[R] int32, zero between launches; never given back, as CUDA graphs keep using it."""
    return new_counters(requests, torch.int32, device)


def greedy_chain_triton(logits: Tensor, drafts: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`acceptance.greedy_chain` on a GPU; launches that share a stream follow one another, others need care."""
    requests, rows, width = logits.shape
    assert logits.stride(2) == 1 or width == 1
    device, parts = logits.device, triton.cdiv(width, _SPAN)
    found = _accepted(requests, rows, device)
    if requests == 0:
        return found
    tops = torch.empty(requests, rows, parts, dtype=torch.float32, device=device)
    places = torch.empty(requests, rows, parts, dtype=torch.int32, device=device)
    with torch.cuda.device_of(logits):
        _greedy_kernel[(requests * rows * parts,)](
            logits, drafts.contiguous(), num_drafts.contiguous(), tops, places, *found, _arrivals(requests, device),
            logits.stride(0), logits.stride(1),
            ROWS=rows, V=width, PARTS=parts, SPAN=_SPAN, BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
            ROW_BLOCK=triton.next_power_of_2(rows), PART_BLOCK=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return found


@triton.jit
def _greedy_kernel(
    logits_ptr, drafts_ptr, num_drafts_ptr, tops_ptr, places_ptr, tokens_ptr, num_accepted_ptr, finite_ptr,
    arrivals_ptr, request_stride, row_stride, ROWS: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, PART_BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    part, row, request = item % PARTS, item // PARTS % ROWS, item // (PARTS * ROWS)
    numbers = logits_ptr + (tl.full((), 0, tl.int64) + request) * request_stride + row * row_stride
    top, place = tl.full((), LOWEST, tl.float32), tl.full((), NOWHERE, tl.int32)
    for start in range(0, SPAN, BLOCK):
        columns = part * SPAN + start + tl.arange(0, BLOCK)
        inside = columns < V
        values = tl.load(numbers + columns, mask=inside, other=LOWEST).to(tl.float32)
        broken = tl.max((values != values).to(tl.int32), 0)
        values = tl.where(values < LOWEST, LOWEST, values)
        part_top = tl.max(values, 0)
        part_place = tl.min(tl.where(inside & (values == part_top), columns, NOWHERE), 0)
        place = tl.where(part_top > top, part_place, tl.minimum(place, tl.where(part_top == top, part_place, NOWHERE)))
        top = tl.maximum(top, part_top)
        place = tl.where(broken > 0, -1, place)  # stays the smallest
    tl.store(tops_ptr + item, top)
    tl.store(places_ptr + item, place)
    tl.debug_barrier()  # all threads have stored before one says so
    if tl.atomic_add(arrivals_ptr + request, 1, sem="acq_rel", scope="gpu") == ROWS * PARTS - 1:
        tl.store(arrivals_ptr + request, 0)
        rows, parts = tl.arange(0, ROW_BLOCK), tl.arange(0, PART_BLOCK)
        at = (request * ROWS + rows)[:, None] * PARTS + parts[None, :]
        there = (rows < ROWS)[:, None] & (parts < PARTS)[None, :]
        tops = tl.load(tops_ptr + at, mask=there, other=LOWEST)
        places = tl.load(places_ptr + at, mask=there, other=NOWHERE)
        broken_rows = tl.min(places, 1) < 0
        best = tl.where(tops == tl.max(tops, 1)[:, None], places, NOWHERE)
        choices = tl.maximum(tl.min(best, 1), 0).to(tl.int64)
        drafts = tl.load(drafts_ptr + request * (ROWS - 1) + rows, mask=rows < ROWS - 1, other=-1)
        stays = (drafts == choices) & (rows < tl.load(num_drafts_ptr + request)) & (rows < ROWS - 1)
        num_accepted = tl.min(tl.where(stays, ROWS, rows), 0)
        bonus = tl.sum(tl.where(rows == num_accepted, choices, 0), 0)
        kept = (rows != num_accepted) & (rows < ROWS - 1)
        tl.store(tokens_ptr + request * ROWS + rows, tl.where(kept, drafts, bonus), mask=rows < ROWS)
        tl.store(num_accepted_ptr + request, num_accepted.to(tl.int64))
        broken_used = tl.max((broken_rows & (rows <= num_accepted)).to(tl.int32), 0)
        tl.store(finite_ptr + request, broken_used == 0)


@dataclass(frozen=True)
class Workspace:
    """Memory of one decision about sampled chains, reused by the next of the same shape on the same stream."""

    left: Tensor
    """[R, V] float64, what the draft left over of the row that the bonus is drawn from."""
    sums: Tensor
    """[2, R, parts] float64, of that and of the row itself."""
    counter: Tensor
    """[1] int64, of the barrier."""

    @staticmethod
    def allocate(requests: int, width: int, parts: int, device: torch.device) -> Workspace:
        """For so many requests and parts of their rows."""
        floats: dict[str, Any] = dict(dtype=torch.float64, device=device)
        counter = new_counters(1, torch.int64, device)
        return Workspace(torch.empty(requests, width, **floats), torch.empty(2, requests, parts, **floats), counter)


_workspace = functools.cache(Workspace.allocate)
_ALL, _DECIDE, _COPY, _REMOVE, _SUM, _DRAW = (tl.constexpr(phase) for phase in range(6))


def sampled_chain_triton(
    probs: Tensor,
    drafts: Tensor,
    num_drafts: Tensor,
    candidate_ids: Tensor,
    draft_probs: Tensor,
    accept: Tensor,
    residual: Tensor,
    *,
    programs: int | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`acceptance.sampled_chain` on a GPU, the fields of its result; N and K at least 1.

    Args:
        programs: of every launch; None for one on every multiprocessor.
        fused: all phases in one launch (None: on a GPU), or one launch per phase.
    """
    requests, rows, width = probs.shape
    device, wanted = probs.device, draft_probs.shape[-1]
    fused = not interpreted() if fused is None else fused
    programs = programs or resident_programs(device)
    assert (probs.stride(2) == 1 or width == 1) and rows > 1
    found = _accepted(requests, rows, device)
    if requests == 0:
        return found
    span = triton.cdiv(width, max(1, programs // requests))
    parts = triton.cdiv(width, span)
    workspace = _workspace(requests, width, parts, device)
    contiguous = (t.contiguous() for t in (drafts, num_drafts, candidate_ids, draft_probs, accept, residual))
    given = (
        probs, *contiguous, *found, workspace.left, workspace.sums[0], workspace.sums[1], workspace.counter,
        probs.stride(0), probs.stride(1), requests,
    )  # fmt: skip
    sizes = dict(
        ROWS=rows, V=width, K=wanted, PARTS=parts, SPAN=span, BLOCK=min(1024, triton.next_power_of_2(span)),
        ROW_BLOCK=triton.next_power_of_2(rows), K_BLOCK=min(256, triton.next_power_of_2(wanted)),
        PART_BLOCK=triton.next_power_of_2(parts), num_warps=8,
    )  # fmt: skip
    with torch.cuda.device_of(probs):
        if fused:
            cooperative = {} if interpreted() else {"launch_cooperative_grid": True}
            _sampled_kernel[(programs,)](*given, **sizes, **cooperative, PHASE=_ALL.value)
        else:
            for phase in (_DECIDE, _COPY, _REMOVE, _SUM, _DRAW):
                _sampled_kernel[(programs,)](*given, **sizes, PHASE=phase.value)
    return found


@triton.jit
def _decide(
    request, probs_ptr, drafts_ptr, num_drafts_ptr, ids_ptr, draft_probs_ptr, accept_ptr, num_accepted_ptr,
    request_stride, row_stride, ROWS: tl.constexpr, K: tl.constexpr, ROW_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROW_BLOCK)
    valid = rows < ROWS - 1
    slots = (tl.full((), 0, tl.int64) + request) * (ROWS - 1) + rows
    drafts = tl.load(drafts_ptr + slots, mask=valid, other=0)
    numbers = probs_ptr + (tl.full((), 0, tl.int64) + request) * request_stride + rows * row_stride
    target = tl.load(numbers + drafts, mask=valid, other=0.0).to(tl.float64)
    drawn = tl.zeros([ROW_BLOCK], tl.float32)
    for start in range(0, K, K_BLOCK):
        columns = start + tl.arange(0, K_BLOCK)
        inside = valid[:, None] & (columns < K)[None, :]
        at = slots[:, None] * K + columns[None, :]
        is_draft = inside & (tl.load(ids_ptr + at, mask=inside, other=-1) == drafts[:, None])
        drawn += tl.sum(tl.load(draft_probs_ptr + at, mask=is_draft, other=0.0), 1)
    ratio = target / tl.where(valid, drawn, 1.0).to(tl.float64)
    stays = valid & (tl.load(accept_ptr + slots, mask=valid, other=1.0) < ratio)
    stays = stays & (rows < tl.load(num_drafts_ptr + request))
    tl.store(num_accepted_ptr + request, tl.min(tl.where(stays, ROWS, rows), 0).to(tl.int64))


@triton.jit
def _sum_part(
    item, values_ptr, sums_ptr, V: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, SPAN, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        columns = item % PARTS * SPAN + offsets
        inside = (offsets < SPAN) & (columns < V)
        total += tl.sum(tl.load(values_ptr + columns, mask=inside, other=0.0).to(tl.float64), 0)
    tl.store(sums_ptr + item, total)


@triton.jit
def _draw(values_ptr, sums, number, V: tl.constexpr, PART_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Where the running sum of values first exceeds `number` of the whole, given the sums of their parts."""
    parts = tl.arange(0, PART_BLOCK)
    threshold = number * tl.sum(sums, 0)
    below = tl.sum((tl.cumsum(sums, 0) <= threshold).to(tl.int32), 0)
    part = tl.minimum(below, tl.max(tl.where(sums > 0, parts, 0), 0))  # rounding may leave none above the threshold
    running = tl.sum(tl.where(parts < part, sums, 0.0), 0)
    found, last = tl.full((), NOWHERE, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, SPAN, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        columns = part * SPAN + offsets
        inside = (offsets < SPAN) & (columns < V)
        values = tl.load(values_ptr + columns, mask=inside, other=0.0).to(tl.float64)
        above = (running + tl.cumsum(values, 0) > threshold) & (values > 0)
        found = tl.minimum(found, tl.min(tl.where(above, columns, NOWHERE), 0))
        last = tl.maximum(last, tl.max(tl.where(values > 0, columns, 0), 0))
        running += tl.sum(values, 0)
    return tl.where(found < NOWHERE, found, last)


@triton.jit
def _sampled_kernel(
    probs_ptr, drafts_ptr, num_drafts_ptr, ids_ptr, draft_probs_ptr, accept_ptr, residual_ptr, tokens_ptr,
    num_accepted_ptr, finite_ptr, left_ptr, left_sums_ptr, sums_ptr, counter_ptr, request_stride, row_stride, requests,
    PHASE: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PART_BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    far = tl.full((), 0, tl.int64)  # makes offsets of 64 bits
    if (PHASE == _ALL) | (PHASE == _DECIDE):
        for request in range(program, requests, programs):
            _decide(
                request, probs_ptr, drafts_ptr, num_drafts_ptr, ids_ptr, draft_probs_ptr, accept_ptr, num_accepted_ptr,
                request_stride, row_stride, ROWS, K, ROW_BLOCK, K_BLOCK,
            )  # fmt: skip
    if PHASE == _ALL:
        grid_barrier(counter_ptr)
    if (PHASE == _ALL) | (PHASE == _COPY):
        for item in range(program, requests * PARTS, programs):
            request = item // PARTS
            row = probs_ptr + (far + request) * request_stride + tl.load(num_accepted_ptr + request) * row_stride
            for start in range(0, SPAN, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                columns = item % PARTS * SPAN + offsets
                inside = (offsets < SPAN) & (columns < V)
                values = tl.load(row + columns, mask=inside, other=0.0).to(tl.float64)
                tl.store(left_ptr + (far + request) * V + columns, values, mask=inside)
            _sum_part(item, row, sums_ptr, V, PARTS, SPAN, BLOCK)
    if PHASE == _ALL:
        grid_barrier(counter_ptr)
    if (PHASE == _ALL) | (PHASE == _REMOVE):
        for item in range(program, requests * tl.cdiv(K, K_BLOCK), programs):
            request = item // tl.cdiv(K, K_BLOCK)
            columns = item % tl.cdiv(K, K_BLOCK) * K_BLOCK + tl.arange(0, K_BLOCK)
            slot = tl.load(num_accepted_ptr + request)
            rejected = slot < tl.load(num_drafts_ptr + request)
            inside = tl.where(rejected, columns, K) < K
            at = ((far + request) * (ROWS - 1) + slot) * K + columns
            at_left = left_ptr + (far + request) * V + tl.load(ids_ptr + at, mask=inside, other=0)
            removed = tl.load(draft_probs_ptr + at, mask=inside, other=0.0).to(tl.float64)
            left = tl.load(at_left, mask=inside, other=0.0) - removed
            tl.store(at_left, tl.where(left < 0, 0.0, left), mask=inside)
    if PHASE == _ALL:
        grid_barrier(counter_ptr)
    if (PHASE == _ALL) | (PHASE == _SUM):
        for item in range(program, requests * PARTS, programs):
            _sum_part(item, left_ptr + (far + item // PARTS) * V, left_sums_ptr, V, PARTS, SPAN, BLOCK)
    if PHASE == _ALL:
        grid_barrier(counter_ptr)
    if (PHASE == _ALL) | (PHASE == _DRAW):
        for request in range(program, requests, programs):
            rows, parts = tl.arange(0, ROW_BLOCK), tl.arange(0, PART_BLOCK)
            num_accepted = tl.load(num_accepted_ptr + request)
            number = tl.load(residual_ptr + request * ROWS + num_accepted)
            sums = tl.load(sums_ptr + request * PARTS + parts, mask=parts < PARTS, other=0.0)
            left_sums = tl.load(left_sums_ptr + request * PARTS + parts, mask=parts < PARTS, other=0.0)
            if tl.sum(left_sums, 0) > 0:
                bonus = _draw(left_ptr + (far + request) * V, left_sums, number, V, PART_BLOCK, SPAN, BLOCK)
            else:  # the two distributions are all but equal
                row = probs_ptr + (far + request) * request_stride + num_accepted * row_stride
                bonus = _draw(row, sums, number, V, PART_BLOCK, SPAN, BLOCK)
            bonus = tl.minimum(bonus, V - 1).to(tl.int64)
            drafts = tl.load(drafts_ptr + request * (ROWS - 1) + rows, mask=rows < ROWS - 1, other=0)
            kept = (rows != num_accepted) & (rows < ROWS - 1)
            tl.store(tokens_ptr + request * ROWS + rows, tl.where(kept, drafts, bonus), mask=rows < ROWS)
            total = tl.sum(sums, 0)
            tl.store(finite_ptr + request, total == total)
