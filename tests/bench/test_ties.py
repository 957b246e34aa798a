"""The margin between the two best tokens, and what counts as a near tie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from domino_spec.bench.rows import Row
from domino_spec.bench.suites import EncodedPrompt
from domino_spec.bench.ties import (
    TextCheck,
    find_partings,
    first_difference,
    load_ties,
    measure_ties,
    save_ties,
    top_two,
)
from tests import tiny


def test_the_two_best_tokens_are_those_of_transformers(model, target):
    prompt, text = [3, 4, 5], [6, 7, 8, 9]
    with torch.inference_mode():
        best = model(torch.tensor([prompt + text])).logits[0, -1].topk(2)
    found = top_two(target, prompt, text)
    assert found.tokens == tuple(best.indices.tolist())
    tiny.assert_close(torch.tensor(found.margin), best.values[0] - best.values[1])
    assert not found.near_tie and 0 <= found.rounding < found.margin


def test_a_text_may_be_empty(target):
    assert top_two(target, [3], []).rounding == 0


def test_two_tokens_with_the_same_logit_are_a_near_tie():
    model = tiny.tiny_model(seed=5)
    target = tiny.as_target(model)
    first, _ = top_two(target, [3, 4], [5]).tokens
    twin = (first + 1) % tiny.VOCAB
    with torch.no_grad():
        target.lm_head_weight[twin] = target.lm_head_weight[first]
    found = top_two(target, [3, 4], [5])
    assert set(found.tokens) == {first, twin} and found.margin == 0 and found.near_tie


# Greedy texts that differ are found, placed, and given the target's margin.


PROMPT = [5, 6, 7, 5]
ROW = Row("s", "s/0", "none", 0, 0.0, 0, 0, 1, 1, len(PROMPT), (), 0, (), (), 0.1, 0.2)


@pytest.fixture(scope="module")
def text(model):
    return tiny.plain_greedy(model, PROMPT, 12)


def rows_of(texts: dict[str, list[int]]) -> list[Row]:
    return [
        replace(ROW, method=method, budget=4 * (method == "domino"), token_ids=tuple(tokens))
        for method, tokens in texts.items()
    ]


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0


def test_equal_texts_part_nowhere(text):
    assert find_partings(rows_of({"none": text, "domino": text, "transformers": text})) == []


def test_an_injected_difference_is_found_against_each_reference_with_the_models_own_margin(model, target, text):
    wrong = [*text[:7], (text[7] + 1) % tiny.VOCAB, *text[8:]]
    rows = rows_of({"none": text, "transformers": text, "domino": wrong})
    partings = find_partings(rows)
    assert [(p.method, p.reference, p.position) for p in partings] == [
        ("domino", "none", 7),
        ("domino", "transformers", 7),
    ]
    assert partings[0].token == wrong[7] and partings[0].reference_token == text[7]
    for tie in measure_ties(target, [EncodedPrompt("s", "s/0", PROMPT)], rows):
        logits = model(torch.tensor([PROMPT + text[:7]])).logits[0, -1].detach()
        best = logits.topk(2)
        assert list(tie.top_tokens) == best.indices.tolist() and tie.top_tokens[0] == text[7]
        assert tie.margin == pytest.approx((best.values[0] - best.values[1]).item(), rel=1e-3)
        assert tie.rounding < tie.margin / 2 and not tie.near_tie, "a fault, and not excused as rounding"


def test_a_near_tie_is_called_one(text):
    model = tiny.tiny_model()
    # Two tokens with the same output row always have the same logit, up to rounding.
    other = next(t for t in range(tiny.VOCAB) if t not in text and t not in PROMPT)
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[text[3]]
    wrong = [*text[:3], other, *text[4:]]
    rows = rows_of({"none": text, "domino": wrong})
    (tie,) = measure_ties(tiny.as_target(model), [EncodedPrompt("s", "s/0", PROMPT)], rows)
    assert tie.parting.position == 3 and set(tie.top_tokens) == {text[3], other}
    assert tie.margin == 0 and tie.near_tie


def test_a_text_that_ends_early_parts_where_it_ends(text):
    (parting,) = find_partings(rows_of({"none": text, "domino": text[:5]}))
    assert (parting.position, parting.token, parting.reference_token) == (5, None, text[5])


def test_only_greedy_runs_of_the_same_prompt_and_repeat_are_compared(text):
    none, domino = rows_of({"none": text, "domino": text[:5]})
    for changed in (replace(domino, temperature=1.0), replace(domino, repeat=1), replace(domino, id="s/1")):
        assert find_partings([none, changed]) == []


def test_ties_survive_being_written(target, text, tmp_path):
    rows = rows_of({"none": text, "domino": text[:5]})
    ties = measure_ties(target, [EncodedPrompt("s", "s/0", PROMPT)], rows)
    assert load_ties(tmp_path) == []
    save_ties(ties, tmp_path)
    assert load_ties(tmp_path) == ties


def test_texts_are_compared_as_they_come_whoever_goes_first(text):
    none, transformers, domino = rows_of({"none": text, "transformers": text, "domino": [*text[:7], 1 + text[7]]})
    later = TextCheck([domino])
    (found,) = later.add(none)
    assert found == (
        "the text of domino(4) differs from that of none after 7 equal tokens; so far 1 of 1 greedy texts differ"
    )
    (found,) = later.add(transformers)  # equal to one of the two others
    assert "that of transformers after 7 equal tokens; so far 2 of 2" in found
    assert TextCheck([none]).add(transformers) == []
    assert TextCheck([replace(none, temperature=1.0)]).add(replace(domino, temperature=1.0)) == []
    assert TextCheck([none]).add(replace(domino, id="s/1")) == []
