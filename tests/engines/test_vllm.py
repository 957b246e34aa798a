"""The vLLM plug-in inside a real vLLM, on CPU in fp32: what it drafts, what it lets out, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import EMBEDDED_DRAFT, draft_directory, load_draft
from domino_spec.engines.drafting import ALLOW_OTHER_TARGET
from domino_spec.engines.hooks import Hook
from domino_spec.engines.vllm import install
from domino_spec.settings import UserError
from domino_spec.target.load import embedded_target_directory, load_target
from tests import tiny
from tests.engines.vllm_engine import by_text, engine, our_drafts, recorded, save_pair, tiny_llama
from tests.tiny import target_probs

EVERY_SECOND = torch.arange(0, tiny.VOCAB, 2)
COUNT = 24
# The last one ends at the last token but one that the engine has room for.
PROMPTS = tiny.random_prompts([3, 17, 9, 1, 103])


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    """What the same engine writes without a draft."""
    target, _ = save_pair(tmp_path_factory.mktemp("plain"), llama)
    with engine(target) as running:
        return running.generate(PROMPTS, COUNT)


def released(draft: Path) -> None:
    """Rewrite a checkpoint as older releases have it: another architecture's name, and the head nested."""
    config = json.loads((draft / "config.json").read_text()) | {"architectures": ["DFlashDraftModel"]}
    (draft / "config.json").write_text(json.dumps(config))
    tensors = load_file(draft / "model.safetensors")
    head = {name for name in tensors if name.startswith(("prefix_gru", "embed_proj"))}
    save_file({("logit_head." if n in head else "") + n: t for n, t in tensors.items()}, draft / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "num_drafts", "layout"),
    [
        (dict(shift_label=True), 5, None),
        (dict(shift_label=True, draft_vocab_ids=EVERY_SECOND), 3, None),
        (dict(shift_label=False), 4, released),
        (dict(shift_label=False, draft_vocab_ids=EVERY_SECOND, prefix=0), 2, None),
    ],
    ids=["shifted", "shifted-vocabulary-fewer", "own-position-released", "own-position-vocabulary-fewer"],
)
def test_greedy_text_is_that_without_a_draft_and_drafts_are_those_of_this_package(
    llama, plain, tmp_path, options, num_drafts, layout
):
    target, draft = save_pair(tmp_path, llama, **options)
    if layout:
        layout(draft)
    with recorded() as records, engine(target, draft, num_drafts) as running:
        texts = running.generate(PROMPTS, COUNT)
        counted = running.metrics()
    assert texts == plain
    assert counted["accepted_tokens"] > 0
    theirs = by_text(records, texts, PROMPTS)
    ours_target = tiny.as_target(llama)
    ours = our_drafts(ours_target, load_draft(draft, ours_target), PROMPTS, COUNT, num_drafts)
    common = theirs.keys() & ours.keys()
    assert len(common) > 0.9 * len(theirs)
    assert {text: theirs[text] for text in common} == {text: ours[text] for text in common}


def test_a_plain_dflash_draft_is_left_to_vllm(llama, plain, tmp_path):
    from vllm.v1.spec_decode.dflash import DFlashProposer

    target, draft = save_pair(tmp_path, llama, head=None, shift_label=False)
    with engine(target, draft, 4) as running:
        texts = running.generate(PROMPTS, COUNT)
        core = running.llm.llm_engine.engine_core.engine_core
        kind = type(core.model_executor.driver_worker.worker.model_runner.drafter)
    assert texts == plain
    assert kind is DFlashProposer


SAMPLED = SamplingSettings(temperature=0.8, top_p=0.9)
SAMPLES = 4000


