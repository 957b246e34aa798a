"""Whatever stands in a target's files, it loads and decodes, or is refused by one line; it never takes long."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domino_spec.api import generate
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.outline import outline_target
from tests.cli_fixtures import make_target_dir  # noqa: F401

PROCESSOR_SECONDS = 5
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
KEYS = {
    "config.json": ("rope_scaling", "rope_theta", "layer_types", "sliding_window", "text_config", "num_experts"),
    "generation_config.json": ("eos_token_id", "temperature", "max_length"),
    "tokenizer_config.json": ("chat_template", "tokenizer_class", "added_tokens_decoder", "extra_special_tokens"),
    "tokenizer.json": ("truncation", "padding"),
}
"""What a file may hold beside the keys that it has."""
NUMBERS = (-1, 0, 1, 2**31, 2**63, 2**64, 10**6, 0.5, -0.5, 1e30, float("nan"), float("inf"), -float("inf"))
WORDS = ("", "x", "\ud800", "float32", "sliding_attention", "yarn", "{{ 1 / 0 }}", "{% for %}", "{{ messages }}")
plain = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS)
json_values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("type", "rope_type", "0")), inner),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything in a JSON value, but for the many tokens of a vocabulary."""
    yield path
    if isinstance(value, dict) and len(value) < 40:
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def put(value: Any, path: tuple, new: Any) -> Any:
    """The JSON value with another one at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(copy.get(path[0]) if isinstance(copy, dict) else copy[path[0]], path[1:], new)
    return copy


@st.composite
def mutated_file(draw, target: Path) -> tuple[str, bytes]:
    """A file of a target, with one to three values replaced, or cut or spoiled as text."""
    name = draw(st.sampled_from(FILES))
    value = json.loads((target / name).read_text())
    for _ in range(draw(st.integers(1, 3))):
        more = [(key,) for key in KEYS[name]] if isinstance(value, dict) else []
        value = put(value, draw(st.sampled_from([*places(value), *more])), draw(json_values))
    content = json.dumps(value).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.sampled_from((b"", b"\xff", b"}", b"[" * 100_000))) + content[at + 1 :]
    return name, content


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Fail what computes for longer: time of this process, whatever else the machine does."""

    def stop(*_: Any) -> None:
        pytest.fail(f"more than {seconds} seconds of computing")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, target_dir):
    return shutil.copytree(target_dir, tmp_path_factory.mktemp("mutations") / "target")


@pytest.mark.slow
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_mutated_target_works_or_is_refused_by_one_line(target_dir, scratch, data):
    name, content = data.draw(mutated_file(target_dir))
    (scratch / name).write_bytes(content)
    try:
        for use in (outline_target, decode):
            with processor_time(PROCESSOR_SECONDS):
                try:
                    use(scratch)
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 800
    finally:
        shutil.copy(target_dir / name, scratch / name)


def decode(directory: Path) -> None:
    target = load_target(directory, device="cpu")
    (answer,) = generate(target, None, ["w3 w4"], max_new_tokens=2)
    assert answer.token_ids
