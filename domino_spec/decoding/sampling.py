"""From the target's logits to the distribution that a token is drawn from, and reproducible draws from it.

Temperature 0 is a one-hot distribution, so greedy and sampled decoding share one lossless path (DESIGN section 5).
Warpers act on the target's distribution only: the draft may use any distribution that it reports honestly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from domino_spec.ops.heads import draw
from domino_spec.settings import UserError

ALMOST_ZERO, HOTTEST = 1e-5, 1e5
"""Least and highest temperature above 0: logits divided by less would not stay finite, by more would all be equal."""
INT64 = 2**63


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn from the target's distribution; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Divide positive logits (multiply negative ones) of tokens that occur in prompt or text."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens that occur in the text."""
    frequency_penalty: float = 0.0
    """Subtract, per occurrence in the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Add to the logits of these tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        checks = (
            (self.temperature >= 0, f"temperature must not be negative, got {self.temperature}"),
            (
                self.temperature == 0 or ALMOST_ZERO <= self.temperature <= HOTTEST,
                f"temperature must be 0 or between {ALMOST_ZERO:g} and {HOTTEST:g}, got {self.temperature}",
            ),
            (self.top_k >= 0, f"top_k must not be negative, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be greater than 0 and at most 1, got {self.top_p}"),
            (0 <= self.min_p < 1, f"min_p must be at least 0 and less than 1, got {self.min_p}"),
            (self.repetition_penalty > 0, f"repetition_penalty must be positive, got {self.repetition_penalty}"),
            (all(map(math.isfinite, penalties)), f"penalties must be finite numbers, got {penalties}"),
            (
                all(bias < math.inf for bias in self.logit_bias.values()),
                "logit_bias must hold numbers; -inf forbids a token",
            ),
            (-INT64 <= self.seed < INT64, f"seed must fit into 64 bits, got {self.seed}"),
        )
        for holds, message in checks:
            if not holds:
                raise UserError(message)

    @property
    def greedy(self) -> bool:
        """True where every distribution is one-hot."""
        return self.temperature == 0

    @property
    def reads_history(self) -> bool:
        """True where a distribution depends on which tokens came before, beyond the model itself."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def seed_of(seed: int, request: int) -> int:
    """The seed of one of several requests that share a seed: it plus the request's index, within 64 bits."""
    return (seed + request + INT64) % (2 * INT64) - INT64


@dataclass(frozen=True)
class History:
    """Token counts that penalties read, for every row of a verify pass."""

    in_text: Tensor
    """[R, n, V] float, occurrences among generated tokens (drafts on the path included)."""
    seen: Tensor
    """[R, n, V] bool, occurs in prompt or text."""


