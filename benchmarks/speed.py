"""All that this machine can say about a cycle's speed, by one command: what drafts cost, by number and by context.

    python benchmarks/speed.py --out runs/speed --prompts gsm8k.jsonl --prompts alpaca.jsonl
    python benchmarks/speed.py --out runs/qwen3-8b --shape qwen3-8b

- `drafts`: the cost ratio c (cycle / plain step) of chains of 2, 4, .. drafts and of the default tree, and the share of
  a cycle that drafting takes;
- `contexts`: c by length of the context, from 256 tokens to what the target knows;
- `batches`: c by number of requests;
- `rollout.py` (at the shape of Qwen3-8B where there is a GPU, else interpreted at a tiny one, as a check only), and
  `batch_sweep.py` where prompts are given: throughput with adaptive and fixed numbers of drafts.

With `--shape` the pair has random weights and knows contexts as long as are asked for; no texts are decoded.

Each is a ratio measured in one run, all parts in turn. A part whose file is there already is not measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from batch_sweep import numbers  # beside this program

from domino_spec.api import load_draft
from domino_spec.bench.page import Column, records_table
from domino_spec.bench.profile import MethodProfile, profile_cycles
from domino_spec.bench.shapes import check_memory, find_shape, make_pair, plan_pair
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import default_method
from domino_spec.files import write_json
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target

DRAFTING = ("context", "backbone", "lm_head", "rollout")
"""Stages of a cycle that are not the target's and not bookkeeping."""
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)
ROOM = 64
"""Tokens that a profile may add to a context."""


def drafting_share(method: MethodProfile) -> float:
    """Of a cycle's seconds, by medians."""
    return sum(stage.seconds.median for name, stage in method.stages.items() if name in DRAFTING) / method.cycle.median


COLUMNS = (
    Column("method (drafts)", lambda e: f"{e['method'].method} ({e['method'].num_drafts})"),
    Column("context", lambda e: str(e["profile"].context)),
    Column("R", lambda e: str(e["profile"].batch)),
    Column("plain step, ms", lambda e: f"{e['profile'].plain_step.median * 1e3:.1f}"),
    Column("cycle, ms", lambda e: f"{e['method'].cycle.median * 1e3:.1f}"),
    Column("c", lambda e: f"{e['profile'].cost_ratio(e['method']):.2f}"),
    Column("drafting", lambda e: f"{drafting_share(e['method']):.0%}"),
)
"""Of a profile and one of its methods that draft."""


class Part:
    """One part of the run: what is profiled, and the file that keeps it."""

    def __init__(self, out: Path, name: str, repeats: int) -> None:
        self.path, self.name, self.repeats = out / f"{name}.json", name, repeats

    def measure(self, target: Target, draft: AnyDraft, settings: Sequence[tuple[list, int, int]]) -> None:
        """Profile (methods, context, batch), one after the other, unless that was done."""
        if self.path.exists():
            print(f"{self.name}: {self.path} is there already", file=sys.stderr)
            return
        rows, records = [], []
        for methods, context, batch in settings:
            print(f"{self.name}: context {context}, {batch} together", file=sys.stderr)
            profile = profile_cycles(
                target, draft, methods, context=context, batch=batch, repeats=self.repeats, bandwidth=False
            )
            rows += [{"profile": profile, "method": method} for method in profile.methods if method.method != "none"]
            records.append(asdict(profile))
        write_json({"threads": torch.get_num_threads(), "profiles": records}, self.path)
        print(f"\n{self.name}\n\n{records_table(COLUMNS, rows)}\n")


def made_pair(name: str, longest: int) -> tuple[Target, AnyDraft]:
    """A pair of a shape that knows a context of `longest` tokens: time does not depend on what the weights say."""
    shape = find_shape(name)
    known = max(int(shape.target.get("max_position_embeddings", 0)), longest + ROOM + 1)
    plan = plan_pair(replace(shape, target={**shape.target, "max_position_embeddings": known}))
    check_memory(plan.weights, plan.device, f"the weights of {name}")
    return make_pair(plan)


def run_program(name: str, *arguments: str) -> None:
    """Another of these programs, in a process of its own."""
    subprocess.run([sys.executable, str(Path(__file__).with_name(name)), *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="smollm2-135m-domino")
    parser.add_argument("--shape", metavar="NAME|FILE", help="random weights of that shape, in place of the pair")
    parser.add_argument("--drafts", type=numbers, default=[2, 4, 8])
    parser.add_argument("--contexts", type=numbers, default=[*CONTEXTS])
    parser.add_argument("--batches", type=numbers, default=[*BATCHES])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--prompts", action="append", default=[], help="JSONL for batch_sweep.py, which is left out else"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shape is not None and options.prompts:
        parser.error("--prompts are decoded, which random weights cannot: leave out --shape or --prompts")
    if options.shape is None:
        target = load_target(options.target)
        draft: AnyDraft = load_draft(options.draft, target)
    else:
        target, draft = made_pair(options.shape, max(options.contexts))
    chain, tree = draft.kind, default_method(draft)
    both = [(chain, None), (tree, None)] if tree != chain else [(chain, None)]
    counts = [*((chain, n) for n in options.drafts), (tree, None)]
    contexts = [c for c in options.contexts if c + ROOM < target.max_length]
    Part(options.out, "drafts", options.repeats).measure(target, draft, [(counts, 256, 1)])
    Part(options.out, "contexts", options.repeats).measure(target, draft, [(both, c, 1) for c in contexts])
    Part(options.out, "batches", options.repeats).measure(target, draft, [(both, 256, b) for b in options.batches])
    pair = ["--target", options.target, "--draft", options.draft]
    shape = "qwen3-8b" if torch.cuda.is_available() else "tiny"
    run_program("rollout.py", "--shape", shape, "--json", str(options.out / "rollout.json"))
    if options.prompts:
        threads = ["--threads", str(options.threads)] if options.threads else []
        files = [argument for path in options.prompts for argument in ("--prompts", path)]
        run_program("batch_sweep.py", *pair, *threads, *files, "--out", str(options.out / "batch_sweep.json"))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
