"""FR-Spec: a draft vocabulary of frequent tokens, put on drafts that were trained without one."""

from __future__ import annotations

import json

import pytest
import torch

from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft.checkpoint import read_draft, save_draft
from domino_spec.draft.config import SingleLayerConfig
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.draft.vocabulary import FrequentTokens, count_for, count_tokens, rank_tokens, restrict, restricted
from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.recipe import DataRecipe, DraftRecipe, OptimizationRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.training.counts import write_vocabulary
from tests.decoding.test_lossless import FALSE_ALARM, PROMPT, TOKENS, exact_joint, p_value
from tests.decoding.test_lossless import VOCAB as FEW
from tests.tiny import (
    EOS,
    VOCAB,
    as_sequences,
    as_target,
    assert_close,
    byte_tokenizer,
    fit,
    plain_greedy,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
    tiny_target,
    word_tokenizer,
)

SUBSET = [41, 3, 17, 8, 29, 50, 11, 36, 22, 5]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def target(model):
    return as_target(model)


def single_layer_draft(target, draft_vocab_ids=None) -> SingleLayerDraft:
    config = SingleLayerConfig(
        kind="eagle3",
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        target_layer_ids=(0, 1, 3),
        num_target_layers=target.num_layers,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
    )
    torch.manual_seed(5)
    return SingleLayerDraft(config, draft_vocab_ids).requires_grad_(False).eval().bind(target)


# Ranking.


def test_the_worked_example():
    counts = {2: 9, 0: 5, 3: 4, 1: 1}
    ranked = rank_tokens(counts, always=[4], size=3)
    assert ranked == [2, 0, 4]
    ascending = sorted(ranked)
    assert ascending == [0, 2, 4]
    assert [token - place for place, token in enumerate(ascending)] == [0, 1, 2], "EAGLE-3's offsets d2t"
    assert ascending.index(ranked[0]) == 1


def test_required_tokens_stand_once_and_in_their_own_place():
    texts = [[7] * 4 + [1] * 4, [9] * 3 + [2]]
    counts = count_tokens(texts)
    assert counts == count_tokens(torch.tensor(text) for text in texts)
    assert rank_tokens(counts) == [1, 7, 9, 2], "the lower id first where two are equally frequent"
    assert rank_tokens(counts, [9]) == [1, 7, 9, 2], "a frequent one is not appended again"
    assert rank_tokens(counts, [9], 2) == [1, 9] and rank_tokens(counts, [9, 0], 2) == [9, 0]
    assert rank_tokens(counts, [0, 0], 3) == [1, 7, 0] and rank_tokens(counts, [5], 99) == [1, 7, 9, 2, 5]
    with pytest.raises(UserError, match="2 tokens is too small for the 3 stop tokens"):
        rank_tokens(counts, [4, 5, 6], 2)
    with pytest.raises(UserError, match="at least 1 token, got 0"):
        rank_tokens(counts, size=0)


def test_a_ranking_comes_back_from_its_file(tmp_path, model):
    target = as_target(model, word_tokenizer())
    ranking = count_for(target, [[3, 3, 3, 8, 8], [3, EOS, 11]], "two answers", size=3)
    assert ranking.token_ids == (3, 8, EOS) and ranking.counts == (4, 2, 1) and ranking.always == (EOS,)
    assert ranking.first(2) == [3, EOS], "the stop token stays in, whatever the size"
    assert ranking.coverage() == 1.0 and ranking.coverage(2) == pytest.approx(5 / 7)
    ranking.save(tmp_path / "ranking.json")
    assert FrequentTokens.load(tmp_path / "ranking.json") == ranking
    with pytest.raises(UserError, match="holds 3 tokens, fewer than the 4 asked for"):
        ranking.first(4)


