"""Requests without a server: what JSON may say in several ways, and what a wrong value costs."""

from __future__ import annotations

import json

import pytest

from domino_spec.serve.protocol import ApiError, ChatCompletionRequest, CompletionRequest, Served, parse

SERVED = Served("m", 60, 100, 4)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "w3"}]}
TEXT = {"model": "m", "prompt": "w3"}


def refused(kind, body: dict) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, json.dumps(body).encode(), SERVED)
    return caught.value


@pytest.mark.parametrize(("kind", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, TEXT)])
def test_null_means_absent(kind, body):
    plain = parse(kind, json.dumps(body).encode(), SERVED)
    nulls = {name: None for name in kind.model_fields if name not in body} | {"tools": None, "user": None}
    assert parse(kind, json.dumps(body | nulls).encode(), SERVED) == plain
    options = {"stream": True, "stream_options": {"include_usage": None}, "logit_bias": {"5": None}}
    asked = parse(kind, json.dumps(body | options).encode(), SERVED)
    assert not asked.include_usage and asked.logit_bias == {}


def test_a_whole_number_may_have_a_decimal_point():
    asked = parse(CompletionRequest, b'{"model": "m", "prompt": [3], "max_tokens": 4.0, "seed": 5.0}', SERVED)
    assert (asked.length, asked.sampling(60).seed) == (4, 5)


def test_fields_that_ask_for_nothing_are_accepted():
    harmless = {"tools": [], "response_format": {"type": "text"}, "min_tokens": 0, "metadata": {"a": 1}, "user": "x"}
    assert parse(ChatCompletionRequest, json.dumps(CHAT | harmless).encode(), SERVED).prompts == [
        [{"role": "user", "content": "w3"}]
    ]


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatCompletionRequest, CHAT | {"messages": [1] * 10**5}, "messages[0]"),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [{"role": "user", "content": [1] * 10**5}]},
            "messages[0].content[0]",
        ),
        (CompletionRequest, TEXT | {"stop_token_ids": ["a"] * 10**5}, "stop_token_ids[0]"),
        (CompletionRequest, TEXT | {"logit_bias": {str(i): "a" for i in range(10**5)}}, "logit_bias"),
    ],
    ids=["messages", "parts", "token ids", "biases"],
)
def test_a_long_list_of_wrong_values_is_one_short_error(kind, body, param):
    error = refused(kind, body)
    assert error.param == param and len(error.message) < 200


def test_the_first_wrong_field_is_named_and_the_model_before_all_others():
    assert refused(CompletionRequest, {"model": "other", "prompt": 5, "tools": [1]}).status == 404
    assert refused(CompletionRequest, TEXT | {"prompt": 5, "tools": [1]}).param == "tools"
    error = refused(CompletionRequest, TEXT | {"temperature": 3, "n": 1.5})
    assert (error.param, error.message) == ("n", "n: expected integer, found 1.5 (float)")
