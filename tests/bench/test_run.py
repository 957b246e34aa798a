"""The whole bench on a tiny target: all methods, the outside baseline, and what is refused before it starts."""

from __future__ import annotations

import json

import pytest
import torch

from domino_spec import generate
from domino_spec.api import default_min_confidence
from domino_spec.bench.methods import Contender, Drafting, contenders, runner
from domino_spec.bench.peers import load_baseline, transformers_generate
from domino_spec.bench.rows import read_rows
from domino_spec.bench.run import run_bench
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.load import load_draft
from domino_spec.drafters.methods import TREE_BUDGET
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from tests import tiny
from tests.bench.conftest import MAX_NEW_TOKENS, METHODS, PROMPTS, TURNS, read_raw


@pytest.fixture(scope="module")
def loaded(disk):
    return load_target(disk.target, pack=False)


def test_every_run_is_measured_once(finished):
    rows = read_rows(finished)
    budgets = {"none": [0], "transformers": [0]}
    expected = set()
    for suite, prompts in PROMPTS.items():
        for i in range(len(prompts)):
            for method in METHODS:
                for temperature in (1.0,) if method in ("domino-argmax", "domino-matching") else (0.0, 1.0):
                    for budget in budgets.get(method, [2, 4]):
                        for id_ in (f"{suite}/{i}", f"{suite}/{i}#2")[: 1 + len(TURNS[suite])]:
                            expected |= {(suite, id_, method, budget, temperature, r) for r in (0, 1)}
    assert {row.key for row in rows} == expected
    assert len(rows) == len(expected)


def test_rows_hold_what_decoding_did(finished):
    for row in read_raw(finished):
        assert row["num_verify_passes"] == len(row["acceptance_lengths"]) == len(row["num_drafts"])
        assert 1 <= len(row["token_ids"]) <= MAX_NEW_TOKENS and row["batch"] == 1 and row["threads"] == 1
        assert max(row["num_drafts"], default=0) <= row["budget"]
        assert all(1 <= a <= d + 1 for a, d in zip(row["acceptance_lengths"], row["num_drafts"], strict=True))
        assert row["seconds_prefill"] > 0 and row["seconds_decode"] >= 0
        # Decoding produces every token; in `transformers` the first one belongs to prefill.
        produced = sum(row["acceptance_lengths"]) + (row["method"] == "transformers")
        assert produced >= len(row["token_ids"])
        if row["budget"] == 0:
            assert produced == len(row["token_ids"])


def test_greedy_texts_of_all_methods_equal_plain_decoding_and_transformers(finished, loaded):
    model = load_baseline(loaded)

    def encode(text):
        return loaded.tokenizer(text)["input_ids"]

    texts = {}
    for suite, prompts in PROMPTS.items():
        for i, prompt in enumerate(prompts):
            first = texts[f"{suite}/{i}"] = encode(f"w1 {prompt} w2")
            answer = loaded.tokenizer.decode(tiny.plain_greedy(model, first, MAX_NEW_TOKENS), skip_special_tokens=True)
            texts[f"{suite}/{i}#2"] = encode(f"w1 {prompt} w2 w1 {answer} w2 w1 {' '.join(TURNS[suite])} w2")
    for row in read_rows(finished):
        if row.temperature == 0:
            prompt = texts[row.id]
            assert row.prompt_tokens == len(prompt)
            assert list(row.token_ids) == tiny.plain_greedy(model, prompt, MAX_NEW_TOKENS)[: len(row.token_ids)]
            assert len(row.token_ids) == MAX_NEW_TOKENS or row.token_ids[-1] == tiny.EOS


def test_seeds_move_on_with_repeats_and_change_sampled_texts_only(finished):
    texts = {}
    for row in read_rows(finished):
        assert row.seed == row.repeat
        texts[row.key] = row.token_ids
    pairs = [(text, texts[key._replace(repeat=1)], key.temperature) for key, text in texts.items() if key.repeat == 0]
    assert all(a == b for a, b, temperature in pairs if temperature == 0)
    assert any(a != b for a, b, temperature in pairs if temperature == 1)


def test_the_outside_baseline_is_stock_and_is_not_bent_by_the_models_defaults(loaded):
    model = load_baseline(loaded)
    assert model.config._attn_implementation == "sdpa" and model.dtype == loaded.dtype
    assert {type(m) for m in model.modules() if "proj" in type(m).__name__.lower()} == set()
    assert all(type(layer.self_attn.q_proj) is torch.nn.Linear for layer in model.model.layers)
    model.generation_config.repetition_penalty = 5.0
    prompt = [1, 4, 5, 4, 2]
    stop = loaded.stop_token_ids
    found = transformers_generate(model, stop, prompt, 0.0, 0, 6)
    assert found.token_ids == tiny.plain_greedy(load_baseline(loaded), prompt, 6)[: len(found.token_ids)]
    assert found.seconds_prefill > 0 and found.seconds_decode > 0
    assert found.num_verify_passes == found.num_tokens - 1
    one = transformers_generate(model, stop, prompt, 0.0, 0, 1)
    assert one.token_ids == found.token_ids[:1] and one.num_verify_passes == 0 and one.seconds_decode == 0


