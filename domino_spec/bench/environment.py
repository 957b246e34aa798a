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
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
