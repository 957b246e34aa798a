"""The DFlash backbone: a context that can grow in pieces, and a block that sees itself and the context."""

from __future__ import annotations

import copy

import pytest
import torch

from domino_spec.draft.backbone import ContextKV
from domino_spec.drafters.block import ContextCache
from domino_spec.ops.native import bindings as cpu
from tests.tiny import assert_close, random_prompts, tiny_draft

ROWS = 11


@pytest.fixture(scope="module")
def draft(target):
    return tiny_draft(target)


@pytest.fixture(scope="module")
def features(draft):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, ROWS, draft.config.feature_size, generator=generator)


def run_block(draft, context: ContextKV, anchor: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    slots = draft.config.block_size
    block = draft.block_embeddings(torch.tensor([3, 4]))
    positions = (anchor + torch.arange(slots)).expand(2, -1)
    if mask is None:
        mask = torch.ones(2, 1, slots, context.keys.shape[3] + slots, dtype=torch.bool)
    return draft.backbone(block, positions, context, mask)


@torch.inference_mode()
def test_context_projected_in_pieces_equals_all_at_once(draft, features):
    positions = torch.arange(ROWS).expand(2, -1)
    whole = draft.backbone.project_context(features, positions)
    cuts = [(0, 4), (4, 5), (5, ROWS)]
    pieces = [draft.backbone.project_context(features[:, a:b], positions[:, a:b]) for a, b in cuts]
    assert_close(torch.cat([p.keys for p in pieces], dim=3), whole.keys)
    assert_close(torch.cat([p.values for p in pieces], dim=3), whole.values)


@torch.inference_mode()
def test_cached_context_appended_in_pieces_gives_the_same_block(draft, features):
    """Unequal numbers of accepted rows per request, rejected rows written and then overwritten."""
    config = draft.config
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 3 * ROWS, config.head_dim)
    own = ContextCache(torch.zeros(shape))
    done = torch.tensor([0, 0])
    for counts in ([4, 2], [1, 5], [6, 4]):
        n = max(counts)
        rows = (done[:, None] + torch.arange(n)).clamp(max=ROWS - 1)
        piece = features.gather(1, rows[..., None].expand(-1, -1, features.shape[-1])).clone()
        for r, count in enumerate(counts):
            piece[r, count:] = 1e3  # features of rejected drafts
        draft.backbone.append_context(piece, own.keys, own.values, own.lengths)
        own.lengths += torch.tensor(counts)
        done += torch.tensor(counts)
    assert own.lengths.tolist() == [ROWS, ROWS]
    whole = draft.backbone.project_context(features, torch.arange(ROWS).expand(2, -1))
    cached = ContextKV(own.keys[:, :, :, :ROWS], own.values[:, :, :, :ROWS])
    assert_close(run_block(draft, cached, ROWS), run_block(draft, whole, ROWS))


@torch.inference_mode()
def test_masked_context_rows_change_nothing(draft, features):
    positions = torch.arange(ROWS).expand(2, -1)
    context = draft.backbone.project_context(features, positions)
    short = ContextKV(context.keys[:, :, :, :6], context.values[:, :, :, :6])
    slots = draft.config.block_size
    mask = torch.ones(2, 1, slots, ROWS + slots, dtype=torch.bool)
    mask[..., 6:ROWS] = False
    assert_close(run_block(draft, context, 6, mask), run_block(draft, short, 6))


@torch.inference_mode()
def test_a_block_attends_to_itself_in_both_directions(draft, features):
    context = draft.backbone.project_context(features, torch.arange(ROWS).expand(2, -1))
    slots = draft.config.block_size
    mask = torch.ones(2, 1, slots, ROWS + slots, dtype=torch.bool)
    open_ = run_block(draft, context, ROWS, mask)
    mask[..., -1] = False  # hide the last slot from all slots, the first included
    assert not torch.allclose(run_block(draft, context, ROWS, mask)[:, 0], open_[:, 0], atol=1e-3)


