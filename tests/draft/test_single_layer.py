"""The layer of EAGLE-3 and DART against the published formulas, written out one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch

from domino_spec.draft.single_layer import PairKV, SingleLayerDraft
from domino_spec.ops.native import bindings as cpu
from tests.plain_eagle3 import PlainEagle3
from tests.tiny import VOCAB, tiny_single_layer, tiny_target

TOLERANCE = 2e-5  # relative: float32 against float64, a few hundred products deep


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual.double() - expected).abs().max() <= TOLERANCE * expected.abs().max())


def random_text(draft: SingleLayerDraft, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of `length` positions, and the tokens behind them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(length, draft.config.feature_size, generator=generator)
    return features, torch.randint(0, VOCAB, (length,), generator=generator)


def causal(rows: int) -> torch.Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()[None, None]


def nothing_cached(draft: SingleLayerDraft) -> PairKV:
    empty = torch.zeros(1, draft.config.num_key_value_heads, 0, draft.config.head_dim)
    return PairKV(empty, empty)


@torch.inference_mode()
def run_pairs(draft: SingleLayerDraft, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    fused = draft.fuse(features)[None]
    out, _ = draft(
        draft.pair(tokens[None], fused),
        fused,
        torch.arange(len(tokens))[None],
        nothing_cached(draft),
        causal(len(tokens)),
    )
    return out[0]


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_computes_the_published_formulas(target, packed):
    draft = tiny_single_layer(target)
    plain = PlainEagle3(draft)
    draft = draft.pack() if packed else draft
    features, tokens = random_text(draft, 9)
    expected = plain.outputs(features, tokens.tolist())
    out = run_pairs(draft, features, tokens)
    assert close(out, expected)
    assert close(draft.logits(out), plain.logits(expected))


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_its_own_output_is_the_next_feature_before_the_norm_and_without_fc(target, packed):
    """Two steps of recurrence behind a text, at the positions that follow the last feature's."""
    draft = tiny_single_layer(target)
    plain = PlainEagle3(draft)
    draft = draft.pack() if packed else draft
    features, tokens = random_text(draft, 6)
    own = [7, 31]
    fused = draft.fuse(features)[None]
    cached = draft.keys_values(draft.pair(tokens[None], fused), torch.arange(6)[None])
    out = run_pairs(draft, features, tokens)[None, -1:]
    for step, token in enumerate(own):
        assert close(out[0, 0], plain.continued(features, tokens.tolist(), own[:step])[-1])
        pairs = draft.pair(torch.tensor([[token]]), out)
        rows = torch.ones(1, 1, 1, cached.keys.shape[2] + 1, dtype=torch.bool)
        out, new = draft(pairs, out, torch.tensor([[6 + step]]), cached, rows)
        cached = PairKV(*(torch.cat(parts, dim=2) for parts in zip(cached, new, strict=True)))
    assert close(out[0, 0], plain.continued(features, tokens.tolist(), own)[-1])


