"""`dart`: its one pass and its search against plain re-implementations, its cache, and the text it leaves untouched."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from domino_spec.decoding.cycle import Proposal, start
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.dart import DartDrafter, search_tree
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.ops.native import bindings as cpu
from domino_spec.settings import UserError
from tests.decoding.test_lossless import FALSE_ALARM, NUCLEUS, PENALISED, PLAIN, PROMPT, exact_joint, p_value
from tests.decoding.test_lossless import TOKENS as SAMPLED_TOKENS
from tests.decoding.test_lossless import VOCAB as SMALL_VOCAB
from tests.tiny import (
    VOCAB,
    Beside,
    Oracle,
    TreeOracle,
    as_target,
    assert_close,
    plain_greedy,
    prefill,
    random_prompts,
    run,
    tiny_model,
    tiny_single_layer,
)

A, B, C, D, R, X = range(6)
CONVERSATIONS = [[R, A, C], *[[R, A, D]] * 3, *[[R, B, C]] * 2]
SUBSET = torch.tensor([44, 3, 17, 21, 58, 30, 8, 1, 55, 12])
"""A draft vocabulary, not ascending."""


# The search.


def paths(tokens, parents) -> list[tuple[int, ...]]:
    """What each node spells, from the anchor down."""
    spelt: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        spelt.append((*(spelt[parent] if parent >= 0 else ()), int(token)))
    return spelt


def worked(ngrams: NgramModel | None, budget: int) -> dict[tuple[int, ...], float]:
    """Slots a .6 b .4 and c .7 d .3 behind a prompt that ends in x r."""
    tokens, probs = np.array([[[A, B], [C, D]]]), np.array([[[0.6, 0.4], [0.7, 0.3]]])
    context = np.array([[X, R]]) if ngrams else np.zeros((1, 0), dtype=int)
    tree = search_tree(tokens, probs, ngrams, context, budget, beam=2)
    return dict(zip(paths(tree.tokens[0], tree.parents[0]), tree.scores[0].tolist(), strict=True))


def test_worked_example():
    ngrams = NgramModel.build(CONVERSATIONS, eos=6)
    everything = {(A,): -0.511, (B,): -0.916, (B, C): -1.114, (A, C): -1.135, (A, D): -1.266, (B, D): -8.67}
    scores = worked(ngrams, 6)
    assert scores.keys() == everything.keys()
    assert all(
        scores[path] == pytest.approx(score, abs=5e-3 if path == (B, D) else 6e-4) for path, score in everything.items()
    )
    assert set(worked(ngrams, 4)) == {(A,), (B,), (B, C), (A, C)}
    assert set(worked(ngrams, 3)) == {(A,), (B,), (B, C)}
    without = worked(None, 4)
    assert without[A, C] > without[B, C], "what follows what is the N-gram model's to say"


def reference_tree(tokens, probs, ngrams, context, budget, beam, stop) -> list[tuple[tuple[int, ...], float]]:
    """The published search over lists of prefixes, one prefix and one token at a time."""
    pool: list[tuple[tuple[int, ...], float]] = []
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level, (slot_tokens, slot_probs) in enumerate(zip(tokens, probs, strict=True)):
        scored = []
        for prefix, score in beams:
            for token, p in zip(slot_tokens, slot_probs, strict=True):
                term = 0.9**level * math.log(p + 1e-10)
                if level > 0 and ngrams is not None:
                    seen = ([t for t in context if t >= 0] + list(prefix))[-(ngrams.order - 1) :]
                    g = ngrams.probabilities(np.array(seen), np.array([token]))[0]
                    term += 0.5 * math.log(g + 1e-10)
                scored.append(((*prefix, int(token)), score + min(0.0, term) * (level + 1) ** -0.7))
        pool += scored
        beams = sorted(scored, key=lambda entry: (entry[0][-1] in stop, -entry[1]))[:beam]
    best = sorted(range(len(pool)), key=lambda i: (-pool[i][1], i))[:budget]
    return [pool[i] for i in sorted(best)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("guided", [True, False], ids=["ngrams", "alone"])
def test_the_search_equals_a_plain_one(guided, seed):
    random_ = random.Random(seed)
    numbers = np.random.default_rng(seed)
    order, vocab = random_.choice([2, 3, 5]), 8
    slots, top, beam = random_.choice([1, 3, 5]), random_.choice([1, 2, 5]), random_.choice([1, 3, 20])
    texts = [[random_.randrange(vocab) for _ in range(random_.randint(1, 12))] for _ in range(20)]
    ngrams = NgramModel.build(texts, order, vocab_size=vocab) if guided else None
    tokens = np.stack([[numbers.permutation(vocab)[:top] for _ in range(slots)] for _ in range(3)])
    probs = np.sort(numbers.dirichlet(np.full(top, 0.5), (3, slots)))[..., ::-1]
    context = numbers.integers(-1, vocab, (3, order - 1 if guided else 0))
    context.sort(axis=1)  # those that are missing come first
    stop = (2, 5)
    for budget in (1, 4, 25, 1000):
        tree = search_tree(tokens, probs, ngrams, context, budget, beam, stop)
        for r in range(3):
            expected = reference_tree(tokens[r], probs[r], ngrams, context[r].tolist(), budget, beam, stop)
            assert paths(tree.tokens[r], tree.parents[r]) == [path for path, _ in expected]
            np.testing.assert_allclose(tree.scores[r], [score for _, score in expected], rtol=1e-9)


def test_prefixes_that_end_the_answer_are_extended_last():
    tokens, probs = np.array([[[A, B, C], [D, R, X]]]), np.array([[[0.8, 0.1, 0.1], [0.4, 0.3, 0.3]]])
    context = np.zeros((1, 0), dtype=int)

    def extended(beam, stop):
        tree = search_tree(tokens, probs, None, context, 99, beam, stop)
        return {path[0] for path in paths(tree.tokens[0], tree.parents[0]) if len(path) == 2}

    assert extended(2, ()) == {A, B}
    assert extended(2, (A,)) == {B, C}
    assert extended(3, (A,)) == {A, B, C}, "they are moved back, not taken out"


@pytest.mark.parametrize("budget", [1, 7, 40, 99])
def test_a_kept_set_is_a_tree_where_children_are_as_good_as_their_parents(budget):
    """A sure and an impossible token a slot: the sure ones add 0 (or, with the floor, a little more) and are equal."""
    tokens, probs = np.arange(200).reshape(1, 100, 2), np.array([[[1.0, 0.0]] * 100])
    tree = search_tree(tokens, probs, None, np.zeros((1, 0), dtype=int), budget, beam=2)
    assert tree.parents[0].tolist() == list(range(-1, budget - 1))
    assert tree.tokens[0].tolist() == list(range(0, 2 * budget, 2))


# The pass.


@torch.inference_mode()
def plain_logits(draft, features: torch.Tensor, text: list[int], num_masks: int) -> torch.Tensor:
    """The published forward, from scratch and without a cache: [num_masks + 1, logits].

    Args:
        draft: for its weights.
        features: [len(text) - 1, 3 * H] of the target at all positions but the last.
        text: tokens.
        num_masks: the published `draft_length`.
    """
    config, w = draft.config, dict(draft.named_parameters())

    def norm(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    feature = features @ w["fc.weight"].T
    embedding = draft.ends.embedding.weight[torch.tensor(text[1:])]
    mask_rep = w["mask_rep"]
    x = torch.cat(
        (
            norm(embedding, w["midlayer.input_layernorm.weight"]),
            norm(feature, w["midlayer.hidden_norm.weight"]),
        ),
        dim=-1,
    )
    x = torch.cat((x, mask_rep.repeat(num_masks, 1)))
    residual = torch.cat((feature, mask_rep[: config.hidden_size].repeat(num_masks, 1)))
    length, size = len(x), config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(length)[:, None] * frequency

    def heads(weight, count, rotated):
        out = (x @ weight.T).view(length, count, size).transpose(0, 1)
        if rotated:
            left, right = out[..., : size // 2], out[..., size // 2 :]
            out = torch.cat(
                (left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), dim=-1
            )
        return out.repeat_interleave(config.num_attention_heads // count, dim=0)

    query = heads(w["midlayer.self_attn.q_proj.weight"], config.num_attention_heads, True)
    key = heads(w["midlayer.self_attn.k_proj.weight"], config.num_key_value_heads, True)
    value = heads(w["midlayer.self_attn.v_proj.weight"], config.num_key_value_heads, False)
    scores = query @ key.transpose(1, 2) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
    out = residual + mixed @ w["midlayer.self_attn.o_proj.weight"].T
    inner = norm(out, w["midlayer.post_attention_layernorm.weight"])
    gate = torch.nn.functional.silu(inner @ w["midlayer.mlp.gate_proj.weight"].T)
    out = out + (gate * (inner @ w["midlayer.mlp.up_proj.weight"].T)) @ w["midlayer.mlp.down_proj.weight"].T
    out = norm(norm(out, w["norm.weight"]), w["norm.weight"])[-(num_masks + 1) :]
    return out @ w["lm_head.weight"].T


class Watched(Beside):
    """Records the slots' logits too."""

    def __init__(self, drafter: DartDrafter, oracle: Oracle | TreeOracle) -> None:
        super().__init__(drafter, oracle)
        self.slots: list[torch.Tensor] = []

    def propose(self, state, own, num_drafts):
        verified = super().propose(state, own, num_drafts)
        # A second time: what the first pass left behind the committed pairs must not matter.
        self.slots.append(self.drafter.slots(own, self.drafter.draft.config.num_masks))
        return verified


