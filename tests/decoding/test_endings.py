"""Where a text ends and what the caller holds then: stop strings, stop tokens, interrupts, prompts that do not fit."""

from __future__ import annotations

import pytest

from domino_spec import SamplingSettings, UserError, generate, stream
from domino_spec.decoding.request import Generation, Limits, StopStrings, TextStream
from tests.tiny import EOS, Oracle, byte_tokenizer, plain_greedy, random_prompts, run, tiny_draft, word_tokenizer

COUNT = 20


@pytest.fixture(scope="module")
def known(model):
    """A prompt and its continuation, long enough for drafts past the end."""
    prompt = random_prompts([6])[0]
    continuation = plain_greedy(model, prompt, COUNT + 8)
    return prompt, continuation


def words(tokens: list[int]) -> str:
    return " ".join(f"w{t}" for t in tokens)


def decode_words(text_target, known, **options) -> Generation:
    prompt, continuation = known
    oracle = Oracle([prompt + continuation], 6)
    oracle._cycle = 6
    (generation,) = run(text_target, oracle, [prompt], COUNT, **options)
    return generation


def test_text_is_the_decoded_tokens(text_target, known):
    generation = decode_words(text_target, known)
    assert generation.text == text_target.tokenizer.decode(known[1][:COUNT], skip_special_tokens=True)


@pytest.mark.parametrize("at", [0, 2, 5, 6, 9])
def test_a_stop_string_ends_the_text_before_it(text_target, known, at):
    _, continuation = known
    stop = f"w{continuation[at]} w{continuation[at + 1]}"
    generation = decode_words(text_target, known, limits=Limits(COUNT, (stop,), frozenset()))
    whole = words(continuation[:COUNT])
    assert generation.text == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"
    assert stop in words(generation.token_ids), "the tokens that completed it are kept"
    assert stop not in words(generation.token_ids[:-1])


def test_the_first_of_several_stop_strings_counts(text_target, known):
    _, continuation = known
    late, early = f"w{continuation[9]} w{continuation[10]}", f"w{continuation[3]} w{continuation[4]}"
    generation = decode_words(text_target, known, limits=Limits(COUNT, (late, early), frozenset()))
    whole = words(continuation[:COUNT])
    assert generation.text == whole[: min(whole.index(late), whole.index(early))]


def test_a_stop_token_leaves_no_trace_in_the_text(text_target, known):
    _, continuation = known
    stop = continuation[4]
    first = continuation.index(stop)
    generation = decode_words(text_target, known, limits=Limits(COUNT, stop_token_ids=frozenset({stop})))
    assert generation.text == words(continuation[:first])
    assert generation.token_ids == continuation[: first + 1]


def test_the_targets_own_stop_tokens_are_the_default(text_target):
    forced = SamplingSettings(logit_bias={EOS: 1e4})
    (result,) = generate(text_target, None, ["w3 w4"], settings=forced, max_new_tokens=5)
    assert (result.token_ids, result.text, result.finish_reason) == ([EOS], "", "stop")


def test_streamed_generations_only_ever_grow(text_target, known):
    prompt, continuation = known
    seen = [""]
    for (generation,) in stream(text_target, tiny_draft(text_target), [prompt], max_new_tokens=COUNT):
        assert generation.text.startswith(seen[-1])
        seen.append(generation.text)
    assert len(seen) > 5
    stop_at = continuation.index(EOS) if EOS in continuation[:COUNT] else COUNT
    assert seen[-1] == text_target.tokenizer.decode(continuation[:stop_at], skip_special_tokens=True)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_partial_text_survives_an_exception_in_the_consumer(text_target, known, interrupt):
    prompt, continuation = known
    kept: list[Generation] = []
    with pytest.raises(interrupt):
        for cycle, _ in enumerate(
            stream(text_target, None, [prompt, prompt], max_new_tokens=COUNT, generations=kept), start=1
        ):
            if cycle == 4:
                raise interrupt
    for generation in kept:
        assert generation.token_ids == continuation[:4]
        assert generation.text == words(continuation[:4])
        assert generation.finish_reason is None


