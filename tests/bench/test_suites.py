"""Every turn of a conversation is a prompt, and later ones hold the target's own greedy answers."""

from __future__ import annotations

import json
import sys
import types

import pytest
from huggingface_hub.errors import HfHubHTTPError

from domino_spec.bench.run import run_bench
from domino_spec.bench.suites import (
    ANSWERS_FILE,
    BENCHMARKS,
    Prompt,
    check_prompts,
    load_suite,
    make_requests,
    suites_settings,
)
from domino_spec.settings import UserError
from tests import tiny
from tests.bench.conftest import read_raw, without_times

NEW = 6
PROMPTS = [
    Prompt("x", "a", ("w3 w4", "w5", "w6 w7")),
    Prompt("x", "b", ("w8",)),
    Prompt("y", "a", ("w9 w10", "w11")),
]
THINKING_TEMPLATE = (
    "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}{% if enable_thinking %}w30{% else %}w31{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(eos_token_id=tiny.EOS)


@pytest.fixture
def target(model):
    return tiny.as_target(model, tiny.word_tokenizer())


def make(target, out, prompts=PROMPTS, say=lambda line: None, thinking=False):
    check_prompts(target, prompts, NEW, thinking)
    return make_requests(target, prompts, NEW, out, thinking, say)


def test_later_prompts_hold_the_answers_of_plain_greedy_decoding(model, target, tmp_path):
    requests = make(target, tmp_path)
    assert [(r.suite, r.id, r.turn) for r in requests] == [
        *(("x", "a", 1), ("x", "a#2", 2), ("x", "a#3", 3)),  # suites take turns, and a conversation stays together
        *(("y", "a", 1), ("y", "a#2", 2), ("x", "b", 1)),
    ]

    def encode(text):
        return target.tokenizer(text)["input_ids"]

    text = "w1 w3 w4 w2"
    for request, turn in zip(requests[:3], ("w5", "w6 w7", None), strict=True):
        assert request.token_ids == encode(text)
        answer = tiny.plain_greedy(model, request.token_ids, NEW)
        text += f" w1 {target.tokenizer.decode(answer, skip_special_tokens=True)} w2 w1 {turn} w2"
    lines = [json.loads(line) for line in (tmp_path / ANSWERS_FILE).read_text().splitlines()]
    assert [(line["suite"], line["id"], line["turn"]) for line in lines] == [
        ("x", "a", 1),
        ("x", "a", 2),
        ("y", "a", 1),
    ]
    assert lines[0]["token_ids"] == tiny.plain_greedy(model, requests[0].token_ids, NEW)


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_answers_that_are_there_are_not_made_again(target, tmp_path, monkeypatch, survivors):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    expected = make(target, whole)
    said = []

    def dying(line):
        said.append(line)
        if len(said) == survivors + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(target, cut, say=dying)
    with open(cut / ANSWERS_FILE, "a", encoding="utf-8") as file:  # killed in the middle of the next one
        file.write('{"suite": "x", "id"')
    resumed = []
    assert make(target, cut, say=resumed.append) == expected
    assert len(resumed) == 3 - (survivors + 1)
    assert (cut / ANSWERS_FILE).read_bytes() == (whole / ANSWERS_FILE).read_bytes()
    monkeypatch.setattr("domino_spec.bench.suites.generate", None)
    assert make(target, cut) == expected, "a finished file needs no decoding"


def test_thinking_reaches_the_chat_template_of_every_turn(model, tmp_path):
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    target = tiny.as_target(model, tokenizer)
    for thinking, mark in ((True, 30), (False, 31)):
        out = tmp_path / str(thinking)
        out.mkdir()
        assert {r.token_ids[-1] for r in make(target, out, thinking=thinking)} == {mark}


def test_prompts_that_cannot_be_measured_are_refused_before_anything_is_decoded(model, target, tmp_path):
    plain = tiny.as_target(model, tiny.word_tokenizer(chat=False), name="base")
    cases = [
        (plain, PROMPTS, "prompt a of suite x has 3 turns, and the tokenizer of base has no chat template"),
        (target, [*PROMPTS, Prompt("x", "a#2", ("w3",))], "suite x has two prompts called a#2"),
        (target, [Prompt("x", "a", ("w3 " * 510,))], "prompt a of suite x has 512 tokens"),
    ]
    for served, prompts, complaint in cases:
        with pytest.raises(UserError) as error:
            make(served, tmp_path, prompts)
        assert complaint in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    make(plain, tmp_path, [Prompt("x", "a", ("w3",))])  # single turns need no template


def test_a_later_turn_that_no_longer_fits_is_named(target, tmp_path):
    with pytest.raises(UserError, match=r"prompt a#2 of suite x has [0-9]+ tokens: with max_new_tokens 6 it exceeds"):
        make(target, tmp_path, [Prompt("x", "a", ("w3 " * 300, "w4 " * 300))])


def test_a_damaged_file_of_answers_is_named(target, tmp_path):
    (tmp_path / ANSWERS_FILE).write_text('{"suite": "x", "id": "a", "turn": "1", "text": ""}\n')
    with pytest.raises(UserError, match=r"earlier_answers\.jsonl line 1: key 'turn' must be int"):
        make(target, tmp_path)


def test_all_methods_see_the_same_later_prompt(finished):
    rows = [row for row in read_raw(finished) if row["turn"] == 2]
    assert rows and {row["suite"] for row in rows} == {"sums"} and all(row["id"].endswith("#2") for row in rows)
    for id_ in {row["id"] for row in rows}:
        assert len({row["prompt_tokens"] for row in rows if row["id"] == id_}) == 1
        greedy = {tuple(row["token_ids"]) for row in rows if row["id"] == id_ and row["temperature"] == 0}
        assert len(greedy) == 1


@pytest.mark.slow
def test_a_bench_interrupted_while_it_answers_measures_what_an_unbroken_one_does(disk, finished, tmp_path):
    fewer = {"methods": ["none", "domino"], "repeats": 1, "temperatures": [0.0]}

    def dying(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(**disk.options(tmp_path / "out", say=dying, **fewer))
    assert not (tmp_path / "out" / "raw.jsonl").exists()
    run_bench(**disk.options(tmp_path / "out", **fewer))

    def runs(rows):
        timeless = map(without_times, rows)
        wanted = [r for r in timeless if r["method"] in fewer["methods"] and not (r["repeat"] or r["temperature"])]
        return sorted(map(json.dumps, wanted))

    assert runs(read_raw(tmp_path / "out")) == runs(read_raw(finished))


# Suites: the user's own files, and the public benchmarks through a stand-in for the `datasets` library.


GOOD = '{"id": "a", "turns": ["first", "second"]}'
PUBLIC_ROWS = {
    "gsm8k": {"question": "2 + 2?"},
    "math500": {"problem": "2 + 2?"},
    "aime25": {"problem": "2 + 2?"},
    "humaneval": {"prompt": "def f():\n"},
    "mbpp": {"prompt": "Write f."},
    "livecodebench": {"question_content": "Write f.", "starter_code": "class Solution:"},
    "mt-bench": {"prompt": ["one", "two"]},
    "alpaca": {"instruction": "Sort.", "input": "b a"},
}


def stand_in(monkeypatch, load_dataset) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_file_gives_its_first_prompts_in_order(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{GOOD}\n\n{{"id": "b", "turns": ["x"], "category": "kept out"}}\n')
    assert load_suite(path) == [Prompt("mine", "a", ("first", "second")), Prompt("mine", "b", ("x",))]
    assert load_suite(str(path), limit=1) == [Prompt("mine", "a", ("first", "second"))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"turns": ["x"]}', "'id'"),
        ('{"id": 3, "turns": ["x"]}', "'id'"),
        ('{"id": "b"}', "'turns'"),
        ('{"id": "b", "turns": "x"}', "'turns'"),
        ('{"id": "b", "turns": []}', "non-empty"),
        ('{"id": "b", "turns": [""]}', "non-empty"),
        ('{"id": "b", "turns": [1]}', "non-empty"),
        (GOOD, "occurs twice"),
    ],
)
def test_a_malformed_file_names_the_line(tmp_path, line, complaint):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError, match=r"mine\.jsonl line 3: ") as error:
        load_suite(path)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_and_missing_files_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"unknown suite 'gsm9k': .* gsm8k, math500"):
        load_suite("gsm9k")
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        load_suite(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="limit must be at least 1"):
        load_suite("gsm8k", limit=0)


