"""The cost model: what it interpolates, measures and refuses."""

from __future__ import annotations

import json

import pytest

from domino_spec.decoding.policy.costs import CostModel, measure_costs, rows_up_to, sizes_up_to
from domino_spec.drafters.methods import METHODS, make_drafter
from domino_spec.settings import UserError
from tests.tiny import as_target, draft_for, tiny_model


def costs(per_row: float, fixed: float = 1.0, draft: float = 0.1) -> CostModel:
    """A pass costs `fixed` and `per_row` for each of its rows; drafting costs the same for any number of requests."""
    requests, rows = (1, 2, 32), (1, 2, 16)
    verify = tuple(tuple(fixed + per_row * r * n for n in rows) for r in requests)
    return CostModel(requests, rows, verify, (1, 16), ((draft, draft),) * 3)


def test_costs_are_those_measured_and_linear_between_and_beyond():
    model = costs(per_row=0.5)
    for requests in (1, 2, 7, 32, 40):
        for rows in (1, 2, 5, 16, 20):
            assert model.verify(requests, rows) == pytest.approx(1 + 0.5 * requests * rows)
    single = CostModel((1,), (1, 2), ((1.0, 1.5),), (2, 4), ((0.2, 0.3),))
    assert single.verify(4, 1) == 4.0 and single.verify(1, 2) == 1.5
    assert single.draft(1, 3) == pytest.approx(0.25) and single.draft(2, 4) == pytest.approx(0.6)
    assert CostModel((1,), (1,), ((1.0,),), (), ((),)).draft(1, 4) == 0.0, "a drafter that drafts nothing"


def test_costs_survive_a_file_and_a_broken_one_is_refused(tmp_path):
    path = tmp_path / "costs.json"
    costs(0.5).save(path)
    assert CostModel.load(path) == costs(0.5)
    good = json.loads(path.read_text())
    for broken, message in (
        ({**good, "rows": [2, 1, 3]}, "ascending"),
        ({**good, "draft_seconds": [[1.0]]}, "seconds for every number"),
        ({**good, "drafts": [2, 1]}, "drafts must be ascending"),
        ({**good, "more": 1}, "more"),
        ({**good, "verify_seconds": [[0.0] * 3] * 3}, "positive"),
        ({**good, "draft_seconds": [[0.1, 0.1], [-0.1, 0.1], [0.1, 0.1]]}, "positive"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            CostModel.load(path)


def test_sizes_double_up_to_the_most():
    assert [sizes_up_to(n) for n in (1, 2, 3, 12)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 12)]


@pytest.mark.parametrize("method", METHODS)
def test_costs_of_every_method_are_measured(method):
    target = as_target(tiny_model())
    drafter = make_drafter(method, draft_for(method, target), requests=1, device=target.device)
    lines: list[str] = []
    model = measure_costs(target, drafter, 3, context=20, repeats=1, report=lines.append)
    assert model.requests == (1, 2, 3) and len(lines) == 3
    assert model.rows == rows_up_to(drafter.max_drafts + 1)
    assert all(s > 0 for row in model.verify_seconds for s in row)
    assert all(row == tuple(sorted(row)) for row in model.verify_seconds), "more rows never cost less"
    assert model.drafts == (sizes_up_to(drafter.max_drafts) if method != "none" else ())
    assert all(s > 0 for row in model.draft_seconds for s in row)
    assert all(row == tuple(sorted(row)) for row in (*model.draft_seconds, *zip(*model.draft_seconds, strict=True)))


def test_passes_are_timed_where_a_tile_of_twelve_rows_ends_for_one_two_and_four_requests():
    assert rows_up_to(12) == (1, 2, 3, 4, 6, 8, 12)
    assert [rows_up_to(n) for n in (1, 2, 3, 5)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4, 5)]
