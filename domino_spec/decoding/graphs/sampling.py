"""How tokens are drawn, for a static cycle: the settings of all requests in tensors that are filled in place.

`sampling.Sampling` groups requests by their settings, so its shapes and its constants change with who is decoded. Here
every request's settings are a row of a table and all rows are computed alike; a setting that does nothing changes no
bit, so both give the same distributions. What nobody asks for is not computed: a `Kind` names what somebody does.

Shapes: R requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.decoding.sampling import History, RandomStreams, Sampling, SamplingSettings


@dataclass(frozen=True)
class Kind:
    """What the settings of some requests need computed."""

    samples: bool = False
    """Some request draws its tokens."""
    filters: bool = False
    """Some request drops improbable tokens by top-k or top-p, which takes sorting the vocabulary."""
    biases: bool = False
    penalises: bool = False
    """Some request's distribution depends on which tokens came before."""

    @staticmethod
    def of(settings: Sequence[SamplingSettings]) -> Kind:
        """What these need."""
        return Kind(
            samples=any(not s.greedy for s in settings),
            filters=any(not s.greedy and (s.top_k > 0 or s.top_p < 1) for s in settings),
            biases=any(s.logit_bias for s in settings),
            penalises=any(s.reads_history for s in settings),
        )


class SettingsTable:
    """Settings of all slots, in memory allocated once (that of logit biases when one is first given).

    Args:
        slots: rows.
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self.seeds = torch.zeros(slots, dtype=torch.long, device=device)
        self.top_k = torch.full((slots,), vocab_size, device=device)
        """[slots], V where all are kept."""
        numbers = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
        self.numbers = torch.tensor(numbers, device=device)[:, None].repeat(1, slots)
        """[6, slots] float32: temperature, top_p, min_p, repetition, presence and frequency penalty."""
        self.bias: Tensor | None = None
        """[slots, V] float32."""

    def load(self, settings: Sequence[SamplingSettings]) -> None:
        """Make these the settings of the first slots."""
        count = len(settings)
        numbers = [
            (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
            for s in settings
        ]
        self.numbers[:, :count].copy_(torch.tensor(numbers).T)
        self.seeds[:count].copy_(torch.tensor([s.seed for s in settings]))
        kept = [s.top_k if 0 < s.top_k < self._vocab_size else self._vocab_size for s in settings]
        self.top_k[:count].copy_(torch.tensor(kept))
        if any(s.logit_bias for s in settings):
            if self.bias is None:
                self.bias = torch.zeros(len(self.seeds), self._vocab_size, device=self.seeds.device)
            rows = torch.zeros(count, self._vocab_size)
            for row, own in zip(rows, settings, strict=True):
                for token, value in own.logit_bias.items():
                    row[token] = value
            self.bias[:count].copy_(rows)

    def view(self, requests: int, kind: Kind) -> StaticSampling:
        """How the first `requests` slots draw their tokens."""
        return StaticSampling(self, requests, kind)


class StaticSampling(Sampling):
    """`Sampling` of the first rows of a table; what it computes depends on the kind alone.

    Args:
        table: settings.
        requests: R.
        kind: what somebody needs.
    """

    def __init__(self, table: SettingsTable, requests: int, kind: Kind) -> None:
        self.kind = kind
        self.streams = RandomStreams(table.seeds[:requests])
        numbers = table.numbers[:, :requests]
        self.temperatures, *rest = numbers
        self._top_p, self._min_p, self._repetition, self._presence, self._frequency = (n[:, None, None] for n in rest)
        self._top_k = table.top_k[:requests, None, None]
        self._bias = table.bias[:requests, None] if kind.biases and table.bias is not None else None
        self.greedy = not kind.samples
        self.plain_greedy = self.greedy and not kind.biases and not kind.penalises
        self.reads_history = kind.penalises

    def warp(self, logits: Tensor, history: History | None = None) -> Tensor:
        """As `sampling.warp_logits`."""
        logits = logits.float()
        if self._bias is not None:
            logits = logits + self._bias
        if self.kind.penalises:
            assert history is not None
            penalised = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = torch.where(history.seen, penalised, logits)
            logits = logits - self._presence * (history.in_text > 0).float()
            logits = logits - self._frequency * history.in_text
        return logits

    def probs(self, logits: Tensor, history: History | None = None) -> Tensor:
        """As `sampling.target_probs`."""
        logits = self.warp(logits, history)
        chosen = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        greedy = (self.temperatures == 0)[:, None, None]
        logits = logits / self.temperatures[:, None, None].masked_fill(greedy, 1.0)
        if self.kind.filters:
            logits = self._filter(logits)
        probs = logits.softmax(-1)
        kept = probs.masked_fill(probs < self._min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = torch.where(self._min_p > 0, kept / kept.sum(-1, keepdim=True), probs)
        return torch.where(greedy, chosen, probs)

    def _filter(self, logits: Tensor) -> Tensor:
        """Without the tokens that top-k and top-p drop, [R, n, V]."""
        ordered, index = logits.sort(dim=-1, descending=True)
        threshold = ordered.gather(-1, (self._top_k - 1).expand(*logits.shape[:-1], 1))
        ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares
        dropped = (before >= self._top_p) & (self._top_p < 1)  # the most probable token always stays
        return torch.empty_like(logits).scatter_(-1, index, ordered.masked_fill(dropped, -torch.inf))