def test_a_recipes_held_out_answers_are_not_counted(tmp_path, model):
    model.save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    rows = [{"id": f"c{i}", "prompt_ids": [50, 51], "response_ids": [i, i, 40]} for i in range(6)]
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataRecipe(responses=str(responses), held_out=2)
    recipe = Recipe(str(tmp_path / "target"), DraftRecipe(), data, OptimizationRecipe(steps=1))
    ranking = write_vocabulary(recipe, tmp_path / "ranking.json", size=4, device="cpu")
    assert FrequentTokens.load(tmp_path / "ranking.json") == ranking
    assert ranking.token_ids[0] == 40 and ranking.counts == (4, 2, 2, 0), "two of six answers are held out"
    assert not {50, 51} & set(ranking.token_ids), "prompts are not counted"
    assert ranking.token_ids[-1] == EOS and "responses.jsonl" in ranking.source


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_ids": [3, 3, EOS]}, "a token occurs twice"),
        ({"token_ids": [3, 8, VOCAB]}, "a token lies outside 0 to 59"),
        ({"token_ids": []}, "it holds no tokens"),
        ({"token_ids": ["w3"]}, r"token_ids\[0\]: expected integer, found 'w3'"),
        ({"counts": [4, 2]}, "differ in length"),
        ({"counts": [4, 2, -1]}, "a count is negative"),
        ({"always": [11]}, "a token of always is not in token_ids"),
        ({"kind": "eagle"}, "unknown key 'kind'"),
        (None, "expected mapping"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, model, changes, complaint):
    path = tmp_path / "ranking.json"
    count_for(as_target(model, word_tokenizer()), [[3, 3, 3, 8, 8, EOS]], "text").save(path)
    path.write_text(json.dumps([1] if changes is None else json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=complaint) as error:
        FrequentTokens.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        FrequentTokens.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"token_ids": [1, 2')
    with pytest.raises(UserError, match="not valid JSON"):
        FrequentTokens.load(tmp_path / "half.json")


def test_a_ranking_belongs_to_a_tokenizer(model):
    words = as_target(model, word_tokenizer())
    ranking = count_for(words, [[3, 3, 8]], "text")
    ranking.check(as_target(tiny_model(seed=9), word_tokenizer()))
    other = word_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(UserError, match=r"counted with tokenizer .* that of tiny is"):
        ranking.check(as_target(model, other))
    with pytest.raises(UserError, match="counted for a vocabulary of 60, that of tiny has 70"):
        ranking.check(as_target(tiny_model(vocab_size=70), byte_tokenizer()))


# A restricted draft.


@pytest.mark.parametrize("own", [None, torch.arange(0, VOCAB, 2)], ids=["whole", "half"])
@pytest.mark.parametrize("pack", [False, True])
def test_logits_are_those_of_the_same_tokens_before(model, own, pack):
    target = as_target(model)
    draft = tiny_draft(target, draft_vocab_ids=own)
    hidden, state = torch.randn(3, target.hidden_size), torch.randn(3, 12)
    before = draft.base_logits(hidden), draft.head.correction(hidden, state)
    if pack:
        draft.pack()
    fewer = restrict(draft, SUBSET, target)
    wanted = [t for t in sorted(SUBSET) if own is None or t % 2 == 0]
    assert fewer.draft_vocab_ids.tolist() == wanted and fewer.config.draft_vocab_size == len(wanted)
    for after, all_of_them in zip(
        (fewer.base_logits(hidden), fewer.head.correction(hidden, state)), before, strict=True
    ):
        assert_close(after, all_of_them[:, draft.to_choices(torch.tensor(wanted))])
    assert fewer.packed == pack
    assert draft.config.logits_size == (VOCAB if own is None else 30), "the draft itself is left as it is"
    assert draft.head.correction(hidden, state).shape == before[1].shape


@pytest.mark.parametrize("own", [None, torch.arange(0, VOCAB, 2)], ids=["whole", "half"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_one_layer_drafts_own_lm_head_is_cut(target, own, pack):
    draft = single_layer_draft(target, own)
    hidden = torch.randn(3, target.hidden_size)
    before = draft.base_logits(hidden)
    if pack:
        draft.pack()
    fewer = restrict(draft, SUBSET, target)
    wanted = [t for t in sorted(SUBSET) if own is None or t % 2 == 0]
    assert fewer.draft_vocab_ids.tolist() == wanted and fewer.config.draft_vocab_size == len(wanted)
    assert_close(fewer.base_logits(hidden), before[:, draft.to_choices(torch.tensor(wanted))])
    assert fewer.to_token_ids(fewer.base_logits(hidden).argmax(-1)).tolist() == [
        wanted[i] for i in before[:, draft.to_choices(torch.tensor(wanted))].argmax(-1)
    ]
    assert fewer.ends.lm_head.shape[0] == len(wanted) and draft.base_logits(hidden).shape == before.shape


@pytest.mark.parametrize("use_head", [False, True])
def test_proposals_are_the_best_of_the_subset(target, use_head):
    """Token by token by the unrestricted draft's own head, with the tokens outside the subset struck out."""
    draft = tiny_draft(target)
    fewer = restrict(draft, SUBSET, target)
    seen: list[int] = []

    class Checking(BlockDrafter):
        def propose(self, state, own, num_drafts):
            proposal = super().propose(state, own, num_drafts)
            hidden = self.slots(state, own, num_drafts)
            outside = torch.ones(VOCAB, dtype=torch.bool)
            outside[SUBSET] = False
            gru = draft.head.step(draft.embed(state.anchors), draft.head.initial_state(len(hidden), like=hidden))
            for i in range(proposal.tokens.shape[1]):
                logits = draft.base_logits(hidden[:, i])
                if use_head and i >= draft.head.config.pure_draft_prefix_len:
                    logits = logits + draft.head.correction(hidden[:, i], gru)
                best = logits.masked_fill(outside, float("-inf")).argmax(-1)
                assert proposal.tokens[:, i].tolist() == best.tolist()
                gru = draft.head.step(draft.embed(best), gru)
                seen.extend(best.tolist())
            return proposal

    prompts = random_prompts([9, 5, 12])
    run(target, Checking(fewer, use_head=use_head, candidates=None), prompts, 12)
    assert len(set(seen)) > 4


@pytest.mark.parametrize("candidates", [None, 4])
def test_greedy_text_is_unchanged(model, target, candidates):
    prompts = random_prompts([9, 5, 12])
    fewer = restrict(tiny_draft(target), SUBSET, target)
    found = run(target, BlockDrafter(fewer, candidates=candidates), prompts, 24)
    assert [g.token_ids for g in found] == [plain_greedy(model, prompt, 24) for prompt in prompts]


def test_the_whole_vocabulary_changes_nothing(target):
    draft, half = tiny_draft(target), tiny_draft(target, draft_vocab_ids=torch.arange(0, VOCAB, 2))
    assert restrict(draft, range(VOCAB), target) is draft
    assert restrict(half, range(VOCAB), target) is half


def test_a_packed_draft_drafts_what_the_plain_one_does(model):
    prompts = random_prompts([9, 5])
    lengths = []
    for pack in (False, True):
        target = as_target(model)
        draft = tiny_draft(target)
        fewer = restrict(draft.pack() if pack else draft, SUBSET, target)
        lengths.append([g.acceptance_lengths for g in run(target, BlockDrafter(fewer, candidates=4), prompts, 16)])
    assert lengths[0] == lengths[1]


def test_a_restricted_draft_can_be_saved(target, tmp_path):
    save_draft(tiny_draft(target), tmp_path / "whole")
    fewer = restrict(read_draft(tmp_path / "whole").bind(target), SUBSET, target)
    save_draft(fewer, tmp_path / "fewer")
    read = read_draft(tmp_path / "fewer").bind(target)
    assert read.draft_vocab_ids.tolist() == sorted(SUBSET)
    prompts = random_prompts([7])
    texts = [run(target, BlockDrafter(d), prompts, 8)[0].acceptance_lengths for d in (fewer, read)]
    assert texts[0] == texts[1]


def test_what_cannot_be_restricted_is_one_line(target, tmp_path):
    draft = tiny_draft(target, draft_vocab_ids=torch.tensor([1, 2, 3]))
    with pytest.raises(UserError, match="can propose none of the tokens"):
        restrict(draft, [5, 6], target)
    with pytest.raises(UserError, match="can propose none of the tokens"):
        restrict(draft, [], target)
    for ids in ([2, VOCAB], [-1, 2]):
        with pytest.raises(UserError, match="outside the vocabulary of 60"):
            restrict(draft, ids, target)
    ranking = count_for(target, [[3, 3, 1, 40]], "text")
    ranking.save(tmp_path / "ranking.json")
    assert restricted(draft, ranking, None, target).draft_vocab_ids.tolist() == [1, 3]
    assert restricted(draft, tmp_path / "ranking.json", 1, target).draft_vocab_ids.tolist() == [3]
    with pytest.raises(UserError, match="counted for a vocabulary of 60"):
        restricted(draft, ranking, None, tiny_target(vocab_size=70))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["chosen", "sampled"])
def test_the_sampled_distribution_is_the_targets_own(temperature):
    """Tokens outside the draft vocabulary, which can come from the target alone, included."""
    from domino_spec.drafters.methods import make_drafter

    model = tiny_model(
        vocab_size=FEW, hidden_size=16, intermediate_size=24, num_hidden_layers=2, initializer_range=0.35, seed=2
    )
    target = as_target(model)
    prompts = [PROMPT] * 16 + random_prompts([5] * 48, vocab=FEW)
    sampled = run(target, PlainDecoding(), prompts, 16, settings=SamplingSettings(temperature=1.0))
    draft = tiny_draft(target, taps=(0, 1), block_size=4, std=0.2)
    fit(target, draft, as_sequences(prompts, [g.token_ids for g in sampled]), 40)
    fewer = restrict(draft, [9, 1, 3, 7, 2], target)
    settings, requests = SamplingSettings(temperature=1.0), 4000
    drafter = make_drafter(
        "domino",
        fewer,
        requests=requests,
        device=target.device,
        sample_drafts=temperature > 0,
        candidates=3,
    )
    found = run(target, drafter, [PROMPT] * requests, TOKENS, settings=settings)
    place = (torch.tensor([g.token_ids for g in found]) * torch.tensor([FEW**2, FEW, 1])).sum(-1)
    counts = place.bincount(minlength=FEW**TOKENS).view((FEW,) * TOKENS)
    assert p_value(counts, exact_joint(model, {"temperature": 1.0})) > FALSE_ALARM / 2
    assert counts[:, :, [0, 4, 5, 6, 8, 10, 11]].sum() > 0.05 * requests
    assert max(n for g in found for n in g.acceptance_lengths) > 1
