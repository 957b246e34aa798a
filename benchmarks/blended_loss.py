"""Time and peak memory of the blended loss: all logits at once, in chunks, and in chunks through the compiled rows.

    python benchmarks/blended_loss.py --rows 1024 --vocabulary 49152 --hidden 576 --rank 128 --objective kl

Each form runs in a process of its own, so that its peak memory is its own. A step is forward and backward of the loss
alone, from hidden states; the least time of `--repeats` is shown, as a ratio to the first form.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch

from domino_spec.ops import blended
from domino_spec.training import loss
from domino_spec.training.loss import OBJECTIVES, blended_loss_reference

FORMS = {
    "all logits at once": "reference",
    "in chunks, PyTorch rows": "torch",
    "in chunks, compiled rows": "compiled",
}


def measure(form: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds a step and megabytes at the peak beyond the inputs."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    terms = OBJECTIVES[arguments.objective]
    rows, vocabulary = arguments.rows, arguments.vocabulary
    hidden, low_rank = noise(rows, arguments.hidden), noise(rows, arguments.rank)
    lm_head, correction = noise(vocabulary, arguments.hidden) * 0.05, noise(vocabulary, arguments.rank) * 0.05
    target_hidden = noise(rows, arguments.hidden) if terms.needs_target else None
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    weights = torch.rand(rows, generator=generator, device=device)
    trained = [x.requires_grad_() for x in (hidden, low_rank, correction)]
    if form == "torch":
        loss.blended_rows_ = blended.blended_rows_torch_
    function = blended_loss_reference if form == "reference" else loss.blended_loss

    def step() -> None:
        for x in trained:
            x.grad = None
        function(hidden, low_rank, labels, weights, lm_head, correction, 0.5, target_hidden, terms).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    before = _peak(device)
    seconds = []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "megabytes": (_peak(device) - before) / 2**20}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure every form and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--objective", choices=OBJECTIVES, default="cross_entropy")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--form", choices=FORMS.values(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments)))
        return
    first = None
    print(f"{'form':<26} {'ms a step':>10} {'ratio':>6} {'peak MB':>8}")
    for name, form in FORMS.items():
        command = [sys.executable, *sys.argv, "--form", form]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        result = json.loads(done.stdout.splitlines()[-1])
        first = first or result["seconds"]
        ratio = result["seconds"] / first
        print(f"{name:<26} {result['seconds'] * 1e3:>10.1f} {ratio:>6.2f} {result['megabytes']:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