def test_partial_text_survives_an_interrupt_inside_the_target(text_target, known, monkeypatch):
    prompt, continuation = known
    kept: list[Generation] = []
    original, calls = text_target.forward, 0

    def forward(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:  # one prefill pass, three cycles
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(text_target, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        list(stream(text_target, None, [prompt], max_new_tokens=COUNT, generations=kept))
    assert kept[0].token_ids == continuation[:3]


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "no prompt given"),
        ([[]], {}, r"prompts\[0\] is empty"),
        ([""], {}, "the prompt is empty"),
        ([[1] * 510], {"max_new_tokens": 3}, "exceed the context of 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -0.1}, "temperature must not be negative"),
        ([[1]], {"top_p": 0.0}, "top_p must be greater than 0"),
        ([[1]], {"top_p": 1.1}, "top_p must be greater than 0"),
        ([[1]], {"top_k": -1}, "top_k must not be negative"),
        ([[1]], {"stop": [""]}, "stop string must not be empty"),
        ([[1]], {"num_drafts": -1}, "num_drafts must not be negative"),
        ([[1]], {"candidates": 0}, "candidates must be at least 1"),
        ([[1]], {"method": "magic"}, "unknown method 'magic'"),
        ([[1]], {"method": "domino"}, "method domino needs a draft"),
        ([[1]], {"method": "dflash"}, "method dflash needs a draft"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_line(text_target, prompts, options, message):
    with pytest.raises(UserError, match=message) as error:
        generate(text_target, None, prompts, **options)
    assert "\n" not in str(error.value)


def test_a_prompt_that_fills_the_context_exactly_is_served(target):
    (generation,) = run(target, Oracle([[1] * 600], 6), [[1] * 509], 3)
    assert generation.num_tokens == 3


def test_text_needs_a_tokenizer(target):
    with pytest.raises(UserError, match="no tokenizer"):
        generate(target, None, ["w1"])
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        generate(target, None, [[1]], stop=["x"])


@pytest.mark.parametrize("token", [-1, 60, 10**6])
def test_token_ids_outside_the_vocabulary_are_refused(target, token):
    with pytest.raises(UserError, match="vocabulary"):
        generate(target, None, [[1, token]], max_new_tokens=2)


# ---- text piece by piece ----

TEXT = "Grüße, 你好!\nline two\n\n🙂 end\n"


def test_streamed_pieces_add_up_to_the_decoded_text():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT), "some characters must take several tokens"
    pieces = [stream.push([i], final=n == len(ids) - 1) for n, i in enumerate(ids)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_are_given_out_as_soon_as_their_bytes_are_there():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    first, second = tokenizer("ü")["input_ids"]
    assert [stream.push([first]), stream.push([second])] == ["", "ü"]


def test_an_unfinished_character_is_given_out_at_the_end():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    first, _ = tokenizer("ü")["input_ids"]
    assert stream.push([first], final=True) == "\ufffd"


def test_words_keep_their_spaces_when_streamed():
    tokenizer = word_tokenizer()
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in (5, 6, 7)) == "w5 w6 w7"


def test_stop_strings_are_found_across_pieces():
    stop = StopStrings(["END", "halt"])
    text = ""
    found = None
    for piece in ["so E", "N", "D and halt"]:
        text += piece
        found = stop.find(text)
        if found is not None:
            break
    assert found == text.index("END")


def test_the_earliest_stop_string_wins():
    assert StopStrings(["zz", "b"]).find("abczz") == 1
    assert StopStrings([]).find("abc") is None


def test_text_that_may_begin_a_stop_string_is_held_back():
    stop = StopStrings(["END"])
    assert stop.safe_length("so EN") == 3
    assert stop.safe_length("so far") == 6
    assert stop.safe_length("E") == 0
