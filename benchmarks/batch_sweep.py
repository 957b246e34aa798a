"""Throughput of R requests decoded together, against plain decoding in the same engine: adaptive and fixed drafts.

    python benchmarks/batch_sweep.py --prompts gsm8k.jsonl --prompts alpaca.jsonl \\
        --batch 1,2,4,8,16,32 --fixed 2,4,8 --groups 4 --max-new-tokens 64 --out sweep.json

Prompts are dealt into groups, taken from the files in turn. A group is twice as many requests as fit into the engine
(four at least), so that slots are used again. Every method has a separate engine, and the one that has generated
least goes on: all get through a group side by side, cycle by cycle, and what disturbs the machine disturbs all alike.
Throughput is generated tokens per second of decoding while every slot is in use: at its end a group has fewer and fewer
requests, sooner with drafts, which help some more than others, and would say little about many. The seconds of reading
prompts, which all methods spend alike, and those of whole groups are kept beside it. A ratio is of all groups together;
its 95% interval resamples groups.

`adaptive` has the cost model that is measured at the start, shared by all its runs, as a server has. Texts are compared
with those of plain decoding, request by request.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path

import torch

from domino_spec.api import default_min_confidence, load_draft, prompt_ids
from domino_spec.bench.figures import Draws, Sums, with_intervals
from domino_spec.bench.page import Column, figure_column, number_column, records_table, text_column
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.policy.adaptive import AdaptivePolicy
from domino_spec.decoding.policy.costs import measure_costs
from domino_spec.decoding.request import Generation, Limits, Request
from domino_spec.drafters.methods import TREE_BUDGET, default_method, make_drafter
from domino_spec.files import read_jsonl, write_json
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target

PLAIN, ADAPTIVE = "none", "adaptive"


@dataclass(frozen=True)
class Run:
    """One group decoded by one method."""

    batch: int
    group: int
    method: str
    requests: int
    tokens: int
    seconds: float
    """Without those of reading prompts."""
    full_tokens: int
    """Of the time in which every slot was in use."""
    full_seconds: float
    read_seconds: float
    passes: int
    """Verify passes of single requests."""
    committed: int
    drafts: int
    cycles: int
    drafted_cycles: int
    equal_texts: int
    """Texts that equal those of plain decoding."""


@dataclass
class Lane:
    """One method on its way through a group."""

    engine: Engine
    generations: Sequence[Generation]
    seconds: float = 0.0
    """Of its steps, without reading prompts."""
    full_tokens: int = 0
    full_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return sum(generation.num_tokens for generation in self.generations)

    def step(self) -> None:
        """One step of its engine."""
        full = sum(generation.finish_reason is None for generation in self.generations) >= self.engine.slots
        before, read = self.tokens, self.engine.stats.read_seconds
        started = time.perf_counter()
        self.engine.step()
        spent = time.perf_counter() - started - (self.engine.stats.read_seconds - read)
        self.seconds += spent
        if full:
            self.full_tokens += self.tokens - before
            self.full_seconds += spent


class Sweep:
    """What is shared by all runs."""

    def __init__(self, target: Target, draft, fixed: Sequence[int], max_new_tokens: int, slots: int) -> None:
        self.target, self.draft, self.max_new_tokens = target, draft, max_new_tokens
        self.methods = [PLAIN, ADAPTIVE, *map(str, fixed)]
        print("measuring what passes cost", file=sys.stderr)
        self.costs = measure_costs(target, self._drafter(ADAPTIVE), slots, report=lambda s: print(s, file=sys.stderr))
        self.policies: dict[int, AdaptivePolicy] = {}

    def _drafter(self, method: str):
        budget = TREE_BUDGET if method == ADAPTIVE else 0 if method == PLAIN else int(method)
        return make_drafter(
            default_method(None if method == PLAIN else self.draft),
            self.draft,
            requests=1,
            device=self.target.device,
            min_confidence=default_min_confidence(self.target.device) if method == ADAPTIVE else 0.0,
            num_drafts=budget or None,
        )

    def lane(self, method: str, batch: int, prompts: Sequence[list[int]]) -> Lane:
        """A group to be decoded by one method."""
        policy = self.policies.setdefault(batch, AdaptivePolicy(self.costs)) if method == ADAPTIVE else None
        capacity = max(map(len, prompts)) + self.max_new_tokens
        engine = Engine(self.target, self._drafter(method), slots=batch, capacity=capacity, policy=policy)
        return Lane(engine, [engine.submit(Request(p, limits=Limits(self.max_new_tokens))) for p in prompts])

    def group(self, batch: int, group: int, prompts: Sequence[list[int]]) -> list[Run]:
        """Decode a group by every method, side by side."""
        turn = group % len(self.methods)  # who goes first where several are as far
        lanes = {m: self.lane(m, batch, prompts) for m in [*self.methods[turn:], *self.methods[:turn]]}
        while busy := [lane for lane in lanes.values() if lane.engine.busy]:
            min(busy, key=lambda lane: lane.tokens).step()
        plain = [g.token_ids for g in lanes[PLAIN].generations]
        return [
            Run(
                batch,
                group,
                method,
                len(prompts),
                lane.tokens,
                lane.seconds,
                lane.full_tokens,
                lane.full_seconds,
                stats.read_seconds,
                stats.verify_passes,
                stats.committed_tokens,
                stats.drafts,
                stats.cycles,
                stats.drafted_cycles,
                sum(g.token_ids == text for g, text in zip(lane.generations, plain, strict=True)),
            )
            for method in self.methods
            for lane in [lanes[method]]
            for stats in [lane.engine.stats]
        ]


def deal(prompts: Sequence[list[int]], batch: int, groups: int) -> list[list[list[int]]]:
    """Groups of prompts, from the first on again where they run out."""
    size = max(4, 2 * batch)
    return [[prompts[(g * size + i) % len(prompts)] for i in range(size)] for g in range(groups)]


def summarize(runs: Sequence[Run]) -> list[dict]:
    """One entry for every number of requests and method."""
    entries = []
    for batch in dict.fromkeys(run.batch for run in runs):
        mine = [run for run in runs if run.batch == batch]
        clusters = {run.group: ("group", str(run.group)) for run in mine}
        draws = Draws.of(clusters.values())
        rates = {}
        for method in dict.fromkeys(run.method for run in mine):
            of_method = [run for run in mine if run.method == method]
            amounts = [(clusters[r.group], (r.full_tokens, r.full_seconds)) for r in of_method]
            rates[method] = Sums(("tokens", "seconds"), amounts, draws).ratio("tokens", "seconds")
            plain = [run for run in mine if run.method == PLAIN]
            whole = sum(r.tokens for r in of_method) / sum(r.seconds for r in of_method)
            entries.append(
                {
                    "batch": batch,
                    "method": method,
                    "tokens_per_second": rates[method].value,
                    **with_intervals({"over_plain": rates[method] / rates[PLAIN]}),
                    "whole_groups_over_plain": whole / (sum(r.tokens for r in plain) / sum(r.seconds for r in plain)),
                    "tau": sum(r.committed for r in of_method) / sum(r.passes for r in of_method),
                    "drafts_per_pass": sum(r.drafts for r in of_method) / sum(r.passes for r in of_method),
                    "drafted_cycles": sum(r.drafted_cycles for r in of_method) / sum(r.cycles for r in of_method),
                    "equal_texts": f"{sum(r.equal_texts for r in of_method)} of {sum(r.requests for r in of_method)}",
                }
            )
    return entries


COLUMNS = (
    text_column("R", "batch"),
    text_column("drafts", "method"),
    number_column("tokens/s", "tokens_per_second", 1),
    figure_column("over plain", "over_plain"),
    number_column("whole groups", "whole_groups_over_plain"),
    number_column("tau", "tau"),
    number_column("drafts a pass", "drafts_per_pass", 1),
    Column("drafted cycles", lambda entry: f"{entry['drafted_cycles']:.0%}"),
    text_column("equal texts", "equal_texts"),
)


def numbers(text: str) -> list[int]:
    """Of a list such as 1,2,4."""
    found = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 on, such as 1,2,4, got {text!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="smollm2-135m-domino")
    parser.add_argument("--prompts", action="append", required=True, type=Path, help='JSONL of {"turns": [..]}')
    parser.add_argument("--batch", type=numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--fixed", type=numbers, default=[2, 4, 8], help="fixed numbers of drafts, as trees")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    target = load_target(options.target)
    draft = load_draft(options.draft, target)
    texts = [[row["turns"][0] for row in read_jsonl(path, {})] for path in options.prompts]
    in_turn = [text for text in chain.from_iterable(zip_longest(*texts)) if text is not None]
    prompts = [prompt_ids(target, text) for text in in_turn]
    sweep = Sweep(target, draft, options.fixed, options.max_new_tokens, max(options.batch))
    sweep.group(1, 0, [prompts[0][:16]])  # warm-up
    runs: list[Run] = []
    for group in range(options.groups):  # all sizes in turn, so that drift hits them alike
        for batch in options.batch:
            runs += sweep.group(batch, group, deal(prompts, batch, options.groups)[group])
            print(f"group {group + 1} of {options.groups}, {batch} together: done", file=sys.stderr)
            entries = summarize(runs)
            record = {
                "target": options.target,
                "draft": options.draft,
                "threads": torch.get_num_threads(),
                "max_new_tokens": options.max_new_tokens,
                "costs": asdict(sweep.costs),
                "summary": entries,
                "runs": [asdict(run) for run in runs],
            }
            write_json(record, options.out)
    print(records_table(COLUMNS, summarize(runs)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
