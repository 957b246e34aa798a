"""Following cached text gives what decoding gives, pass by pass, for every kind of drafter."""

from __future__ import annotations

import pytest
import torch

from domino_spec.decoding.cycle import Proposal
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.dart import DartDrafter
from domino_spec.drafters.eagle3 import Eagle3Drafter
from domino_spec.drafters.lookup import LookupFirst, PlainDecoding, PromptLookup
from domino_spec.settings import UserError
from domino_spec.training.evaluate import follow, simulate, simulated_tau
from tests.tiny import (
    MemoryCache,
    TreeOracle,
    as_sequences,
    conversation,
    fit,
    random_prompts,
    run,
    tiny_draft,
    tiny_single_layer,
    tree_of,
)

TOKENS, HORIZON = 36, 9
LAYERS = (3, 2, 1, 0)
"""Of the cached features: more than the draft reads, and in another order."""

MAKE = {
    "none": lambda draft, target: PlainDecoding(),
    "ngram": lambda draft, target: PromptLookup(max_drafts=6),
    "dflash": lambda draft, target: BlockDrafter(draft, use_head=False),
    "domino": lambda draft, target: BlockDrafter(draft),
    "confident": lambda draft, target: BlockDrafter(draft, min_confidence=0.2),
    "domino-tree": lambda draft, target: tree_of(BlockDrafter(draft), 9),
    "domino+ngram": lambda draft, target: LookupFirst(BlockDrafter(draft)),
    "domino-tree+ngram": lambda draft, target: LookupFirst(tree_of(BlockDrafter(draft), 8)),
    # Random drafts, right now and then because their trees are wide.
    "eagle3": lambda draft, target: Eagle3Drafter(tiny_single_layer(target, "eagle3"), total=21),
    "dart": lambda draft, target: DartDrafter(tiny_single_layer(target, "dart"), None, total=20),
}
DRAFTERS = [*MAKE]


@pytest.fixture(scope="module")
def prompts():
    return [[5, 6, 7, 8] * 3, *random_prompts([9, 1, 14, 5])]


@pytest.fixture(scope="module")
def answers(target, prompts):
    generations = run(target, PlainDecoding(), prompts, TOKENS)
    # Of unequal length, so that requests end one after the other.
    return as_sequences(prompts, [g.token_ids[: TOKENS - 3 * r] for r, g in enumerate(generations)])


@pytest.fixture(scope="module")
def source(target, answers):
    return MemoryCache(target, answers, LAYERS)


@pytest.fixture(scope="module")
def draft(target, answers):
    """Half trained, so that it is right now and then."""
    draft = tiny_draft(target, std=0.1)
    fit(target, draft, answers, steps=25)
    return draft


@pytest.mark.parametrize("method", DRAFTERS)
def test_walking_along_greedy_text_is_decoding_it(target, draft, answers, prompts, source, method):
    simulated = simulate(MAKE[method](draft, target), answers, source, every=None, horizon=HORIZON, batch=3)
    decoded = run(target, MAKE[method](draft, target), prompts, TOKENS)
    seen = set()
    for r, generation in enumerate(decoded):
        lengths = torch.tensor([0, *generation.acceptance_lengths])
        anchors = len(prompts[r]) - 1 + lengths.cumsum(0)[:-1]
        counted = anchors + HORIZON < len(answers[r].tokens)
        assert simulated.anchors[r].tolist() == anchors[counted].tolist()
        assert (simulated.accepted[r] + 1).tolist() == lengths[1:][counted].tolist()
        assert simulated.proposed[r].tolist() == torch.tensor(generation.num_drafts)[counted].tolist()
        seen.update(simulated.accepted[r].tolist())
    least = {"none": 1, "eagle3": 2, "dart": 2}.get(method, 3)
    assert len(seen) >= least, "the draft is never right, or always"


