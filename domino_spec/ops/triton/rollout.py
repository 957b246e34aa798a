"""The Triton twin of `heads.head_rollout`: all steps of the head in one persistent launch.

Before it, everything that does not wait for a drafted token: the K best base logits of every slot (`select`),
the slots' share of W1, and the GRU's input products W_ih E(token) of the few best tokens of every slot, in one product
each. A product of up to 64 rows costs what one row costs, since it reads W_ih once; so the more rows, the rarer a token
whose product must be made inside the loop.

Inside, per step (`rollout_phases`): GRU, low rank, scores, choice. Between them all programs meet: three times a step
for one request, where every program chooses for itself from the parts' largest; four times for several, where the
choices are shared out. A meeting costs about a microsecond, so 15 steps spend some 45 of them waiting.

What is read where, for the shape of Qwen3-8B in bfloat16 (G 1024, L 256, K 512): a program holds its rows of W_hh (48
KB of 6.3 MB) and of W1 (4 KB) in registers for all steps. Of W2 a step reads the candidates' rows, 0.26 MB of 78, known
beforehand and loaded while the low rank is still being made. What is shared between programs (state, low rank, the
parts' largest) is a few KB and stays in L2, as does W_ih (25 MB), read by the product just before, for tokens whose
product is missing.

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from domino_spec.ops.triton.grid import interpreted, new_counters, resident_programs
from domino_spec.ops.triton.rollout_kernel import ALL, CHOOSE, GRU, LOW_RANK, REPORT, SCORE, rollout_kernel
from domino_spec.ops.triton.select import SelectPlan, SelectWorkspace, select_best

if TYPE_CHECKING:
    from domino_spec.ops.heads import Draw, HeadInputs, HeadWeights

HELD_BYTES = 96 * 1024
"""Of W_hh, that a program of 8 warps keeps in registers: of 256 KB, 96 registers a thread."""
_TILE = 8192
"""Numbers of W2 or W1 that a program works on at once: 32 a thread."""
_AHEAD_ROWS = 64
"""Rows of the input product before the loop: a full tile of the matrix units."""
_MOST_AHEAD = 8


@dataclass(frozen=True)
class Shape:
    """What decides how a rollout is spread over programs."""

    requests: int
    drafts: int
    width: int
    """V."""
    candidates: int | None
    """K, less than V; None for the full vocabulary."""
    hidden: int
    gru: int
    low_rank: int
    dtype: torch.dtype
    """Of weights and logits."""

    @property
    def scored(self) -> int:
        """Tokens of a slot that can be drafted."""
        return self.candidates or self.width


@dataclass(frozen=True)
class Plan:
    """How a rollout is spread over programs: block sizes are powers of two, and all programs fit a GPU at once."""

    programs: int
    select: SelectPlan
    ahead: int
    """Best tokens of every slot whose input product is made before the loop."""
    listed: int
    """Best tokens of every slot that are looked for: the candidates, or for the full vocabulary those of `ahead`."""
    block_g: int
    """Units of the GRU that a program updates together."""
    block_l: int
    """Numbers of the low rank that a program makes together."""
    block_h: int
    """Columns of W_ih that are read together."""
    parts: int
    """Parts of the candidates of a request."""
    span: int
    """Candidates of a part, a multiple of `block_k`."""
    block_k: int
    held: bool
    """Whether every program keeps its rows of W_hh and W1 in registers; else they are read at every step."""
    early: bool
    """Whether every program has one block of W2's rows a step, loaded before the low rank is made."""

    @staticmethod
    def of(shape: Shape, programs: int) -> Plan:
        """For a shape that `suits` on so many programs."""
        rows = shape.requests * shape.drafts
        ahead = max(1, min(_MOST_AHEAD, shape.scored, _AHEAD_ROWS // max(1, rows)))
        state, size = triton.next_power_of_2(shape.gru), shape.dtype.itemsize
        block_g = triton.next_power_of_2(triton.cdiv(shape.gru, programs))
        block_g = min(block_g, _power_below(HELD_BYTES // (3 * state * size)))
        block_l = triton.next_power_of_2(triton.cdiv(shape.low_rank, programs))
        block_l = min(block_l, _power_below(_TILE // state))
        slices = max(triton.cdiv(shape.gru, block_g), triton.cdiv(shape.low_rank, block_l))
        span = triton.cdiv(shape.scored, max(1, programs // shape.requests))
        block_k = min(triton.next_power_of_2(span), _power_below(_TILE // triton.next_power_of_2(shape.low_rank)))
        span = triton.cdiv(span, block_k) * block_k
        parts = triton.cdiv(shape.scored, span)
        return Plan(
            programs=programs,
            select=SelectPlan.of(rows, shape.width, shape.dtype, programs),
            ahead=ahead,
            listed=shape.candidates or ahead,
            block_g=block_g,
            block_l=block_l,
            block_h=min(triton.next_power_of_2(shape.hidden), max(16, 4096 // block_g)),
            parts=parts,
            span=span,
            block_k=block_k,
            held=slices <= programs,
            early=span == block_k and shape.requests * parts <= programs,
        )


def suits(gru: int, low_rank: int, dtype: torch.dtype) -> bool:
    """Whether a row of W_hh's three gates, of W1 and of W2 fit where they must."""
    state = triton.next_power_of_2(gru)
    narrow = 3 * state * dtype.itemsize <= HELD_BYTES and state <= _TILE
    return narrow and triton.next_power_of_2(low_rank) <= _TILE and dtype in (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Workspace:
    """Memory of one rollout, reused by the next of the same shape on the same stream."""

    select: SelectWorkspace
    states: Tensor
    """[2, R, G] float32: steps read one and write the other."""
    low_rank: Tensor
    """[R, L] float32."""
    logits: Tensor
    """[R, K] float32, final logits of the current step; needed by draws."""
    tops: Tensor
    """[R, parts] float32, largest of each part."""
    places: Tensor
    """[R, parts] int32, where it is."""
    totals: Tensor
    """[R, parts] float64, sum of exponentials at the draft's temperature."""
    masses: Tensor
    """[R, parts] float32, the same at temperature 1."""
    positions: Tensor
    """[R] int32, drawn positions of the current step."""
    counter: Tensor
    """[1] int64, of the barrier."""

    @staticmethod
    def allocate(shape: Shape, plan: Plan, device: torch.device) -> Workspace:
        """Memory for rollouts of this shape."""
        requests = shape.requests
        floats: dict[str, Any] = dict(dtype=torch.float32, device=device)
        return Workspace(
            select=SelectWorkspace.allocate(plan.select, requests * shape.drafts, plan.listed, device),
            states=torch.empty(2, requests, shape.gru, **floats),
            low_rank=torch.empty(requests, shape.low_rank, **floats),
            logits=torch.empty(requests, shape.scored, **floats),
            tops=torch.empty(requests, plan.parts, **floats),
            places=torch.empty(requests, plan.parts, dtype=torch.int32, device=device),
            totals=torch.empty(requests, plan.parts, dtype=torch.float64, device=device),
            masses=torch.empty(requests, plan.parts, **floats),
            positions=torch.empty(requests, dtype=torch.int32, device=device),
            counter=new_counters(1, torch.int64, device),
        )


# Never given back: a CUDA graph keeps using the memory it was captured with.
_workspace = functools.cache(Workspace.allocate)


@torch.no_grad()
def head_rollout_triton(
    head: HeadWeights,
    block: HeadInputs,
    how: Draw,
    *,
    plan: Plan | None = None,
    workspace: Workspace | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`heads.head_rollout` on a GPU, without waiting for the device: a CUDA graph can capture it, after one run.

    Differences: equal final logits go to the candidate with the larger base logit, of equal ones to the lower index
    (the reference takes them in the order of `topk`, which is any); N never shrinks. Values in bfloat16 are rounded
    where the reference rounds them, after float32 sums in another order. If the two largest final logits, or a number
    that draws and the edge of a token's share, lie within such a rounding of each other, the choice may differ.

    Args:
        head: its `embed_choice` is an `EmbeddingTable`.
        block: of the head's type.
        how: drafts are chosen.
        plan: None for one program on every multiprocessor.
        workspace: None for one that is kept for the shape; rollouts at the same time need one each.
        fused: all steps in one launch (None: on a GPU), or one launch per phase.

    Returns:
        The fields of a `Rollout`.
    """
    hidden, base_logits, candidates, uniform = block.hidden, block.base_logits, how.candidates, how.uniform
    requests, drafts, width = base_logits.shape
    embedding: Any = head.embed_choice
    hidden_width, prefix = hidden.shape[-1], head.pure_draft_prefix_len
    restricted = candidates is not None and candidates < width
    shape = Shape(
        requests, drafts, width, candidates if restricted else None, hidden_width, head.state_gates.shape[1],
        len(head.to_low_rank), base_logits.dtype,
    )  # fmt: skip
    assert suits(shape.gru, shape.low_rank, shape.dtype)
    assert hidden.dtype == base_logits.dtype == head.to_low_rank.dtype == embedding.dtype
    device = hidden.device
    sampled, confident = uniform is not None, how.min_confidence > 0
    choices = torch.empty(requests, drafts, dtype=torch.int64, device=device)
    probs = torch.empty(requests, drafts, shape.scored, device=device) if sampled else None
    confidence = torch.empty(requests, drafts, device=device) if confident else None
    if drafts == 0 or requests == 0:
        ids = torch.empty(requests, drafts, shape.scored, dtype=torch.int64, device=device)
        return choices, ids if sampled else None, probs, confidence

    fused = not interpreted() if fused is None else fused
    plan = plan or Plan.of(shape, resident_programs(device))
    workspace = workspace or _workspace(shape, plan, device)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        values, ids = select_best(base_logits, plan.listed, plan.select, workspace.select, plan.programs, fused)
        from_hidden = F.linear(hidden, head.to_low_rank[:, :hidden_width]).contiguous()  # [R, N, L]
        tokens = embedding(ids[:, :-1, : plan.ahead].flatten(1))  # [R, (N - 1) * ahead, H]
        products = F.linear(torch.cat((block.anchor_embedding[:, None], tokens), dim=1), head.input_gates)
        base = values if restricted else base_logits
        nothing = workspace.tops  # stands for what is missing, and is never read
        tensors = dict(
            hidden_weight_ptr=head.state_gates, low_rank_weight_ptr=head.to_low_rank,
            input_weight_ptr=head.input_gates, correction_ptr=head.correction,
            table_ptr=embedding.weight, token_ids_ptr=ids if embedding.token_ids is None else embedding.token_ids,
            base_ptr=base, ids_ptr=ids, from_hidden_ptr=from_hidden, products_ptr=products,
            temperatures_ptr=how.temperatures(requests, device).contiguous() if sampled else nothing,
            uniform_ptr=workspace.totals if uniform is None else uniform.contiguous(),
            choices_ptr=choices, probs_ptr=nothing if probs is None else probs,
            confidence_ptr=nothing if confidence is None else confidence,
            states_ptr=workspace.states, low_rank_ptr=workspace.low_rank, logits_ptr=workspace.logits,
            tops_ptr=workspace.tops, places_ptr=workspace.places, totals_ptr=workspace.totals,
            masses_ptr=workspace.masses, positions_ptr=workspace.positions, counter_ptr=workspace.counter,
        )  # fmt: skip
        assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors.values())
        weights = (head.input_gates, head.state_gates, head.to_low_rank, head.correction, embedding.weight)
        assert all(weight.is_contiguous() for weight in weights)
        sizes = dict(
            request_stride=base.stride(0), draft_stride=base.stride(1), scale=float(embedding.scale),
            requests=requests, drafts=drafts,
            RESTRICTED=restricted, SAMPLED=sampled, CONFIDENT=confident, ALONE=requests == 1,
            HAS_IDS=embedding.token_ids is not None,
            BFLOAT16=shape.dtype == torch.bfloat16, TABLE_BFLOAT16=embedding.weight.dtype == torch.bfloat16,
            H=hidden_width, G=shape.gru, L=shape.low_rank, K=shape.scored, LISTED=plan.listed, AHEAD=plan.ahead,
            HELD=plan.held, EARLY=plan.early, SPAN=plan.span, BLOCK_K=plan.block_k,
            PREFIX=prefix, SCORED_FROM=0 if sampled or confident else prefix, PARTS=plan.parts,
            BLOCK_G=plan.block_g, BLOCK_L=plan.block_l, BLOCK_H=plan.block_h,
            BLOCK_S=triton.next_power_of_2(shape.gru), LOW_BLOCK=triton.next_power_of_2(shape.low_rank),
            AHEAD_BLOCK=triton.next_power_of_2(plan.ahead), PARTS_BLOCK=triton.next_power_of_2(plan.parts),
            BLOCK_SCAN=min(1024, triton.next_power_of_2(plan.span)), num_warps=8,
        )  # fmt: skip
        if fused:
            cooperative = {} if interpreted() else {"launch_cooperative_grid": True}
            given = dict(tensors, **sizes, **cooperative)
            rollout_kernel[(plan.programs,)](**given, step_from=0, step_to=drafts, PHASE=ALL.value)
        else:
            _launch_phases(plan.programs, drafts, dict(tensors, **sizes))
    if not sampled:
        return choices, None, None, confidence
    if not restricted:
        ids = torch.arange(width, device=device).expand(requests, drafts, -1)
    return choices, ids, probs, confidence


def _launch_phases(programs: int, drafts: int, given: dict) -> None:
    """What the fused kernel does, with a launch for every phase of every step."""
    for step in range(drafts):
        for phase in (GRU, LOW_RANK, SCORE, CHOOSE, REPORT):
            rollout_kernel[(programs,)](**given, step_from=step, step_to=step + 1, PHASE=phase.value)


def _power_below(n: int) -> int:
    """The largest power of two that is at most n, at least 1."""
    return 1 << max(0, n.bit_length() - 1)
