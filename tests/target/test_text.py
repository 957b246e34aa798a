"""Text in and text out: chat prompts, streaming without broken characters, stop strings."""

from __future__ import annotations

import json
import shutil

import pytest

from domino_spec.settings import UserError
from domino_spec.target.text import ChatTemplateError, StopStrings, TextStream, encode_prompt, render_chat
from tests.cli_fixtures import fail, make_target_dir  # noqa: F401
from tests.tiny import byte_tokenizer, word_tokenizer


def test_a_text_becomes_a_user_turn_of_the_chat_template():
    tokenizer = word_tokenizer()
    assert encode_prompt(tokenizer, "w7 w8") == [1, 7, 8, 2]
    assert encode_prompt(tokenizer, [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w9"}]) == [
        *(1, 7, 2),
        *(1, 9, 2),
    ]


def test_raw_text_is_not_wrapped():
    assert encode_prompt(word_tokenizer(), "w7 w8", chat=False) == [7, 8]
    assert encode_prompt(word_tokenizer(chat=False), "w7 w8") == [7, 8]


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="prompt"):
        encode_prompt(word_tokenizer(), prompt)


def test_chat_without_a_template_is_refused():
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(word_tokenizer(chat=False), [{"role": "user", "content": "w7"}])


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


def test_thinking_is_off_unless_asked_for():
    """A draft trained on answers without thinking must not meet prompts with it."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ 'w9' if enable_thinking else 'w8' }} {{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, "w3") == [8, 3]
    assert encode_prompt(tokenizer, "w3", enable_thinking=True) == [9, 3]


TEMPLATES = {
    "one that raises": ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must"),
    "one that divides by zero": ("{{ 1 / 0 }}", "cannot be used: ZeroDivisionError"),
    "one that recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be used: maximum recursion"),
    "one that does not parse": ("{% for %}", "cannot be used: TemplateSyntaxError"),
    "one that leaves the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be used: SecurityError"),
    "one that changes the messages": ("{{ messages.append(1) }}", "cannot be used: SecurityError"),
    "one that imports": ("{% include '/etc/passwd' %}", "cannot be used: TypeError"),
    "one that is endless": ("{% for i in range(10 ** 12) %}{% endfor %}", "cannot be used: OverflowError"),
    "one that wants an unknown name": ("{{ nothing.at.all }}", "cannot be used: UndefinedError"),
    "a number": (5, "cannot be used: TypeError"),
    "a list": (["{{ messages }}"], "cannot be used"),
    "several without a default": ({"other": "x"}, "cannot be used"),
}


@pytest.mark.parametrize(("template", "said"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(template, said):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "w3"}]
    for use in (
        lambda: encode_prompt(tokenizer, "w3"),
        lambda: encode_prompt(tokenizer, messages),
        lambda: render_chat(tokenizer, messages, add_generation_prompt=True),
    ):
        with pytest.raises(ChatTemplateError, match=said) as error:
            use()
        assert "\n" not in str(error.value)


def test_a_prompt_that_the_tokenizer_cannot_encode_is_one_line():
    with pytest.raises(UserError, match="not valid UTF-8"):
        encode_prompt(word_tokenizer(), "\ud800", chat=False)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
def test_templates_of_a_checkpoint_stay_in_the_sandbox(tmp_path, target_dir, place):
    copy = shutil.copytree(target_dir, tmp_path / "target")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    marker = tmp_path / "it ran"
    escape = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    if place == "tokenizer_config.json":
        held = json.loads((copy / place).read_text())
        (copy / place).write_text(json.dumps({**held, "chat_template": escape}))
    else:
        file = copy / place if place.endswith(".jinja") else copy / place / "default.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(escape)
    line = fail("generate", "w3", "--target", copy)
    assert "the chat template of" in line and "cannot be used: SecurityError" in line
    assert not marker.exists()