def test_the_outside_baseline_samples_by_its_seed(loaded):
    model = load_baseline(loaded)
    first, second, other = (
        transformers_generate(model, loaded.stop_token_ids, [1, 4, 2], 1.0, seed, 8).token_ids for seed in (3, 3, 4)
    )
    assert first == second != other


@pytest.mark.slow
@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_names_say_how_drafts_are_made_and_accepted(loaded, disk, method):
    """Above temperature 0, where the ways to draft and to accept are methods of their own."""
    draft, prompt = load_draft(disk.draft, loaded), [1, 4, 5, 4, 2]
    run = runner(Drafting(loaded, [draft]), None, candidates=16)
    ways = {method: dict(sample_drafts=True), f"{method}-argmax": dict(sample_drafts=False)}
    if method == "domino":
        ways["domino-matching"] = dict(sample_drafts=True, matching_rule=True)
    seen = set()
    for name, options in ways.items():
        settings = dict(temperature=3.0, max_new_tokens=60, num_drafts=4, candidates=16, min_confidence=0.0, **options)
        done = []
        for seed in range(6):
            found = run(Contender(name, 4, 3.0), prompt, seed, 60)
            (expected,) = generate(loaded, draft, [prompt], method=method, seed=seed, **settings)
            assert found.token_ids == expected.token_ids
            assert found.acceptance_lengths == expected.acceptance_lengths
            done.append((*found.token_ids, *found.acceptance_lengths))
        seen.add(tuple(done))
    assert len(seen) == len(ways), "if two of them did the same, their names would not be told apart"


def test_trees_are_methods_of_their_own(loaded, disk):
    """With their own budget, whole or as large as the draft is sure of."""
    draft, prompt = load_draft(disk.draft, loaded), [1, 4, 5, 4, 2]
    ways = {
        "dflash-tree": ("dflash-tree", 0.0),
        "domino-tree": ("domino-tree", 0.0),
        "domino-tree-confident": ("domino-tree", default_min_confidence(loaded.device)),
        "domino-tree+ngram": ("domino-tree+ngram", default_min_confidence(loaded.device)),
    }
    assert contenders(Drafting(loaded, [draft]), [*ways], [], [0.0]) == [
        Contender(name, TREE_BUDGET, 0.0) for name in ways
    ]
    assert contenders(Drafting(loaded, [draft]), ["domino-tree"], [7, 16], [1.0]) == [
        Contender("domino-tree", budget, 1.0) for budget in (7, 16)
    ]
    run = runner(Drafting(loaded, [draft]), None, candidates=16)
    sizes = {}
    for name, (method, min_confidence) in ways.items():
        found = run(Contender(name, 7, 1.0), prompt, 3, 16)
        options = dict(method=method, min_confidence=min_confidence, num_drafts=7, candidates=16)
        (expected,) = generate(loaded, draft, [prompt], temperature=1.0, seed=3, max_new_tokens=16, **options)
        assert (found.token_ids, found.num_drafts) == (expected.token_ids, expected.num_drafts)
        sizes[name] = set(found.num_drafts)
    assert sizes["dflash-tree"] == sizes["domino-tree"] == {7}, "the whole budget, every time"
    assert min(sizes["domino-tree-confident"]) < 7 and min(sizes["domino-tree+ngram"]) < 7


@pytest.mark.slow
def test_a_report_copes_with_chains_and_trees_of_other_budgets(disk, tmp_path):
    options = {"methods": ["none", "domino", "domino-tree", "domino-tree+ngram"], "num_drafts": [], "limit": 1}
    report = run_bench(**disk.options(tmp_path, **options, temperatures=[0.0], repeats=1, breakdown=True))
    budgets = {entry["method"]: entry["budget"] for entry in report["acceptance"]}
    assert budgets == {"domino": 5, "domino-tree": TREE_BUDGET, "domino-tree+ngram": TREE_BUDGET}
    assert [entry["method"] for entry in report["breakdown"]] == ["domino"]
    assert all(entry["equal"] == entry["compared"] for entry in report["greedy_equality"])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| domino-tree (11) |" in markdown and "![acceptance by position](acceptance_by_position.png)" in markdown
    positions = [line for line in markdown.splitlines() if ", T = 0 |" in line]
    reached = max(sum(share > 0 for share in entry["by_position"]) for entry in report["acceptance"])
    assert len(positions) == 3 and {line.count("|") for line in positions} == {reached + 1 + 2}


