"""Domino: lossless speculative decoding with a parallel draft and a causal correction (arXiv 2605.29707).

The names below are imported on first use: PyTorch and transformers take seconds, and `domino-spec --help` needs
neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domino_spec.api import generate, load_draft, stream
    from domino_spec.decoding.engine import Engine
    from domino_spec.decoding.request import Generation, Limits, Request
    from domino_spec.decoding.sampling import SamplingSettings
    from domino_spec.settings import UserError
    from domino_spec.target.load import load_target

__all__ = [
    "Engine",
    "Generation",
    "Limits",
    "Request",
    "SamplingSettings",
    "UserError",
    "generate",
    "load_draft",
    "load_target",
    "stream",
]
__version__ = "0.1.0"

_HOMES = {
    "Engine": "domino_spec.decoding.engine",
    "Generation": "domino_spec.decoding.request",
    "Limits": "domino_spec.decoding.request",
    "Request": "domino_spec.decoding.request",
    "SamplingSettings": "domino_spec.decoding.sampling",
    "UserError": "domino_spec.settings",
    "generate": "domino_spec.api",
    "load_draft": "domino_spec.api",
    "load_target": "domino_spec.target.load",
    "stream": "domino_spec.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
