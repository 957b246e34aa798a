"""What a user can get wrong: one line on standard error that names the culprit, exit status 2, never a traceback."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from domino_spec import files
from domino_spec.draft.checkpoint import save_draft
from tests.cli_fixtures import (  # noqa: F401
    PROMPT,
    fail,
    make_draft_dir,
    make_target_dir,
    make_trained_run,
    new_draft,
    run,
    save_target,
    succeed,
    write_jsonl,
    write_prompts,
    write_recipe,
)

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"


def copy_of(directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def corrupt(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[:64] = b"\xff" * 64
    (directory / WEIGHTS).write_bytes(content)


def pickle_weights(directory: Path, name: str = "pytorch_model.bin") -> None:
    tensors, _ = files.load_tensors(directory / WEIGHTS)
    torch.save(tensors, directory / name)
    (directory / WEIGHTS).unlink()


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_yaml(path: Path, section: str, **values: object) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe[section].update(values)
    path.write_text(yaml.safe_dump(recipe))


# The prompt and the numbers beside it


def test_no_prompt():
    assert "no prompt given" in fail("generate")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(prompt):
    assert "the prompt is empty" in fail("generate", prompt)
    assert "the prompt is empty" in fail("generate", "-", input=prompt)


NOT_UTF8 = b"w3 \xff\xfe w4".decode("utf-8", "surrogateescape")
"""What Python makes of bytes on a command line that are not UTF-8."""


def test_a_prompt_that_is_not_utf8(tmp_path, target_dir):
    target = ("--target", target_dir, "--method", "none", "--max-new-tokens", 2)
    line = fail("generate", NOT_UTF8, *target)
    assert "the prompt is not valid UTF-8 text: character 4 of it" in line
    assert "a stop string is not valid UTF-8 text" in fail("generate", PROMPT, *target, "--stop", NOT_UTF8)
    assert "UTF-8" in fail("generate", "-", *target, input=b"w3 \xff w4")
    assert "--prompt is not valid UTF-8 text" in fail("demo", "--prompt", NOT_UTF8)
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"id": "p", "turns": ["w3 \\ud800 w4"]}\n')  # half a pair, which JSON can write
    line = fail("bench", "--suite", suite, "--target", target_dir, "--methods", "none", "--out", tmp_path / "bench")
    assert "not valid UTF-8 text" in line
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(suite))
    assert "not valid UTF-8 text" in fail("regenerate", recipe, "--out", tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("option", "value", "culprit"),
    [
        ("--temperature", "nan", "'nan' is not a finite number"),
        ("--temperature", "1e-300", "temperature must be 0 or between 1e-05 and 100000, got 1e-300"),
        ("--seed", str(2**63), f"seed must fit into 64 bits, got {2**63}"),
        ("--num-drafts", "many", "'many'"),
        ("--temperature", "-0.5", "temperature must not be negative, got -0.5"),
        ("--temperature", "warm", "'warm'"),
        ("--top-p", "0", "top_p must be greater than 0 and at most 1, got 0.0"),
        ("--top-p", "1.5", "top_p must be greater than 0 and at most 1, got 1.5"),
        ("--top-k", "-1", "top_k must not be negative, got -1"),
        ("--max-new-tokens", "0", "max_new_tokens must be at least 1, got 0"),
        ("--num-drafts", "-1", "num_drafts must not be negative, got -1"),
        ("--candidates", "-1", "candidates must be at least 1, got -1"),
        ("--min-confidence", "1", "min_confidence must be at least 0 and less than 1, got 1.0"),
        ("--stop", "", "stop string"),
        ("--threads", "0", "--threads must be at least 1 and at most 1024, got 0"),
        ("--device", "abacus", "'abacus'"),
        ("--method", "guess", "'guess'"),
        ("--dtype", "int4", "'int4'"),
        ("--colour", "", "--colour"),
    ],
)
def test_an_option_that_cannot_be_used(target_dir, draft_dir, option, value, culprit):
    arguments = (option, value) if option != "--colour" else (option,)
    assert culprit in fail("generate", PROMPT, "--target", target_dir, "--draft", draft_dir, *arguments)


def test_an_unknown_command():
    assert "'fly'" in fail("fly")


def test_a_prompt_longer_than_the_context(target_dir):
    line = fail("generate", "w3 " * 300, "--target", target_dir)
    assert "302 tokens" in line and "context of 256 tokens" in line


def test_max_new_tokens_beyond_the_context(target_dir):
    assert "max_new_tokens 300" in fail("generate", PROMPT, "--target", target_dir, "--max-new-tokens", 300)


def test_a_method_without_its_draft(target_dir):
    line = fail("generate", PROMPT, "--target", target_dir, "--method", "domino")
    assert "method domino needs a draft" in line and "--draft" in line
    assert "give --draft" in fail("demo", "--target", target_dir)


def test_a_domino_method_with_a_draft_without_a_head(tmp_path, target_dir):
    save_draft(new_draft(target_dir, head=False), tmp_path)
    line = fail("generate", PROMPT, "--target", target_dir, "--draft", tmp_path, "--method", "domino")
    assert "method domino needs a Domino draft" in line and "DFlash" in line


def test_a_bench_without_what_it_needs(target_dir):
    assert "no suite given" in fail("bench", "--out", "out")
    assert "--out DIR" in fail("bench", "--suite", "x.jsonl")
    options = ("--suite", "x.jsonl", "--target", target_dir, "--out", "out")
    assert "method domino needs a draft" in fail("bench", *options)
    assert "method transformers-dflash needs a draft" in fail("bench", *options, "--methods", "transformers-dflash")


def test_a_comparison_of_what_is_no_bench(tmp_path):
    line = fail("bench", "--compare", tmp_path, tmp_path / "none")
    assert f"{tmp_path} is no bench directory" in line
    assert "leave out --suite" in fail("bench", "--compare", tmp_path, tmp_path, "--suite", "x.jsonl")
    assert "--compare" in fail("bench", "--compare", tmp_path)


# Targets


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "gpt9", "nobody/no-such-model"])
def test_a_target_that_does_not_exist(name):
    assert name in fail("generate", PROMPT, "--target", name)


def test_inspect_names_a_target_that_does_not_exist(draft_dir):
    result = run("inspect", draft_dir, "--target", "/no/such/model")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "/no/such/model" in result.stderr


def test_a_directory_that_is_not_a_model(tmp_path):
    line = fail("generate", PROMPT, "--target", tmp_path)
    assert str(tmp_path) in line and "config.json" in line
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert str(tmp_path) in fail("generate", PROMPT, "--target", tmp_path)
    (tmp_path / "config.json").write_text("not json")
    assert str(tmp_path) in fail("generate", PROMPT, "--target", tmp_path)


@pytest.mark.parametrize("spoil", [truncate, corrupt, pickle_weights])
def test_a_target_with_unreadable_weights(tmp_path, target_dir, spoil):
    target = copy_of(target_dir, tmp_path)
    spoil(target)
    assert str(target) in fail("generate", PROMPT, "--target", target)


def test_a_device_that_is_not_there(target_dir):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "--device cpu" in fail("generate", PROMPT, "--target", target_dir, "--device", "cuda")


# Drafts


@pytest.mark.parametrize("spoil", [truncate, corrupt])
def test_a_draft_with_unreadable_weights(tmp_path, target_dir, draft_dir, spoil):
    draft = copy_of(draft_dir, tmp_path)
    spoil(draft)
    for line in (fail("inspect", draft), fail("generate", PROMPT, "--target", target_dir, "--draft", draft)):
        assert str(draft / WEIGHTS) in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "draft.pt"])
def test_a_pickle_checkpoint_is_never_loaded(tmp_path, draft_dir, name):
    draft = copy_of(draft_dir, tmp_path)
    pickle_weights(draft, name)
    line = fail("inspect", draft)
    assert name in line and "safetensors" in line


def test_a_draft_that_does_not_exist(tmp_path, target_dir):
    assert str(tmp_path / "none") in fail("inspect", tmp_path / "none")
    assert "no such draft" in fail("generate", PROMPT, "--target", target_dir, "--draft", "no such draft")


def test_a_draft_that_is_a_file_or_none(target_dir, draft_dir):
    line = fail("generate", PROMPT, "--target", target_dir, "--draft", draft_dir / WEIGHTS)
    assert "is a file: give the directory that it is in" in line and "does not exist" not in line
    assert "--method none" in fail("generate", PROMPT, "--target", target_dir, "--draft", "none")


def test_a_directory_that_is_not_a_draft(tmp_path, target_dir):
    assert str(tmp_path) in fail("inspect", tmp_path)
    assert "ordinary model" in fail("inspect", target_dir)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"hidden_size": 64}, ("hidden size", "32", "64")),
        ({"vocab_size": 64}, ("vocabulary", "60", "64")),
        ({"num_hidden_layers": 5}, ("layers", "4", "5")),
        ({"seed": 9}, ("fingerprint",)),
    ],
)
def test_a_draft_made_for_another_target(tmp_path, draft_dir, overrides, what):
    other = save_target(tmp_path / "other", **overrides)
    for line in (
        fail("generate", PROMPT, "--target", other, "--draft", draft_dir),
        fail("demo", "--target", other, "--draft", draft_dir),
    ):
        assert str(draft_dir) in line and str(other) in line
        assert all(word in line for word in what)


def test_other_weights_of_the_same_shape_can_be_allowed(tmp_path, draft_dir):
    other = save_target(tmp_path / "other", seed=9)
    line = fail("generate", PROMPT, "--target", other, "--draft", draft_dir)
    assert "--allow-other-target" in line


def test_a_draft_of_block_size_1(tmp_path, draft_dir):
    draft = copy_of(draft_dir, tmp_path)
    edit_json(draft / "config.json", block_size=1)
    assert "block_size must be at least 2, got 1" in fail("inspect", draft)


# Recipes and JSONL


@pytest.fixture
def recipe(tmp_path, target_dir) -> Path:
    """A recipe whose files exist and hold something."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    rows = [{"id": f"a{i}", "prompt_ids": [1, 3], "response_ids": list(range(3, 30))} for i in range(4)]
    answers = write_jsonl(tmp_path / "answers.jsonl", rows)
    return write_recipe(tmp_path / "recipe.yaml", target_dir, prompts=str(prompts), responses=str(answers))