@torch.inference_mode()
def test_lower_precision_leaves_the_rotary_angles_alone(draft):
    """Rounded frequencies would turn far positions wrongly: at 8,000 tokens by whole radians."""
    positions = torch.tensor([[3, 8000]])
    expected = draft.backbone.rotary(positions)
    moved = copy.deepcopy(draft).to(torch.bfloat16)
    assert moved.backbone.fc.weight.dtype == torch.bfloat16
    for found, exact in zip(moved.backbone.rotary(positions), expected, strict=True):
        assert torch.equal(found, exact)


def test_position_matters_only_relative_to_the_context(draft, features):
    """RoPE: shifting context and block together changes nothing, shifting one of them does."""
    context = draft.backbone.project_context(features, torch.arange(ROWS).expand(2, -1))
    moved = draft.backbone.project_context(features, torch.arange(ROWS).expand(2, -1) + 50)
    here = run_block(draft, context, ROWS)
    assert_close(run_block(draft, moved, ROWS + 50), here, units=4000)  # angles of larger positions round more coarsely
    assert not torch.allclose(run_block(draft, context, ROWS + 50), here, atol=1e-3)


def test_block_holds_the_anchor_and_masks_through_the_targets_embedding(draft, target):
    block = draft.block_embeddings(torch.tensor([7]))
    assert torch.equal(block[0, 0], target.embed(torch.tensor(7)))
    assert torch.equal(block[0, 1:], target.embed(torch.tensor([draft.config.mask_token_id])).expand(4, -1))


def test_draft_vocabulary_maps_both_ways(target):
    ids = torch.tensor([2, 5, 11, 40])
    draft = tiny_draft(target, draft_vocab_ids=ids)
    assert torch.equal(draft.to_token_ids(torch.arange(4)), ids)
    assert draft.to_choices(torch.tensor([[2, 3], [40, 59]])).tolist() == [[0, -1], [3, -1]]
    hidden = torch.randn(3, target.hidden_size)
    assert_close(draft.base_logits(hidden), target.lm_head(hidden)[:, ids])


def test_without_a_draft_vocabulary_ids_are_choices(draft):
    ids = torch.tensor(random_prompts([5])[0])
    assert torch.equal(draft.to_choices(ids), ids)
    assert torch.equal(draft.to_token_ids(ids), ids)


def test_borrowed_ends_are_not_the_drafts_own(draft):
    names = set(draft.state_dict())
    assert not [n for n in names if "embed_tokens" in n or "lm_head" in n or "final_norm" in n]


@torch.inference_mode()
@pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
def test_blocks_over_a_cache_are_those_over_the_context_alone(target):
    """For requests of unequal length, plainly and in one native step, which writes behind the requests' rows only."""
    plain, packed = (tiny_draft(target, intermediate_size=48) for _ in range(2))
    packed.pack()
    assert packed.backbone.joined_layers is not None and plain.backbone.joined_layers is None
    config, lengths = plain.config, torch.tensor([9, 4, 0])
    slots = config.block_size
    shape = (config.num_hidden_layers, 3, config.num_key_value_heads, 9 + slots, config.head_dim)
    filled = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    positions = lengths[:, None] + torch.arange(slots)
    alone = []
    for r, length in enumerate(lengths.tolist()):
        context = ContextKV(*(part[:, r : r + 1, :, :length] for part in filled))
        mask = torch.ones(1, 1, slots, length + slots, dtype=torch.bool)
        block = plain.block_embeddings(torch.tensor([r + 1]))
        alone.append(plain.backbone(block, positions[r : r + 1], context, mask))
    for draft in (plain, packed):
        keys, values = filled.clone()
        block = draft.block_embeddings(torch.tensor([1, 2, 3]))
        assert_close(draft.backbone.over_cache(block, positions, keys, values, lengths, 9), torch.cat(alone))
        for r, length in enumerate(lengths.tolist()):
            for cache, before in zip((keys, values), filled, strict=True):
                kept = [*range(length), *range(length + slots, 9 + slots)]
                assert torch.equal(cache[:, r, :, kept], before[:, r, :, kept])