def path_history(
    tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, path_tokens: Tensor, on_path: Tensor, vocab_size: int
) -> History:
    """Counts at each row of a pass: the committed text plus the drafts on that row's path.

    Args:
        tokens: [R, capacity], committed tokens; `lengths` [R] of them are real, the anchor included.
        prompt_lengths: [R].
        path_tokens: [R, N], drafted tokens.
        on_path: [R, N + 1, N] bool, draft j lies on the path to row i.
        vocab_size: V.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    generated = (positions >= prompt_lengths[:, None]) & (positions < lengths[:, None])
    zeros = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    counts = zeros.scatter_add(1, tokens, generated.float())
    prompt = zeros.scatter_add(1, tokens, (positions < prompt_lengths[:, None]).float())
    drafted = torch.zeros(*on_path.shape[:2], vocab_size, device=tokens.device)
    index = path_tokens[:, None].expand(-1, on_path.shape[1], -1)
    in_text = counts[:, None] + drafted.scatter_add(2, index, on_path.float())
    return History(in_text, (in_text > 0) | (prompt > 0)[:, None])


def warp_logits(logits: Tensor, settings: SamplingSettings, history: History | None = None) -> Tensor:
    """Logits after bias and penalties, in float32; the argmax of these is the greedy choice. Shape kept."""
    logits = logits.float()
    if settings.logit_bias:
        ids = torch.tensor(list(settings.logit_bias), device=logits.device)
        bias = torch.tensor(list(settings.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(-1, ids, bias.expand(*logits.shape[:-1], -1))
    if settings.reads_history:
        assert history is not None
        penalised = torch.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
        logits = torch.where(history.seen, penalised, logits)
        logits = logits - settings.presence_penalty * (history.in_text > 0).float()
        logits = logits - settings.frequency_penalty * history.in_text
    return logits


def target_probs(logits: Tensor, settings: SamplingSettings, history: History | None = None) -> Tensor:
    """The distribution that the target's token is drawn from: logits [..., V] to probabilities [..., V].

    One-hot at temperature 0. Order as in transformers: bias and penalties, temperature, top-k, top-p, min-p.
    """
    logits = warp_logits(logits, settings, history)
    if settings.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if settings.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= settings.top_p, -torch.inf)  # the most probable token always stays
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    probs = logits.softmax(-1)
    if settings.min_p > 0:
        probs = probs.masked_fill(probs < settings.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


class RandomStreams:
    """Uniform numbers keyed by request, position and use, so a request's text does not depend on its neighbours.

    A counter-based generator (a 64-bit mixing function of the key) needs no state: the same seed and position give
    the same number however requests are batched and however many drafts were proposed before.
    """

    ACCEPT, RESIDUAL, DRAFT = 0, 1, 2
    """What a number decides: acceptance of a draft, the token drawn after the accepted prefix, a sampled draft."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds
        """[R] int64."""

    def uniform(self, positions: Tensor, use: int) -> Tensor:
        """Numbers in [0, 1) for `positions` [R, n] (absolute token positions): [R, n] float64."""
        key = _mix(self.seeds[:, None] ^ (use << 56))
        bits = _mix(key + positions)
        return ((bits >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


class Sampling:
    """How the tokens of R requests are drawn: each has settings and a random stream of its own.

    Args:
        settings: of each request; its stream is that of its seed.
        device: of the logits.
    """

    def __init__(self, settings: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> None:
        self.settings = list(settings)
        self.streams = RandomStreams(torch.tensor([s.seed for s in settings], dtype=torch.long, device=device))
        self.temperatures = torch.tensor([s.temperature for s in settings], device=device)
        """[R] float32."""
        self.greedy = all(s.greedy for s in settings)
        """True where every distribution is one-hot."""
        self.plain_greedy = self.greedy and not any(s.logit_bias or s.reads_history for s in settings)
        """True where every token is the argmax of the target's own logits."""
        self.reads_history = any(s.reads_history for s in settings)
        """True where some distribution depends on which tokens came before, beyond the model itself."""
        self._groups: dict[SamplingSettings, list[int]] = {}
        for request, own in enumerate(settings):
            self._groups.setdefault(replace(own, seed=0), []).append(request)

    @staticmethod
    def alike(settings: SamplingSettings, requests: int, device: torch.device | str = "cpu") -> Sampling:
        """The same settings for all; request r draws from the stream `seed + r`."""
        return Sampling([replace(settings, seed=seed_of(settings.seed, r)) for r in range(requests)], device)

    def warp(self, logits: Tensor, history: History | None = None) -> Tensor:
        """`warp_logits` of [R, n, V], each request by its own settings."""
        return self._by_group(warp_logits, logits, history)

    def probs(self, logits: Tensor, history: History | None = None) -> Tensor:
        """`target_probs` of [R, n, V], each request by its own settings."""
        return self._by_group(target_probs, logits, history)

    def choices(self, logits: Tensor, positions: Tensor, history: History | None = None) -> Tensor:
        """One choice of the target at every row [R, n]: the argmax, or a draw with the number of the row's position."""
        if self.greedy:
            return self.warp(logits, history).argmax(-1)
        return draw(self.probs(logits, history), self.streams.uniform(positions, RandomStreams.RESIDUAL))

    def _by_group(self, apply: Callable[..., Tensor], logits: Tensor, history: History | None) -> Tensor:
        if len(self._groups) == 1:
            return apply(logits, next(iter(self._groups)), history)
        done = torch.empty(logits.shape, device=logits.device)
        for settings, members in self._groups.items():
            rows = torch.tensor(members, device=logits.device)
            theirs = None if history is None else History(history.in_text[rows], history.seen[rows])
            done[rows] = apply(logits[rows], settings, theirs)
        return done


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 (two's complement, logical shifts)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
