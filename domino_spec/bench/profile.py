"""`domino-spec profile`: where one cycle's time goes, and how far each stage is from what the hardware allows.

A cycle of every method asked for, and a plain step of `none` beside them, at a context, a batch and a number of drafts.
The loop marks its stages as `domino::NAME` (`decoding.cycle.scope`); torch's profiler records them. The time of a stage
is that of its scopes without the scopes inside them: on a CPU the host's time in the same run, on CUDA the time of the
kernels that were launched in them, in a second run. Every repeat measures all cycles in turn, so that a machine that
drifts does so for all. Cost ratio c = cycle / plain step; a draft pays if tau > c, and the speed-up is tau / c
(docs/design.md, section 3; paper section 4.3 and Figure 1).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from domino_spec.bench.roofline import (
    Work,
    cache_bytes,
    draft_bytes,
    fill_state,
    filled_caches,
    hold_caches,
    hold_state,
    new_state,
    read_state,
    synthetic_text,
    target_bytes,
)
from domino_spec.bench.rows import device_name, session_record
from domino_spec.bench.shapes import check_memory
from domino_spec.decoding.cycle import Drafter, Proposal, State, Verdict, commit, scope, verify
from domino_spec.devices import free_memory
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import METHODS, check_draft, make_drafter
from domino_spec.files import read_json, write_json
from domino_spec.settings import UserError
from domino_spec.target.model import Target

STAGES = ("verify", "verify_lm_head", "context", "backbone", "lm_head", "rollout", "accept_commit")
"""Stages in the order of the tables: the target's layers and its LM head; projection of newly committed features; the
draft's layers and base logits; head rollout or growth of a tree; acceptance and commit. A method has some of them."""
STAGE_OF_SCOPE = {
    **{name: name for name in ("verify", "verify_lm_head", "backbone", "lm_head")},
    **{"read": "context", "head": "rollout", "accept": "accept_commit"},
}
"""`propose`, apart from the scopes inside it, prepares the draft's pass and belongs to no stage."""
WARM_UP = 2
MOST_REPEATS = 10_000
COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
"""Of the tensor that is copied to measure bandwidth: far beyond any cache."""

Show = Callable[[str, int, int, str], None]
"""Takes what is being done, how much of it is done, of how much, and a line about it."""


# One cycle, run again and again from the same point of R texts. It calls the functions of the decoding loop.


class Span(NamedTuple):
    """One scope of a profile."""

    name: str
    """Without `domino::`."""
    start: float
    """Seconds; of one profile, all from the same moment."""
    end: float
    seconds: float
    """Of the host, or of the kernels of the scope on CUDA."""


class Recording(NamedTuple):
    """What torch's profiler saw of a cycle."""

    host: list[Span]
    """Scopes in the order in which they began."""
    device: list[Span] | None
    """The same on the device's timeline, without scopes that launched nothing; None on a CPU."""
    waited: bool
    """On CUDA, whether the host waited for the device inside the cycle."""


def record_scopes(device: torch.device, run: Callable[[], object]) -> Recording:
    """Run under torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports every start and stop on stderr
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronise(device)
    # The unprocessed events: hundreds of times faster than `profiler.events()`.
    return read_events(profiler.profiler.kineto_results.events(), device.type == "cuda")


def read_events(events: Sequence[Any], on_cuda: bool) -> Recording:
    """The scopes of a cycle from the events of a profile."""
    host, device, kernels, waits = list[Span](), list[Span](), list[tuple[float, float]](), list[float]()
    first = min(event.start_ns() for event in events)
    for event in events:
        name, start, seconds = event.name(), (event.start_ns() - first) / 1e9, event.duration_ns() / 1e9
        on_device = event.device_type() == DeviceType.CUDA
        if name.startswith("domino::"):
            span = Span(name.removeprefix("domino::"), start, start + seconds, seconds)
            (device if on_device else host).append(span)
        elif on_device and not event.is_user_annotation():
            kernels.append((start, seconds))
        elif name.startswith("cuda") and name.endswith("Synchronize"):
            waits.append(start)
    for spans in (host, device):
        spans.sort(key=lambda span: (span.start, -span.end))
    if not on_cuda:
        return Recording(host, None, False)
    # On the device a scope lasts from its first kernel to its last. It counts the kernels, not the gaps between them.
    busy = [span._replace(seconds=sum(s for at, s in kernels if span.start <= at < span.end)) for span in device]
    return Recording(host, busy, any(host[0].start < moment < host[0].end for moment in waits))


def stage_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of the stages by the names in `STAGES`: of their scopes, without the scopes directly inside them."""
    seconds: dict[str, float] = {}
    around: list[Span] = []
    for span in spans:
        while around and around[-1].end < span.end:
            around.pop()
        for name, part in ((span.name, span.seconds), *((outer.name, -span.seconds) for outer in around[-1:])):
            if name in STAGE_OF_SCOPE:
                seconds[STAGE_OF_SCOPE[name]] = seconds.get(STAGE_OF_SCOPE[name], 0.0) + part
        around.append(span)
    return {name: seconds[name] for name in STAGES if name in seconds}


