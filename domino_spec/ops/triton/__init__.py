"""The Triton kernels of a GPU. Its modules import Triton; this one only says whether it is installed."""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec

_log = logging.getLogger(__name__)


@functools.cache
def has_triton(what: str) -> bool:
    """Whether Triton is installed; if not, one warning is logged for each `what` that would use it."""
    found = find_spec("triton") is not None
    if not found:
        _log.warning("Triton is not installed; %s is computed by PyTorch, which is slower", what)
    return found
