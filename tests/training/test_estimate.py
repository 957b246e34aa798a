"""The dry run: parameters, memory, steps and operations from shapes alone, equal to what training really holds."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pytest
import torch

from domino_spec.draft.checkpoint import read_config
from domino_spec.draft.initialize import new_draft
from domino_spec.recipe import DataRecipe, DraftRecipe, HeadRecipe, OptimizationRecipe, Recipe, load_recipe
from domino_spec.settings import UserError
from domino_spec.target.load import load_target, target_config
from domino_spec.target.outline import known_config
from domino_spec.training import blocks
from domino_spec.training import estimate as estimate_module
from domino_spec.training.blocks import forward_blocks, sample_anchors
from domino_spec.training.estimate import (
    ASSUMED_CONVERSATIONS,
    _FusedAttention,
    activation_bytes,
    draft_shape,
    estimate_lines,
    estimate_training,
    state_memory,
    step_operations,
)
from tests.cli_fixtures import fail, succeed, succeed_json, write_jsonl, write_recipe
from tests.published import save_dflash, save_qwen3
from tests.tiny import MemoryCache, as_sequences, fit, random_prompts, tiny_draft, tiny_target

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere fails the test."""

    def refuse(*arguments, **options):
        raise AssertionError("the dry run reached for the network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def recipe_8b(target: Path, draft: DraftRecipe | None = None, **training) -> Recipe:
    options = dict(epochs=1, micro_batch_size=2, parallel="fsdp")
    return Recipe(
        target=str(target),
        draft=draft or DraftRecipe(mask_token_id=151669),
        data=DataRecipe(features="online", responses="nowhere.jsonl"),
        training=OptimizationRecipe(**{**options, **training}),
    )


def test_a_draft_for_qwen3_8b_has_the_published_size(tmp_path):
    """docs/design.md, section 4: backbone 1.049 B, head 55.9 M (GRU 15.7, W1 1.3, W2 38.9); and the target 8.19 B."""
    estimate = estimate_training(recipe_8b(save_qwen3(tmp_path)), processes=8)
    counted = {name: round(count / 1e6, 1) for name, count in estimate.parameters.items()}
    assert counted == dict(backbone=1048.6, gru=15.7, w1=1.3, w2=38.9, head=55.9, total=1104.6, trained=1104.6)
    assert round(estimate.target_parameters / 1e9, 2) == 8.19
    memory = estimate.memory
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert memory["target_decoder"] + memory["target_ends"] == 2 * estimate.target_parameters, "bfloat16"
    assert memory["master_weights"] == 4 * estimate.parameters["total"] // 8, "sharded over 8 processes"
    assert memory["optimizer_moments"] == 8 * estimate.parameters["trained"] // 8


@pytest.mark.slow
def test_training_a_head_only_is_cheaper_in_every_way(tmp_path):
    target, published = save_qwen3(tmp_path / "target"), save_dflash(tmp_path / "draft")
    start = DraftRecipe(init_from=str(published))
    whole = estimate_training(recipe_8b(target, start), processes=8)
    head = estimate_training(recipe_8b(target, start, trained="head", curriculum="off"), processes=8)
    assert head.parameters == {**whole.parameters, "trained": whole.parameters["head"]}
    for name in ("gradients", "optimizer_moments", "activations", "step_copies"):
        assert head.memory[name] < 0.5 * whole.memory[name], name
    assert head.device_hours < 0.6 * whole.device_hours
    assert "55.9 M are trained" in estimate_lines(head)[0]


def test_a_recipe_that_contradicts_the_draft_it_starts_from_is_refused(tmp_path):
    target = save_qwen3(tmp_path / "target")
    start = DraftRecipe(init_from=str(save_dflash(tmp_path / "draft")), block_size=8)
    with pytest.raises(UserError, match=r"draft.block_size is 8 in the recipe and 16 in"):
        estimate_training(recipe_8b(target, start))
    other = DraftRecipe(init_from=str(save_dflash(tmp_path / "other", hidden_size=2560)))
    with pytest.raises(UserError, match="hidden size 2560, the target has 4096"):
        estimate_training(recipe_8b(target, other))


def test_the_shipped_recipe_makes_the_draft_that_is_shipped():
    recipe = load_recipe(RECIPES / "smollm2-135m-demo.yaml")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, responses="nowhere.jsonl"))
    estimate = estimate_training(recipe, processes=1)
    assert estimate.parameters["total"] == 10_534_528
    assert (estimate.steps, estimate.data.sequences) == (3000, ASSUMED_CONVERSATIONS)
    assert estimate.feature_cache == (ASSUMED_CONVERSATIONS + 64) * 1024 * 5 * 576 * 2


