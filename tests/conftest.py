"""Shared fixtures: tiny models made once per session, and one thread so that runs repeat bit for bit."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would fail, not wait
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does (cli.threads): machines are shared
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_are_put_back():
    """A command with --threads sets them for this whole process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model():
    """A random Llama with transformers' own attention."""
    return tiny.tiny_model()


@pytest.fixture(scope="session")
def target(model):
    """The same weights behind this package's engine, without a tokenizer."""
    return tiny.as_target(model)


@pytest.fixture(scope="session")
def text_target(model):
    """The same again with a tokenizer of one word per token."""
    return tiny.as_target(model, tiny.word_tokenizer())
