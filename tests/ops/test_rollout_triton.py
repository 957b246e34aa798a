"""The head rollout's Triton twin, interpreted: its phases one by one, and its kernel of all phases as one program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from domino_spec.draft.config import HeadConfig
from domino_spec.draft.domino import DominoHead
from domino_spec.ops.heads import Draw, EmbeddingTable, HeadInputs, Rollout, draft_distribution, draw

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
FLOAT, BFLOAT = torch.float32, torch.bfloat16
EXACT = {FLOAT: 2e-5, BFLOAT: 2.0**-6}
"""Relative to the largest logit: float32 sums in another order; of bfloat16, two roundings to the other neighbour."""


@dataclass(frozen=True)
class Case:
    """A random head and block, and how its rollout is spread over programs."""

    requests: int
    drafts: int
    candidates: int | None
    dtype: torch.dtype = FLOAT
    temperatures: tuple[float, ...] | None = None
    confident: bool = False
    prefix: int = 1
    width: int = 30
    mapped: bool = False
    """Whether the logits are of a draft vocabulary, and embeddings are scaled."""
    programs: int = 1
    fused: bool = True
    plan: tuple[tuple[str, object], ...] = ()
    """What differs from the plan that is made for the shape."""
    hidden: int = 12
    gru: int = 10
    low_rank: int = 6

    def inputs(self) -> dict:
        """What is drafted from, and how."""
        generator = torch.Generator().manual_seed(self.requests + 10 * self.drafts)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        config = HeadConfig(gru_hidden_dim=self.gru, low_rank=self.low_rank, pure_draft_prefix_len=self.prefix)
        head = DominoHead(config, self.hidden, self.width).to(self.dtype).requires_grad_(False)
        for parameter in head.parameters():
            parameter.copy_(noise(*parameter.shape) * 0.8)
        ids = torch.randperm(self.width + 9, generator=generator)[: self.width].sort().values if self.mapped else None
        table = EmbeddingTable(noise(self.width + 9, self.hidden), ids, self.dtype, 1.5 if self.mapped else 1.0)
        uniform = torch.rand(self.requests, self.drafts, generator=generator, dtype=torch.float64)
        return dict(
            head=head,
            hidden=noise(self.requests, self.drafts, self.hidden),
            base_logits=noise(self.requests, self.drafts, self.width) * 2,
            anchor_embedding=noise(self.requests, self.hidden),
            embedding=table,
            candidates=self.candidates,
            temperature=0.0 if self.temperatures is None else torch.tensor(self.temperatures),
            uniform=None if self.temperatures is None else uniform,
            min_confidence=1e-9 if self.confident else 0.0,
        )


CASES = {
    "a product missing at every step": Case(1, 4, 9, programs=2, fused=False, plan=(("ahead", 1),)),
    "sampled beside chosen, in one launch": Case(2, 3, 9, FLOAT, (0.0, 0.7), confident=True, mapped=True),
    "full vocabulary in several blocks": Case(
        1, 3, None, FLOAT, (0.9,), prefix=0, programs=2, fused=False,
        plan=(("block_k", 4), ("span", 16), ("parts", 2), ("early", False)),
    ),
    "bfloat16, full vocabulary, two uncorrected": Case(2, 4, None, BFLOAT, confident=True, prefix=2),
    "bfloat16, weights read at every step": Case(
        2, 3, 9, BFLOAT, (1.1, 0.0), programs=2, fused=False,
        plan=(("held", False), ("early", False), ("block_g", 2), ("block_l", 2), ("block_h", 16)),
    ),
    "without what is not needed": Case(1, 4, 9, prefix=2, hidden=9, gru=5, low_rank=3),
}  # fmt: skip


def triton_rollout(case: Case) -> tuple[Tensor | None, ...]:
    """In the process that interprets: twice into the same memory, which at first holds no numbers."""
    from domino_spec.ops.triton.rollout import Plan, Shape, Workspace, head_rollout_triton

    given = case.inputs()
    shape = Shape(
        case.requests, case.drafts, case.width, case.candidates, case.hidden, case.gru, case.low_rank, case.dtype
    )
    plan = replace(Plan.of(shape, case.programs), **dict(case.plan))
    workspace = Workspace.allocate(shape, plan, torch.device("cpu"))
    for memory in (workspace.states, workspace.low_rank, workspace.logits, workspace.tops, workspace.masses):
        memory.fill_(torch.nan)
    return head_rollout_triton(*bundled(given), plan=plan, workspace=workspace, fused=case.fused)


def bundled(given: dict) -> tuple:
    """What `Case.inputs` returns, as the rollout takes it."""
    block = HeadInputs(given["hidden"], given["base_logits"], given["anchor_embedding"])
    how = Draw(given["candidates"], given["temperature"], given["uniform"], given["min_confidence"])
    return given["head"].weights(given["embedding"]), block, how


def final_logits(given: dict, choices: Tensor) -> Tensor:
    """[R, N, V] float32 in the reference's arithmetic, after the drafts that were chosen."""
    head, rows = given["head"], []
    state = head.step(given["anchor_embedding"], head.initial_state(len(choices), like=given["hidden"]))
    for i in range(choices.shape[1]):
        logits = given["base_logits"][:, i]
        if i >= head.config.pure_draft_prefix_len:
            logits = logits + head.correction(given["hidden"][:, i], state)
        rows.append(logits.float())
        state = head.step(given["embedding"](choices[:, i]), state)
    return torch.stack(rows, dim=1)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_drafts_what_the_reference_would(interpreted, case):
    """Along the kernel's own drafts, so that a near tie in which they part ways decides one draft and not the rest."""
    given = case.inputs()
    found = Rollout(*interpreted(triton_rollout, case))
    final = final_logits(given, found.choices)
    tolerance = EXACT[case.dtype] * final.abs().max().item()
    inside = torch.ones_like(final, dtype=torch.bool)
    if case.candidates is not None:
        best = given["base_logits"].sort(dim=-1, descending=True, stable=True).indices[..., : case.candidates]
        inside = torch.zeros_like(inside).scatter(-1, best, True)
    final = final.masked_fill(~inside, -torch.inf)
    if case.confident:
        expected = final.softmax(-1).amax(-1).cumprod(-1)
        torch.testing.assert_close(found.confidence, expected, rtol=case.drafts * tolerance, atol=0)
    chosen = final.gather(-1, found.choices[..., None])[..., 0]
    if case.temperatures is None:
        assert found.candidates is None and found.probs is None
        assert (chosen >= final.amax(-1) - tolerance).all()
        assert (found.choices != given["base_logits"].argmax(-1)).any(), "a head that changes nothing shows nothing"
        return
    if case.candidates is not None:
        assert torch.equal(found.candidates, best), "candidates are listed in order of their base logits"
    temperatures = given["temperature"]
    rows = temperatures[:, None].expand(-1, case.drafts).reshape(-1, 1)
    expected = draft_distribution(final.flatten(0, 1), rows).view(final.shape).gather(-1, found.candidates)
    warm = temperatures > 0
    torch.testing.assert_close(found.probs[warm], expected[warm], rtol=2 * tolerance / min(temperatures[warm]), atol=0)
    positions = draw(found.probs, given["uniform"])
    assert torch.equal(found.candidates.gather(-1, positions[..., None])[..., 0], found.choices)
    assert torch.equal(found.probs[~warm].amax(-1), torch.ones_like(found.probs[~warm, :, 0]))
    assert (chosen >= final.amax(-1) - tolerance)[~warm].all()


