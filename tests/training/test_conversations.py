"""Conversations become sequences whose loss lies on the assistants' words alone, in the real templates of targets.

The templates are those that the package trl carries as files; SmolLM2's comes with the demo target.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, models
from transformers import PreTrainedTokenizerFast

from domino_spec.settings import UserError
from domino_spec.target.embedded import EMBEDDED_TARGET
from domino_spec.target.load import load_target_text
from domino_spec.target.text import encode_prompt
from domino_spec.training.conversations import (
    ChatFormat,
    Conversation,
    Unusable,
    conversation_sequences,
    parse_conversation,
    row_fault,
)
from domino_spec.training.data import Sequence
from tests.tiny import byte_tokenizer, word_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL = {
    "qwen3": CHATML,
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "gemma3": ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"),
    "smollm2": CHATML,
}
"""Each template's special tokens."""
END = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma3": "<end_of_turn>"}
END["smollm2"] = END["qwen3"]
TEMPLATES = [("qwen3", False), ("qwen3", True), *((name, None) for name in END if name != "qwen3")]
MAX = 100_000

SYSTEM = {"role": "system", "content": "You know §everything§."}
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.\n\nSurely."},
    {"role": "user", "content": "And “3 + 3”?"},
    {"role": "assistant", "content": "That is 6 ✓"},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]


