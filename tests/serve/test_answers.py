"""Answers under the official client: the same text as `generate`, in every form that the API has."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
import torch

from domino_spec.api import generate
from domino_spec.decoding.sampling import SamplingSettings, seed_of
from domino_spec.target.text import encode_prompt
from tests.serve.running import MODEL, serving, word_target
from tests.tiny import EOS, MASK

PROMPTS = ["w3 w4 w5 w6", "w20 w21", "w7 w7 w8 w40 w41 w42 w43"]
GREEDY = dict(temperature=0, max_tokens=24)
ORDINARY = dict(**GREEDY, logit_bias={str(EOS): -100, str(MASK): -100})
"""Log-probabilities do not see the bias, and every token has a text."""


def expected(words, draft, prompt, count: int = 24, chat: bool = True, **settings) -> str:
    """What `generate` writes."""
    options = dict(max_new_tokens=count, settings=SamplingSettings(**settings), chat=chat)
    return generate(words, draft, [prompt], **options)[0].text


def joined(chunks) -> tuple[str, list[str]]:
    """The text of a stream's first choice, and its pieces."""
    pieces = []
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == 0:
                pieces.append(choice.text if hasattr(choice, "text") else choice.delta.content or "")
    return "".join(pieces), pieces


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_greedy_answer_is_what_generate_writes(server, words, draft, prompt):
    whole = server.chat(prompt, **GREEDY)
    text = expected(words, draft, prompt)
    assert whole.object == "chat.completion" and whole.model == MODEL
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == "length" and choice.logprobs is None
    streamed, pieces = joined(server.chat(prompt, stream=True, **GREEDY))
    assert streamed == text and len(pieces) > 3
    completed = server.complete(prompt, **GREEDY)
    assert completed.object == "text_completion"
    assert completed.choices[0].text == expected(words, draft, prompt, chat=False)
    assert joined(server.complete(prompt, stream=True, **GREEDY))[0] == completed.choices[0].text


def test_a_conversation_goes_through_the_chat_template(server, words, draft):
    messages = [
        {"role": "developer", "content": "w10"},
        {"role": "user", "content": [{"type": "text", "text": "w11 "}, {"type": "text", "text": "w12"}]},
        {"role": "assistant", "content": "w13"},
        {"role": "user", "content": "w14"},
    ]
    answer = server.client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
    plain = [{"role": "system", "content": "w10"}, {"role": "user", "content": "w11 w12"}, *messages[2:]]
    assert answer.choices[0].message.content == expected(words, draft, plain)


def test_thinking_is_off_unless_the_template_is_told(server, words):
    def prompt_tokens(**options) -> int:
        return server.chat("w3", max_tokens=1, extra_body=options).usage.prompt_tokens

    off, on = (len(encode_prompt(words.tokenizer, "w3", enable_thinking=t)) for t in (False, True))
    assert prompt_tokens() == off and on == off + 1
    assert prompt_tokens(chat_template_kwargs={"enable_thinking": True}) == on
    assert prompt_tokens(chat_template_kwargs={"enable_thinking": False}) == off


def test_a_prompt_is_a_text_token_ids_or_several_of_them(server, words, draft):
    ids = [words.tokenizer(p)["input_ids"] for p in PROMPTS]
    texts = [expected(words, draft, p, chat=False) for p in PROMPTS]
    assert [c.text for c in server.complete(PROMPTS, **GREEDY).choices] == texts
    assert [c.text for c in server.complete(ids, **GREEDY).choices] == texts
    assert server.complete(ids[1], **GREEDY).choices[0].text == texts[1]
    echoed = server.complete(PROMPTS, echo=True, **GREEDY)
    assert [c.text for c in echoed.choices] == [p + t for p, t in zip(PROMPTS, texts, strict=True)]
    assert echoed.usage.prompt_tokens == sum(map(len, ids))
    assert joined(server.complete(PROMPTS[0], echo=True, stream=True, **GREEDY))[0] == PROMPTS[0] + texts[0]


def test_choice_i_has_the_seed_plus_i(server, words, draft):
    options = dict(temperature=0.9, top_p=0.95, max_tokens=16)
    several = server.chat(PROMPTS[0], n=4, seed=7, **options)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    texts = [c.message.content for c in several.choices]
    assert len(set(texts)) == 4
    assert texts == [server.chat(PROMPTS[0], seed=7 + i, **options).choices[0].message.content for i in range(4)]
    assert texts[0] == expected(words, draft, PROMPTS[0], 16, temperature=0.9, top_p=0.95, seed=7)
    streamed: dict[int, str] = {}
    for chunk in server.chat(PROMPTS[0], n=4, seed=7, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[i] for i in range(4)] == texts
    completed = server.complete(PROMPTS[:2], n=2, seed=7, **options)
    single = [server.complete(p, seed=7 + i, **options).choices[0].text for i, p in enumerate(PROMPTS[:1] * 2)]
    assert [c.text for c in completed.choices][:2] == single and len(completed.choices) == 4


