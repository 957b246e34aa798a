"""Writing is all or nothing: whatever goes wrong, what was there before is still there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from domino_spec import files
from domino_spec.config import UserError
from domino_spec.files import atomic_path, load_tensors, read_json, save_tensors, write_json


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    no_space()


@pytest.mark.parametrize("where", ["while writing", "after half of it", "when flushing", "when renaming"])
def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch, where):
    path = tmp_path / "model.safetensors"
    save_tensors({"x": torch.ones(3)}, path)
    before = path.read_bytes()
    if where == "while writing":
        monkeypatch.setattr(files, "save_file", no_space)
    elif where == "after half of it":
        monkeypatch.setattr(files, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "fsync" if where == "when flushing" else "replace", no_space)
    with pytest.raises(UserError, match=r"cannot write .*model.safetensors: No space left on device") as error:
        save_tensors({"x": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"], "no scratch file is left behind"


def test_an_interrupt_leaves_the_previous_file(tmp_path):
    path = tmp_path / "notes.json"
    write_json({"a": 1}, path)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["notes.json"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_json({}, tmp_path / "file" / "below.json")


def test_saved_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    previous = os.umask(0o022)
    try:
        save_tensors({"x": torch.ones(3)}, tmp_path / "x.safetensors")
        write_json({}, tmp_path / "x.json")
    finally:
        os.umask(previous)
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {0o644}


def test_tensors_and_metadata_survive(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3), "c": torch.randn(2).bfloat16()}
    save_tensors(tensors, tmp_path / "x.safetensors", {"step": "3"})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "step": "3"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      tail"])
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_tensors(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "x.json")
