"""Temperature > 0: the joint distribution of three tokens is the target's own, whatever drafted them.

Each case decodes `REQUESTS` requests of the same prompt, seeds 0 .. REQUESTS - 1, and compares the counts of the 12^3
possible texts with exact probabilities, computed from transformers' own model and processors. The statistic is
Pearson's chi-square over texts expected at least 5 times, the rest pooled. `FALSE_ALARM` is the probability, over all
cases together, that a lossless decoder would fail (Bonferroni); seeds are fixed, so the tests always give the same
answer. The same statistic detects verifiers that are deliberately wrong.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from domino_spec.decoding import cycle as verify_module
from domino_spec.decoding.cycle import Proposal, accept_chain, walk_tree
from domino_spec.decoding.sampling import SamplingSettings, draw
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.drafters.methods import TREE_BUDGET, make_drafter
from domino_spec.ops.acceptance import match_chain
from tests.tiny import as_sequences, as_target, fit, random_prompts, run, tiny_draft, tiny_model

VOCAB, TOKENS, REQUESTS = 12, 3, 4000
PROMPT = [9, 1, 9, 9, 9, 1]  # prompt look-up drafts 9 9 9 1, each of which has about even odds
FALSE_ALARM = 1e-4

PLAIN = dict(temperature=1.0)
NUCLEUS = dict(temperature=0.9, top_p=0.85)
TOP_K = dict(temperature=0.8, top_k=6)
BOTH = dict(temperature=1.0, top_k=8, top_p=0.9)
PENALISED = dict(temperature=0.8, repetition_penalty=1.6, min_p=0.05)

DRAFTERS = {
    "none": ("none", {}),
    "ngram": ("ngram", {}),
    "dflash chosen": ("dflash", dict(sample_drafts=False)),
    "dflash sampled": ("dflash", dict(sample_drafts=True, candidates=None)),
    "domino chosen, K=4": ("domino", dict(sample_drafts=False, candidates=4)),
    "domino chosen, all": ("domino", dict(sample_drafts=False, candidates=None)),
    "domino sampled, K=4": ("domino", dict(sample_drafts=True, candidates=4)),
    "domino sampled, all": ("domino", dict(sample_drafts=True, candidates=None)),
    "domino sampled, colder": ("domino", dict(sample_drafts=True, candidates=6, draft_temperature=0.5)),
    "domino subset": ("domino subset", dict(sample_drafts=True, candidates=3)),
    "domino+ngram": ("domino", dict(min_confidence=0.2)),
    "domino chosen, sure": ("domino", dict(sample_drafts=False, candidates=4, min_confidence=0.3)),
    "domino sampled, sure": ("domino", dict(sample_drafts=True, candidates=None, min_confidence=0.15)),
    "domino-tree K=4": ("domino", dict(candidates=4)),
    "domino-tree all, sure": ("domino", dict(candidates=None, min_confidence=0.02)),
    "dflash-tree": ("dflash", {}),
    "domino-best-first K=4": ("domino", dict(candidates=4)),
    "domino-best-first all, sure": ("domino", dict(candidates=None, min_confidence=0.02)),
    "domino-tree+ngram": ("domino", dict(candidates=4, min_confidence=0.02)),
}
CASES = [
    ("none", NUCLEUS, {}),
    ("ngram", PLAIN, {}),
    ("ngram", BOTH, {"num_drafts": 2}),
    ("dflash chosen", NUCLEUS, {"num_drafts": 2}),
    ("dflash sampled", TOP_K, {}),
    ("dflash sampled", BOTH, {"num_drafts": 2}),
    ("domino chosen, K=4", NUCLEUS, {}),
    ("domino chosen, all", TOP_K, {"num_drafts": 2}),
    ("domino chosen, K=4", PENALISED, {"num_drafts": 2}),
    ("domino sampled, K=4", NUCLEUS, {}),
    ("domino sampled, K=4", BOTH, {"num_drafts": 2}),
    ("domino sampled, all", PLAIN, {"num_drafts": 1}),
    ("domino sampled, all", TOP_K, {}),
    ("domino sampled, all", PENALISED, {"num_drafts": 2}),
    ("domino sampled, colder", NUCLEUS, {"num_drafts": 2}),
    ("domino subset", BOTH, {}),
    ("domino+ngram", NUCLEUS, {}),
    ("domino chosen, sure", BOTH, {"num_drafts": 2}),
    ("domino sampled, sure", NUCLEUS, {}),
    ("domino sampled, sure", PLAIN, {"num_drafts": 2}),
    ("domino sampled, K=4", NUCLEUS, {"matching_rule": True}),
    ("domino chosen, K=4", TOP_K, {"matching_rule": True, "num_drafts": 2}),
    ("domino-tree K=4", NUCLEUS, {}),
    ("domino-tree K=4", PENALISED, {"num_drafts": 7}),
    ("domino-tree all, sure", BOTH, {}),
    ("dflash-tree", TOP_K, {"num_drafts": 5}),
    ("dflash-tree", PLAIN, {"num_drafts": 2}),
    ("domino-best-first K=4", PENALISED, {"num_drafts": 7}),
    ("domino-best-first all, sure", BOTH, {}),
    ("domino-tree+ngram", BOTH, {"num_drafts": 7}),
    ("domino-tree+ngram", PENALISED, {"num_drafts": 5}),
]
"""Fewer drafts than tokens let the token after a fully accepted chain fall within the three, as small trees do."""
ALARM = FALSE_ALARM / len(CASES)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small():
    """A target over 12 tokens whose distributions are neither flat nor sharp, and drafts trained to be often right."""
    model = tiny_model(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, initializer_range=0.35, seed=2
    )
    target = as_target(model)
    prompts = [PROMPT] * 16 + random_prompts([5] * 48, vocab=VOCAB)
    sampled = run(target, PlainDecoding(), prompts, 16, settings=SamplingSettings(temperature=1.0))
    sequences = as_sequences(prompts, [g.token_ids for g in sampled])
    options = dict(taps=(0, 1), block_size=4, std=0.2)
    drafts = {
        "domino": tiny_draft(target, **options),
        "dflash": tiny_draft(target, head=False, shift_label=False, **options),
        "domino subset": tiny_draft(target, draft_vocab_ids=torch.tensor([1, 2, 3, 7, 9, 10]), **options),
    }
    for draft in drafts.values():
        fit(target, draft, sequences, 40)
    return model, target, drafts


@torch.inference_mode()
def exact_joint(model, settings: dict, prompt: list[int] = PROMPT) -> torch.Tensor:
    """[12, 12, 12], probability of every text of three tokens after a prompt, by transformers alone."""
    kinds = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    processors = LogitsProcessorList([kind(settings[name]) for name, kind in kinds.items() if name in settings])
    joint = torch.ones(1, dtype=torch.double)
    texts = torch.tensor([prompt])
    for _ in range(TOKENS):
        probs = processors(texts, model(texts).logits[:, -1]).softmax(-1).double()
        joint = (joint[:, None] * probs).flatten()
        following = torch.arange(VOCAB).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(VOCAB, dim=0), following), dim=1)
    return joint.view((VOCAB,) * TOKENS)


def sample_texts(target, drafts, name: str, settings: dict, **decoding):
    """Decode all requests together; returns counts [12, 12, 12] and the generations."""
    method, options = DRAFTERS[name]
    sampling = SamplingSettings(**settings)
    drafter = make_drafter(
        name.split()[0],
        drafts.get(method),
        requests=REQUESTS,
        device=target.device,
        num_drafts=decoding.get("num_drafts", TREE_BUDGET),
        **options,
    )
    prompts = [PROMPT] * REQUESTS
    generations = run(target, drafter, prompts, TOKENS, settings=sampling, **decoding)
    texts = torch.tensor([g.token_ids for g in generations])
    place = (texts * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1)
    return place.bincount(minlength=VOCAB**TOKENS).view((VOCAB,) * TOKENS), generations


def p_value(counts: torch.Tensor, joint: torch.Tensor) -> float:
    """Pearson's chi-square test; a text of probability zero that occurred has p-value 0."""
    counts, expected = counts.flatten().double(), joint.flatten() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    large = expected >= 5
    pooled_counts = torch.cat((counts[large], counts[~large].sum()[None]))
    pooled = torch.cat((expected[large], expected[~large].sum()[None]))
    pooled_counts, pooled = pooled_counts[pooled > 0], pooled[pooled > 0]
    statistic = ((pooled_counts - pooled) ** 2 / pooled).sum()
    freedom = len(pooled) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.double), statistic / 2).item()


