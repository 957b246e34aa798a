"""Intervals hold what they say, repeats do not narrow them, and pairing does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from domino_spec.bench.figures import Draws, Samples, against, draws_of, figures, mean_of, means, measured, tail_share
from domino_spec.bench.methods import Contender
from domino_spec.bench.rows import Row

NONE, DOMINO, DFLASH = Contender("none", 0, 0.0), Contender("domino", 7, 0.0), Contender("dflash", 7, 0.0)
DATA_SETS = 400


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conversations(suite: str, count: int) -> list[tuple[str, str]]:
    return [(suite, str(i)) for i in range(count)]


def row(
    contender: Contender, prompt: int, lengths: list[int], seconds: float, suite: str = "s", repeat: int = 0
) -> Row:
    return Row(
        *(suite, f"{suite}/{prompt}", contender.method, contender.budget, 0.0, repeat, repeat, 1, 1, 5),
        *(tuple(range(sum(lengths))), len(lengths), (contender.budget,) * len(lengths), tuple(lengths), 0.1, seconds),
    )


def prompts_of_a_suite(count: int, generator: torch.Generator, suite: str = "s") -> list[Row]:
    """Prompts that differ much in tau and in the seconds of a pass; all methods share that of a prompt."""
    rows = []
    for prompt in range(count):
        easy, slow = 1 + 3 * torch.rand(1, generator=generator).item(), 1 + torch.rand(1, generator=generator).item()
        for contender, factor in ((NONE, 0.0), (DOMINO, 1.15), (DFLASH, 1.0)):
            mean = torch.full((40,), easy * factor)
            lengths = [1 + int(x) for x in torch.poisson(mean, generator=generator).clamp(max=7)]
            cost = 1.0 if contender is NONE else 1.4
            rows.append(row(contender, prompt, lengths, len(lengths) * slow * cost, suite))
    return rows


def width(interval: tuple[float, float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


@pytest.mark.parametrize("count", [6, 16])
def test_nineteen_of_twenty_intervals_hold_the_truth(count):
    """Prompts of a known, skewed distribution: fewer than 363 hits of 400 come up with probability 2e-4
    where 95% is true."""
    generator = dice(0)
    clusters = conversations("s", count)
    draws = Draws.of(clusters)
    # A prompt's passes and its accepted tokens go together, as they do when hard prompts take more passes.
    ease = torch.rand(DATA_SETS, count, generator=generator).double().square()
    passes = 60 / (1 + 4 * ease)
    lengths = passes * (1 + 4 * ease)
    fine = (torch.arange(100_000).double() + 0.5).div(100_000).square()
    truth = 60 / (60 / (1 + 4 * fine)).mean().item()
    hits = 0
    plain = 0
    for own_lengths, own_passes in zip(lengths.tolist(), passes.tolist(), strict=True):
        totals = draws.totals(zip(clusters, zip(own_lengths, own_passes, strict=True), strict=True), 2)
        samples = Samples(totals[:, 0] / totals[:, 1], frozenset(clusters))
        low, high = samples.interval
        hits += low <= truth <= high
        low, high = samples.values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        plain += low <= truth <= high
    assert hits >= 363
    if count == 6:
        assert plain < hits - 20, "percentiles alone would promise too much of few prompts"


def test_the_tails_are_those_of_students_t_for_so_many_prompts():
    normal = torch.distributions.Normal(0.0, 1.0)
    for clusters, suites, quantile in ((5, 1, 2.776), (11, 1, 2.228), (32, 2, 2.042), (1001, 1, 1.962)):
        expected = normal.cdf(torch.tensor(-quantile * (clusters / (clusters - suites)) ** 0.5)).item()
        assert tail_share(clusters, suites) == pytest.approx(expected, rel=0.03)
    assert tail_share(10**6, 1) == pytest.approx(0.025, rel=1e-3)


def test_a_resample_draws_as_many_of_each_suite_as_it_has():
    clusters = conversations("x", 5) + conversations("y", 5) + conversations("z", 2)
    draws = Draws.of(clusters, resamples=200)
    assert (draws.counts[0] == 1).all(), "first comes the measurement itself"
    for suite, count in (("x", 5), ("y", 5), ("z", 2)):
        columns = [place for (name, _), place in draws.places.items() if name == suite]
        assert (draws.counts[:, columns].sum(1) == count).all()
    assert not torch.equal(draws.counts[:, :5], draws.counts[:, 5:10]), "suites of a size are not drawn in step"
    again = Draws.of(reversed(conversations("y", 5)), resamples=200)
    assert torch.equal(again.counts, draws.counts[:, 5:10]), "and a suite's draws do not depend on the others"


def test_totals_add_up_what_was_drawn():
    clusters = conversations("s", 3)
    draws = Draws.of(clusters, resamples=50)
    amounts = [(clusters[0], (1.0, 2.0)), (clusters[2], (10.0, 0.5)), (clusters[0], (4.0, 0.0))]
    totals = draws.totals(amounts, 2)
    for counts, found in zip(draws.counts.tolist(), totals.tolist(), strict=True):
        assert found == [counts[0] * 5.0 + counts[2] * 10.0, counts[0] * 2.0 + counts[2] * 0.5]
    assert draws.totals([], 2).tolist() == [[0.0, 0.0]] * 51


def test_pairing_finds_a_gain_that_separate_intervals_hide():
    rows = prompts_of_a_suite(24, dice(1))
    draws = draws_of(rows)
    domino, dflash, none = (measured(rows, contender, draws) for contender in (DOMINO, DFLASH, NONE))
    speedup = figures(domino)["speedup_over_none_interval"]
    # The same ratio, the baseline drawn by itself.
    others = [replace(r, suite="other") for r in rows if r.method == "none"]
    apart = measured(others, NONE, draws_of(others)).samples["tokens_per_second"]
    unpaired = domino.samples["tokens_per_second"] / apart
    assert unpaired.value == pytest.approx(figures(domino)["speedup_over_none"])
    assert width(speedup) < 0.8 * width(unpaired.interval)
    beside = against({"s": rows}, DOMINO, DFLASH, draws)[0]
    assert beside["tau_ratio"] == pytest.approx(figures(domino)["tau"] / figures(dflash)["tau"])
    assert beside["tau_ratio_interval"][0] > 1
    assert figures(dflash)["tau_interval"][1] > figures(domino)["tau_interval"][0], "apart they overlap"
    assert figures(none)["speedup_over_none_interval"] == (1.0, 1.0)


def test_repeats_and_turns_of_the_same_prompts_say_nothing_of_other_prompts():
    rows = prompts_of_a_suite(8, dice(2))
    once = figures(measured(rows, DOMINO, draws_of(rows)))
    more = [*rows, *(replace(r, repeat=1) for r in rows), *(replace(r, id=f"{r.id}#2", turn=2) for r in rows)]
    often = figures(measured(more, DOMINO, draws_of(more)))
    assert (often["runs"], often["prompts"], often["conversations"]) == (24, 16, 8)
    assert often["tau_interval"] == pytest.approx(once["tau_interval"])
    assert often["speedup_over_none_interval"] == pytest.approx(once["speedup_over_none_interval"])


def test_one_prompt_has_no_interval():
    rows = prompts_of_a_suite(1, dice(3))
    found = figures(measured(rows, DOMINO, draws_of(rows)))
    assert found["tau"] is not None and found["speedup_over_none"] is not None
    assert found["tau_interval"] is found["speedup_over_none_interval"] is found["cost_ratio_interval"] is None
    both = [*rows, *prompts_of_a_suite(5, dice(4), "t")]
    draws = draws_of(both)
    assert figures(measured(both, DOMINO, draws))["tau_interval"] is None, "nor has a mean with such a suite in it"
    assert figures(measured(both[3:], DOMINO, draws))["tau_interval"] is not None


def test_a_baseline_that_was_not_measured_leaves_no_interval():
    rows = prompts_of_a_suite(5, dice(5))
    found = figures(measured(rows, DOMINO, draws_of(rows)))
    assert found["speedup_over_transformers"] is found["speedup_over_transformers_interval"] is None
    assert found["speedup_over_none_interval"] is not None


def test_the_mean_over_suites_draws_every_suite_by_itself():
    """Of independent suites, the mean's spread is the root of the summed squares over their number."""
    suites = {name: prompts_of_a_suite(20, dice(seed), name) for seed, name in enumerate("abcd")}
    rows = [r for own in suites.values() for r in own]
    draws = draws_of(rows)
    of_suites = [measured(own, DOMINO, draws) for own in suites.values()]
    found = means(of_suites)
    assert found["tau"] == pytest.approx(sum(figures(m)["tau"] for m in of_suites) / 4)
    widths = torch.tensor([width(figures(m)["tau_interval"]) for m in of_suites])
    assert width(found["tau_interval"]) == pytest.approx(widths.square().sum().sqrt().item() / 4, rel=0.1)
    lacking = mean_of([of_suites[0].samples["tau"], of_suites[1].samples["speedup_over_transformers"]])
    assert lacking.value is None and lacking.interval is None