@pytest.mark.parametrize(
    ("section", "key", "value", "culprit"),
    [
        ("training", "lerning_rate", 1e-3, "unknown key 'lerning_rate'"),
        ("training", "steps", "many", "training.steps: expected integer, found 'many'"),
        ("training", "steps", 0, "training.steps: expected 1 to 1,000,000,000, found 0"),
        ("training", "learning_rate", [1], "learning_rate"),
        ("draft", "block_size", 1, "draft: block_size must be at least 2 for drafts of model block, got 1"),
        ("draft", "head", 3, "draft.head"),
        ("data", "temperature", -1, "data.temperature: expected 0 to 100, found -1"),
    ],
)
def test_a_recipe_with_a_bad_key(tmp_path, recipe, section, key, value, culprit):
    edit_yaml(recipe, section, **{key: value})
    line = fail("train", recipe, "--out", tmp_path / "run")
    assert culprit in line


def test_a_recipe_that_cannot_be_read(tmp_path):
    for command in ("train", "regenerate"):
        assert "none.yaml" in fail(command, tmp_path / "none.yaml", "--out", tmp_path / "out")
    (tmp_path / "bad.yaml").write_text("target: [")
    assert "bad.yaml is not valid YAML" in fail("train", tmp_path / "bad.yaml", "--out", tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "expected mapping" in fail("train", tmp_path / "list.yaml", "--out", tmp_path / "out")


def test_a_recipe_without_prompts(tmp_path, target_dir):
    recipe = write_recipe(tmp_path / "recipe.yaml", target_dir)
    assert "data.prompts" in fail("regenerate", recipe, "--out", tmp_path / "out.jsonl")


BAD_LINES = [
    ("{", "not valid JSON"),
    ("[1]", "expected an object"),
    ('{"turns": ["w3"]}', "'id'"),
    ('{"id": "x", "turns": "w3"}', "'turns'"),
    ('{"id": "x", "turns": []}', "'turns'"),
    ('{"id": "x", "turns": [7]}', "'turns'"),
    ('{"id": "p0", "turns": ["w3"]}', "'p0'"),
]


@pytest.mark.parametrize(("text", "culprit"), BAD_LINES)
def test_a_malformed_line_of_prompts_is_named_by_its_number(tmp_path, target_dir, recipe, text, culprit):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text() + "\n" + text + "\n")
    line = fail("regenerate", recipe, "--out", tmp_path / "out.jsonl")
    assert f"{prompts} line 6" in line and culprit in line
    line = fail("bench", "--suite", prompts, "--target", target_dir, "--methods", "none", "--out", tmp_path / "bench")
    assert f"{prompts} line 6" in line and culprit in line


