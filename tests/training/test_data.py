"""Answers become sequences; what cannot be read is named with its line."""

from __future__ import annotations

import json

import pytest
import torch

from domino_spec.files import read_jsonl
from domino_spec.settings import UserError
from domino_spec.training.data import frequent_tokens, load_sequences, split_held_out
from tests.tiny import as_sequences, conversation


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(id_="a", prompt=(1, 2), response=(3, 4, 5), **more) -> dict:
    return {"id": id_, "prompt_ids": list(prompt), "response_ids": list(response), **more}


def test_sequences_are_prompt_and_answer(tmp_path):
    (sequence,) = load_sequences(write(tmp_path / "r.jsonl", [row(category="x")]), 100, 10)
    assert (sequence.id, sequence.tokens.tolist(), sequence.answers) == ("a", [1, 2, 3, 4, 5], ((2, 5),))
    assert sequence.num_answer_tokens == 3


def test_long_sequences_are_cut_and_short_answers_left_out(tmp_path):
    rows = [row("long", response=range(9)), row("short", response=[3]), row("cut away", prompt=range(8))]
    path = write(tmp_path / "r.jsonl", rows)
    (sequence,) = load_sequences(path, 6, 10)
    assert (sequence.id, sequence.tokens.tolist(), sequence.answers) == ("long", [1, 2, 0, 1, 2, 3], ((2, 6),))


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="a holds token ids outside the target's vocabulary of 5"):
        load_sequences(write(tmp_path / "r.jsonl", [row()]), 100, 5)


def test_a_file_without_a_usable_answer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no answer that can be trained on"):
        load_sequences(write(tmp_path / "r.jsonl", [row(response=[3])]), 100, 10)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"id": 3, "prompt_ids": [], "response_ids": []}', "line 2: key 'id' must be str"),
        ('{"id": "b", "prompt_ids": []}', "line 2: key 'response_ids' must be list"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n" + json.dumps(row("c")) + "\n")
    with pytest.raises(UserError, match=message) as error:
        load_sequences(path, 100, 10)
    assert "r.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_sequences(tmp_path / "nowhere.jsonl", 100, 10)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no rows"):
        load_sequences(tmp_path / "empty.jsonl", 100, 10)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_sequences(tmp_path / "binary.jsonl", 100, 10)


def test_a_last_line_cut_short_by_a_kill_can_be_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c')
    assert [r["id"] for r in read_jsonl(path, {"id": str}, skip_partial_end=True)] == ["a", "b"]
    with pytest.raises(UserError, match="line 3"):
        read_jsonl(path, {"id": str})


def sequences(count: int):
    return as_sequences([[1, 2]] * count, [[i % 5, 3, 4] for i in range(count)])


def test_the_held_out_part_is_stable_and_separate():
    everything = sequences(30)
    training, held_out = split_held_out(everything, 7)
    assert len(held_out) == 7 and len(training) == 23
    assert {s.id for s in training}.isdisjoint(s.id for s in held_out)
    assert {s.id for s in split_held_out(everything[::-1], 7)[1]} == {s.id for s in held_out}
    # More data moves few sequences: those held out stay so unless an earlier hash pushes them out.
    grown = {s.id for s in split_held_out(sequences(33), 7)[1]}
    assert len(grown & {s.id for s in held_out}) >= 4


def test_too_few_sequences_to_hold_out_is_an_error():
    with pytest.raises(UserError, match="held_out is 7, but there are only 7"):
        split_held_out(sequences(7), 7)


def test_the_draft_vocabulary_holds_the_answers_most_frequent_tokens():
    data = as_sequences([[8, 8, 8, 8], [8]], [[2, 2, 2, 5, 5, 3], [2, 5, 7]])
    assert frequent_tokens(data, 2, []).tolist() == [2, 5], "prompts are not counted, ids ascend"
    assert frequent_tokens(data, 3, [9]).tolist() == [2, 5, 9], "stop tokens are always in"
    assert frequent_tokens(data, 4, []).tolist() == [2, 3, 5, 7], "of equally frequent tokens the lower id"
    full = frequent_tokens(data, 7, [])
    assert len(full) == len(full.unique()) == 7 and torch.isin(torch.tensor([2, 3, 5, 7]), full).all()


def test_questions_of_later_turns_are_not_counted_either():
    talk = conversation("c", [([8], [2, 2]), ([9, 9, 9, 9], [5])])
    assert frequent_tokens([talk], 2, []).tolist() == [2, 5]
    assert talk.num_answer_tokens == 3
