"""The SGLang plug-in inside a real SGLang server, on CPU in fp32: what it drafts, lets out, and gains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import sglang_engine  # noqa: F401, before SGLang: it says where stand-ins for kernels are

pytest.importorskip("sglang")

import openai
from scipy.stats import chi2
from tokenizers import Tokenizer

from domino_spec.draft.checkpoint import read_draft, save_draft
from domino_spec.draft.load import EMBEDDED_DRAFT, draft_directory, load_draft
from domino_spec.target.load import embedded_target_directory, load_target
from tests.engines.sglang_engine import (
    Capture,
    acceptance_length,
    by_text,
    our_drafts,
    save_tiny_pair,
    server,
)

pytestmark = pytest.mark.slow

COUNT = 40
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1 2 3 4 5 6 7 8",
    "<|im_start|>user\nWhat is 12 times 12?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nExplain why the sky is blue.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by a river, there lived a miller who had three sons. The eldest",
]


@pytest.fixture(scope="module")
def target_directory():
    return Path(embedded_target_directory())


@pytest.fixture(scope="module")
def prompts(target_directory):
    tokenizer = Tokenizer.from_file(str(target_directory / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def plain(target_directory, prompts, tmp_path_factory):
    """What the same engine writes without a draft."""
    with server(tmp_path_factory.mktemp("plain"), target_directory) as running:
        return [answer["output_ids"] for answer in running.generate(prompts, COUNT)]


@pytest.fixture(scope="module")
def without_head(target_directory, prompts, tmp_path_factory):
    """What it answers with the demo draft whose head corrects nothing."""
    directory = tmp_path_factory.mktemp("headless")
    draft = read_draft(draft_directory(EMBEDDED_DRAFT))
    draft.head.correction_weight.zero_()
    save_draft(draft, directory / "draft")
    with server(directory, target_directory, directory / "draft") as running:
        return running.generate(prompts, COUNT)


@dataclass
class Served:
    """What the server that a user starts with the demo draft answered."""

    together: list[dict]
    """To all prompts at once."""
    alone: list[tuple[list[int], list[int], dict[int, list[int]]]]
    """To one after another: prompt, answer, and what was drafted by the length of the text before it."""
    chat: Any
    """To the `openai` client."""
    streamed: str


@pytest.fixture(scope="module")
def domino(target_directory, prompts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("domino")
    capture = Capture(directory / "drafts.jsonl")
    with server(directory, target_directory, draft_directory(EMBEDDED_DRAFT), capture=capture.path) as running:
        together = running.generate(prompts, COUNT)
        capture.fresh()
        alone = []
        for prompt in prompts[1:6:2]:
            answer = running.generate([prompt], COUNT)[0]["output_ids"]
            alone.append((prompt, answer, by_text(capture.fresh(), prompt, answer)))
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none")
        messages = [{"role": "user", "content": "Name three primary colours."}]
        asked = dict(model="default", messages=messages, max_tokens=24, temperature=0)
        chat = client.chat.completions.create(**asked)
        chunks = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return Served(together, alone, chat, streamed)


def test_greedy_text_is_that_of_plain_decoding(plain, domino):
    assert [answer["output_ids"] for answer in domino.together] == plain
    assert [answer for _, answer, _ in domino.alone] == plain[1:6:2]


def test_drafts_are_accepted_and_the_head_earns_its_place(domino, without_head, plain):
    assert [answer["output_ids"] for answer in without_head] == plain
    assert acceptance_length(domino.together) > max(1.5, acceptance_length(without_head))


def test_drafts_are_those_of_our_own_engine(domino, target_directory):
    target = load_target(str(target_directory), dtype=torch.float32)
    draft = load_draft(EMBEDDED_DRAFT, target)
    for prompt, answer, drafted in domino.alone:
        assert len(drafted) > 5
        for length, drafts in drafted.items():
            assert drafts == our_drafts(target, draft, (prompt + answer)[:length])


def test_the_openai_client_is_served(domino):
    assert domino.chat.choices[0].message.content == domino.streamed != ""
    assert domino.chat.usage.completion_tokens == 24


def test_sampled_text_follows_the_target_whatever_the_draft(tmp_path):
    """A tiny pair in the other conventions: own positions, a pure prefix of two, a draft vocabulary, the older name.

    The counts of all texts of three tokens against the target's own probabilities: chi-square with a false alarm in a
    million runs, cells of fewer than five expected joined.
    """
    vocab, samples, prompt = 12, 6000, [3, 1, 4, 1, 5]
    directory, draft_path, _, target = save_tiny_pair(
        tmp_path, vocab_size=vocab, draft_vocab_ids=torch.arange(0, vocab - 1), shift_label=False, prefix=2
    )
    config = json.loads((draft_path / "config.json").read_text())
    (draft_path / "config.json").write_text(json.dumps(config | {"architectures": ["DFlashDraftModel"]}))
    notes = tmp_path / "drafts.jsonl"
    with server(tmp_path, directory, draft_path, "--skip-tokenizer-init", capture=notes) as running:
        answers = [
            answer
            for _ in range(samples // 500)
            for answer in running.generate([prompt] * 500, 4, temperature=0.9, top_k=8)
        ]
        greedy = running.generate([prompt], 12)[0]["output_ids"]
    texts = torch.tensor([prompt + list(text) for text in product(range(vocab), repeat=4)])
    with torch.no_grad():
        logits = target.model(texts[:, :-1]).logits[:, len(prompt) - 1 :] / 0.9  # [texts, 4, V]
        kept = logits >= logits.topk(8, dim=-1).values[..., -1:]
        logprobs = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    probs = logprobs.gather(2, texts[:, len(prompt) :, None])[..., 0].sum(1).exp().view(-1, vocab).sum(1)
    codes = torch.tensor([answer["output_ids"][:3] for answer in answers]) @ torch.tensor([vocab**2, vocab, 1])
    observed = torch.bincount(codes, minlength=vocab**3)
    assert observed[probs == 0].sum() == 0
    expected, common = probs * samples, probs * samples >= 5
    cells = [torch.cat((counts[common], counts[~common].sum()[None])).double() for counts in (observed, expected)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum().item()
    assert statistic < chi2.isf(1e-6, len(cells[0]) - 1)
    drafted = [json.loads(line) for line in notes.read_text().splitlines()]
    assert any(line["sampled"] for line in drafted)
    assert acceptance_length(answers) > 1.1
    assert greedy == target_greedy(target, prompt, 12)


def target_greedy(target, prompt, count):
    """Plain decoding by transformers' own model."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(target.model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]
