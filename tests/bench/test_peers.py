"""The outside baseline's clock, and what it says of passes that bring one token or several."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from domino_spec.bench import peers as peers_module
from domino_spec.bench.methods import Contender, Drafting, contenders, runner
from domino_spec.bench.peers import (
    ASSISTED,
    DFLASH,
    LOOKUP,
    PEERS,
    Peers,
    TokenClock,
    assisted_by,
    check_dflash,
    dflash_assistant,
    dflash_head,
    exits_early,
    load_assistant,
    load_peers,
    peer_drafts,
    transformers_generate,
)
from domino_spec.draft.checkpoint import save_draft
from domino_spec.drafters.block import BlockDrafter
from domino_spec.settings import UserError
from tests.decoding.test_lossless import FALSE_ALARM, p_value
from tests.tiny import (
    ARCHITECTURES,
    EOS,
    VOCAB,
    as_sequences,
    as_target,
    byte_tokenizer,
    fit,
    plain_greedy,
    random_prompts,
    run,
    tiny_draft,
    tiny_model,
    tiny_single_layer,
    word_tokenizer,
)


def test_the_clock_counts_passes_and_their_tokens():
    clock = TokenClock()
    clock.put(torch.tensor([[5, 6, 7, 8]]))
    assert clock.seconds == [] and clock.tokens == [], "the prompt is no pass"
    for tokens in ([1], [[2, 3, 4]], [[5]]):
        clock.put(torch.tensor(tokens))
    clock.end()
    assert clock.tokens == [1, 3, 1] and len(clock.seconds) == 3 and clock.seconds == sorted(clock.seconds)


def test_plain_decoding_takes_a_pass_a_token():
    model = tiny_model()
    (prompt,) = random_prompts([9])
    found = transformers_generate(model, [EOS], prompt, 0.0, 0, 7)
    assert found.token_ids == plain_greedy(model, prompt, 7) and found.finish_reason == "length"
    assert found.acceptance_lengths == [1] * 6 and found.num_drafts == [0] * 6 and not any(found.accepted)


@pytest.mark.parametrize("place", [0, 3])
def test_it_ends_at_a_stop_token(place):
    model = tiny_model()
    (prompt,) = random_prompts([9])
    text = plain_greedy(model, prompt, 7)
    stop = text[place]
    found = transformers_generate(model, {stop}, prompt, 0.0, 0, 7)
    assert found.token_ids == text[: text.index(stop) + 1] and found.finish_reason == "stop"


# transformers' own speculative decoding: same text, and passes counted as they happened.


pytestmark = pytest.mark.slow

try:
    peers_module._dflash_classes()
    HAS_DFLASH = True
except UserError:
    HAS_DFLASH = False
needs_dflash = pytest.mark.skipif(not HAS_DFLASH, reason="this transformers has no DFlash")
SHAPES = {
    "plain": dict(head=False, shift_label=False),
    "shifted": dict(head=False, shift_label=True),
    "subset": dict(head=False, shift_label=False, draft_vocab_ids=torch.arange(1, VOCAB, 3)),
    "shifted subset, Domino": dict(shift_label=True, draft_vocab_ids=torch.arange(1, VOCAB, 3)),
}
PROMPTS = [*random_prompts([12, 7], seed=6), [3, 4, 5, 6, 3, 4, 5, 6, 3, 4]]
COUNT = 20


def learnt_draft(model, target, **shape):
    """A draft that is often right, so that passes accept several tokens."""
    draft = tiny_draft(target, block_size=6, taps=(0, 2), **shape)
    sequences = as_sequences(PROMPTS, [plain_greedy(model, prompt, COUNT + 8) for prompt in PROMPTS])
    fit(target, draft, sequences, 40)
    return draft


@pytest.fixture(scope="module")
def models():
    model = tiny_model()
    return model, as_target(model)


@pytest.fixture(scope="module")
def peers(models):
    """All three, with an assistant that is the target itself with noise."""
    model, target = models
    assistant = tiny_model()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if not HAS_DFLASH:
        return Peers(model, [EOS], assistant, None)
    draft = learnt_draft(model, target, **SHAPES["plain"])
    return Peers(model, [EOS], assistant, None, dflash_assistant(draft), dflash_head(draft))


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP, pytest.param(DFLASH, marks=needs_dflash)])
def test_greedy_text_is_the_baselines_and_passes_add_up(peers, method):
    longest = 0
    repeating = PROMPTS[1] + plain_greedy(peers.model, PROMPTS[1], 150)  # what look-up lives on
    for prompt in [*PROMPTS, repeating]:
        text = transformers_generate(peers.model, [EOS], prompt, 0.0, 0, COUNT).token_ids
        found = peers.generate(method, 5, prompt, 0.0, 0, COUNT)
        assert found.token_ids == text and found.finish_reason == "length"
        assert len(found.num_drafts) == found.num_verify_passes == len(found.acceptance_lengths)
        first = len(text) - sum(found.acceptance_lengths)
        assert 1 <= first <= 6, "tokens that the pass over the prompt brought"
        assert all(1 <= a <= n + 1 <= 6 for a, n in zip(found.acceptance_lengths, found.num_drafts, strict=True))
        assert len(found.accepted) == len(text) and found.accepted.count(False) == found.num_verify_passes + 1
        assert found.seconds_prefill > 0 and found.seconds_decode > 0
        longest = max([longest, first, *found.acceptance_lengths])
    assert longest >= (2 if method == ASSISTED else 3), (
        "drafts must have been accepted for any of this to mean something"
    )
    assert "get_output_embeddings" not in vars(peers.model) and not peers.model._forward_pre_hooks


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP, pytest.param(DFLASH, marks=needs_dflash)])
def test_passes_are_counted_where_they_happen(peers, method, monkeypatch):
    """Against what the target's last layer was given to read."""
    read: list[int] = []
    last_layer = peers.model.model.layers[-1]
    hook = last_layer.register_forward_hook(lambda layer, arguments, output: read.append(arguments[0].shape[1]))
    found = peers.generate(method, 4, PROMPTS[0], 0.0, 0, COUNT)
    hook.remove()
    assert [n + 1 for n in found.num_drafts] == read[1:]


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP, pytest.param(DFLASH, marks=needs_dflash)])
def test_an_end_within_a_block_is_an_end(peers, method):
    text = plain_greedy(peers.model, PROMPTS[1], COUNT)
    for place in (0, 4, 9):
        stop = text[place]
        ending = Peers(peers.model, [stop], peers.assistant, None, peers.dflash, peers.dflash_head)
        found = ending.generate(method, 5, PROMPTS[1], 0.0, 0, COUNT)
        assert found.token_ids == text[: text.index(stop) + 1] and found.finish_reason == "stop"
        assert sum(found.acceptance_lengths) < len(found.token_ids)
    for limit in (1, 2, 3):
        assert peers.generate(method, 5, PROMPTS[1], 0.0, 0, limit).token_ids == text[:limit]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_target_leaves_early_where_nothing_else_drafts(kind):
    model = tiny_model(kind)
    target = as_target(model)
    works, settings = exits_early(model), model.generation_config
    assert model.config.num_hidden_layers == 4 and model.generation_config is settings
    assert works or kind != "llama"
    if not works:
        with pytest.raises(UserError, match="give --assistant"):
            load_peers(model, target, [ASSISTED])
        return
    early = load_peers(model, target, [ASSISTED])
    assert early.exit_layer == 1 and early.assistant is None
    assert assisted_by(target, None) == "the target itself, leaving after 1 of its 4 layers"
    assert assisted_by(target, "small") == "small"
    (prompt,) = random_prompts([10])
    found = early.generate(ASSISTED, 3, prompt, 0.0, 0, 14)
    assert found.token_ids == plain_greedy(model, prompt, 14)
    assert max(found.num_drafts) > 0 and len(found.num_drafts) == found.num_verify_passes
    assert all(a <= n + 1 for a, n in zip(found.acceptance_lengths, found.num_drafts, strict=True))


