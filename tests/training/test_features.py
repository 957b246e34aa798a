"""The feature cache: resumable, exact, and never mixed up between targets or settings."""

from __future__ import annotations

import pytest
import torch

from domino_spec.settings import UserError
from domino_spec.training import features as features_module
from domino_spec.training.data import pack_batch
from domino_spec.training.features import (
    FeatureCache,
    OnlineFeatures,
    _batches,
    capture_features,
    compute_features,
    feature_scale,
)
from tests.tiny import as_sequences, assert_close, conversation, random_prompts, tiny_target

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def sequences():
    return as_sequences(random_prompts([3, 5, 2, 7, 4]), random_prompts([9, 4, 12, 6, 5], seed=9))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_TOKENS", 12)
    monkeypatch.setattr(features_module, "BATCH_TOKENS", 24)


def test_cached_features_are_the_targets_hidden_states(tmp_path, target, sequences, small_shards):
    cache = capture_features(target, sequences, LAYERS, tmp_path)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 1
    for sequence in sequences:
        tokens = sequence.tokens[None]
        with torch.inference_mode():
            expected = target.forward(tokens, target.new_cache(1, tokens.shape[1]), LAYERS).features[0]
        assert_close(cache.read(sequence), expected)


def test_batched_capture_equals_one_by_one(target, sequences):
    together = compute_features(target, sequences, LAYERS)
    for sequence, rows in zip(sequences, together, strict=True):
        assert_close(rows, compute_features(target, [sequence], LAYERS)[0])


