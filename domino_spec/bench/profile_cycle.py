"""One cycle of a method, run again and again from the same point of R texts, and timed.

It runs the loop's own functions, so that what is timed is what decoding does. Beside it, verify passes of any number of
rows: what drafts cost that are not accepted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domino_spec.bench.profile_point import hold_caches, hold_state
from domino_spec.bench.profile_watch import Watch, hold_device, stage_seconds, synchronise, watched
from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, commit, verify
from domino_spec.draft.load import AnyDraft
from domino_spec.target.model import Target


@dataclass(frozen=True)
class Work:
    """How much a cycle did: what the bytes that it must move are worked out from."""

    rows: int
    """Of the verify pass, over all requests."""
    committed: int
    """Accepted drafts and bonus tokens, over all requests."""
    draft_passes: int
    """Passes of the draft's layers."""
    lm_head_passes: int
    """Products with the draft's LM head."""
    logits: int
    """Values of all draft logits."""


@dataclass(frozen=True)
class Sample:
    """One run of a cycle."""

    cycle: float
    """Seconds by the wall clock."""
    stages: dict[str, float]
    """Seconds by the names in `STAGES`; on CUDA those that the device took, on a run of its own."""
    work: Work
    waited: bool = False
    """On CUDA, whether the host waited for the device inside the cycle: the stages then hold waiting too."""

    @property
    def host_gap(self) -> float:
        """Seconds of the cycle that no stage accounts for."""
        return self.cycle - sum(self.stages.values())


class Cycle:
    """A cycle of a method at one point of R texts.

    Args:
        target: the model served.
        state: the texts, at that point; several cycles may share it.
        drafter: of the method.
        own: its caches, at that point.
        num_drafts: per request.
        draft: that it drafts with; None where it does without.
    """

    def __init__(
        self, target: Target, state: State, drafter: Drafter, own: Any, num_drafts: int, draft: AnyDraft | None = None
    ) -> None:
        self.target, self.state, self.drafter, self.own, self.draft = target, state, drafter, own, draft
        self.num_drafts = min(num_drafts, drafter.max_drafts)
        drafter.propose(state, own, self.num_drafts)  # that look-up indexes a whole text at first is no cost of a cycle
        self._put_back = hold_state(state), hold_caches(own)

    def run(self, watch: Watch | None = None) -> Verdict:
        """Propose, verify, commit, and let the drafter take it in; noted by `watch` where there is one."""
        timed = _untimed if watch is None else watch.timed
        layers = self.drafter.feature_layers
        proposal = timed("propose", self.drafter.propose)(self.state, self.own, self.num_drafts)
        verdict = timed("verification", verify)(self.target, self.state, proposal, layers)
        timed("commit", commit)(self.state, verdict)
        # Without features nothing is projected.
        timed("context" if layers else "advance", self.drafter.advance)(self.own, verdict)
        return verdict

    def reset(self) -> None:
        """Go back to the point that it started from."""
        for put_back in self._put_back:
            put_back()

    def sample(self) -> Sample:
        """Run, timed, and go back; on CUDA twice, by the wall clock and by the device's."""
        device = self.target.device
        wall = held = None
        if device.type == "cuda":
            wall = self._wall_clock()
            held = hold_device(device, 2 * wall)
        watch = Watch(device)
        with watched(watch, self.target, self.draft):
            verdict = self.run(watch)
        waited = held is not None and held.query()
        synchronise(device)
        cycle = watch.seconds(watch.of("propose")[0].begin, watch.spans[-1].end) if wall is None else wall
        sample = Sample(cycle, stage_seconds(watch), _work(watch, verdict), waited)
        self.reset()
        return sample

    def _wall_clock(self) -> float:
        synchronise(self.target.device)
        started = time.perf_counter()
        self.run()
        synchronise(self.target.device)
        seconds = time.perf_counter() - started
        self.reset()
        return seconds


def _untimed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    return call


def _work(watch: Watch, verdict: Verdict) -> Work:
    heads = watch.of("lm_head")
    return Work(
        rows=verdict.tokens.numel(),
        committed=int(verdict.num_accepted.sum()) + len(verdict.num_accepted),
        draft_passes=len(watch.of("backbone")),
        lm_head_passes=len(heads),
        logits=sum(span.values for span in heads),
    )


def verify_passes(target: Target, state: State, sizes: Sequence[int]) -> dict[tuple[str, int], Callable[[], float]]:
    """Verify passes of so many rows a request, of chains and of trees.

    A chain and a tree of as many rows differ in the mask, and in that a tree's accepted path is copied to where a
    chain's rows would be; four prefixes of these trees are extended at each depth. A chain of one row is a plain step.

    Returns:
        By kind and rows, a call that runs one pass, with LM head, acceptance and commit, puts the texts back, and
        returns seconds.
    """
    requests, device, put_back = len(state.lengths), state.lengths.device, hold_state(state)

    def one_pass(proposal: Proposal) -> float:
        synchronise(device)
        started = time.perf_counter()
        commit(state, verify(target, state, proposal))
        synchronise(device)
        seconds = time.perf_counter() - started
        put_back()
        return seconds

    passes: dict[tuple[str, int], Callable[[], float]] = {}
    for rows in sizes:
        index = torch.arange(rows - 1, device=device)
        tokens = (index % target.vocab_size).repeat(requests, 1)
        counts = torch.full((requests,), rows - 1, device=device)
        passes["chain", rows] = functools.partial(one_pass, Proposal(tokens, counts))
        if rows > 2:
            parents = (index - 4).clamp(min=-1).repeat(requests, 1)
            passes["tree", rows] = functools.partial(one_pass, Proposal(tokens, counts, parents))
    return passes
