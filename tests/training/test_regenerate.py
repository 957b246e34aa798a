"""The target answers prompts: its own text, once each, however often the run is interrupted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from domino_spec import generate
from domino_spec.recipe import DataRecipe
from domino_spec.settings import UserError
from domino_spec.training.answers import regenerate
from domino_spec.training.data import load_sequences
from tests.tiny import VOCAB, as_target, tiny_draft, word_tokenizer

RECIPE = DataRecipe(max_new_tokens=10, batch_size=3)
PROMPTS = [
    {"id": "a", "turns": ["w5 w6 w7"], "category": "x"},
    {"id": "b", "turns": ["w8"]},
    {"id": "c", "turns": ["w9 w10", "w11 w12 w13"], "category": "y"},
    {"id": "d", "turns": ["w14 w15 w16 w17"]},
    {"id": "e", "turns": ["w18 w19"]},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["id"] for r in rows}) == len(rows), "answered twice"
    return {row["id"]: row for row in rows}


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "with a draft"])
def test_answers_are_the_targets_own(tmp_path, prompts, text_target, drafted):
    out = tmp_path / "answers.jsonl"
    draft = tiny_draft(text_target) if drafted else None
    result = regenerate(text_target, draft, prompts, out, RECIPE)
    rows = read(out)
    assert set(rows) == {"a", "b", "c#1", "c#2", "d", "e"}
    assert (result.answered, result.already_answered, result.too_long) == (5, 0, 0)
    for name, turn in (("a", "w5 w6 w7"), ("b", "w8"), ("d", "w14 w15 w16 w17"), ("e", "w18 w19"), ("c#1", "w9 w10")):
        (alone,) = generate(text_target, None, [turn], max_new_tokens=10)
        assert rows[name]["prompt_ids"] == alone.prompt_ids
        assert rows[name]["response_ids"] == alone.token_ids
    assert result.new_tokens == sum(len(r["response_ids"]) for r in rows.values())
    assert rows["a"]["category"] == "x" and rows["a"]["temperature"] == 0


def test_a_later_turn_holds_the_earlier_ones_and_their_answers(tmp_path, prompts, text_target):
    out = tmp_path / "answers.jsonl"
    regenerate(text_target, None, prompts, out, RECIPE)
    rows = read(out)
    first = text_target.tokenizer.decode(rows["c#1"]["response_ids"], skip_special_tokens=True)
    words = f"w1 w9 w10 w2 w1 {first} w2 w1 w11 w12 w13 w2"
    assert rows["c#2"]["prompt_ids"] == text_target.tokenizer(words)["input_ids"]


def test_answers_can_be_trained_on(tmp_path, prompts, text_target):
    out = tmp_path / "answers.jsonl"
    regenerate(text_target, None, prompts, out, RECIPE)
    assert {s.id for s in load_sequences(out, 100, text_target.vocab_size)} == set(read(out))


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "with a draft"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_interrupted_run_writes_what_a_whole_one_does(tmp_path, prompts, text_target, temperature, drafted):
    recipe = dataclasses.replace(RECIPE, temperature=temperature)
    draft = tiny_draft(text_target) if drafted else None
    regenerate(text_target, draft, prompts, tmp_path / "whole.jsonl", recipe)
    out = tmp_path / "parts.jsonl"
    done = []

    def interrupt(progress):
        done.append(progress.answered)
        if progress.answered >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(text_target, draft, prompts, out, recipe, interrupt)
    kept = out.read_text()
    assert len(read(out)) >= 3
    result = regenerate(text_target, draft, prompts, out, recipe)
    assert out.read_text().startswith(kept), "what was there is left as it is"
    assert result.already_answered == 3 and result.answered == 2
    assert read(out) == read(tmp_path / "whole.jsonl")
    again = regenerate(text_target, draft, prompts, out, recipe)
    assert (again.answered, again.already_answered, again.new_tokens) == (0, 5, 0)


def test_a_line_cut_short_by_a_kill_is_written_anew(tmp_path, prompts, text_target):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    regenerate(text_target, None, prompts, whole, RECIPE)
    out.write_text(whole.read_text()[:-20])
    regenerate(text_target, None, prompts, out, RECIPE)
    assert read(out) == read(whole)


def test_prompts_that_leave_no_room_are_left_out_and_counted(tmp_path, text_target):
    rows = [PROMPTS[0], {"id": "long", "turns": [" ".join(["w3"] * 505)]}]
    result = regenerate(text_target, None, write(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl", RECIPE)
    assert (result.answered, result.too_long) == (1, 1)
    assert set(read(tmp_path / "out.jsonl")) == {"a"}


def test_progress_counts_up_to_the_end(tmp_path, prompts, text_target):
    seen = []
    result = regenerate(text_target, None, prompts, tmp_path / "out.jsonl", RECIPE, seen.append)
    assert [p.new_tokens for p in seen] == sorted(p.new_tokens for p in seen)
    assert seen[-1].new_tokens == result.new_tokens and seen[-1].answered == seen[-1].total == 5
    assert len(seen) > 5, "a bar that moves within a batch"


def test_prompts_may_be_conversations_whose_answers_are_given_anew(tmp_path, text_target):
    talk = [("system", "w20"), ("user", "w9 w10"), ("assistant", "w30"), ("user", "w11")]
    rows = [{"id": "c", "messages": [{"role": role, "content": content} for role, content in talk]}]
    out = tmp_path / "out.jsonl"
    regenerate(text_target, None, write(tmp_path / "p.jsonl", rows), out, RECIPE)
    answers = read(out)
    assert answers["c#1"]["prompt_ids"] == [1, 20, 2, 1, 9, 10, 2]
    first = text_target.tokenizer.decode(answers["c#1"]["response_ids"], skip_special_tokens=True)
    whole = f"w1 w20 w2 w1 w9 w10 w2 w1 {first} w2 w1 w11 w2"
    assert answers["c#2"]["prompt_ids"] == text_target.tokenizer(whole)["input_ids"]


def test_what_is_left_out_is_counted_and_written_beside_the_answers(tmp_path, text_target):
    suite = write(tmp_path / "suite.jsonl", [{"id": "s", "turns": ["W8"]}])
    recipe = dataclasses.replace(RECIPE, exclude=(str(suite),))
    prompts = write(tmp_path / "p.jsonl", [*PROMPTS, {"id": "again", "turns": ["w5 w6  w7"]}])
    result = regenerate(text_target, None, prompts, tmp_path / "out.jsonl", recipe)
    assert (result.answered, result.in_evaluation, result.duplicate_prompts) == (4, 1, 1)
    assert result.left_out == "1 with the prompt of another, 1 in an evaluation suite"
    assert set(read(tmp_path / "out.jsonl")) == {"a", "c#1", "c#2", "d", "e"}
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report == {"answers": str(tmp_path / "out.jsonl"), **dataclasses.asdict(result)}


def test_answers_cut_at_the_limit_are_counted_and_can_be_left_out(tmp_path, prompts, text_target):
    kept, dropped = tmp_path / "kept.jsonl", tmp_path / "dropped.jsonl"
    with_all = regenerate(text_target, None, prompts, kept, RECIPE)
    cut = {id_ for id_, row in read(kept).items() if len(row["response_ids"]) == 10}
    assert with_all.truncated == len(cut) > 0
    regenerate(text_target, None, prompts, dropped, dataclasses.replace(RECIPE, keep_truncated=False))
    assert dropped.exists() and not cut & read(dropped).keys()


@pytest.mark.parametrize("thinking", [True, False, None])
def test_the_thinking_mode_reaches_the_template_and_the_answers(tmp_path, model, thinking):
    tokenizer = word_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is not defined %}w50{% elif enable_thinking %}w51{% endif %}"
    recipe = dataclasses.replace(RECIPE, thinking=thinking)
    out = tmp_path / "out.jsonl"
    prompts = write(tmp_path / "p.jsonl", [{"id": "a", "turns": ["w8"]}])
    regenerate(as_target(model, tokenizer), None, prompts, out, recipe)
    row = read(out)["a"]
    assert row["thinking"] is thinking
    assert row["prompt_ids"] == [1, 8, 2, *{True: [51], False: [], None: [50]}[thinking]]
    load_sequences(out, 100, VOCAB, thinking)
    with pytest.raises(UserError, match="was answered with thinking"):
        load_sequences(out, 100, VOCAB, not thinking)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": "z"}, "line 2: key 'turns' must be list"),
        ({"id": "z", "turns": []}, "line 2: key 'turns' must hold one or more texts"),
        ({"id": "z", "turns": [" "]}, "line 2: key 'turns' must hold one or more texts"),
        ({"id": "z", "turns": [3]}, "line 2: key 'turns' must hold one or more texts"),
        ({"id": "a", "turns": ["w3"]}, "line 2: id 'a' was used before"),
    ],
)
def test_a_malformed_prompt_is_named_by_its_line(tmp_path, text_target, row, message):
    path = write(tmp_path / "p.jsonl", [PROMPTS[0], row])
    with pytest.raises(UserError, match=message):
        regenerate(text_target, None, path, tmp_path / "out.jsonl", RECIPE)
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_cannot_be_written_are_one_line(tmp_path, prompts, text_target):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as error:
        regenerate(text_target, None, prompts, tmp_path / "file" / "out.jsonl", RECIPE)
    assert "\n" not in str(error.value)