@torch.inference_mode()
def target_features(target, text: list[int], layers) -> torch.Tensor:
    tokens, length = torch.tensor([text[:-1]]), torch.tensor([len(text) - 1])
    return target.prefill(tokens, length, target.new_cache(1, len(text)), layers)[0]


@pytest.mark.parametrize("oracle", [Oracle, TreeOracle])
@pytest.mark.parametrize("lengths", [[7, 3, 1, 2], [6]], ids=["several", "alone"])
def test_slots_of_every_cycle_equal_the_published_forward(model, target, lengths, oracle):
    """Pairs grown cycle by cycle, by another number for each request, give what all of the text gives at once."""
    draft = tiny_single_layer(target, "dart", block_size=5)
    drafter = DartDrafter(draft, None, total=9, top=4, beam=3)
    prompts, count = random_prompts(lengths), 20
    texts = [p + plain_greedy(model, p, count + 12) for p in prompts]
    watched = Watched(drafter, oracle(texts, 6))
    run(target, watched, prompts, count)
    compared = 0
    for (committed, _), slots in zip(watched.proposals, watched.slots, strict=True):
        for r, text in enumerate(committed):
            if len(text) > 1:  # one token has no feature
                assert_close(
                    slots[r], plain_logits(draft, target_features(target, text, draft.feature_layers), text, 4)
                )
                compared += 1
    assert compared >= 4 * len(prompts)


