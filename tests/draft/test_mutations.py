"""Whatever stands in the `config.json` of a draft: it loads and drafts, or it is refused in one line.

Every text is the target's own, so what "drafts" means here is that decoding with the draft ends in that text.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domino_spec.draft import schema
from domino_spec.draft.load import describe_draft, load_draft, save_any_draft
from domino_spec.drafters.methods import make_drafter
from domino_spec.settings import UserError
from tests.tiny import plain_greedy, random_prompts, run, tiny_draft, tiny_model, tiny_single_layer, tiny_target

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 32, 61, 1000, 2**31, 2**63, -(2**63), 10**40),
    *(0.0, 0.5, 1.0, -1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "1", "none", "domino", "silu", "yarn", "before_norm", "after_norm", "\ud800", "x" * 5000),
    *([], [0], [3, 0], [0, 1, 3], [1.5], ["a"], [None], [[1]], [2**63], [0] * 5000),
    *({}, {"a": 1}, {"rope_type": "yarn"}, {"type": "linear", "factor": "x"}, {"full_attention": {"rope_theta": 5e5}}),
)
"""More than the 18 kinds of wrong value that once gave tracebacks in every key."""
NAMES = sorted(
    {f for cls in (schema.BlockKeys, schema.PairKeys, schema.DFlashKeys) for f in cls.__dataclass_fields__}
    | {"rope_scaling", "rope_parameters", "architectures", "transformer_layer_config", "speculators_model_type"}
    | {"is_causal", "final_logit_softcapping", "output_multiplier", "partial_rotary_factor", "attention_bias"}
)
LEFT_OUT = object()


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """A draft of every kind on disk, and its target."""
    target, root = tiny_target(), tmp_path_factory.mktemp("drafts")
    ids = torch.tensor([1, 4, 9, 30, 57])
    made = {
        "domino": tiny_draft(target, draft_vocab_ids=ids),
        "dflash": tiny_draft(target, head=False, shift_label=False, taps=(0, 2)),
        "eagle3": tiny_single_layer(target, draft_vocab_ids=ids),
        "dart": tiny_single_layer(target, "dart"),
    }
    for kind, draft in made.items():
        save_any_draft(draft, root / kind)
    speculators = json.loads((root / "eagle3" / "config.json").read_text())
    shutil.copytree(root / "eagle3", root / "speculators")
    layer = {key: speculators.pop(key) for key in list(speculators) if key not in ("draft_vocab_size", "domino_spec")}
    speculators |= {"speculators_model_type": "eagle3", "transformer_layer_config": layer}
    (root / "speculators" / "config.json").write_text(json.dumps(speculators))
    return target, root


def paths(config: dict) -> list[tuple[str, ...]]:
    """Every key of a configuration and of the objects in it, and every key that might be there."""
    found = [(name,) for name in {*config, *NAMES}]
    for name, value in config.items():
        if isinstance(value, dict):
            found += [(name, inner) for inner in {*value, *NAMES}]
    return sorted(found)


def mutated(config: dict, changes: list[tuple[tuple[str, ...], object]]) -> dict:
    config = copy.deepcopy(config)
    for path, value in changes:
        place = config
        for name in path[:-1]:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value is LEFT_OUT:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
    return config


def loads_and_drafts_or_is_refused(target, directory: Path) -> bool:
    """Whether it works; raises whatever is neither."""
    try:
        describe_draft(directory)
        draft = load_draft(directory, target)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and message.count(str(directory)) <= 1 and len(message) < 600, message
        return False
    drafter = make_drafter(draft.kind, draft, requests=1, device=target.device, num_drafts=3)
    (prompt,) = random_prompts([6])
    (generation,) = run(target, drafter, [prompt], 4)
    assert generation.token_ids == plain_greedy(MODEL, prompt, 4)
    return True


MODEL = tiny_model()
KINDS = ("domino", "dflash", "eagle3", "speculators", "dart")


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_draft_works(drafts, kind):
    target, root = drafts
    assert loads_and_drafts_or_is_refused(target, root / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_in_any_key_is_one_line_or_works(drafts, tmp_path, kind):
    target, root = drafts
    config = json.loads((root / kind / "config.json").read_text())
    directory = shutil.copytree(root / kind, tmp_path / "draft")

    @settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(paths(config)), st.sampled_from((*VALUES, LEFT_OUT))), min_size=1, max_size=3
        )
    )
    def check(changes):
        (directory / "config.json").write_text(json.dumps(mutated(config, changes)))
        started = time.process_time()
        loads_and_drafts_or_is_refused(target, directory)
        assert time.process_time() - started < 5, "of this process alone, so that a busy machine does not count"

    check()
