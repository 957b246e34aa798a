"""`serve --check`: what it says without loading weights is what loading them would show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import load_draft, save_any_draft
from domino_spec.serve import preflight as checking
from domino_spec.serve.preflight import Finding, Plan, preflight
from domino_spec.serve.server import make_engine
from domino_spec.settings import UserError
from domino_spec.target import load
from tests import tiny
from tests.cli_fixtures import fail, make_draft_dir, make_target_dir, run, save_target  # noqa: F401

PARTS = ("device", "engine", "target", "draft", "method", "pairing", "memory")


def plan(target, draft, **changes) -> Plan:
    values = dict(
        engine="local",
        target=str(target),
        draft=None if draft is None else str(draft),
        method=None,
        device="cpu",
        dtype="auto",
        slots=4,
        capacity=64,
        candidates=DEFAULT_CANDIDATES,
        num_drafts=None,
        prefix_bytes=0,
        allow_other_target=False,
    )
    return Plan(**{**values, **changes})


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings}


def test_a_pair_that_fits_is_found_fit_part_by_part(target_dir, draft_dir):
    findings = preflight(plan(target_dir, draft_dir))
    assert tuple(f.part for f in findings) == PARTS
    assert all(f.works for f in findings)
    sentences = {f.part: f.sentence for f in findings}
    assert "LlamaForCausalLM" in sentences["target"] and "same weights" in sentences["pairing"]
    assert "the head (GRU 16, low rank 16) corrects the 128 best base logits" in sentences["method"]


def test_the_target_alone_needs_no_draft(target_dir):
    findings = preflight(plan(target_dir, None))
    assert tuple(f.part for f in findings) == ("device", "engine", "target", "memory")
    assert all(f.works for f in findings)


def test_no_weights_are_read(target_dir, draft_dir, monkeypatch):
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr("domino_spec.draft.checkpoint.load_tensors", never)
    assert all(finding.works for finding in preflight(plan(target_dir, draft_dir)))


def held(*things: Any) -> int:
    """Bytes of every tensor that these hold, however deep, in memory that is counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for part in parts(thing):
            visit(part)

    def parts(thing: Any) -> Iterator[Any]:
        if isinstance(thing, nn.Module):
            yield from thing.children()
        if isinstance(thing, dict):
            yield from thing.values()
        elif isinstance(thing, (list, tuple)):
            yield from thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, Tensor):
            yield from vars(thing).values()

    for thing in things:
        visit(thing)
    return sum(storages.values())


@pytest.mark.parametrize("method", ["domino", "none"])
def test_the_memory_it_names_is_the_memory_that_the_engine_takes(tmp_path, monkeypatch, method):
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=4, max_position_embeddings=4096)
    directory = save_target(tmp_path / "target", **sizes)
    target = load.load_target(directory)
    draft = None
    if method != "none":
        vocabulary = torch.arange(0, target.vocab_size, 2)
        save_any_draft(tiny.tiny_draft(target, draft_vocab_ids=vocabulary), tmp_path / "draft")
        draft = load_draft(tmp_path / "draft", target)
    engine = make_engine(target, draft, slots=4, capacity=2048, num_drafts=4, method=method)
    truly = held(target.model, target.lm_head_weight, engine.state, engine.cache)
    if isinstance(draft, Draft):
        truly += held(draft, draft.ends.lm_head) + draft.ends.lm_head.nbytes  # the packed copy has no attribute here
    named: dict[str, int] = {}
    monkeypatch.setattr(checking, "memory_finding", lambda needs, device: named.update(needs) or Finding("memory", ""))
    changes = dict(capacity=2048, method=method, num_drafts=4)
    preflight(plan(directory, None if draft is None else tmp_path / "draft", **changes))
    assert sum(named.values()) == pytest.approx(truly, rel=0.1)


def test_too_little_memory_stands_in_the_way(target_dir, draft_dir, monkeypatch):
    monkeypatch.setattr(checking, "free_memory", lambda device: 1000)
    finding = preflight(plan(target_dir, draft_dir))[-1]
    assert finding.part == "memory" and not finding.works and finding.sentence.endswith("too little")


def test_caches_that_memory_cannot_hold_are_refused_before_they_are_allocated(target_dir, monkeypatch):
    target = load.load_target(target_dir)
    allocated, new_cache = [], type(target).new_cache

    def noted(self, requests: int, rows: int):
        allocated.append(requests)
        return new_cache(self, requests, rows)

    monkeypatch.setattr(type(target), "new_cache", noted)
    monkeypatch.setattr(checking, "free_memory", lambda device: 2**26)
    with pytest.raises(UserError, match=r"caches of 1000 slots.*0.1 available.*ask for fewer --slots"):
        make_engine(target, None, slots=1000, capacity=200)
    with pytest.raises(UserError, match=r"earlier turns 4096.0.*less --prefix-cache"):
        make_engine(target, None, slots=1, capacity=200, prefix_bytes=2**42)
    assert allocated == [1, 1], "one slot, to see what it takes"


def test_every_fault_is_named_and_memory_is_left_out(tmp_path, target_dir, draft_dir):
    other = save_target(tmp_path / "other", hidden_size=48)
    wrong = found(preflight(plan(other, draft_dir, device="cuda", method="eagle3")))
    assert "memory" not in wrong
    assert {part for part, finding in wrong.items() if not finding.works} >= {"method", "pairing"}
    assert "hidden size 32, the target has 48" in wrong["pairing"].sentence
    assert "eagle3 needs an EAGLE-3 draft" in wrong["method"].sentence
    if not torch.cuda.is_available():
        assert wrong["device"].sentence.startswith("device cuda was asked for, but PyTorch sees no CUDA device")


def test_other_weights_of_the_same_shape_are_refused_unless_allowed(tmp_path, draft_dir):
    tuned = save_target(tmp_path / "tuned", seed=7)
    assert not found(preflight(plan(tuned, draft_dir)))["pairing"].works
    assert all(finding.works for finding in preflight(plan(tuned, draft_dir, allow_other_target=True)))


def test_an_engine_that_is_not_installed_is_said_and_the_rest_is_checked(target_dir, draft_dir, monkeypatch):
    monkeypatch.setattr("domino_spec.engines.launch.DISTRIBUTIONS", {"vllm": ("no-such-engine",)})
    findings = found(preflight(plan(target_dir, draft_dir, engine="vllm")))
    assert not findings["engine"].works and "vllm is not installed" in findings["engine"].sentence
    assert findings["method"].sentence.startswith("domino, 5 drafts a cycle")


def test_the_command_prints_its_findings_and_its_verdict(target_dir, draft_dir):
    pair = ("--target", target_dir, "--draft", draft_dir, "--device", "cpu", "--capacity", 64, "--prefix-cache", 0)
    result = run("serve", "--check", *pair)
    assert (result.exit_code, result.stderr) == (0, "")
    *lines, verdict = result.stdout.splitlines()
    assert tuple(line.split()[0] for line in lines) == PARTS and verdict == "It will work."
    record = json.loads(run("serve", "--check", "--json", *pair).stdout)
    assert record["works"] and [f["part"] for f in record["findings"]] == list(PARTS)


def test_the_command_fails_with_what_stands_in_the_way(tmp_path, target_dir, draft_dir):
    other = save_target(tmp_path / "other", hidden_size=48)
    line = fail("serve", "--check", "--target", other, "--draft", draft_dir)
    assert "it will not work: draft" in line and "hidden size" in line


def test_findings_are_values():
    assert dataclasses.astuple(Finding("memory", "enough")) == ("memory", "enough", True)
