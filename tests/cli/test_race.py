"""Text that grows on the screen: nothing lost, nothing shown too early, every character with its origin."""

from __future__ import annotations

import itertools

import pytest
from rich.console import Console

from domino_spec.bench.ties import TopTwo
from domino_spec.cli.race import RaceResult, race
from domino_spec.cli.show import MarkedText, Pace, ProgressView, comparison, duration
from domino_spec.decoding.request import Ending, Generation, Limits
from tests import tiny

TEXT = "Straße, 東京, naïve.\nA second line; and STOP here."


def cycles(target, tokens: list[int], limits: Limits, sizes: list[int]):
    """A generation as decoding grows it: bursts of these sizes, the last token of each supplied by the target."""
    generation, ending = Generation([1]), Ending(target, limits)
    while tokens and generation.finish_reason is None:
        size = sizes[len(generation.acceptance_lengths) % len(sizes)]
        ending.append(generation, tokens[:size], size)
        tokens = tokens[size:]
        yield generation


@pytest.mark.parametrize("stop", [(), ("STOP",), ("e, 東",)])
@pytest.mark.parametrize("sizes", [[1], [3, 1, 7], [50]])
def test_pieces_join_to_the_generated_text(stop, sizes):
    tokenizer = tiny.byte_tokenizer()
    target = tiny.tiny_target(tokenizer=tokenizer, vocab_size=256)
    tokens = tokenizer(TEXT)["input_ids"]
    marked, shown = MarkedText(target, stop), ""
    for generation in cycles(target, tokens, Limits(len(tokens), stop), sizes):
        shown += "".join(text for text, _ in marked.advance(generation))
        assert TEXT.startswith(shown)
    assert shown == generation.text == (TEXT[: TEXT.index(stop[0])] if stop else TEXT)


def test_pieces_say_which_text_was_drafted():
    target = tiny.tiny_target(tokenizer=tiny.word_tokenizer())
    marked = MarkedText(target)
    pieces = [piece for g in cycles(target, [3, 4, 5, 6, 7, 8], Limits(6), [3]) for piece in marked.advance(g)]
    assert [(text.strip(), drafted) for text, drafted in pieces] == [
        ("w3 w4", True),
        ("w5", False),
        ("w6 w7", True),
        ("w8", False),
    ]


def test_a_difference_is_called_a_near_tie_only_with_its_margin():
    target = tiny.tiny_target(tokenizer=tiny.word_tokenizer())
    equal = race(target, None, "w3", method="ngram", max_new_tokens=4)
    assert comparison(target, equal) == "The two texts are equal: the same 4 tokens."
    for margin, words in ((1e-6, "a near tie"), (0.5, "more than rounding explains")):
        evidence = TopTwo((3, 4), margin, rounding=1e-6)
        sentence = comparison(target, RaceResult("w3", equal.plain, equal.drafted, 2, evidence))
        assert words in sentence and f"{margin:.2g} apart" in sentence
        assert "token 3" in sentence and "'w3' and 'w4'" in sentence


def test_each_racer_is_charged_only_for_its_own_cycles():
    target = tiny.tiny_target(tokenizer=tiny.word_tokenizer())
    seen = []
    result = race(
        target,
        None,
        "w3",
        method="ngram",
        max_new_tokens=20,
        on_cycle=lambda plain, drafted: seen.append((plain.total_seconds, drafted.total_seconds)),
    )
    for before, after in itertools.pairwise(seen):
        assert sum(a > b for a, b in zip(after, before, strict=True)) == 1  # one clock runs at a time
    assert result.first_difference is None and result.top_two is None
    assert result.plain.seconds == pytest.approx(seen[-1][0] - result.plain.generation.seconds_prefill)


def test_progress_on_no_terminal_is_plain_lines_and_ends_with_the_last():
    console = Console(force_terminal=False, record=True, width=200)
    with ProgressView(console) as view:
        for done in range(1, 11):
            view.show("steps", done, 10, f"loss {done}")
    lines = console.export_text().splitlines()
    assert lines[0].startswith("steps 1/10: loss 1") and lines[-1] == "steps 10/10: loss 10"
    assert len(lines) == 2  # the others came within half a minute


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (12_000, "3 h 20 min")])
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_pace_follows_recent_work():
    pace = Pace(smoothing=0.5)
    assert pace.advance(100, 1.0) == 100
    for _ in range(20):
        rate = pace.advance(300, 1.0)
    assert rate == pytest.approx(300, rel=1e-3)
