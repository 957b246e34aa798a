"""How many drafts pay: by what passes cost and what was accepted. Only the speed is at stake, never the text."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from domino_spec.decoding.cycle import DraftPlan, ObservedCycle, Proposal, Verdict, best_drafts
from domino_spec.decoding.engine import Engine
from domino_spec.decoding.policy.adaptive import BUDGET, SAVED, AdaptivePolicy
from domino_spec.decoding.policy.costs import CostModel
from domino_spec.decoding.request import Limits, Request
from domino_spec.drafters.methods import make_drafter
from tests.tiny import KeepsNothing, Oracle, as_target, draft_for, plain_greedy, random_prompts, tiny_model

MOST = 8
REQUESTS, ROWS, DRAFTS = (1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 9), (1, 2, 4, 8)
NOBODY = torch.device("cpu")


def costs_of(seconds: Callable[[int, int], float], draft: Callable[[int, int], float]) -> CostModel:
    """A cost model by formulas: of passes by requests and rows, of drafting by requests and drafts."""
    verify = tuple(tuple(seconds(r, n) for n in ROWS) for r in REQUESTS)
    return CostModel(REQUESTS, ROWS, verify, DRAFTS, tuple(tuple(draft(r, n) for n in DRAFTS) for r in REQUESTS))


USUAL = costs_of(lambda r, n: 0.010 + 0.001 * r * n, lambda r, n: 0.001 + 0.0001 * r * n)
"""Drafts pay for few requests, and for many they do not, as on a CPU."""


@dataclass
class World:
    """A machine, requests and a draft, simulated: its cycles take what `costs` says, noisily."""

    requests: int
    costs: CostModel = USUAL
    seed: int = 0
    skill: float = 1.0
    """How often drafts are accepted, in units of what their confidence says."""
    slower: float = 1.0
    """Seconds of cycles that draft, over those of the cost model."""
    pace: float = 1.0
    """Seconds of all cycles, likewise."""
    noise: float = 0.08
    easiest: float = 1.0
    """How sure the draft is of the easiest texts, and rightly so; below 0 all are hard."""
    tokens: int = 0
    seconds: float = 0.0
    """Expected ones, without noise."""
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def propose(self, requests: int, drafts: int) -> tuple[Proposal, list[int]]:
        """A chain for each request, some sure and some not; how many drafts are accepted if all are verified."""
        confidence, accepted = [], []
        for _ in range(requests):
            easy, sure, alive, count, row = self.easiest * self.random.random(), 1.0, True, 0, []
            for _ in range(drafts):
                chance = min(0.98, max(0.05, self.random.gauss(0.4 + 0.5 * easy, 0.15)))
                sure *= chance
                row.append(sure)
                alive = alive and self.random.random() < chance * self.skill
                count += alive
            confidence.append(row)
            accepted.append(count)
        tokens = torch.zeros(requests, drafts, dtype=torch.long)
        counts = torch.full((requests,), drafts)
        return Proposal(tokens, counts, confidence=torch.tensor(confidence)), accepted

    def spend(self, seconds: float) -> float:
        """What so many expected seconds turn out to be: also three times as many, now and then."""
        self.seconds += seconds
        stalled = self.random.uniform(1.2, 3.0) if self.random.random() < 0.03 else 1.0
        return seconds * self.pace * stalled * self.random.lognormvariate(0, self.noise)

    def cycle(self, policy) -> DraftPlan:
        """One cycle as the engine runs it; returns its plan."""
        plan, trial_seconds = policy.plan(self.requests, MOST), None
        offered = proposal = Proposal.empty(self.requests, NOBODY)
        seconds, accepted = self.costs.verify(self.requests, 1), [0] * self.requests
        if plan.drafts:
            offered, accepted = self.propose(self.requests, plan.drafts)
            proposal = plan.cut(offered)
            kept = proposal.tokens.shape[1]
            accepted = [min(count, kept) for count in accepted]
            seconds = self.costs.verify(self.requests, kept + 1) + self.costs.draft(self.requests, plan.drafts)
            seconds *= self.slower
        elif plan.trial:
            few = min(self.requests, 4)
            offered, trial_seconds = self.propose(few, MOST)[0], self.spend(self.costs.draft(few, MOST))
        self.tokens += sum(accepted) + self.requests
        verdict = verdict_of(accepted, proposal.tokens.shape[1])
        policy.observe(ObservedCycle(plan, offered, proposal, verdict, self.spend(seconds), trial_seconds))
        return plan

    def run(self, policy, cycles: int) -> float:
        """Tokens per second of so many cycles, over those of plain decoding."""
        self.tokens, self.seconds = 0, 0.0
        for _ in range(cycles):
            self.cycle(policy)
        return self.tokens / self.seconds * self.costs.verify(self.requests, 1) / self.requests

    def drafted(self, policy, cycles: int) -> float:
        """Share of so many cycles that draft."""
        return sum(self.cycle(policy).drafts > 0 for _ in range(cycles)) / cycles


class Fixed:
    """Always the same number of drafts."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts

    def plan(self, requests: int, most: int) -> DraftPlan:
        return DraftPlan(requests, self.drafts, self.drafts)

    def observe(self, cycle: ObservedCycle) -> None:
        pass


