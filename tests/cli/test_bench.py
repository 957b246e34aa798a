"""EAGLE-3 and DART drafts by the commands alone: trained, counted for, decoded with, inspected and compared."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.cli_fixtures import PROMPT, fail, make_target_dir, make_trained_run, run, succeed, succeed_json, write_jsonl  # noqa: F401

pytestmark = pytest.mark.slow

METHODS = ("eagle3", "dart")


@pytest.fixture(scope="module")
def made(tmp_path_factory, trained_run):
    """Drafts of both kinds, n-grams and a ranking, from the answers that another run was trained on."""
    _, recipe = trained_run
    directory = tmp_path_factory.mktemp("rivals")
    values = yaml.safe_load(recipe.read_text())
    for method in METHODS:
        values["draft"] = {"model": method, "block_size": 4, "target_layer_ids": [0, 1, 3], "head": None}
        path = directory / f"{method}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        succeed("train", path, "--out", directory / method)
    succeed("ngrams", recipe, "--out", directory / "ngrams.safetensors")
    succeed("vocabulary", recipe, "--out", directory / "ranking.json")
    return directory


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_is_decoded_with_by_its_own_method(target_dir, made, method):
    options = ["--target", target_dir, "--max-new-tokens", 16]
    ngrams = ["--ngrams", made / "ngrams.safetensors"] if method == "dart" else []
    plain = succeed_json("generate", PROMPT, *options, "--method", "none")
    drafted = succeed_json("generate", PROMPT, *options, "--draft", made / method / "draft", *ngrams)
    assert drafted["method"] == method
    assert drafted["token_ids"] == plain["token_ids"]
    assert max(drafted["num_drafts"]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_inspect_says_what_it_is(target_dir, made, method):
    described = succeed_json("inspect", made / method / "draft", "--target", target_dir)
    assert described["fits"] is True
    assert {"eagle3": "EAGLE-3", "dart": "DART"}[method] in succeed("inspect", made / method / "draft")


def test_the_counts_say_what_they_hold(trained_run, tmp_path):
    _, recipe = trained_run
    ranking = succeed_json("vocabulary", recipe, "--out", tmp_path / "ranking.json", "--size", 5)
    assert ranking["size"] == 5 and 0 < ranking["coverage"]["5"] <= 1
    counted = succeed_json("ngrams", recipe, "--out", tmp_path / "ngrams.safetensors", "--order", 2)
    line = fail("ngrams", recipe, "--out", tmp_path / "long.safetensors", "--order", 2**63)
    assert "--order must be at most 64" in line, "not a search that never ends"
    assert counted["order"] == 2 and set(counted["ngrams"]) == {"1", "2"}


def test_a_draft_vocabulary_changes_no_text(target_dir, made):
    options = ["--target", target_dir, "--max-new-tokens", 16, "--draft", made / "eagle3" / "draft"]
    cut = ["--ranking", made / "ranking.json", "--draft-vocab-size", 3]
    assert (
        succeed_json("generate", PROMPT, *options)["text"] == succeed_json("generate", PROMPT, *options, *cut)["text"]
    )


def test_all_compete_in_one_bench(target_dir, made, tmp_path):
    suite = write_jsonl(tmp_path / "words.jsonl", [{"id": "words/0", "turns": ["w3 w4", "w5"]}])
    methods = "none,eagle3:5,eagle3:9,eagle3@4:5,dart:6"
    drafts = [part for method in METHODS for part in ("--draft", made / method / "draft")]
    counts = ["--ngrams", made / "ngrams.safetensors", "--ranking", made / "ranking.json"]
    measured = run(
        *("bench", "--target", target_dir, "--suite", suite, "--methods", methods, *drafts, *counts),
        *("--max-new-tokens", 8, "--out", tmp_path / "out", "--json"),
    )
    result = json.loads(measured.stdout)
    found = {(entry["method"], entry["budget"]) for entry in result["pooled"]}
    assert found == {("none", 0), ("eagle3", 5), ("eagle3", 9), ("eagle3@4", 5), ("dart", 6)}
    assert all(entry["equal"] == entry["compared"] == 2 for entry in result["greedy_equality"])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["configuration"]
    assert settings["draft_of_method"]["eagle3@4"] == str(made / "eagle3" / "draft")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--draft-vocab-size", "3"], "--draft-vocab-size needs tokens ranked by frequency: --ranking FILE"),
        (["--ranking", "nowhere.json"], "nowhere.json"),
        (["--ngrams", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--method", "domino"], "method domino needs a Domino draft; this is an EAGLE-3 draft (use eagle3)"),
    ],
)
def test_what_does_not_go_together_is_one_line(target_dir, made, arguments, said):
    draft = made / "eagle3" / "draft"
    assert said in fail("generate", PROMPT, "--target", target_dir, "--draft", draft, *arguments)
