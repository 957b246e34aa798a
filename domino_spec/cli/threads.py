"""How OpenMP's threads wait and how many there are, settled before PyTorch loads OpenMP.

PyTorch's Linux wheels carry GNU's OpenMP. Between two products its threads spin for some milliseconds; where another
process takes part of a core, the thread that everybody spins for is the one that does not run, and decoding falls to a
fraction. After 1000 turns of the loop (what GNU's OpenMP takes itself once it knows that there are more threads than
cores) a thread sleeps instead. On a quiet machine that costs nothing; OMP_WAIT_POLICY=passive, which never spins, costs
a fifth to a quarter (docs/log.md).

Only the command line does so: a library does not change its process's environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = 1000
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user may have said how threads wait."""


def settle_threads(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what the user has left open; nothing where PyTorch is loaded and would not hear of it."""
    if "torch" in sys.modules:
        return
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    environment.setdefault("OMP_NUM_THREADS", str(available_cores()))


def available_cores(system: Path = Path("/")) -> int:
    """Physical cores that this process may use: by its affinity, and by the quota of its control group.

    Args:
        system: where `proc` and `sys` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    processors = affinity(0) if affinity is not None else range(os.cpu_count() or 1)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    # Of two threads of a core only one counts: they share what computes.
    cores = len({_read(system / topology.format(cpu)) or str(cpu) for cpu in processors})
    return max(1, min(cores, int(_quota(system) or cores)))


def _quota(system: Path) -> float | None:
    """Processors' worth of time that control groups grant, the tightest on the way up; None for any."""
    found = []
    for line in (_read(system / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for directory in (root / group.strip("/"), *(root / group.strip("/")).parents):
            if not directory.is_relative_to(root):
                break
            limit = _read(directory / "cpu.max")
            if limit is None:
                limit = f"{_read(directory / 'cpu.cfs_quota_us') or 'max'} {_read(directory / 'cpu.cfs_period_us')}"
            quota, _, period = limit.partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(int(quota) / int(period))
    return min(found, default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