class Steady(AdaptivePolicy):
    """Does not see how long cycles take."""

    def observe(self, cycle: ObservedCycle) -> None:
        super().observe(replace(cycle, seconds=None))


def verdict_of(accepted: list[int], drafts: int) -> Verdict:
    count = torch.tensor(accepted)
    tokens = torch.zeros(len(accepted), drafts + 1, dtype=torch.long)
    return Verdict(tokens, count, None, count, count >= 0)


def proposal_of(confidence: list[list[float]], parents: list[list[int]] | None = None) -> Proposal:
    sure = torch.tensor(confidence)
    tokens = torch.arange(sure.numel()).view(sure.shape)
    return Proposal(tokens, (sure > 0).sum(1), None if parents is None else torch.tensor(parents), confidence=sure)


def kept_of(policy: AdaptivePolicy, proposal: Proposal) -> Proposal:
    """What a cycle that asked for this proposal would verify."""
    requests, drafts = proposal.tokens.shape
    return best_drafts(proposal, policy.number_that_pays(DraftPlan(requests, drafts, drafts), proposal))


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("world", [{}, {"slower": 1.3}, {"slower": 2.0}, {"skill": 0.5}, {"noise": 0.15}], ids=str)
def test_plain_decoding_is_never_undercut_by_more_than_3_percent(requests, world):
    """From the first cycle on, whatever the cost model or the draft's confidence got wrong."""
    rates = [World(requests, seed=s, **world).run(AdaptivePolicy(USUAL), 500) for s in range(2)]
    assert sum(rates) / len(rates) > 0.97


def test_a_short_batch_near_break_even_loses_at_most_3_percent_if_drafting_is_dearer_than_the_cost_model_says():
    """A new policy has 40 cycles: most of the time that it may lose is lost before it knows anything."""
    costs = costs_of(lambda r, n: 0.010 + 0.0003 * r * n, lambda r, n: 0.001 + 0.0001 * r * n)
    for seed in range(20):
        assert World(16, costs, seed, slower=1.15).run(AdaptivePolicy(costs), 40) > 0.97


def test_one_slow_plain_cycle_does_not_make_drafting_look_cheap():
    """Of the plain cycles that show what plain decoding takes, each may have been slow by chance."""
    world, policy = World(16, slower=1.5), AdaptivePolicy(USUAL)
    observed = [(0, 1.0)] * 3 + [(1, 1.5), (0, 1.0)] * 4 + [(0, 2.0)] + [(1, 1.5)] * 20
    for drafts, over_model in observed:
        proposal = proposal_of([[0.5] * drafts] * 16) if drafts else Proposal.empty(16, NOBODY)
        seconds = USUAL.verify(16, drafts + 1) + (USUAL.draft(16, drafts) if drafts else 0.0)
        cycle = ObservedCycle(DraftPlan(16, drafts, drafts), proposal, proposal, verdict_of([drafts] * 16, drafts), 0.0)
        policy.observe(replace(cycle, seconds=seconds * over_model))
    assert world.drafted(policy, 100) < 0.1


@pytest.mark.parametrize("requests", REQUESTS)
def test_it_is_as_fast_as_the_best_fixed_number(requests):
    best = max(World(requests).run(Fixed(n), 300) for n in (0, 1, 2, 4, 8))
    assert World(requests).run(AdaptivePolicy(USUAL), 300) > 0.96 * best


def test_a_draft_that_is_accepted_no_longer_is_dropped():
    """Its confidence stays as it was."""
    world, policy = World(2), AdaptivePolicy(USUAL)
    world.drafted(policy, 50)
    assert world.drafted(policy, 100) > 0.9
    world.skill = 0.1
    world.drafted(policy, 300)
    assert world.drafted(policy, 100) < 0.1


def test_drafting_stops_while_the_texts_are_hard_and_starts_again_after_them():
    world, policy = World(2), AdaptivePolicy(USUAL)
    for easiest, drafts in ((1.0, True), (-0.5, False), (1.0, True)):
        world.easiest = easiest
        world.drafted(policy, 1500)
        assert world.drafted(policy, 100) > 0.9 if drafts else world.drafted(policy, 100) < 0.1


