"""Packed weights compute what plain ones do, and everything that decodes uses them alike."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from domino_spec import load_draft, load_target
from domino_spec.draft.checkpoint import save_draft
from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.lookup import PlainDecoding
from domino_spec.ops.native.bindings import PackedLinear
from domino_spec.settings import UserError
from domino_spec.target.native import can_pack, pack_linears
from tests.tiny import ARCHITECTURES, as_target, assert_close, plain_greedy, random_prompts, run, tiny_draft, tiny_model

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch build has no packed linear products"
)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (2, 1, 24), (3, 17, 24), (0, 24)], ids=str)
def test_a_packed_layer_equals_the_plain_one(bias, dtype, shape):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    packed = PackedLinear(plain.weight, plain.bias)(x)
    assert packed.shape == (*shape[:-1], 40) and packed.dtype == dtype
    if x.numel():
        # bfloat16 results may be rounded the other way: one unit in the last of eight bits.
        torch.testing.assert_close(packed, plain(x), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)


def test_every_linear_layer_is_replaced_and_no_other():
    model = tiny_model("qwen2")
    linears = sum(type(m) is torch.nn.Linear for m in model.modules())
    assert pack_linears(model) == linears > 0
    assert not any(type(m) is torch.nn.Linear for m in model.modules())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_packed_target_writes_the_same_greedy_text(kind, tied):
    model = tiny_model(kind, tie_word_embeddings=tied)
    target = as_target(model)
    fingerprint, lm_head = target.fingerprint, target.lm_head_weight.clone()
    target.pack()
    (prompt,) = random_prompts([7])
    assert run(target, PlainDecoding(), [prompt], 16)[0].token_ids == plain_greedy(model, prompt, 16)
    assert target.packed and target.fingerprint == fingerprint
    assert torch.equal(target.lm_head_weight, lm_head), "drafts borrow the plain LM head"
    assert target.dtype == torch.float32


def proposals(target, draft, prompts) -> list:
    drafter, seen = BlockDrafter(draft), []
    original = drafter.propose
    drafter.propose = lambda *a: seen.append(original(*a)) or seen[-1]
    generations = run(target, drafter, prompts, 8)
    return [[p.tokens.tolist() for p in seen], [g.token_ids for g in generations]]


@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, 60, 2)], ids=["full", "subset"])
def test_a_packed_draft_proposes_the_same(target, vocabulary):
    prompts = random_prompts([6, 9])
    plain, packed = (tiny_draft(target, draft_vocab_ids=vocabulary) for _ in range(2))
    packed.pack()
    assert proposals(target, packed, prompts) == proposals(target, plain, prompts)
    assert packed.dtype == torch.float32 and packed.device == plain.device
    hidden = torch.randn(3, 32)
    assert_close(packed.base_logits(hidden), plain.base_logits(hidden))


def test_loading_packs_target_and_draft_together(tmp_path, setup_directory, target):
    save_draft(tiny_draft(target), tmp_path)
    packed = load_target(setup_directory, device="cpu")
    plain = load_target(setup_directory, device="cpu", pack=False)
    assert packed.packed and not plain.packed
    prompts = random_prompts([6, 9])
    assert proposals(packed, load_draft(tmp_path, packed), prompts) == proposals(
        plain, load_draft(tmp_path, plain), prompts
    )


@pytest.fixture
def setup_directory(tmp_path_factory, model):
    from tests.tiny import word_tokenizer

    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def test_a_packed_target_is_saved_whole_or_not_at_all(tmp_path, setup_directory, model):
    with pytest.raises(UserError, match=r"packed for decoding and cannot be saved.*pack=False"):
        load_target(setup_directory, device="cpu").model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    load_target(setup_directory, device="cpu", pack=False).model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_of_a_packed_layer_can_be_read(dtype):
    """Routers of some experts multiply by it themselves."""
    weight = torch.randn(40, 24).to(dtype)
    assert torch.equal(PackedLinear(weight).weight, weight)


def test_a_packed_draft_is_not_saved_by_halves(tmp_path, target):
    draft = tiny_draft(target).pack()
    with pytest.raises(ValueError, match="packed for decoding cannot be saved"):
        save_draft(draft, tmp_path)
    assert not list(tmp_path.iterdir())
