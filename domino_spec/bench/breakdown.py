"""Where a cycle's time goes: each stage of a cycle timed alone, beside the whole cycle and a plain step.

One real cycle is repeated at a fixed context. The whole cycle runs through the loop's own functions; then every stage
runs by itself with the same inputs. `rest` is what the stages leave of the cycle: masks, cache rows, bookkeeping.
Cost ratio c = cycle / plain step; a draft pays where tau > c (DESIGN section 7).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from domino_spec.config import DEFAULT_CANDIDATES, UserError
from domino_spec.decoding.drafter import Drafter
from domino_spec.decoding.generate import prefill
from domino_spec.decoding.sampling import RandomStreams, SamplingSettings
from domino_spec.decoding.state import State, Verdict
from domino_spec.decoding.verify import commit, verify
from domino_spec.draft.backbone import ContextKV
from domino_spec.draft.model import Draft
from domino_spec.drafters.domino import ContextCache
from domino_spec.drafters.plain import PlainDecoding
from domino_spec.kernels.reference import head_rollout
from domino_spec.methods import make_drafter
from domino_spec.target.model import Target, TargetPass

STAGES = ("verify", "context", "backbone", "lm_head", "rollout", "accept_commit")
"""Stages in the order of the tables: target pass and its LM head; projection of newly committed features; draft
backbone; base logits; head rollout; acceptance and commit."""
WARM_UP = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Breakdown:
    """Median seconds of one request's cycle at temperature 0."""

    method: str
    num_drafts: int
    context: int
    """Committed tokens before the cycle."""
    candidates: int | None
    """K of the head's restricted candidates."""
    repeats: int
    threads: int
    plain_step: float
    """One step of method `none` at the same context."""
    cycle: float
    stages: dict[str, float]
    """By the names in `STAGES`, and `rest`: the cycle less all of them."""

    @property
    def cost_ratio(self) -> float:
        """c: the tau at which the draft starts to pay, and what tau is divided by to give the speed-up."""
        return self.cycle / self.plain_step


def synthetic_context(target: Target, length: int, seed: int = 0) -> list[int]:
    """`length` random tokens, for timings that need no real text.

    Raises:
        UserError: a length that the target has no room for.
    """
    if not 2 <= length < target.max_length:
        raise UserError(f"context must be between 2 and {target.max_length - 1} tokens, got {length}")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, target.vocab_size, (length,), generator=generator).tolist()


@torch.inference_mode()
def measure_breakdown(
    target: Target,
    draft: Draft,
    context: Sequence[int],
    *,
    method: str = "domino",
    num_drafts: int | None = None,
    candidates: int | None = DEFAULT_CANDIDATES,
    repeats: int = 20,
) -> Breakdown:
    """Time a cycle, its stages and a plain step, in turn, `repeats` times.

    Args:
        target: the model served.
        draft: bound to it.
        context: token ids of the committed text; the last one is the anchor.
        method: `domino`, or `dflash` for the same draft with its head off.
        num_drafts: N; None for the draft's most.
        candidates: K, or None for the whole draft vocabulary.
        repeats: how often; medians are taken.

    Raises:
        UserError: a method without a backbone, or a number out of range.
    """
    if method not in ("domino", "dflash"):
        raise UserError(f"only domino and dflash have stages to break down, not {method}")
    if repeats < 1 or (num_drafts is not None and num_drafts < 1):
        raise UserError(f"repeats and num_drafts must be at least 1, got {repeats} and {num_drafts}")
    drafter = make_drafter(
        method, draft, requests=1, settings=SamplingSettings(), device=target.device, candidates=candidates
    )
    num_drafts = min(num_drafts or drafter.max_drafts, drafter.max_drafts)
    candidates = candidates if method == "domino" else None
    cycle = _Cycle(target, draft, drafter, context, num_drafts, method == "domino", candidates)
    for _ in range(WARM_UP):
        cycle.time_once()
    samples = [cycle.time_once() for _ in range(repeats)]
    medians = {name: median(sample[name] for sample in samples) for name in samples[0]}
    stages = {name: medians[name] for name in STAGES}
    return Breakdown(
        method=method,
        num_drafts=num_drafts,
        context=len(context),
        candidates=candidates,
        repeats=repeats,
        threads=torch.get_num_threads(),
        plain_step=medians["plain_step"],
        cycle=medians["cycle"],
        stages=stages | {"rest": medians["cycle"] - sum(stages.values())},
    )