@dataclass(frozen=True)
class Sample:
    """One run of a cycle."""

    cycle: float
    """Seconds by the wall clock."""
    stages: dict[str, float]
    """Seconds by the names in `STAGES`."""
    work: Work
    waited: bool = False
    """On CUDA, whether the host waited for the device inside the cycle: the host gap then holds that too."""

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
        cache: the drafter's, at that point.
        num_drafts: per request.
        draft: that it drafts with; None if it needs none.
    """

    def __init__(
        self, target: Target, state: State, drafter: Drafter, cache: Any, num_drafts: int, draft: AnyDraft | None = None
    ) -> None:
        self.target, self.state, self.drafter, self.cache, self.draft = target, state, drafter, cache, draft
        self.num_drafts = min(num_drafts, drafter.max_drafts)
        self._logits = 0
        counting: Any = nullcontext()
        if draft is not None:
            counting = mock.patch.object(draft, "base_logits", self._counted(draft.base_logits))
        with counting:  # not timed: look-up indexes the whole text in its first proposal
            drafter.propose(state, cache, self.num_drafts)
        self._put_back = hold_state(state), hold_caches(cache)

    def _counted(self, base_logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counted(hidden: Tensor) -> Tensor:
            logits = base_logits(hidden)
            self._logits += logits.numel()
            return logits

        return counted

    def run(self) -> Verdict:
        """Propose, verify, commit, and let the drafter read what was committed, in the scopes of `Engine.step`."""
        layers = self.drafter.feature_layers
        with scope("cycle"):
            with scope("propose"):
                proposal = self.drafter.propose(self.state, self.cache, self.num_drafts)
            with scope("accept"):
                verdict = verify(self.target, self.state, proposal, layers)
                commit(self.state, verdict)
            with scope("read" if layers else "no_read"):  # without features nothing is projected
                self.drafter.advance(self.cache, verdict)
        return verdict

    def reset(self) -> None:
        """Go back to the point that it started from."""
        for put_back in self._put_back:
            put_back()

    def sample(self) -> Sample:
        """Run, timed, and go back; on CUDA twice, by the wall clock and by the device's."""
        wall = self._wall_clock() if self.target.device.type == "cuda" else None
        verdicts: list[Verdict] = []
        recorded = record_scopes(self.target.device, lambda: verdicts.append(self.run()))
        (verdict,), names = verdicts, [span.name for span in recorded.host]
        work = Work(
            rows=verdict.tokens.numel(),
            committed=int(verdict.num_accepted.sum()) + len(verdict.num_accepted),
            draft_passes=names.count("backbone"),
            lm_head_passes=names.count("lm_head"),
            logits=self._logits,
        )
        stages = stage_seconds(recorded.host)
        if recorded.device is not None:
            stages = dict.fromkeys(stages, 0.0) | stage_seconds(recorded.device)
        sample = Sample(recorded.host[0].seconds if wall is None else wall, stages, work, recorded.waited)
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


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def verify_passes(target: Target, state: State, sizes: Sequence[int]) -> dict[tuple[str, int], Callable[[], float]]:
    """Verify passes of `sizes` rows a request, of chains and of trees.

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


# The whole profile: cycles and verify passes, measured in turn.


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    p10: float
    """10th percentile."""
    p90: float
    """90th percentile."""

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """Of at least one run; between two runs percentiles are interpolated."""
        p10, middle, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
        return Timing(middle, p10, p90)


@dataclass(frozen=True)
class StageProfile:
    """One stage of a cycle."""

    seconds: Timing
    bytes: int
    """Bytes that it must move at least, see `roofline`."""
    floor: float | None
    """Seconds that these bytes take at the device's copy bandwidth; None if that was not measured."""

    @property
    def over_floor(self) -> float | None:
        """Its time as a multiple of its floor; None if there is no floor."""
        return self.seconds.median / self.floor if self.floor else None


