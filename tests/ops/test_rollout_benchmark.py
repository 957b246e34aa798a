"""The rollout's benchmark: it runs without a GPU, compares before it times, and says what its times are worth."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rollout.py"
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured"),
]


def run_benchmark(*options: str) -> str:
    """In the process that interprets: what the program prints."""
    sys.argv = ["rollout.py", *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue()


@pytest.mark.slow
def test_the_benchmark_runs_interpreted_and_says_so(interpreted, tmp_path):
    printed = interpreted(run_benchmark, "--shape", "tiny", "--json", str(tmp_path / "figures.json"))
    assert "times mean nothing" in printed and "| released |" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["drafts_equal_to_reference"] == figures["drafts_total"] == 3
    assert figures["released_table_bytes"] == 40 * 3 * 8 * 4
    assert all(figures["seconds"][form] > 0 for form in ("kernels", "reference", "released"))


def test_kernels_that_draft_something_else_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as the program does; undone afterwards
    program = runpy.run_path(str(SCRIPT))
    with torch.no_grad():
        inputs = program["random_inputs"](program["SHAPES"]["tiny"], 1, torch.device("cpu"))
        right = program["reference_rollout"](inputs, 8)()
        assert program["check_equal"](inputs, right, right) == 3
        with pytest.raises(SystemExit, match="differ at draft 1"):
            program["check_equal"](inputs, right + torch.tensor([0, 1, 0]), right)
