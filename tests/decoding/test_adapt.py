"""How many drafts pay: by what passes cost and what was accepted, with nothing but the speed at stake."""

from __future__ import annotations

import json

import pytest
import torch

from domino_spec.decoding.adapt import LOOKING, SEEN_ENOUGH, AdaptivePolicy, keep_drafts
from domino_spec.decoding.clock import Clock
from domino_spec.decoding.costs import CostModel, measure_costs, rows_up_to, sizes_up_to
from domino_spec.decoding.cycle import Proposal, Verdict
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.request import Limits, Request
from domino_spec.drafters.methods import METHODS, make_drafter
from domino_spec.settings import UserError
from tests.tiny import KeepsNothing, Oracle, as_target, draft_for, plain_greedy, random_prompts, tiny_model


def costs(per_row: float, fixed: float = 1.0, draft: float = 0.1) -> CostModel:
    """A pass costs `fixed` and `per_row` for each of its rows; drafting costs the same for any number of requests."""
    requests, rows = (1, 2, 32), (1, 2, 16)
    verify = tuple(tuple(fixed + per_row * r * n for n in rows) for r in requests)
    return CostModel(requests, rows, verify, (1, 16), ((draft, draft),) * 3)


def proposal_of(confidence: list[list[float]], parents: list[list[int]] | None = None) -> Proposal:
    sure = torch.tensor(confidence)
    tokens = torch.arange(sure.numel()).view(sure.shape)
    counts = (sure > 0).sum(1)
    return Proposal(tokens, counts, None if parents is None else torch.tensor(parents), confidence=sure)


def verdict_of(accepted: list[int], drafts: int) -> Verdict:
    count = torch.tensor(accepted)
    tokens = torch.zeros(len(accepted), drafts + 1, dtype=torch.long)
    return Verdict(tokens, count, None, count, count >= 0)


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


def test_where_rows_cost_nothing_all_drafts_are_kept_and_where_they_cost_all_none():
    proposal = proposal_of([[0.9, 0.5, 0.2]])
    assert AdaptivePolicy(costs(per_row=0)).cut(proposal).tokens.shape[1] == 3
    assert AdaptivePolicy(costs(per_row=1, fixed=0, draft=0)).cut(proposal).tokens.shape[1] == 0


def test_a_draft_is_kept_where_it_brings_more_than_its_row_costs():
    """Confidences as the policy trusts them before it has seen any: a row costs a third of a pass."""
    policy = AdaptivePolicy(costs(per_row=0.3, fixed=0.7, draft=0.0))
    kept = policy.cut(proposal_of([[0.95, 0.9, 0.2, 0.1]]))
    assert kept.tokens.tolist() == [[0, 1]] and kept.num_drafts.tolist() == [2]


def test_the_best_of_every_request_are_kept_with_their_parents():
    proposal = proposal_of(
        [[0.9, 0.3, 0.8, 0.2, 0.75], [0.5, 0.5, 0.1, 0.45, 0.0]],
        parents=[[-1, -1, 0, 1, 2], [-1, 0, 0, 1, 0]],
    )
    order = torch.tensor([[0, 2, 4], [0, 1, 3]])
    kept = keep_drafts(proposal, order)
    assert kept.tokens.tolist() == [[0, 2, 4], [5, 6, 8]]
    assert kept.parents.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert kept.num_drafts.tolist() == [3, 3]
    torch.testing.assert_close(kept.confidence, torch.tensor([[0.9, 0.8, 0.75], [0.5, 0.5, 0.45]]))
    fewer = keep_drafts(proposal, torch.tensor([[0, 1, 2, 3, 4]] * 2))
    assert fewer.num_drafts.tolist() == [5, 4], "what was not meant stays unmeant"


