"""Temperature > 0: the same seed gives the same text, and a request's text does not depend on its neighbours."""

from __future__ import annotations

import pytest

from domino_spec import generate
from tests.tiny import random_prompts, tiny_draft, tiny_target

METHODS = [
    ("none", {}),
    ("ngram", {}),
    ("dflash", {}),
    ("domino", {}),
    ("domino", dict(sample_drafts=False)),
    ("domino", dict(candidates=5)),
    ("domino", dict(min_confidence=0.15)),
    ("domino", dict(min_confidence=0.15, sample_drafts=False)),
    ("domino+ngram", {}),
    ("domino", dict(matching_rule=True)),
    ("dflash-tree", {}),
    ("domino-tree", dict(candidates=5, min_confidence=0.0)),
    ("domino-best-first", {}),
    ("domino-tree+ngram", dict(min_confidence=0.0)),
]
IDS = [f"{m} {o}" for m, o in METHODS]
PROMPTS = random_prompts([6, 1, 11, 4])


def texts(target, prompts, method, **options) -> list[list[int]]:
    settings = dict(temperature=0.9, top_p=0.95, max_new_tokens=14)
    return [
        g.token_ids for g in generate(target, tiny_draft(target), prompts, method=method, **{**settings, **options})
    ]


@pytest.mark.parametrize("method, options", METHODS, ids=IDS)
def test_a_seed_gives_the_same_text_every_time(target, method, options):
    first = texts(target, PROMPTS, method, seed=5, **options)
    assert texts(target, PROMPTS, method, seed=5, **options) == first
    assert texts(target, PROMPTS, method, seed=500, **options) != first


@pytest.mark.parametrize("method, options", METHODS, ids=IDS)
def test_a_requests_text_does_not_depend_on_its_neighbours(target, method, options):
    """Request r of a batch draws from stream seed + r, wherever it stands and whoever stands beside it."""
    together = texts(target, PROMPTS, method, seed=40, **options)
    for r, prompt in enumerate(PROMPTS):
        assert texts(target, [prompt], method, seed=40 + r, **options) == [together[r]]
    others = [*random_prompts([3, 8], seed=77), PROMPTS[2], PROMPTS[3]]
    assert texts(target, others, method, seed=40, **options)[2:] == together[2:]


def test_requests_of_one_prompt_get_different_texts(target):
    same = texts(target, [PROMPTS[0]] * 4, "none", seed=1)
    assert len({tuple(t) for t in same}) > 1


@pytest.mark.parametrize("method", ["ngram", "dflash", "domino"])
def test_the_matching_rule_writes_what_plain_decoding_draws(target, method):
    """An independent draw of the target decides every token, so drafts cannot change the text at all."""
    assert texts(target, PROMPTS, method, seed=3, matching_rule=True) == texts(target, PROMPTS, "none", seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("min_confidence", [0.0, 0.05])
@pytest.mark.parametrize("method", ["dflash-tree", "domino-tree", "domino-best-first", "domino-tree+ngram"])
def test_trees_write_what_plain_decoding_draws(method, min_confidence):
    """A walk follows the target's own draws, so at one seed trees, and copies among trees, change nothing at all.

    There are few tokens to draw, so that copies and trees are both often right in part.
    """
    target = tiny_target(vocab_size=12)
    prompts = [[5, 6, 7, 8, 9] * 3, [7] * 8, *random_prompts([6, 1], vocab=12)]
    settings = dict(temperature=1.0, top_k=3, max_new_tokens=40, seed=40)
    plain = [g.token_ids for g in generate(target, None, prompts, **settings)]
    settings |= dict(method=method, min_confidence=min_confidence, num_drafts=11)
    together = generate(target, tiny_draft(target), prompts, **settings)
    assert [g.token_ids for g in together] == plain
    assert {n for g in together for n in g.acceptance_lengths} >= {1, 2, 3}
    # Alone, a request's copies have no tree beside them; they are decided by the same numbers all the same.
    for r, prompt in enumerate(prompts):
        (alone,) = generate(target, tiny_draft(target), [prompt], **{**settings, "seed": 40 + r})
        assert alone.token_ids == plain[r]


def test_temperature_zero_ignores_the_seed(target):
    assert texts(target, PROMPTS, "domino", seed=1, temperature=0.0) == texts(
        target, PROMPTS, "domino", seed=2, temperature=0.0
    )
