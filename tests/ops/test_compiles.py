"""Without a GPU: every Triton kernel of decoding compiles for one, through the code that launches it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILED = ("_select_kernel", "rollout_kernel", "_greedy_kernel", "_sampled_kernel", "_context_kernel")
_COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    print(self.fn.__name__, kernel.metadata.launch_cooperative_grid, kernel.metadata.shared, len(kernel.asm["cubin"]))
    return kernel

driver.set_active(Hopper())
launch, JITFunction.run = JITFunction.run, compile_only
torch.empty = torch.zeros  # what no kernel has written must still be indices

from domino_spec.ops.triton import acceptance as acceptance_triton, context as context_triton, rollout as rollout_triton
from tests.ops import test_acceptance, test_context, test_rollout_triton

case = test_rollout_triton.Case(1, 4, 9, torch.bfloat16, (0.5,), confident=True, gru=64, low_rank=16)
shape = rollout_triton.Shape(1, 4, case.width, 9, case.hidden, case.gru, case.low_rank, case.dtype)
plan = rollout_triton.Plan.of(shape, 132)
rollout_triton.head_rollout_triton(*test_rollout_triton.bundled(case.inputs()), plan=plan, fused=True)
acceptance_triton.greedy_chain_triton(*test_acceptance.greedy_case(2, 3, 100))
given, _, _ = test_acceptance.with_numbers(test_acceptance.sampled_case(2, 2, 12, 12))
acceptance_triton.sampled_chain_triton(*given, programs=132)
keys, values, *rest = test_context.context_case(torch.bfloat16, 2, 16)
context_triton.write_context_triton_(keys[:, 1:4], values[:, 1:4], *rest)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert tuple(name for name, *_ in lines) == COMPILED
    for name, cooperative, shared, size in lines:
        # A kernel with barriers among all its programs must be launched so that all of them are resident.
        assert (cooperative == "True") == (name in ("_select_kernel", "rollout_kernel", "_sampled_kernel"))
        assert int(shared) <= 48 * 1024 and int(size) > 0
