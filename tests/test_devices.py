"""One choice of device, and one answer to how much of its memory is free."""

from __future__ import annotations

import pytest
import torch

from domino_spec.devices import choose_device, free_memory
from domino_spec.settings import UserError


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_cuda_if_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert choose_device("auto").type == ("cuda" if there else "cpu")
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees no CUDA device; use --device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(UserError, match="device cuda:2 was asked for, but PyTorch sees 2 CUDA devices"):
        choose_device("cuda:2")


def test_the_free_memory_of_this_machine_is_a_sensible_number():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