@dataclass(frozen=True)
class MethodProfile:
    """A method's cycle."""

    method: str
    num_drafts: int
    """Per request, at most; 0 for `none`."""
    rows: int
    """Rows of a request in the verify pass."""
    committed: int
    """Tokens that a cycle committed, over all requests."""
    cycle: Timing
    stages: dict[str, StageProfile]
    """By the names in `STAGES`; a method has some of them."""
    host_gap: Timing
    """The rest of the cycle, which no stage accounts for, in each repeat."""
    waited: bool
    """On CUDA, whether the host waited for the device inside a cycle: the host gap then holds that too."""
    samples: dict[str, list[float]]
    """Seconds of every repeat: of `cycle`, of each stage, and `host_gap`, which together make the cycle."""


@dataclass(frozen=True)
class RowCost:
    """A verify pass, with its LM head, acceptance and commit."""

    kind: str
    """chain or tree."""
    rows: int
    """Of each request."""
    seconds: Timing
    plain_steps: float
    """Median ratio to the pass of one row of the same repeat."""


@dataclass(frozen=True)
class Profile:
    """All that one run measured."""

    context: int
    """Committed tokens of each request before the cycle."""
    batch: int
    """R."""
    candidates: int | None
    """K of the head's restricted candidates."""
    repeats: int
    threads: int
    copy_bandwidth: float | None
    """Bytes per second of a large copy, read and written ones; None if it was not measured."""
    methods: tuple[MethodProfile, ...]
    """`none` first."""
    rows: tuple[RowCost, ...]
    """One row first; empty if none were asked for."""

    @property
    def plain_step(self) -> Timing:
        """A step of `none`."""
        return self.methods[0].cycle

    def cost_ratio(self, method: MethodProfile) -> float:
        """c: the tau at which its draft starts to pay, and what tau is divided by to give the speed-up."""
        return method.cycle.median / self.plain_step.median


@torch.inference_mode()
def profile_cycles(
    target: Target,
    draft: AnyDraft | None,
    methods: Sequence[tuple[str, int | None]],
    *,
    context: int | Sequence[int] = 512,
    batch: int = 1,
    candidates: int | None = DEFAULT_CANDIDATES,
    repeats: int = 20,
    rows: Sequence[int] = (),
    bandwidth: bool = True,
    show: Show = lambda what, done, total, line: None,
) -> Profile:
    """Time a cycle of each method, its stages, a plain step and, if asked for, verify passes of several sizes.

    Args:
        target: the model served.
        draft: bound to it; None for methods that need none.
        methods: names and drafts per cycle, None for the most the draft makes; `none` need not be among them.
        context: committed tokens of each request; their keys, values and features are random. Or token ids, which are
            read, the same for each.
        batch: R, requests that are decoded together.
        candidates: K, or None for the whole draft vocabulary.
        repeats: how often all is measured.
        rows: rows of a request in verify passes to be timed beside the cycles, chains and trees.
        bandwidth: whether to measure it, and so the stages' floors.
        show: called with progress after every repeat.

    Raises:
        UserError: a number out of range, a method that the draft does not serve, or more than memory can hold.
    """
    check_numbers(batch=[batch], repeats=[repeats], rows=rows)
    if repeats > MOST_REPEATS:
        raise UserError(f"repeats must be at most {MOST_REPEATS}, got {repeats}")
    for method, _ in methods:
        check_draft(method, draft)
    check_numbers(num_drafts=[count for _, count in methods if count is not None])
    wanted = list(dict.fromkeys([("none", None), *(pair for pair in methods if pair[0] != "none")]))
    drafters = [_drafter(target, draft, method, count, batch, candidates) for method, count in wanted]
    most = max([1, *rows, *(drafter.max_drafts + 1 for drafter in drafters)])
    text = None if isinstance(context, int) else torch.tensor([context], device=target.device).repeat(batch, 1)
    length = context if isinstance(context, int) else len(context)
    check_context(length, most, target.max_length, target.name)
    _check_caches(target, drafters, draft, batch, length, most, text is not None)
    speed = copy_bandwidth(target.device) if bandwidth else None

    state = new_state(target, synthetic_text(target, length, batch) if text is None else text, 2 * most)
    fill_state(state)
    cycles = []
    for drafter, (_, count) in zip(drafters, wanted, strict=True):
        if text is None:
            cache = filled_caches(target, drafter, state)
        else:
            state = new_state(target, text, 2 * most)
            cache = read_state(target, drafter, state)
        its_draft = draft if drafter.feature_layers else None
        cycles.append(Cycle(target, state, drafter, cache, count or drafter.max_drafts, its_draft))
    passes = verify_passes(target, state, sorted({1, *rows})) if rows else {}

    samples: list[list[Sample]] = [[] for _ in cycles]
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for repeat in range(-WARM_UP, repeats):
        for cycle, of_cycle in zip(cycles, samples, strict=True):
            of_cycle.append(cycle.sample())
        for key, one_pass in passes.items():
            spent[key].append(one_pass())
        latest = (
            f"{name} {of_cycle[-1].cycle * 1e3:.3g} ms" for (name, _), of_cycle in zip(wanted, samples, strict=True)
        )
        show("repeats", max(0, repeat + 1), repeats, ", ".join(latest))
    found = [
        _method(method, cycle, of_cycle[WARM_UP:], length, speed)
        for (method, _), cycle, of_cycle in zip(wanted, cycles, samples, strict=True)
    ]
    costs = _row_costs({key: seconds[WARM_UP:] for key, seconds in spent.items()})
    return Profile(length, batch, candidates, repeats, torch.get_num_threads(), speed, tuple(found), costs)