def render_breakdown(breakdown: Breakdown) -> str:
    """A Markdown table of one breakdown, milliseconds and shares of the cycle."""
    names = {
        "lm_head": "LM head",
        "accept_commit": "accept and commit",
        "rollout": "head rollout",
        "context": "context projection",
    }
    lines = [
        f"{breakdown.method}, {breakdown.num_drafts} drafts, context {breakdown.context} tokens, "
        f"{breakdown.threads} threads, median of {breakdown.repeats}:",
        "",
        "| stage | ms | share of the cycle |",
        "| --- | ---: | ---: |",
    ]
    for name, seconds in breakdown.stages.items():
        lines.append(f"| {names.get(name, name)} | {seconds * 1e3:.2f} | {seconds / breakdown.cycle:.1%} |")
    lines += [
        f"| **cycle** | {breakdown.cycle * 1e3:.2f} | 100.0% |",
        f"| plain step | {breakdown.plain_step * 1e3:.2f} | {breakdown.plain_step / breakdown.cycle:.1%} |",
        "",
        f"Cost ratio c = {breakdown.cost_ratio:.2f}: speed-up = tau / c, so the draft pays above tau "
        f"{breakdown.cost_ratio:.2f} and doubles the speed at tau {2 * breakdown.cost_ratio:.2f}.",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Replay:
    """Answers like a target whose pass is already done, so that `verify` costs only its decision."""

    output: TargetPass
    logits: Tensor

    def forward(self, *args, **kwargs) -> TargetPass:
        return self.output

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self.logits


class _Cycle:
    """One request held at one point of its text, which every measurement starts from and is reset to."""

    def __init__(
        self,
        target: Target,
        draft: Draft,
        drafter: Drafter,
        context: Sequence[int],
        num_drafts: int,
        use_head: bool,
        candidates: int | None,
    ) -> None:
        self.target, self.draft, self.drafter = target, draft, drafter
        self.num_drafts, self.candidates = num_drafts, candidates
        self.head = draft.head if use_head else None
        self.settings = SamplingSettings()
        self.streams = RandomStreams(torch.zeros(1, dtype=torch.long, device=target.device))
        self.state: State = prefill(target, [context], drafter, max_new_tokens=num_drafts + 1)
        self.own: ContextCache = drafter.start(self.state)
        self._length = len(context)

    def time_once(self) -> dict[str, float]:
        """Seconds of everything, by name."""
        seconds: dict[str, float] = {}

        def timed(name: str, call: Callable[[], T]) -> T:
            self._synchronise()
            started = time.perf_counter()
            result = call()
            self._synchronise()
            seconds[name] = time.perf_counter() - started
            return result

        timed("plain_step", self._plain_step)
        self._reset()
        timed("cycle", self._whole_cycle)
        self._reset()
        self._stages(timed)
        self._reset()
        return seconds

    def _plain_step(self) -> None:
        plain = PlainDecoding()
        proposal = plain.propose(self.state, None, 0)
        commit(self.state, verify(self.target, self.state, proposal, self.settings, self.streams))

    def _whole_cycle(self) -> None:
        proposal = self.drafter.propose(self.state, self.own, self.num_drafts)
        layers = self.drafter.feature_layers
        verdict = verify(self.target, self.state, proposal, self.settings, self.streams, layers)
        commit(self.state, verdict)
        self.own = self.drafter.advance(self.own, verdict)

    def _stages(self, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
        target, draft, state, own = self.target, self.draft, self.state, self.own
        anchors, context = state.anchors, self._length - 1
        block = draft.config.block_size
        positions = context + torch.arange(block, device=target.device)[None]
        mask = torch.ones(1, 1, block, context + block, dtype=torch.bool, device=target.device)
        cached = ContextKV(own.keys[:, :, :, :context], own.values[:, :, :, :context])
        hidden = timed("backbone", lambda: draft.backbone(draft.block_embeddings(anchors), positions, cached, mask))
        first = draft.config.first_draft_slot
        hidden = hidden[:, first : first + self.num_drafts]
        base = timed("lm_head", lambda: draft.base_logits(hidden))
        timed(
            "rollout",
            lambda: head_rollout(
                self.head,
                hidden,
                base,
                draft.embed(anchors),
                lambda choices: draft.embed(draft.to_token_ids(choices)),
                self.candidates,
            ),
        )

        proposal = self.drafter.propose(state, own, self.num_drafts)
        tokens = torch.cat((anchors[:, None], proposal.tokens), dim=1)

        def target_pass() -> tuple[TargetPass, Tensor]:
            output = target.forward(tokens, state.cache, self.drafter.feature_layers)
            return output, target.lm_head(output.hidden)

        replay = cast(Target, _Replay(*timed("verify", target_pass)))

        def decide() -> Verdict:
            verdict = verify(replay, state, proposal, self.settings, self.streams, self.drafter.feature_layers)
            commit(state, verdict)
            return verdict

        verdict = timed("accept_commit", decide)
        committed = int(verdict.num_accepted[0]) + 1
        features = verdict.features[:, :committed].to(draft.dtype)
        rows = context + torch.arange(committed, device=target.device)[None]
        timed("context", lambda: draft.backbone.project_context(features, rows))

    def _reset(self) -> None:
        self.state.lengths.fill_(self._length)
        self.state.cache.lengths.fill_(self._length - 1)
        self.own.lengths = torch.full_like(self.own.lengths, self._length - 1)

    def _synchronise(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