@torch.inference_mode()
def fresh_proposal(target, drafter, text: list[int], num_drafts: int | None = None) -> Proposal:
    """What is proposed after `text` where all of it is the prompt."""
    state = prefill(target, [text], drafter, 1)
    return drafter.propose(state, start(drafter, state), drafter.max_drafts if num_drafts is None else num_drafts)


def drafts(proposal: Proposal, r: int = 0) -> list[tuple[int, int]]:
    """Request r's own drafts as (parent, token)."""
    if proposal.parents is None:
        assert proposal.tokens.shape[1] == 0
        return []
    count = proposal.num_drafts[r]
    return list(zip(proposal.parents[r, :count].tolist(), proposal.tokens[r, :count].tolist(), strict=True))


@pytest.mark.parametrize("subset", [None, SUBSET], ids=["all tokens", "draft vocabulary"])
def test_trees_of_every_cycle_equal_a_plain_search_over_the_published_forward(model, target, subset):
    draft = tiny_single_layer(target, "dart", block_size=4, draft_vocab_ids=subset)
    prompts, count = random_prompts([7, 3, 1]), 12
    texts = [p + plain_greedy(model, p, count + 12) for p in prompts]
    ngrams = NgramModel.build(texts, vocab_size=VOCAB)
    drafter = DartDrafter(draft, ngrams, total=14, top=6, beam=4, stop_token_ids=[58])
    watched = Watched(drafter, TreeOracle(texts, 8))
    run(target, watched, prompts, count)
    compared = 0
    for committed, proposal in watched.proposals:
        for r, text in enumerate(committed):
            if len(text) == 1:
                assert drafts(proposal, r) == []
                continue
            best = plain_logits(draft, target_features(target, text, draft.feature_layers), text, 3).topk(6)
            ids = best.indices if subset is None else subset[best.indices]
            expected = reference_tree(ids.tolist(), best.values.softmax(-1).tolist(), ngrams, text, 14, 4, {58})
            found = paths(*zip(*[(t, p) for p, t in drafts(proposal, r)], strict=True))
            assert set(found) == {path for path, _ in expected}
            assert drafts(proposal, r) == drafts(fresh_proposal(target, drafter, text))
            compared += 1
    assert compared >= 8


