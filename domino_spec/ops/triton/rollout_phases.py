"""Phases of the head rollout's step in Triton; `rollout` launches them, one by one or as one kernel.

A step makes draft i of every request from the slots' low-rank share, the state before it, and the token before it:

1. `gru_slice`: a slice of the GRU's units, for all requests. The input product W_ih E(token) is looked up where the
   token is among those whose product was made before the loop, and made here otherwise, for the slice's rows.
2. `low_rank_slice`: a slice of u = silu(W1 [h ; S]).
3. `score_part`: final logits of a part of the candidates, their largest, and sums of exponentials.
4. `choose`: argmax or draw, from what the parts have found.

Where the weights are bfloat16, numbers are rounded wherever PyTorch's reference rounds them; sums are float32.

Scalars named `step`, `requests` and `drafts` are i, R and N. It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from domino_spec.ops.triton.grid import LOWEST, NOWHERE, rounded, sigmoid


@triton.jit
def rows_of(
    weight_ptr, first, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Rows `first ..` of a matrix of ROWS rows, [BLOCK, BLOCK_W]; zeros past its end."""
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_W)
    inside = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(weight_ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(rows, vector, BFLOAT16: tl.constexpr):
    return rounded(tl.sum(rows.to(tl.float32) * vector[None, :], 1), BFLOAT16)


@triton.jit
def _input_products(
    token, first, table_ptr, token_ids_ptr, scale, weight_ptr, HAS_IDS: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, TABLE_BFLOAT16: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """W_ih E(token) for units `first ..` of the three gates, each [BLOCK_G]."""
    row = tl.full((), 0, tl.int64) + token
    if HAS_IDS:
        row = tl.load(token_ids_ptr + row)
    units = first + tl.arange(0, BLOCK_G)
    reset = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    update = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    new = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        x = tl.load(table_ptr + row * H + columns, mask=columns < H, other=0.0).to(tl.float32)
        x = rounded(rounded(x * scale, TABLE_BFLOAT16), BFLOAT16)[None, :]
        at = weight_ptr + units[:, None] * H + columns[None, :]
        inside = (units < G)[:, None] & (columns < H)[None, :]
        reset += tl.load(at, mask=inside, other=0.0).to(tl.float32) * x
        update += tl.load(at + G * H, mask=inside, other=0.0).to(tl.float32) * x
        new += tl.load(at + 2 * G * H, mask=inside, other=0.0).to(tl.float32) * x
    return (
        rounded(tl.sum(reset, 1), BFLOAT16), rounded(tl.sum(update, 1), BFLOAT16), rounded(tl.sum(new, 1), BFLOAT16)
    )  # fmt: skip


@triton.jit
def gru_slice(
    first, reset_rows, update_rows, new_rows, step, requests, drafts, states_ptr, products_ptr, choices_ptr, ids_ptr,
    table_ptr, token_ids_ptr, scale, input_weight_ptr, HAS_IDS: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, LISTED: tl.constexpr, AHEAD: tl.constexpr,
    AHEAD_BLOCK: tl.constexpr, TABLE_BFLOAT16: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Units `first ..` of the state after the token before draft `step`, given their rows of W_hh.

    Reads the state of the step before (zero before the first), writes the other of the two states.
    """
    units, columns, ahead = first + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, AHEAD_BLOCK)
    inside = units < G
    later = step > 0
    for request in range(requests):
        slot = request * drafts + step - 1
        token = tl.load(choices_ptr + slot, mask=later, other=0)
        made = tl.load(ids_ptr + slot * LISTED + ahead, mask=(ahead < AHEAD) & later, other=-1)
        found = tl.min(tl.where(made == token, ahead, AHEAD_BLOCK), 0)
        row = tl.where(later, 1 + (step - 1) * AHEAD + found, 0)  # the anchor's product comes first
        if (step == 0) | (found < AHEAD_BLOCK):
            at = products_ptr + (request * (1 + (drafts - 1) * AHEAD) + row) * 3 * G + units
            input_reset = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            input_update = tl.load(at + G, mask=inside, other=0.0).to(tl.float32)
            input_new = tl.load(at + 2 * G, mask=inside, other=0.0).to(tl.float32)
        else:
            input_reset, input_update, input_new = _input_products(
                token, first, table_ptr, token_ids_ptr, scale, input_weight_ptr, HAS_IDS, H, G, BLOCK_G, BLOCK_H,
                TABLE_BFLOAT16, BFLOAT16,
            )  # fmt: skip
        before = states_ptr + ((step + 1) % 2 * requests + request) * G
        state = tl.load(before + columns, mask=(columns < G) & later, other=0.0)
        reset = rounded(sigmoid(rounded(input_reset + _product(reset_rows, state, BFLOAT16), BFLOAT16)), BFLOAT16)
        update = rounded(sigmoid(rounded(input_update + _product(update_rows, state, BFLOAT16), BFLOAT16)), BFLOAT16)
        candidate = rounded(reset * _product(new_rows, state, BFLOAT16), BFLOAT16)
        new = rounded(2.0 * sigmoid(2.0 * rounded(input_new + candidate, BFLOAT16)) - 1.0, BFLOAT16)  # tanh
        old = tl.load(before + units, mask=inside & later, other=0.0)
        kept = rounded(update * rounded(old - new, BFLOAT16), BFLOAT16)
        after = states_ptr + (step % 2 * requests + request) * G
        tl.store(after + units, rounded(new + kept, BFLOAT16), mask=inside)


@triton.jit
def low_rank_slice(
    first, rows, step, requests, drafts, states_ptr, from_hidden_ptr, low_rank_ptr, G: tl.constexpr, L: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Numbers `first ..` of u, given their rows of W1's share for the state."""
    numbers, columns = first + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    for request in range(requests):
        state = tl.load(states_ptr + (step % 2 * requests + request) * G + columns, mask=columns < G, other=0.0)
        share = tl.load(from_hidden_ptr + (request * drafts + step) * L + numbers, mask=numbers < L, other=0.0).to(
            tl.float32
        )
        x = rounded(share + _product(rows, state, BFLOAT16), BFLOAT16)
        tl.store(low_rank_ptr + request * L + numbers, rounded(x * sigmoid(x), BFLOAT16), mask=numbers < L)


@triton.jit
def candidate_rows(
    request, step, drafts, first, COUNT: tl.constexpr, base_ptr, request_stride, draft_stride, ids_ptr, correction_ptr,
    corrected, RESTRICTED: tl.constexpr, LISTED: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr,
    LOW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Base logits [BLOCK_K] of candidates `first ..` and, if they are corrected, their rows of W2.

    `base_ptr` leads to the logits of all candidates, in their order.
    """
    positions, low = first + tl.arange(0, BLOCK_K), tl.arange(0, LOW_BLOCK)
    inside = positions < COUNT
    ids = positions.to(tl.int64)
    if RESTRICTED:
        ids = tl.load(ids_ptr + (request * drafts + step) * LISTED + positions, mask=inside, other=0)
    row = tl.full((), 0, tl.int64) + request
    at = base_ptr + row * request_stride + step * draft_stride + positions
    base = tl.load(at, mask=inside, other=LOWEST).to(tl.float32)
    at_rows = correction_ptr + ids[:, None] * L + low[None, :]
    rows = tl.load(at_rows, mask=(inside & corrected)[:, None] & (low < L)[None, :], other=0.0)
    return tl.where(base < LOWEST, LOWEST, base), rows


@triton.jit
def _score_rows(
    base, rows, top, at, total, mass, request, first, corrected, low_rank_ptr, logits_ptr, temperature,
    SAMPLED: tl.constexpr, CONFIDENT: tl.constexpr, K: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr,
    LOW_BLOCK: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Final logits of [BLOCK_K] candidates; the largest so far, where it is, and sums of exp(logits - largest)."""
    positions, low = first + tl.arange(0, BLOCK_K), tl.arange(0, LOW_BLOCK)
    inside = positions < K
    low_rank = tl.load(low_rank_ptr + request * L + low, mask=(low < L) & corrected, other=0.0)
    final = rounded(base + _product(rows, low_rank, BFLOAT16), BFLOAT16)
    logits = tl.where(inside & corrected, final, base)
    logits = tl.where(logits < LOWEST, LOWEST, logits)
    block_top = tl.max(tl.where(inside, logits, LOWEST), 0)
    block_at = tl.min(tl.where(inside & (logits == block_top), positions, NOWHERE), 0)
    new_top = tl.maximum(top, block_top)
    if SAMPLED:
        tl.store(logits_ptr + request * K + positions, logits, mask=inside)
        exponents = tl.exp(logits / temperature - new_top / temperature)
        total = total * tl.exp(top / temperature - new_top / temperature).to(tl.float64)
        total += tl.sum(tl.where(inside, exponents, 0.0).to(tl.float64), 0)
    if CONFIDENT:
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.where(inside, tl.exp(logits - new_top), 0.0), 0)
    return new_top, tl.where(block_top > top, block_at, tl.minimum(at, NOWHERE)), total, mass


@triton.jit
def temperature_of(request, temperatures_ptr, SAMPLED: tl.constexpr):
    """A request's temperature, and 1 for those that choose."""
    temperature = 1.0
    if SAMPLED:
        temperature = tl.load(temperatures_ptr + request)
        temperature = tl.where(temperature > 0, temperature, 1.0)
    return temperature


@triton.jit
def score_part(
    item, base, rows, step, drafts, base_ptr, request_stride, draft_stride, ids_ptr, correction_ptr, low_rank_ptr,
    logits_ptr, temperatures_ptr, tops_ptr, places_ptr, totals_ptr, masses_ptr, corrected, RESTRICTED: tl.constexpr,
    SAMPLED: tl.constexpr, CONFIDENT: tl.constexpr, LISTED: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, LOW_BLOCK: tl.constexpr, BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Final logits of one part of one request's candidates, whose first block is given.

    `item` counts parts of all requests.
    """
    request, first = item // PARTS, item % PARTS * SPAN
    temperature = temperature_of(request, temperatures_ptr, SAMPLED)
    top, at = tl.full((), LOWEST, tl.float32), tl.full((), NOWHERE, tl.int32)
    total, mass = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float32)
    top, at, total, mass = _score_rows(
        base, rows, top, at, total, mass, request, first, corrected, low_rank_ptr, logits_ptr, temperature,
        SAMPLED, CONFIDENT, K, L, BLOCK_K, LOW_BLOCK, BFLOAT16,
    )  # fmt: skip
    for start in range(BLOCK_K, SPAN, BLOCK_K):
        base, rows = candidate_rows(
            request, step, drafts, first + start, K, base_ptr, request_stride, draft_stride, ids_ptr, correction_ptr,
            corrected, RESTRICTED, LISTED, L, BLOCK_K, LOW_BLOCK,
        )  # fmt: skip
        top, at, total, mass = _score_rows(
            base, rows, top, at, total, mass, request, first + start, corrected, low_rank_ptr, logits_ptr, temperature,
            SAMPLED, CONFIDENT, K, L, BLOCK_K, LOW_BLOCK, BFLOAT16,
        )  # fmt: skip
    tl.store(tops_ptr + item, top)
    tl.store(places_ptr + item, at)
    if SAMPLED:
        tl.store(totals_ptr + item, total)
    if CONFIDENT:
        tl.store(masses_ptr + item, mass)


@triton.jit
def _parts_total(
    request, tops_ptr, totals_ptr, temperature, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr
):  # fmt: skip
    """The largest logit, and each part's sum of exp((logit - largest) / temperature), [PARTS_BLOCK] float64."""
    parts = tl.arange(0, PARTS_BLOCK)
    tops = tl.load(tops_ptr + request * PARTS + parts, mask=parts < PARTS, other=LOWEST)
    top = tl.max(tops, 0)
    totals = tl.load(totals_ptr + request * PARTS + parts, mask=parts < PARTS, other=0.0)
    return top, totals * tl.exp(tops / temperature - top / temperature).to(tl.float64)


@triton.jit
def _draw(
    request, number, top, sums, logits_ptr, temperature, K: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """Where the running sum of exponentials first exceeds `number` of the whole; first by parts, then inside one."""
    parts = tl.arange(0, PARTS_BLOCK)
    threshold = number * tl.sum(sums, 0)
    below = tl.sum((tl.cumsum(sums, 0) <= threshold).to(tl.int32), 0)
    part = tl.minimum(below, tl.max(tl.where(sums > 0, parts, 0), 0))  # rounding may leave none above the threshold
    running = tl.sum(tl.where(parts < part, sums, 0.0), 0)
    found, last = tl.full((), NOWHERE, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, SPAN, BLOCK_SCAN):
        offsets = start + tl.arange(0, BLOCK_SCAN)
        positions = part * SPAN + offsets
        inside = (offsets < SPAN) & (positions < K)
        logits = tl.load(logits_ptr + request * K + positions, mask=inside, other=LOWEST)
        weights = tl.where(inside, tl.exp(logits / temperature - top / temperature), 0.0).to(tl.float64)
        above = running + tl.cumsum(weights, 0) > threshold
        found = tl.minimum(found, tl.min(tl.where(above & (weights > 0), positions, NOWHERE), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, positions, 0), 0))
        running += tl.sum(weights, 0)
    return tl.where(found < NOWHERE, found, last)


@triton.jit
def choose(
    request, step, drafts, ids_ptr, logits_ptr, temperatures_ptr, uniform_ptr, tops_ptr, places_ptr, totals_ptr,
    masses_ptr, choices_ptr, positions_ptr, confidence_ptr, RESTRICTED: tl.constexpr, SAMPLED: tl.constexpr,
    CONFIDENT: tl.constexpr, LISTED: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """One request's draft from what its parts have found: the argmax, the first of equals, or a draw."""
    parts = tl.arange(0, PARTS_BLOCK)
    tops = tl.load(tops_ptr + request * PARTS + parts, mask=parts < PARTS, other=LOWEST)
    places = tl.load(places_ptr + request * PARTS + parts, mask=parts < PARTS, other=NOWHERE)
    top = tl.max(tops, 0)
    position = tl.min(tl.where(tops == top, places, NOWHERE), 0)
    slot = request * drafts + step
    if SAMPLED:
        temperature = temperature_of(request, temperatures_ptr, SAMPLED)
        _, sums = _parts_total(request, tops_ptr, totals_ptr, temperature, PARTS, PARTS_BLOCK)
        number = tl.load(uniform_ptr + slot)
        drawn = _draw(request, number, top, sums, logits_ptr, temperature, K, PARTS_BLOCK, SPAN, BLOCK_SCAN)
        position = tl.where(tl.load(temperatures_ptr + request) > 0, drawn, position)
    position = tl.minimum(position, K - 1)  # what is not a number leads nowhere, but it must not lead outside
    choice = tl.full((), 0, tl.int64) + position
    if RESTRICTED:
        choice = tl.load(ids_ptr + slot * LISTED + position)
    tl.store(choices_ptr + slot, choice)
    if SAMPLED:
        tl.store(positions_ptr + request, position)
    if CONFIDENT:
        masses = tl.load(masses_ptr + request * PARTS + parts, mask=parts < PARTS, other=0.0)
        before = tl.load(confidence_ptr + slot - 1, mask=step > 0, other=1.0)
        tl.store(confidence_ptr + slot, before / tl.sum(masses * tl.exp(tops - top), 0))


@triton.jit
def report_part(
    item, step, drafts, logits_ptr, temperatures_ptr, tops_ptr, totals_ptr, positions_ptr, probs_ptr, K: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, SPAN: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """Probabilities of one part of one request's candidates, for verification."""
    request, part = item // PARTS, item % PARTS
    temperature = temperature_of(request, temperatures_ptr, True)
    samples = tl.load(temperatures_ptr + request) > 0
    top, sums = _parts_total(request, tops_ptr, totals_ptr, temperature, PARTS, PARTS_BLOCK)
    total = tl.sum(sums, 0).to(tl.float32)
    chosen = tl.load(positions_ptr + request)
    slot = tl.full((), 0, tl.int64) + (request * drafts + step)
    for start in range(0, SPAN, BLOCK_SCAN):
        offsets = start + tl.arange(0, BLOCK_SCAN)
        positions = part * SPAN + offsets
        inside = (offsets < SPAN) & (positions < K)
        logits = tl.load(logits_ptr + request * K + positions, mask=inside, other=LOWEST)
        probs = tl.exp(logits / temperature - top / temperature) / total
        probs = tl.where(samples, probs, (positions == chosen).to(tl.float32))
        tl.store(probs_ptr + slot * K + positions, probs, mask=inside)
