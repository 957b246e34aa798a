"""What is kept of a profile: the breakdown of a bench, and the JSON, tables and plot of `domino-spec profile`."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import matplotlib.image
import pytest

from domino_spec.bench.profile import STAGES, measure_breakdown, profile_cycles, profile_record
from domino_spec.bench.profile_report import (
    check_writable,
    profile_figure,
    render_breakdown,
    render_profile,
    stage_name,
    write_profile,
)
from domino_spec.drafters.methods import METHODS
from domino_spec.settings import UserError
from tests import tiny


@pytest.mark.parametrize("shift_label", [True, False])
@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_a_breakdown_has_the_stages_of_a_profile(target, method, shift_label):
    draft = tiny.tiny_draft(target, shift_label=shift_label)
    found = measure_breakdown(target, draft, tiny.random_prompts([9])[0], method=method, candidates=10, repeats=3)
    assert list(found.stages) == [*STAGES, "host_gap"]
    assert all(found.stages[name] > 0 for name in STAGES)
    assert found.num_drafts == draft.config.max_drafts and found.context == 9
    assert found.cost_ratio == found.cycle / found.plain_step
    assert found.candidates == (10 if method == "domino" else None)


def test_a_single_repeat_adds_up_to_its_cycle(target):
    found = measure_breakdown(target, tiny.tiny_draft(target), [1, 2, 3, 4], repeats=1)
    assert sum(found.stages.values()) == pytest.approx(found.cycle)


def test_the_table_names_every_stage_and_what_tau_must_reach(target):
    found = measure_breakdown(target, tiny.tiny_draft(target), [1, 2, 3], num_drafts=2, repeats=1)
    table = render_breakdown(found)
    named = ("verify", "context projection", "backbone", "LM head", "head rollout", "accept and commit", "host gap")
    assert all(f"| {name} |" in table for name in named) and "| **cycle** |" in table
    assert f"tau {found.cost_ratio:.2f}" in table and f"tau {2 * found.cost_ratio:.2f}" in table


def test_what_cannot_be_broken_down_is_refused(target):
    draft = tiny.tiny_draft(target)
    with pytest.raises(UserError, match="eagle3 needs an EAGLE-3 draft"):
        measure_breakdown(target, draft, [1, 2], method="eagle3")
    with pytest.raises(UserError, match="repeats must be at least 1"):
        measure_breakdown(target, draft, [1, 2], repeats=0)
    with pytest.raises(UserError, match="context must be between 2 and"):
        measure_breakdown(target, draft, [1])


# Files: JSON from which tables and plot are made, each file whole or absent.


@pytest.fixture(scope="module")
def record(target):
    """Three methods and two sizes of verify passes, as JSON has them."""
    methods = [("dflash", 4), ("domino", 4), ("ngram", 2)]
    found = profile_cycles(target, tiny.tiny_draft(target), methods, context=16, candidates=10, repeats=3, rows=[2, 8])
    return json.loads(json.dumps(profile_record(found, target, {"shape": None, "target": "a-target", "draft": "mine"})))


def test_the_record_holds_all_that_was_measured_and_what_it_was_made_with(record):
    about = {"target", "draft", "shape", "device", "device_name", "dtype", "packed_weights", "session", "threads"}
    measured = {"context", "batch", "candidates", "repeats", "copy_bandwidth", "plain_step", "methods", "rows"}
    assert set(record) == about | measured
    assert {"command", "commit", "versions", "started"} <= set(record["session"])
    assert [m["method"] for m in record["methods"]] == ["none", "dflash", "domino", "ngram"]
    domino = record["methods"][2]
    assert list(domino["stages"]) == list(STAGES)
    assert domino["cost_ratio"] == domino["cycle"]["median"] / record["plain_step"]["median"]
    for name, stage in domino["stages"].items():
        assert set(stage) == {"seconds", "bytes", "floor", "share", "over_floor"}
        assert stage["bytes"] > 0 and stage["floor"] == stage["bytes"] / record["copy_bandwidth"]
        assert stage["over_floor"] == stage["seconds"]["median"] / stage["floor"]
        assert stage["share"] == stage["seconds"]["median"] / domino["cycle"]["median"]
        assert len(domino["samples"][name]) == 3


def test_the_tables_show_every_stage_of_every_method(record):
    text = render_profile(record)
    assert text.startswith("a-target with mine; float32 on ") and "GB/s; context 16, batch 1, median of 3." in text
    tables = dict(re.findall(r"\*\*(.+?)\*\*\n\n((?:\|.+\n?)+)", text))
    assert list(tables) == ["plain step", "dflash, 4 drafts", "domino, 4 drafts", "ngram, 2 drafts"]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in tables["domino, 4 drafts"].splitlines()[2:]]
    assert cells == [
        "verify",
        "verify: LM head",
        "context projection",
        "backbone",
        "LM head",
        "head rollout",
        "accept and commit",
        "host gap",
        "**cycle**",
    ]
    assert "| look-up |" in tables["ngram, 2 drafts"] and "backbone" not in tables["ngram, 2 drafts"]
    assert "host waited" not in text


def test_figures_in_the_tables_are_those_of_the_record(record):
    changed = json.loads(json.dumps(record))
    domino = changed["methods"][2]
    domino["cycle"] = {"median": 0.020, "p10": 0.018, "p90": 0.1}
    domino["cost_ratio"], domino["waited"] = 1.25, True
    domino["stages"]["backbone"] |= {
        "seconds": {"median": 0.004, "p10": 0.0035, "p90": 0.0042},
        "share": 0.2,
        "bytes": 2_100_000_000,
        "floor": 0.0025,
        "over_floor": 1.6,
    }
    changed["rows"] = [
        {"kind": "chain", "rows": 1, "seconds": {"median": 0.05, "p10": 0, "p90": 0}, "plain_steps": 1.0},
        {"kind": "chain", "rows": 8, "seconds": {"median": 0.06, "p10": 0, "p90": 0}, "plain_steps": 1.21},
        {"kind": "tree", "rows": 8, "seconds": {"median": 1.5, "p10": 0, "p90": 0}, "plain_steps": 30.5},
    ]
    text = render_profile(changed)
    assert "| backbone | 4 | 3.5-4.2 | 20.0% | 2,100 | 2.5 | 1.60 |" in text
    assert "| domino, 4 drafts | 5 | 20 | 18-100 | 1.25 |" in text
    assert "| 1 | 50 | 1.00 | – | – |" in text and "| 8 | 60 | 1.21 | 1500 | 30.50 |" in text
    assert text.count("The host waited for the device") == 1


def test_what_follows_the_base_logits_is_called_by_what_it_is():
    named = {method: stage_name("rollout", method) for method in METHODS if method != "none"}
    assert {named[m] for m in ("domino", "domino+ngram")} == {"head rollout"}
    assert named["dflash"] == "choice of tokens" and named["ngram"] == "look-up"
    assert {named[m] for m in named if "tree" in m or m in ("eagle3", "dart", "domino-best-first")} == {"tree growth"}


def test_every_file_is_written_and_the_plot_can_be_looked_at(record, tmp_path):
    text = write_profile(record, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.md", "profile.png", "profile.svg"}
    assert json.loads((tmp_path / "profile.json").read_text()) == record
    markdown = (tmp_path / "profile.md").read_text()
    assert text in markdown and "](profile.png)" in markdown
    image = matplotlib.image.imread(tmp_path / "profile.png")
    assert image.shape[0] > 200 and image.shape[1] > 400 and image.std() > 0.05
    names = "".join(ElementTree.parse(tmp_path / "profile.svg").getroot().itertext())
    assert "backbone" in names and "plain step" in names and "a-target" in names


def test_bars_are_as_high_as_their_cycles(record):
    (panel,) = profile_figure(record).axes
    tops = [0.0] * len(record["methods"])
    for bar in panel.patches:
        place = round(bar.get_x() + bar.get_width() / 2)
        assert bar.get_y() == pytest.approx(tops[place])
        tops[place] += bar.get_height()
    for top, entry in zip(tops, record["methods"], strict=True):
        parts = [stage["seconds"]["median"] for stage in entry["stages"].values()]
        assert top == pytest.approx(1e3 * (sum(parts) + entry["host_gap"]["median"]))


def test_a_directory_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        check_writable(tmp_path / "file")
