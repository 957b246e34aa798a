"""The static cycle never looks at the device, its shapes do not change, and graphs of it are captured once."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from domino_spec.decoding.engine import Engine
from domino_spec.decoding.graphs import capture as capture_module
from domino_spec.decoding.graphs.capture import why_not
from domino_spec.decoding.graphs.cycles import Shape
from domino_spec.decoding.sampling import Sampling, SamplingSettings, Warpers
from domino_spec.drafters.methods import make_drafter
from domino_spec.target.cache import ATTENTION_NAME
from domino_spec.target.model import Target
from tests.decoding.graphs.static_engines import (
    COUNTS,
    EACH,
    EVERYTHING,
    PROMPTS,
    decoded,
    drafter_of,
    engine_of,
    known,
    requests_of,
    told,
)
from tests.decoding.watching import Looked, NoLooks, Trace, forbid_lists
from tests.tiny import (
    ARCHITECTURES,
    VOCAB,
    as_target,
    draft_for,
    tiny_target,
)

# What it never does


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["greedy", "everything"])
@pytest.mark.parametrize("method", EACH)
def test_the_host_never_looks_at_the_device_within_a_cycle(target, method, settings, monkeypatch):
    engine = engine_of(target, drafter_of(target, method))
    seen = watch(engine, monkeypatch)
    decoded(engine, requests_of(PROMPTS, COUNTS, [settings] * len(PROMPTS)))
    assert len(seen) > 3, "several extents and numbers of requests"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_family_of_targets_looks_at_the_device(kind, monkeypatch):
    target = tiny_target(kind)
    engine = engine_of(target, drafter_of(target, "domino-tree"))
    assert watch(engine, monkeypatch) == set()
    ours = decoded(engine, requests_of(PROMPTS[:3], [12] * 3))
    ordinary = decoded(
        engine_of(target, drafter_of(target, "domino-tree"), static=False), requests_of(PROMPTS[:3], [12] * 3)
    )
    assert told(ours) == told(ordinary)


def watch(engine: Engine, monkeypatch) -> set[Shape]:
    """Raise where a static cycle looks at the device; the shapes of cycles are added to what is returned."""
    cycle, seen = engine.static.cycle, set()

    def watched(shape: Shape) -> None:
        seen.add(shape)
        with NoLooks(), monkeypatch.context() as patched:
            forbid_lists(patched)
            cycle(shape)

    monkeypatch.setattr(engine.static, "cycle", watched)
    return seen


def test_what_watches_sees_the_looks_of_ordinary_cycles(target):
    engine = engine_of(target, drafter_of(target, "domino"), static=False)
    engine.submit(requests_of(PROMPTS[:1], [9])[0])
    engine.step()
    state, cache = engine.state.view(0, 1, Sampling([SamplingSettings()])), engine.cache.view(0, 1)
    with NoLooks(), pytest.raises(Looked):
        engine.drafter.propose(state, cache, 3)
    with NoLooks(), pytest.raises(Looked):
        engine.target.forward(state.tokens[:, :3], state.cache)
    for look in (lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: torch.tensor([1]), lambda t: int(t[0])):
        with NoLooks(), pytest.raises(Looked):
            look(torch.arange(3))


@pytest.mark.parametrize("method", ["knows", "domino", "domino-tree"])
def test_shapes_and_memory_are_the_same_in_every_cycle(target, method):
    """Other lengths, other numbers of accepted drafts, somebody ended: the same operations on the same shapes."""
    drafter = known(target, prompts=PROMPTS[:3]) if method == "knows" else drafter_of(target, method)
    engine = engine_of(target, drafter)
    generations = [engine.submit(r) for r in requests_of(PROMPTS[:3], [8, 40, 40])]
    engine.step()
    static = engine.static
    shape = Shape(3, 80, drafter.max_drafts, drafter.max_drafts, Warpers())
    held = places_of(engine)
    traces, accepted, active = [], [], []
    for _ in range(6):
        with torch.inference_mode(), Trace() as trace:
            static.cycle(shape)
        traces.append(trace.steps)
        accepted.append(tuple(static.decided[:3, 0].tolist()))
        active.append(engine.state.active.sum().item())
        static.pending = None  # nobody waits for these cycles
    assert all(trace == traces[0] for trace in traces) and len(traces[0]) > 100
    assert len(set(active)) > 1 or method != "knows", "one has ended meanwhile"
    assert len(set(accepted)) > 1 or method != "knows"
    assert places_of(engine) == held and generations


def places_of(engine: Engine) -> list[int]:
    """Where in memory everything is that a cycle writes or reads beside the weights."""
    static = engine.static
    holders = (engine.state, engine.state.cache, engine.cache, static, static.sampling)
    kept = [t for holder in holders for t in vars(holder).values() if isinstance(t, torch.Tensor)]
    return [t.data_ptr() for t in kept]


@pytest.mark.parametrize("method", EACH)
def test_cycles_after_the_end_change_nothing(target, method):
    engine = engine_of(target, drafter_of(target, method))
    generations = [engine.submit(r) for r in requests_of(PROMPTS[:3], [5, 9, 2])]
    while engine.state.active.any() or not engine.static.launched:
        engine.step()
    before = kept_of(engine)
    assert engine.static.pending is not None, "all have ended, and the result of the last was not read yet"
    with torch.inference_mode():
        for _ in range(3):
            engine.static.cycle(engine.static.pending.shape)
    for was, now in zip(before, kept_of(engine), strict=True):
        assert torch.equal(was, now)
    assert not [g for g in generations if g.num_tokens > 9]


def kept_of(engine: Engine) -> list[torch.Tensor]:
    """Copies of all that is committed."""
    state, copies = engine.state, []
    for cache in (state.cache, engine.cache):
        copies += [cache.lengths.clone()]
        for request, rows in enumerate(cache.lengths.tolist()):
            copies += cache.rows_of(request, rows)
    for request, length in enumerate(state.lengths.tolist()):
        copies += [state.tokens[request, :length].clone()]
    return [*copies, state.lengths.clone(), state.active.clone()]


# Graphs


class Tape:
    """Stands for a CUDA graph: capturing runs nothing that lasts and fails at a look; replaying runs the cycle."""

    def __init__(self, cycle, pool, device) -> None:
        self.cycle, self.replays = cycle, 0
        active = cycle.func.__self__.state.active
        before = active.clone()
        active.fill_(False)
        try:
            with NoLooks():
                cycle()
        finally:
            active.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        self.cycle()


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    made: list[Tape] = []
    monkeypatch.setattr(capture_module, "capturable", lambda device: True)
    monkeypatch.setattr(capture_module, "capture", lambda *given: made.append(Tape(*given)) or made[-1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "domino", "domino-tree"])
def test_a_shape_is_captured_once_and_replayed_by_whoever_comes_later(target, method, tapes):
    requests = requests_of(PROMPTS, COUNTS)
    engine = engine_of(target, drafter_of(target, method))
    first = decoded(engine, requests)
    captured = len(tapes)
    assert captured == len(engine.static.graphs) > 2
    assert sum(tape.replays for tape in tapes) == engine.static.launched > 2 * captured
    again = decoded(engine, requests_of(PROMPTS, COUNTS, [dict(seed=9)] * len(PROMPTS)))
    assert len(tapes) == captured, "other requests in the same slots need no other graphs"
    ordinary = decoded(engine_of(target, drafter_of(target, method), static=False), requests)
    assert told(first) == told(again) == told(ordinary)


def test_other_settings_are_filled_in_and_other_kinds_captured(target, tapes):
    engine = engine_of(target, drafter_of(target, "domino"))
    ordinary = engine_of(target, drafter_of(target, "domino"), static=False)
    kinds = []
    for settings in (dict(temperature=0.8), dict(temperature=1.3), dict(temperature=1.0, top_k=4), {}):
        requests = requests_of(PROMPTS[:3], [15] * 3, [settings] * 3)
        assert told(decoded(engine, requests)) == told(decoded(ordinary, requests))
        kinds.append({tape.cycle.args[0].warpers for tape in tapes})
    assert kinds[0] == kinds[1] and [len(k) for k in kinds] == [1, 1, 2, 3]


def test_a_module_that_cannot_be_captured_is_named_in_one_line_and_decodes_eagerly(model, target, tapes, caplog):
    class Peeks(torch.nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if float(x.sum()) > -1e30 else x

    peeking = as_target(model)
    peeking.layers[2].mlp = Peeks(peeking.layers[2].mlp)
    requests = requests_of(PROMPTS, COUNTS)
    engine = engine_of(peeking, drafter_of(peeking, "domino"))
    with caplog.at_level(logging.WARNING):
        ours = decoded(engine, requests)
    assert told(ours) == told(decoded(engine_of(target, drafter_of(target, "domino"), static=False), requests))
    lines = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert len(lines) == 1 and "Peeks" in lines[0] and "look at the device" in lines[0]
    assert len(engine.static.graphs) == 0 and not engine.static.graphs.captures


def experts(implementation: str) -> Target:
    """A random mixture of experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.25,
    )
    options = dict(attn_implementation=ATTENTION_NAME, experts_implementation=implementation)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return Target(model.requires_grad_(False), None, "experts")