def _drafter(
    target: Target, draft: AnyDraft | None, method: str, num_drafts: int | None, batch: int, candidates: int | None
) -> Drafter:
    its_draft = draft if METHODS[method].kinds else None
    options: dict[str, Any] = {"candidates": candidates, "num_drafts": num_drafts}
    return make_drafter(method, its_draft, requests=batch, device=target.device, **options)


def _check_caches(
    target: Target, drafters: Sequence[Drafter], draft: AnyDraft | None, batch: int, length: int, most: int, read: bool
) -> None:
    """Refuse caches and logits that memory cannot hold; texts that are read have a target cache for every drafter."""
    drafting = [draft.config for drafter in drafters if draft is not None and drafter.feature_layers]
    tokens = batch * (length + 2 * most)
    needed = cache_bytes(target.config, drafting, target.dtype, tokens)
    if read:
        needed += (len(drafters) - 1) * cache_bytes(target.config, [], target.dtype, tokens)
    needed += batch * most * target.vocab_size * (target.dtype.itemsize + 4)  # logits, and in float32
    check_memory(needed, target.device, f"a cache of {batch} x {length} tokens")


def default_methods(draft: AnyDraft | None) -> list[str]:
    """The methods that are profiled by default: the draft's kind; for a Domino draft also the one without its head."""
    if draft is None:
        return ["none"]
    kind = draft.kind
    return ["dflash", "domino"] if kind == "domino" else [kind]


def check_numbers(**numbers: Sequence[int]) -> None:
    """Refuse numbers below 1.

    Raises:
        UserError: naming the first option that holds one.
    """
    for name, values in numbers.items():
        if any(value < 1 for value in values):
            raise UserError(f"{name} must be at least 1, got {min(values)}")


def check_context(length: int, rows: int, max_length: int, name: str) -> None:
    """Refuse a context that a target cannot have.

    Args:
        length: committed tokens.
        rows: of the largest verify pass after them, the anchor included.
        max_length: longest text of the target.
        name: of the target.

    Raises:
        UserError: it is too short, or there is no room for the pass.
    """
    longest = max_length - rows
    if not 2 <= length <= longest:
        raise UserError(
            f"context must be between 2 and {longest} tokens, got {length}: {name} has {max_length} positions, and a "
            f"verify pass takes {rows}"
        )


