"""The door to native code: what fits equals PyTorch's truth, what does not is refused by name, nothing crashes."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domino_spec.ops import heads
from domino_spec.ops.blended import Terms, blended_rows_torch_
from domino_spec.ops.heads import Draw, EmbeddingTable, HeadInputs, HeadWeights
from domino_spec.ops.native import bindings
from domino_spec.ops.native.bindings import DecoderLayers, Layer, Norm, Product
from domino_spec.target.native import FusedAttention, FusedProjection, NotFusible
from tests import sanitized
from tests.tiny import tiny_target

pytestmark = pytest.mark.skipif(bindings.library() is None, reason="no C compiler here")
KERNELS = Path(bindings.__file__).parent
SANITIZED = os.environ.get("DOMINO_SPEC_NATIVE_SANITIZE") == "1"


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


# ---- calls that fit, and what PyTorch makes of the same arguments ----


@dataclass
class Call:
    """A call of the door."""

    entry: Callable[..., Any]
    arguments: dict[str, Any]
    truth: Callable[..., dict[str, Tensor]]
    """The same arguments to what some of them must hold afterwards. A call returns "y", or several results by name."""


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [..., D] by cos and sin that broadcast, on the first values of a head."""
    part, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    left, right = part.chunk(2, dim=-1)
    return torch.cat((part * cos + torch.cat((-right, left), -1) * sin, rest), -1)


def attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[R, N, heads, D], zeros where nothing is seen."""
    keys, values = (x.repeat_interleave(query.shape[2] // keys.shape[1], dim=1) for x in (keys, values))
    scores = query.transpose(1, 2) @ keys.transpose(2, 3) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0)
    return (weights @ values).transpose(1, 2)


def write(cache: Tensor, rows: Tensor, new: Tensor) -> None:
    """New rows [R, N, kv_heads, D] to a cache [R, kv_heads, capacity, D]; rows beyond it are dropped."""
    for r, n in torch.cartesian_prod(*map(torch.arange, rows.shape)).tolist():
        if rows[r, n] < cache.shape[2]:
            cache[r, :, rows[r, n]] = new[r, n]


def product(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    weight = panels.transpose(1, 2).flatten(0, 1)[:outputs]
    return F.linear(x, weight, None if bias is None else bias[:outputs])


def linear(rows: int, inputs: int, outputs: int) -> Call:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    arguments = dict(x=x, panels=bindings.pack(weight), outputs=outputs, bias=bindings.pack_bias(bias))
    return Call(bindings.linear, arguments, lambda x, panels, outputs, bias: {"y": product(x, panels, bias, outputs)})


def rms_norm(rows: int, width: int) -> Call:
    x = torch.randn(rows, width)
    return Call(
        bindings.rms_norm,
        dict(x=x, weight=torch.randn(width), eps=1e-5),
        lambda x, weight, eps: {"y": normed(x, weight, eps)},
    )


def rms_norm_heads(rows: int, width: int, heads: int) -> Call:
    def truth(x, first, heads, weight, eps):
        by_head = x[..., first * len(weight) : (first + heads) * len(weight)].unflatten(-1, (heads, len(weight)))
        by_head.copy_(normed(by_head, weight, eps))
        return {"x": x}

    arguments = dict(
        x=torch.randn(rows, (heads + 2) * width), first=1, heads=heads, weight=torch.randn(width), eps=1e-5
    )
    return Call(bindings.rms_norm_heads_, arguments, truth)


def rotate(requests: int, tokens: int, heads: int, width: int, rotary: int) -> Call:
    def truth(x, heads, head_dim, cos, sin):
        by_head = x[..., : heads * head_dim].unflatten(-1, (heads, head_dim))
        by_head.copy_(rotated(by_head, cos[:, :, None], sin[:, :, None]))
        return {"x": x}

    cos, sin = torch.randn(2, requests, tokens, rotary)
    x = torch.randn(requests, tokens, (heads + 1) * width)
    return Call(bindings.rotate_, dict(x=x, heads=heads, head_dim=width, cos=cos, sin=sin), truth)


def silu_mul(rows: int, width: int) -> Call:
    return Call(
        bindings.silu_mul,
        dict(x=torch.randn(rows, 2 * width)),
        lambda x: {"y": F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]},
    )


def attend(requests: int, tokens: int, groups: int, kv_heads: int, extent: int, width: int) -> Call:
    heads = groups * kv_heads
    query = torch.randn(requests, tokens, heads + 1, width)[:, :, :heads]
    keys, values = torch.randn(2, requests, kv_heads, extent + 3, width)[..., :extent, :]
    mask = torch.rand(requests, 1, tokens, extent) < 0.5
    return Call(
        bindings.attend,
        dict(query=query, keys=keys, values=values, mask=mask, scale=0.3),
        lambda query, keys, values, mask, scale: {"y": attended(query, keys, values, mask, scale)},
    )


def write_context(requests: int, tokens: int, layers: int, kv_heads: int, width: int, capacity: int) -> Call:
    def truth(keys, values, lengths, projected, norms, eps, cos, sin):
        rows = lengths[:, None] + torch.arange(tokens)
        for i, gain in enumerate(norms):
            new = rotated(normed(projected[:, :, i, 0], gain, eps), cos[:, :, None], sin[:, :, None])
            write(keys[i], rows, new)
            write(values[i], rows, projected[:, :, i, 1])
        return {"keys": keys, "values": values}

    cos, sin = torch.randn(2, requests, tokens, width)
    keys, values = torch.randn(2, layers, requests + 1, kv_heads, capacity, width)[:, :, 1:]
    arguments = dict(
        projected=torch.randn(requests, tokens, layers, 2, kv_heads, width),
        norms=torch.randn(layers, width),
        eps=1e-5,
        cos=cos,
        sin=sin,
        lengths=torch.randint(capacity + 2, (requests,)),
        keys=keys,
        values=values,
    )
    return Call(bindings.write_context, arguments, truth)


def layer_weights(hidden: int, heads: int, kv_heads: int, width: int, inner: int) -> dict[str, Any]:
    """Arguments of a `Layer`, flat, so that each can be spoilt."""
    row = (heads + 2 * kv_heads) * width
    weights: dict[str, Any] = dict(heads=heads, kv_heads=kv_heads, head_dim=width, inner=inner)
    for name, size in (("input", hidden), ("query", width), ("key", width), ("post", hidden)):
        weights[name] = 1 + torch.randn(size) / 5
    sizes = {"joined": (hidden, row), "output": (heads * width, hidden)}
    sizes |= {"gate_up": (hidden, 2 * inner), "down": (inner, hidden)}
    for name, (inputs, outputs) in sizes.items():
        weights[name] = bindings.pack(torch.randn(outputs, inputs) / inputs**0.5)
        weights[f"{name}_bias"] = bindings.pack_bias(torch.randn(outputs))
    return weights


def described(weights: dict[str, Any], kind: str = "any") -> Layer:
    norms = {f"{name}_norm": Norm(weights[name], 1e-5) for name in ("input", "query", "key", "post")}
    names = ("joined", "output", "gate_up", "down")
    products = {name: Product(weights[name], weights[f"{name}_bias"]) for name in names}
    sizes = {name: weights[name] for name in ("heads", "kv_heads", "head_dim", "inner")}
    return Layer(**norms, **products, **sizes, scale=0.3, kind=kind)


def decoder_layers(
    requests: int, tokens: int, hidden: int, groups: int, kv_heads: int, width: int, capacity: int
) -> Call:
    def entry(x, cos, sin, keys, values, rows, mask, tapped, **weights):
        layers = DecoderLayers([described(weights)] * 2)
        y, features = layers(x, cos, sin, keys, values, rows, {"any": mask}, [tapped])
        return {"y": y, "features": features}

    def truth(x, cos, sin, keys, values, rows, mask, tapped, **weights):
        layer, outputs = described(weights), []
        heads, kv_heads = layer.heads, layer.kv_heads
        parts = (heads, kv_heads, kv_heads)
        row, hidden = sum(parts) * layer.head_dim, x.shape[-1]
        for i in range(2):
            joined = product(normed(x, layer.input_norm.gain, 1e-5), layer.joined.panels, layer.joined.bias, row)
            query, key, value = joined.unflatten(-1, (-1, layer.head_dim)).split(parts, dim=2)
            query, key = (
                rotated(normed(part, gain, 1e-5), cos[:, :, None], sin[:, :, None])
                for part, gain in ((query, weights["query"]), (key, weights["key"]))
            )
            write(keys[i], rows, key)
            write(values[i], rows, value)
            extent = mask.shape[-1]
            mixed = attended(query, keys[i, :, :, :extent], values[i, :, :, :extent], mask, 0.3).flatten(2)
            x = x + product(mixed, layer.output.panels, layer.output.bias, hidden)
            inner = product(normed(x, weights["post"], 1e-5), layer.gate_up.panels, layer.gate_up.bias, 2 * layer.inner)
            gate, up = inner.chunk(2, -1)
            x = x + product(F.silu(gate) * up, layer.down.panels, layer.down.bias, hidden)
            outputs.append(x)
        return {"y": x, "keys": keys, "values": values, "features": outputs[tapped]}

    cos, sin = torch.randn(2, requests, tokens, width)
    keys, values = torch.randn(2, 2, requests, kv_heads, capacity, width)
    arguments = dict(
        x=torch.randn(requests, tokens, hidden),
        cos=cos,
        sin=sin,
        keys=keys,
        values=values,
        rows=torch.randint(capacity + 2, (requests, 1)) + torch.arange(tokens),
        mask=torch.rand(requests, 1, tokens, capacity - 1) < 0.7,
        tapped=1,
        **layer_weights(hidden, groups * kv_heads, kv_heads, width, 2 * hidden),
    )
    return Call(entry, arguments, truth)


def head_rollout(requests: int, depths: int, hidden: int, vocabulary: int, how: str) -> Call:
    """Chains that are chosen or sampled, or trees."""

    def bundles(arguments):
        table = EmbeddingTable(arguments["embeddings"], arguments["token_ids"], torch.float32)
        matrices = (arguments[name] for name in ("input_gates", "state_gates", "to_low_rank", "correction"))
        block = HeadInputs(arguments["slots"], arguments["logits"], arguments["anchors"])
        drawn = Draw(arguments["candidates"], uniform=arguments["uniform"])
        return HeadWeights(*matrices, arguments["pure_prefix"], table), block, drawn

    def entry(**arguments):
        head, block, drawn = bundles(arguments)
        rest = (arguments[name] for name in ("temperatures", "budget"))
        return bindings.head_rollout(bindings.Head(head), block, arguments["widths"], drawn, *rest)._asdict()

    def truth(**arguments):
        head, block, drawn = bundles(arguments)
        if how == "tree":  # of another budget, fewer or more of the same prefixes
            return (
                {"num_drafts": heads.head_tree(head, block, drawn, 6, 3).num_drafts} if arguments["budget"] == 6 else {}
            )
        if arguments["budget"] or set(arguments["widths"]) != {1}:
            return {}  # trees
        temperature = 0.0 if arguments["temperatures"] is None else arguments["temperatures"]
        chain = heads.head_rollout(head, block, replace(drawn, temperature=temperature))
        return {"choices": chain.choices} | ({} if chain.probs is None else {"probs": chain.probs})

    candidates, sampled = vocabulary // 2, how == "sampled"
    state, low_rank, tokens = 16, 32, vocabulary + 5
    widths = heads.depth_widths(depths, candidates, 6, 3) if how == "tree" else [1] * depths
    depths = len(widths)
    arguments = dict(
        slots=torch.randn(requests, depths, hidden),
        logits=torch.randn(requests, depths, vocabulary),
        anchors=torch.randn(requests, hidden),
        input_gates=torch.randn(3 * state, hidden) / 4,
        state_gates=torch.randn(3 * state, state) / 4,
        to_low_rank=torch.randn(low_rank, hidden + state) / 4,
        correction=torch.randn(vocabulary, low_rank) / 4,
        embeddings=torch.randn(tokens, hidden),
        token_ids=torch.randperm(tokens)[:vocabulary],
        pure_prefix=1,
        candidates=candidates,
        widths=widths,
        temperatures=torch.rand(requests) if sampled else None,
        uniform=torch.rand(requests, depths, dtype=torch.float64) if sampled else None,
        budget=6 if how == "tree" else 0,
    )
    return Call(entry, arguments, truth)


def blended_rows(rows: int, width: int, dtype: torch.dtype) -> Call:
    def entry(**arguments):
        base_losses, final_losses = bindings.blended_rows(**arguments)
        return dict(base_losses=base_losses, final_losses=final_losses)

    def truth(base, correction, target, labels, weights, lambda_base, terms):
        losses = blended_rows_torch_(base, correction, target, labels, weights, lambda_base, terms)
        return dict(base=base, correction=correction, base_losses=losses.base, final_losses=losses.final)

    base, correction, target = torch.randn(3, rows, width).to(dtype)
    arguments = dict(base=base, correction=correction, target=target, labels=torch.randint(width, (rows,)))
    arguments |= dict(weights=torch.rand(rows), lambda_base=0.4, terms=Terms(0.3, 0.5, 0.7))
    return Call(entry, arguments, truth)


FEW, WIDTH = st.integers(0, 4), st.sampled_from([16, 32, 48])
SOME = st.integers(1, 3)
CALLS: dict[str, tuple[Callable[..., Call], Sequence[st.SearchStrategy]]] = {
    "linear": (linear, (st.integers(0, 14), st.integers(1, 70), st.integers(1, 70))),
    "rms_norm": (rms_norm, (FEW, WIDTH)),
    "rms_norm_heads": (rms_norm_heads, (FEW, WIDTH, SOME)),
    "rotate": (rotate, (FEW, FEW, SOME, WIDTH, st.sampled_from([2, 8, 16]))),
    "silu_mul": (silu_mul, (FEW, WIDTH)),
    "attend": (attend, (FEW, st.integers(0, 40), SOME, SOME, st.integers(1, 40), WIDTH)),
    "write_context": (write_context, (FEW, FEW, FEW, SOME, WIDTH, st.integers(0, 6))),
    "decoder_layers": (decoder_layers, (FEW, FEW, WIDTH, SOME, SOME, WIDTH, st.integers(2, 6))),
    "head_rollout": (
        head_rollout,
        (SOME, st.integers(1, 4), WIDTH, st.integers(8, 40), st.sampled_from(["chosen", "sampled", "tree"])),
    ),
    "blended_rows": (blended_rows, (FEW, st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))),
}
"""Each entry of C, and the sizes it is called with."""


# ---- the same with arguments that do not fit ----


def _with_index(x: Tensor, index: int) -> Tensor:
    changed = x.clone()
    changed.view(-1)[-1:] = index
    return changed


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    **{str(t): lambda x, t=t: x.to(t) for t in (torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool)},
    "cut": lambda x: x[..., :-1],
    "cut to whole vectors": lambda x: x[..., :-16],
    "first cut": lambda x: x[1:],
    "doubled": lambda x: torch.cat((x, x), -1),
    "first doubled": lambda x: torch.cat((x, x)),
    "flat": lambda x: x.flatten(),
    "deeper": lambda x: x[None],
    "one number": lambda x: x.flatten()[:1].squeeze(),
    "empty": lambda x: x[:0],
    "every second": lambda x: torch.stack((x, x), -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows swapped": lambda x: x.transpose(0, min(1, x.dim() - 1)).contiguous().transpose(0, min(1, x.dim() - 1)),
    "repeated": lambda x: x[:1].expand_as(x),
    "elsewhere": lambda x: x.to("meta"),
    "reversed": lambda x: x.flip(0),
}
INDICES = (-1, -(2**62), 2**62, 5, 10_000)
NUMBERS = (-1, 0, 1, 2, 3, 17, 2**31, 2**63 - 1, 2**63, 2**64 + 1)


def spoil(draw: Callable[[Any], Any], value: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        if value.dtype == torch.int64 and value.numel() and draw(st.booleans()):
            return _with_index(value, draw(st.sampled_from(INDICES)))
        return SPOILT[draw(st.sampled_from(sorted(SPOILT)))](value)
    if isinstance(value, list):
        return draw(
            st.sampled_from([value[1:], [*value, 1], [0 for _ in value], [2 for _ in value], [-1 for _ in value]])
        )
    if isinstance(value, int):
        return draw(st.sampled_from(NUMBERS))
    return value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", CALLS)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_call_equals_pytorch_or_is_refused(name, data):
    torch.manual_seed(data.draw(st.integers(0, 3)))
    maker, sizes = CALLS[name]
    call = maker(*(data.draw(size) for size in sizes))
    arguments = dict(call.arguments)
    may_be_spoilt = sorted(name for name, value in arguments.items() if isinstance(value, (Tensor, int, list)))
    chosen = data.draw(st.lists(st.sampled_from(may_be_spoilt), max_size=2, unique=True))
    for argument in chosen:
        arguments[argument] = spoil(data.draw, arguments[argument])
    copies = {name: _copy(value) for name, value in arguments.items()}
    try:
        found = call.entry(**arguments)
    except (ValueError, TypeError) as refused:
        assert chosen and str(refused).startswith(name), "what fits is taken, and who refuses gives its name"
        return
    arguments |= found if isinstance(found, dict) else {"y": found}
    for result, expected in call.truth(**copies).items():
        wide = dict(atol=2e-2, rtol=2e-2) if expected.dtype == torch.bfloat16 else dict(atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(arguments[result], expected, **wide)


# ---- single faults ----


def call_with(name: str, *sizes: Any, **changes: Any) -> Call:
    maker, _ = CALLS[name]
    call = maker(*sizes)
    return replace(call, arguments={**call.arguments, **changes})


def test_a_refusal_names_function_argument_what_is_expected_and_what_was_found():
    panels = bindings.pack(torch.randn(40, 64))
    with pytest.raises(
        ValueError, match=r"^linear: panels must be contiguous torch.float32 \[\d, 63, \d+\] on cpu, got torch"
    ):
        bindings.linear(torch.randn(2, 63), panels, 40)
    with pytest.raises(ValueError, match=r"^attend: 3 heads cannot share 2 heads of keys and values evenly"):
        bindings.attend(
            torch.randn(1, 1, 3, 32), *torch.randn(2, 1, 2, 4, 32), torch.ones(1, 1, 1, 4, dtype=torch.bool), 1.0
        )
    with pytest.raises(
        ValueError, match=r"^rms_norm: the width of x must be a multiple of \d+, this processor's vectors, got 7"
    ):
        bindings.rms_norm(torch.randn(2, 7), torch.randn(7), 1e-5)
    with pytest.raises(TypeError, match=r"^linear: panels must be .* got NoneType"):
        bindings.linear(torch.randn(2, 63), None, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [-1, -(2**62)])
def test_a_negative_row_is_refused_before_anything_is_written(row):
    layers = call_with("decoder_layers", 1, 2, 32, 1, 1, 16, 6, rows=torch.tensor([[row + 1, row]]))
    context = call_with("write_context", 1, 2, 2, 1, 16, 6, lengths=torch.tensor([row]))
    for call in (layers, context):
        before = {name: call.arguments[name].clone() for name in ("keys", "values")}
        with pytest.raises(ValueError, match=f"rows must be 0 or more, got {row} to {row + 1}"):
            call.entry(**call.arguments)
        assert all(torch.equal(call.arguments[name], kept) for name, kept in before.items())


@pytest.mark.parametrize("token", [-1, 25, 2**40])
def test_a_token_beyond_the_embeddings_is_refused_when_it_is_drafted(token):
    call = call_with("head_rollout", 2, 3, 16, 20, "chosen")
    call.arguments["token_ids"][:] = token
    with pytest.raises(ValueError, match=rf"token_ids must be rows of the embeddings, 0 to 24, got {token}"):
        call.entry(**call.arguments)


@pytest.mark.parametrize("label", [-1, 30])
def test_a_label_beyond_the_logits_is_refused(label):
    with pytest.raises(ValueError, match=f"labels must be 0 to 29, got {label} to {label}"):
        call = call_with("blended_rows", 1, 30, torch.float32, labels=torch.tensor([label]))
        call.entry(**call.arguments)


def test_a_token_that_sees_nothing_gets_zeros_and_no_tokens_give_nothing():
    query, keys = torch.randn(2, 3, 2, 32), torch.randn(2, 1, 5, 32)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    mask[1, 0, 2] = False
    got = bindings.attend(query, keys, keys, mask, 0.3)
    assert not got[1, 2].any() and got[:, :2].ne(0).all() and got[0, 2].ne(0).all()
    assert bindings.attend(query[:, :0], keys, keys, mask[:, :, :0], 0.3).shape == (2, 0, 2, 32)


def test_attention_takes_tokens_that_are_cut_out_only_where_their_distance_is_the_same():
    query, keys = torch.randn(2, 5, 2, 32), torch.randn(2, 1, 4, 32)
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    one = query[:, 3:4]  # of each request, five tokens apart
    assert torch.equal(bindings.attend(one, keys, keys, mask, 0.3), bindings.attend(one.clone(), keys, keys, mask, 0.3))
    with pytest.raises(ValueError, match="attend: query must be cut from"):
        bindings.attend(query[:, :2], keys, keys, mask.expand(2, 1, 2, 4), 0.3)


def test_weights_of_layers_are_compared_when_they_are_described():
    sizes = dict(hidden=32, heads=4, kv_heads=2, width=16, inner=64)
    DecoderLayers([described(layer_weights(**sizes))])
    faults = {
        "query": torch.randn(64),  # MiniMax-M2: of all heads
        "down": bindings.pack(torch.randn(32, 48)),
        "joined_bias": torch.randn(31),
        "kv_heads": 3,
        "input": torch.randn(32).double(),
    }
    for name, fault in faults.items():
        with pytest.raises(ValueError, match=r"^decoder_layers: layer 1: "):
            good = described(layer_weights(**sizes))
            DecoderLayers([good, described(layer_weights(**sizes) | {name: fault})])


# ---- a norm over all heads: MiniMax-M2 ----


class _NormOfAllHeads(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.head_dim, self.scaling, self.layer_idx = attention.head_dim, attention.scaling, attention.layer_idx
        self.q_norm = nn.RMSNorm(attention.q_proj.out_features, eps=1e-6)
        self.k_norm = nn.RMSNorm(attention.k_proj.out_features, eps=1e-6)

    def forward(self, hidden_states, **arguments):
        return hidden_states, None


def test_a_norm_as_wide_as_all_heads_is_not_taken_for_a_heads():
    """It wrote behind the row, while the replacement was tried."""
    target: Any = tiny_target("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    layer = target.layers[0]
    layer.self_attn = attention = _NormOfAllHeads(layer.self_attn)
    with pytest.raises(NotFusible):
        FusedProjection(attention)
    with pytest.raises(
        ValueError, match="rms_norm_heads_: weight must be as wide as a head, of which 4 from number 0 on"
    ):
        bindings.rms_norm_heads_(torch.randn(2, 8 * 16), 0, 4, attention.q_norm.weight, 1e-6)
    target.pack()
    assert layer.self_attn is attention and isinstance(target.layers[1].self_attn, FusedAttention)


# ---- the door itself ----


def test_nothing_else_in_the_package_talks_to_c():
    package = KERNELS.parent
    sources = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    users = {path for path, source in sources.items() if re.search(r"^\s*(import|from) ctypes", source, re.MULTILINE)}
    assert users == {KERNELS / "bindings.py", KERNELS / "build.py"}


@pytest.mark.parametrize("name", bindings._MIRRORS)
def test_structs_are_laid_out_as_in_c(name):
    loaded = bindings.library()
    assert bindings._layout(bindings._MIRRORS[name]) == bindings._layout_in_c(loaded, name)


def test_a_struct_that_is_laid_out_otherwise_keeps_the_loops_out(monkeypatch, caplog):
    class Swapped(ctypes.Structure):
        _fields_ = tuple(reversed(bindings._Pass._fields_))  # of the same size, all members of eight bytes

    monkeypatch.setitem(bindings._MIRRORS, "pass", Swapped)
    assert bindings.library.__wrapped__() is None
    assert "the native loops are not used" in caplog.text and "struct pass" in caplog.text


_STARVE = """
import resource, torch
from tests.ops import test_bindings as t
torch.set_num_threads(1)
for call, megabytes in (
    (t.attend(1, 40, 1, 1, 1 << 20, 16), 4),
    (t.decoder_layers(1, 1 << 15, 32, 1, 1, 16, 4), 4),
    (t.head_rollout(1, 200, 16, 100_000, "chosen"), 100),  # 80 of which are for its result
    (t.blended_rows(1, 16 << 20, torch.float32), 4),
):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), -1))
    try:
        call.entry(**call.arguments)
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="a sanitizer needs more address space than the limit leaves")
def test_without_memory_there_is_an_exception():
    done = _python(_STARVE)
    names = ("attend", "decoder_layers", "head_rollout", "blended_rows_")
    assert done.stdout.splitlines() == [f"{name}: no memory is left for its scratch" for name in names], done.stderr