@pytest.mark.parametrize("trained", ["all", "head"])
def test_the_state_takes_the_memory_that_was_predicted(target, trained):
    draft = tiny_draft(target)
    sequences = as_sequences(random_prompts([4] * 8), random_prompts([12] * 8, seed=9))
    curriculum = "off" if trained == "head" else "linear"
    trainer = fit(target, draft, sequences, 1, trained=trained, curriculum=curriculum)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    moments = [trainer.optimizer.state[p][name] for p in held for name in ("exp_avg", "exp_avg_sq")]
    parameters = list(draft.parameters())
    predicted = state_memory(
        sum(p.numel() for p in parameters), sum(p.numel() for p in held), trainer.recipe, processes=1
    )
    assert predicted["master_weights"] == sum(p.nbytes for p in parameters)
    assert predicted["gradients"] == sum(p.nbytes for p in held)
    assert predicted["optimizer_moments"] == sum(m.nbytes for m in moments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(precision="float32"), dict(trained="head", curriculum="off"), dict(head=False, shift_label=False)],
    ids=["bfloat16", "float32", "head only", "dflash"],
)
def test_activations_are_those_that_a_real_pass_keeps(monkeypatch, changes):
    """With attention that keeps what a fused kernel keeps. Weights cancel between two numbers of blocks."""
    options = {name: changes.pop(name) for name in ("head", "shift_label") if name in changes}
    recipe = OptimizationRecipe(steps=1, **changes)
    target = tiny_target(hidden_size=64)
    draft = tiny_draft(target, block_size=4, **options).train().requires_grad_(True)
    draft.backbone.requires_grad_(recipe.trained == "all")
    draft.scale_features(torch.ones(draft.config.feature_size))
    sequences = as_sequences(random_prompts([8] * 2), random_prompts([80] * 2, seed=5))
    batch = MemoryCache(target, sequences, draft.config.target_layer_ids).batch(sequences)
    monkeypatch.setattr(blocks, "block_attention", lambda *_: _FusedAttention.apply)

    def real(count: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        anchors = [sample_anchors(s, count, torch.Generator().manual_seed(0)) for s in sequences]
        low_precision = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16")
        with low_precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = forward_blocks(draft, batch, anchors)
        assert kept is not None
        return sum(storages.values())

    rows = len(batch.tokens)
    predicted = activation_bytes(draft.config, recipe, rows, 80, 4) - activation_bytes(
        draft.config, recipe, rows, 20, 4
    )
    assert real(40) - real(10) == pytest.approx(predicted, rel=0.02)


def test_recomputed_layers_take_less_memory():
    config = tiny_draft(tiny_target(), layers=4).config
    plain, recomputed = (
        activation_bytes(config, OptimizationRecipe(steps=1, activation_checkpointing=on), 100, 50, 5)
        for on in (False, True)
    )
    assert recomputed < 0.6 * plain


def test_operations_and_steps_follow_from_the_answers_on_disk(setup):
    recipe = dataclasses.replace(setup.recipe(), training=OptimizationRecipe(epochs=2, batch_size=4, anchors=5))
    draft = DraftRecipe(block_size=4, num_layers=1, target_layer_ids=(0, 3), head=HeadRecipe(8, 4), mask_token_id=7)
    recipe = dataclasses.replace(recipe, draft=draft)
    estimate = estimate_training(recipe, processes=1)
    target = load_target(setup.target, device="cpu", pack=False)
    assert (estimate.data.counted, estimate.data.sequences) == (str(setup.responses), 16)
    assert (estimate.steps, estimate.epochs) == (8, 2)
    rows = [json.loads(line) for line in setup.responses.read_text().splitlines()]
    tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert estimate.data.cached_tokens == tokens
    assert estimate.feature_cache == tokens * 2 * 32 * 4, "two taps of 32 in float32"
    decoder = sum(p.numel() for p in target.decoder.layers.parameters()) + target.hidden_size
    assert estimate.memory["target_decoder"] == 4 * decoder

    shape = as_sequences([r["prompt_ids"] for r in rows], [r["response_ids"] for r in rows])
    config = new_draft(draft, target, None, seed=0).config
    expected = sum(step_operations(config, recipe.training, shape).values())
    assert estimate.step_operations["total"] == pytest.approx(expected, rel=0.05), "another held-out part"


def test_features_from_the_target_cost_operations_instead_of_disk(setup):
    disk = setup.recipe()
    online = dataclasses.replace(disk, data=dataclasses.replace(disk.data, features="online"))
    cached, computed = estimate_training(disk, processes=1), estimate_training(online, processes=1)
    assert cached.feature_cache > 0 and cached.step_operations["target"] == 0
    assert computed.feature_cache == 0 and computed.step_operations["target"] > 0
    assert cached.operations > cached.steps * cached.step_operations["total"], "captured once"
    assert computed.operations == computed.steps * computed.step_operations["total"]


def test_the_number_of_processes_is_torchruns(setup, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert estimate_training(setup.recipe()).processes == 2
    with pytest.raises(UserError, match="3 processes cannot share evenly"):
        estimate_training(setup.recipe(), processes=3)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_dry_run_of_a_shipped_recipe_needs_neither_hub_nor_weights(path, tmp_path, monkeypatch):
    """Not even a cache of either: shapes of the targets and drafts that it names come with the package."""
    monkeypatch.setattr(estimate_module, "target_config", lambda name: pytest.fail(f"{name} was looked for"))
    monkeypatch.setattr(estimate_module, "draft_directory", lambda *a, **o: pytest.fail("a draft was looked for"))
    monkeypatch.chdir(tmp_path)
    assert f"{estimate_training(load_recipe(path)).parameters['total']:,} parameters" in succeed(
        "train", path, "--dry-run"
    )


def test_known_shapes_are_those_of_the_published_configurations(tmp_path):
    for name in ("Qwen3-4B", "Qwen3-8B"):
        published = target_config(save_qwen3(tmp_path / name, name))
        known = known_config(f"Qwen/{name}")
        for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim"):
            assert getattr(known, key) == getattr(published, key), (name, key)
        assert known.tie_word_embeddings == published.tie_word_embeddings
        start = read_config(save_dflash(tmp_path / f"{name}-draft", name))
        shape = draft_shape(recipe_8b(f"Qwen/{name}", DraftRecipe(init_from=f"z-lab/{name}-DFlash-b16")), known)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "target_layer_ids",
            "block_size",
            "mask_token_id",
            "shift_label",
        ):
            assert getattr(shape, key) == getattr(start, key), (name, key)


def test_a_directory_with_the_name_of_a_known_target_is_what_is_meant(tmp_path, monkeypatch):
    save_qwen3(tmp_path / "Qwen" / "Qwen3-8B", "Qwen3-4B")
    monkeypatch.chdir(tmp_path)
    assert round(estimate_training(recipe_8b("Qwen/Qwen3-8B"), processes=8).target_parameters / 1e9) == 4


# The command


def test_the_dry_run_prints_an_estimate_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = save_qwen3(tmp_path / "target")
    recipe = write_recipe(tmp_path / "recipe.yaml", target)
    before = sorted(tmp_path.rglob("*"))
    text = succeed("train", recipe, "--dry-run")
    record = succeed_json("train", recipe, "--dry-run", "--out", "run")
    assert sorted(tmp_path.rglob("*")) == before
    assert f"{record['parameters']['total']:,} parameters" in text
    assert "an assumption" in text and "not a measurement" in text
    assert record["memory"]["total"] > 2 * 8.19e9


def test_without_dry_run_a_directory_is_needed(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path)
    assert "--out RUN" in fail("train", recipe)


def test_conversations_without_answers_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"c{i}", "messages": [{"role": "user", "content": "w1"}]} for i in range(50)]
    chats = write_jsonl(tmp_path / "chats.jsonl", rows)
    recipe = write_recipe(tmp_path / "recipe.yaml", save_qwen3(tmp_path / "target"), responses=str(chats))
    data = succeed_json("train", recipe, "--dry-run")["data"]
    assert (data["counted"], data["sequences"], data["tokens"]) == (None, 48, 48 * 64), "2 held out; at most 64 tokens"


def test_a_target_that_cannot_be_reached_is_one_line(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", Path("Nobody/No-Such-Model"))
    assert "Nobody/No-Such-Model" in fail("train", recipe, "--dry-run")