def copy_bandwidth(device: torch.device, size: int | None = None, repeats: int = 7) -> float:
    """Bytes per second of a copy, read and written ones counted: the median of several, on PyTorch's threads.

    Args:
        device: whose memory.
        size: bytes of the tensor; less if memory is short. None for what no cache holds.
        repeats: how often.
    """
    size = size or COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    size = min(size, (free_memory(device) or 4 * size) // 4)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        copy.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / float(np.median(seconds[1:]))


def _method(name: str, cycle: Cycle, samples: Sequence[Sample], context: int, speed: float | None) -> MethodProfile:
    work, requests = samples[-1].work, len(cycle.state.lengths)
    moved = target_bytes(cycle.target, work, requests, context)
    moved |= draft_bytes(cycle.draft, cycle.drafter, work, requests, context)
    runs = {stage: [sample.stages[stage] for sample in samples] for stage in STAGES if stage in samples[0].stages}
    stages = {
        stage: StageProfile(Timing.of(seconds), moved.get(stage, 0), moved.get(stage, 0) / speed if speed else None)
        for stage, seconds in runs.items()
    }
    whole, gaps = [sample.cycle for sample in samples], [sample.host_gap for sample in samples]
    return MethodProfile(
        method=name,
        num_drafts=cycle.num_drafts,
        rows=work.rows // requests,
        committed=work.committed,
        cycle=Timing.of(whole),
        stages=stages,
        host_gap=Timing.of(gaps),
        waited=any(sample.waited for sample in samples),
        samples={"cycle": whole, **runs, "host_gap": gaps},
    )


def _row_costs(seconds: dict[tuple[str, int], list[float]]) -> tuple[RowCost, ...]:
    return tuple(
        RowCost(kind, rows, Timing.of(spent), float(np.median(np.divide(spent, seconds["chain", 1]))))
        for (kind, rows), spent in seconds.items()
    )


def profile_record(profile: Profile, target: Target, made_of: dict[str, Any]) -> dict[str, Any]:
    """What profile.json holds: the measurement with everything that follows from it, and what it was made with.

    Args:
        profile: of `profile_cycles`.
        target: that it was measured on.
        made_of: names of the models, such as `target` and `draft`, or `shape`.
    """
    methods = []
    for found in profile.methods:
        stages = {
            name: {
                **asdict(stage),
                "share": stage.seconds.median / found.cycle.median,
                "over_floor": stage.over_floor,
            }
            for name, stage in found.stages.items()
        }
        methods.append({**asdict(found), "stages": stages, "cost_ratio": profile.cost_ratio(found)})
    return {
        **made_of,
        "device": str(target.device),
        "device_name": device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "packed_weights": target.packed,
        "session": session_record(0),
        **asdict(profile),
        "plain_step": asdict(profile.plain_step),
        "methods": methods,
    }


# What a bench keeps of a profile, in breakdown.json: the stages of one method's cycle at a context of its prompts.


BREAKDOWN_FILE = "breakdown.json"


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
    """By the names in `STAGES`, and `host_gap`: what they leave of the cycle. Each is a separate
    median, so they add up to the cycle except for noise."""

    @property
    def cost_ratio(self) -> float:
        """c: the tau at which the draft starts to pay, and what tau is divided by to give the speed-up."""
        return self.cycle / self.plain_step


def measure_breakdown(
    target: Target,
    draft: AnyDraft,
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
        method: that the draft serves.
        num_drafts: N; None for the most the method makes.
        candidates: K, or None for the whole draft vocabulary.
        repeats: how often; medians are taken.

    Raises:
        UserError: as `profile.profile_cycles`.
    """
    wanted = [(method, num_drafts)]
    profile = profile_cycles(
        target, draft, wanted, context=context, candidates=candidates, repeats=repeats, bandwidth=False
    )
    found = profile.methods[-1]
    stages = {name: stage.seconds.median for name, stage in found.stages.items()}
    return Breakdown(
        method=method,
        num_drafts=found.num_drafts,
        context=profile.context,
        candidates=None if method == "dflash" else candidates,
        repeats=repeats,
        threads=profile.threads,
        plain_step=profile.plain_step.median,
        cycle=found.cycle.median,
        stages=stages | {"host_gap": found.host_gap.median},
    )


def save_breakdowns(breakdowns: Sequence[Breakdown], out: Path) -> None:
    """Write breakdown.json into a directory."""
    write_json([asdict(b) for b in breakdowns], out / BREAKDOWN_FILE)


def load_breakdowns(out: Path) -> list[Breakdown]:
    """What `save_breakdowns` wrote; nothing if there is no such file."""
    path = out / BREAKDOWN_FILE
    if not path.exists():
        return []
    try:
        return [Breakdown(**value) for value in read_json(path)]
    except TypeError as error:
        raise UserError(f"{path} does not hold breakdowns ({error}): delete it and measure again") from None
