"""`domino-spec profile`: from a shape or a pair to tables, JSON and a plot; what is wrong is one line."""

from __future__ import annotations

import json

import pytest

from domino_spec.bench import profile as profiling
from domino_spec.bench import shapes
from tests.cli_fixtures import fail, make_draft_dir, make_target_dir, run  # noqa: F401

FILES = {"profile.json", "profile.md", "profile.png", "profile.svg"}
TINY = ("--shape", "tiny", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """Bandwidth of a tensor that is copied at once."""
    monkeypatch.setattr(profiling, "COPY_BYTES", {"cpu": 1 << 20})


def test_a_shape_is_profiled_from_end_to_end(tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("profile", *TINY, "--context", 32, "--batch", 2, "--repeats", 2, "--rows", "1,4", "--out", out)
    assert result.exit_code == 0 and {path.name for path in out.iterdir()} == FILES
    assert result.stdout.startswith("shape tiny, random weights; float32") and "head rollout" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("wrote ")
    assert result.stderr.splitlines()[-1].startswith("repeats 2/2: none ")
    record = json.loads((out / "profile.json").read_text())
    assert (record["shape"], record["context"], record["batch"]) == ("tiny", 32, 2)
    assert [(m["method"], m["num_drafts"]) for m in record["methods"]] == [("none", 0), ("dflash", 4), ("domino", 4)]
    assert [(r["kind"], r["rows"]) for r in record["rows"]] == [("chain", 1), ("chain", 4), ("tree", 4)]


def test_json_is_the_record_and_nothing_else_is_said(tmp_path):
    options = ("--method", "domino,ngram", "--num-drafts", "2,3", "--context", 32, "--repeats", 1)
    result = run("profile", *TINY, *options, "--draft-vocab-size", 100, "--out", tmp_path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "profile.json").read_text())
    found = [(m["method"], m["num_drafts"]) for m in record["methods"][1:]]
    assert found == [("domino", 2), ("domino", 3), ("ngram", 2), ("ngram", 3)]
    assert record["draft_vocab_size"] == 100
    logits = 4 * (2 * 100 + 100 * 32)
    assert record["methods"][1]["stages"]["lm_head"]["bytes"] == logits


def test_a_pair_on_disk_is_profiled(tmp_path, target_dir, draft_dir):
    options = ("--target", target_dir, "--draft", draft_dir, "--device", "cpu", "--context", 32, "--repeats", 1)
    result = run("profile", *options, "--method", "domino-tree", "--out", tmp_path)
    assert result.exit_code == 0 and f"{target_dir} with {draft_dir}; " in result.stdout
    assert "tree growth" in result.stdout


def test_a_target_alone_has_a_plain_step(tmp_path, target_dir):
    options = ("--target", target_dir, "--device", "cpu", "--context", 32, "--repeats", 1)
    result = run("profile", *options, "--rows", "2,8", "--out", tmp_path, "--json")
    record = json.loads(result.stdout)
    assert [m["method"] for m in record["methods"]] == ["none"] and record["draft"] is None
    assert [r["rows"] for r in record["rows"]] == [1, 2, 8, 8]


def test_ctrl_c_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling.Cycle, "sample", interrupted)
    assert run("profile", *TINY, "--context", 32, "--out", tmp_path).exit_code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "none-such"), "unknown shape 'none-such': give qwen3-8b, smollm2-135m, tiny, or the config.json"),
        ((*TINY, "--context", 5000), "context must be between 2 and 2047 tokens, got 5000: tiny has 2048 positions"),
        ((*TINY, "--context", 2047), "got 2047: tiny has 2048 positions, and a verify pass takes 5"),
        ((*TINY, "--method", "eagle3"), "method eagle3 needs an EAGLE-3 draft; this is a Domino draft"),
        ((*TINY, "--method", "best"), "unknown method 'best'"),
        ((*TINY, "--batch", 0), "batch must be at least 1, got 0"),
        ((*TINY, "--repeats", 0), "repeats must be at least 1, got 0"),
        ((*TINY, "--num-drafts", "4,0"), "num_drafts must be at least 1, got 0"),
        ((*TINY, "--rows", "1,x"), "--rows must be numbers with commas between them, got '1,x'"),
        ((*TINY, "--draft", "some/draft"), "--shape makes a target and a draft of its own"),
        (("--draft-vocab-size", 100), "--draft-vocab-size is for the draft that --shape makes"),
        ((*TINY, "--draft-vocab-size", 1000), "draft_vocab_size must be between 1 and 512, got 1000"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, options, message):
    assert message in fail("profile", *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_directory_is_needed_that_can_be_written_to(tmp_path):
    assert "Missing option '--out'" in fail("profile", *TINY)
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fail("profile", *TINY, "--out", tmp_path / "file")


def test_a_shape_too_large_for_memory_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "free_memory", lambda device: 10_000_000_000)
    monkeypatch.setattr(shapes, "make_pair", lambda plan: pytest.fail("made"))
    line = fail("profile", "--shape", "qwen3-8b", "--device", "cpu", "--dtype", "bfloat16", "--out", tmp_path)
    assert "shape qwen3-8b in bfloat16 with a cache of 1 x 512 tokens takes 21." in line and "10.0 GB free" in line
    monkeypatch.setattr(shapes, "free_memory", lambda device: 10_000_000)
    assert "with a cache of 64 x 1000 tokens" in fail(
        "profile", *TINY, "--batch", 64, "--context", 1000, "--out", tmp_path
    )