def drive(
    policy: AdaptivePolicy, cycles: int, requests: int, sure: float, accepted: bool, slower: float = 1.0, pace=1.0
) -> list[int]:
    """Cycles of two drafts of one confidence each, all or none of them accepted; returns the drafts of each cycle.

    They take what the cost model says, times `pace`, and times `slower` where something is drafted.
    """
    drafts = []
    for _ in range(cycles):
        proposal, spent = Proposal.empty(requests, torch.device("cpu")), policy.costs.verify(requests, 1)
        if asked := policy.wanted(requests, 2):
            proposal = policy.cut(proposal_of([[sure] * asked] * requests))
            spent = policy.costs.verify(requests, proposal.tokens.shape[1] + 1) + policy.costs.draft(requests, asked)
            spent *= slower
        elif policy.curious:
            policy.look(proposal_of([[sure, sure]]))
        kept = proposal.tokens.shape[1]
        drafts.append(kept)
        policy.observe(proposal, verdict_of([kept * accepted] * requests, kept), pace * spent)
    return drafts


def test_a_cost_model_that_is_wrong_is_put_right_by_the_clock():
    """Two drafts that are always accepted pay by the cost model; but cycles that draft take four times as long."""
    policy = AdaptivePolicy(costs(per_row=0.1, fixed=0.9, draft=0.2))
    assert drive(policy, 50, 1, sure=0.9, accepted=True)[SEEN_ENOUGH:] == [2] * (50 - SEEN_ENOUGH)
    policy = AdaptivePolicy(costs(per_row=0.1, fixed=0.9, draft=0.2))
    slow = drive(policy, 200, 1, sure=0.9, accepted=True, slower=4.0)
    assert slow[SEEN_ENOUGH] == 2 and sum(slow[-100:]) == 0


def test_a_draft_that_boasts_is_found_out_and_one_that_proves_right_is_taken_up_again():
    policy = AdaptivePolicy(costs(per_row=0.1, fixed=0.9, draft=0.2))
    boasting = drive(policy, 300, 1, sure=0.95, accepted=False)
    assert boasting[: SEEN_ENOUGH + 1] == [0] * SEEN_ENOUGH + [2], "it looks first, and learns what a plain cycle takes"
    assert sum(n > 0 for n in boasting[-100:]) <= 4
    proving = drive(policy, 400, 1, sure=0.4, accepted=True)
    assert sum(n > 0 for n in proving[:100]) >= 1, "it looks again now and then"
    assert sum(n == 2 for n in proving[-100:]) >= 99


def test_what_a_cycle_takes_is_told_apart_from_how_fast_the_machine_is():
    """Nothing was drafted since the machine became three times slower: drafting would take three times as long, too."""
    policy = AdaptivePolicy(costs(per_row=0.4, fixed=0.6, draft=0.3))
    drive(policy, 100, 1, sure=0.6, accepted=False)
    for pace in (1.0, 3.0, 1.0, 0.4):
        assert sum(drive(policy, 50, 1, sure=0.3, accepted=False, pace=pace)) == 0
    wrong = policy.costs.verify(1, 1) * 3
    policy.observe(Proposal.empty(1, torch.device("cpu")), verdict_of([0], 0), wrong)
    rates = [policy._rates([0.0] * 3, 1, 2)[2], policy._plain(1)]
    assert rates[1] / rates[0] == pytest.approx(policy._modelled(1, 2, 2) / policy._modelled(1, 0, 0), rel=0.3)


def test_one_plain_cycle_says_what_part_of_many_that_drafted_is_the_machines():
    """Drafting takes 1.3 times what the model says, and the machine slows down by as much meanwhile."""
    clock = Clock()
    for _ in range(10):
        clock.observe(4, 0, False, 1.0, 1.0)
    for cycle in range(40):
        clock.observe(4, 2, True, 1.0, 1.3 * 1.3 ** (cycle / 39))
    for _ in range(2):
        clock.observe(4, 0, False, 1.0, 1.3)
    drafted, plain = (clock.seconds(4, drafts, [1.0] * 3)[2 * drafts] for drafts in (True, False))
    assert drafted / plain == pytest.approx(1.3, rel=0.06)
    assert clock.seconds(8, True, [1.0])[0] / clock.seconds(8, False, [1.0])[0] > 1.1, "others draft no faster"


