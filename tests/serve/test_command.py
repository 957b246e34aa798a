"""`domino-spec serve` as a process: what it prints, what it refuses at once, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from domino_spec.decoding.policy.adaptive import AdaptivePolicy
from domino_spec.decoding.policy.costs import CostModel
from domino_spec.serve.preflight import bind, is_loopback
from domino_spec.serve.server import make_engine
from domino_spec.settings import UserError
from tests.cli_fixtures import fail, make_draft_dir, make_target_dir  # noqa: F401
from tests.serve.running import PATIENCE

ROOT = Path(__file__).parent.parent.parent
COSTS = CostModel((1, 2), (1, 2, 8), ((0.01, 0.011, 0.012), (0.011, 0.012, 0.016)), (8,), ((0.001,), (0.002,)))


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command at work, and the address that it prints."""
    command = [sys.executable, "-m", "domino_spec", "serve", "--port", "0", *map(str, arguments)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r"is served at (http://127\.0\.0\.1:\d+/v1)", line)
        assert found, (line, running.stderr and running.stderr.read())
        yield running, found[1]
    finally:
        running.kill()
        running.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_a_signal_mid_stream_drains_and_the_command_ends_well(tmp_path, target_dir, draft_dir):
    costs = tmp_path / "costs.json"
    options = ("--target", target_dir, "--draft", draft_dir, "--slots", 2, "--costs", costs)
    for number in (signal.SIGTERM, signal.SIGINT):
        with process(*options, "--served-model-name", "mine") as (running, address):
            assert CostModel.load(costs).requests == (1, 2)
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE)
            ask = dict(model="mine", prompt="w3 w4", temperature=0, max_tokens=200)
            whole = client.completions.create(**ask).choices[0].text
            stream = client.completions.create(stream=True, **ask)
            first = next(stream).choices[0].text
            running.send_signal(number)
            rest = [choice for chunk in stream for choice in chunk.choices]
            assert first + "".join(choice.text for choice in rest) == whole
            assert rest[-1].finish_reason in ("length", "stop")
            _, errors = running.communicate(timeout=PATIENCE)
            assert running.returncode == 0
            records = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
            assert [(r["route"], r["status"]) for r in records] == [("/v1/completions", 200)] * 2
            assert "w3" not in errors and "Traceback" not in errors


@pytest.mark.slow
def test_without_a_draft_the_target_is_served_alone(target_dir):
    with process("--target", target_dir, "--draft", "none", "--slots", 1) as (_, address):
        client = openai.OpenAI(base_url=address, api_key="none", timeout=PATIENCE)
        usage = client.completions.create(model=str(target_dir), prompt="w3", max_tokens=9, temperature=0).usage
        assert usage.model_extra["num_drafts"] == 0 and usage.model_extra["acceptance_length"] == 1


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("DOMINO_SPEC_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "give --api-key or DOMINO_SPEC_API_KEY" in fail("serve", "--host", host)
        assert not is_loopback(host)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(host)
    bind("0.0.0.0", 0, "key").close()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in fail("serve", "--port", port, "--target", "no/such")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install starlette uvicorn prometheus_client" in fail("serve")


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["serve", "check"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "slots must be between 1 and 1,024, got 0"),
        (["--slots", "20000"], "slots must be between 1 and 1,024, got 20000"),
        (["--num-drafts", "-1"], "num_drafts must not be negative, got -1"),
        (["--api-key", "k\udcff"], "--api-key is not valid UTF-8 text: character 2"),
        (["--served-model-name", "\udcff"], "--served-model-name is not valid UTF-8"),
        (["--cors-origin", "\udcff"], "--cors-origin is not valid UTF-8"),
        (["--host", "\udcff"], "--host is not valid UTF-8"),
        (["--host", "no host"], "--host: expected an address or a host name, such as 127.0.0.1, found 'no host'"),
        (["--host", "1.2.3.999"], "--host: expected an address or a host name"),
        (["--host", ""], "--host: expected an address or a host name"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen on 192.0.2.1: Cannot assign"),
        (["--costs", __file__], "delete the file, and what passes cost is measured again"),
        (["--costs", "new.json", "--num-drafts", "2"], "--costs is for choosing the number of drafts"),
        (["--costs", "new.json", "--draft", "none"], "--costs keeps what drafting costs"),
        (["--draft", "none", "--candidates", "8"], "--candidates means nothing to method none"),
        (["--timeout", "-1"], "--timeout must be between 0 and 1,000,000 seconds, got -1"),
        (["--drain-seconds", "-1"], "--drain-seconds must be between 0 and 1,000,000 seconds, got -1"),
        (["--timeout", "nan"], "'nan' is not a finite number"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--max-queue", "-1"], "--max-queue"),
        (["--method", "domino", "--target", "some/other"], "needs a draft made for some/other"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options, message, check):
    assert message in fail("serve", *check, *options)


def test_settings_of_the_engine_are_checked(words, draft):
    for options, message in (
        (dict(slots=0), "slots must be between 1 and 1,024, got 0"),
        (dict(slots=1, capacity=1), "capacity must be between 2 and the 512 tokens"),
        (dict(slots=1, capacity=513), "capacity must be between 2 and the 512 tokens"),
        (dict(slots=1, num_drafts=-1), "num_drafts must not be negative"),
        (dict(slots=1, method="eagle3"), "method eagle3 needs an EAGLE-3 draft"),
    ):
        with pytest.raises(UserError, match=message):
            make_engine(words, draft, **options)


def test_drafting_adapts_unless_the_number_is_given(words, draft, tmp_path):
    file = tmp_path / "deep" / "costs.json"
    lines: list[str] = []
    measured = make_engine(words, draft, slots=2, costs_file=file, report=lines.append)
    assert isinstance(measured.policy, AdaptivePolicy) and measured.policy.costs == CostModel.load(file)
    assert any("measuring" in line for line in lines) and any(str(file) in line for line in lines)
    COSTS.save(file)
    read = make_engine(words, draft, slots=2, costs_file=file)
    assert isinstance(read.policy, AdaptivePolicy) and read.policy.costs == COSTS
    assert read.stats.cycles == 0 and not read.busy
    for fixed in (make_engine(words, draft, slots=2, num_drafts=3), make_engine(words, None, slots=2)):
        assert fixed.policy is None
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="missing key"):
        make_engine(words, draft, slots=2, costs_file=file)


def test_an_empty_key_is_no_key(monkeypatch):
    monkeypatch.setenv("DOMINO_SPEC_API_KEY", "")
    assert "give --api-key" in fail("serve", "--host", "0.0.0.0")