def test_a_model_that_cannot_leave_early_needs_an_assistant(models, monkeypatch):
    model, target = models
    monkeypatch.setattr(peers_module, "exits_early", lambda model: False)
    with pytest.raises(UserError, match=r"cannot leave after its first layers, so .* give --assistant") as error:
        load_peers(model, target, [ASSISTED])
    assert "\n" not in str(error.value)


@needs_dflash
@pytest.mark.parametrize("shape", list(SHAPES))
def test_dflash_drafts_what_our_method_of_that_name_drafts(models, monkeypatch, shape):
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    model, target = models
    draft = learnt_draft(model, target, **SHAPES[shape])
    theirs: list[tuple[int, list[int]]] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def recording(self, input_ids, *args, **kwargs):
        ids, logits = original(self, input_ids, *args, **kwargs)
        if logits is not None:
            theirs.append((input_ids.shape[1], ids[0, input_ids.shape[1] :].tolist()))
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recording)
    peer = Peers(model, [EOS], None, None, dflash_assistant(draft), dflash_head(draft))
    found = peer.generate(DFLASH, draft.config.max_drafts, PROMPTS[0], 0.0, 0, COUNT)
    assert found.token_ids == plain_greedy(model, PROMPTS[0], COUNT)
    assert max(found.num_drafts) == draft.config.max_drafts == peer_drafts(DFLASH, draft, 3)

    ours: dict[int, list[int]] = {}

    class Recording(BlockDrafter):
        def propose(self, state, own, num_drafts):
            proposal = super().propose(state, own, num_drafts)
            ours[int(state.lengths[0])] = proposal.tokens[0].tolist()
            return proposal

    # Every length is a cycle of ours, so that all of theirs can be compared.
    for cut in range(COUNT):
        run(target, Recording(draft, use_head=False), [PROMPTS[0] + found.token_ids[:cut]], 1)
    assert len(theirs) >= 3 and max(found.acceptance_lengths) >= 3
    for length, drafts in theirs:
        assert ours[length] == drafts
    if draft.draft_vocab_ids is not None:
        assert {t for _, drafts in theirs for t in drafts} <= set(draft.draft_vocab_ids.tolist())