def test_a_moment_that_the_machine_stood_still_says_little():
    steady, disturbed = Clock(), Clock()
    for cycle in range(60):
        for clock in (steady, disturbed):
            drafted = cycle % 4 == 0
            stalled = 20.0 if clock is disturbed and cycle == 30 else 1.0
            clock.observe(1, 2 * drafted, drafted, 1.0, stalled)
    ratios = [c.seconds(1, True, [1.0] * 3)[2] / c.seconds(1, False, [1.0])[0] for c in (steady, disturbed)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)


@pytest.mark.parametrize("seconds", [0.05, 0.5])
def test_looking_takes_its_share_of_plain_cycles_and_no_more(seconds):
    policy, cycles, spent = AdaptivePolicy(costs(per_row=1.0)), 2000, []
    for _ in range(cycles):
        assert policy.wanted(4, 2) == 0
        if policy.curious:
            policy.look(proposal_of([[0.1, 0.05]] * 4), seconds)
            spent.append(seconds)
        policy.observe(Proposal.empty(4, torch.device("cpu")), verdict_of([0] * 4, 0), 1.0)
    assert 0.5 * LOOKING * cycles < sum(spent) < LOOKING * cycles + 2 * seconds


def test_no_more_are_asked_for_than_pay():
    """Where every further draft costs drafting time and few are accepted, one is asked for; where they cost none, all.

    The second draft is accepted too seldom to pay for its row, but some cycle may be surer than most.
    """
    for seconds, expected in (((0.05, 0.6), {1}), ((0.05, 0.05), {2})):
        model = CostModel((1,), (1, 2, 3), ((1.0, 1.1, 1.2),), (1, 2), (seconds,))
        policy = AdaptivePolicy(model)
        asked = set()
        for _ in range(60):
            number = policy.wanted(1, 2)
            asked.add(number)
            if policy.curious:
                policy.look(proposal_of([[0.8, 0.1]]))
            drafted = proposal_of([[0.8, 0.1][:number]]) if number else Proposal.empty(1, torch.device("cpu"))
            kept = policy.cut(drafted) if number else drafted
            spent = model.verify(1, kept.tokens.shape[1] + 1) + (model.draft(1, number) if number else 0.0)
            policy.observe(kept, verdict_of([min(1, kept.tokens.shape[1])], kept.tokens.shape[1]), spent)
        assert asked - {0} == expected


def test_drafting_that_costs_nothing_is_always_asked_for():
    """A look-up that finds nothing for a long while is still asked, and what it then finds is taken."""
    policy = AdaptivePolicy(costs(per_row=0.1, fixed=0.9, draft=0.001))
    nothing = Proposal.empty(1, torch.device("cpu"))
    asked = []
    for _ in range(100):
        asked.append(policy.wanted(1, 2))
        kept = policy.cut(nothing) if asked[-1] else nothing
        policy.observe(kept, verdict_of([0], 0), 1.0)
    assert asked.count(2) >= 98
    assert policy.wanted(1, 2) == 2 and policy.cut(proposal_of([[0.9, 0.8]])).tokens.shape[1] == 2


def test_what_many_requests_promise_weighs_more_than_what_few_do():
    few, many = (AdaptivePolicy(costs(0.3)) for _ in range(2))
    for policy, requests in ((few, 1), (many, 16)):
        policy.look(proposal_of([[0.9, 0.8]]))
        policy.cut(proposal_of([[0.1, 0.05]] * requests))
    assert float(many._expected.gains[2]) < 0.4 < float(few._expected.gains[2])


def test_the_more_requests_the_fewer_drafts():
    """A pass is free up to about sixteen rows here, then every row costs; half of the drafts are accepted."""
    rows = (1, 2, 3)
    sizes = (1, 4, 8, 32)
    verify = tuple(tuple(max(1.0, r * n / 16) for n in rows) for r in sizes)
    model = CostModel(sizes, rows, verify, (1, 2), ((0.05, 0.05),) * 4)
    kept = []
    for requests in sizes:
        policy = AdaptivePolicy(model)
        kept.append(policy.cut(proposal_of([[0.5, 0.25]] * requests)).tokens.shape[1])
    assert kept[0] == 2 and kept[-1] == 0 and kept == sorted(kept, reverse=True)