def _python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=root, capture_output=True, text=True
    )


_PLANTED = """
import ctypes, sys, torch
from domino_spec.ops.native import bindings
keys, values = torch.zeros(2, 1, 1, 1, 8, 16)
rows, cos = torch.tensor([[int(sys.argv[1])]]), torch.ones(1, 1, 16)
tensors = (torch.zeros(1, 1, 1, 2, 1, 16), torch.ones(1, 16), cos, cos, rows, keys, values)
projected, norms, cos, sin, rows, keys, values = (x.data_ptr() for x in tensors)
capacity, layers = map(int, sys.argv[2:])
print("calls", flush=True)
status = bindings.library().write_context(
    projected, 1, 1, layers, 1, 16, norms, 1e-6, cos, sin, rows, capacity, 128, 128, 128, keys, values
)
print("returns", status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "capacity", "layers", "report"),
    [(7, 8, 1, None), (8, 9, 1, "heap-buffer-overflow"), (0, 8, 1 << 62, "signed integer overflow")],
    ids=["a row inside", "a row behind the cache", "sizes whose product wraps"],
)
def test_the_sanitizers_see_what_gets_past_the_door(row, capacity, layers, report):
    """The library is called directly, with a capacity or a number of layers that its tensors do not have."""
    environment = sanitized.environment()
    if environment is None:
        pytest.skip("gcc's sanitizers are not installed")
    done = _python(_PLANTED, str(row), str(capacity), str(layers), environment=environment)
    assert done.stdout.startswith("calls"), done.stderr
    if report is None:
        assert done.returncode == 0 and done.stdout.endswith("returns 0\n"), done.stderr
    else:
        assert done.returncode != 0 and report in done.stderr and "returns" not in done.stdout
