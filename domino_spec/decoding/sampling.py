"""From the target's logits to the distribution that a token is drawn from, and reproducible draws from it.

Temperature 0 is a one-hot distribution, so greedy and sampled decoding share one lossless path (docs/design.md,
section 5). Warpers act on the target's distribution only: the draft may use any distribution that it reports
honestly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from domino_spec.ops.heads import draw
from domino_spec.settings import UserError

ALMOST_ZERO, HOTTEST = 1e-5, 1e5
"""Least and highest temperature above 0: below it logits would not stay finite, above it they would all be equal."""
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
        """True if every distribution is one-hot."""
        return self.temperature == 0

    @property
    def reads_history(self) -> bool:
        """True if a distribution depends on which tokens came before, beyond the model itself."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def seed_of(seed: int, request: int) -> int:
    """The seed of one of several requests that share a seed: it plus the request's index, within 64 bits."""
    return (seed + request + INT64) % (2 * INT64) - INT64


@dataclass(frozen=True)
class History:
    """Token counts that penalties depend on, for every row of a verify pass."""

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


@dataclass(frozen=True)
class Warpers:
    """Which computations the settings of some requests need; the others are skipped."""

    samples: bool = False
    """Some request draws its tokens."""
    argmax: bool = True
    """Some request takes the most probable token."""
    top_k: int = 0
    """A power of two, at least the largest k; 0 if no request has one."""
    top_p: bool = False
    """Some request has one, which takes sorting the vocabulary."""
    min_p: bool = False
    bias: bool = False
    penalties: bool = False
    """Some request's distribution depends on which tokens came before."""

    @staticmethod
    def of(settings: Sequence[SamplingSettings]) -> Warpers:
        """The computations that these settings need."""
        drawn = [s for s in settings if not s.greedy]
        top_k = max((s.top_k for s in drawn), default=0)
        return Warpers(
            samples=bool(drawn),
            argmax=len(drawn) < len(settings),
            top_k=1 << (top_k - 1).bit_length() if top_k else 0,
            top_p=any(s.top_p < 1 for s in drawn),
            min_p=any(s.min_p > 0 for s in drawn),
            bias=any(s.logit_bias for s in settings),
            penalties=any(s.reads_history for s in settings),
        )


