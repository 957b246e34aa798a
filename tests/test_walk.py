"""How much a reader must read to follow the four main paths, on tiny models. The ceilings only ever go down."""

from __future__ import annotations

import pytest

from domino_spec import generate
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits, Request
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.drafters.methods import make_drafter
from tests import tiny
from tests.walk import Walk, recording

CEILINGS = {"generate": (15, 1113), "cycle": (11, 539), "training": (10, 519), "request": (20, 1240)}
"""Files of the package entered, and lines of the functions entered in them. A request is decoded in a thread of its
own, which may be a function further when the first token arrives: its ceiling leaves room for that."""


def assert_below(walk: Walk, path: str) -> None:
    files, lines = CEILINGS[path]
    told = "\n".join(f"{count:5d} {file}" for file, count in sorted(walk.lines_by_file.items()))
    print(path, len(walk.files), walk.lines)
    assert len(walk.files) <= files and walk.lines <= lines, f"{len(walk.files)} files, {walk.lines} lines:\n{told}"


@pytest.fixture(scope="module")
def pair():
    """A target and its Domino draft as they are loaded for decoding on a CPU."""
    target = tiny.tiny_target(tokenizer=tiny.word_tokenizer(), hidden_size=64, intermediate_size=64).pack()
    return target, tiny.tiny_draft(target, intermediate_size=64, head_sizes=(32, 16)).pack()


def test_generate_to_the_first_committed_block(pair):
    target, draft = pair
    with recording() as walk:
        (result,) = generate(target, draft, ["w1 w2 w3"], max_new_tokens=1)
    assert result.num_tokens == 1
    assert_below(walk, "generate")


def test_one_steady_cycle(pair):
    target, draft = pair
    drafter = make_drafter("domino-tree", draft, requests=1, device=target.device)
    engine = Engine(target, drafter, slots=1, capacity=64)
    engine.submit(Request([1, 2, 3], SamplingSettings(), Limits(32, stop_token_ids=frozenset())))
    engine.step()
    engine.step()
    with recording() as walk:
        (grown,) = engine.step()
    assert grown.finish_reason is None
    assert_below(walk, "cycle")


def test_one_training_step():
    sequences = tiny.as_sequences(tiny.random_prompts([3, 4]), tiny.random_prompts([9, 7], seed=9))
    trainer = tiny.make_trainer(tiny.tiny_target(), sequences, {})
    trainer.train_step()
    with recording() as walk:
        trainer.train_step()
    assert_below(walk, "training")


def test_a_request_to_its_first_streamed_token():
    pytest.importorskip("uvicorn")
    from tests.serve.running import serving, word_target

    target = word_target()
    with recording() as walk, serving(target, tiny.tiny_draft(target), capacity=64) as running:
        running.chat("w1", max_tokens=2)
        walk.codes.clear()
        chunks = running.chat("w1 w2 w3", max_tokens=1, stream=True)
        first = next(iter(chunks))
    assert first.choices
    assert_below(walk, "request")
