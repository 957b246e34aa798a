"""What a verify pass costs: chains and trees of several sizes against a plain step, measured in turn.

    python benchmarks/verify_cost.py --target smollm2-135m --threads 2 --context 256

A chain of N drafts and a tree of N drafts have the same N + 1 rows; what differs is the mask, and that the accepted
path of a tree is copied to where a chain's rows would be. The LM head over all rows is part of the pass.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from domino_spec.bench.breakdown import synthetic_context
from domino_spec.decoding.generate import prefill
from domino_spec.decoding.sampling import RandomStreams, SamplingSettings
from domino_spec.decoding.state import Proposal
from domino_spec.decoding.verify import commit, verify
from domino_spec.drafters.plain import PlainDecoding
from domino_spec.target.load import load_target


def proposals(chains: list[int], trees: list[int]) -> dict[str, Proposal]:
    """By name: nothing drafted, chains, and trees of which four prefixes are extended at each depth."""
    found = {"plain step": Proposal.empty(1, torch.device("cpu"))}
    for kind, sizes in (("chain", chains), ("tree", trees)):
        for size in sizes:
            tokens, counts = torch.arange(1, size + 1)[None], torch.tensor([size])
            parents = (torch.arange(size)[None] - 4).clamp(min=-1) if kind == "tree" else None
            found[f"{kind} of {size}"] = Proposal(tokens, counts, parents)
    return found


@torch.inference_mode()
def main() -> None:
    """Print a table: medians, and ratios to the plain step of the same round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--chains", type=int, nargs="*", default=[7, 8, 15])
    parser.add_argument("--trees", type=int, nargs="*", default=[11, 15, 59, 60])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, device="cpu")
    passes = proposals(options.chains, options.trees)
    drafter = PlainDecoding()
    drafter.max_drafts = max([*options.chains, *options.trees])  # the cache makes room for so many rows
    text = synthetic_context(target, options.context)
    settings, streams = SamplingSettings(), RandomStreams(torch.zeros(1, dtype=torch.long))
    state = prefill(target, [text], drafter, 1)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.repeats + 2):
        for name, proposal in passes.items():
            started = time.perf_counter()
            commit(state, verify(target, state, proposal, settings, streams))
            seconds[name].append(time.perf_counter() - started)
            state.lengths.fill_(len(text))
            state.cache.lengths.fill_(len(text) - 1)
    print(f"{options.target}, {options.threads} threads, context {options.context}, median of {options.repeats}\n")
    print("| pass | rows | ms | plain steps |\n| --- | ---: | ---: | ---: |")
    plain = seconds["plain step"][2:]
    for name, proposal in passes.items():
        ratios = [own / step for own, step in zip(seconds[name][2:], plain, strict=True)]
        rows = proposal.tokens.shape[1] + 1
        print(f"| {name} | {rows} | {median(seconds[name][2:]) * 1e3:.1f} | {median(ratios):.2f} |")


if __name__ == "__main__":
    main()
