"""SGLang's server as a process of its own on CPU, tiny pairs on disk, and what this package's own engine drafts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State
from domino_spec.decoding.request import Limits
from domino_spec.draft.checkpoint import save_draft
from domino_spec.draft.domino import Draft
from domino_spec.drafters.block import BlockDrafter
from domino_spec.target.model import Target
from tests import tiny

STUBS = Path(__file__).parent / "sglang_stubs"
REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 240
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(STUBS), str(REPOSITORY)]),
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_models",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


if find_spec("sglang") is not None:  # let this process import it as the servers do
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"})
    if str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, decoded."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            return json.loads(response.read())

    def generate(self, prompts: list[list[int]], count: int, **sampling: Any) -> list[dict[str, Any]]:
        """`output_ids` and `meta_info` of every prompt, all sent at once; greedy unless told otherwise."""
        params = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True, **sampling}
        return self.post("/generate", {"input_ids": prompts, "sampling_params": params})


@contextlib.contextmanager
def server(
    directory: Path, target: Path | str, draft: Path | str | None = None, *options: str, capture: Path | None = None
) -> Iterator[Server]:
    """SGLang as a user starts it, on one core in fp32; what it says goes to a file in `directory`."""
    port = _free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(target), "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native"]
    command += ["--sampling-backend", "pytorch", "--max-total-tokens", "8192", "--max-running-requests", "64"]
    if draft is not None:
        command += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft)]
    environment = {**os.environ, **ENVIRONMENT}
    if capture is not None:
        environment["DOMINO_SPEC_TEST_CAPTURE"] = str(capture)
    log = directory / f"sglang-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    running = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(running)
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(running: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(running.url + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError("SGLang did not start:\n" + running.log.read_text(errors="replace")[-4000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def acceptance_length(answers: list[dict[str, Any]]) -> float:
    """Mean tokens per verify pass by SGLang's own counts."""
    infos = [answer["meta_info"] for answer in answers]
    passes = sum(info["spec_verify_ct"] for info in infos)
    return 1 + sum(info["spec_num_correct_drafts"] for info in infos) / passes


def save_tiny_pair(
    directory: Path, *, vocab_size: int = tiny.VOCAB, draft_vocab_ids: Tensor | None = None, **options: Any
) -> tuple[Path, Path, Draft, Target]:
    """A random target and a random Domino draft for it, written as directories, and the same in this process."""
    model = tiny.tiny_model(vocab_size=vocab_size)
    target = tiny.as_target(model)
    draft = tiny.tiny_draft(target, draft_vocab_ids=draft_vocab_ids, **options)
    model.save_pretrained(directory / "target")
    save_draft(draft, directory / "draft")
    return directory / "target", directory / "draft", draft, target


class Capture:
    """What the server's drafter proposed, read from the file that it is noted in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def fresh(self) -> list[dict[str, Any]]:
        """What was noted since the last call, once nothing more comes: the server runs a cycle ahead of its answers."""
        size = -1
        while size != (size := self.path.stat().st_size if self.path.exists() else 0):
            time.sleep(0.5)
        lines = self.path.read_text().splitlines() if size else []
        fresh, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in fresh]


def by_text(cycles: list[dict[str, Any]], prompt: list[int], answer: list[int]) -> dict[int, list[int]]:
    """Drafts of one request by the number of tokens before them; what follows its end is left out."""
    text, at, drafted = prompt + answer, len(prompt), {}
    for cycle in cycles:
        if at >= len(text):
            break
        assert cycle["anchor"] == text[at]
        drafted[at + 1] = cycle["drafts"]
        following = text[at + 1 :]
        agreeing = [a == b for a, b in zip(cycle["drafts"], following, strict=False)]
        at += 1 + [*agreeing, False].index(False)
    return drafted


class _Recorder(BlockDrafter):
    """This package's drafter, which notes what it proposed first."""

    first: list[int] | None = None

    def propose(self, state: State, own: Any, num_drafts: int) -> Proposal:
        proposal = super().propose(state, own, num_drafts)
        self.first = self.first or proposal.tokens[0].tolist()
        return proposal


@torch.no_grad()
def our_drafts(target: Target, draft: Draft, text: list[int]) -> list[int]:
    """What this package's engine drafts after a text."""
    drafter = _Recorder(draft)
    limits = Limits(1, stop_token_ids=frozenset())
    tiny.run(target, drafter, [text], 1, limits=limits, num_drafts=draft.config.block_size - 1)
    assert drafter.first is not None
    return drafter.first
