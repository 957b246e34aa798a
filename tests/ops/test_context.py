"""New context rows in the cache: the truth against the backbone's own, and the Triton twin, interpreted, against it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from domino_spec.ops.context import context_writer, write_context_torch_
from domino_spec.ops.native import bindings as cpu
from tests.tiny import assert_close, tiny_draft

needs_library = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@torch.inference_mode()
def test_rows_are_those_that_the_backbone_projects(target):
    draft = tiny_draft(target)
    backbone, config = draft.backbone, draft.config
    shape = (config.num_hidden_layers, 3, config.num_key_value_heads, 12, config.head_dim)
    lengths = torch.tensor([0, 5, 2])
    features = torch.randn(3, 4, config.feature_size, generator=torch.Generator().manual_seed(0))
    positions = lengths[:, None] + torch.arange(4)
    expected = backbone.project_context(features, positions)
    keys, values = torch.zeros(shape), torch.zeros(shape)
    backbone.append_context(features, keys, values, lengths)
    for r, length in enumerate(lengths.tolist()):
        for cache, rows in ((keys, expected.keys), (values, expected.values)):
            assert_close(cache[:, r, :, length : length + 4], rows[:, r])
            assert not cache[:, r, :, :length].any() and not cache[:, r, :, length + 4 :].any()
    assert torch.equal(lengths, torch.tensor([0, 5, 2])), "whoever calls decides how many of them are kept"


def context_case(dtype: torch.dtype, heads: int, head_dim: int, seed: int = 0) -> list:
    """Arguments of `write_context_torch_`: three requests of unequal length in the middle of a larger cache."""
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(2, 2, 5, heads, 9, head_dim, generator=generator).to(dtype)
    angles = torch.rand(3, 2, head_dim // 2, generator=generator).repeat(1, 1, 2) * 6
    projected = torch.randn(3, 2, 2, 2, heads, head_dim, generator=generator).to(dtype)
    norms = 1 + torch.randn(2, head_dim, generator=generator) / 3
    return [*cache, torch.tensor([0, 6, 3]), projected, norms, 1e-6, angles.cos(), angles.sin()]


def written(name: str, given: list) -> tuple[Tensor, Tensor]:
    """Keys and values after one of the twins has written to requests 1 to 3."""
    if name == "triton":
        from domino_spec.ops.triton.context import write_context_triton_ as twin
    else:
        types = (given[0].dtype, given[3].dtype, given[4].dtype)
        twin = context_writer("cpu", types, given[0].shape[-1]) if name == "fastest" else write_context_torch_
        given = [given[0], given[1], given[2], given[3].clone(), *given[4:]]
    keys, values = given[0].clone(), given[1].clone()
    twin(keys[:, 1:4], values[:, 1:4], *given[2:])
    return keys, values


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 6)])
def test_triton_writes_what_the_truth_writes(interpreted, dtype, heads, head_dim):
    given = context_case(dtype, heads, head_dim)
    keys, values = interpreted(written, "triton", given)
    expected_keys, expected_values = written("torch", given)
    assert torch.equal(values, expected_values)
    # A sum in another order; in bfloat16 that may round the norm, and what is made of it, to the other neighbour.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(keys, expected_keys, rtol=tolerance, atol=tolerance)
    untouched = torch.ones_like(keys, dtype=torch.bool)
    for request, first in ((1, 0), (2, 6), (3, 3)):
        untouched[:, request, :, first : first + 2] = False
    assert torch.equal(keys[untouched], given[0][untouched]) and (keys[~untouched] != given[0][~untouched]).any()


@needs_library
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (3, 64), (3, 6)])
def test_c_writes_what_the_truth_writes(heads, head_dim):
    given = context_case(torch.float32, heads, head_dim)
    keys, values = written("fastest", given)
    expected_keys, expected_values = written("torch", given)
    assert torch.equal(values, expected_values)
    torch.testing.assert_close(keys, expected_keys, rtol=1e-5, atol=1e-5)


@needs_library
def test_c_leaves_out_rows_without_room():
    given = context_case(torch.float32, 2, 16)
    given[2] = torch.tensor([0, 8, 20])
    keys, values = written("fastest", given)
    full = [torch.cat((cache, cache), dim=3) for cache in given[:2]]  # has room for all but the last request
    given[2] = torch.tensor([0, 8, 15])
    expected = written("torch", [*full, *given[2:]])
    for found, cache, whole in zip((keys, values), given[:2], expected, strict=True):
        assert torch.equal(found[:, 3], cache[:, 3])
        torch.testing.assert_close(found[:, :3], whole[:, :3, :, :9], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_triton
def test_triton_leaves_out_rows_without_room(interpreted):
    given = context_case(torch.float32, 2, 16)
    given[2] = torch.tensor([0, 8, 20])
    keys, _ = interpreted(written, "triton", given)
    given[2] = torch.tensor([0, 7, 3])
    shifted, _ = written("torch", given)
    assert_close(keys[:, 1], shifted[:, 1])
    assert torch.equal(keys[:, 3:], given[0][:, 3:]) and torch.equal(keys[:, 2, :, :8], given[0][:, 2, :, :8])