def test_a_malformed_line_of_answers_is_named_by_its_number(tmp_path, recipe):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(answers.read_text() + '{"id": "x", "prompt_ids": [1]}\n')
    for command, out in (("train", tmp_path / "run"), ("regenerate", answers)):
        assert f"{answers} line 5: key 'response_ids'" in fail(command, recipe, "--out", out)


def test_answers_of_another_vocabulary(tmp_path, recipe):
    write_jsonl(tmp_path / "answers.jsonl", [{"id": "x", "prompt_ids": [1], "response_ids": [3, 600, 4]}])
    assert "vocabulary of 60" in fail("train", recipe, "--out", tmp_path / "run")


def test_jsonl_that_cannot_be_read(tmp_path, recipe):
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "prompts.jsonl is not UTF-8 text" in fail("regenerate", recipe, "--out", tmp_path / "out.jsonl")
    (tmp_path / "prompts.jsonl").unlink()
    assert "cannot read" in fail("regenerate", recipe, "--out", tmp_path / "out.jsonl")
    (tmp_path / "answers.jsonl").unlink()
    assert "answers.jsonl" in fail("train", recipe, "--out", tmp_path / "run")


def test_a_run_of_another_recipe_is_not_continued(tmp_path, trained_run):
    directory, recipe = trained_run
    other = tmp_path / "other.yaml"
    shutil.copy(recipe, other)
    edit_yaml(other, "training", steps=5)
    before = (directory / "state.safetensors").read_bytes()
    assert str(directory) in fail("train", other, "--out", directory)
    assert (directory / "state.safetensors").read_bytes() == before


