"""The kernel of the head rollout: the order of its phases, and where all programs meet.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

# Nested conditions are decided at different times: the outer ones when the kernel is compiled.
# ruff: noqa: SIM102
import triton
import triton.language as tl

from domino_spec.ops.triton.grid import grid_barrier
from domino_spec.ops.triton.rollout_phases import (
    candidate_rows,
    choose,
    gru_slice,
    low_rank_slice,
    report_part,
    rows_of,
    score_part,
)

ALL, GRU, LOW_RANK, SCORE, CHOOSE, REPORT = (tl.constexpr(phase) for phase in range(6))


@triton.jit(do_not_specialize=["step_from", "step_to", "drafts"])
def rollout_kernel(
    hidden_weight_ptr, low_rank_weight_ptr, input_weight_ptr, correction_ptr, table_ptr, token_ids_ptr, base_ptr,
    ids_ptr, from_hidden_ptr, products_ptr, temperatures_ptr, uniform_ptr, choices_ptr, probs_ptr, confidence_ptr,
    states_ptr, low_rank_ptr, logits_ptr, tops_ptr, places_ptr, totals_ptr, masses_ptr, positions_ptr, counter_ptr,
    request_stride, draft_stride, scale, requests, drafts, step_from, step_to,
    PHASE: tl.constexpr, RESTRICTED: tl.constexpr, SAMPLED: tl.constexpr, CONFIDENT: tl.constexpr, ALONE: tl.constexpr,
    HAS_IDS: tl.constexpr, BFLOAT16: tl.constexpr, TABLE_BFLOAT16: tl.constexpr, HELD: tl.constexpr,
    EARLY: tl.constexpr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr, K: tl.constexpr, LISTED: tl.constexpr,
    AHEAD: tl.constexpr, PREFIX: tl.constexpr, SCORED_FROM: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    LOW_BLOCK: tl.constexpr, AHEAD_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """Steps `step_from .. step_to - 1`: all phases with barriers between them, or the one that PHASE names.

    HELD keeps the program's rows of W_hh and W1 for all steps; EARLY loads its rows of W2 before the low rank is there.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    of_state = low_rank_weight_ptr + H  # W1's columns for the state
    units, numbers = program * BLOCK_G, program * BLOCK_L
    if HELD:
        reset_rows = rows_of(hidden_weight_ptr, units, G, G, G, BLOCK_G, BLOCK_S)
        update_rows = rows_of(hidden_weight_ptr + G * G, units, G, G, G, BLOCK_G, BLOCK_S)
        new_rows = rows_of(hidden_weight_ptr + 2 * G * G, units, G, G, G, BLOCK_G, BLOCK_S)
        low_rank_rows = rows_of(of_state, numbers, H + G, L, G, BLOCK_L, BLOCK_S)
    for step in range(step_from, step_to):
        corrected = step >= PREFIX
        if (PHASE == ALL) | (PHASE == GRU):
            for first in range(units, G, programs * BLOCK_G):
                if not HELD:
                    reset_rows = rows_of(hidden_weight_ptr, first, G, G, G, BLOCK_G, BLOCK_S)
                    update_rows = rows_of(hidden_weight_ptr + G * G, first, G, G, G, BLOCK_G, BLOCK_S)
                    new_rows = rows_of(hidden_weight_ptr + 2 * G * G, first, G, G, G, BLOCK_G, BLOCK_S)
                gru_slice(
                    first, reset_rows, update_rows, new_rows, step, requests, drafts, states_ptr, products_ptr,
                    choices_ptr, ids_ptr, table_ptr, token_ids_ptr, scale, input_weight_ptr, HAS_IDS, H, G, BLOCK_G,
                    BLOCK_S, BLOCK_H, LISTED, AHEAD, AHEAD_BLOCK, TABLE_BFLOAT16, BFLOAT16,
                )  # fmt: skip
        if PHASE == ALL:
            grid_barrier(counter_ptr)
        if (PHASE == ALL) | (PHASE == LOW_RANK):
            if corrected:
                for first in range(numbers, L, programs * BLOCK_L):
                    if not HELD:
                        low_rank_rows = rows_of(of_state, first, H + G, L, G, BLOCK_L, BLOCK_S)
                    low_rank_slice(
                        first, low_rank_rows, step, requests, drafts, states_ptr, from_hidden_ptr, low_rank_ptr, G, L,
                        BLOCK_L, BLOCK_S, BFLOAT16,
                    )  # fmt: skip
        if step >= SCORED_FROM:
            if (PHASE == ALL) | (PHASE == SCORE):
                if EARLY:
                    first = program % PARTS * SPAN
                    base, rows = candidate_rows(
                        tl.minimum(program // PARTS, requests - 1), step, drafts, first, K, base_ptr, request_stride,
                        draft_stride, ids_ptr, correction_ptr, corrected, RESTRICTED, LISTED, L, BLOCK_K, LOW_BLOCK,
                    )  # fmt: skip
                if PHASE == ALL:
                    if corrected:
                        grid_barrier(counter_ptr)
                for item in range(program, requests * PARTS, programs):
                    if not EARLY:
                        base, rows = candidate_rows(
                            item // PARTS, step, drafts, item % PARTS * SPAN, K, base_ptr, request_stride, draft_stride,
                            ids_ptr, correction_ptr, corrected, RESTRICTED, LISTED, L, BLOCK_K, LOW_BLOCK,
                        )  # fmt: skip
                    score_part(
                        item, base, rows, step, drafts, base_ptr, request_stride, draft_stride, ids_ptr, correction_ptr,
                        low_rank_ptr, logits_ptr, temperatures_ptr, tops_ptr, places_ptr, totals_ptr, masses_ptr,
                        corrected, RESTRICTED, SAMPLED, CONFIDENT, LISTED, K, L, PARTS, SPAN, BLOCK_K, LOW_BLOCK,
                        BFLOAT16,
                    )  # fmt: skip
            if PHASE == ALL:
                grid_barrier(counter_ptr)
            if (PHASE == ALL) | (PHASE == CHOOSE):
                # One request's choice costs less than a barrier: every program makes it, and stores the same.
                start = 0 if ALONE else program
                for request in range(start, requests, 1 if ALONE else programs):
                    choose(
                        request, step, drafts, ids_ptr, logits_ptr, temperatures_ptr, uniform_ptr, tops_ptr, places_ptr,
                        totals_ptr, masses_ptr, choices_ptr, positions_ptr, confidence_ptr, RESTRICTED, SAMPLED,
                        CONFIDENT, LISTED, K, PARTS, PARTS_BLOCK, SPAN, BLOCK_SCAN,
                    )  # fmt: skip
            if PHASE == ALL:
                if ALONE:
                    tl.debug_barrier()
                else:
                    grid_barrier(counter_ptr)
            if SAMPLED:
                if (PHASE == ALL) | (PHASE == REPORT):
                    for item in range(program, requests * PARTS, programs):
                        report_part(
                            item, step, drafts, logits_ptr, temperatures_ptr, tops_ptr, totals_ptr, positions_ptr,
                            probs_ptr, K, PARTS, PARTS_BLOCK, SPAN, BLOCK_SCAN,
                        )  # fmt: skip
        elif (PHASE == ALL) | (PHASE == CHOOSE):
            # The argmax of base logits was found before the loop; again every program stores the same.
            for request in range(requests):
                slot = request * drafts + step
                tl.store(choices_ptr + slot, tl.load(ids_ptr + slot * LISTED))
            if PHASE == ALL:
                tl.debug_barrier()