def test_a_cost_model_that_is_wrong_by_a_factor_of_two_is_put_right():
    """It stops drafting because cycles that draft are slow, and notices once they are not."""
    world, policy = World(2, slower=2.0), AdaptivePolicy(USUAL)
    world.drafted(policy, 100)
    assert world.drafted(policy, 200) < 0.1
    world.slower = 1.0
    world.drafted(policy, 2000)
    assert world.drafted(policy, 200) > 0.9


def test_the_number_follows_the_requests():
    policy, shares = AdaptivePolicy(USUAL), []
    for requests in (1, 32, 2, 16):
        world = World(requests)
        world.drafted(policy, 30)
        shares.append(world.drafted(policy, 100))
    assert shares[0] > 0.9 and shares[1] < 0.1 and shares[2] > 0.9 and shares[3] < 0.1


def test_a_machine_that_slows_down_while_nothing_is_drafted_does_not_make_drafting_look_cheap():
    world, policy = World(32), AdaptivePolicy(USUAL)
    world.run(policy, 100)
    for pace in (1.0, 3.0, 1.0, 0.4):
        world.pace = pace
        assert world.drafted(policy, 100) == 0


def test_a_machine_that_slows_down_while_it_drafts_does_not_make_drafting_look_dear():
    world, policy = World(1), AdaptivePolicy(USUAL)
    world.run(policy, 100)
    for pace in (1.0, 3.0, 1.0, 0.4):
        world.pace = pace
        assert world.drafted(policy, 100) > 0.9


def test_a_plain_cycle_now_and_then_shows_what_plain_decoding_takes():
    world, policy = World(1), AdaptivePolicy(USUAL)
    world.run(policy, 100)
    assert 0.9 < world.drafted(policy, 1000) < 1


@pytest.mark.parametrize("seconds", [0.05, 0.5])
def test_trials_take_their_share_of_plain_cycles_and_no_more(seconds):
    dear = costs_of(lambda r, n: r * n, lambda r, n: seconds)
    policy, cycles, spent = AdaptivePolicy(dear), 2000, []
    for _ in range(cycles):
        plan = policy.plan(4, MOST)
        assert plan.drafts == 0
        offered = proposal_of([[0.1, 0.05]] * 4) if plan.trial else Proposal.empty(4, NOBODY)
        spent += [seconds] * plan.trial
        policy.observe(ObservedCycle(plan, offered, Proposal.empty(4, NOBODY), verdict_of([0] * 4, 0), 4.0, seconds))
    share = sum(spent) / 4.0  # plain cycles
    assert 0.9 * BUDGET * cycles < share < BUDGET * cycles + SAVED + seconds


def test_one_trial_that_took_very_long_does_not_end_all_trials():
    policy, trials = AdaptivePolicy(costs_of(lambda r, n: r * n, lambda r, n: 0.1)), 0
    for cycle in range(1000):
        plan = policy.plan(1, MOST)
        trials += plan.trial
        offered = proposal_of([[0.1]]) if plan.trial else Proposal.empty(1, NOBODY)
        seconds = 1000.0 if cycle == 0 else 0.1
        policy.observe(ObservedCycle(plan, offered, Proposal.empty(1, NOBODY), verdict_of([0], 0), 1.0, seconds))
    assert trials > 10


def test_no_more_are_asked_for_than_pay():
    """If every further draft costs drafting time and few are accepted, one is asked for; if they cost none, both.

    The second draft is accepted too seldom to pay for its row, but some cycle may be better than most.
    """
    for seconds, expected in (((0.05, 0.6), 1), ((0.05, 0.05), 2)):
        model = CostModel((1,), (1, 2, 3), ((1.0, 1.1, 1.2),), (1, 2), (seconds,))
        policy, asked = Steady(model), []
        for _ in range(100):
            plan = policy.plan(1, 2)
            asked.append(plan.drafts)
            width = plan.drafts or 2 * plan.trial
            offered = proposal_of([[0.8, 0.1][:width]]) if width else Proposal.empty(1, NOBODY)
            kept = plan.cut(offered) if plan.drafts else Proposal.empty(1, NOBODY)
            count = kept.tokens.shape[1]
            policy.observe(ObservedCycle(plan, offered, kept, verdict_of([min(1, count)], count), 1.0))
        assert set(asked[-50:]) - {0} == {expected}


def test_drafting_that_costs_nothing_is_always_asked_for():
    """A look-up that finds nothing for a long while is still asked, and what it then finds is taken."""
    policy = AdaptivePolicy(costs_of(lambda r, n: 0.9 + 0.1 * r * n, lambda r, n: 0.001))
    nothing = Proposal.empty(1, NOBODY)
    for _ in range(100):
        plan = policy.plan(1, 2)
        assert plan.drafts == 2 and plan.cut(nothing).tokens.shape[1] == 0
        policy.observe(ObservedCycle(plan, nothing, nothing, verdict_of([0], 0), 1.0))
    assert policy.plan(1, 2).cut(proposal_of([[0.9, 0.8]])).tokens.shape[1] == 2