def test_a_seed_wraps_within_64_bits():
    assert seed_of(2**63 - 1, 1) == -(2**63) and seed_of(-5, 2) == -3


def test_without_a_seed_answers_differ_and_with_one_they_do_not(server):
    def text(**options) -> str:
        return server.chat("w3 w4", temperature=1.5, max_tokens=30, **options).choices[0].message.content

    assert text() != text()
    assert text(seed=-3) == text(seed=-3)


@pytest.mark.slow
def test_a_seed_gives_the_same_text_whatever_the_load(server):
    """Thirty requests of unequal settings at once: each answer is what its request gets alone."""
    asked = [
        dict(prompt=f"w{i} w{i + 1}", temperature=(i % 3) / 2, seed=i, max_tokens=5 + i, presence_penalty=(i % 2) * 1.5)
        for i in range(30)
    ]

    async def together() -> list[str]:
        async with server.new_client(openai.AsyncOpenAI) as client:
            answers = await asyncio.gather(*(client.completions.create(model=MODEL, **a) for a in asked))
        return [a.choices[0].text for a in answers]

    assert asyncio.run(together()) == [server.complete(**a).choices[0].text for a in asked]


def test_every_warper_is_that_of_generate(server, words, draft):
    several = [
        dict(temperature=0, logit_bias={"5": 100}),
        dict(temperature=0, presence_penalty=1.5, frequency_penalty=-0.5),
        dict(temperature=1.0, top_p=0.8, seed=1),
        dict(temperature=1.3, seed=2, extra_body=dict(top_k=4, min_p=0.05, repetition_penalty=1.3)),
    ]
    for options in several:
        answer = server.chat(PROMPTS[1], max_tokens=16, **options).choices[0].message.content
        settings = {**options, **options.get("extra_body", {})}
        settings.pop("extra_body", None)
        settings["logit_bias"] = {int(k): v for k, v in settings.get("logit_bias", {}).items()}
        assert answer == expected(words, draft, PROMPTS[1], 16, **settings)
    assert set(server.chat("w3", max_tokens=9, **several[0]).choices[0].message.content.split()) == {"w5"}


def test_the_temperature_of_openai_is_one(server):
    assert (
        server.chat("w3 w4", seed=5, max_tokens=20).choices[0].message.content
        == server.chat("w3 w4", seed=5, temperature=1, max_tokens=20).choices[0].message.content
    )


def test_answers_end_at_the_slot_the_limit_a_stop_token_or_a_stop_string(server):
    prompt = PROMPTS[0]
    full = server.complete(prompt, temperature=0)
    assert full.choices[0].finish_reason == "length" and full.usage.total_tokens == server.engine.capacity
    text = full.choices[0].text
    assert server.chat(prompt, temperature=0, max_completion_tokens=7).usage.completion_tokens == 7
    words = text.split()
    stop = next(w for i, w in enumerate(words) if i > 6 and w not in words[:i])
    for given in (stop, [stop, "nothing like it"], f" {stop}"):
        for stream in (False, True):
            answer = server.complete(prompt, temperature=0, stop=given, stream=stream)
            shown, pieces = joined(answer) if stream else (answer.choices[0].text, [])
            last = given if isinstance(given, str) else stop
            assert shown == text[: text.index(last)]
            assert all(stop not in piece for piece in pieces)
    stopped = server.complete(prompt, temperature=0, extra_body={"stop_token_ids": [int(stop[1:])]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text.split() == words[: words.index(stop)]
    ended = server.complete(prompt, temperature=0, logit_bias={str(EOS): 100}, max_tokens=5)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    going = server.complete(
        prompt, temperature=0, logit_bias={str(EOS): 100}, max_tokens=5, extra_body=dict(ignore_eos=True)
    )
    assert (going.usage.completion_tokens, going.choices[0].finish_reason) == (5, "length")


def test_usage_counts_tokens_and_drafts(server, words, draft):
    whole = server.chat(PROMPTS[2], **GREEDY).usage
    assert whole.prompt_tokens == len(encode_prompt(words.tokenizer, PROMPTS[2]))
    assert whole.completion_tokens == 24 and whole.total_tokens == whole.prompt_tokens + 24
    assert whole.prompt_tokens_details.cached_tokens >= 0
    extra = whole.model_extra
    assert extra["num_verify_passes"] + extra["num_accepted_drafts"] >= 24
    assert extra["num_drafts"] >= extra["num_accepted_drafts"] >= 0
    tau = (extra["num_verify_passes"] + extra["num_accepted_drafts"]) / extra["num_verify_passes"]
    assert extra["acceptance_length"] == pytest.approx(tau)
    asked = server.chat(PROMPTS[2], stream=True, stream_options={"include_usage": True}, **GREEDY)
    *others, last = list(asked)
    assert last.choices == [] and last.usage.completion_tokens == 24 and all(c.usage is None for c in others)
    assert all(c.usage is None for c in server.chat(PROMPTS[2], stream=True, **GREEDY))
    twice = server.chat(PROMPTS[2], n=2, **GREEDY).usage
    assert (twice.prompt_tokens, twice.completion_tokens) == (whole.prompt_tokens, 48)


def test_a_follow_up_turn_reads_only_what_is_new(words, draft):
    messages, known = [{"role": "user", "content": "w3 w4 w5 w6 w7 w8"}], 0
    with serving(words, draft, slots=2, prefix_bytes=2**24) as server:
        for turn in range(3):
            answer = server.client.chat.completions.create(model=MODEL, messages=messages, **ORDINARY)
            text, usage = answer.choices[0].message.content, answer.usage
            settings = dict(logit_bias={EOS: -100, MASK: -100})
            assert text == expected(words, draft, messages, **settings)
            cached = usage.prompt_tokens_details.cached_tokens
            # This template writes w1 before an earlier answer, where the answer itself began: the prompt is common.
            assert cached == max(0, known - 1)
            known = usage.prompt_tokens
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"w{turn + 20}"}]
        assert server.metric("domino_spec_cached_prompt_tokens_total") > 24