def test_a_run_without_a_draft_cannot_be_exported(tmp_path):
    assert str(tmp_path / "run") in fail("export", tmp_path / "run", "--out", tmp_path / "draft")


# A disk that fills up


def full_disk(monkeypatch) -> None:
    """From here on, writing tensors stops in the middle of the file."""

    def write_half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", write_half)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_a_full_disk_while_exporting_keeps_the_previous_draft(tmp_path, trained_run, monkeypatch):
    directory, _ = trained_run
    out = tmp_path / "draft"
    succeed("export", directory, "--out", out)
    before = contents(out)
    full_disk(monkeypatch)
    line = fail("export", directory, "--out", out, "--dtype", "fp32")
    assert str(out / WEIGHTS) in line and "No space left on device" in line
    assert contents(out) == before


def test_a_full_disk_while_training_keeps_the_previous_checkpoint(tmp_path, recipe, monkeypatch):
    edit_yaml(recipe, "training", checkpoint_minutes=0.0)
    out = tmp_path / "run"
    write_tensors = files.save_file

    def second_state_finds_the_disk_full(tensors, path, metadata=None):
        write_tensors(tensors, path, metadata)
        if "state.safetensors" in str(path):
            full_disk(monkeypatch)

    monkeypatch.setattr(files, "save_file", second_state_finds_the_disk_full)
    line = fail("train", recipe, "--out", out, "--json")
    assert str(out) in line and "No space left on device" in line
    tensors, metadata = files.load_tensors(out / "state.safetensors")
    assert metadata["step"] == "1" and tensors
    assert not list(out.rglob("*.partial"))
    monkeypatch.undo()
    succeed("train", recipe, "--out", out)


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_is_reported_alike(tmp_path, trained_run):
    """The operating system itself stops the write, in a process of its own."""
    directory, _ = trained_run
    program = (
        "import resource, torch; from domino_spec.cli import main; import domino_spec.training.export\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); main()"
    )
    arguments = ["export", str(directory), "--out", str(tmp_path / "draft")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("domino-spec: error: cannot write") and str(tmp_path / "draft" / WEIGHTS) in line


@pytest.mark.slow
def test_the_installed_command_shows_no_traceback():
    command = [sys.executable, "-m", "domino_spec", "inspect", "/no/such/draft"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("domino-spec: error: ") and "/no/such/draft" in line
