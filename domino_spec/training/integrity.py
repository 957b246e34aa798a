"""Protection against killed, doubled and damaged runs: locks, checksums, and repair of lines that were cut short."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from domino_spec.settings import UserError

_log = logging.getLogger(__name__)


@contextmanager
def only_writer(path: Path, lock: Path, instead: str | None = None) -> Iterator[None]:
    """Hold `lock`, so that no other process writes to `path` meanwhile. A kill releases it.

    Args:
        path: the directory or file that is written, for messages.
        lock: the file that is locked; made when missing, and left behind.
        instead: what the user can do if another process holds it; without that, this one waits, with a warning.

    Raises:
        UserError: another process holds the lock, or the lock cannot be made.
    """
    file = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=0)
        except Timeout:
            if instead is not None:
                raise UserError(f"{path} is in use by another process: wait until it ends, or {instead}") from None
            _log.warning("another process writes to %s; waiting for it to end", path)
            file.acquire()
    except NotImplementedError:  # some network file systems
        _log.warning("the file system of %s has no locks: see to it yourself that only one process writes", path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        file.release()


def remove_scratch(directory: Path) -> None:
    """Delete scratch files of killed processes (`files.atomic_path`). Call it only while no other process writes there.

    Raises:
        UserError: a file cannot be deleted.
    """
    for scratch in directory.glob(".*.partial"):
        try:
            scratch.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot delete {scratch}: {error.strerror}") from None


def tensors_checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over the facts that are kept with them."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def mend_last_line(path: Path, kept: str) -> None:
    """Cut off a last line without its line break, which a killed writer leaves, and log a warning.

    Args:
        path: a file of lines; if there is none, nothing happens.
        kept: what becomes of the content of that line, for the warning.

    Raises:
        UserError: the file cannot be read or written.
    """
    if not path.exists():
        return
    try:
        with path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole == len(content):
                return
            file.truncate(whole)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    _log.warning("%s ended in the middle of a line, which was cut off: %s", path, kept)
