"""The blended loss's rows: the PyTorch truth against autograd, and its twins in C and Triton against the truth."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from domino_spec.ops import blended
from domino_spec.ops.blended import SMALLEST_ALPHA, Terms, blended_rows_, blended_rows_in_c_, blended_rows_torch_
from domino_spec.ops.native import bindings as cpu

needs_library = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
OBJECTIVES = {
    "cross-entropy": Terms(cross_entropy=1.0),
    "kl": Terms(kl=1.0),
    "total variation": Terms(total_variation=1.0),
    "log acceptance": Terms(log_acceptance=1.0),
    "mixed": Terms(cross_entropy=0.1, total_variation=0.9),
    "adaptive": Terms(adaptive_eta=3.0),
    "everything": Terms(0.3, 0.5, 0.7, 0.2, adaptive_eta=2.0),
}
TYPES = [torch.float32, torch.bfloat16]
CLOSE = dict(rtol=2e-5, atol=4e-6)
"""Some 30 roundings of float32 numbers near 1: sums of 8,000 probabilities, made in different orders."""
HALF_STEP = 2.0**-7
"""From one bfloat16 number to the next: sums in another order may round to either."""

every_objective = pytest.mark.parametrize("terms", OBJECTIVES.values(), ids=OBJECTIVES)
with_and_without_correction = pytest.mark.parametrize("corrected", [True, False], ids=["corrected", "base alone"])


def some_rows(rows, width, terms, corrected, dtype=torch.float32, scale=3.0, seed=0) -> list:
    """Arguments of `blended_rows_`."""
    generator = torch.Generator().manual_seed(seed)
    base, correction, target = (torch.randn(3, rows, width, generator=generator) * scale).to(dtype)
    return [
        base.clone(),
        correction.clone() if corrected else None,
        target.clone() if terms.needs_target else None,
        torch.randint(0, width, (rows,), generator=generator),
        torch.rand(rows, generator=generator),
        0.4,
        terms,
    ]


def run(twin, arguments: list) -> list[Tensor]:
    """Losses of the base, final losses, gradients of the base and, where there is one, of the correction."""
    base, correction, *rest = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    losses = twin(base, correction, *rest)
    return [*losses, base] + ([] if correction is None else [correction])


def assert_twins_agree(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = dict(CLOSE, rtol=HALF_STEP) if a.dtype == torch.bfloat16 else CLOSE
        torch.testing.assert_close(a, b, **tolerance)


def plain_losses(logits: Tensor, target: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    """The objective as its definition says, for autograd."""
    losses = terms.cross_entropy * F.cross_entropy(logits, labels, reduction="none")
    if target is None:
        return losses
    p, log_q = target.softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(log_q, p, reduction="none").sum(-1)
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    losses = losses + terms.kl * kl + terms.total_variation * (1 - alpha) - terms.log_acceptance * alpha.log()
    if terms.adaptive_eta is not None:
        weight = (-terms.adaptive_eta * alpha.detach()).exp()
        losses = losses + weight * kl + (1 - weight) * (1 - alpha)
    return losses


@every_objective
@with_and_without_correction
def test_the_truth_equals_autograd(terms, corrected):
    arguments = some_rows(9, 50, terms, corrected)
    base, correction, target, labels, weights, lambda_base, _ = (
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )
    leaves = [x.requires_grad_() for x in (base, correction) if x is not None]
    base_losses = plain_losses(base, target, labels, terms)
    final_losses = plain_losses(base + correction, target, labels, terms) if corrected else base_losses
    (weights * (lambda_base * base_losses + (1 - lambda_base) * final_losses)).sum().backward()
    expected = [x.float() for x in (base_losses, final_losses, *(leaf.grad for leaf in leaves))]
    assert_twins_agree(run(blended_rows_torch_, arguments), [x.detach() for x in expected])
    assert expected[2].abs().max() > 0.01


@needs_library
@every_objective
@with_and_without_correction
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 16, 31, 200, 1025, 8192])
def test_c_equals_the_truth(terms, corrected, dtype, width):
    arguments = some_rows(5, width, terms, corrected, dtype, seed=width)
    assert_twins_agree(run(blended_rows_in_c_, arguments), run(blended_rows_torch_, arguments))


@needs_library
@every_objective
@with_and_without_correction
def test_c_rounds_bfloat16_gradients_only_once_and_to_the_nearest(terms, corrected):
    arguments = some_rows(6, 333, terms, corrected, torch.bfloat16)
    in_float32 = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    for a, b in zip(run(blended_rows_in_c_, arguments), run(blended_rows_in_c_, in_float32), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def extreme_rows(terms: Terms, corrected: bool) -> list:
    """Logits from -80 to 80; targets of no doubt, opposite targets, and targets that exclude much."""
    arguments = some_rows(40, 75, terms, corrected)
    base, _, target, *_ = arguments
    base.uniform_(-80, 80, generator=torch.Generator().manual_seed(1))
    base[5:10].sign_().mul_(80)
    if target is not None:
        target[10:20] = 0.0
        target[10:20, 3] = 60.0
        target[20:25] = -base[20:25]
        target[30:35, 40:] = -torch.inf
    return arguments


@needs_library
@every_objective
@with_and_without_correction
def test_c_equals_the_truth_at_extreme_logits(terms, corrected):
    arguments = extreme_rows(terms, corrected)
    expected = run(blended_rows_torch_, arguments)
    assert all(x.isfinite().all() for x in expected)
    assert_twins_agree(run(blended_rows_in_c_, arguments), expected)


@every_objective
@pytest.mark.parametrize("twin", [blended_rows_torch_, pytest.param(blended_rows_in_c_, marks=needs_library)])
def test_distributions_that_do_not_meet_give_numbers(terms, twin):
    arguments = some_rows(1, 20, terms, corrected=False)
    arguments[0][:] = torch.tensor([100.0, *[-100.0] * 19])
    if terms.needs_target:
        arguments[2][:] = torch.tensor([*[-100.0] * 19, 100.0])
    assert all(x.isfinite().all() for x in run(twin, arguments))
    if terms == OBJECTIVES["log acceptance"]:
        torch.testing.assert_close(run(twin, arguments)[0], -torch.tensor([SMALLEST_ALPHA]).log())


@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("terms", [OBJECTIVES["kl"], OBJECTIVES["total variation"], OBJECTIVES["adaptive"]])
def test_c_leaves_a_draft_that_agrees_with_its_target(terms, dtype):
    arguments = some_rows(4, 500, terms, corrected=False, dtype=dtype)
    arguments[2] = arguments[0].clone()
    losses, _, gradient = run(blended_rows_in_c_, arguments)
    assert losses.abs().max() < 1e-5 and gradient.abs().max() < 1e-8


@needs_library
@every_objective
def test_c_does_not_hide_a_nan(terms):
    arguments = some_rows(3, 40, terms, corrected=True)
    arguments[1][1, 8] = torch.nan
    _, final, base_gradient, correction_gradient = run(blended_rows_in_c_, arguments)
    for x in (final, base_gradient, correction_gradient):
        assert x[1].isnan().all() and x[[0, 2]].isfinite().all()


@needs_library
@with_and_without_correction
def test_c_gives_the_same_bits_whatever_the_number_of_threads(corrected):
    arguments = some_rows(13, 300, OBJECTIVES["everything"], corrected)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 20):
            torch.set_num_threads(threads)
            results.append(run(blended_rows_in_c_, arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_c_takes_no_rows_and_targets_of_another_type():
    terms = OBJECTIVES["adaptive"]
    assert [x.shape[0] for x in run(blended_rows_in_c_, some_rows(0, 8, terms, corrected=True))] == [0] * 4
    arguments = some_rows(4, 50, terms, corrected=True, dtype=torch.bfloat16)
    arguments[2] = arguments[2].float() + 0.001
    assert_twins_agree(run(blended_rows_in_c_, arguments), run(blended_rows_torch_, arguments))


@needs_library
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_logits_on_cpu_go_to_c(dtype, corrected):
    arguments = some_rows(4, 20, OBJECTIVES["everything"], corrected, dtype)
    for ours, theirs in zip(run(blended_rows_, arguments), run(blended_rows_in_c_, arguments), strict=True):
        assert torch.equal(ours, theirs)
    types = (dtype, dtype if corrected else None, torch.float32)
    assert blended._implementation("cpu", types, contiguous=True) is blended_rows_in_c_


def _strided(logits: Tensor) -> Tensor:
    return logits.t().contiguous().t()


@pytest.mark.parametrize(
    "change", [Tensor.double, Tensor.half, _strided], ids=["float64", "float16", "columns side by side"]
)
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["base", "correction", "target"])
def test_logits_that_c_does_not_take_go_to_pytorch(change, changed):
    arguments = some_rows(3, 8, OBJECTIVES["kl"], corrected=True)
    arguments[changed] = change(arguments[changed])
    for ours, theirs in zip(run(blended_rows_, arguments), run(blended_rows_torch_, arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_library_pytorch_does_it(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    types = (torch.float32, None, None)
    assert blended._implementation.__wrapped__("cpu", types, True) is blended_rows_torch_


@needs_triton
def test_logits_on_a_gpu_go_to_triton():
    chosen = blended._implementation("cuda", (torch.bfloat16, None, None), True)
    assert chosen.__name__ == "blended_rows_triton_"


INTERPRETED = [
    *((terms, corrected, torch.float32, 2, 37) for terms in OBJECTIVES.values() for corrected in (True, False)),
    *((OBJECTIVES["everything"], True, dtype, 2, width) for dtype in TYPES for width in (1, 64, 4500)),
]
"""Few rows, as the interpreter is slow; and it cuts bfloat16 off where a GPU rounds."""
_INTERPRET = """
import sys, torch
from domino_spec.ops.blended import Terms
from domino_spec.ops.triton.blended import blended_rows_triton_
results = []
for base, correction, *rest, terms in torch.load(sys.argv[1]):
    losses = blended_rows_triton_(base, correction, *rest, Terms(*terms))
    results.append([*losses, base] + ([] if correction is None else [correction]))
torch.save(results, sys.argv[2])
"""


def _interpreted(folder, cases: list[list]) -> list[list[Tensor]]:
    """What the Triton twin makes of these arguments; in a process of its own, as the interpreter cannot be left."""
    asked, answered = folder / "cases.pt", folder / "results.pt"
    torch.save([[*arguments[:-1], tuple(arguments[-1])] for arguments in cases], asked)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRET, asked, answered], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(answered)


@pytest.mark.slow
@needs_triton
def test_triton_equals_the_truth(tmp_path):
    cases = [some_rows(rows, width, terms, corrected, dtype) for terms, corrected, dtype, rows, width in INTERPRETED]
    cases.append([x[::5] if isinstance(x, Tensor) else x for x in extreme_rows(OBJECTIVES["everything"], True)])
    for arguments, got in zip(cases, _interpreted(tmp_path, cases), strict=True):
        assert_twins_agree(got, run(blended_rows_torch_, arguments))
