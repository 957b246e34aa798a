"""The feature cache with several processes, on a full disk, and after a bit has flipped."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import namedtuple

import pytest
import torch
from filelock import FileLock

from domino_spec.files import load_tensors, save_tensors
from domino_spec.settings import UserError
from domino_spec.training import features as features_module
from domino_spec.training import integrity
from domino_spec.training.features import FeatureCache, capture_features, compute_features, feature_bytes
from tests.tiny import as_sequences, assert_close, random_prompts

LAYERS = (0, 2)
HIDDEN = 32


@pytest.fixture(scope="module")
def sequences():
    return as_sequences(random_prompts([3, 5, 2, 7, 4]), random_prompts([9, 4, 12, 6, 5], seed=9))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_TOKENS", 12)
    monkeypatch.setattr(features_module, "BATCH_TOKENS", 24)


def open_cache(directory, target) -> FeatureCache:
    """What a second process sees."""
    settings = dict(target=target.fingerprint, layers=list(LAYERS), dtype="float32", hidden_size=HIDDEN)
    return FeatureCache(directory, settings)


def flip_byte(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


# Damage


@pytest.mark.parametrize("position", [-1, -1000], ids=["the last", "one inside"])
def test_a_flipped_byte_is_found_when_it_is_first_read(tmp_path, target, sequences, position):
    capture_features(target, sequences, LAYERS, tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    flip_byte(shard, position)
    cache = open_cache(tmp_path, target)
    with pytest.raises(UserError, match=r"shard-00000.safetensors is damaged \(the features of s\d do not") as error:
        for sequence in sequences:
            cache.read(sequence)
    assert "\n" not in str(error.value) and "remove it" in str(error.value)
    shard.unlink()
    again = capture_features(target, sequences, LAYERS, tmp_path)
    for sequence, rows in zip(sequences, compute_features(target, sequences, LAYERS), strict=True):
        assert_close(again.read(sequence), rows)


def test_a_flipped_byte_in_the_table_is_found_too(tmp_path, target, sequences):
    """Wherever it is: what is read is right, or captured anew, or refused."""
    capture_features(target, sequences, LAYERS, tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    whole = shard.read_bytes()
    expected = compute_features(target, sequences, LAYERS)
    header = whole.index(b"sequences")
    outcomes = set()
    for position in range(header, header + 60, 3):
        shard.write_bytes(whole)
        flip_byte(shard, position)
        try:
            cache = open_cache(tmp_path, target)
            for sequence, rows in zip(sequences, expected, strict=True):
                if sequence not in cache:
                    outcomes.add("missing")
                else:
                    assert_close(cache.read(sequence), rows)
                    outcomes.add("right")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"missing", "right", "refused"}


def test_a_sequence_is_checked_once(tmp_path, target, sequences, monkeypatch):
    capture_features(target, sequences, LAYERS, tmp_path)
    cache, checks = open_cache(tmp_path, target), []
    original = features_module._checksum
    monkeypatch.setattr(features_module, "_checksum", lambda rows: checks.append(len(rows)) or original(rows))
    for _ in range(2):
        for sequence in sequences:
            cache.read(sequence)
    assert checks == [len(s.tokens) for s in sequences]


def test_shards_without_checksums_are_read_as_they_are(tmp_path, target, sequences):
    """Those that earlier versions wrote."""
    capture_features(target, sequences, LAYERS, tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    tensors, metadata = load_tensors(shard)
    tables = [[entry[:width] for entry in json.loads(metadata["sequences"])] for width in (4, 3)]
    for table in tables:
        save_tensors(tensors, shard, {"sequences": json.dumps(table)})
        cache = capture_features(target, sequences, LAYERS, tmp_path)
        assert list(tmp_path.glob("shard-*.safetensors")) == [shard]
        for sequence, rows in zip(sequences, compute_features(target, sequences, LAYERS), strict=True):
            assert_close(cache.read(sequence), rows)


# Space


def test_the_size_is_what_the_shards_take(tmp_path, target, sequences, caplog):
    tokens = sum(len(s.tokens) for s in sequences)
    with caplog.at_level(logging.INFO, "domino_spec"):
        capture_features(target, sequences, LAYERS, tmp_path)
    (shard,) = tmp_path.glob("shard-*.safetensors")
    size = feature_bytes(tokens, len(LAYERS), HIDDEN, torch.float32)
    assert load_tensors(shard)[0]["features"].nbytes == size
    assert f"the features of {tokens} tokens need 0.0 GB" in caplog.text
    assert feature_bytes(1000, 5, 4096, torch.bfloat16) == 1000 * 5 * 4096 * 2


def test_what_does_not_fit_on_the_disk_is_refused_before_it_starts(tmp_path, target, sequences, monkeypatch):
    needed = feature_bytes(sum(len(s.tokens) for s in sequences), len(LAYERS), HIDDEN, torch.float32)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(features_module, "compute_features", lambda *a: pytest.fail("it has started"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(UserError, match=r"tokens need .* GB left; use another directory .*online") as error:
        capture_features(target, sequences, LAYERS, tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    capture_features(target, sequences[:3], LAYERS, tmp_path)
    rest = feature_bytes(sum(len(s.tokens) for s in sequences[3:]), len(LAYERS), HIDDEN, torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(rest))
    capture_features(target, sequences, LAYERS, tmp_path)  # only what is missing counts


def test_a_large_capture_is_announced(tmp_path, target, sequences, monkeypatch, caplog):
    monkeypatch.setattr(features_module, "LARGE_BYTES", 100)
    capture_features(target, sequences, LAYERS, tmp_path)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "GB left" in caplog.text


# Several processes


def test_a_second_capture_waits_for_the_first_and_does_none_of_its_work_again(
    tmp_path, target, sequences, small_shards, monkeypatch, caplog
):
    original, entered, go_on = features_module.compute_features, threading.Event(), threading.Event()
    captured: list[str] = []

    def slow(target, batch, layers):
        captured.extend(s.id for s in batch)
        entered.set()
        assert go_on.wait(60)
        return original(target, batch, layers)

    monkeypatch.setattr(features_module, "compute_features", slow)
    caches: list[FeatureCache] = []

    def capture() -> None:
        caches.append(capture_features(target, sequences, LAYERS, tmp_path))

    first, second = threading.Thread(target=capture), threading.Thread(target=capture)
    first.start()
    assert entered.wait(60)
    said = threading.Event()
    monkeypatch.setattr(integrity._log, "warning", lambda *a: said.set())
    second.start()
    assert said.wait(60), "it says why it waits"
    go_on.set()
    first.join(60)
    second.join(60)
    assert sorted(captured) == sorted(s.id for s in sequences), "captured twice"
    for cache in caches:
        for sequence, rows in zip(sequences, original(target, sequences, LAYERS), strict=True):
            assert_close(cache.read(sequence), rows)


def test_a_killed_capture_leaves_no_lock_behind(tmp_path, target, sequences, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(features_module, "compute_features", interrupt)
    with pytest.raises(KeyboardInterrupt):
        capture_features(target, sequences, LAYERS, tmp_path)
    monkeypatch.undo()
    (tmp_path / "capture.lock").touch()  # the file of a process that is gone
    assert all(s in capture_features(target, sequences, LAYERS, tmp_path) for s in sequences)


def test_a_whole_cache_is_opened_while_another_process_captures(tmp_path, target, sequences):
    capture_features(target, sequences, LAYERS, tmp_path)
    with FileLock(tmp_path / "capture.lock"):
        cache = capture_features(target, sequences, LAYERS, tmp_path)
        assert cache.read(sequences[0]).shape == (len(sequences[0].tokens), len(LAYERS) * HIDDEN)


def test_a_reader_sees_what_another_process_captures_later(tmp_path, target, sequences):
    capture_features(target, sequences[:2], LAYERS, tmp_path)
    reader = open_cache(tmp_path, target)
    assert sequences[3] not in reader
    capture_features(target, sequences, LAYERS, tmp_path)
    assert_close(reader.read(sequences[3]), compute_features(target, [sequences[3]], LAYERS)[0])
