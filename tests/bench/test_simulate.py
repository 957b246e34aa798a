"""Tables of simulated tau: paired ratios, and measurements that come back from disk."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from domino_spec.bench.simulate import (
    load_simulated,
    render,
    save_simulated,
    summarize,
)
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.settings import UserError
from domino_spec.training.evaluate import Simulated
from tests.tiny import (
    random_prompts,
    run,
)


def measured(*accepted: list[int], drafts: int = 4) -> Simulated:
    parts = [torch.tensor(part, dtype=torch.long) for part in accepted]
    return Simulated([torch.arange(len(p)) for p in parts], parts, [torch.full_like(p, drafts) for p in parts])


IDS = ["a/1", "a/2", "b/1", "b/2", "b/3"]
RESULTS = {
    "chain": measured([0, 2], [1], [3], [1], []),
    "tree": measured([2, 4], [3], [5], [3], [], drafts=8),
}


def test_the_mean_over_suites_weighs_suites_and_the_pooled_tau_weighs_anchors():
    chain, tree = summarize(RESULTS, IDS, "chain")
    assert (chain["answers"], chain["anchors"], tree["drafts"]) == (4, 5, 8)
    assert [chain["suites"][name]["tau"] for name in "ab"] == pytest.approx([2.0, 3.0])
    assert chain["mean"]["tau"] == pytest.approx(2.5) and chain["pooled"]["tau"] == pytest.approx(12 / 5)
    assert tree["mean"]["ratio"] == pytest.approx(4.5 / 2.5) and tree["pooled"]["ratio"] == pytest.approx(22 / 12)
    assert tree["suites"]["b"]["ratio"] == pytest.approx(5 / 3)
    assert json.loads(json.dumps([chain, tree])) is not None


def test_ratios_are_paired():
    """A method that is a tenth better on every answer: its ratio is known exactly, though tau is not."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(1 + 9 * torch.rand(1, generator=generator)).repeat(7) for _ in range(40)]
    results = {
        name: Simulated([torch.arange(7)] * 40, [factor * x - 1 for x in lengths], [torch.ones(7)] * 40)
        for name, factor in (("one", 1.0), ("better", 1.1))
    }
    _, better = summarize(results, [f"s/{i}" for i in range(40)], "one")
    low, high = better["mean"]["ratio_interval"]
    assert low == pytest.approx(1.1, rel=1e-5) and high == pytest.approx(1.1, rel=1e-5)
    low, high = better["mean"]["tau_interval"]
    assert high - low > 1


def test_the_tables_name_methods_suites_and_the_reference():
    text = render(summarize(RESULTS, IDS, "chain"), "chain")
    assert "| method | drafts | anchors | a | b | mean of suites | all anchors |" in text
    assert "| tree | 8.0 | 5 | 4.00 | 5.00 | 4.50" in text
    assert "tau over that of chain" in text


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="reference dflash was not measured; measured are chain, tree"):
        summarize(RESULTS, IDS, "dflash")
    with pytest.raises(UserError, match="too short"):
        summarize({"chain": measured([], [])}, IDS[:2], "chain")
    with pytest.raises(ValueError, match="same answers"):
        summarize(RESULTS | {"other": measured([1], [], [], [], [])}, IDS, "chain")


def test_measurements_come_back_from_disk_only_with_their_own_settings(tmp_path):
    path, settings = tmp_path / "raw" / "chain.jsonl", {"every": 4, "draft": "x"}
    assert load_simulated(IDS, settings, path) is None
    save_simulated(RESULTS["chain"], IDS, settings, path)
    again = load_simulated(IDS, settings, path)
    assert again is not None
    for one, other in zip(vars(RESULTS["chain"]).values(), vars(again).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(UserError, match="measured with other every: give another --out"):
        load_simulated(IDS, settings | {"every": 2}, path)
    with pytest.raises(UserError, match="other answers"):
        load_simulated(IDS[1:], settings, path)


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "simulated_tau.py"


def test_the_benchmark_measures_what_is_missing_and_reports(disk, tmp_path, monkeypatch, capsys):
    from domino_spec.target.load import load_target

    target = load_target(disk.target)
    prompts = random_prompts([5, 8, 6])
    generations = run(target, PlainDecoding(), prompts, 30)
    rows = [
        {"id": f"suite{r % 2}/{r}", "temperature": 0.0, "thinking": False, "prompt_ids": p, "response_ids": g.token_ids}
        for r, (p, g) in enumerate(zip(prompts, generations, strict=True))
    ]
    (tmp_path / "t0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def main(methods: str) -> str:
        options = ["--target", disk.target, "--draft", f"ours={disk.draft}", "--methods", methods]
        options += ["--answers", str(tmp_path / "t0.jsonl"), "--features", str(tmp_path / "features")]
        monkeypatch.setattr(sys, "argv", ["simulated_tau.py", *options, "--out", str(tmp_path / "out")])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    assert "domino:3: 12 anchors" in main("domino:3,ngram:4")
    out = main("domino:3,dflash@ours:2,domino-tree:6")
    assert "domino:3: " not in out, "it was measured already"
    assert "| dflash@ours:2 | 2.0 | 12 |" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["method"] for entry in report["0"]] == ["domino:3", "dflash@ours:2", "domino-tree:6"]
    for wrong, message in (
        ("domino", "must read name:budget"),
        ("eagle:3", "unknown method"),
        ("domino@x:3", "called x"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(wrong)
