"""The target equals the transformers model whose weights it holds: logits, features, cropping, trees, fingerprint."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch

from domino_spec.settings import UserError
from domino_spec.target import model as target_model
from domino_spec.target.model import Target, weights_fingerprint
from tests.tiny import (
    ARCHITECTURES,
    VOCAB,
    as_target,
    assert_close,
    plain_greedy,
    random_prompts,
    tiny_model,
    tiny_target,
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    """A transformers model and the target that holds its weights."""
    model = tiny_model(request.param)
    return model, as_target(model)


def chain_logits(target: Target, text: list[int], chunk: int | None = None) -> torch.Tensor:
    """[T, V], logits after every token of one text."""
    tokens = torch.tensor([text])
    cache = target.new_cache(1, len(text))
    hidden = []
    for start in range(0, len(text), chunk or len(text)):
        part = tokens[:, start : start + (chunk or len(text))]
        hidden.append(target.forward(part, cache).hidden)
        cache.lengths += part.shape[1]
    return target.lm_head(torch.cat(hidden, dim=1))[0]


@torch.inference_mode()
def test_chunked_prefill_and_steps_equal_transformers_greedy_generation(pair, monkeypatch):
    model, target = pair
    monkeypatch.setattr(target_model, "PREFILL_CHUNK", 5)
    (prompt,) = random_prompts([13])
    expected = plain_greedy(model, prompt, 24)
    tokens = torch.tensor([prompt])
    cache = target.new_cache(1, 64)
    target.prefill(tokens[:, :-1], torch.tensor([12]), cache)
    assert cache.lengths.tolist() == [12]
    written, last = [], tokens[:, -1:]
    for _ in expected:
        last = target.lm_head(target.forward(last, cache).hidden).argmax(-1)
        cache.lengths += 1
        written.append(last.item())
    assert written == expected
    assert len(set(expected)) > 3, "a constant text would show little"


@torch.inference_mode()
def test_logits_equal_those_of_transformers(pair):
    model, target = pair
    (text,) = random_prompts([20])
    assert_close(chain_logits(target, text), model(torch.tensor([text])).logits[0])
    assert_close(chain_logits(target, text, chunk=3), model(torch.tensor([text])).logits[0])


@torch.inference_mode()
def test_features_are_the_outputs_of_the_layers_asked_for(pair):
    model, target = pair
    (text,) = random_prompts([11])
    tokens = torch.tensor([text])
    hidden_states = model(tokens, output_hidden_states=True).hidden_states
    # transformers norms the last entry, so the last layer's own output comes from a hook.
    last = []
    hook = (
        model.get_decoder()
        .layers[-1]
        .register_forward_hook(lambda module, args, out: last.append(out[0] if isinstance(out, tuple) else out))
    )
    model(tokens)
    hook.remove()
    outputs = [*hidden_states[1:-1], last[0]]
    for layers in [(0,), (2, 0), (0, 1, 2, 3), (3,)]:
        features = target.forward(tokens, target.new_cache(1, 11), layers).features
        assert_close(features, torch.cat([outputs[i] for i in layers], dim=-1))
    assert target.forward(tokens, target.new_cache(1, 11)).features is None


@torch.inference_mode()
def test_only_the_tapped_layers_are_kept(target):
    outputs: dict[int, weakref.ref] = {}
    alive: list[set[int]] = []

    def remember(index):
        return lambda module, given, out: outputs.update(
            {index: weakref.ref(out[0] if isinstance(out, tuple) else out)}
        )

    def look(*_):
        alive.append({index for index, output in outputs.items() if output() is not None})

    hooks = [layer.register_forward_hook(remember(index)) for index, layer in enumerate(target.layers)]
    hooks.append(target.decoder.norm.register_forward_pre_hook(look))
    target.forward(torch.tensor(random_prompts([5])), target.new_cache(1, 5), (1, 3))
    look()
    for hook in hooks:
        hook.remove()
    assert alive == [{1, 3}, set()], "features must not stay alive after the pass"


@torch.inference_mode()
def test_prefill_features_do_not_depend_on_chunks(target, monkeypatch):
    tokens = torch.tensor(random_prompts([17]))
    whole = target.prefill(tokens, torch.tensor([17]), target.new_cache(1, 17), (0, 2))
    monkeypatch.setattr(target_model, "PREFILL_CHUNK", 4)
    assert_close(target.prefill(tokens, torch.tensor([17]), target.new_cache(1, 17), (0, 2)), whole)


@torch.inference_mode()
def test_requests_of_unequal_length_give_the_logits_they_give_alone(pair):
    _, target = pair
    texts = random_prompts([3, 14, 9, 1])
    lengths = torch.tensor([len(t) for t in texts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    cache = target.new_cache(4, 40)
    features = target.prefill(tokens, lengths, cache, (1,))
    following = torch.tensor(random_prompts([4] * 4, seed=8))
    together = target.lm_head(target.forward(following, cache).hidden)
    for r, text in enumerate(texts):
        alone = target.new_cache(1, 40)
        alone_features = target.prefill(torch.tensor([text]), lengths[r : r + 1], alone, (1,))
        assert_close(features[r, : len(text)], alone_features[0])
        assert_close(together[r], target.lm_head(target.forward(following[r : r + 1], alone).hidden)[0])


@torch.inference_mode()
def test_cropping_is_a_change_of_lengths_only(pair):
    """Rejected rows stay in memory; after lowering the lengths nothing that follows can tell."""
    _, target = pair
    texts = random_prompts([6, 10])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    lengths = torch.tensor([6, 10])
    cache = target.new_cache(2, 40)
    target.prefill(tokens, lengths, cache)
    following = torch.tensor(random_prompts([3, 3], seed=9))
    before = target.forward(following, cache).hidden.clone()
    rejected = torch.tensor(random_prompts([7, 7], seed=10))
    target.forward(rejected, cache)
    cache.lengths += 7
    target.forward(rejected, cache)
    cache.lengths -= 7
    assert torch.equal(cache.lengths, lengths)
    assert_close(target.forward(following, cache).hidden, before)


@torch.inference_mode()
def test_requests_that_change_places_go_on_as_before(target):
    texts = random_prompts([6, 10, 4])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    cache = target.new_cache(3, 20)
    target.prefill(tokens, torch.tensor([6, 10, 4]), cache)
    following = torch.tensor(random_prompts([3, 3, 3], seed=9))
    everyone = target.forward(following, cache).hidden
    cache.move(2, 0)  # over the first request
    assert_close(target.forward(following[[2, 1]], cache.view(0, 2)).hidden, everyone[[2, 1]])
    assert_close(target.forward(following[2:], cache.view(2, 3)).hidden, everyone[2:])


def test_a_pass_that_does_not_fit_is_refused(target):
    cache = target.new_cache(1, 4)
    with pytest.raises(ValueError, match="cannot hold"):
        target.forward(torch.zeros(1, 5, dtype=torch.long), cache)


TREE_PARENTS = [-1, 0, 0, 1, 2, 3, 5, 6, 7, 8]
"""Row 0 is the anchor; two branches, one of them longer than the sliding windows."""


def tree_ancestors(parents: list[int]) -> torch.Tensor:
    """[n, n] bool, True where row i descends from row j or is it."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


