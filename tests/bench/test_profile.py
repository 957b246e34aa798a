"""A profile: its cycle is the loop's own, its stages make up the cycle, and everything is put back in between."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType

from domino_spec.bench.profile import (
    STAGES,
    Cycle,
    Span,
    copy_bandwidth,
    default_methods,
    profile_cycles,
    read_events,
    record_scopes,
    stage_seconds,
)
from domino_spec.bench.roofline import fill_state, filled_caches, new_state, read_state, synthetic_text
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.methods import METHODS, make_drafter
from domino_spec.settings import UserError
from tests import tiny

TARGET_STAGES = {"verify", "verify_lm_head", "accept_commit"}
DRAFT_STAGES = {"context", "backbone", "lm_head", "rollout"}
DRAFTING = [method for method in METHODS if METHODS[method].kinds]
CPU = torch.device("cpu")


def drafter_for(target, method, requests=1, draft=None, **options):
    draft = draft or tiny.draft_for(method, target)
    return make_drafter(method, draft, requests=requests, device=CPU, candidates=10, **options), draft


def small_profile(target, method, draft=None, **options):
    draft = draft or tiny.draft_for(method, target)
    settings = {"context": 12, "candidates": 10, "repeats": 3, "bandwidth": False} | options
    return profile_cycles(target, draft, [(method, None)], **settings)


# Its cycle is the loop's


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("requests", [1, 2])
@torch.inference_mode()
def test_a_cycle_commits_what_decoding_commits(target, method, requests):
    prompt = tiny.random_prompts([11])[0]
    draft = tiny.draft_for(method, target)
    text = tiny.run(target, drafter_for(target, method, requests, draft)[0], [prompt] * requests, 24)[0].token_ids
    drafter, _ = drafter_for(target, method, requests, draft)
    state = new_state(target, torch.tensor([prompt] * requests), 64)
    cycle = Cycle(target, state, drafter, read_state(target, drafter, state), drafter.max_drafts, draft)
    for _ in range(5):
        cycle.run()
    for row, length in zip(state.tokens.tolist(), state.lengths.tolist(), strict=True):
        assert length >= 16 and row[:length] == prompt + text[: length - 11]


@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_a_cycle_starts_again_where_it_started(target, method):
    drafter, draft = drafter_for(target, method)
    state = new_state(target, synthetic_text(target, 12), 64)
    fill_state(state)
    cycle = Cycle(target, state, drafter, filled_caches(target, drafter, state), 4, draft)
    before, verdicts = cycle.drafter.propose(state, cycle.cache, 4), []
    for _ in range(3):
        verdicts.append(cycle.run())
        assert int(state.lengths[0]) > 12
        cycle.reset()
        assert state.lengths.tolist() == [12] and state.cache.lengths.tolist() == [11]
    assert torch.equal(cycle.drafter.propose(state, cycle.cache, 4).tokens, before.tokens)
    for verdict in verdicts[1:]:
        count = int(verdict.num_accepted) + 1
        assert torch.equal(verdict.num_accepted, verdicts[0].num_accepted)
        assert torch.equal(verdict.tokens[:, :count], verdicts[0].tokens[:, :count])


# Its stages


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_stages_and_gap_make_up_the_cycle_of_every_method(target, method, batch):
    profile = small_profile(target, method, batch=batch)
    assert profile.batch == batch and profile.methods[0].method == "none"
    for found in profile.methods:
        runs = [found.samples[name] for name in (*found.stages, "host_gap")]
        assert [sum(parts) for parts in zip(*runs, strict=True)] == pytest.approx(found.samples["cycle"])
        assert all(seconds > 0 for name in found.stages for seconds in found.samples[name])
        assert len(found.samples["cycle"]) == 3
        assert found.cycle.p10 <= found.cycle.median <= found.cycle.p90
        assert list(found.stages) == [name for name in STAGES if name in found.stages]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_stages_and_no_others(target, method):
    stages = set(small_profile(target, method).methods[-1].stages)
    expected = {"none": TARGET_STAGES, "ngram": TARGET_STAGES | {"rollout"}}
    assert stages == expected.get(method, TARGET_STAGES | DRAFT_STAGES)


def test_a_scope_counts_without_those_inside_it():
    spans = [
        Span("cycle", 0, 20, 20),
        Span("propose", 0, 8, 8),
        Span("backbone", 1, 2, 1),
        Span("head", 3, 7, 4),
        Span("lm_head", 4, 6, 2),  # a tree that runs its draft again while it grows
        Span("accept", 9, 15, 6),
        Span("verify", 10, 12, 2),
        Span("verify_lm_head", 12, 13, 1),
        Span("read", 16, 17, 1),
    ]
    expected = {"verify": 2, "verify_lm_head": 1, "context": 1, "backbone": 1, "lm_head": 2, "rollout": 2}
    assert stage_seconds(spans) == expected | {"accept_commit": 3}


class Event(NamedTuple):
    """An event as torch's profiler holds it."""

    text: str
    begin: int
    nanoseconds: int
    on: DeviceType = DeviceType.CPU

    def name(self) -> str:
        return self.text

    def start_ns(self) -> int:
        return self.begin

    def duration_ns(self) -> int:
        return self.nanoseconds

    def device_type(self) -> DeviceType:
        return self.on

    def is_user_annotation(self) -> bool:
        return self.text.startswith("domino::")


