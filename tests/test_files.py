"""Writing is all or nothing: whatever goes wrong, what was there before is still there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

from domino_spec import files
from domino_spec.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    atomic_path,
    gather_tensors,
    load_tensors,
    outline_tensors,
    read_json,
    save_tensors,
    weight_files,
    write_json,
)
from domino_spec.settings import UserError
from tests.cli_fixtures import fail, make_draft_dir, make_target_dir, run  # noqa: F401


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


def header(text: str | bytes, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    """A safetensors file of such a header."""
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


TENSOR = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
BAD_TENSORS = {
    "a name twice": (header(f"{{{TENSOR},{TENSOR}}}"), "tensor a is in its header 2 times"),
    "metadata twice": (
        header(f'{{"__metadata__":{{"x":"1","x":"2"}},{TENSOR}}}'),
        "not a readable|tensor x is in its header 2 times",
    ),
    "truncated data": (header(f"{{{TENSOR}}}", data=bytes(4)), "not a readable safetensors file"),
    "truncated header": (header(f"{{{TENSOR}}}")[:20], "not a readable safetensors file"),
    "an absurd length": (header(f"{{{TENSOR}}}", length=2**62), "not a readable safetensors file"),
    "endless nesting": (header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "not a readable safetensors file"),
    "not UTF-8": (header(b'{"\xff":1}'), "not a readable safetensors file"),
    "a negative size": (header(f"{{{TENSOR.replace('[2]', '[-2]')}}}"), "not a readable safetensors file"),
    "too large a size": (header(f"{{{TENSOR.replace('[2]', '[4611686018427387904]')}}}"), "not a readable"),
}
BAD_JSON = {
    "endless nesting": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "NaN": (b'{"hidden_size": NaN}', "NaN is no number of JSON"),
    "infinity": (b'{"hidden_size": -Infinity}', "-Infinity is no number of JSON"),
    "a number beyond all": (b'{"hidden_size": 1e999}', "1e999 is too large"),
    "a number of many digits": (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "not UTF-8": (b'{"model_type": "\xff"}', "not UTF-8"),
    "half of it": (b'{"model_type": ', "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
    "a list": (b"[]", r"expected an object, found \[\]"),
    "null": (b"null", "expected an object, found null"),
}
BAD_INDEXES = {
    "no weight_map": ({}, "weight_map: expected a mapping of tensors to files, found null"),
    "a list": ([], r"expected an object, found \[\]"),
    "a list in it": ({"weight_map": ["x"]}, "weight_map: expected a mapping of tensors"),
    "nothing in it": ({"weight_map": {}}, "weight_map: expected a mapping of tensors"),
    "a number": ({"weight_map": {"x": 3}}, r"file beside it for tensor x, found 3 \(int\)"),
    "null": ({"weight_map": {"x": None}}, "file beside it for tensor x, found null"),
    "a path outside": ({"weight_map": {"x": "../x.safetensors"}}, "file beside it for tensor x"),
    "an absolute path": ({"weight_map": {"x": "/x.safetensors"}}, "file beside it for tensor x"),
    "a pickle": ({"weight_map": {"x": "pytorch_model.bin"}}, "file beside it for tensor x"),
    "a file that is not there": ({"weight_map": {"x": "x.safetensors"}}, r"x\.safetensors does not exist"),
    "no name of a file": ({"weight_map": {"x": "\0.safetensors"}}, "x"),
}
CASES = [
    *((f"weights: {name}", WEIGHTS_FILE, *case) for name, case in BAD_TENSORS.items()),
    *((f"configuration: {name}", "config.json", *case) for name, case in BAD_JSON.items()),
    *((f"index: {name}", INDEX_FILE, json.dumps(value).encode(), said) for name, (value, said) in BAD_INDEXES.items()),
]


@pytest.mark.parametrize(("name", "content", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_file_is_one_line_for_drafts_targets_and_the_check_alike(
    tmp_path, target_dir, draft_dir, name, content, said
):
    for role, original in (("target", target_dir), ("draft", draft_dir)):
        copy = shutil.copytree(original, tmp_path / role)
        if name == INDEX_FILE:
            (copy / WEIGHTS_FILE).unlink()
        (copy / name).write_bytes(content)
        pair = {"target": target_dir, "draft": draft_dir, role: copy}
        options = ("--target", pair["target"], "--draft", pair["draft"])
        lines = [
            fail("generate", "w3", *options),
            fail("serve", "--check", *options),
            run("inspect", pair["draft"], "--target", pair["target"]).stderr.removesuffix("\n"),
        ]
        for line in lines:
            assert re.search(said, line) and "\n" not in line
            assert line.count(str(copy)) == 1


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for file in "ab":
        save_tensors({"x": torch.ones(3)}, tmp_path / f"{file}.safetensors")
    write_json({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}, tmp_path / INDEX_FILE)
    with pytest.raises(UserError, match=r"b\.safetensors: tensor x is in another file, too"):
        gather_tensors(weight_files(tmp_path), outline_tensors)


def test_one_file_is_preferred_to_an_index_as_transformers_prefers_it(tmp_path):
    write_json({"weight_map": {"x": "a.safetensors"}}, tmp_path / INDEX_FILE)
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors"]
    save_tensors({"x": torch.ones(3)}, tmp_path / WEIGHTS_FILE)
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS_FILE]


def test_whole_numbers_are_read_where_they_are_a_list_alone(tmp_path):
    save_tensors({"ids": torch.arange(3), "packed": torch.ones(2, 2, dtype=torch.int32)}, tmp_path / WEIGHTS_FILE)
    outline = outline_tensors(tmp_path / WEIGHTS_FILE)
    assert outline["ids"].tolist() == [0, 1, 2]
    assert outline["packed"].is_meta and outline["packed"].dtype == torch.int32