@pytest.mark.parametrize("method", [ASSISTED, LOOKUP, pytest.param(DFLASH, marks=needs_dflash)])
def test_sampling_follows_the_seed(peers, method):
    first, second, other = (peers.generate(method, 5, PROMPTS[2], 1.0, seed, 12).token_ids for seed in (3, 3, 4))
    assert first == second != other


@needs_dflash
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain", "shifted subset, Domino"])
def test_sampled_text_has_the_targets_distribution(shape):
    """What we hand to transformers must leave its rule lossless, draft vocabulary and shifted labels included."""
    few, requests = 8, 600
    model = tiny_model(vocab_size=few, hidden_size=16, intermediate_size=24, num_hidden_layers=3, initializer_range=0.3)
    target = as_target(model)
    options = dict(SHAPES[shape], taps=(0, 1), block_size=4)
    if "draft_vocab_ids" in options:
        options["draft_vocab_ids"] = torch.tensor([1, 2, 5, 6])
    draft = tiny_draft(target, **options)
    peer = Peers(model, [], None, None, dflash_assistant(draft), dflash_head(draft))
    prompt = [3, 1, 4]
    texts = [peer.generate(DFLASH, 3, prompt, 1.0, seed, 3).token_ids for seed in range(requests)]
    place = (torch.tensor(texts) * torch.tensor([few**2, few, 1])).sum(-1)
    joint = torch.ones(1, dtype=torch.double)
    known = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(3):
            probs = model(known).logits[:, -1].softmax(-1).double()
            joint = (joint[:, None] * probs).flatten()
            known = torch.cat((known.repeat_interleave(few, 0), torch.arange(few).repeat(len(known))[:, None]), 1)
    assert p_value(place.bincount(minlength=few**3), joint) > FALSE_ALARM


# What a user gets wrong.