def test_on_cuda_a_scope_takes_the_time_of_its_kernels():
    cuda, second = DeviceType.CUDA, 10**9
    events = [
        Event("domino::cycle", 0, 9 * second),
        Event("domino::accept", 1 * second, 4 * second),
        Event("domino::verify", 2 * second, second),
        Event("domino::head", 6 * second, second),  # on the host alone
        Event("aten::mm", 2 * second, second),
        Event("domino::accept", 10 * second, 8 * second, cuda),
        Event("domino::verify", 10 * second, 5 * second, cuda),
        Event("gemm", 10 * second, second, cuda),
        Event("gemm", 13 * second, 2 * second, cuda),
        Event("argmax", 16 * second, 2 * second, cuda),
        Event("cudaDeviceSynchronize", 11 * second, second),
    ]
    recorded = read_events(events, on_cuda=True)
    assert [span.name for span in recorded.host] == ["cycle", "accept", "verify", "head"] and not recorded.waited
    assert stage_seconds(recorded.device) == {"verify": 3, "accept_commit": 2}
    assert read_events([*events, Event("cudaStreamSynchronize", 3 * second, 1)], on_cuda=True).waited


@torch.inference_mode()
def test_a_tree_that_runs_its_draft_again_is_counted_pass_by_pass(target):
    drafter, draft = drafter_for(target, "eagle3", num_drafts=8)
    drafter.prune = False
    state = new_state(target, synthetic_text(target, 12), 64)
    fill_state(state)
    sample = Cycle(target, state, drafter, filled_caches(target, drafter, state), 8, draft).sample()
    assert sample.work.draft_passes == sample.work.lm_head_passes == 1 + drafter.depth


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_marks_the_stages_that_a_profile_measures(target, method):
    """Any profiler of a running engine sees them."""
    drafter, draft = drafter_for(target, method)
    engine = Engine(target, drafter, slots=1, capacity=64)
    engine.submit(Request([1, 2, 1, 2], SamplingSettings(), Limits(32, stop_token_ids=frozenset())))
    engine.step()
    recorded = record_scopes(CPU, engine.step)
    names = [span.name for span in recorded.host]
    measured = small_profile(target, method, draft).methods[-1].stages
    assert {"context", *stage_seconds(recorded.host)} == {"context", *measured} and recorded.device is None
    assert [n for n in names if n in ("propose", "accept", "read")] == ["propose", "accept", "read"]


def test_the_loop_makes_no_scopes_without_a_profiler(monkeypatch, target):
    monkeypatch.setattr("domino_spec.decoding.cycle.record_function", None)
    drafter, _ = drafter_for(target, "domino")
    assert tiny.run(target, drafter, [[1, 2, 3]], 4)


def test_counting_logits_leaves_nothing_behind(target):
    draft = tiny.tiny_draft(target)
    small_profile(target, "domino", draft)
    assert "base_logits" not in vars(draft)


# What is measured


def test_a_profile_measures_what_it_was_asked_for(target):
    draft = tiny.tiny_draft(target)
    methods = [("domino", 2), ("domino", 4), ("dflash", 9), ("none", None), ("domino", 2)]
    shown = []
    profile = profile_cycles(
        target, draft, methods, context=20, repeats=2, bandwidth=False, show=lambda *line: shown.append(line)
    )
    found = [(m.method, m.num_drafts, m.rows) for m in profile.methods]
    assert found == [("none", 0, 1), ("domino", 2, 3), ("domino", 4, 5), ("dflash", 5, 6)]
    assert profile.context == 20 and profile.rows == () and profile.copy_bandwidth is None
    assert profile.cost_ratio(profile.methods[0]) == 1
    assert profile.cost_ratio(profile.methods[2]) == profile.methods[2].cycle.median / profile.plain_step.median
    assert [line[:3] for line in shown] == [("repeats", n, 2) for n in (0, 0, 1, 2)]
    assert all("domino" in line[3] for line in shown)


