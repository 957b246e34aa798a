"""Drafts that are never accepted are said once, with the likely causes; drafts that are of use never are."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from domino_spec.api import generate
from domino_spec.decoding.cycle import Proposal
from domino_spec.decoding.request import FIRST_CHECK, USELESS, DraftWatch, upper_bound
from tests.decoding.graphs.static_engines import Knows, decoded, engine_of, requests_of
from tests.tiny import VOCAB, as_target, plain_greedy, random_prompts, tiny_draft, tiny_model

PROMPTS = random_prompts([5, 3])


def warnings(caplog) -> list[str]:
    """Of the watch; the head may say once in a process that it drafts in PyTorch."""
    watch = "domino_spec.decoding.request"
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == watch]


def test_the_bound_is_wilsons():
    """Of no hit in n it is z^2 / (n + z^2), and it holds the truth in at least 99% of series of throws."""
    assert upper_bound(0, 64) == pytest.approx(9 / 73)
    generator = torch.Generator().manual_seed(0)
    for chance in (0.05, 0.2, 0.6):
        hits = (torch.rand(2000, 64, generator=generator) < chance).sum(1).tolist()
        assert sum(upper_bound(h, 64) >= chance for h in hits) >= 0.99 * 2000


def test_it_speaks_once_and_only_after_enough_passes(caplog):
    watch = DraftWatch("domino")
    for _ in range(FIRST_CHECK - 1):
        watch.count([4, 0, 4], [0, 0, -1])  # beside it one without drafts and one that has ended
    assert not warnings(caplog)
    for _ in range(10 * FIRST_CHECK):
        watch.count([4], [0])
    (line,) = warnings(caplog)
    assert f"of {FIRST_CHECK} verify passes with drafts of method domino, 0 accepted one" in line
    assert "acceptance length 1.00" in line and "\n" not in line
    for cause in ("another target", "thinking", "template", "label convention", "overflow", "temperature"):
        assert cause in line


def test_a_draft_that_is_of_use_is_never_called_useless(caplog):
    """Accepting in 30% of passes, over many series, looked at whenever the rule looks."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        watch = DraftWatch("domino")
        for accepted in (torch.rand(1024, generator=generator) < USELESS + 0.1).long().tolist():
            watch.count([1], [accepted])
    assert not warnings(caplog)


class NeverRight(Knows):
    """Knows the texts, and drafts another token everywhere."""

    def propose(self, state, own, num_drafts: int) -> Proposal:
        proposal = super().propose(state, own, num_drafts)
        places = state.lengths[:, None] + torch.arange(num_drafts)
        right = torch.stack([self.texts[i].take(places[i]) for i in range(len(places))])
        return replace(proposal, tokens=(right + 1) % VOCAB)


@pytest.mark.parametrize("static", [False, True])
def test_an_engine_says_that_no_draft_is_accepted(caplog, static):
    model = tiny_model()
    target, count = as_target(model), 70
    texts = [p + plain_greedy(model, p, count + 8) for p in PROMPTS]
    for drafter, said in ((Knows(texts), 0), (NeverRight(texts), 1)):
        engine = engine_of(target, drafter, static=static, watch=DraftWatch("domino"))
        decoded(engine, requests_of(PROMPTS, [count] * 2))
        assert len(warnings(caplog)) == said
        assert engine.watch.passes == engine.stats.verify_passes


def test_generate_watches_every_method_with_a_draft_and_no_look_up(caplog):
    target = as_target(tiny_model(max_position_embeddings=256))
    draft = tiny_draft(target, draft_vocab_ids=torch.tensor([57]))  # the only token that it can draft never comes
    options = dict(max_new_tokens=70, min_confidence=0.0)
    generate(target, None, PROMPTS, method="ngram", **options)
    assert not warnings(caplog)
    generate(target, draft, PROMPTS, method="domino", **options)
    assert len(warnings(caplog)) == 1
    watch = DraftWatch("domino")
    for _ in range(3):
        generate(target, draft, PROMPTS, method="domino", watch=watch, **options)
    assert len(warnings(caplog)) == 2, "once over all calls"
