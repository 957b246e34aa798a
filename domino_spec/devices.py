"""The choice of a device, and how much of its memory is free."""

from __future__ import annotations

from pathlib import Path

import torch

from domino_spec.settings import UserError


def choose_device(device: torch.device | str) -> torch.device:
    """The device that a user names; "auto" is CUDA if PyTorch sees it, else the CPU.

    Raises:
        UserError: PyTorch sees no such CUDA device.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device {device} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, within the limit of this process's container; None if no source states it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except (OSError, ValueError):
        pass
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text("utf-8") for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return min(found) if found else None
