"""Prompt look-up proposes what followed the last occurrence of the text's end."""

from __future__ import annotations

import pytest
import torch

from domino_spec.drafters.lookup import NgramIndex, PromptLookup
from tests.tiny import as_target, plain_greedy, run, tiny_model


def naive_continuation(text: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """The definition: what followed the text's longest suffix that occurred before, where it last did, token by token.

    Every copied token is written to the end of the text, so the copy reads on from itself.
    """
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        suffix = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == suffix:
                grown = list(text)
                for i in range(count):
                    grown.append(grown[start + size + i])
                return grown[len(text) :]
    return []


@pytest.mark.parametrize("longest, shortest", [(4, 1), (3, 2), (1, 1)])
def test_index_equals_a_search_through_the_text(longest, shortest):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 4, (80,), generator=generator).tolist()
    index, found = NgramIndex(longest), 0
    for i, token in enumerate(text):
        index.extend([token])
        expected = naive_continuation(text[: i + 1], longest, shortest, 5)
        assert index.continuation(shortest, 5) == expected
        found += bool(expected)
    assert found > 40


def continuation(text: list[int], count: int, longest: int = 4, shortest: int = 1) -> list[int]:
    index = NgramIndex(longest)
    index.extend(text)
    return index.continuation(shortest, count)


@pytest.mark.parametrize("loop", [[7], [7, 8, 9]], ids=["period-1", "period-3"])
@pytest.mark.parametrize("shortest", [1, 3])
def test_a_loop_is_continued_for_as_long_as_asked(loop, shortest):
    """From any place in the loop, over several turns of it."""
    for turn in range(len(loop)):
        text = [1, 2, 3] + loop * 4 + loop[:turn]
        expected = [loop[(turn + i) % len(loop)] for i in range(8)]
        assert continuation(text, 8, shortest=shortest) == expected


def test_a_copy_that_ends_before_the_text_does_is_the_text_as_it_stands():
    text = [5, 6, 7, 8, 9, 10, 11, 5, 6]
    for count in range(8):
        assert continuation(text, count) == text[2 : 2 + count]
    assert continuation(text, 9) == [7, 8, 9, 10, 11, 5, 6, 7, 8], "past its end it reads on from the copy"
    assert continuation([5, 6, 7], 4) == continuation([5], 4) == continuation([], 4) == []


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="n-gram lengths"):
        PromptLookup(longest=2, shortest=3)


def test_a_text_in_a_loop_is_drafted_and_accepted():
    model = tiny_model(initializer_range=0.1)  # narrow weights fall into a loop at once
    text = plain_greedy(model, [5, 6], 60)
    assert len(set(text[-30:])) == 1
    (generation,) = run(as_target(model), PromptLookup(max_drafts=8), [[5, 6]], 60)
    assert generation.token_ids == text
    assert generation.acceptance_lengths[-3:] == [9, 9, 9], "a loop of one token fills every block"


def test_requests_without_a_match_get_no_drafts(target):
    (first, second) = run(target, PromptLookup(), [[1, 2, 3], [7, 8, 7, 8, 7]], 1)
    assert first.num_drafts == [0]
    assert second.num_drafts == [8]