@pytest.mark.parametrize("name, settings, decoding", CASES, ids=[f"{n}-{s}-{d}" for n, s, d in CASES])
def test_the_joint_distribution_is_the_targets_own(small, name, settings, decoding):
    model, target, drafts = small
    counts, generations = sample_texts(target, drafts, name, settings, **decoding)
    assert p_value(counts, exact_joint(model, settings)) > ALARM
    if name != "none":
        accepted = torch.tensor([n for g in generations for n in g.acceptance_lengths]).bincount(minlength=4)
        reached = min(3, decoding.get("num_drafts", 3) + 1)
        assert (accepted[1 : reached + 1] > 0.01 * accepted.sum()).all(), "every branch of the rule must be taken"


def test_the_exact_joint_is_a_distribution_with_many_texts(small):
    model, _, _ = small
    for settings in (PLAIN, NUCLEUS, TOP_K, BOTH, PENALISED):
        joint = exact_joint(model, settings)
        assert joint.sum().item() == pytest.approx(1, abs=1e-5)
        assert (joint * REQUESTS >= 5).sum() > 40, "too few texts to compare"


# Power: the same test notices verifiers that are wrong.


def residual_not_subtracted(probs, proposal, streams, positions):
    """Accepts rightly, but draws the token after a rejection from the target instead of the residual."""
    tokens, accepted = accept_chain(probs, proposal, streams, positions)
    row = accepted[:, None, None].expand(-1, 1, probs.shape[-1])
    uniform = streams.uniform(positions.gather(1, accepted[:, None]), streams.RESIDUAL)[:, 0]
    bonus = draw(probs.gather(1, row)[:, 0], uniform)
    return tokens.scatter(1, accepted[:, None], bonus[:, None]), accepted