def test_an_interrupted_capture_goes_on_where_it_stopped(tmp_path, target, sequences, small_shards, monkeypatch):
    original, passes = features_module.compute_features, []

    def interrupted(target, batch, layers):
        passes.append([s.id for s in batch])
        if len(passes) == 3:
            raise KeyboardInterrupt
        return original(target, batch, layers)

    monkeypatch.setattr(features_module, "compute_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture_features(target, sequences, LAYERS, tmp_path)
    kept = list(tmp_path.glob("shard-*.safetensors"))
    assert kept
    before = {f.name: f.read_bytes() for f in kept}
    progress = []
    cache = capture_features(target, sequences, LAYERS, tmp_path, progress.append)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert all(s in cache for s in sequences)
    assert progress[0] > 0, "what was there is reported as done"
    assert sum(progress) == sum(len(s.tokens) for s in sequences)
    first = set(passes[0])
    assert not any(first & set(p) for p in passes[3:]), "done work was done again"


def test_a_complete_cache_needs_no_target_pass(tmp_path, target, sequences, monkeypatch):
    capture_features(target, sequences, LAYERS, tmp_path)
    monkeypatch.setattr(features_module, "compute_features", lambda *a: pytest.fail("captured again"))
    cache = capture_features(target, sequences, LAYERS, tmp_path)
    assert all(sequence in cache for sequence in sequences)


def test_other_settings_are_refused(tmp_path, target, sequences):
    capture_features(target, sequences[:1], LAYERS, tmp_path)
    for other, layers in ((tiny_target(seed=3), LAYERS), (target, (0, 1)), (tiny_target(seed=3), (2,))):
        with pytest.raises(UserError, match="made with other settings"):
            capture_features(other, sequences[:1], layers, tmp_path)


@pytest.mark.parametrize("layers", [(2,), (2, 0)])
def test_a_cache_of_more_layers_is_read_in_part(tmp_path, target, sequences, layers):
    capture_features(target, sequences[:1], LAYERS, tmp_path / "many")
    part = capture_features(target, sequences, layers, tmp_path / "many")  # what is missing is captured whole
    own = capture_features(target, sequences, layers, tmp_path / "own")
    assert part.layers == own.layers == layers
    for sequence in sequences:
        assert torch.equal(part.read(sequence), own.read(sequence))
    assert torch.equal(part.batch(sequences).features, own.batch(sequences).features)


def test_a_damaged_shard_is_one_line(tmp_path, target, sequences):
    capture_features(target, sequences, LAYERS, tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match=r"shard-00000.safetensors") as error:
        capture_features(target, sequences, LAYERS, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer_length", [9, 15], ids=["same length", "longer"])
def test_a_sequence_whose_tokens_changed_is_captured_anew(tmp_path, target, sequences, answer_length):
    """Same id, other tokens: regenerated answers must not meet the features of the old ones."""
    capture_features(target, sequences, LAYERS, tmp_path)
    (changed,) = as_sequences(random_prompts([3]), random_prompts([answer_length], seed=44))
    assert changed.id == sequences[0].id and len(sequences[0].tokens) == 12
    cache = capture_features(target, [changed], LAYERS, tmp_path)
    assert_close(cache.read(changed), compute_features(target, [changed], LAYERS)[0])


def test_a_pack_holds_every_sequence_whole_and_in_order(target, sequences):
    talk = conversation("talk", [([1, 2], [3, 4, 5]), ([6], [7, 8])])
    everything = [*sequences, talk]
    features = compute_features(target, everything, LAYERS)
    batch = pack_batch(everything, features)
    assert batch.starts.tolist() == [0, 12, 21, 35, 48, 57, 65]
    for i, sequence in enumerate(everything):
        rows = slice(*batch.starts[i : i + 2].tolist())
        assert torch.equal(batch.tokens[rows], sequence.tokens)
        assert torch.equal(batch.features[rows], features[i])
        learned = batch.tokens[rows][batch.is_answer[rows]].tolist()
        expected = [t for start, end in sequence.answers for t in sequence.tokens[start:end].tolist()]
        assert learned == expected
    assert batch.is_answer[57:].tolist() == [False, False, True, True, True, False, True, True]


def test_online_features_are_those_of_a_cache(tmp_path, target, sequences):
    cache, online = capture_features(target, sequences, LAYERS, tmp_path), OnlineFeatures(target, LAYERS)
    assert online.layers == cache.layers == LAYERS
    stored, computed = cache.batch(sequences), online.batch(sequences)
    for name in ("tokens", "starts", "is_answer"):
        assert torch.equal(getattr(computed, name), getattr(stored, name))
    assert_close(computed.features, stored.features)
    assert_close(online.read(sequences[2]), cache.read(sequences[2]))
    assert_close(feature_scale(online, sequences), feature_scale(cache, sequences))


def test_online_features_can_be_trained_on(target, sequences):
    """Computed without gradients, they must still enter a graph."""
    features = OnlineFeatures(target, LAYERS).batch(sequences).features
    weight = torch.ones(features.shape[1], requires_grad=True)
    (features * weight).sum().backward()
    assert_close(weight.grad, features.sum(0))


def test_batches_respect_the_token_budget_and_lose_nothing(sequences):
    ordered = sorted(sequences, key=lambda s: len(s.tokens))
    batches = _batches(ordered, 28)
    assert [s.id for b in batches for s in b] == [s.id for s in ordered]
    assert all(len(b) * len(b[-1].tokens) <= 28 for b in batches)
    assert any(len(b) > 1 for b in batches)
    assert [len(b) for b in _batches(ordered, 1)] == [1] * len(ordered), "a long sequence goes alone"


def test_feature_scale_brings_every_dimension_to_unit_size(tmp_path, target, sequences):
    cache = capture_features(target, sequences, LAYERS, tmp_path)
    scale = feature_scale(cache, sequences)
    rows = torch.cat([cache.read(s)[1:] for s in sequences]) * scale
    assert_close(rows.square().mean(0), torch.ones(rows.shape[1]))


def test_a_cache_can_be_opened_by_several_runs(tmp_path, target, sequences):
    first = capture_features(target, sequences, LAYERS, tmp_path)
    settings = dict(target=target.fingerprint, layers=list(LAYERS), dtype="float32", hidden_size=32)
    second = FeatureCache(tmp_path, settings)
    assert torch.equal(first.read(sequences[0]), second.read(sequences[0]))


def test_removing_a_shard_loses_only_what_it_held(tmp_path, target, sequences, small_shards):
    """The next shard must not take the name of one that is still there."""
    capture_features(target, sequences, LAYERS, tmp_path)
    first, *others = sorted(tmp_path.glob("shard-*.safetensors"))
    assert others
    kept = {f: f.read_bytes() for f in others}
    first.unlink()
    cache = capture_features(target, sequences, LAYERS, tmp_path)
    assert all(f.read_bytes() == content for f, content in kept.items())
    for sequence, rows in zip(sequences, compute_features(target, sequences, LAYERS), strict=True):
        assert_close(cache.read(sequence), rows)