@pytest.mark.parametrize("method", DRAFTERS)
def test_evenly_spaced_anchors_accept_what_decoding_from_there_accepts(target, draft, answers, source, method):
    simulated = simulate(MAKE[method](draft, target), answers, source, every=3, horizon=HORIZON, batch=4)
    for answer, anchors, accepted in zip(answers, simulated.anchors, simulated.accepted, strict=True):
        ((start, end),) = answer.answers
        assert anchors.tolist() == list(range(start - 1, end - HORIZON, 3))
        texts = [answer.tokens[: a + 1].tolist() for a in anchors]
        decoded = [g.acceptance_lengths[0] - 1 for g in run(target, MAKE[method](draft, target), texts, 1)]
        assert accepted.tolist() == decoded


def test_the_pass_of_training_accepts_what_the_drafters_own_code_accepts(target, draft, answers):
    """`simulated_tau` is the fast twin of `simulate` for drafts in training, with the head on and off."""
    source = MemoryCache(target, answers, draft.config.target_layer_ids)
    drafts = draft.config.max_drafts
    fast = simulated_tau(draft, answers, source, anchors_per_sequence=10**6, batch_size=3)
    for use_head, accepted in ((True, fast.accepted), (False, fast.accepted_head_off)):
        slow = simulate(BlockDrafter(draft, use_head=use_head), answers, source, every=1, horizon=drafts)
        assert [len(a) for a in slow.anchors] == fast.sequences.bincount(minlength=len(answers)).tolist()
        assert torch.cat(slow.accepted).tolist() == accepted.tolist()


def test_anchors_are_the_same_whatever_the_method(target, draft, answers, source):
    """Drafters of every depth are paired; long strides are committed bit by bit and end where short ones do."""
    anchors = [simulate(MAKE[m](draft, target), answers, source, every=2).anchors for m in MAKE]
    for other in anchors[1:]:
        assert all(torch.equal(a, b) for a, b in zip(anchors[0], other, strict=True))
    short, long = (
        simulate(MAKE["domino"](draft, target), answers, source, every=n, batch=b) for n, b in ((2, 8), (14, 1))
    )
    for r in range(len(answers)):
        assert torch.equal(short.anchors[r][::7], long.anchors[r])
        assert torch.equal(short.accepted[r][::7], long.accepted[r])


def test_a_proposal_beyond_the_budget_is_not_asked_for(target, draft, answers, source):
    simulated = simulate(MAKE["domino-tree"](draft, target), answers, source, num_drafts=4)
    assert torch.cat(simulated.proposed).tolist() == [4] * len(torch.cat(simulated.anchors))


class Blind(TreeOracle):
    """Knows the continuation by itself, and checks that it is not shown."""

    feature_layers = (2,)

    def read(self, own, tokens, features, counts):
        beyond = torch.arange(features.shape[1]) >= counts[:, None]
        assert beyond.any() and (features[beyond] == 0).all()

    def propose(self, state, own, num_drafts):
        ahead = torch.arange(state.tokens.shape[1]) >= state.lengths[:, None]
        assert (state.tokens[ahead] == 0).all()
        return super().propose(state, own, num_drafts)

    def advance(self, own, verdict):
        beyond = torch.arange(verdict.tokens.shape[1]) > verdict.num_accepted[:, None]
        assert (verdict.tokens[beyond] == 0).all() and (verdict.features[beyond] == 0).all()


def test_what_a_tree_holds_of_the_text_is_accepted_and_nothing_ahead_is_shown(target, answers, source):
    texts = [a.tokens.tolist() for a in answers]
    order = sorted(range(len(texts)), key=lambda r: answers[r].num_answer_tokens)
    oracle = Blind([texts[r] for r in order], max_drafts=8)
    simulated = simulate(oracle, answers, source, every=None, horizon=HORIZON, batch=len(texts))
    assert len(torch.cat(simulated.accepted).unique()) >= 3
    for place, r in enumerate(order):
        count = len(simulated.accepted[r])
        assert simulated.accepted[r].tolist() == oracle.hidden[place][:count]
        assert simulated.proposed[r].tolist() == oracle.proposed[place][:count]


def test_a_chain_is_followed_up_to_its_first_wrong_draft_and_within_its_own_drafts():
    tokens = torch.tensor([[4, 5, 6], [4, 9, 6], [4, 5, 6]])
    text = torch.tensor([[4, 5, 6, 7]]).expand(3, -1)
    assert follow(Proposal(tokens, torch.tensor([3, 3, 1])), text).tolist() == [3, 1, 1]


