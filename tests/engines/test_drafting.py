"""What the plug-ins call for a step of drafting; no engine is needed for it."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.request import Limits
from domino_spec.drafters.block import BlockDrafter
from domino_spec.engines.drafting import DraftParts, Drafts, cache_as_logits, draft_tokens, over_vocabulary
from domino_spec.ops.heads import HeadOps
from tests import tiny

EVERY_SECOND = torch.arange(0, tiny.VOCAB, 2)


def parts_of(draft, candidates: int | None) -> DraftParts:
    """What drafting takes, as the plug-in would borrow it from vLLM."""
    head = HeadOps(draft.head_weights, draft.device, draft.dtype)
    return DraftParts(head, draft.base_logits, draft.embed, draft.draft_vocab_ids, candidates)


class Noted(BlockDrafter):
    """Notes the hidden states and anchors of every cycle, and what was drafted from them."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.cycles: list[tuple] = []

    def propose(self, state, own, num_drafts):
        proposal = super().propose(state, own, num_drafts)
        self.cycles.append((self.slots(state, own, num_drafts), state.anchors.clone(), proposal))
        return proposal


@pytest.mark.parametrize("vocabulary", [None, EVERY_SECOND])
@pytest.mark.parametrize("shift_label", [True, False])
def test_a_step_drafts_what_this_packages_drafter_drafts(target, vocabulary, shift_label):
    draft = tiny.tiny_draft(target, draft_vocab_ids=vocabulary, shift_label=shift_label)
    drafter = Noted(draft, candidates=8)
    tiny.run(target, drafter, tiny.random_prompts([4, 9]), 12, limits=Limits(12, stop_token_ids=frozenset()))
    assert len(drafter.cycles) > 3
    for hidden, anchors, proposal in drafter.cycles:
        assert torch.equal(draft_tokens(parts_of(draft, 8), hidden, anchors).tokens, proposal.tokens)


def sampled(draft, requests: int, temperatures: torch.Tensor, seed: int = 0, candidates: int = 8) -> Drafts:
    generator = torch.Generator().manual_seed(seed)
    steps = draft.config.max_drafts
    hidden = torch.randn(requests, steps, draft.config.hidden_size, generator=generator)
    uniform = torch.rand(requests, steps, generator=generator, dtype=torch.float64)
    anchors = torch.randint(0, tiny.VOCAB, (requests,), generator=generator)
    return draft_tokens(parts_of(draft, candidates), hidden, anchors, temperatures, uniform)


def test_sampled_drafts_are_reported_over_the_targets_vocabulary(target):
    draft = tiny.tiny_draft(target, draft_vocab_ids=EVERY_SECOND)
    drafts = sampled(draft, 3, torch.tensor([1.0, 0.0, 0.5]))
    probs = over_vocabulary(drafts, tiny.VOCAB)
    tiny.assert_close(probs.sum(-1), torch.ones(3, 5))
    assert (probs[..., 1::2] == 0).all()  # not in the draft vocabulary
    assert (probs.gather(-1, drafts.tokens[..., None]) > 0).all()
    assert ((probs[1] == 0) | (probs[1] == 1)).all()  # greedy among others that sample


def test_the_second_runner_finds_the_distribution_that_was_drawn_from(target):
    draft = tiny.tiny_draft(target, draft_vocab_ids=EVERY_SECOND)
    temperatures = torch.tensor([0.7, 1.3, 0.0, 1.0])
    cache = torch.full((6, 5, tiny.VOCAB), float("-inf"))  # five requests at most, and padding
    written = torch.zeros(6, 5, 8, dtype=torch.long)
    for seed, rows in ((1, [4, 0, 2, -1]), (2, [0, 3, 1, -1])):
        before, drafts = cache.clone(), sampled(draft, 4, temperatures, seed)
        cache_as_logits(cache, written, torch.tensor(rows), drafts, temperatures)
        probs = over_vocabulary(drafts, tiny.VOCAB)
        for row, temperature, expected in zip(rows[:2], temperatures[:2], probs[:2], strict=True):
            tiny.assert_close((cache[row] / temperature).softmax(-1), expected)
        untouched = [row for row in range(5) if row not in rows]
        assert torch.equal(cache[untouched], before[untouched])
