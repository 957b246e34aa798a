"""Time of the head rollout, from hidden states and base logits to token ids: kernels, reference, and released approach.

    python benchmarks/rollout.py --shape qwen3-8b --json rollout.json

Forms, all greedy, on the same random weights and inputs, measured in turn:

- `kernels`: candidates selected and all steps in one launch (`ops.triton.rollout`), in a CUDA graph;
- `reference`: the PyTorch loop over the same candidates, as decoding runs it without Triton;
- `released`: a CUDA graph of a loop of steps over the full vocabulary, where the GRU's input products W_ih E(v) of all
  tokens v were made beforehand and are looked up.

Tokens of kernels and reference must be equal, but for ties closer than the type's rounding, before anything is timed.
Between timings on CUDA the second-level cache is overwritten, as the target's weights do in a cycle. Without CUDA the
kernels run in Triton's interpreter, at a tiny shape: that shows that they work, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch.nn.functional as F
from torch import Tensor

from domino_spec.draft.config import HeadConfig
from domino_spec.draft.domino import DominoHead
from domino_spec.ops.heads import Draw, EmbeddingTable, HeadInputs, HeadWeights, head_rollout

FLUSHED_BYTES = 256 * 2**20
"""More than any second-level cache holds."""


@dataclass(frozen=True)
class Sizes:
    """Of a head and its target."""

    hidden: int
    gru: int
    low_rank: int
    vocabulary: int
    drafts: int
    candidates: int
    dtype: str


SHAPES = {
    "qwen3-8b": Sizes(4096, 1024, 256, 151936, 15, 512, "bfloat16"),
    "tiny": Sizes(16, 8, 4, 40, 3, 8, "float32"),
}


@dataclass(frozen=True)
class Inputs:
    """Everything a rollout reads."""

    head: DominoHead
    embedding: EmbeddingTable
    hidden: Tensor
    base_logits: Tensor
    anchor_embedding: Tensor


def bundled(inputs: Inputs) -> tuple[HeadWeights, HeadInputs]:
    """The same, as the rollouts take it."""
    block = HeadInputs(inputs.hidden, inputs.base_logits, inputs.anchor_embedding)
    return inputs.head.weights(inputs.embedding), block


def random_inputs(sizes: Sizes, requests: int, device: torch.device) -> Inputs:
    """A head that changes some of the base logits' best tokens."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, sizes.dtype)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    with device:
        config = HeadConfig(gru_hidden_dim=sizes.gru, low_rank=sizes.low_rank, pure_draft_prefix_len=1)
        head = DominoHead(config, sizes.hidden, sizes.vocabulary).to(dtype).requires_grad_(False)
    for weight in (head.prefix_gru.weight_ih_l0, head.prefix_gru.weight_hh_l0, head.input_weight):
        weight.copy_(noise(*weight.shape) / weight.shape[1] ** 0.5)
    head.correction_weight.copy_(noise(*head.correction_weight.shape) * 2 / sizes.low_rank**0.5)
    table = EmbeddingTable(noise(sizes.vocabulary, sizes.hidden), None, dtype)
    hidden = noise(requests, sizes.drafts, sizes.hidden)
    base_logits = noise(requests, sizes.drafts, sizes.vocabulary) * 3
    return Inputs(head, table, hidden, base_logits, noise(requests, sizes.hidden))


def input_product_table(inputs: Inputs, rows: int = 8192) -> Tensor:
    """W_ih E(v) for every token, [V, 3G]: what the released approach keeps in memory."""
    products = inputs.head.prefix_gru.input_gates
    return torch.cat([products(part) for part in inputs.embedding.weight.split(rows)])


def released_rollout(inputs: Inputs, table: Tensor) -> Tensor:
    """Greedy drafts [R, N] over the full vocabulary, step by step."""
    head, hidden = inputs.head, inputs.hidden
    gru, prefix = head.prefix_gru, head.config.pure_draft_prefix_len
    w1_hidden, w1_state = head.input_weight.split([hidden.shape[-1], head.config.gru_hidden_dim], dim=1)
    from_hidden = F.linear(hidden, w1_hidden)
    state = gru.cell(gru.input_gates(inputs.anchor_embedding), head.initial_state(len(hidden), like=hidden))
    choices = []
    for i in range(hidden.shape[1]):
        logits = inputs.base_logits[:, i]
        if i >= prefix:
            low_rank = F.silu(from_hidden[:, i] + F.linear(state, w1_state))
            logits = logits + F.linear(low_rank, head.correction_weight)
        choices.append(logits.argmax(-1))
        state = gru.cell(table[choices[-1]], state)
    return torch.stack(choices, dim=1)