def first_draft_unchecked(choices, drafts, num_drafts):
    """Keeps a first draft that the target did not choose."""
    tokens, accepted = match_chain(choices, drafts, num_drafts)
    refused = (accepted == 0) & (num_drafts > 0)
    kept = torch.cat((drafts[:, :1], choices[:, 1:2]), dim=1)
    tokens = torch.cat((torch.where(refused[:, None], kept, tokens[:, :2]), tokens[:, 2:]), dim=1)
    return tokens, torch.where(refused, 1, accepted)


def bonus_of_the_last_row(choices, drafts, num_drafts):
    """Takes the choice after the last draft, whatever was refused before it."""
    tokens, accepted = match_chain(choices, drafts, num_drafts)
    return tokens.scatter(1, accepted[:, None], choices[:, -1:]), accepted


def first_candidate_only(probs, proposal, streams, positions):
    """Ignores that the draft was drawn from K tokens: its probability is misreported."""
    flattened = torch.full_like(proposal.draft_probs, 1 / proposal.draft_probs.shape[-1])
    wrong = Proposal(proposal.tokens, proposal.num_drafts, None, proposal.candidate_ids, flattened)
    return accept_chain(probs, wrong, streams, positions)


def detects(small, name: str, settings: dict, num_drafts: int) -> bool:
    model, target, drafts = small
    counts, _ = sample_texts(target, drafts, name, settings, num_drafts=num_drafts)
    return p_value(counts, exact_joint(model, settings)) < ALARM


@pytest.mark.parametrize(
    "name, wrong_rule",
    [
        ("domino sampled, K=4", residual_not_subtracted),
        ("domino sampled, K=4", first_candidate_only),
        ("domino chosen, K=4", first_draft_unchecked),
        ("ngram", first_draft_unchecked),
        ("domino chosen, K=4", bonus_of_the_last_row),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_wrong_verifier_is_detected(small, monkeypatch, name, wrong_rule):
    replaced = "accept_chain" if "sampled" in name else "match_chain"
    monkeypatch.setattr(verify_module, replaced, wrong_rule)
    assert detects(small, name, NUCLEUS, num_drafts=2)


def children_of_the_refused(choices, proposal, ancestors):
    """Asks of every draft whether the target chose it after its parent, and of nobody above it."""
    alone = torch.eye(ancestors.shape[-1], dtype=torch.bool).expand_as(ancestors)
    return walk_tree(choices, proposal, alone)


def bonus_of_a_chain(choices, proposal, ancestors):
    """Reads the bonus from the row that it would have in a chain, which may be a sibling's."""
    tokens, accepted, path = walk_tree(choices, proposal, ancestors)
    row = accepted[:, None]
    return tokens.scatter(1, row, choices.gather(1, row)), accepted, path


def rows_of_a_chain(choices, proposal, ancestors):
    """Walks rightly, but leaves keys and values where the pass wrote them, siblings' among them."""
    tokens, accepted, path = walk_tree(choices, proposal, ancestors)
    return tokens, accepted, torch.arange(path.shape[1]).expand_as(path)


@pytest.mark.parametrize("name", ["domino-tree K=4", "dflash-tree", "domino-best-first K=4"])
@pytest.mark.parametrize("wrong_walk", [children_of_the_refused, bonus_of_a_chain, rows_of_a_chain])
def test_a_wrong_walk_is_detected(small, monkeypatch, name, wrong_walk):
    monkeypatch.setattr(verify_module, "walk_tree", wrong_walk)
    assert detects(small, name, NUCLEUS, num_drafts=7)  # fewer make chains here, on which these walks do no harm