def test_budgets_beyond_a_methods_most_are_measured_once(target):
    draft = tiny.tiny_draft(target)  # five drafts at most
    found = contenders(Drafting(target, [draft]), ["none", "domino", "ngram"], [3, 7, 16], [0.0])
    assert found == [
        Contender("none", 0, 0.0),
        Contender("domino", 3, 0.0),
        Contender("domino", 5, 0.0),
        Contender("ngram", 3, 0.0),
        Contender("ngram", 7, 0.0),
        Contender("ngram", 8, 0.0),
    ]
    assert contenders(Drafting(target, [draft]), ["domino"], [], [0.0]) == [Contender("domino", 5, 0.0)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"methods": ["none", "domingo"]}, "unknown method 'domingo'; known methods are none, ngram"),
        ({"methods": []}, "no method given"),
        ({"methods": ["domino-argmax"], "temperatures": [0.0]}, "needs a temperature above 0; at 0 use domino"),
        ({"methods": ["domino-matching"], "temperatures": [0.0]}, "needs a temperature above 0; at 0 use domino"),
        ({"suites": ["gsm9k"]}, "unknown suite 'gsm9k'"),
        ({"suites": []}, "suites of at least 1"),
        ({"temperatures": []}, "temperatures of at least 1"),
        ({"temperatures": [-1.0]}, "temperature must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"repeats": 0}, "repeats of at least 1"),
        ({"num_drafts": [0]}, "num_drafts must be at least 1"),
        ({"threads": 0}, "threads of at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"drafts": []}, "needs a draft"),
        ({"max_new_tokens": 510}, "exceeds the context of 512 tokens"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_before_anything_is_measured(disk, tmp_path, changes, complaint):
    with pytest.raises(UserError) as error:
        run_bench(**disk.options(tmp_path / "out", **changes))
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "raw.jsonl").exists()


def test_a_draft_for_another_target_is_refused_before_anything_is_measured(disk, tmp_path):
    model = tiny.tiny_model(seed=9, eos_token_id=tiny.EOS, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "target")
    tiny.word_tokenizer().save_pretrained(tmp_path / "target")
    with pytest.raises(UserError, match="was trained for a target with fingerprint") as error:
        run_bench(**disk.options(tmp_path / "out", target=str(tmp_path / "target")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_malformed_file_of_prompts_is_named_with_its_line(disk, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "turns": ["w3"]}\n{"id": "b", "turns": "w3"}\n')
    with pytest.raises(UserError, match=r"mine\.jsonl line 2: key 'turns' must be list"):
        run_bench(**disk.options(tmp_path / "out", suites=[str(path)]))


def test_thinking_is_part_of_the_configuration(disk, finished, tmp_path):
    """Another setting of it cannot join measurements made without."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("settings.json", "raw.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(UserError, match="holds measurements with thinking False, not True"):
        run_bench(**disk.options(out, enable_thinking=True))
    with pytest.raises(UserError, match="holds measurements with assistant None, not 'small'"):
        run_bench(**disk.options(out, assistant="small"))


def test_all_drafts_are_recorded(disk, tmp_path):
    other = load_draft(disk.draft, load_target(disk.target, pack=False))
    other.head.embed_proj[-1].weight.data.add_(1)
    save_draft(other, tmp_path / "other")
    fewer = {"methods": ["none", "domino"], "limit": 1, "repeats": 1, "temperatures": [0.0], "num_drafts": [2]}
    drafts = [disk.draft, str(tmp_path / "other")]
    report = run_bench(**disk.options(tmp_path / "out", drafts=drafts, suites=disk.suites[1:], **fewer))
    recorded = report["settings"]["drafts"]
    assert [draft["name"] for draft in recorded] == drafts and len({draft["digest"] for draft in recorded}) == 2
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert all(f"{draft['name']} (weights {draft['digest']})" in markdown for draft in recorded)


def test_suites_of_the_same_name_are_refused(disk, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"id": "x", "turns": ["w3"]}\n')
    with pytest.raises(UserError, match="two suites are called sums"):
        run_bench(**disk.options(tmp_path / "out", suites=[disk.suites[0], str(tmp_path / "sums.jsonl")]))


def test_a_changed_draft_or_suite_is_another_configuration(disk, finished, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("settings.json", "raw.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    settings = json.loads((out / "settings.json").read_text())
    for name in ("drafts", "prompts_digest", "device_name"):
        changed = settings | {"configuration": settings["configuration"] | {name: "another"}}
        (out / "settings.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"holds measurements with {name} 'another'"):
            run_bench(**disk.options(out))
    assert len(read_raw(out)) == len(read_raw(finished))


def test_a_bench_without_a_draft_needs_none(disk, tmp_path):
    fewer = {"methods": ["none", "ngram"], "limit": 1, "repeats": 1, "temperatures": [0.0]}
    report = run_bench(**disk.options(tmp_path / "out", drafts=[], breakdown=True, **fewer))
    assert report["settings"]["drafts"] == [] and report["breakdown"] == []
    assert report["settings"]["num_drafts"] == [2, 4] and report["measured_runs"] == 3 * 3