@torch.inference_mode()
def test_a_wrong_reading_of_the_paper_would_be_noticed(target):
    """The plain implementation with one thing changed differs clearly, so the agreement above means something."""
    draft = tiny_single_layer(target)
    features, tokens = random_text(draft, 6)
    out = run_pairs(draft, features, tokens)
    for wrong in PlainEagle3.MISREADINGS:
        plain = PlainEagle3(draft, wrong)
        assert not close(draft.logits(out), plain.logits(plain.outputs(features, tokens.tolist()))), wrong


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_pairs_kept_by_the_caller_give_the_same_output(target, packed):
    draft = tiny_single_layer(target)
    draft = draft.pack() if packed else draft
    features, tokens = random_text(draft, 8)
    expected = run_pairs(draft, features, tokens)
    fused = draft.fuse(features)[None]
    pairs, positions = draft.pair(tokens[None], fused), torch.arange(8)[None]
    kept = draft.keys_values(pairs[:, :5], positions[:, :5])

    def write(new: PairKV) -> PairKV:
        return PairKV(*(torch.cat(parts, dim=2) for parts in zip(kept, new, strict=True)))

    out = draft.extend(pairs[:, 5:], fused[:, 5:], positions[:, 5:], write, causal(8)[:, :, 5:])
    assert torch.allclose(out[0], expected[5:], atol=1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_packing_for_cpu_fuses_the_layer(target):
    if not cpu.is_available(torch.device("cpu"), torch.float32):
        pytest.skip("no compiler")
    draft = tiny_single_layer(target).pack()
    assert type(draft.midlayer.self_attn).__name__ == "FusedPairAttention"
    assert type(draft.norm).__name__ == "FusedNorm"  # the tiny MLP is too narrow for the native loop
    assert not any(type(m) is torch.nn.Linear for m in draft.modules())


# DART's part


@torch.inference_mode()
def test_masked_positions_enter_behind_norm_and_concatenation(target):
    """The mask stands for the normed pair, its first half is the residual, and the final norm comes twice."""
    draft = tiny_single_layer(target, "dart", block_size=3)
    plain = PlainEagle3(draft)
    features, tokens = random_text(draft, 5)
    fused = draft.fuse(features)[None]
    masks, residual = draft.mask_pairs(1, 2)
    out, _ = draft(
        torch.cat((draft.pair(tokens[None], fused), masks), dim=1),
        torch.cat((fused, residual), dim=1),
        torch.arange(7)[None],
        nothing_cached(draft),
        causal(7),
    )
    pairs = [plain.pair(t, plain.fuse(f)) for t, f in zip(tokens.tolist(), features.double(), strict=True)]
    mask = draft.mask_rep.double()
    pairs += [(mask, mask[: draft.config.hidden_size])] * 2
    expected = plain.run(pairs)
    assert close(out[0], expected)
    assert close(draft.logits(out[0]), plain.lm_head(plain.norm(plain.norm(expected, "norm"), "norm")))


# Vocabulary and binding


@pytest.mark.parametrize("ids", [[3, 8, 21, 40], [21, 3, 40, 8]], ids=["ascending", "any order"])
def test_tokens_and_choices_map_onto_each_other(target, ids):
    draft = tiny_single_layer(target, draft_vocab_ids=torch.tensor(ids))
    assert draft.to_token_ids(torch.arange(4)).tolist() == ids
    choices = draft.to_choices(torch.arange(VOCAB))
    assert choices.tolist() == [ids.index(t) if t in ids else -1 for t in range(VOCAB)]
    assert draft.to_choices(torch.tensor([[ids[2], 59]])).tolist() == [[2, -1]]


def test_layers_follow_the_published_rule_where_the_checkpoint_does_not_name_them(target):
    from dataclasses import replace

    deep = tiny_target(num_hidden_layers=9)
    draft = tiny_single_layer(deep)
    draft.config = replace(draft.config, target_layer_ids=None, num_target_layers=None)
    assert draft.bind(deep).feature_layers == (1, 9 // 2 - 1, 9 - 4)
    assert draft.config.num_target_layers == 9


def test_a_narrower_draft_needs_an_embedding_of_its_own(target):
    from dataclasses import replace

    from domino_spec.settings import UserError

    config = replace(tiny_single_layer(target).config, hidden_size=24, target_hidden_size=32)
    draft = SingleLayerDraft(config)
    with pytest.raises(UserError, match="must hold an embedding of its own"):
        draft.bind(target)
    draft.embed_tokens = torch.randn(VOCAB, 24)
    draft.bind(target)
    assert draft.embed(torch.tensor([3])).shape == (1, 24)
    assert draft.bfloat16().embed_tokens.dtype == torch.bfloat16, "it moves with the rest"


def test_rotary_embedding_of_the_plain_implementation_turns_by_position():
    """RoPE's own promise, so that an error in the plain implementation cannot agree with one in the model."""
    plain = PlainEagle3.__new__(PlainEagle3)
    plain.theta = 10000.0
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    products = [plain.rotate(x, p + 3) @ plain.rotate(y, p) for p in (0, 5, 40)]
    assert max(products) - min(products) < 1e-9 and math.isclose(plain.rotate(x, 9).norm(), x.norm())
