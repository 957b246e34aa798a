"""Prompts: chat templates, raw texts, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from domino_spec.settings import UserError
from domino_spec.target.text import ChatTemplateError, encode_prompt, render_chat
from tests.cli_fixtures import fail, make_target_dir  # noqa: F401
from tests.tiny import word_tokenizer


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
