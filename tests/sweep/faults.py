"""Planted faults: what the sweep must report if attention, masks, norms or the process itself are broken.

Each function is a trial for `run_family`: it runs in a process of its own, so what it breaks stays broken there only.
The check at load is off, since it would refuse the target before its text is compared.
"""

from __future__ import annotations

import ctypes
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from domino_spec.target import cache as attention
from domino_spec.target import model
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from tests.sweep.judge import Outcome, judge

unchecked = partial(load_target, device="cpu", check=False)


def nothing(family: str) -> Outcome:
    """No fault: what the others are compared with."""
    return judge(family, unchecked)


def argument_ignored(name: str, family: str) -> Outcome:
    """Attention that swallows an argument: sinks (`s_aux`), a cap (`softcap`), the factor of scores (`scaling`)."""
    right = attention.folded_attention

    def wrong(*arguments: Any, **named: Any):
        return right(*arguments, **(named | {name: None}))

    AttentionInterface.register(attention.ATTENTION_NAME, wrong)
    return judge(family, partial(unchecked, pack=False))


def window_off_by_one(family: str) -> Outcome:
    """Masks of windows that show one token more."""
    right = model.pass_mask

    def wrong(lengths, num_tokens, extent, ancestors=None, window=None):
        return right(lengths, num_tokens, extent, ancestors, window and window + 1)

    model.pass_mask = wrong
    return judge(family, unchecked)


def norm_before_instead_of_after(family: str) -> Outcome:
    """The norm of what a feed-forward block gives (Gemma 2, 3) is applied to what it is given."""

    def load(directory: Path) -> Target:
        target = unchecked(directory, pack=False)
        for layer in target.layers:
            norm, layer.post_feedforward_layernorm = layer.post_feedforward_layernorm, nn.Identity()
            layer.mlp.register_forward_pre_hook(lambda module, given, norm=norm: (norm(given[0]),))
        return target

    return judge(family, load)


def cap_of_logits_ignored(family: str) -> Outcome:
    """Logits that are not capped: no greedy text shows it."""

    def load(directory: Path) -> Target:
        target = unchecked(directory)
        target._softcap = None
        return target

    return judge(family, load)


def heap_corrupted(family: str) -> Outcome:
    """A process that writes beside what it allocated, says that all is well, and aborts when it frees it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(64)
    ctypes.memset(block - 16, 0xFF, 96)
    libc.free(ctypes.c_void_p(block))
    return Outcome(family, "equal")


def hangs(family: str) -> Outcome:
    """A process that does not end."""
    time.sleep(600)
    return Outcome(family, "equal")


def weights_without_effect(family: str) -> Outcome:
    """A model that writes one token for ever, whatever it reads: a comparison would see nothing."""
    torch.randn = lambda *size, **options: torch.zeros(*size)
    return judge(family)