def exact_distributions(llama, prompt: list[int]) -> list[torch.Tensor]:
    """Probabilities of the first three tokens after a prompt, each [V]: sums over all texts that lead there."""

    @torch.inference_mode()
    def following(texts: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [target_probs(llama(part).logits[:, -1:], SAMPLED)[:, 0] for part in texts.split(600)]
        ).double()

    texts, weights, marginals = torch.tensor([prompt]), torch.ones(1, dtype=torch.double), []
    for _ in range(3):
        joint = weights[:, None] * following(texts)  # [texts, V]
        marginals.append(joint.sum(0))
        tokens = torch.arange(tiny.VOCAB).repeat(len(texts))
        texts = torch.cat((texts.repeat_interleave(tiny.VOCAB, 0), tokens[:, None]), 1)
        weights = joint.flatten()
        texts, weights = texts[weights > 0], weights[weights > 0]
    return marginals


def chi_square_p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Probability of counts at least this far from what is expected; tokens expected less than 8 times are one."""
    expected = probs * counts.sum()
    rare = expected < 8
    assert counts[probs < 1e-9].sum() == 0  # what cannot be drawn was not
    groups = [(counts[~rare].double(), expected[~rare])]
    if expected[rare].sum() >= 8:
        groups.append((counts[rare].sum()[None].double(), expected[rare].sum()[None]))
    seen, wanted = (torch.cat(parts) for parts in zip(*groups, strict=True))
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2), (statistic / 2).float()).item()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["probabilistic", "greedy"])
def test_sampled_text_follows_the_targets_distribution(llama, tmp_path, how):
    """Sampled drafts are verified with their probabilities, chosen ones without.

    A correct engine would fail three comparisons at 1e-3 with a probability of 0.003 on another seed.
    """
    target, draft = save_pair(tmp_path, llama, draft_vocab_ids=EVERY_SECOND)
    prompt = PROMPTS[2]
    sizes = dict(max_num_seqs=128, max_num_batched_tokens=2048)
    with engine(target, draft, 3, speculative={"draft_sample_method": how}, **sizes) as running:
        sampling = dict(temperature=SAMPLED.temperature, top_p=SAMPLED.top_p)
        texts = torch.tensor(running.generate([prompt] * SAMPLES, 3, **sampling))
        counted = running.metrics()
    assert 100 < counted["accepted_tokens"] < 0.9 * counted["draft_tokens"]  # both ways are taken
    for position, probs in enumerate(exact_distributions(llama, prompt)):
        counts = torch.bincount(texts[:, position], minlength=tiny.VOCAB)
        assert chi_square_p_value(counts, probs) > 1e-3, f"token {position + 1}"


def test_a_requests_own_seed_repeats_its_text_among_sampled_drafts(llama, tmp_path):
    target, draft = save_pair(tmp_path, llama)
    with engine(target, draft, 5, speculative={"draft_sample_method": "probabilistic"}) as running:
        sampling = dict(temperature=1.0, seed=7)
        alone = running.generate(PROMPTS[:1], COUNT, **sampling)
        again = running.generate(PROMPTS[:1], COUNT, **sampling)
        other = running.generate(PROMPTS[:1], COUNT, temperature=1.0, seed=8)
    assert alone == again != other


# Refusals: each stops the engine with one sentence.


def test_a_target_of_another_width_is_refused(llama, tmp_path):
    target, _ = save_pair(tmp_path, tiny_llama(hidden_size=96, num_attention_heads=3))
    _, draft = save_pair(tmp_path / "other", llama)
    with pytest.raises(ValueError, match="made for hidden size 64, the target has 96"), engine(target, draft, 5):
        pass


@pytest.mark.parametrize(("shift_label", "most"), [(True, 5), (False, 4)])
def test_more_drafts_than_a_block_has_are_refused(llama, tmp_path, shift_label, most):
    target, draft = save_pair(tmp_path, llama, shift_label=shift_label)
    sentence = f"num_speculative_tokens is {most + 1}, but draft .* at most {most} tokens"
    with pytest.raises(ValueError, match=sentence), engine(target, draft, most + 1):
        pass


def test_other_weights_are_refused_unless_allowed(llama, plain, tmp_path, monkeypatch):
    _, draft = save_pair(tmp_path / "other", tiny_llama(seed=1))
    target, _ = save_pair(tmp_path, llama)
    sentence = f"trained for a target with fingerprint .*{ALLOW_OTHER_TARGET}=1"
    with pytest.raises(UserError, match=sentence), engine(target, draft, 5):
        pass
    monkeypatch.setenv(ALLOW_OTHER_TARGET, "1")
    with engine(target, draft, 5) as running:
        assert running.generate(PROMPTS[:2], COUNT) == plain[:2]


def test_a_checkpoint_without_its_head_is_refused(llama, tmp_path):
    target, draft = save_pair(tmp_path, llama)
    tensors = load_file(draft / "model.safetensors")
    del tensors["prefix_gru.weight_hh_l0"]
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor prefix_gru\.weight_hh_l0 is missing"), engine(target, draft, 5):
        pass


def test_a_hook_that_moved_stops_the_engine(llama, tmp_path, monkeypatch):
    target, draft = save_pair(tmp_path, llama)
    moved = Hook("vllm.v1.spec_decode.dflash:DFlashProposer.load_model", "self, another")
    monkeypatch.setattr(install, "HOOKS_V1", {"0.32": (moved,)})
    install.install.cache_clear()
    try:
        sentence = r"DFlashProposer\.load_model takes .*, not \(self, another\)"
        with pytest.raises(ValueError, match=sentence), engine(target, draft, 5):
            pass
    finally:
        install.install.cache_clear()


def test_a_domino_draft_never_runs_as_a_plain_dflash_draft(llama, tmp_path, monkeypatch):
    """As if vLLM made its own drafter after all."""
    from vllm.v1.spec_decode.dflash import DFlashProposer

    target, draft = save_pair(tmp_path, llama, shift_label=False)
    install.install(False)
    monkeypatch.setattr(DFlashProposer, "__new__", lambda cls, *args, **kwargs: object.__new__(cls))
    with pytest.raises(UserError, match="logits without its head"), engine(target, draft, 4) as running:
        running.generate(PROMPTS[:1], COUNT)


# The demo pair: a real target and the draft that was trained for it.

QUESTIONS = [
    "What is 12 times 8? Show your work step by step.",
    "Write a Python function that adds two numbers.",
    "A shop sells 3 apples for 2 dollars. How much do 12 apples cost?",
    "Write a Python function that reverses a string.",
    "Count from 1 to 20.",
    "Tom has 5 books and buys 7 more. How many books does he have?",
    "How many days are there in a leap year, and why?",
    "What is the difference between a list and a tuple in Python?",
]


@pytest.fixture(scope="module")
def demo_target():
    try:
        return embedded_target_directory()
    except (UserError, ImportError) as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_demo_draft_is_accepted_and_its_head_earns_its_place(demo_target, tmp_path):
    ours = load_target(demo_target, pack=False)
    chat = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [ours.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in chat]
    draft = draft_directory(EMBEDDED_DRAFT)
    without_head = tmp_path / "without-head"
    without_head.mkdir()
    (without_head / "config.json").write_text((draft / "config.json").read_text())
    tensors = load_file(draft / "model.safetensors")
    tensors["embed_proj.2.weight"].zero_()
    save_file(tensors, without_head / "model.safetensors")

    options = dict(max_model_len=256, skip_tokenizer_init=False)
    with engine(demo_target, **options) as running:
        plain = running.generate(prompts, 48, ignore_eos=False)
    lengths = {}
    for directory in (draft, without_head):
        with recorded() as records, engine(demo_target, directory, 8, **options) as running:
            texts = running.generate(prompts, 48, ignore_eos=False)
            lengths[directory] = running.acceptance_length
        assert texts == plain
        if directory == draft:
            theirs = by_text(records, texts, prompts)
    assert lengths[draft] > lengths[without_head]
    assert lengths[draft] > 1.5

    reference = our_drafts(ours, load_draft(draft, ours), prompts, 48, 8)
    common = theirs.keys() & reference.keys()
    assert len(common) > 0.8 * len(theirs)
    assert {text: theirs[text] for text in common} == {text: reference[text] for text in common}
    assert tensors["embed_proj.2.weight"].shape[0] > DEFAULT_CANDIDATES  # the head chose among candidates
