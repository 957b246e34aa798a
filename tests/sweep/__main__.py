"""`python -m tests.sweep`: the outcome of every family, or of those named; `--write` puts the table on its page."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.metadata import version
from pathlib import Path

from tests.sweep import table
from tests.sweep.families import families
from tests.sweep.run import run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("families", nargs="*", help="families to run; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--failures", action="store_true", help="print failures only")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=table.PAGE, metavar="FILE", help="write all outcomes into the page"
    )
    options = parser.parse_args()
    if options.write and options.families:
        parser.error("--write needs the outcomes of all families")
    outcomes = []
    for outcome, seconds in run_all(options.families or families(), options.jobs):
        outcomes.append(outcome)
        if not (options.failures and outcome.passed):
            draft = f"  (drafts refused: {outcome.drafts})" if outcome.drafts else ""
            print(f"{outcome.family:28} {outcome.kind:10} {seconds:5.1f} s  {outcome.detail}{draft}", flush=True)
    counts = Counter(outcome.kind for outcome in outcomes)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if options.write:
        table.write(outcomes, version("transformers"), options.write)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