class Sampling:
    """How the tokens of R requests are drawn: a row of settings and a random stream for each.

    All rows are computed alike, and a setting that does nothing changes no bit. So a request's distribution does not
    depend on the settings of the others.

    Args:
        settings: of each request; its stream is that of its seed.
        device: of the logits.
    """

    def __init__(self, settings: Sequence[SamplingSettings], device: torch.device | str = "cpu") -> None:
        self.warpers = Warpers.of(settings)
        self.seeds = torch.tensor([s.seed for s in settings], dtype=torch.long, device=device)
        self.top_k = torch.tensor([min(s.top_k, INT64 - 1) for s in settings], dtype=torch.long, device=device)
        numbers = [
            (s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
            for s in settings
        ]
        self.numbers = torch.tensor(numbers, dtype=torch.float32, device=device).reshape(-1, 6).T.contiguous()
        """[6, R]: temperature, top_p, min_p, repetition, presence and frequency penalty."""
        self.bias: Tensor | None = None
        """[R, V] float32, made when it is first needed, because V is known from logits only."""
        self._biases = [s.logit_bias for s in settings]

    @staticmethod
    def alike(settings: SamplingSettings, requests: int, device: torch.device | str = "cpu") -> Sampling:
        """The same settings for all; request r draws from the stream `seed + r`."""
        return Sampling([replace(settings, seed=seed_of(settings.seed, r)) for r in range(requests)], device)

    @property
    def greedy(self) -> bool:
        """True if every distribution is one-hot."""
        return not self.warpers.samples

    @property
    def plain_greedy(self) -> bool:
        """True if every token is the argmax of the target's unchanged logits."""
        warpers = self.warpers
        return not (warpers.samples or warpers.bias or warpers.penalties)

    @property
    def temperatures(self) -> Tensor:
        """[R] float32."""
        return self.numbers[0]

    @property
    def streams(self) -> RandomStreams:
        """The random stream of every request."""
        return RandomStreams(self.seeds)

    def choices(self, logits: Tensor, positions: Tensor, history: History | None = None) -> Tensor:
        """One choice of the target at every row [R, n]: the argmax, or a draw with the number of the row's position."""
        if self.plain_greedy:
            return logits.argmax(-1)
        if self.greedy:
            return self.warp(logits, history).argmax(-1)
        return draw(self.probs(logits, history), self.streams.uniform(positions, RandomStreams.RESIDUAL))

    def probs(self, logits: Tensor, history: History | None = None) -> Tensor:
        """The distributions that tokens are drawn from: logits [R, n, V] to probabilities [R, n, V].

        One-hot at temperature 0. Order as in transformers: bias and penalties, temperature, top-k, top-p, min-p.
        """
        logits = self.warp(logits, history)
        if self.greedy:
            return _one_hot(logits)
        temperature = self.numbers[0][:, None, None]
        scaled = logits / temperature.masked_fill(temperature == 0, 1.0)
        probs = (self._filter(scaled) if self.warpers.top_k or self.warpers.top_p else scaled).softmax(-1)
        if self.warpers.min_p:
            probs = self._drop_improbable(probs)
        return torch.where(temperature == 0, _one_hot(logits), probs) if self.warpers.argmax else probs

    def warp(self, logits: Tensor, history: History | None = None) -> Tensor:
        """Logits [R, n, V] after bias and penalties, in float32; the argmax of these is the greedy choice."""
        logits = logits.float()
        if self.warpers.bias:
            if self.bias is None:
                self.bias = self._bias_rows(logits.shape[-1])
            logits = logits + self.bias[:, None]
        return self._penalise(logits, history) if self.warpers.penalties else logits

    def _penalise(self, logits: Tensor, history: History | None) -> Tensor:
        assert history is not None
        repetition, presence, frequency = (numbers[:, None, None] for numbers in self.numbers[3:])
        penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(history.seen, penalised, logits)
        logits = logits - presence * (history.in_text > 0).float()
        return logits - frequency * history.in_text

    def _filter(self, logits: Tensor) -> Tensor:
        """Minus infinity for the tokens that top-k and then top-p drop."""
        if self.warpers.top_k:
            most = min(self.warpers.top_k, logits.shape[-1])
            index = (self.top_k.clamp(1, most) - 1)[:, None, None].expand(*logits.shape[:-1], 1)
            least_kept = logits.topk(most, dim=-1).values.gather(-1, index)  # [R, n, 1]
            least_kept = least_kept.masked_fill((self.top_k == 0)[:, None, None], -torch.inf)
            logits = logits.masked_fill(logits < least_kept, -torch.inf)
        if self.warpers.top_p:
            top_p = self.numbers[1][:, None, None]
            ordered, index = logits.sort(dim=-1, descending=True)
            shares = ordered.softmax(-1)
            before = shares.cumsum(-1) - shares  # 0 for the most probable token, which always stays
            ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, index, ordered)
        return logits

    def _drop_improbable(self, probs: Tensor) -> Tensor:
        """Without the tokens that min-p drops."""
        min_p = self.numbers[2][:, None, None]
        kept = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
        return torch.where(min_p > 0, kept / kept.sum(-1, keepdim=True), probs)

    def load(self, settings: Sequence[SamplingSettings], vocab_size: int) -> Warpers:
        """Make these the settings of the first requests, in place; returns what they need."""
        new = Sampling(settings, self.seeds.device)
        count = len(settings)
        self.seeds[:count], self.top_k[:count], self.numbers[:, :count] = new.seeds, new.top_k, new.numbers
        if new.warpers.bias:
            if self.bias is None:
                self.bias = torch.zeros(len(self.seeds), vocab_size, device=self.seeds.device)
            self.bias[:count] = new._bias_rows(vocab_size)
        return new.warpers

    def view(self, requests: int, warpers: Warpers) -> Sampling:
        """The first requests, in the same memory."""
        part = copy.copy(self)
        part.warpers, part.numbers = warpers, self.numbers[:, :requests]
        part.seeds, part.top_k = self.seeds[:requests], self.top_k[:requests]
        part.bias = None if self.bias is None else self.bias[:requests]
        return part

    def _bias_rows(self, vocab_size: int) -> Tensor:
        rows = torch.zeros(len(self._biases), vocab_size)
        for row, bias in zip(rows, self._biases, strict=True):
            for token, value in bias.items():
                row[token] = value
        return rows.to(self.seeds.device)


def _one_hot(logits: Tensor) -> Tensor:
    """Probability 1 for the largest of the logits [..., V]."""
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 (two's complement, logical shifts)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