def test_a_tree_is_as_large_as_asked_for(target):
    """Fewer drafts need fewer masks, and are the best of the larger tree all the same."""
    drafter = DartDrafter(tiny_single_layer(target, "dart", block_size=6), None)
    (text,) = random_prompts([6])
    assert drafter.max_drafts == 60
    trees = {n: drafts(fresh_proposal(target, drafter, text, n)) for n in (0, 1, 2, 5, 30, 60)}
    assert [len(tree) for tree in trees.values()] == [0, 1, 2, 5, 30, 60]
    spelt = [set(paths(*zip(*[(t, p) for p, t in tree], strict=True))) for tree in trees.values() if tree]
    assert all(fewer < more for fewer, more in pairwise(spelt))
    assert max(map(len, spelt[-1])) > 2, "the tree has no depth"


def test_the_most_drafts_are_what_the_search_can_score(target):
    draft = tiny_single_layer(target, "dart", block_size=3)
    (text,) = random_prompts([5])
    for top, beam, most in ((1, 1, 3), (2, 1, 2 + 2 + 2), (3, 2, 3 + 6 + 6), (2, 20, 2 + 4 + 8)):
        drafter = DartDrafter(draft, None, top=top, beam=beam)
        assert drafter.max_drafts == len(drafts(fresh_proposal(target, drafter, text))) == most


def test_top_and_beam_of_one_draft_the_slots_chain(target):
    draft = tiny_single_layer(target, "dart", block_size=5)
    (text,) = random_prompts([8])
    drafter = DartDrafter(draft, None, top=1, beam=1)
    best = plain_logits(draft, target_features(target, text, draft.feature_layers), text, 4).argmax(-1)
    assert drafts(fresh_proposal(target, drafter, text)) == list(enumerate(best.tolist(), start=-1))


def test_a_longer_context_is_shown_unless_only_the_round_is_meant(model, target):
    """Order 5 sees four tokens; the released code, after its first cycle, no more than that cycle gave."""
    draft = tiny_single_layer(target, "dart", block_size=3)
    prompts = random_prompts([9])
    texts = [prompts[0] + plain_greedy(model, prompts[0], 20)]

    class Contexts(NgramModel):
        def probabilities(self, contexts, children):
            seen.append(contexts[0, 0].tolist())
            return super().probabilities(contexts, children)

    built = NgramModel.build(texts, order=5, vocab_size=VOCAB)
    ngrams = Contexts(built.about, built.keys, built.counts)
    for round_context in (False, True):
        seen: list[list[int]] = []
        drafter = DartDrafter(draft, ngrams, round_context=round_context, top=4, total=8)
        # The oracle accepts 0, then 1, then 2 of its drafts.
        watched = Watched(drafter, Oracle(texts, 4))
        run(target, watched, prompts, 8)
        first_levels = seen[::2]  # two levels a cycle have counts: S - 1
        lengths = [len(committed[0]) for committed, _ in watched.proposals]
        assert len(first_levels) == len(lengths) >= 3
        for cycle, (context, length) in enumerate(zip(first_levels, lengths, strict=True)):
            since = lengths[cycle - 1] - 1 if round_context and cycle else 0
            known = texts[0][max(since, length - 3) : length]
            assert context[:-1] == [-1] * (3 - len(known)) + known


@pytest.mark.parametrize("round_context", [False, True])
def test_order_three_needs_no_more_than_the_round(model, target, round_context):
    draft = tiny_single_layer(target, "dart", block_size=4)
    prompts = random_prompts([9, 4])
    texts = [p + plain_greedy(model, p, 24) for p in prompts]
    ngrams = NgramModel.build(texts, vocab_size=VOCAB)
    proposals = []
    for choice in (False, round_context):
        watched = Watched(DartDrafter(draft, ngrams, round_context=choice), TreeOracle(texts, 6))
        run(target, watched, prompts, 12)
        proposals.append([drafts(p, r) for committed, p in watched.proposals for r in range(len(committed))])
    assert proposals[0] == proposals[1]


