"""Suites: the user's own files, and the public benchmarks through a stand-in for the `datasets` library."""

from __future__ import annotations

import json
import sys
import types

import pytest
from huggingface_hub.errors import HfHubHTTPError

from domino_spec.bench.suites import BENCHMARKS, Prompt, load_suite, prompts_digest
from domino_spec.settings import UserError

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
    digests = {prompts_digest(prompts), *(prompts_digest([p]) for p in changed), prompts_digest(prompts * 2)}
    assert len(digests) == 5
    assert json.dumps(prompts_digest(prompts)) == json.dumps(prompts_digest(list(prompts)))
