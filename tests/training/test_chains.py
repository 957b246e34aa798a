"""The training passes of EAGLE-3 and DART equal what each says, computed one chain and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.recipe import OptimizationRecipe
from domino_spec.target.model import Target
from domino_spec.training import attention
from domino_spec.training.blocks import forward_blocks, gather_blocks
from domino_spec.training.chains import forward_chains
from domino_spec.training.data import Sequence
from domino_spec.training.step import Trainer
from tests import tiny

METHODS = ("eagle3", "dart")


def rotated(x: Tensor, position: int) -> Tensor:
    """RoPE of one head's vector, half-split form, base 10000."""
    half = len(x) // 2
    angles = position * 10000.0 ** (-torch.arange(half) / half)
    left, right = x[:half], x[half:]
    return torch.cat((left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


class Plain:
    """The layer of one sequence, pair by pair, in nothing but products of single vectors."""

    def __init__(self, draft: SingleLayerDraft) -> None:
        self.draft, self.weights = draft, dict(draft.named_parameters())
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def fused(self, features: Tensor) -> Tensor:
        return self.weights["fc.weight"] @ features

    def pair(self, token: int, feature: Tensor) -> Tensor:
        embedding = self.draft.embed(torch.tensor(token))
        return torch.cat(
            (
                rms(embedding, self.weights["midlayer.input_layernorm.weight"]),
                rms(feature, self.weights["midlayer.hidden_norm.weight"]),
            )
        )

    def __call__(self, pair: Tensor, residual: Tensor, position: int) -> Tensor:
        """Output of the layer for one more pair, which sees all pairs given before."""
        config, w = self.draft.config, self.weights
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query, key, value = (w[f"midlayer.self_attn.{n}_proj.weight"] @ pair for n in "qkv")
        self.keys.append(torch.stack([rotated(k, position) for k in key.view(kv_heads, width)]))
        self.values.append(value.view(kv_heads, width))
        outs = []
        for h, q in enumerate(query.view(heads, width)):
            group = h // (heads // kv_heads)
            scores = torch.stack([rotated(q, position) @ k[group] for k in self.keys]) / math.sqrt(width)
            outs.append(sum(p * v[group] for p, v in zip(scores.softmax(0), self.values, strict=True)))
        x = residual + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(outs)
        inner = rms(x, w["midlayer.post_attention_layernorm.weight"])
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ inner, w["midlayer.mlp.up_proj.weight"] @ inner
        return x + w["midlayer.mlp.down_proj.weight"] @ (F.silu(gate) * up)

    def read_text(self, tokens: list[int], features: Tensor, pairs: int) -> None:
        """The first pairs of a text: feature t with the token after it, at position t."""
        for t in range(pairs):
            feature = self.fused(features[t])
            self(self.pair(tokens[t + 1], feature), feature, t)


def plain_chain(draft: SingleLayerDraft, tokens: list[int], features: Tensor, anchor: int, count: int) -> Tensor:
    """What the LM head reads for each of `count` drafts after `anchor`."""
    plain = Plain(draft)
    plain.read_text(tokens, features, anchor - 1)
    norm = plain.weights["norm.weight"]
    feature = plain.fused(features[anchor - 1])
    out = plain(plain.pair(tokens[anchor], feature), feature, anchor - 1)
    outs = [out]
    for i in range(1, count):
        if draft.config.kind == "eagle3":
            out = plain(plain.pair(tokens[anchor + i], out), out, anchor - 1 + i)
        else:
            mask = plain.weights["mask_rep"]
            out = plain(mask, mask[: len(mask) // 2], anchor - 1 + i)
        outs.append(out)
    if draft.config.kind == "dart":
        outs = [rms(o, norm) for o in outs]
    return torch.stack([rms(o, norm) for o in outs])


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny.tiny_target()


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    return tiny.as_sequences(tiny.random_prompts([3, 1, 6]), tiny.random_prompts([9, 12, 7], seed=4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [2, 256], ids=["many chunks", "one chunk"])
@torch.no_grad()
def test_every_chain_is_what_the_method_says(monkeypatch, target, sequences, method, chunk):
    monkeypatch.setattr(attention, "CHUNK_SLOTS", chunk)
    draft = tiny.tiny_single_layer(target, method)
    source = tiny.MemoryCache(target, sequences, draft.feature_layers)
    anchors = [torch.tensor([2, 3, 7]), torch.tensor([1, 4]), torch.tensor([5])]
    batch = source.batch(sequences)
    blocks = gather_blocks(batch, anchors, draft.config.max_drafts)
    hidden = forward_chains(draft, batch, blocks)
    rows = tiny.block_rows(anchors)
    assert hidden.shape[:2] == (len(rows), 4)
    for found, valid, (s, anchor) in zip(hidden, blocks.valid, rows, strict=True):
        count = int(valid.sum())
        assert count >= 3
        tokens = sequences[s].tokens.tolist()
        expected = plain_chain(draft, tokens, source.read(sequences[s]), anchor, count)
        torch.testing.assert_close(found[:count], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_labels_are_the_tokens_behind_the_anchor(target, sequences, method):
    vocabulary = torch.arange(0, tiny.VOCAB, 2)
    draft = tiny.tiny_single_layer(target, method, draft_vocab_ids=vocabulary)
    source = tiny.MemoryCache(target, sequences, draft.feature_layers)
    drafted = forward_blocks(draft, source.batch(sequences[:1]), [torch.tensor([4])])
    following = sequences[0].tokens[5:9]
    assert drafted.blocks.labels[0].tolist() == following.tolist()
    assert drafted.choices[0].tolist() == [t // 2 if t % 2 == 0 else -1 for t in following.tolist()]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_anchor_without_a_feature_before_it_is_not_trained(target, sequences, method):
    """The first token of a text: its prompt is that one token."""
    draft = tiny.tiny_single_layer(target, method)
    source = tiny.MemoryCache(target, sequences, draft.feature_layers)
    drafted = forward_blocks(draft, source.batch([sequences[1]]), [torch.tensor([0, 1])])
    assert drafted.blocks.valid[:, 0].tolist() == [False, True]
    assert (drafted.choices[0] == -1).all() and (drafted.choices[1] >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_trained_and_the_target_is_not(target, sequences, method):
    draft = tiny.tiny_single_layer(target, method).train().requires_grad_(True)
    recipe = OptimizationRecipe(
        steps=1, batch_size=3, micro_batch_size=3, anchors=4, precision="float32", objective="kl", clip_norm=1e9
    )
    source = tiny.MemoryCache(target, sequences, draft.feature_layers)
    gradients, _ = tiny.step_gradients(Trainer(draft, recipe, sequences, source))
    assert gradients.keys() == dict(draft.named_parameters()).keys()
    assert all(g.abs().max() > 0 for g in gradients.values())
    assert all(p.grad is None for p in target.model.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_step_does_not_depend_on_how_sequences_are_packed(target, sequences, method, micro_batch_size):
    found = []
    for size in (1, micro_batch_size):
        draft = tiny.tiny_single_layer(target, method).train().requires_grad_(True)
        recipe = OptimizationRecipe(
            steps=1, batch_size=3, micro_batch_size=size, anchors=4, precision="float32", objective="kl", clip_norm=1e9
        )
        source = tiny.MemoryCache(target, sequences, draft.feature_layers)
        gradients, result = tiny.step_gradients(Trainer(draft, recipe, sequences, source))
        found.append((gradients, result.final_loss))
    (one, loss), (other, other_loss) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name, gradient in one.items():
        tiny.assert_close(other[name], gradient)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_learns_a_text_by_heart(target, sequences, method):
    draft = tiny.tiny_single_layer(target, method, std=0.05)
    before = accuracy(draft, target, sequences)
    tiny.fit(target, draft, sequences, steps=60, objective="cross_entropy")
    assert before < 0.2 and accuracy(draft, target, sequences) > 0.8


@torch.no_grad()
def accuracy(draft: SingleLayerDraft, target: Target, sequences: list[Sequence]) -> float:
    source = tiny.MemoryCache(target, sequences, draft.feature_layers)
    drafted = forward_blocks(draft, source.batch(sequences), [s.anchors[s.anchors > 0] for s in sequences])
    right = draft.base_logits(drafted.hidden).argmax(-1) == drafted.choices
    return right[drafted.blocks.valid].float().mean().item()