@torch.inference_mode()
def test_tree_rows_equal_the_chain_along_their_path(pair):
    _, target = pair
    contexts = random_prompts([9, 2], seed=4)
    nodes = torch.tensor(random_prompts([len(TREE_PARENTS)] * 2, seed=5))
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in contexts], batch_first=True)
    cache = target.new_cache(2, 32)
    target.prefill(tokens, torch.tensor([9, 2]), cache)
    ancestors = tree_ancestors(TREE_PARENTS).expand(2, -1, -1)
    logits = target.lm_head(target.forward(nodes, cache, ancestors=ancestors).hidden)
    for r, context in enumerate(contexts):
        for row in range(len(TREE_PARENTS)):
            path = nodes[r, ancestors[r, row]].tolist()  # rows are in topological order
            assert_close(logits[r, row], chain_logits(target, context + path)[-1])


def test_fingerprint_survives_precision_and_tells_fine_tuned_weights_apart():
    model = tiny_model()
    original = weights_fingerprint(model.get_decoder().named_parameters())
    assert weights_fingerprint(copy.deepcopy(model).to(torch.bfloat16).get_decoder().named_parameters()) == original
    assert weights_fingerprint(tiny_model(seed=1).get_decoder().named_parameters()) != original
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-4)
    tokens = torch.tensor(random_prompts([16]))
    for _ in range(3):
        tuned(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert weights_fingerprint(tuned.get_decoder().named_parameters()) != original


def test_fingerprint_notices_a_change_of_one_matrix_by_one_percent():
    """As a merged adapter makes: every other weight is as it was."""
    model = tiny_model()
    prints = {weights_fingerprint(model.get_decoder().named_parameters())}
    for seed in range(12):
        tuned = copy.deepcopy(model)
        weight = tuned.get_decoder().layers[seed % 4].self_attn.q_proj.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.mul_(1 + 0.01 * noise)
        prints.add(weights_fingerprint(tuned.get_decoder().named_parameters()))
    assert len(prints) == 13


def test_stop_tokens_come_from_every_place_that_names_them(text_target):
    assert text_target.stop_token_ids == {58}
    model = copy.deepcopy(text_target.model)
    model.generation_config.eos_token_id = [3, 4]
    model.config.eos_token_id = 5
    assert as_target(model, text_target.tokenizer).stop_token_ids == {3, 4, 5, 58}


def test_embedding_goes_through_the_models_own_module():
    target = tiny_target("gemma3")
    ids = torch.arange(5)
    table = target.embedding.weight[ids]
    assert_close(target.embed(ids), table * target.hidden_size**0.5)


def test_logits_soft_cap_is_applied():
    model = tiny_model("gemma3", final_logit_softcapping=2.0)
    (text,) = random_prompts([6])
    with torch.inference_mode():
        logits = chain_logits(as_target(model), text)
        assert logits.abs().max() < 2.0
        assert_close(logits, model(torch.tensor([text])).logits[0])


def test_models_of_another_shape_are_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    with pytest.raises(UserError, match="GPT2LMHeadModel is not an ordinary"):
        Target(model, None, "gpt2")