@pytest.fixture(scope="module")
def disk(tmp_path_factory, models):
    root = tmp_path_factory.mktemp("peers")
    for name, overrides, tokenizer in (
        ("small", dict(num_hidden_layers=1), word_tokenizer()),
        ("wide", dict(vocab_size=70), word_tokenizer()),
        ("bytes", {}, byte_tokenizer()),
    ):
        tiny_model(**overrides).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    save_draft(tiny_draft(models[1], taps=(0, 2)), root / "draft")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCAB}))
    return root


def test_an_assistant_is_loaded_as_a_stock_model(models, disk):
    model, _ = models
    target = as_target(model, word_tokenizer())
    loaded = load_peers(model, target, [ASSISTED, LOOKUP, "none"], assistant=str(disk / "small"))
    assert loaded.exit_layer is None and loaded.assistant.config._attn_implementation == "sdpa"
    assert loaded.generate(ASSISTED, 3, PROMPTS[0], 0.0, 0, 9).token_ids == plain_greedy(model, PROMPTS[0], 9)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wide", r"has a vocabulary of 70, target tiny of 60: give a model with the target's tokenizer"),
        ("bytes", r"different tokenizers: give one with the same"),
        ("nowhere", r"does not exist: give a model directory or a hub id"),
        ("draft", r"is a draft, which cannot write by itself: give a small language model"),
        ("broken", r"holds no safetensors weights"),
    ],
)
def test_a_wrong_assistant_is_one_line(models, disk, name, complaint):
    target = as_target(models[0], word_tokenizer())
    with pytest.raises(UserError, match=complaint) as error:
        load_assistant(str(disk / name), target)
    assert "\n" not in str(error.value) and name in str(error.value)


@needs_dflash
def test_dflash_reads_the_draft_from_disk(models, disk):
    model, target = models
    loaded = load_peers(model, target, [DFLASH], draft=disk / "draft")
    assert loaded.generate(DFLASH, 5, PROMPTS[0], 0.0, 0, 9).token_ids == plain_greedy(model, PROMPTS[0], 9)


def test_what_dflash_cannot_express_is_one_line(models, monkeypatch):
    model, target = models
    for missing in (None, tiny_single_layer(target, "eagle3")):
        with pytest.raises(UserError, match="needs a draft with a DFlash backbone"):
            peer_drafts(DFLASH, missing, None)
    with pytest.raises(UserError, match="needs a draft"):
        load_peers(model, target, [DFLASH])
    with pytest.raises(UserError, match=r"reads the target's last layer .* before its final norm"):
        check_dflash(tiny_draft(target, taps=(0, 3)).config)
    monkeypatch.setitem(sys.modules, "transformers.models.muse_glimmer_assistant", None)
    for name in ("configuration", "modeling"):
        module = f"transformers.models.muse_glimmer_assistant.{name}_muse_glimmer_assistant"
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs a transformers with DFlash .* has none"):
        check_dflash(tiny_draft(target, taps=(0, 2)).config)


def test_budgets_are_transformers_own_where_none_is_asked_for():
    assert [peer_drafts(m, None, None) for m in (ASSISTED, LOOKUP)] == [20, 10]
    assert [peer_drafts(m, None, 7) for m in (ASSISTED, LOOKUP)] == [7, 7]
    assert set(PEERS) == {ASSISTED, LOOKUP, DFLASH}


def test_the_bench_runs_peers_as_methods_with_budgets(models, peers):
    model, target = models
    draft = tiny_draft(target, block_size=6, taps=(0, 2))
    methods = [ASSISTED, LOOKUP, *([DFLASH] if HAS_DFLASH else [])]
    found = contenders(Drafting(target, [draft]), methods, [3, 30], [0.0])
    assert found[:4] == [Contender(method, budget, 0.0) for method in (ASSISTED, LOOKUP) for budget in (3, 30)]
    assert found[4:] == ([Contender(DFLASH, 6, 0.0)] if HAS_DFLASH else []), "its whole block, whatever is asked for"
    run_prompt = runner(Drafting(target, [draft]), model, None, peers=peers)
    text = plain_greedy(model, PROMPTS[0], 10)
    for contender in found:
        assert run_prompt(contender, PROMPTS[0], 0, 10).token_ids == text