def test_a_text_is_read_where_one_is_given(target):
    """After a text that was read, as many drafts are accepted as decoding accepts there."""
    prompt = tiny.random_prompts([9])[0]
    for method in ("domino", "dflash-tree", "eagle3"):
        drafter, draft = drafter_for(target, method)
        (generation,) = tiny.run(target, drafter, [prompt], 12)
        found = small_profile(target, method, draft, context=prompt, batch=2)
        assert found.context == 9 and found.methods[-1].committed == 2 * generation.acceptance_lengths[0]


def test_verify_passes_are_timed_by_rows(target):
    profile = small_profile(target, "none", rows=[2, 4, 9])
    kinds = [(cost.kind, cost.rows) for cost in profile.rows]
    assert kinds == [("chain", 1), ("chain", 2), ("chain", 4), ("tree", 4), ("chain", 9), ("tree", 9)]
    assert profile.rows[0].plain_steps == 1
    assert all(cost.seconds.median > 0 and cost.plain_steps > 0 for cost in profile.rows)


def test_the_default_is_the_drafts_own_method_and_a_domino_drafts_head_off(target):
    assert default_methods(None) == ["none"]
    assert default_methods(tiny.tiny_draft(target)) == ["dflash", "domino"]
    assert default_methods(tiny.tiny_draft(target, head=False)) == ["dflash"]
    assert default_methods(tiny.tiny_single_layer(target, "dart")) == ["dart"]


def test_stages_are_held_against_the_copy_bandwidth(target):
    profile = small_profile(target, "domino", bandwidth=True)
    assert profile.copy_bandwidth > 0
    for stage in profile.methods[-1].stages.values():
        assert stage.floor == stage.bytes / profile.copy_bandwidth > 0
        assert stage.over_floor == stage.seconds.median / stage.floor


def test_a_copy_counts_what_is_read_and_what_is_written(monkeypatch):
    clock = iter([float(n) for n in range(100)])
    monkeypatch.setattr("domino_spec.bench.profile.time.perf_counter", lambda: next(clock))
    assert copy_bandwidth(CPU, 4096) == 2 * 4096


# Texts


def test_a_synthetic_text_is_the_same_every_time_and_can_be_looked_up(target):
    text = synthetic_text(target, 21, 3)
    assert text.shape == (3, 21) and torch.equal(text, synthetic_text(target, 21, 3))
    assert bool((text[:, -1] == text[:, 10]).all()) and int(text.max()) < target.vocab_size
    with pytest.raises(UserError, match="between 2 and"):
        synthetic_text(target, target.max_length)


# What cannot be measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"rows": [4, 0]}, "rows must be at least 1"),
        ({"context": 1}, "context must be between 2 and 506 tokens, got 1: tiny has 512 positions"),
        ({"context": 507}, "a verify pass takes 6"),
        ({"context": 450, "rows": [64]}, "between 2 and 448"),
        ({"candidates": 0}, "candidates must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(target, options, message):
    with pytest.raises(UserError, match=message):
        small_profile(target, "domino", **options)


def test_methods_that_the_draft_does_not_serve_are_refused(target):
    draft = tiny.tiny_draft(target)
    for methods, message in (
        ([("eagle3", None)], "needs an EAGLE-3 draft"),
        ([("best", None)], "unknown method 'best'"),
        ([("domino", 0)], "num_drafts must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            profile_cycles(target, draft, methods)
    with pytest.raises(UserError, match="method domino needs a draft"):
        profile_cycles(target, None, [("domino", None)])


def test_caches_that_memory_cannot_hold_are_refused(target, monkeypatch):
    monkeypatch.setattr("domino_spec.bench.shapes.free_memory", lambda device: 50_000)
    with pytest.raises(UserError, match=r"a cache of 8 x 400 tokens takes .* GB, and cpu has 0\.0 GB free"):
        small_profile(target, "domino", batch=8, context=400)
