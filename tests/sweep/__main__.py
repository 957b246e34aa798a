"""`python -m tests.sweep`: the outcome of every family, or of those named; `--write FILE` puts the table into FILE."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.sweep.families import families
from tests.sweep.run import run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("families", nargs="*", help="families to run; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--failures", action="store_true", help="print failures only")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    for outcome, seconds in run_all(options.families or families(), options.jobs):
        counts[outcome.kind] += 1
        if not (options.failures and outcome.passed):
            draft = f"  (drafts refused: {outcome.drafts})" if outcome.drafts else ""
            print(f"{outcome.family:28} {outcome.kind:10} {seconds:5.1f} s  {outcome.detail}{draft}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    return 0 if set(counts) <= {"equal", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
