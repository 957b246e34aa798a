"""Whatever a recipe says: it works, or it is refused by one line; never a traceback, and nothing large is begun."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domino_spec.recipe import LARGEST_FILE, DataRecipe, DraftRecipe, HeadRecipe, OptimizationRecipe, Recipe
from tests.cli_fixtures import make_target_dir, run, succeed, write_recipe  # noqa: F401

PARTS = {"draft": DraftRecipe, "data": DataRecipe, "training": OptimizationRecipe}
PATHS = [
    *((name,) for name in (f.name for f in dataclasses.fields(Recipe))),
    *((part, f.name) for part, kind in PARTS.items() for f in dataclasses.fields(kind)),
    *(("draft", "head", f.name) for f in dataclasses.fields(HeadRecipe)),
]
"""Every key of a recipe."""

BAD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, -1, 64, 10**6, 2**31, 2**63, -(2**63), 2**64, 10**30]),
    st.integers(),
    st.sampled_from([0.0, 0.5, -0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]),
    st.floats(),
    st.sampled_from(
        ["", " ", "off", "1", "nan", "x" * 300, "../..", "a/b", "\x00", "http://[::1", "\ud800", "/dev/zero"]
    ),
    st.text(max_size=20),
    st.lists(st.integers(-2, 5), max_size=3),
    st.lists(st.one_of(st.text(max_size=3), st.floats(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just([[[[[]]]]]),
    st.just(datetime.date(2024, 1, 1)),
)
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(PATHS), BAD_VALUES),
        st.tuples(st.just("drop"), st.sampled_from(PATHS), st.none()),
        st.tuples(st.just("add"), st.sampled_from([(), ("draft",), ("training",), ("draft", "head")]), BAD_VALUES),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, target_dir) -> Path:
    """A recipe that works, for a tiny target."""
    return write_recipe(tmp_path_factory.mktemp("recipes") / "recipe.yaml", target_dir)


def mutate(values: dict, kind: str, path: tuple[str, ...], value: object) -> None:
    """Change what stands under `path`, where there is such a place."""
    inner = values
    for key in path[:-1] if kind != "add" else path:
        if not isinstance(inner.get(key), dict):
            return
        inner = inner[key]
    if kind == "set":
        inner[path[-1]] = value
    elif kind == "drop":
        inner.pop(path[-1], None)
    else:
        inner["unheard_of"] = value


def check(path: Path) -> str | None:
    """What the dry run says against a recipe: one line, or None where it works."""
    result = run("train", path, "--dry-run", "--json")
    if result.exit_code == 0:
        return None
    assert result.exit_code == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("domino-spec: error: ") and line.isprintable() and len(line) < 1200
    return line


SETTINGS = settings(
    derandomize=True,
    deadline=datetime.timedelta(seconds=30),  # far above what any takes: for what would hang
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.slow
@settings(SETTINGS, max_examples=40)
@given(mutations=MUTATIONS)
def test_a_mutated_recipe_works_or_is_one_line(recipe, mutations):
    check_mutated(recipe, mutations)


@pytest.mark.slow
@settings(SETTINGS, max_examples=400)
@given(mutations=MUTATIONS)
def test_hundreds_of_mutated_recipes_work_or_are_one_line(recipe, mutations):
    check_mutated(recipe, mutations)


def check_mutated(recipe: Path, mutations: list[tuple]) -> None:
    values = yaml.safe_load(recipe.read_text())
    for mutation in mutations:
        mutate(values, *mutation)
    mutated = recipe.with_name("mutated.yaml")
    mutated.write_text(yaml.safe_dump(values, allow_unicode=False), encoding="utf-8", errors="surrogatepass")
    check(mutated)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_no_key_takes_just_anything(recipe, path):
    """Every one of these is wrong for every key, whatever its type; the line names the key."""
    for value in (2**63, math.nan, {"a": 1}, [["x"]], -1, ""):
        values = yaml.safe_load(recipe.read_text())
        mutate(values, "set", path, value)
        mutated = recipe.with_name("mutated.yaml")
        mutated.write_text(yaml.safe_dump(values), encoding="utf-8")
        line = check(mutated)
        assert line is not None and str(mutated) in line and (path[-1] in line or value == {"a": 1})


@pytest.mark.parametrize(
    "text, message",
    [
        ("target: a\ntarget: b\n", "line 2: key 'target' stands twice"),
        ("draft: {head: null, head: {}}\n", "line 1: key 'head' stands twice"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2: write the value out in place of the alias *a"),
        ("target: &a [*a]\n", "in place of the alias *a"),
        ("base: &base {steps: 1}\ntraining:\n  <<: *base\n", "in place of the alias *base"),
        ("training:\n\tsteps: 1\n", "line 2: "),
        ("[" * 20_000, "nested too deep"),
        ("{a: " * 5_000, "nested too deep"),
        ("x" * LARGEST_FILE + "y", "more than 32,768 bytes"),
        ("target: 2001-99-99\n", "month must be in 1..12"),
        ("target: !!python/object:os.system x\n", "could not determine a constructor"),
        ("target: !!bool maybe\n", "not valid YAML"),
        ("target: !!float ''\n", "not valid YAML"),
        ("target: !!timestamp x\n", "not valid YAML"),
        ("training: {steps: " + "9" * 5000 + "}\n", "not valid YAML"),
        ("training: {steps: " + ":".join(["59"] * 600) + ".5}\n", "not valid YAML"),
        ("? [a]\n: b\n", "not valid YAML"),
        ("1: 2\n", "unknown key '1'"),
        ("null: 2\n", "unknown key 'null'"),
        ("target: a\n---\ntarget: b\n", "expected a single document"),
        ("%YAML 9.9\n--- a\n", "not valid YAML"),
        ("target: \x07\n", "not valid YAML"),
    ],
)
def test_odd_yaml_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    line = check(path)
    assert line is not None and message in line and str(path) in line


@pytest.mark.parametrize(
    "content, message",
    [
        (b"target: \xff\xfe\n", "is not UTF-8 text: invalid start byte at byte 8"),
        ("target: a\n".encode("utf-16"), "is not UTF-8 text"),
        (bytes(100), "not valid YAML"),
    ],
    ids=["latin-1", "utf-16", "zeros"],
)
def test_bytes_that_are_no_text_are_one_line(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    line = check(path)
    assert line is not None and message in line


def test_a_file_without_end_is_no_recipe():
    line = check(Path("/dev/zero"))
    assert line is not None and "more than 32,768 bytes" in line


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("draft", dict(block_size=1), "draft: block_size must be at least 2 for drafts of model block"),
        ("draft", dict(head=dict(pure_draft_prefix_len=4)), "draft: head.pure_draft_prefix_len 4 leaves no token of"),
        ("draft", dict(target_layer_ids=[]), "draft.target_layer_ids: expected at least one"),
        ("draft", dict(target_layer_ids=[1, 1]), "draft.target_layer_ids: expected each only once"),
        ("draft", dict(target_layer_ids=[4]), "target_layer_ids holds 4"),
        ("draft", dict(init_layers_from_target=[0, 1]), "draft.init_layers_from_target names 2 layers"),
        ("draft", dict(init_layers_from_target=[5]), "draft.init_layers_from_target holds 5"),
        ("training", dict(block_schedule=[2, 4]), "training.block_schedule holds 4, but the draft's own blocks have 4"),
        ("training", dict(epochs=math.inf, steps=None), "training.epochs: expected finite number, found inf"),
        ("training", dict(weight_decay=math.nan), "training.weight_decay: expected finite number, found nan"),
        ("training", dict(seed=2**63), "training.seed: expected integer of at most 64 bits"),
        ("training", dict(seed=2**62), "training.seed: expected 0 to 4,294,967,295"),
        ("training", dict(batch_size=10**6), "training.batch_size: expected 1 to 65,536, found 1000000"),
        ("data", dict(server="localhost:8000"), "data.server: server must be a URL such as http://localhost:8000"),
        ("data", dict(server="http://localhost:99999"), "data.server: server must be a URL"),
        ("data", dict(responses="a\nb"), "data.responses: expected a path or name without control characters"),
        ("data", dict(responses="x" * 256), "data.responses: expected a path or name of at most 255 characters"),
    ],
)
def test_what_cannot_be_is_said_with_key_and_value(recipe, part, changes, message):
    values = yaml.safe_load(recipe.read_text())
    values[part] |= {key: value for key, value in changes.items() if value is not None}
    for key in (key for key, value in changes.items() if value is None):
        values[part].pop(key, None)
    wrong = recipe.with_name("wrong.yaml")
    wrong.write_text(yaml.safe_dump(values))
    line = check(wrong)
    assert line is not None and message in line


@pytest.mark.slow
def test_the_largest_values_of_all_are_estimated(recipe):
    """Shapes are worked out without contents, so they cost no memory; nothing overflows."""
    values = yaml.safe_load(recipe.read_text())
    head = dict(gru_hidden_dim=65_536, low_rank=65_536, pure_draft_prefix_len=7)
    values["draft"] |= dict(num_layers=256, block_size=8, intermediate_size=262_144, head=head)
    values["data"] |= dict(max_length=1_048_576, held_out=10**9)
    values["training"] |= dict(steps=10**9, batch_size=65_536, micro_batch_size=1024, anchors=65_536)
    largest = recipe.with_name("largest.yaml")
    largest.write_text(yaml.safe_dump(values))
    assert "not a measurement" in succeed("train", largest, "--dry-run")


def test_answers_that_are_wrong_are_not_taken_for_answers_that_are_missing(recipe, tmp_path):
    """The dry run assumes a length where there are no tokens yet, not where there are bad ones."""
    values = yaml.safe_load(recipe.read_text())
    answers = tmp_path / "answers.jsonl"
    values["data"]["responses"] = str(answers)
    path = recipe.with_name("answers.yaml")
    path.write_text(yaml.safe_dump(values))
    row = '{"id": "a", "prompt_ids": [1], "response_ids": [2, 3]}\n'
    for content, message in ((row + "{\n", "line 2: not valid JSON"), (row, "held_out is 2, but there are only 1")):
        answers.write_text(content)
        line = check(path)
        assert line is not None and message in line
    for content in (b"\xff\n" * 9, b"3\n" * 9, b"[" * 100_000 + b"\n3" * 9):
        answers.write_bytes(content)
        assert "an assumption" in succeed("train", path, "--dry-run")