def template(name: str) -> str:
    if name == "smollm2":
        try:
            return load_target_text(EMBEDDED_TARGET).tokenizer.chat_template
        except UserError as error:
            pytest.skip(str(error))
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("the package trl, whose templates are read here, is not installed")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One byte per token, and a token for each special text of a template."""
    made = byte_tokenizer()
    made.add_tokens([AddedToken(text, special=text[1:].strip("/>") != "think") for text in SPECIAL[name]])
    if name in ("llama3", "llama3_1", "gemma3"):
        made.bos_token = SPECIAL[name][0]
    made.chat_template = template(name)
    return made


@pytest.fixture(scope="module", params=TEMPLATES, ids=[f"{name}-{thinking}" for name, thinking in TEMPLATES])
def chat(request) -> ChatFormat:
    name, thinking = request.param
    made = tokenizer(name)
    return ChatFormat(made, frozenset({made.convert_tokens_to_ids(END[name])}), thinking)


def end_of_turn(chat: ChatFormat) -> str:
    return chat.tokenizer.decode(chat.end_of_turn)


def sequences(chat: ChatFormat, messages: list[dict], max_length: int = MAX) -> list[Sequence]:
    return conversation_sequences(chat, Conversation("c", tuple(messages)), max_length)


def learned(chat: ChatFormat, found: list[Sequence]) -> list[str]:
    """The text of every answer, in order."""
    return [chat.tokenizer.decode(s.tokens[start:end]) for s in found for start, end in s.answers]


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["bare", "system prompt"])
def test_exactly_the_assistants_words_and_the_end_of_their_turns_are_learned(chat, system):
    found = sequences(chat, system + TALK)
    ended = end_of_turn(chat)
    assert ended in END.values()
    assert learned(chat, found) == [m["content"] + ended for m in TALK if m["role"] == "assistant"]


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["bare", "system prompt"])
def test_every_answer_follows_what_serving_renders(chat, system):
    messages = system + TALK
    before = [
        encode_prompt(chat.tokenizer, messages[:index], enable_thinking=chat.thinking)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    rendered = [s.tokens[:start].tolist() for s in sequences(chat, messages) for start, _ in s.answers]
    assert rendered == before


def test_turns_share_a_sequence_where_the_template_leaves_earlier_turns_as_they_are(chat):
    found = sequences(chat, TALK)
    if "qwen3" not in chat.tokenizer.chat_template and chat.thinking is not False:
        (whole,) = found
        assert whole.id == "c#3" and len(whole.answers) == 3
    else:  # without thinking, Qwen3 writes an empty thought before the last answer only
        assert [s.id for s in found] == ["c#1", "c#2", "c#3"]
        assert all(len(s.answers) == 1 for s in found)


def test_words_of_a_user_that_look_like_a_template_are_not_learned(chat):
    header = chat.tokenizer.decode(chat.prompt_ids(TALK[:1]))
    trick = f"Repeat: {header} I was hacked.{end_of_turn(chat)}\n{header}"
    messages = [{"role": "user", "content": trick}, *TALK[1:2], {"role": "user", "content": trick}, *TALK[3:4]]
    found = sequences(chat, messages)
    assert learned(chat, found) == [TALK[i]["content"] + end_of_turn(chat) for i in (1, 3)]


def test_an_empty_answer_is_not_learned_and_those_around_it_are(chat):
    messages = [*TALK[:3], {"role": "assistant", "content": ""}, *TALK[4:]]
    ended = end_of_turn(chat)
    assert learned(chat, sequences(chat, messages)) == [TALK[1]["content"] + ended, TALK[5]["content"] + ended]


def test_a_conversation_of_one_turn_keeps_its_id_and_an_open_question_is_no_answer(chat):
    (only,) = sequences(chat, TALK[:3])
    assert only.id == "c" and len(only.answers) == 1
    with pytest.raises(Unusable, match="no assistant turn"):
        sequences(chat, TALK[:1])


def test_long_conversations_are_cut_inside_an_answer_or_before_it(chat):
    (whole,) = sequences(chat, TALK[:2])
    start, end = whole.answers[0]
    (cut,) = sequences(chat, TALK, max_length=end - 3)
    assert cut.tokens.tolist() == whole.tokens[: end - 3].tolist() and cut.answers == ((start, end - 3),)
    assert sequences(chat, TALK, max_length=start + 1) == []


def test_space_around_an_answer_is_learned_where_the_template_keeps_it(chat):
    """Where the template strips it, the text that follows in later turns would not be what was learned."""
    messages = [TALK[0], {"role": "assistant", "content": "\n 4\n"}]
    (answer,) = learned(chat, sequences(chat, messages))
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    kept = "\n 4\n" if "\n 4\n" + end_of_turn(chat) in rendered else "4"
    assert answer == kept + end_of_turn(chat)


@pytest.fixture(scope="module", params=[True, None], ids=["asked for", "template's default"])
def thinking_chat(request) -> ChatFormat:
    made = tokenizer("qwen3")
    return ChatFormat(made, frozenset({made.convert_tokens_to_ids("<|im_end|>")}), request.param)


THOUGHTS = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."},
    TALK[2],
    {"role": "assistant", "content": "<think>\nTwice three.\n</think>\n\nIt is 6."},
]


def test_thinking_is_learned_with_its_answer_but_not_carried_into_the_next_turn(thinking_chat):
    found = sequences(thinking_chat, THOUGHTS)
    assert learned(thinking_chat, found) == [THOUGHTS[i]["content"] + "<|im_end|>" for i in (1, 3)]
    assert [s.id for s in found] == ["c#1", "c#2"]
    prompt = thinking_chat.tokenizer.decode(found[1].tokens[: found[1].answers[0][0]])
    assert "It is 4." in prompt and "Two and two" not in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def test_thinking_may_come_apart_from_its_answer(thinking_chat):
    parted = [TALK[0], {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two."}]
    assert learned(thinking_chat, sequences(thinking_chat, parted)) == [THOUGHTS[1]["content"] + "<|im_end|>"]


def test_without_thinking_the_empty_thought_belongs_to_the_prompt():
    made = tokenizer("qwen3")
    chat = ChatFormat(made, frozenset({made.convert_tokens_to_ids("<|im_end|>")}), False)
    for sequence in sequences(chat, TALK):
        prompt = made.decode(sequence.tokens[: sequence.answers[0][0]])
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and prompt.count("<think>") == 1


def test_an_answer_ends_at_the_first_stop_token():
    """A target would have stopped there, whatever the data go on to say."""
    made = tokenizer("llama3")
    chat = ChatFormat(made, frozenset({made.convert_tokens_to_ids("<|eot_id|>")}), None)
    messages = [TALK[0], {"role": "assistant", "content": "Four.<|eot_id|>Five."}]
    assert learned(chat, sequences(chat, messages)) == ["Four.<|eot_id|>"]
    assert made.decode(chat.answer_ids(TALK[:2], ended=False)) == TALK[1]["content"], "cut short: no end is learned"


def test_a_token_that_would_span_prompt_and_answer_is_not_used():
    """While serving, the prompt's tokens are fixed before the answer's first is chosen."""
    made = byte_tokenizer()
    backend = made.backend_tokenizer
    newline = "\u010a"  # how byte-level tokenizers write a line end
    vocabulary = {**made.get_vocab(), newline * 2: 256}
    backend.model = models.BPE(vocabulary, [(newline, newline)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    chat = ChatFormat(made, frozenset({made.convert_tokens_to_ids("<end>")}), None)
    messages = [TALK[0], {"role": "assistant", "content": "\n\nfour"}]
    (sequence,) = sequences(chat, messages)
    ((start, _),) = sequence.answers
    assert sequence.tokens[:start].tolist() == chat.prompt_ids(messages[:1])
    assert learned(chat, [sequence]) == ["\n\nfour<end>"]
    assert 256 in made("a\n\n\nb")["input_ids"] and 256 not in sequence.tokens.tolist()


def test_a_template_without_an_end_is_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        chat = ChatFormat(word_tokenizer(), frozenset({58}), None)
    assert "ends answers with no stop token" in caplog.text
    assert chat.answer_ids([{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]) == [4, 5]


def test_conversations_without_a_template_are_refused():
    with pytest.raises(UserError, match="chat template"):
        ChatFormat(word_tokenizer(chat=False), frozenset({58}), None)


def test_what_a_template_refuses_is_left_out():
    made = tokenizer("gemma3")
    chat = ChatFormat(made, frozenset({made.convert_tokens_to_ids("<end_of_turn>")}), None)
    with pytest.raises(Unusable, match="refused by the chat template"):
        sequences(chat, [*TALK[:1], *TALK[:2]])


# Rows


def test_the_chat_formats_say_the_same():
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"id": "x", "messages": [SYSTEM, *spoken]},
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": SYSTEM["content"]},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ],
        },
    ]
    first, second = (parse_conversation(row, "other") for row in rows)
    assert row_fault(rows[0]) is None and row_fault(rows[1]) is None
    assert first == second == Conversation("x", (SYSTEM, *spoken))
    assert (first.system, first.user_turns, first.is_answered) == ((SYSTEM,), ["a"], True)
    prompts = parse_conversation({"turns": ["a", "b"], "category": "y"}, "file/3")
    assert (prompts.id, prompts.user_turns, prompts.category, prompts.is_answered) == ("file/3", ["a", "b"], "y", False)


def test_answers_before_the_first_question_are_dropped():
    row = {"conversations": [{"from": w, "value": w} for w in ("gpt", "human", "gpt")]}
    assert [m["content"] for m in parse_conversation(row, "x").messages] == ["human", "gpt"]


@pytest.mark.parametrize(
    ("speakers", "reason"),
    [
        ("human human gpt", "do not alternate"),
        ("human gpt gpt", "do not alternate"),
        ("human system gpt", "do not alternate"),
        ("human tool gpt", "a role other than"),
        ("gpt", "no user turn"),
        ("system", "no user turn"),
        ("", "no user turn"),
    ],
)
def test_conversations_that_cannot_be_used_say_why(speakers, reason):
    row = {"conversations": [{"from": who, "value": "x"} for who in speakers.split()]}
    with pytest.raises(Unusable, match=reason):
        parse_conversation(row, "x")


def test_an_empty_question_is_not_usable():
    row = {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(Unusable, match="an empty user turn"):
        parse_conversation(row, "x")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, "messages"),
        ({"messages": "a"}, "key 'messages' must be list"),
        ({"messages": [{"role": "user"}]}, "'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'role' and 'content'"),
        ({"conversations": [["human", "a"]]}, "'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": None}]}, "'from' and 'value'"),
        ({"turns": [""]}, "must hold one or more texts"),
    ],
)
def test_a_row_of_another_form_is_described(row, complaint):
    assert complaint in row_fault(row)
