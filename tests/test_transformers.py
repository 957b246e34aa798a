"""`model.generate(custom_generate=draft.custom_generate)`: transformers' own call, our loop, the same answer."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor
from transformers.generation import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from domino_spec import UserError, load_draft
from domino_spec.api import default_min_confidence
from domino_spec.draft.checkpoint import save_draft
from domino_spec.integrations.transformers import generate_with
from tests.tiny import as_target, random_prompts, tiny_draft, tiny_model


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gemma3"])
def pair(request, tmp_path_factory):
    """An ordinary transformers model, and a draft loaded for it."""
    model = tiny_model(request.param)
    directory = tmp_path_factory.mktemp("draft")
    save_draft(tiny_draft(as_target(model)), directory)
    return model, load_draft(directory, model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_model()
    directory = tmp_path_factory.mktemp("draft")
    save_draft(tiny_draft(as_target(model)), directory)
    return model, load_draft(directory, model)


def batch(lengths: list[int], pad: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts, as transformers expects them."""
    prompts = random_prompts(lengths)
    longest = max(lengths)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_output_equals_the_models_own_generate(pair):
    model, draft = pair
    inputs = batch([9])
    options = dict(do_sample=False, max_new_tokens=16)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=draft.custom_generate, **options), expected)


def test_left_padded_batches_are_decoded_alike(llama):
    model, draft = llama
    inputs = batch([9, 3, 6])
    options = dict(do_sample=False, max_new_tokens=12)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=draft.custom_generate, **options), expected)


def test_requests_that_stop_early_are_padded_as_transformers_pads(llama):
    model, draft = llama
    inputs = batch([9, 3, 6])
    free = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    stop = int(free[0, 9 + 2])
    options = dict(do_sample=False, max_new_tokens=12, eos_token_id=stop, pad_token_id=0)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=draft.custom_generate, **options), expected)


def test_repetition_penalty_is_honoured(llama):
    model, draft = llama
    inputs = batch([9])
    options = dict(do_sample=False, max_new_tokens=16, repetition_penalty=1.5)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, custom_generate=draft.custom_generate, **options), expected)
    assert not torch.equal(expected, model.generate(**inputs, do_sample=False, max_new_tokens=16))


def test_sampling_follows_pytorchs_seed(llama):
    model, draft = llama
    inputs = batch([9, 5])

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(
            **inputs,
            custom_generate=draft.custom_generate,
            do_sample=True,
            temperature=0.9,
            top_k=20,
            max_new_tokens=16,
        )

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("options", [dict(do_sample=True, temperature=0.7), dict(do_sample=False)], ids=str)
def test_the_hook_drafts_as_generate_does_by_default(llama, monkeypatch, options):
    model, draft = llama
    drafters = []

    def watched(drafter, *arguments, **settings):
        drafters.append(drafter)
        return generate_with(drafter, *arguments, **settings)

    monkeypatch.setattr("domino_spec.api.generate_with", watched)
    model.generate(**batch([5, 4]), custom_generate=draft.custom_generate, max_new_tokens=2, **options)
    (drafter,) = drafters
    assert drafter.tree is not None and drafter.max_drafts == 5, "eleven drafts and an anchor, shared by two"
    assert drafter.min_confidence == default_min_confidence(model.device)


def test_sampling_never_leaves_the_top_k(llama):
    """top_k 1 is greedy whatever the temperature: the warpers arrive."""
    model, draft = llama
    inputs = batch([9])
    sampled = model.generate(
        **inputs, custom_generate=draft.custom_generate, do_sample=True, temperature=3.0, top_k=1, max_new_tokens=12
    )
    assert torch.equal(sampled, model.generate(**inputs, do_sample=False, max_new_tokens=12))


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.pieces, self.ended = [], 0, False

    def put(self, value):
        self.tokens += value.flatten().tolist()
        self.pieces += 1

    def end(self):
        self.ended = True


def test_a_streamer_gets_what_it_gets_from_transformers(llama):
    model, draft = llama
    inputs = batch([9])
    ours, theirs = Recorder(), Recorder()
    options = dict(do_sample=False, max_new_tokens=12)
    model.generate(**inputs, streamer=theirs, **options)
    model.generate(**inputs, streamer=ours, custom_generate=draft.custom_generate, **options)
    assert ours.tokens == theirs.tokens
    assert ours.ended and ours.pieces > 3, "text must come as it is made, not at the end"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(logits_processor=LogitsProcessorList([SuppressTokensLogitsProcessor([3])])), "SuppressTokens"),
        (dict(no_repeat_ngram_size=2), "NoRepeatNGram"),
        (dict(stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(100.0)])), "MaxTimeCriteria"),
        (dict(return_dict_in_generate=True), "return_dict_in_generate"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(llama, options, message):
    model, draft = llama
    with pytest.raises(UserError, match=message):
        model.generate(
            **batch([5]), custom_generate=draft.custom_generate, max_new_tokens=4, do_sample=False, **options
        )


def test_a_streamer_needs_a_batch_of_one(llama):
    model, draft = llama
    options = dict(custom_generate=draft.custom_generate, max_new_tokens=4, do_sample=False)
    with pytest.raises((UserError, ValueError), match=r"batch of one|batch size"):
        model.generate(**batch([5, 4]), streamer=Recorder(), **options)


def test_another_model_is_refused(llama):
    _, draft = llama
    with pytest.raises(UserError, match="bound to another model"):
        tiny_model(seed=4).generate(**batch([5]), custom_generate=draft.custom_generate, max_new_tokens=4)


def test_the_model_still_generates_without_us(llama):
    """Our taps stay in the model's layers; they must not change or keep anything."""
    model, draft = llama
    inputs = batch([7])
    options = dict(do_sample=False, max_new_tokens=8)
    before = tiny_model().generate(**inputs, **options)
    model.generate(**inputs, custom_generate=draft.custom_generate, **options)
    assert torch.equal(model.generate(**inputs, **options), before)
