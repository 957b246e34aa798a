"""What a client gets wrong is refused with the right status, in OpenAI's shape, and nothing is computed."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.serve.running import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "w3"}], "max_tokens": 4}
TEXT = {"model": MODEL, "prompt": "w3", "max_tokens": 4}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}

SAMPLING = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"w5": 1}}, "logit_bias"),
    ({"logit_bias": {"60": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**4000}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 70}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stop": 0}, "stop"),
    ({"stop_token_ids": [60]}, "stop_token_ids"),
    ({"stop_token_ids": "w5"}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
]
BOTH = [
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "auto"},
    {"functions": [{"name": "f"}]},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {}}},
    {"modalities": ["text", "audio"]},
    {"min_tokens": 5},
    {"guided_regex": "a*"},
    {"structured_outputs": {"regex": "a*"}},
    {"use_beam_search": True},
    {"chat_template": "{{ messages }}"},
]
OF_CHAT = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_type"),
    ({"messages": "w3"}, "messages", "invalid_type"),
    ({"messages": ["w3"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "wizard", "content": "w3"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "w3"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"content": "w3"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": [{"text": "w3"}]}]}, "messages[0].content[0]", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "unsupported_value",
    ),
    (
        {"messages": [{"role": "assistant", "content": "w3", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking", "invalid_type"),
    ({"chat_template_kwargs": {"tone": "kind"}}, "chat_template_kwargs.tone", "unsupported_parameter"),
]
OF_COMPLETIONS = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": ["w3", ""]}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_type"),
    ({"prompt": [[]]}, "prompt", "invalid_type"),
    ({"prompt": ["w3", 5]}, "prompt", "invalid_type"),
    ({"prompt": [True]}, "prompt", "invalid_type"),
    ({"prompt": [60]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": {"text": "w3"}}, "prompt", "invalid_type"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
    ({"best_of": 3}, "best_of", "invalid_value"),
    ({"suffix": "w4"}, "suffix", "unsupported_parameter"),
]


def post(server, route: str, body: dict) -> httpx.Response:
    """A request written by hand, so that it may be wrong in ways that the client would not let through."""
    headers = {"content-type": "application/json"}
    return server.http.post(route, content=json.dumps(body), headers=headers)


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None) -> str:
    """The message of an error that has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    return error["message"]


@pytest.fixture(autouse=True)
def nothing_computed(server):
    """No refusal costs a verify pass."""
    before = server.engine.stats.verify_passes
    yield
    assert server.is_idle() and server.engine.stats.verify_passes == before


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("change", "param"), SAMPLING, ids=lambda v: str(v)[:40])
def test_bad_values_name_the_field(server, route, change, param):
    response = post(server, route, {**ROUTES[route], **change})
    error = response.json()["error"]
    assert error["code"] in ("invalid_value", "invalid_type", "missing_required_parameter")
    assert param.split(".")[0] in check_error(response, 400, param, error["code"])
    assert len(error["message"]) < 300


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("change", BOTH, ids=str)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(server, route, change):
    (name,) = change
    message = check_error(post(server, route, {**ROUTES[route], **change}), 400, name, "unsupported_parameter")
    assert message.startswith(f"{name} is not supported")


@pytest.mark.parametrize(("change", "param", "code"), OF_CHAT, ids=lambda v: str(v)[:50])
def test_bad_chats_are_refused(server, change, param, code):
    check_error(post(server, "/v1/chat/completions", {**CHAT, **change}), 400, param, code)


@pytest.mark.parametrize(("change", "param", "code"), OF_COMPLETIONS, ids=lambda v: str(v)[:50])
def test_bad_completions_are_refused(server, change, param, code):
    check_error(post(server, "/v1/completions", {**TEXT, **change}), 400, param, code)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "tiny",}', b"[1, 2]", b"null", b'"text"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000],
    ids=lambda b: repr(b[:20]),
)
def test_malformed_json_is_refused(server, route, body):
    response = server.http.post(route, content=body, headers={"content-type": "application/json; charset=utf-8"})
    check_error(response, 400, None, "invalid_json")


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 200_000], ids=["lists", "objects"])
def test_endless_nesting_is_said(server, body):
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert check_error(response, 400, None, "invalid_json") == "the body is nested too deeply"


def test_a_number_beyond_floats_is_out_of_range(server):
    body = b'{"model": "tiny", "prompt": "w3", "temperature": 1e400}'
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    check_error(response, 400, "temperature", "invalid_value")


def test_half_a_surrogate_pair_is_no_text(server):
    head = b'{"model": "tiny", "max_tokens": 3, '
    for route, rest, param in (
        ("/v1/completions", b'"prompt": "w3 \\ud800"}', "prompt"),
        ("/v1/completions", b'"prompt": ["w3", "\\udfff"]}', "prompt"),
        ("/v1/completions", b'"prompt": "w3", "stop": "\\ud800"}', "stop"),
        ("/v1/chat/completions", b'"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
    ):
        response = server.http.post(route, content=head + rest, headers={"content-type": "application/json"})
        check_error(response, 400, param, "invalid_value")


def test_a_body_of_another_type_is_refused(server):
    """A form that a web page sends without asking first must not start anything."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = server.http.post("/v1/completions", content=b"{}", headers={"content-type": kind})
        check_error(response, 415, None, "invalid_content_type")
    check_error(server.http.post("/v1/completions"), 415, None, "invalid_content_type")


def test_huge_prompts_are_refused(server):
    capacity = server.engine.capacity
    words = "w5 " * 100_000
    with pytest.raises(openai.BadRequestError, match=f"100000 tokens exceed the context of {capacity}") as caught:
        server.complete(words)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat(words)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="max_tokens 500"):
        server.complete("w3", max_tokens=500)
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        server.complete([1] * capacity)
    check_error(post(server, "/v1/completions", {**TEXT, "prompt": "x" * (17 << 20)}), 413, None, "body_too_large")


def test_an_unknown_model_is_not_found(server):
    for ask in (
        lambda: server.client.chat.completions.create(model="gpt", messages=CHAT["messages"]),
        lambda: server.client.completions.create(model="gpt", prompt="w3"),
        lambda: server.client.models.retrieve("some/other"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")


def test_unknown_routes_and_methods_have_the_same_shape(server):
    check_error(server.http.get("/v1/nothing"), 404, None, None)
    check_error(server.http.get("/v1/completions"), 405, None, None)
    check_error(server.http.post("/health"), 405, None, None)


def test_a_template_that_refuses_messages_is_the_clients_business(words, server):
    kept = words.tokenizer.chat_template
    words.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(openai.BadRequestError, match="roles must alternate") as caught:
            server.chat("w3")
        assert caught.value.param == "messages"
    finally:
        words.tokenizer.chat_template = kept