def select(logits: Tensor, wanted: int, programs: int, fused: bool) -> tuple[Tensor, Tensor]:
    """In the process that interprets."""
    from domino_spec.ops.triton.select import SelectPlan, SelectWorkspace, select_best

    rows = logits.shape[0] * logits.shape[1]
    plan = SelectPlan.of(rows, logits.shape[2], logits.dtype, programs)
    if not fused:
        plan = replace(plan, span=96, block=64, chunks=-(-logits.shape[2] // 96))
    workspace = SelectWorkspace.allocate(plan, rows, wanted, logits.device)
    return select_best(logits, wanted, plan, workspace, programs, fused)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(("width", "wanted", "fused"), [(250, 70, False), (9, 9, True), (300, 1, True)])
def test_the_best_are_those_of_a_stable_sort(interpreted, dtype, width, wanted, fused):
    logits = (torch.randn(1, 2, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    logits[0, 0] = (logits[0, 0] * 2).round() / 2  # many equal ones, and zeros of both signs
    logits[0, 1, 3], logits[0, 1, 5] = torch.nan, -torch.inf
    values, ids = interpreted(select, logits, wanted, 2 if not fused else 1, fused)
    expected = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, expected.indices[..., :wanted])
    torch.testing.assert_close(values, expected.values[..., :wanted], rtol=0, atol=0, equal_nan=True)


SHAPES = [
    (requests, *block, *head)
    for requests in (1, 3, 8, 32, 200)
    for block in ((1, 50, 7), (15, 151936, 512), (16, 32000, None))
    for head in ((1024, 256), (576, 128), (100, 33), (2560, 512))
]


@needs_triton
@pytest.mark.parametrize("programs", [1, 20, 108, 132])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_plans_cover_everything_and_fit_a_multiprocessor(programs, dtype):
    from domino_spec.ops.triton.rollout import HELD_BYTES, Plan, Shape, suits

    for requests, drafts, width, candidates, gru, low_rank in SHAPES:
        shape = Shape(requests, drafts, width, candidates, 4096, gru, low_rank, dtype)
        assert suits(gru, low_rank, dtype)
        plan, scored = Plan.of(shape, programs), candidates or width
        blocks = (plan.block_g, plan.block_l, plan.block_h, plan.block_k, plan.select.block)
        assert all(b & (b - 1) == 0 < b for b in blocks), "Triton's blocks are powers of two"
        assert (plan.parts - 1) * plan.span < scored <= plan.parts * plan.span and plan.span % plan.block_k == 0
        assert (plan.select.chunks - 1) * plan.select.span < width <= plan.select.chunks * plan.select.span
        assert 1 <= plan.ahead <= plan.listed <= width
        # Registers: a program of 256 threads has 255 KB of them.
        state = 1 << (gru - 1).bit_length()
        assert 3 * plan.block_g * state * dtype.itemsize <= HELD_BYTES
        assert max(plan.block_l * state, plan.block_k << (low_rank - 1).bit_length()) <= 8192
        if plan.held:
            assert plan.block_g * programs >= gru and plan.block_l * programs >= low_rank
        if plan.early:
            assert plan.span == plan.block_k and requests * plan.parts <= programs


@needs_triton
def test_the_shape_of_qwen3_8b_is_spread_as_the_notes_say():
    from domino_spec.ops.triton.rollout import Plan, Shape

    plan = Plan.of(Shape(1, 15, 151936, 512, 4096, 1024, 256, BFLOAT), 132)
    assert plan.held and plan.early, "W_hh, W1 and the rows of W2 wait in registers"
    assert (plan.block_g, plan.block_l, plan.block_k, plan.parts) == (8, 2, 4, 128)
    assert 1 + 14 * plan.ahead <= 64 < 1 + 14 * (plan.ahead + 1), "one tile of rows of the input product"


@needs_triton
def test_what_does_not_fit_is_left_to_pytorch():
    from domino_spec.ops.triton.rollout import suits

    assert not suits(20000, 8, FLOAT)
    assert not suits(64, 8, torch.float16)


class _Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


def test_a_table_stands_for_an_embedding_only_where_it_gives_the_same():
    ids, tokens = torch.tensor([1, 4, 7]), torch.tensor([[0, 2], [1, 1]])
    plain = nn.Embedding(9, 5)
    table = EmbeddingTable.of(plain, ids, BFLOAT)
    assert torch.equal(table(tokens), plain(ids[tokens]).to(BFLOAT))
    assert EmbeddingTable.of(_Scaled(9, 5), None, FLOAT) is None
    assert EmbeddingTable.of(nn.Sequential(plain), None, FLOAT) is None
    plain.register_forward_hook(lambda module, given, result: result * 2)
    assert EmbeddingTable.of(plain, None, FLOAT) is None


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, torch.float16], ids=str)
def test_gemmas_scaled_embedding_is_a_table_with_a_factor(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    module = Gemma3TextScaledWordEmbedding(9, 5, 0, embed_scale=5**0.5).to(dtype)
    tokens = torch.arange(9)
    assert torch.equal(EmbeddingTable.of(module, None, FLOAT)(tokens), module(tokens).float())