def logprobs_of(words, prompt: list[int], text: str) -> torch.Tensor:
    """The target's own, [n, V]."""
    answer = words.tokenizer(text)["input_ids"]
    with torch.no_grad():
        ids = torch.tensor([prompt + answer])
        cache = words.new_cache(1, ids.shape[1])
        logits = words.lm_head(words.forward(ids, cache, ()).hidden)
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1), answer


def test_log_probabilities_of_a_chat_have_the_official_shape(server, words):
    whole = server.chat(PROMPTS[0], logprobs=True, top_logprobs=3, **ORDINARY).choices[0]
    rows, answer = logprobs_of(words, encode_prompt(words.tokenizer, PROMPTS[0]), whole.message.content)
    content = whole.logprobs.content
    assert "".join(t.token for t in content).strip() == whole.message.content
    for token, row, found in zip(answer, rows, content, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert bytes(found.bytes).decode() == found.token
        assert [t.token.strip() for t in found.top_logprobs] == words.tokenizer.convert_ids_to_tokens(
            row.topk(3).indices.tolist()
        )
        assert [t.logprob for t in found.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    streamed = []
    for chunk in server.chat(PROMPTS[0], logprobs=True, top_logprobs=3, stream=True, **ORDINARY):
        streamed += [t for choice in chunk.choices if choice.logprobs for t in choice.logprobs.content]
    assert [(t.token, t.bytes) for t in streamed] == [(t.token, t.bytes) for t in content]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in content], abs=1e-4)
    assert server.chat(PROMPTS[0], logprobs=True, **ORDINARY).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_of_a_completion_have_the_official_shape(server, words):
    choice = server.complete(PROMPTS[0], logprobs=2, **ORDINARY).choices[0]
    rows, answer = logprobs_of(words, words.tokenizer(PROMPTS[0])["input_ids"], choice.text)
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx([r[t].item() for t, r in zip(answer, rows, strict=True)], abs=1e-4)
    assert [t.strip() for t in found.tokens] == choice.text.split()
    assert [len(t) for t in found.top_logprobs] == [2] * len(answer)
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert choice.text[offset:].strip().startswith(token.strip())


def test_log_probabilities_end_where_the_text_does(server):
    text = server.complete(PROMPTS[0], **ORDINARY).choices[0].text.split()
    stop = next(w for i, w in enumerate(text) if i > 6 and w not in text[:i])
    for stream in (False, True):
        options = dict(stop=f" {stop}", logprobs=0, stream=stream, **ORDINARY)
        answer = server.complete(PROMPTS[0], **options)
        tokens: list[str] = []
        for part in answer if stream else [answer]:
            tokens += [t for c in part.choices if c.logprobs for t in c.logprobs.tokens]
        assert [t.strip() for t in tokens] == text[: text.index(stop)]


def test_the_models_are_listed(server):
    (model,) = server.client.models.list().data
    assert model.id == MODEL and model.model_extra["max_model_len"] == server.engine.capacity
    assert server.client.models.retrieve(MODEL).id == MODEL


def test_a_stream_is_server_sent_events(server):
    body = dict(model=MODEL, prompt="w3", stream=True, temperature=0, max_tokens=4)
    response = server.http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert {json.loads(e.removeprefix("data: "))["object"] for e in events} == {"text_completion"}


def test_unknown_fields_and_nulls_are_ignored_as_peers_do(server):
    plain = server.chat("w3", **GREEDY).choices[0].message.content
    extra = dict(user="me", store=False, metadata={"a": "b"}, service_tier="auto", tools=[], tool_choice="none")
    nulls = dict(stop=None, seed=None, logit_bias=None, response_format={"type": "text"}, parallel_tool_calls=True)
    body = {**extra, **nulls, "priority": 3, "best_friend": {}}
    assert server.chat("w3", extra_body=body, **GREEDY).choices[0].message.content == plain


def test_a_target_without_a_tokenizer_is_not_served():
    from domino_spec.serve.app import Service, Settings
    from domino_spec.serve.server import make_engine
    from domino_spec.settings import UserError

    target = word_target()
    target.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        Service(make_engine(target, None, slots=1), Settings(MODEL))