def test_a_benchmark_without_the_datasets_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets, or give the path of a JSONL") as error:
        load_suite("gsm8k", 2)
    assert "\n" not in str(error.value)


def test_a_benchmark_without_the_network_says_what_to_do(monkeypatch):
    client_error = HfHubHTTPError.__bases__[0]
    for failure in (ConnectionError("no\nroute"), ValueError("not cached"), client_error("refused")):

        def load_dataset(*args, failure=failure, **kwargs):
            raise failure

        stand_in(monkeypatch, load_dataset)
        with pytest.raises(UserError, match="check the network, or give the path of a JSONL") as error:
            load_suite("gsm8k", 2)
        assert "\n" not in str(error.value)


def test_a_benchmark_that_could_be_cached_says_where(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    stand_in(monkeypatch, load_dataset)
    for name in ("gsm8k", "livecodebench"):
        with pytest.raises(UserError, match=f"cannot get suite {name} from the hub") as error:
            load_suite(name, 1)
        assert ("HF_HOME names a cache that holds it" in str(error.value)) == (name == "gsm8k"), "streams are not kept"


def test_a_suite_without_prompts_is_refused(monkeypatch, tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"mine\.jsonl holds no rows"):
        load_suite(tmp_path / "mine.jsonl")
    stand_in(monkeypatch, lambda *args, **options: [])
    with pytest.raises(UserError, match="data set of suite gsm8k holds no prompts"):
        load_suite("gsm8k")


def test_a_limit_counts_conversations(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{GOOD}\n{{"id": "b", "turns": ["x", "y", "z"]}}\n{{"id": "c", "turns": ["x"]}}\n')
    assert [len(prompt.turns) for prompt in load_suite(path, limit=2)] == [2, 3]


def test_every_benchmark_becomes_the_same_first_prompts(monkeypatch):
    assert set(PUBLIC_ROWS) == set(BENCHMARKS)
    for name, row in PUBLIC_ROWS.items():
        asked = {}

        def load_dataset(path, config, *, row=row, asked=asked, **options):
            asked.update(path=path, config=config, **options)
            return iter([row] * 5)

        stand_in(monkeypatch, load_dataset)
        prompts = load_suite(name, 2)
        assert [p.id for p in prompts] == [f"{name}/0", f"{name}/1"]
        assert all(p.suite == name and p.turns == prompts[0].turns for p in prompts)
        text = "\n".join(str(v) if isinstance(v, str) else "\n".join(v) for v in row.values())
        assert all(piece in "\n".join(prompts[0].turns) for piece in text.splitlines())
        assert asked["path"] == BENCHMARKS[name].path and asked["split"] == BENCHMARKS[name].split
        assert len(load_suite(name)) == 5


def test_a_benchmark_whose_columns_changed_is_refused_in_one_line(monkeypatch):
    stand_in(monkeypatch, lambda *args, **options: [{"other": 1}])
    with pytest.raises(UserError, match="it has no column 'question'"):
        load_suite("gsm8k")


def test_the_digest_notices_any_change(tmp_path):
    prompts = [Prompt("s", "a", ("x", "y"))]
    changed = [Prompt("s", "a", ("x", "z")), Prompt("s", "b", ("x", "y")), Prompt("t", "a", ("x", "y"))]
    digests = {suites_settings(p, None)["prompts_digest"] for p in (prompts, *([p] for p in changed), prompts * 2)}
    assert len(digests) == 5
