"""What `train` says about an evaluation."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from domino_spec.demo.progress import TrainingView
from domino_spec.training.evaluate import SimulatedTau

LINE = "step 5: simulated tau 2.500, head off 2.000"


@pytest.mark.parametrize(
    "recall, line", [(0.99573, f"{LINE}, recall of 512 candidates 0.9957"), (None, LINE)], ids=["head", "no head"]
)
def test_an_evaluation_is_one_line_with_the_recall_where_a_head_corrects(recall, line):
    written = io.StringIO()
    accepted = torch.tensor([1, 2])
    tau = SimulatedTau(2.5, 2.0, accepted, accepted - 1, [1.0, 0.5], candidates=512, candidate_recall=recall)
    with TrainingView(Console(file=written), steps=10) as view:
        view.evaluation(5, tau)
    assert written.getvalue() == line + "\n"
