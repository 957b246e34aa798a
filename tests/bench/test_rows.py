"""Measuring: the order of runs, raw.jsonl, and going on after an interruption."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest

from domino_spec.bench.methods import Contender
from domino_spec.bench.rows import Row, append_row, read_rows, start_or_resume
from domino_spec.bench.run import WARM_UP_TOKENS, RunPlan, measure, run_bench
from domino_spec.bench.suites import EncodedPrompt
from domino_spec.decoding.request import Generation
from domino_spec.settings import UserError
from tests.bench.conftest import read_raw, without_times

CONFIGURATION = {"target": "t", "seed": 5}
KEYS = [  # docs/design.md, section 8
    *("suite", "id", "method", "budget", "temperature", "seed", "repeat", "batch", "threads", "prompt_tokens"),
    *("token_ids", "num_verify_passes", "num_drafts", "acceptance_lengths", "seconds_prefill", "seconds_decode"),
    "turn",
    "load_average",
    "steal_seconds",
]


def plan(repeats: int = 2) -> RunPlan:
    requests = [EncodedPrompt(suite, f"{suite}/{i}", [1, 2, 3][: i + 1]) for suite in ("x", "y") for i in range(3)]
    contenders = [Contender("none", 0, 0.0), Contender("domino", 4, 0.0), Contender("ngram", 8, 0.0)]
    return RunPlan(requests, contenders, repeats, max_new_tokens=20, seed=5)


def fake_run(contender: Contender, prompt: list[int], seed: int, max_new_tokens: int) -> Generation:
    """A text that depends on everything that a run is made of."""
    tokens = [len(prompt), contender.budget, seed, max_new_tokens]
    return Generation(prompt, tokens, acceptance_lengths=[3, 2], num_drafts=[contender.budget] * 2, seconds_decode=1.0)


def test_contenders_of_a_prompt_follow_each_other_and_take_turns_at_going_first():
    runs = list(plan().runs())
    assert len({key for key, _, _ in runs}) == len(runs) == 2 * 6 * 3
    groups = [runs[i : i + 3] for i in range(0, len(runs), 3)]
    first = defaultdict(int)
    for group in groups:
        assert len({(key.id, key.repeat) for key, _, _ in group}) == 1
        assert len({contender for _, _, contender in group}) == 3
        first[group[0][2]] += 1
    assert set(first.values()) == {len(groups) // 3}
    assert groups[0][0][2] != groups[6][0][2], "another repeat of the same prompt starts with another method"


def test_rows_have_exactly_the_published_keys(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    rows = measure(plan(), fake_run, tmp_path, [], lambda line: None)
    raw = read_raw(tmp_path)
    assert [list(row) for row in raw] == [KEYS] * len(raw)
    assert [f.name for f in fields(Row)] == KEYS
    assert read_rows(tmp_path) == rows
    assert all(row.seed == 5 + row.repeat and row.token_ids[2] == row.seed for row in rows)


def test_every_contender_is_warmed_up_before_the_first_row(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    asked = []

    def run(contender, prompt, seed, max_new_tokens):
        asked.append((contender, max_new_tokens, len(read_rows(tmp_path))))
        return fake_run(contender, prompt, seed, max_new_tokens)

    measure(plan(repeats=1), run, tmp_path, [], lambda line: None)
    assert {c for c, _, _ in asked[:3]} == set(plan().contenders)
    assert all(count == WARM_UP_TOKENS and written == 0 for _, count, written in asked[:3])
    assert len(read_rows(tmp_path)) == len(asked) - 3


@pytest.mark.parametrize("survivors", [0, 1, 7, 35])
def test_an_interrupted_bench_ends_with_the_same_rows_and_no_duplicate(tmp_path, survivors):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start_or_resume(whole, CONFIGURATION)
    expected = measure(plan(), fake_run, whole, [], lambda line: None)

    def dying_run(*arguments):
        if arguments[-1] == 20 and len(read_rows(cut)) == survivors:
            raise KeyboardInterrupt
        return fake_run(*arguments)

    with pytest.raises(KeyboardInterrupt):
        measure(plan(), dying_run, cut, start_or_resume(cut, CONFIGURATION), lambda line: None)
    with open(cut / "raw.jsonl", "a", encoding="utf-8") as file:  # killed in the middle of writing a line
        file.write(json.dumps(read_raw(whole)[survivors])[:40])
    rows = start_or_resume(cut, CONFIGURATION)
    assert len(rows) == survivors
    measure(plan(), fake_run, cut, rows, lambda line: None)
    assert read_rows(cut) == expected
    assert len(read_raw(cut)) == len({row.key for row in read_rows(cut)}) == 36


def test_an_interruption_at_every_single_run_costs_that_run_alone(tmp_path):
    """Ctrl-C again and again: every session measures one run more, in the order of an unbroken bench."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start_or_resume(whole, CONFIGURATION)
    expected = measure(plan(repeats=1), fake_run, whole, [], lambda line: None)
    for session in range(len(expected) + 1):
        rows = start_or_resume(broken, CONFIGURATION)
        assert rows == expected[:session]
        left = [1]

        def run(contender, prompt, seed, max_new_tokens, left=left):
            if max_new_tokens == 20:  # no warm-up
                if not left:
                    raise KeyboardInterrupt
                left.pop()
            return fake_run(contender, prompt, seed, max_new_tokens)

        with nullcontext() if session >= len(expected) - 1 else pytest.raises(KeyboardInterrupt):
            measure(plan(repeats=1), run, broken, rows, lambda line: None)
    assert (broken / "raw.jsonl").read_bytes() == (whole / "raw.jsonl").read_bytes()