def test_another_methods_draft_and_sizes_out_of_range_are_refused(target):
    with pytest.raises(UserError, match="needs a DART draft; this one is made for eagle3"):
        DartDrafter(tiny_single_layer(target, "eagle3"), None)
    draft = tiny_single_layer(target, "dart")
    for sizes in (dict(total=0), dict(top=0), dict(beam=0)):
        with pytest.raises(ValueError, match="at least 1"):
            DartDrafter(draft, None, **sizes)


@pytest.mark.parametrize("lengths", [[7, 3, 1], [5, 5]], ids=["unequal", "equal"])
def test_a_packed_draft_proposes_the_same(target, lengths):
    plain, packed = (tiny_single_layer(target, "dart", block_size=5) for _ in range(2))
    packed.pack()
    if not cpu.is_available(packed.device, packed.dtype):
        pytest.skip("needs a C compiler")
    prompts = random_prompts(lengths)
    seen = []
    for draft in (plain, packed):
        drafter = DartDrafter(draft, None)
        texts = [g.prompt_ids + g.token_ids for g in run(target, drafter, prompts, 20)]
        watched = Watched(drafter, Oracle(texts, 4))
        run(target, watched, prompts, 8)
        seen.append(zip(watched.proposals, watched.slots, strict=True))
    for ((ours, _), slots), ((theirs, _), packed_slots) in zip(*seen, strict=True):
        assert ours == theirs
        ready = torch.tensor([len(text) > 1 for text in ours])
        assert_close(packed_slots[ready], slots[ready])


# The text.


@pytest.mark.parametrize("kind", ["llama", "qwen2-mixed"])
@pytest.mark.parametrize("num_drafts", [None, 5])
def test_greedy_output_equals_plain_decoding(kind, num_drafts):
    """Draft and counts know half of the answer: trees of every kind of acceptance, requests of unequal length."""
    model = tiny_model(kind)
    target = as_target(model)
    prompts, count = random_prompts([9, 1, 4, 17]), 24
    expected = [plain_greedy(model, p, count) for p in prompts]
    ngrams = NgramModel.build(expected, vocab_size=VOCAB)
    drafter = DartDrafter(tiny_single_layer(target, "dart", block_size=5), ngrams)
    generations = run(target, drafter, prompts, count, num_drafts=num_drafts)
    assert [g.token_ids for g in generations] == expected
    accepted = [n for g in generations for n in g.acceptance_lengths]
    assert {1, 2} <= set(accepted)
    assert generations[1].num_drafts[0] == 0 and min(generations[0].num_drafts) > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN, NUCLEUS, PENALISED], ids=["plain", "nucleus", "penalised"])
@pytest.mark.parametrize("total", [2, 12])
def test_the_joint_distribution_is_the_targets_own(settings, total):
    """As tests/decoding/test_lossless.py, whose statistic this is: six cases share its probability of a false alarm."""
    model = tiny_model(
        vocab_size=SMALL_VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        initializer_range=0.35,
        seed=2,
    )
    target, requests = as_target(model), 4000
    sampling = SamplingSettings(**settings)
    texts = [PROMPT + plain_greedy(model, PROMPT, 5)]
    draft = tiny_single_layer(target, "dart", taps=(0, 0, 1), block_size=3)
    drafter = DartDrafter(draft, NgramModel.build(texts, vocab_size=SMALL_VOCAB), total=total, top=4, beam=3)
    generations = run(target, drafter, [PROMPT] * requests, SAMPLED_TOKENS, settings=sampling)
    place = torch.tensor([g.token_ids for g in generations]) @ torch.tensor([SMALL_VOCAB**2, SMALL_VOCAB, 1])
    counts = place.bincount(minlength=SMALL_VOCAB**SAMPLED_TOKENS)
    assert p_value(counts, exact_joint(model, settings)) > FALSE_ALARM / 6
    accepted = torch.tensor([n for g in generations for n in g.acceptance_lengths]).bincount(minlength=3)
    assert (accepted[1:3] > 0.01 * accepted.sum()).all(), "every branch of the rule must be taken"