@pytest.mark.parametrize(("implementation", "captured"), [("grouped_mm", True), ("eager", False)])
def test_mixtures_of_experts_are_captured_where_their_modules_allow(implementation, captured, tapes, caplog):
    target, requests = experts(implementation), requests_of(PROMPTS[:3], [12] * 3)
    engine = engine_of(target, drafter_of(target, "domino"))
    with caplog.at_level(logging.WARNING):
        ours = decoded(engine, requests)
    assert told(ours) == told(decoded(engine_of(target, drafter_of(target, "domino"), static=False), requests))
    assert bool(tapes) == captured == (not caplog.records)
    assert captured or "Qwen3MoeExperts" in caplog.records[0].getMessage()


def test_packed_targets_and_drafts_have_static_cycles_too(model):
    target = as_target(model)
    drafters = [
        make_drafter("domino", draft_for("domino", target).pack(), requests=1, device=target.device) for _ in "12"
    ]
    target.pack()
    requests = requests_of(PROMPTS, COUNTS)
    ordinary, ours = (decoded(engine_of(target, d, s), requests) for d, s in zip(drafters, (False, True), strict=True))
    assert told(ours) == told(ordinary)


def test_targets_whose_passes_are_known_not_to_be_captured_are_not_tried(target, tapes, caplog):
    assert why_not(target) is None
    spread = tiny_target()
    spread.model.register_buffer("elsewhere", torch.empty(1, device="meta"))
    assert "spread over cpu, meta" in why_not(spread)
    offloaded = tiny_target()
    offloaded.layers[1]._hf_hook = type("Hook", (), {"offload": True})()
    assert "keeps weights of" in why_not(offloaded)
    with caplog.at_level(logging.WARNING):
        engine = engine_of(spread, drafter_of(spread, "none"))
    assert len(caplog.records) == 1 and not engine.static.graphs.captures and not tapes
