"""Packages that one task needs beyond decoding: the extras of pyproject.toml, asked for when the task begins.

A command asks before it imports PyTorch, so that what is missing is said at once and not after seconds of loading.
"""

from __future__ import annotations

import importlib.util

from domino_spec.config import UserError

EXTRAS = {
    "demo": ("accelerate", "gguf"),
    "train": ("tensorboard", "matplotlib"),
    "bench": ("matplotlib", "markdown-it-py"),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
}
"""Packages by extra, under the names that pip knows."""
_MODULES = {"markdown-it-py": "markdown_it"}
"""What is imported, for packages of another name."""


def missing_packages(extra: str) -> list[str]:
    """Those packages of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def require(extra: str, task: str) -> None:
    """Refuse a task whose packages are not installed.

    Args:
        extra: a key of `EXTRAS`.
        task: what needs it, for the message.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    missing = missing_packages(extra)
    if missing:
        is_not = "which is not installed" if len(missing) == 1 else "which are not installed"
        raise UserError(f"{task} needs {', '.join(missing)}, {is_not}: pip install {' '.join(EXTRAS[extra])}")
