"""Conversations from files and public data sets, without what evaluation will ask; their turns as sequences."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import types
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from domino_spec.public_data import BENCHMARKS, CONVERSATIONS
from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.training.data import Turn, join_turns, load_sequences, split_held_out
from domino_spec.training.datasets import (
    SMALL_BENCHMARKS,
    evaluation_prompts,
    load_prompts,
    load_training_data,
    prompt_key,
)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*texts: str, **more) -> dict:
    """A row of messages, user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **more}


def sharegpt(*texts: str) -> dict:
    """The same as ShareGPT writes it."""
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library; returns what it was asked for, and is filled by path."""
    held: dict[str, list[dict]] = {}
    asked: list[dict] = []

    def load_dataset(path, name, **options):
        asked.append({"path": path, "name": name, **options})
        return iter(held.get(path, []))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return types.SimpleNamespace(held=held, asked=asked)


# By name


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_public_conversations_are_read_as_far_as_needed(hub, name):
    form = chat if name == "ultrachat" else sharegpt

    def row(index: int) -> dict:
        return form(f"question {index}", "answer")

    endless = map(row, itertools.count())
    hub.held[CONVERSATIONS[name].path] = endless  # type: ignore[assignment]
    prompts, reading = load_prompts(name, DataRecipe(limit=3, exclude=()))
    assert [c.id for c in prompts] == [f"{name}/{i}" for i in range(3)] and reading.used == 3
    assert [c.user_turns for c in prompts] == [[f"question {i}"] for i in range(3)]
    (asked,) = hub.asked
    assert asked["streaming"] is True and asked["path"] == CONVERSATIONS[name].path
    assert next(endless) == row(3), "no more was read than was used"


def test_rows_of_another_form_are_left_out_of_public_data_and_counted(hub):
    rows = [sharegpt("a", "b"), {"conversations": None}, {"conversations": [{"from": "human", "value": None}]}]
    hub.held[CONVERSATIONS["sharegpt"].path] = [*rows, {"conversations": [{"from": "tool", "value": "x"}]}]
    prompts, reading = load_prompts("sharegpt", DataRecipe(exclude=()))
    assert [c.user_turns for c in prompts] == [["a"]]
    assert dict(reading.left_out) == {
        "without text in a chat format": 2,
        "a role other than system, user and assistant": 1,
    }


def test_without_the_library_or_the_network_one_line_says_what_to_do(monkeypatch):
    recipe = DataRecipe(exclude=())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data set sharegpt needs the datasets library: pip install datasets, or give"):
        load_prompts("sharegpt", recipe)

    def refuse(*args, **options):
        raise HfHubHTTPError.__bases__[0]("no\nroute")

    module = types.ModuleType("datasets")
    module.load_dataset = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r"cannot get data set sharegpt from the hub: check the network, or") as error:
        load_prompts("sharegpt", recipe)
    assert "\n" not in str(error.value)


def test_unknown_names_and_missing_files_are_told_apart(tmp_path, text_target):
    for read in (
        lambda source: load_prompts(source, DataRecipe()),
        lambda source: load_training_data(DataRecipe(responses=source), text_target),
    ):
        with pytest.raises(UserError, match=r"unknown data set 'sharedgpt': .* open-perfectblend, sharegpt, ultrachat"):
            read("sharedgpt")
        with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
            read(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"data\.exclude: unknown suite 'gsm9k'"):
        evaluation_prompts(["gsm9k"])


# Exclusion


def test_prompts_of_evaluation_suites_are_left_out_and_counted(tmp_path):
    suite = write(tmp_path / "suite.jsonl", [{"id": "s", "turns": ["What is  2 + 2?", "And then?"]}])
    rows = [
        {"id": "same", "turns": ["what IS 2\n+ 2?  "]},
        {"id": "same, more", "turns": ["What is 2 + 2?", "Why?"]},
        {"id": "later turn", "turns": ["Hello", "What is 2 + 2?"]},
        {"id": "other", "turns": ["What is 2 + 3?"]},
    ]
    prompts, reading = load_prompts(write(tmp_path / "p.jsonl", rows), DataRecipe(exclude=(suite,)))
    assert [c.id for c in prompts] == ["later turn", "other"]
    assert dict(reading.left_out) == {"in an evaluation suite": 2} and reading.used == 2


def test_a_benchmarks_own_wording_does_not_hide_its_problems(hub):
    hub.held[BENCHMARKS["gsm8k"].path] = [{"question": "A train of 7 cars?"}]
    hub.held[BENCHMARKS["humaneval"].path] = [{"prompt": "def f(x):\n    '''Doubles x.'''\n"}]
    hub.held[BENCHMARKS["mt-bench"].path] = [{"prompt": ["First?", "Second?"]}]
    keys = evaluation_prompts(["gsm8k", "humaneval", "mt-bench"])
    assert len(keys) == 3
    for text in ("A train of 7 cars?", "def f(x):\n '''doubles x.'''", "First?"):
        assert prompt_key(text) in keys
    assert prompt_key("Second?") not in keys


@pytest.mark.parametrize(("exclude", "asked"), [(None, list(SMALL_BENCHMARKS)), ((), []), (("mbpp",), ["mbpp"])])
def test_public_conversations_are_checked_against_the_small_benchmarks(hub, exclude, asked):
    hub.held[CONVERSATIONS["sharegpt"].path] = [sharegpt("Write f."), sharegpt("Write g.")]
    hub.held[BENCHMARKS["mbpp"].path] = [{"prompt": "write F."}]
    prompts, _ = load_prompts("sharegpt", DataRecipe(exclude=exclude))
    assert [c.user_turns for c in prompts] == [["Write f."], ["Write g."]][bool(asked) :]
    assert [a["path"] for a in hub.asked if "ShareGPT" not in a["path"]] == [BENCHMARKS[n].path for n in asked]


def test_files_are_checked_against_nothing_unless_asked(tmp_path, hub):
    load_prompts(write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["x"]}]), DataRecipe())
    assert hub.asked == []


def test_a_prompt_is_asked_once(tmp_path):
    rows = [
        {"id": "a", "turns": ["Same?"]},
        {"id": "b", "turns": ["same? "]},
        {"id": "c", "turns": ["Same?", "More."]},
        {"id": "d", **chat("Same?", "answers do not count")},
        {"id": "e", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Same?"}]},
    ]
    prompts, reading = load_prompts(write(tmp_path / "p.jsonl", rows), DataRecipe())
    assert [c.id for c in prompts] == ["a", "c", "e"]
    assert dict(reading.left_out) == {"duplicate prompt": 2} and reading.used == 3


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["x"]}])
    with pytest.raises(UserError, match=r"no conversation that can be used .*1 in an evaluation suite"):
        load_prompts(path, DataRecipe(exclude=(path,)))


# Conversations trained on as they are


@pytest.mark.parametrize("form", [chat, sharegpt])
def test_conversations_of_a_file_can_be_trained_on(tmp_path, text_target, form):
    path = write(tmp_path / "talk.jsonl", [form("w3", "w4 w5"), form("w6 w7", "w8 w9 w10"), form("w11", "w12 w13")])
    found = load_training_data(DataRecipe(responses=path, limit=2), text_target)
    assert [(s.id, s.tokens.tolist(), s.answers) for s in found] == [
        ("talk/0", [1, 3, 2, 4, 5], ((3, 5),)),
        ("talk/1", [1, 6, 7, 2, 8, 9, 10], ((4, 7),)),
    ]


def test_what_cannot_be_trained_on_is_said(tmp_path, text_target, caplog):
    suite = write(tmp_path / "suite.jsonl", [{"id": "s", "turns": ["w9"]}])
    rows = [chat("w3", "w4 w5"), chat("w9", "w4 w5"), chat("w3"), chat("w6", "w7"), chat("w3", "w4", "w5", "w6", "w7")]
    path = write(tmp_path / "talk.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        found = load_training_data(DataRecipe(responses=path, exclude=(suite,)), text_target)
    assert [s.id for s in found] == ["talk/0"]
    assert "1 conversations are used" in caplog.text and "1 in an evaluation suite" in caplog.text
    assert "1 no assistant turn" in caplog.text and "2 without an answer that fits data.max_length" in caplog.text


def test_a_malformed_conversation_is_named_by_its_line(tmp_path, text_target):
    path = write(tmp_path / "talk.jsonl", [chat("w3", "w4 w5"), {"messages": [{"role": "user"}]}])
    with pytest.raises(UserError, match=r"talk\.jsonl line 2: key 'messages' must hold objects"):
        load_training_data(DataRecipe(responses=path), text_target)


def test_answers_in_token_ids_are_trained_on_as_before(tmp_path, text_target):
    rows = [{"id": f"x{i}", "prompt_ids": [1, 2], "response_ids": [3, 4, i]} for i in range(4)]
    path = write(tmp_path / "answers.jsonl", rows)
    found = load_training_data(DataRecipe(responses=path, limit=3), text_target)
    assert [s.id for s in found] == ["x0", "x1", "x2"]


def test_answers_given_with_another_thinking_mode_are_refused(tmp_path, text_target):
    row = {"id": "a", "prompt_ids": [1], "response_ids": [2, 3], "thinking": True}
    path = write(tmp_path / "answers.jsonl", [row])
    with pytest.raises(UserError, match=r"a was answered with thinking true, but data\.thinking is false") as error:
        load_training_data(DataRecipe(responses=path), text_target)
    assert "\n" not in str(error.value)
    assert load_training_data(DataRecipe(responses=path, thinking=True), text_target)


# Turns of one conversation


def test_turns_share_a_sequence_while_each_continues_the_one_before():
    turns = [Turn("c#1", [1, 2], [3, 4]), Turn("c#2", [1, 2, 3, 4, 5], [6, 7]), Turn("c#3", [1, 2, 9], [8, 8])]
    first, second = join_turns(turns, 99)
    assert (first.id, first.tokens.tolist(), first.answers) == ("c#2", [1, 2, 3, 4, 5, 6, 7], ((2, 4), (5, 7)))
    assert (second.id, second.tokens.tolist(), second.answers) == ("c#3", [1, 2, 9, 8, 8], ((3, 5),))


def test_a_joined_sequence_is_cut_after_the_last_answer_that_fits():
    turns = [Turn("c#1", [1, 2], [3, 4]), Turn("c#2", [1, 2, 3, 4, 5, 5], [6, 7, 8])]
    for max_length, length, answers in ((8, 8, ((2, 4), (6, 8))), (7, 4, ((2, 4),)), (4, 4, ((2, 4),))):
        (sequence,) = join_turns(turns, max_length)
        assert (len(sequence.tokens), sequence.answers) == (length, answers)
    assert join_turns(turns, 3) == []


def test_regenerated_turns_are_joined_within_their_conversation(tmp_path):
    rows = [
        {"id": "a#1", "prompt_ids": [1], "response_ids": [2, 3]},
        {"id": "a#2", "prompt_ids": [1, 2, 3, 4], "response_ids": [5, 6]},
        {"id": "b#1", "prompt_ids": [1, 2, 3, 4, 5, 6], "response_ids": [7, 8]},
        {"id": "c", "prompt_ids": [1, 2, 3, 4, 5, 6, 7, 8], "response_ids": [7, 8]},
    ]
    found = load_sequences(write(tmp_path / "answers.jsonl", rows), 99, 10)
    assert [(s.id, s.answers) for s in found] == [("a#2", ((1, 3), (4, 6))), ("b#1", ((6, 8),)), ("c", ((8, 10),))]


def test_a_conversation_is_not_split_between_training_and_held_out():
    turns = [Turn(f"c{i}#{k}", [i, k], [3, 4]) for i in range(9) for k in (1, 2)]
    everything = [s for turn in turns for s in join_turns([turn], 99)]
    training, held_out = split_held_out(everything, 3)
    talks = [{s.id.split("#")[0] for s in part} for part in (training, held_out)]
    assert len(held_out) == 4 and len(training) == 14 and talks[0].isdisjoint(talks[1])
    with pytest.raises(UserError, match="no conversation is left to train on"):
        split_held_out(everything[:2], 1)
