"""The outside baseline: `model.generate` of an ordinary transformers model, as its users run it.

Stock SDPA attention, stock cache, stock linear layers; only the clock is ours, a streamer that notes when each token
became available. What it measures beside our loop: its prefill ends with the first token, ours before it, so its
decode time belongs to one token fewer (`Row.decode_tokens` counts accordingly).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from domino_spec.decoding.request import Generation
from domino_spec.target.load import load_model, target_source
from domino_spec.target.model import Target


class TokenClock(BaseStreamer):
    """Notes when `generate` hands out tokens, and how many at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """`time.perf_counter()` after every pass."""
        self.tokens: list[int] = []
        """Tokens that each pass brought; one, unless transformers drafts."""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The first call carries the prompt, every later one the tokens of a pass."""
        if self._prompt_seen:
            self.seconds.append(time.perf_counter())
            self.tokens.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def load_baseline(target: Target) -> Any:
    """The target's weights as a stock transformers model, same dtype and device."""
    model = load_model(target_source(target.name), f"target {target.name}", target.dtype, attention="sdpa")
    return model.to(target.device).eval()


def transformers_generate(
    model: Any,
    stop_token_ids: Collection[int],
    prompt: list[int],
    temperature: float,
    seed: int,
    max_new_tokens: int,
) -> Generation:
    """One prompt through `model.generate`, timed.

    Args:
        model: from `load_baseline`.
        stop_token_ids: the same that our loop stops at.
        prompt: token ids.
        temperature: 0 is `do_sample=False`.
        seed: of PyTorch's generator, at temperature > 0.
        max_new_tokens: as everywhere.

    Returns:
        Its tokens; a pass of one token each after the first; seconds until the first token as prefill and from there
        to the last as decode.
    """
    generation, _ = timed_generate(model, stop_token_ids, prompt, temperature, seed, max_new_tokens)
    return generation


def timed_generate(
    model: Any,
    stop_token_ids: Collection[int],
    prompt: list[int],
    temperature: float,
    seed: int,
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Generation, TokenClock]:
    """`model.generate`, timed; arguments as in `transformers_generate`, and:

    Args:
        settings: more of the model's generation configuration.
        options: more arguments of `generate`.

    Returns:
        What it produced, drafts not counted; and the clock.
    """
    stop = sorted(stop_token_ids)
    # A model's own defaults (Qwen's repetition penalty, its sampling) would make the texts differ for no fault of ours.
    model.generation_config = GenerationConfig(
        eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0, **(settings or {})
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    ids = torch.tensor([prompt], device=model.device)
    clock = TokenClock()
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=clock, **sampling, **options
    )
    tokens = output[0, len(prompt) :].tolist()
    assert len(tokens) == sum(clock.tokens)
    generation = Generation(
        prompt_ids=list(prompt),
        token_ids=tokens,
        finish_reason="stop" if tokens[-1] in stop_token_ids else "length",
        acceptance_lengths=clock.tokens[1:],
        num_drafts=[0] * (len(clock.tokens) - 1),
        accepted=[i < count - 1 for count in clock.tokens for i in range(count)],
        seconds_prefill=clock.seconds[0] - started,
        seconds_decode=clock.seconds[-1] - clock.seconds[0],
    )
    return generation, clock