def test_a_text_that_differs_is_said_at_once(tmp_path):
    """By the line after its run, with the first difference, and again after an interruption with all counts."""
    said = []

    def run(contender, prompt, seed, max_new_tokens):
        tokens = [7] * (max_new_tokens if contender.method != "domino" else 11)
        if contender.method == "domino" and len(prompt) == 2:
            tokens[4] = 8
        lengths = [1] * len(tokens)
        return Generation(prompt, tokens, acceptance_lengths=lengths, num_drafts=[0] * len(tokens), seconds_decode=1.0)

    def say(line):
        said.append(line)
        if "x/1" in line and "differs" in line and len(read_rows(tmp_path)) < 12:
            raise KeyboardInterrupt

    few = replace(
        plan(repeats=1), contenders=[Contender("none", 0, 0.0), Contender("domino", 4, 0.0)], max_new_tokens=11
    )
    start_or_resume(tmp_path, CONFIGURATION)
    with pytest.raises(KeyboardInterrupt):
        measure(few, run, tmp_path, [], say)
    measure(few, run, tmp_path, start_or_resume(tmp_path, CONFIGURATION), say)
    different = [line for line in said if "differs" in line]
    text = "the text of domino(4) differs from that of none after 4 equal tokens; so far"
    assert different == [
        f"[4/12] x/1: {text} 1 of 2 greedy texts differ",
        f"[10/12] y/1: {text} 2 of 5 greedy texts differ",
    ]


def test_sampled_texts_differ_without_a_word(tmp_path):
    said = []
    warm = replace(plan(1), contenders=[Contender("none", 0, 1.0), Contender("domino", 4, 1.0)])
    start_or_resume(tmp_path, CONFIGURATION)
    measure(warm, fake_run, tmp_path, [], said.append)
    assert len(said) == 6 and not any("differs" in line for line in said)


def test_rows_of_a_bench_without_turns_still_parse(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    rows = measure(plan(1), fake_run, tmp_path, [], lambda line: None)
    old = [{name: value for name, value in row.items() if name != "turn"} for row in read_raw(tmp_path)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert read_rows(tmp_path) == rows and {row.turn for row in rows} == {1}


def test_turns_of_a_conversation_share_its_id():
    row = Row("s", "a#2", "none", 0, 0.0, 0, 0, 1, 1, 3, (), 0, (), (), 0.0, 0.0)
    assert row.conversation == "a#2", "an id may hold such a mark of its own"
    assert replace(row, turn=2).conversation == replace(row, id="a").conversation == "a"
    assert replace(row, id="a#10", turn=10).conversation == "a"


def test_a_finished_bench_measures_nothing_again(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    rows = measure(plan(), fake_run, tmp_path, [], lambda line: None)

    def never(*arguments):
        raise AssertionError("nothing is left to measure")

    assert measure(plan(), never, tmp_path, rows, lambda line: None) == rows


def test_another_configuration_is_refused_by_the_name_of_what_differs(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    start_or_resume(tmp_path, dict(CONFIGURATION))
    for other in (CONFIGURATION | {"seed": 6}, CONFIGURATION | {"threads": 2}, {"target": "t"}):
        with pytest.raises(UserError, match=r"holds measurements with (seed|threads) .* give another --out") as error:
            start_or_resume(tmp_path, other)
        assert "\n" not in str(error.value)


def test_a_directory_with_foreign_measurements_is_refused(tmp_path):
    (tmp_path / "raw.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"without the settings\.json"):
        start_or_resume(tmp_path, CONFIGURATION)


def test_a_damaged_row_is_named(tmp_path):
    start_or_resume(tmp_path, CONFIGURATION)
    append_row(tmp_path, measure(plan(1), fake_run, tmp_path, [], lambda line: None)[0])
    lines = (tmp_path / "raw.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"budget": ', '"budget": "x')
    (tmp_path / "raw.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 3"):
        read_rows(tmp_path)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: give --out a directory"):
        start_or_resume(tmp_path / "file", CONFIGURATION)


@pytest.mark.slow
def test_a_real_bench_killed_in_the_middle_goes_on(disk, finished, tmp_path):
    out = tmp_path / "bench"
    said = []

    def dying(line):
        said.append(line)
        if len(said) == 4:  # two lines of earlier answers, then the second prompt's
            raise KeyboardInterrupt

    fewer = {"methods": ["none", "domino", "domino-matching"], "repeats": 1}
    with pytest.raises(KeyboardInterrupt):
        run_bench(**disk.options(out, say=dying, **fewer))
    before = read_raw(out)
    with open(out / "raw.jsonl", "a", encoding="utf-8") as file:
        file.write('{"suite": "su')
    report = run_bench(**disk.options(out, **fewer))
    rows = read_raw(out)
    assert rows[: len(before)] == before and 0 < len(before) < len(rows)

    def runs(rows):
        timeless = map(without_times, rows)
        return sorted(json.dumps(row) for row in timeless if row["method"] in fewer["methods"] and row["repeat"] == 0)

    assert runs(rows) == runs(read_raw(finished))
    assert [s["rows_before"] for s in report["sessions"]] == [0, len(before)]
