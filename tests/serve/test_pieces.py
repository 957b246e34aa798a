"""What a stream shows of characters of several tokens and of stop strings, and how single tokens look."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from domino_spec.decoding.request import Ending, Limits, Request, TokenLogprob, showable
from domino_spec.serve.answers import LEAST_LOGPROB, Answers, TokenTexts
from domino_spec.serve.protocol import ChatCompletionRequest, CompletionRequest, Served, parse
from domino_spec.serve.runner import Progress, make_job
from tests import tiny

TEXT = "Straße, 東京 🙂 naïve.\nA second line; and STOP here."


@pytest.fixture(scope="module")
def target():
    return tiny.tiny_target(tokenizer=tiny.byte_tokenizer(), vocab_size=256)


def answers_while_growing(target, stop: tuple[str, ...], sizes: list[int], chat: bool):
    """Yields the answers to one request after every cycle of so many tokens."""
    tokens = target.tokenizer(TEXT)["input_ids"]
    limits = Limits(len(tokens), stop)
    job = make_job(Request([1], limits=limits, top_logprobs=0), asyncio.Event())
    body = dict(model="m", stop=list(stop), stream=True, stream_options={"include_usage": True})
    served = Served("m", 256, 100, 1)
    if chat:
        body |= dict(messages=[{"role": "user", "content": "x"}], logprobs=True)
        asked = parse(ChatCompletionRequest, json.dumps(body).encode(), served)
    else:
        asked = parse(CompletionRequest, json.dumps(body | dict(prompt="x", logprobs=0)).encode(), served)
    answers = Answers(asked, [job], [""], "f", TokenTexts(target.tokenizer))
    ending, rest = Ending(target, limits), itertools.cycle(sizes)
    generation = job.generation
    while tokens and generation.finish_reason is None:
        size = next(rest)
        ending.append(generation, tokens[:size], size, [TokenLogprob(-1.0, ())] * size)
        tokens = tokens[size:]
        shown = showable(generation, job.stop)
        job.progress = Progress(generation.num_tokens, shown, generation.finish_reason)
        yield answers


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stop", [(), ("STOP",), ("e, 東",), ("STOP", "OPq", "京 ")])
@pytest.mark.parametrize("sizes", [[1], [3, 1, 7], [100]])
def test_pieces_are_whole_characters_and_are_never_taken_back(target, chat, stop, sizes):
    end = min((TEXT.index(s) for s in stop if s in TEXT), default=len(TEXT))
    shown, tokens, last = "", [], None
    for answers in answers_while_growing(target, stop, sizes, chat):
        for chunk in answers.chunks():
            last = chunk = json.loads(chunk.json_bytes())
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content", "") if chat else choice["text"]
                shown += piece
                assert "\ufffd" not in piece and TEXT[:end].startswith(shown)
                found = choice["logprobs"]
                if found:
                    tokens += [t["bytes"] for t in found["content"]] if chat else found["tokens"]
    assert shown == TEXT[:end]
    assert last is not None and last["choices"] == [] and last["usage"]["completion_tokens"] >= len(tokens)
    if chat:
        assert b"".join(map(bytes, tokens)).decode() == TEXT[:end]
    else:
        assert len(tokens) == len(TEXT[:end].encode())


def test_a_token_has_its_text_and_its_bytes(target):
    texts = TokenTexts(target.tokenizer)
    e_acute = target.tokenizer("é")["input_ids"]
    assert [texts.bytes(t) for t in e_acute] == [[0xC3], [0xA9]]
    assert [texts.text(t) for t in e_acute] == ["bytes:\\xc3", "bytes:\\xa9"]
    (space,) = target.tokenizer(" ")["input_ids"]
    assert (texts.text(space), texts.bytes(space)) == (" ", [32])
    assert texts.record(space, float("-inf"))["logprob"] == LEAST_LOGPROB


def test_a_word_is_shown_with_the_space_before_it():
    texts = TokenTexts(tiny.word_tokenizer())
    assert (texts.text(5), texts.bytes(5)) == (" w5", list(b" w5"))
    assert texts.text(tiny.EOS).strip() == "<eos>"
