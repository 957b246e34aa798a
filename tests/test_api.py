"""The Python surface: imports, prompts of every kind, and the methods by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import domino_spec
from domino_spec import UserError, generate
from domino_spec.api import prompt_ids
from domino_spec.decoding.cycle import Proposal, start
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.methods import LARGEST_TREE, METHODS, choose_draft, default_method, make_drafter
from domino_spec.ops.native import bindings as cpu
from tests.tiny import (
    as_target,
    draft_for,
    plain_greedy,
    prefill,
    tiny_draft,
    tiny_model,
    tiny_single_layer,
    tiny_target,
)


def test_every_exported_name_is_there():
    for name in domino_spec.__all__:
        assert getattr(domino_spec, name) is not None
    assert set(domino_spec.__all__) <= set(dir(domino_spec))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = domino_spec.nothing_of_the_kind


def test_importing_the_package_does_not_import_pytorch():
    """`domino-spec --help` must answer at once."""
    code = "import sys, domino_spec; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_prompts_may_be_text_chats_or_token_ids(text_target):
    assert prompt_ids(text_target, [4, 5]) == [4, 5]
    assert prompt_ids(text_target, "w4 w5") == [1, 4, 5, 2]
    assert prompt_ids(text_target, "w4 w5", chat=False) == [4, 5]
    assert prompt_ids(text_target, [{"role": "user", "content": "w4"}]) == [1, 4, 2]


def test_texts_of_several_prompts_come_back_in_order(model, text_target):
    prompts = ["w3 w4 w5", [{"role": "user", "content": "w9"}], [7, 8]]
    results = generate(text_target, tiny_draft(text_target), prompts, max_new_tokens=8)
    for prompt, result in zip(([1, 3, 4, 5, 2], [1, 9, 2], [7, 8]), results, strict=True):
        assert result.prompt_ids == prompt
        expected = plain_greedy(model, prompt, 8)
        assert result.token_ids == expected[: len(result.token_ids)]
        assert result.text == " ".join(f"w{t}" for t in result.token_ids if t < 58)


def test_the_default_method_is_what_the_draft_is(target):
    assert default_method(None) == "none"
    with_head, without = tiny_draft(target), tiny_draft(target, head=False)
    assert default_method(with_head) == "domino-tree" and default_method(without) == "dflash-tree"
    assert default_method(with_head, sample_drafts=True) == "domino", "trees are not sampled"


def test_a_method_takes_the_draft_that_was_made_for_it(target):
    domino, plain = tiny_draft(target), tiny_draft(target, head=False)
    eagle3, dart = tiny_single_layer(target, "eagle3"), tiny_single_layer(target, "dart")
    drafts = [eagle3, domino, plain, dart]
    wanted = {"domino-tree": domino, "dflash": plain, "eagle3": eagle3, "dart": dart, "none": None, "ngram": None}
    assert {method: choose_draft(method, drafts) for method in wanted} == wanted
    assert choose_draft("dflash", [eagle3, domino]) is domino, "with its head off"
    assert choose_draft("domino", [plain, dart]) is None
    assert [default_method(draft) for draft in drafts] == ["eagle3", "domino-tree", "dflash-tree", "dart"]


@pytest.mark.parametrize(
    "method, kind, said",
    [
        ("domino", "dflash", "method domino needs a Domino draft; this is a DFlash draft (use dflash)"),
        ("eagle3", "domino", "method eagle3 needs an EAGLE-3 draft; this is a Domino draft (use domino)"),
        ("domino-tree", "dart", "method domino-tree needs a Domino draft; this is a DART draft (use dart)"),
    ],
)
def test_a_draft_of_another_kind_is_refused(target, method, kind, said):
    draft = tiny_single_layer(target, kind) if kind == "dart" else tiny_draft(target, head=kind == "domino")
    with pytest.raises(UserError) as caught:
        make_drafter(method, draft, requests=1, device=target.device)
    assert str(caught.value) == said


def test_the_size_of_a_tree_is_asked_for_or_follows_the_number_of_requests(target):
    def drafts(requests: int, num_drafts: int | None = None, method: str = "domino-tree") -> int:
        options = dict(requests=requests, device=target.device, num_drafts=num_drafts)
        return make_drafter(method, tiny_draft(target), **options).max_drafts

    assert [drafts(r) for r in (1, 2, 4, 16)] == [11, 5, 2, 2]
    assert drafts(1, 17) == drafts(4, 17) == drafts(4, 17, "domino-tree+ngram") == 17
    assert drafts(1, 100_000) == LARGEST_TREE, "room for more would be memory for nothing"
    assert drafts(1, 30, "domino") == tiny_draft(target).config.max_drafts, "a chain ends with its block"


def test_every_method_makes_a_drafter(target):
    for method in METHODS:
        drafter = make_drafter(method, draft_for(method, target), requests=2, device=target.device)
        assert drafter.max_drafts == (0 if method == "none" else drafter.max_drafts) >= 0


@torch.inference_mode()
def first_proposal(target, method: str, temperature: float, **options) -> Proposal:
    drafter = make_drafter(method, tiny_draft(target), requests=1, device=target.device, **options)
    state = prefill(target, [[1, 2, 3]], drafter, 1, SamplingSettings(temperature=temperature))
    return drafter.propose(state, start(drafter, state), drafter.max_drafts)


@pytest.mark.parametrize("method", ["domino", "dflash"])
def test_drafts_are_sampled_where_the_text_is_unless_argmax_is_asked_for(target, method):
    own, colder = (first_proposal(target, method, 0.7, draft_temperature=t).draft_probs for t in (None, 0.01))
    assert own is not None and colder is not None
    assert (colder.amax(-1) > own.amax(-1)).all(), "a colder draft is surer"
    assert first_proposal(target, method, 0.7, sample_drafts=False).draft_probs is None
    for sample_drafts in (None, True):
        assert first_proposal(target, method, 0.0, sample_drafts=sample_drafts).draft_probs is None
    assert first_proposal(target, "domino+ngram", 0.7).draft_probs is None


def test_generate_draws_the_same_text_by_default_as_with_sampled_drafts(target):
    def text(**options) -> list[int]:
        """Every draft proposed, and hot, so that even an untrained draft is right now and then."""
        options = dict(max_new_tokens=24, temperature=3.0, seed=2, min_confidence=0.0, method="domino", **options)
        return generate(target, tiny_draft(target), [[3, 4, 5]], **options)[0].token_ids

    assert text() == text(sample_drafts=True) != text(sample_drafts=False)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(min_confidence=1.0), "min_confidence must be at least 0 and less than 1"),
        (dict(min_confidence=-0.1), "min_confidence must be at least 0 and less than 1"),
        (dict(method="domino+ngram", sample_drafts=True, temperature=1.0), "sample_drafts is for domino and dflash"),
        (dict(method="dartflash"), "unknown method 'dartflash'; known methods are none, ngram"),
    ],
)
def test_options_that_make_no_sense_are_refused(target, options, message):
    with pytest.raises(UserError, match=message):
        generate(target, tiny_draft(target), [[1, 2]], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop="w3"), "stop: expected a list of texts, found 'w3' (str); put it in a list"),
        (dict(stop=["w3", 4]), "stop[1]: expected a text, found 4 (int)"),
        (dict(seed=1.5), "seed: expected an integer, found 1.5 (float)"),
        (dict(top_k="2"), "top_k: expected an integer, found '2' (str)"),
        (dict(num_drafts=True), "num_drafts: expected an integer, found True (bool)"),
        (dict(max_new_tokens=None), "max_new_tokens: expected an integer, found null"),
        (dict(candidates=2.0), "candidates: expected an integer, found 2.0 (float)"),
        (dict(temperature="hot"), "temperature: expected a number, found 'hot' (str)"),
        (dict(top_p=False), "top_p: expected a number, found False (bool)"),
        (dict(min_confidence="x"), "min_confidence: expected a number, found 'x' (str)"),
        (dict(prompts="w3"), "prompts: expected a list of prompts, found 'w3' (str); put it in a list"),
        (dict(prompts=[]), "no prompt given"),
        (dict(prompts=[3]), "prompts[0]: expected text, chat messages or token ids, found 3 (int)"),
        (dict(prompts=[[3], []]), "prompts[1] is empty: give text, chat messages or token ids"),
        (dict(prompts=[[3, 1.0]]), "prompts[0][1]: expected a token id, found 1.0 (float)"),
        (dict(prompts=[[True]]), "prompts[0][0]: expected a token id, found True (bool)"),
        (dict(prompts=[[[3]]]), "prompts[0][0]: expected a token id, found [3] (list)"),
        (dict(prompts=[[3, {"role": "user"}]]), "prompts[0][1]: expected a token id, found {'role': 'user'} (dict)"),
        (dict(prompts=[[60]]), "prompts[0][0]: expected a token id below the vocabulary's 60, found 60 (int)"),
        (dict(prompts=[[-1]]), "prompts[0][0]: expected a token id below the vocabulary's 60, found -1 (int)"),
        (
            dict(prompts=[torch.ones(2, 3)]),
            "prompts[0]: expected a list of token ids, found a tensor of torch.float32 and shape (2, 3)",
        ),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(target, options, message):
    with pytest.raises(UserError) as caught:
        generate(target, tiny_draft(target), **{"prompts": [[1, 2]], "max_new_tokens": 2, **options})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_tensor_of_token_ids_is_a_prompt(target):
    assert prompt_ids(target, torch.tensor([4, 5])) == [4, 5]


def test_a_head_can_be_asked_for_only_where_there_is_one(target):
    with pytest.raises(UserError, match="method domino needs a Domino draft; this is a DFlash draft"):
        generate(target, tiny_draft(target, head=False), [[1, 2]], method="domino")


def test_exact_is_refused_where_passes_may_round_otherwise(target):
    with pytest.raises(UserError, match="exact decoding needs"):
        generate(target, None, [[1, 2]], max_new_tokens=2, exact=True)  # not packed
    with pytest.raises(UserError, match="tiny is bfloat16 on cpu"):
        generate(as_target(tiny_model().bfloat16()).pack(), None, [[1, 2]], max_new_tokens=2, exact=True)


@pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
def test_exact_decoding_gives_the_plain_text():
    exact = tiny_target("qwen3").pack()
    options = dict(max_new_tokens=24, exact=True)
    (plain,) = generate(exact, None, [[1, 2, 3]], method="none", **options)
    (drafted,) = generate(exact, tiny_draft(exact).pack(), [[1, 2, 3]], **options)
    assert drafted.token_ids == plain.token_ids
    with pytest.raises(UserError, match="tiny has another kind"):
        generate(tiny_target("gemma3").pack(), None, [[1, 2]], **options)  # heads too narrow for the native loops
