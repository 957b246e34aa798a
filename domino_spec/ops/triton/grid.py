"""What kernels of several phases share: the barrier between phases, and rounding as PyTorch rounds.

A kernel of phases is written once and launched in two ways. On a GPU it is one launch of one program per
multiprocessor, all of them resident at once (a cooperative launch, which refuses to start otherwise), with
`grid_barrier` between phases. Elsewhere every phase is a separate launch: programs of Triton's interpreter run one
after another, so a barrier among several would wait forever (a single one passes it).

It imports Triton: import it only if Triton is installed.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""Stands for logits past the end and for -inf: its exponential is 0, its differences are finite."""
NOWHERE = tl.constexpr(2**30)
"""An index after every other."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def resident_programs(device: torch.device) -> int:
    """Programs that a GPU surely holds at once: one per multiprocessor, which fits 8 warps of any size."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def new_counters(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[count] zeros for programs to count in; never freed.

    While a CUDA graph is captured nothing is filled, and the graph would start them anew whenever it is replayed; so
    what uses them must have run once before it is captured.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    assert not capturing, "run this once with the same shapes before a CUDA graph captures it"
    return torch.zeros(count, dtype=dtype, device=device)


@triton.jit
def grid_barrier(counter_ptr):
    """Wait until every program of the launch is here, and see what all of them have written.

    `counter_ptr` is one int64 that only grows, by one per program and barrier; it starts at 0 and is never reset, so a
    launch needs no preparation. All launches on a counter must have the same number of programs.
    """
    programs = tl.num_programs(0)
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    goal = (before // programs + 1) * programs
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()


@triton.jit
def rounded(x, BFLOAT16: tl.constexpr):
    """Float32 `x`, rounded to the nearest bfloat16 if asked for; still float32.

    By hand, because the interpreter truncates and a GPU rounds.
    """
    if BFLOAT16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32."""
    return 1.0 / (1.0 + tl.exp(-x))