def kernel_rollout(inputs: Inputs, candidates: int) -> Callable[[], Tensor]:
    """The Triton twin: fused on CUDA, phases of two programs in the interpreter."""
    from domino_spec.ops.triton import rollout as triton_twin

    options = {}
    if not inputs.hidden.is_cuda:
        config = inputs.head.config
        shape = triton_twin.Shape(
            *inputs.base_logits.shape, candidates, inputs.hidden.shape[-1], config.gru_hidden_dim, config.low_rank,
            inputs.hidden.dtype,
        )  # fmt: skip
        options["plan"] = triton_twin.Plan.of(shape, programs=2)
    given = bundled(inputs)
    return lambda: triton_twin.head_rollout_triton(*given, Draw(candidates), **options)[0]


def reference_rollout(inputs: Inputs, candidates: int) -> Callable[[], Tensor]:
    """The PyTorch loop."""
    given = bundled(inputs)
    return lambda: head_rollout(*given, Draw(candidates)).choices


def captured(form: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of `form`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            form()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = form()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def check_equal(inputs: Inputs, found: Tensor, expected: Tensor) -> int:
    """Drafts up to the first difference, of all requests; a difference that is no near tie is an error."""
    agree = (found == expected).long().cumprod(1)
    for request, count in enumerate(agree.sum(1).tolist()):
        if count == found.shape[1]:
            continue
        head, one = inputs.head, slice(request, request + 1)
        state = head.step(inputs.anchor_embedding[one], head.initial_state(1, like=inputs.hidden))
        for choice in expected[request, :count]:
            state = head.step(inputs.embedding(choice[None]), state)
        logits = (inputs.base_logits[one, count] + head.correction(inputs.hidden[one, count], state)).float()[0]
        gap = (logits[expected[request, count]] - logits[found[request, count]]).abs().item()
        allowed = 2 * torch.finfo(inputs.hidden.dtype).eps * logits.abs().max().item()
        if gap > allowed:
            raise SystemExit(f"kernels and reference differ at draft {count}: logits {gap:.3g} apart, no near tie")
        print(f"near tie at draft {count} of request {request}: logits {gap:.3g} apart")
    return int(agree.sum())


def measure(forms: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each form, taken in turn."""
    cuda = device.type == "cuda"
    flushed = torch.empty(FLUSHED_BYTES if cuda else 0, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + (5 if cuda else 0)):
        for name, form in forms.items():
            if cuda:
                flushed.fill_(repeat % 2)
                started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                started.record()
                form()
                ended.record()
                torch.cuda.synchronize()
                seconds[name].append(started.elapsed_time(ended) / 1e3)
            else:
                before = time.perf_counter()
                form()
                seconds[name].append(time.perf_counter() - before)
    return {name: median(values[-repeats:]) for name, values in seconds.items()}


@torch.no_grad()
def main() -> None:
    """Check, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50 if torch.cuda.is_available() else 1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.shape != "tiny":
        raise SystemExit("without CUDA only --shape tiny runs: kernels are interpreted")
    sizes = SHAPES[options.shape]
    inputs = random_inputs(sizes, options.requests, device)
    table = input_product_table(inputs)
    forms = {
        "kernels": kernel_rollout(inputs, sizes.candidates),
        "reference": reference_rollout(inputs, sizes.candidates),
        "released": lambda: released_rollout(inputs, table),
    }
    equal = check_equal(inputs, forms["kernels"](), forms["reference"]())
    recalled = (forms["released"]() == forms["reference"]()).long().cumprod(1).sum()
    if device.type == "cuda":
        forms |= {name: captured(forms[name]) for name in ("kernels", "released")}
    seconds = measure(forms, options.repeats, device)
    total = options.requests * sizes.drafts
    figures = {
        "shape": options.shape,
        **asdict(sizes),
        "requests": options.requests,
        "repeats": options.repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "interpreter on CPU (times mean nothing)",
        "torch": torch.__version__,
        "drafts_equal_to_reference": equal,
        "drafts_equal_to_full_vocabulary": int(recalled),
        "drafts_total": total,
        "seconds": seconds,
        "reference_over_kernels": seconds["reference"] / seconds["kernels"],
        "released_over_kernels": seconds["released"] / seconds["kernels"],
        "released_table_bytes": table.numel() * table.element_size(),
    }
    print(f"{options.shape}, {options.requests} requests, {figures['device']}, median of {options.repeats}")
    print(f"drafts before a difference: {equal} of {total} kernels/reference, {recalled} candidates/full vocabulary\n")
    print("| form | ms | over kernels | extra memory, GB |\n| --- | ---: | ---: | ---: |")
    for name, value in seconds.items():
        memory = figures["released_table_bytes"] / 1e9 if name == "released" else 0
        print(f"| {name} | {value * 1e3:.3f} | {value / seconds['kernels']:.2f} | {memory:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
