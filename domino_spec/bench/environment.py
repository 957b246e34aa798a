"""What a measurement was made with: command, commit, versions, machine. Recorded beside it, never part of it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def session(rows_before: int) -> dict[str, Any]:
    """One stretch of measuring, for settings.json.

    Args:
        rows_before: rows that the bench held when it started.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows_before": rows_before,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "threads": thread_settings(),
        **load(),
    }


THREAD_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_")


def thread_settings() -> dict[str, Any]:
    """What decides how PyTorch's threads run on a CPU, which can change a ratio several times over."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREAD_VARIABLES)}
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "num_threads": torch.get_num_threads(),
        "processors": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "cpu": cpu_name(),
        "environment": variables,
    }


Load = dict[str, float | None]


def load() -> Load:
    """What else the machine is doing: processes that want to run, and seconds that a hypervisor gave to others.

    `load_average` is the mean over the last minute, this process included. `steal_seconds` is counted over all
    processors since the machine started: what two counts differ by was lost between them.
    """
    average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    steal = None
    try:
        first = Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()
        if first[0] == "cpu" and len(first) > 8:
            steal = int(first[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        pass
    return {"load_average": average, "steal_seconds": steal}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("domino-spec", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of this package's checkout, `-dirty` where files differ; None where there is no checkout."""
    checkout = Path(__file__).resolve().parents[2]
    try:
        top, head, changes = (
            subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (
                ("rev-parse", "--show-toplevel"),
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    if Path(top) != checkout:  # installed into an environment inside somebody else's repository
        return None
    return f"{head}-dirty" if changes else head


def device_name(device: torch.device) -> str:
    """The hardware behind a device, as its vendor calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor, as its vendor calls it, and how many there are."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
