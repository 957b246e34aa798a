"""Building the native loops: once, and where that cannot be, one warning that says why and what to do."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from domino_spec.ops.native import bindings
from domino_spec.ops.native import build as native
from tests import sanitized

needs_library = pytest.mark.skipif(bindings.library() is None, reason="no C compiler here")
only_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compilers are looked for as on Linux")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMINO_SPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning that looking for the loops twice gives."""
    library = functools.cache(bindings.library.__wrapped__)
    assert library() is None and library() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("decoding and training on this CPU are slow, as the native loops are missing: ")
    assert "\n" not in text and text.endswith(". DOMINO_SPEC_NATIVE=0 says that this is wanted")
    return text


@only_linux
def test_no_compiler_is_said_with_the_remedy(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no C compiler; install gcc." in said(caplog)


def test_another_system_is_said(monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(native.platform, "system", lambda: "Windows")
    assert "they are built on Linux and macOS only, and this is Windows; run on one of them." in said(caplog)


@pytest.mark.slow
@only_linux
@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_loops_of_clang_use_one_thread_and_say_so(monkeypatch, caplog, threads):
    """GCC that says it is clang: it is asked for nothing else."""
    monkeypatch.setenv("CC", "gcc -D__clang__")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-U__clang__"))  # after that question
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    loaded = bindings.library.__wrapped__()
    assert loaded is not None and loaded.uses_threads() == 0
    assert ("use one thread only" in caplog.text) == (threads > 1)


@only_linux
def test_gcc_is_chosen_where_cc_may_be_clang(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert native._compiler() == ["/usr/bin/gcc"]
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "gcc" else f"/usr/bin/{name}")
    assert native._compiler() == ["/usr/bin/cc"]
    monkeypatch.setenv("CC", "ccache gcc-12")
    assert native._compiler() == ["ccache", "gcc-12"]


@only_linux
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/cc", "CC names /nowhere/cc, which is no program here; set it to a gcc or clang, or unset it."),
        ("false", "false does not build them (exit status 1); install gcc, and set CC to it."),
        ('gcc "', "No closing quotation"),
    ],
)
def test_a_compiler_that_fails_is_said(monkeypatch, caplog, tmp_path, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    assert reason in said(caplog)
    assert not list((tmp_path / "cache").rglob("*.*")), "nothing half built is kept"


@only_linux
@needs_library
def test_what_cannot_be_kept_or_loaded_is_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native, "_compile", lambda compiler, flags, linked: linked.write_text("no library"))
    assert "cannot be loaded" in said(caplog)
    caplog.clear()
    (tmp_path / "file").touch()
    monkeypatch.setenv("DOMINO_SPEC_CACHE", str(tmp_path / "file" / "below"))
    assert "cannot be kept" in said(caplog)


@pytest.mark.slow
@only_linux
@needs_library
@pytest.mark.parametrize("whose", ["group", "everyone", "another user's", "a file of another user's"])
def test_a_library_that_others_may_have_written_is_not_loaded(monkeypatch, caplog, tmp_path, whose):
    library = bindings.library.__wrapped__
    assert library() is not None and not caplog.records
    folder = tmp_path / "cache" / "native"
    (cached,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    cached.write_bytes(b"planted")
    if whose == "group":
        folder.chmod(0o770)
    elif whose == "everyone":
        folder.chmod(0o707)
    elif os.getuid() == 0:
        os.chown(folder if whose == "another user's" else cached, 12345, -1)
    else:
        pytest.skip("only root can give files away")
    assert library() is not None
    (record,) = caplog.records
    assert record.getMessage().startswith("the native loops are compiled anew at every start, as ")
    assert ("others may write" in caplog.text) == (whose in ("group", "everyone"))
    assert ("belongs to another user" in caplog.text) == (whose not in ("group", "everyone"))
    assert cached.read_bytes() == b"planted" and list(folder.iterdir()) == [cached]


def test_turned_off_they_are_missed_silently(monkeypatch, caplog):
    monkeypatch.setenv("DOMINO_SPEC_NATIVE", "0")
    assert bindings.library.__wrapped__() is None and not caplog.records


_SAY = "from domino_spec.ops.native import bindings; print('library', bindings.library() is not None)"


def _in_a_new_process(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _SAY], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@needs_library
def test_loops_are_built_once(tmp_path):
    assert "library True" in _in_a_new_process()
    (built,) = (tmp_path / "cache" / "native").iterdir()
    when = built.stat().st_mtime_ns
    assert "library True" in _in_a_new_process()
    assert [built] == list((tmp_path / "cache" / "native").iterdir()) and built.stat().st_mtime_ns == when


@pytest.mark.slow
@only_linux
def test_a_user_who_has_set_up_no_logging_sees_the_warning(tmp_path):
    assert "are missing: CC names /nowhere/cc" in _in_a_new_process(CC="/nowhere/cc")


@only_linux
@needs_library
def test_sanitized_loops_do_not_take_the_place_of_the_others(monkeypatch):
    """They run only where the sanitizers' libraries have been loaded first."""
    monkeypatch.setattr(native, "_compile", lambda compiler, flags, linked: linked.write_text(" ".join(flags)))
    monkeypatch.setattr(native, "_open", lambda built: built)
    monkeypatch.delenv("DOMINO_SPEC_NATIVE_SANITIZE", raising=False)
    plain = native._load(["gcc"])
    monkeypatch.setenv("DOMINO_SPEC_NATIVE_SANITIZE", "1")
    checked = native._load(["gcc"])
    assert plain != checked
    assert "-fsanitize" not in plain.read_text() and "-fsanitize=address,undefined" in checked.read_text()


def test_every_test_that_is_run_with_sanitizers_exists():
    assert all((Path(__file__).parents[2] / test).is_file() for test in sanitized.TESTS)