def test_if_rows_cost_nothing_all_drafts_are_kept_and_if_they_cost_all_none():
    proposal = proposal_of([[0.9, 0.5, 0.2]])
    free, dear = (AdaptivePolicy(costs_of(f, lambda r, n: 0.0)) for f in (lambda r, n: 1.0, lambda r, n: r * n))
    assert kept_of(free, proposal).tokens.shape[1] == 3 and kept_of(dear, proposal).tokens.shape[1] == 0


def test_a_draft_is_kept_if_it_brings_more_than_its_row_costs():
    """Confidences as the policy trusts them before it has seen any: a row costs a third of a pass."""
    policy = AdaptivePolicy(costs_of(lambda r, n: 0.7 + 0.3 * r * n, lambda r, n: 0.0))
    kept = kept_of(policy, proposal_of([[0.95, 0.9, 0.2, 0.1]]))
    assert kept.tokens.tolist() == [[0, 1]] and kept.num_drafts.tolist() == [2]


def test_the_more_requests_the_fewer_drafts():
    """A pass is free up to about sixteen rows here, then every row costs; half of the drafts are accepted."""
    policy = AdaptivePolicy(costs_of(lambda r, n: max(1.0, r * n / 16), lambda r, n: 0.05))
    kept = [kept_of(policy, proposal_of([[0.5, 0.25]] * r)).tokens.shape[1] for r in (1, 4, 8, 32)]
    assert kept[0] == 2 and kept[-1] == 0 and kept == sorted(kept, reverse=True)


def test_drafts_without_confidence_are_judged_by_their_place():
    policy = AdaptivePolicy(costs_of(lambda r, n: 0.8 + 0.2 * r * n, lambda r, n: 0.0))
    proposal = Proposal(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]))
    for _ in range(200):
        policy.observe(
            ObservedCycle(DraftPlan(1, 4, 4), proposal, proposal, verdict_of([2], 4), policy.costs.verify(1, 5))
        )
    assert kept_of(policy, proposal).tokens.shape[1] == 2


def test_the_accepted_path_of_a_tree_is_what_is_counted():
    """Of two siblings the second is always accepted, which the draft believes in least."""
    policy = AdaptivePolicy(costs_of(lambda r, n: 0.8 + 0.2 * r * n, lambda r, n: 0.0))
    tree = proposal_of([[0.6, 0.3]], parents=[[-1, -1]])
    verdict = replace(verdict_of([1], 2), path=torch.tensor([[0, 2, 2]]))
    for _ in range(200):
        policy.observe(ObservedCycle(DraftPlan(1, 2, 2), tree, tree, verdict, policy.costs.verify(1, 3)))
    assert kept_of(policy, tree).tokens.shape[1] == 2, "the better one is second in the draft's order"
    assert kept_of(policy, proposal_of([[0.6]], parents=[[-1]])).tokens.shape[1] == 0
    assert kept_of(policy, proposal_of([[0.3]], parents=[[-1]])).tokens.shape[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["domino-tree", "domino", "eagle3", "dart", "ngram", "domino-tree+ngram"])
@pytest.mark.parametrize("per_row", [0.01, 0.5])
def test_an_adaptive_engine_writes_the_plain_text(method, per_row):
    model = tiny_model()
    target = as_target(model)
    drafter = make_drafter(method, draft_for(method, target), requests=1, device=target.device, candidates=8)
    policy = AdaptivePolicy(costs_of(lambda r, n: 1 + per_row * r * n, lambda r, n: 0.1))
    engine = Engine(target, drafter, slots=3, capacity=80, policy=policy)
    prompts = [*random_prompts([7, 1, 12, 4]), [5, 6, 7] * 5]
    limits = Limits(40, stop_token_ids=frozenset())
    generations = [engine.submit(Request(p, limits=limits)) for p in prompts]
    while engine.busy:
        engine.step()
    for generation, prompt in zip(generations, prompts, strict=True):
        assert generation.token_ids == plain_greedy(model, prompt, 40)


@pytest.mark.slow
def test_an_engine_drafts_less_if_it_does_not_pay_and_more_if_it_does():
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
            policy = Steady(costs_of(lambda r, n, row=per_row: 1 + row * r * n, lambda r, n: 0.05))
            engine = Engine(target, drafter, slots=2, capacity=140, policy=policy)
            for prompt in prompts:
                engine.submit(Request(prompt, limits=Limits(120, stop_token_ids=frozenset())))
            while engine.busy:
                engine.step()
            shares[name, per_row] = engine.stats.drafted_cycles / engine.stats.cycles
    assert shares["right", 0.05] > 0.8
    assert shares["wrong", 0.05] < 0.3 and shares["wrong", 2.0] < 0.3
