"""What a bench compares: methods by name, each with a budget and a temperature, and how one prompt is run with it.

Our own methods run through `domino_spec.api`, exactly as a user runs them; outside baselines run through their own
library (`baseline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from domino_spec.api import generate, make_drafter
from domino_spec.bench.baseline import transformers_generate
from domino_spec.config import UserError
from domino_spec.decoding.generate import Generation
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft.model import Draft
from domino_spec.target.model import Target

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Method:
    """How a method of the bench decodes."""

    drafting: str | None
    """Key of `api.METHODS`; None for a baseline that runs outside this package."""
    sample_drafts: bool | None = None
    """At temperature > 0; None is the method's own default (see `api.make_drafter`)."""
    matching_rule: bool = False
    """Accept drafts by the released implementation's rule."""
    all_drafts: bool = True
    """Propose the whole budget every time; False leaves out drafts below the device's default confidence."""

    @property
    def needs_temperature(self) -> bool:
        """True where temperature 0 would make it another method's twin."""
        return self.sample_drafts is not None


METHODS: dict[str, Method] = {
    "none": Method("none"),
    "ngram": Method("ngram"),
    "dflash": Method("dflash"),
    "dflash-argmax": Method("dflash", sample_drafts=False),
    "domino": Method("domino"),
    "domino-confident": Method("domino", all_drafts=False),
    "domino+ngram": Method("domino+ngram", all_drafts=False),
    "domino-tree": Method("domino-tree"),
    "domino-tree-confident": Method("domino-tree", all_drafts=False),
    "domino-tree+ngram": Method("domino-tree+ngram", all_drafts=False),
    "dflash-tree": Method("dflash-tree"),
    "domino-argmax": Method("domino", sample_drafts=False),
    "domino-matching": Method("domino", sample_drafts=True, matching_rule=True),
    TRANSFORMERS: Method(None),
}
"""Methods of the bench by name. Above temperature 0, plain `domino` and `dflash` sample their drafts; `-argmax` takes
the most probable tokens; `-matching` samples, and accepts by the released rule. `-tree` proposes trees, chosen at any
temperature. `-confident` proposes fewer drafts where the draft doubts them."""


@dataclass(frozen=True)
class Contender:
    """One method with one setting: a column of the report."""

    method: str
    budget: int
    """The most drafts of one pass, of a tree those of all its branches; 0 where nothing is drafted."""
    temperature: float


Run = Callable[[Contender, list[int], int, int], Generation]
"""Decodes one prompt: (contender, prompt ids, seed, max_new_tokens) to what it produced."""


def check_methods(methods: Sequence[str], temperatures: Sequence[float]) -> None:
    """Refuse a list of methods that cannot be run.

    Raises:
        UserError: none at all, an unknown one, or one that exists only at temperatures that were not asked for.
    """
    if not methods:
        raise UserError(f"no method given; known methods are {', '.join(METHODS)}")
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown method {method!r}; known methods are {', '.join(METHODS)}")
        if METHODS[method].needs_temperature and not any(temperatures):
            raise UserError(f"method {method} needs a temperature above 0; at 0 use {METHODS[method].drafting}")


def contenders(
    target: Target,
    draft: Draft | None,
    methods: Sequence[str],
    budgets: Sequence[int],
    temperatures: Sequence[float],
) -> list[Contender]:
    """Every method with every budget and temperature that it knows, each once, in the order given.

    Args:
        target: the model served.
        draft: for the methods that need one.
        methods: keys of `METHODS`.
        budgets: drafts per pass; a method that can draft fewer takes its most. Empty: every method's own number.
        temperatures: 0 for greedy.

    Raises:
        UserError: a budget below 1, or a method whose draft is missing or does not suit it.
    """
    if any(budget < 1 for budget in budgets):
        raise UserError(f"num_drafts must be at least 1, got {min(budgets)}; method none drafts nothing")
    found: dict[Contender, None] = {}
    for temperature in temperatures:
        settings = SamplingSettings(temperature=temperature)  # refuses a negative one before anything is measured
        for name in methods:
            method = METHODS[name]
            if method.needs_temperature and temperature == 0:
                continue
            wanted: list[int | None] = [*budgets] or [None]
            for budget in wanted:
                most = 0
                if method.drafting is not None:
                    drafter = make_drafter(
                        method.drafting,
                        draft,
                        requests=1,
                        settings=settings,
                        device=target.device,
                        num_drafts=budget,
                    )
                    most = drafter.max_drafts
                found[Contender(name, most if budget is None else min(budget, most), temperature)] = None
    return list(found)


def runner(target: Target, draft: Draft | None, baseline: Any, candidates: int | None) -> Run:
    """How a bench decodes one prompt.

    Args:
        target: the model served.
        draft: for the methods that need one.
        baseline: the same weights as an ordinary transformers model, for the method `transformers`; else None.
        candidates: K of the head's restricted candidates, None for all.
    """

    def run(contender: Contender, prompt: list[int], seed: int, max_new_tokens: int) -> Generation:
        method = METHODS[contender.method]
        if method.drafting is None:
            return transformers_generate(
                baseline, target.stop_token_ids, prompt, contender.temperature, seed, max_new_tokens
            )
        (generation,) = generate(
            target,
            draft,
            [prompt],
            method=method.drafting,
            num_drafts=contender.budget,
            temperature=contender.temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            candidates=candidates,
            sample_drafts=method.sample_drafts,
            min_confidence=0.0 if method.all_drafts else None,
            matching_rule=method.matching_rule,
        )
        return generation

    return run
