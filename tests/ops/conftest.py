"""A process beside the tests' own in which Triton's kernels are interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest
import torch


def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of a test module there: once Triton is imported, it cannot be told to interpret any more."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(_one_thread).result()  # the process starts, and keeps the environment that it starts with
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
