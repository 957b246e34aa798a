"""One server for the tests that ask and do not break anything."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("openai")

from tests import tiny
from tests.serve.running import serving, word_target


@pytest.fixture(scope="package")
def words():
    """A target of words."""
    return word_target()


@pytest.fixture(scope="package")
def draft(words):
    """A Domino draft for it."""
    return tiny.tiny_draft(words)


@pytest.fixture(scope="package")
def server(words, draft):
    """A server of both that adapts the number of drafts, as it does by default."""
    with serving(words, draft, capacity=128) as running:
        yield running
