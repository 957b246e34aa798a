"""`domino-spec profile`: where one cycle's time goes, and how far each stage is from what the hardware allows.

A cycle of every method asked for, and a plain step of `none` beside them, at a context, a batch and a number of drafts.
Every repeat measures all of them in turn, so that a machine that drifts does so for all. Cost ratio c = cycle / plain
step; a draft pays where tau > c, and the speed-up is tau / c (DESIGN section 7; paper section 4.3 and Figure 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from domino_spec.bench import environment
from domino_spec.bench.profile_bytes import cache_bytes, draft_bytes, target_bytes
from domino_spec.bench.profile_cycle import Cycle, Sample, verify_passes
from domino_spec.bench.profile_point import fill_state, filled_caches, new_state, read_state, synthetic_text
from domino_spec.bench.profile_watch import STAGES, synchronise
from domino_spec.bench.shapes import check_memory
from domino_spec.decoding.cycle import Drafter
from domino_spec.devices import free_memory
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import METHODS, check_draft, make_drafter
from domino_spec.settings import UserError
from domino_spec.target.model import Target

WARM_UP = 2
COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
"""Of the tensor that is copied to measure bandwidth: far beyond any cache."""

Show = Callable[[str, int, int, str], None]
"""Takes what is being done, how much of it is done, of how much, and a line about it."""


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
    """That it must move at least, see `profile_bytes`."""
    floor: float | None
    """Seconds that those bytes take at the device's copy bandwidth; None where that was not measured."""

    @property
    def over_floor(self) -> float | None:
        """Its time as a multiple of its floor; None where there is no floor."""
        return self.seconds.median / self.floor if self.floor else None


@dataclass(frozen=True)
class MethodProfile:
    """A method's cycle."""

    method: str
    num_drafts: int
    """Per request, at most; 0 for `none`."""
    rows: int
    """Of a request in the verify pass."""
    committed: int
    """Tokens that a cycle committed, over all requests."""
    cycle: Timing
    stages: dict[str, StageProfile]
    """By the names in `STAGES`, without those that the method has not."""
    host_gap: Timing
    """What the stages leave of the cycle, in each repeat."""
    waited: bool
    """On CUDA, whether the host waited for the device inside a cycle: stages then hold such waits, and the gap is not
    all of the host's."""
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
    """Bytes per second of a large copy, read and written ones; None where it was not measured."""
    methods: tuple[MethodProfile, ...]
    """`none` first."""
    rows: tuple[RowCost, ...]
    """One row first; empty where none were asked for."""

    @property
    def plain_step(self) -> Timing:
        """A step of `none`."""
        return self.methods[0].cycle

    def cost_ratio(self, method: MethodProfile) -> float:
        """c: the tau at which its draft starts to pay, and what tau is divided by to give the speed-up."""
        return method.cycle.median / self.plain_step.median


MOST_REPEATS = 10_000


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
    """Time a cycle of each method, its stages, a plain step and, where asked for, verify passes of several sizes.

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
        show: is told about progress.

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
            own = filled_caches(target, drafter, state)
        else:
            state = new_state(target, text, 2 * most)
            own = read_state(target, drafter, state)
        own_draft = draft if drafter.feature_layers else None
        cycles.append(Cycle(target, state, drafter, own, count or drafter.max_drafts, own_draft))
    passes = verify_passes(target, state, sorted({1, *rows})) if rows else {}

    samples: list[list[Sample]] = [[] for _ in cycles]
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for repeat in range(-WARM_UP, repeats):
        for cycle, own_samples in zip(cycles, samples, strict=True):
            own_samples.append(cycle.sample())
        for key, one_pass in passes.items():
            spent[key].append(one_pass())
        latest = (f"{name} {own[-1].cycle * 1e3:.3g} ms" for (name, _), own in zip(wanted, samples, strict=True))
        show("repeats", max(0, repeat + 1), repeats, ", ".join(latest))
    found = [
        _method(method, cycle, own_samples[WARM_UP:], length, speed)
        for (method, _), cycle, own_samples in zip(wanted, cycles, samples, strict=True)
    ]
    costs = _row_costs({key: seconds[WARM_UP:] for key, seconds in spent.items()})
    return Profile(length, batch, candidates, repeats, torch.get_num_threads(), speed, tuple(found), costs)


def _drafter(
    target: Target, draft: AnyDraft | None, method: str, num_drafts: int | None, batch: int, candidates: int | None
) -> Drafter:
    own_draft = draft if METHODS[method].kinds else None
    options: dict[str, Any] = {"candidates": candidates, "num_drafts": num_drafts}
    return make_drafter(method, own_draft, requests=batch, device=target.device, **options)


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
    """What is profiled where nothing is asked for: the draft's own method; of a Domino draft with its head off too."""
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
        rows: of the largest verify pass behind them, the last of them included.
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
        size: bytes of the tensor; less where memory is short. None for what no cache holds.
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
        RowCost(kind, rows, Timing.of(own), float(np.median(np.divide(own, seconds["chain", 1]))))
        for (kind, rows), own in seconds.items()
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
        "device_name": environment.device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "packed_weights": target.packed,
        "session": environment.session(0),
        **asdict(profile),
        "plain_step": asdict(profile.plain_step),
        "methods": methods,
    }