def test_drafts_past_the_end_of_the_answer_are_rejected():
    tokens, text = torch.tensor([[4, 0, 0]]), torch.tensor([[4, -1, -1, -1]])
    assert follow(Proposal(tokens, torch.tensor([3])), text).tolist() == [1]
    parents = torch.tensor([[-1, 0, 1]])
    assert follow(Proposal(tokens, torch.tensor([3]), parents), text).tolist() == [1]


def test_answers_of_a_conversation_are_measured_apart_and_short_ones_left_out(target, draft):
    turns = [(p, run(target, PlainDecoding(), [p], 20)[0].token_ids) for p in random_prompts([6, 7, 4])]
    turns[1] = (turns[1][0], turns[1][1][: HORIZON - 1])
    whole = conversation("chat", turns)
    short = conversation("short", turns[1:2])
    source = MemoryCache(target, [whole, short], LAYERS)
    simulated = simulate(MAKE["domino"](draft, target), [short, whole], source, every=4, horizon=HORIZON)
    starts = [start for start, end in whole.answers if end - start >= HORIZON]
    assert simulated.anchors[0].tolist() == []
    assert simulated.anchors[1].tolist() == [s - 1 + i for s in starts for i in (0, 4, 8)]


def test_layers_that_the_features_lack_are_named(target, draft, answers):
    with pytest.raises(UserError, match="the features hold layers 2, 3, and the drafter also reads 0: capture"):
        simulate(MAKE["domino"](draft, target), answers, MemoryCache(target, answers, (2, 3)))


def test_drafters_that_sample_choose_here(target, draft, answers, source):
    """Texts are followed as at temperature 0; `simulated_tau` measures what sampled drafts expect."""
    sampling, choosing = (
        simulate(BlockDrafter(draft, samples=samples), answers[:3], source) for samples in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(sampling.accepted, choosing.accepted, strict=True))


@pytest.mark.slow
def test_on_sampled_text_a_chosen_tree_reaches_what_it_reaches_in_decoding(target, prompts):
    """Texts sampled without a draft against texts decoded with it: the mean acceptance differs by chance alone.

    A difference above four standard errors, taken between independent texts, has probability 6e-5.
    """
    requests, tokens = 200, 24
    texts = [prompts[0]] * requests
    sampled = run(target, PlainDecoding(), texts, tokens, settings=SamplingSettings(temperature=1.0, seed=1000))
    answers = as_sequences(texts, [g.token_ids for g in sampled])
    draft = tiny_draft(target, std=0.1)
    fit(target, draft, answers[:40], steps=25)
    source = MemoryCache(target, answers, (0, 3))
    simulated = simulate(MAKE["domino-tree"](draft, target), answers, source, every=None, horizon=HORIZON, batch=100)
    decoded = run(
        target, MAKE["domino-tree"](draft, target), texts, tokens, settings=SamplingSettings(temperature=1.0, seed=5000)
    )

    def tau_and_error(per_text: list[list[int]]) -> tuple[float, float]:
        """Of a ratio of means: sum of lengths over number of passes."""
        sums = torch.tensor([float(sum(p)) for p in per_text])
        counts = torch.tensor([float(len(p)) for p in per_text])
        tau = sums.sum() / counts.sum()
        return tau.item(), ((sums - tau * counts).std() / counts.mean() / len(sums) ** 0.5).item()

    passes = []
    for generation in decoded:
        ends = torch.tensor([0, *generation.acceptance_lengths]).cumsum(0)
        # A pass at `anchor` counts where HORIZON tokens of the text follow it, as in the simulation.
        passes.append([n for n, at in zip(generation.acceptance_lengths, ends, strict=False) if at + HORIZON <= tokens])
    # The draft has seen the first forty texts.
    (ours, error), (theirs, other_error) = (
        tau_and_error([(part + 1).tolist() for part in simulated.accepted[40:]]),
        tau_and_error(passes),
    )
    noise = (error**2 + other_error**2) ** 0.5
    assert theirs - 1 > 12 * noise, "the draft is hardly ever right, and the comparison says little"
    assert abs(ours - theirs) < 4 * noise