def test_drafts_without_confidence_are_judged_by_their_place():
    policy = AdaptivePolicy(costs(per_row=0.2, fixed=0.8, draft=0.0))
    for _ in range(200):
        proposal = Proposal(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]))
        policy.observe(proposal, verdict_of([2], 4), policy.costs.verify(1, 5))
    assert policy.cut(Proposal(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]))).tokens.shape[1] == 2


def test_a_trees_accepted_path_is_what_is_counted():
    """Of two siblings the second is accepted: the first one's class loses, the second one's gains."""
    policy = AdaptivePolicy(costs(per_row=0.2, fixed=0.8, draft=0.0))
    proposal = proposal_of([[0.6, 0.3]], parents=[[-1, -1]])
    verdict = Verdict(
        torch.zeros(1, 3, dtype=torch.long),
        torch.tensor([1]),
        None,
        torch.tensor([0]),
        torch.tensor([True]),
        path=torch.tensor([[0, 2, 2]]),
    )
    for _ in range(100):
        policy.observe(proposal, verdict, policy.costs.verify(1, 3))
    kept = policy.cut(proposal_of([[0.6, 0.3]], parents=[[-1, -1]]))
    chances = policy._acceptance.chances(proposal_of([[0.6, 0.3]], parents=[[-1, -1]]))[0]
    assert chances[0] < 0.1 and chances[1] > 0.9
    assert kept.tokens.shape[1] == 2, "the better one comes second in the draft's own order"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["domino-tree", "domino", "eagle3", "dart", "ngram", "domino-tree+ngram"])
@pytest.mark.parametrize("per_row", [0.01, 0.5])
def test_an_adaptive_engine_writes_the_plain_text(method, per_row):
    model = tiny_model()
    target = as_target(model)
    drafter = make_drafter(method, draft_for(method, target), requests=1, device=target.device, candidates=8)
    engine = Engine(target, drafter, slots=3, capacity=80, policy=AdaptivePolicy(costs(per_row)))
    prompts = [*random_prompts([7, 1, 12, 4]), [5, 6, 7] * 5]
    limits = Limits(40, stop_token_ids=frozenset())
    generations = [engine.submit(Request(p, limits=limits)) for p in prompts]
    while engine.busy:
        engine.step()
    for generation, prompt in zip(generations, prompts, strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, 40)


@pytest.mark.slow
def test_an_engine_drafts_less_where_it_does_not_pay_and_more_where_it_does():
    """The same requests under two costs, with a drafter that is always right and one that never is."""
    model = tiny_model()
    target, prompts = as_target(model), random_prompts([5, 6])
    texts = [p + plain_greedy(model, p, 130) for p in prompts]

    class Wrong(KeepsNothing):
        max_drafts = 4

        def propose(self, state, own, num_drafts):
            tokens = torch.zeros(len(state.lengths), num_drafts, dtype=torch.long)
            return Proposal(tokens, torch.full_like(state.lengths, num_drafts))

    class Right(Oracle):
        def propose(self, state, own, num_drafts):
            self._cycle = 0
            proposal = super().propose(state, own, num_drafts)
            for row, length in enumerate(state.lengths.tolist()):
                text = next(t for t in self.texts if t[:length] == state.tokens[row, :length].tolist())
                proposal.tokens[row] = torch.tensor(text[length : length + num_drafts])
            return proposal

    shares = {}
    for name, drafter in (("wrong", Wrong()), ("right", Right(texts, 4))):
        for per_row in (0.05, 2.0):
            policy = AdaptivePolicy(costs(per_row, fixed=1.0, draft=0.05))
            policy._clock.observe = lambda *cycle: None  # what cycles take is not this machine's
            engine = Engine(target, drafter, slots=2, capacity=140, policy=policy)
            for prompt in prompts:
                engine.submit(Request(prompt, limits=Limits(120, stop_token_ids=frozenset())))
            while engine.busy:
                engine.step()
            shares[name, per_row] = engine.stats.drafted_cycles / engine.stats.cycles
    assert shares["right", 0.05] > 0.9
    assert shares["wrong", 0.05] < 0.3 and shares["wrong", 2.0] < 0.3
