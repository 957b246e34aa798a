"""A tiny target for static cycles, whose extents are short here."""

from __future__ import annotations

import pytest

from domino_spec.decoding.graphs import cycles as cycles_module
from tests.tiny import as_target, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def target(model):
    return as_target(model)


@pytest.fixture(autouse=True)
def small_extents(monkeypatch):
    """Short texts cross the borders of several extents."""
    monkeypatch.setattr(cycles_module, "STEP", 16)
