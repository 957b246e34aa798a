"""What a bench compares: methods by name, each with a budget and a temperature, and how one prompt is run with it.

Our own methods run through `domino_spec.api`, exactly as a user runs them; outside baselines run through their own
library (`peers`). A method may be written NAME:DRAFTS, with a budget, and NAME@SIZE, with its
draft vocabulary cut to the SIZE most frequent tokens (FR-Spec): eagle3:15, eagle3@2048:15.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from domino_spec.api import generate
from domino_spec.bench.peers import ASSISTED, DFLASH, LOOKUP, PEERS, Peers, peer_drafts, transformers_generate
from domino_spec.bench.rows import Contender
from domino_spec.decoding.cycle import Drafter
from domino_spec.decoding.request import DraftWatch, Generation
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft.load import AnyDraft
from domino_spec.draft.vocabulary import FrequentTokens, restricted
from domino_spec.drafters.methods import METHODS as DRAFTING
from domino_spec.drafters.methods import check_settings, choose_draft, make_drafter, watch_for
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.settings import UserError
from domino_spec.target.model import Target

TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Method:
    """How a method of the bench decodes."""

    drafting: str | None
    """Key of `domino_spec.drafters.methods.METHODS`; None for a baseline that runs outside this package."""
    sample_drafts: bool | None = None
    """At temperature > 0; None is the method's default (see `make_drafter`)."""
    matching_rule: bool = False
    """Accept drafts by the released implementation's rule."""
    all_drafts: bool = True
    """Propose the whole budget every time; False leaves out drafts below the device's default confidence."""
    kind: str | None = None
    """The only kind of draft that it is measured with; None for any that serves."""

    @property
    def needs_temperature(self) -> bool:
        """True if temperature 0 would make it another method's twin."""
        return self.sample_drafts is not None


METHODS: dict[str, Method] = {
    **{name: Method(name) for name in DRAFTING},
    "domino+ngram": Method("domino+ngram", all_drafts=False),
    "domino-tree+ngram": Method("domino-tree+ngram", all_drafts=False),
    "dflash-argmax": Method("dflash", sample_drafts=False),
    "domino-argmax": Method("domino", sample_drafts=False),
    "domino-confident": Method("domino", all_drafts=False),
    "domino-tree-confident": Method("domino-tree", all_drafts=False),
    "domino-head-off": Method("dflash", kind="domino"),
    "domino-matching": Method("domino", sample_drafts=True, matching_rule=True),
    TRANSFORMERS: Method(None),
    ASSISTED: Method(None),
    LOOKUP: Method(None),
    DFLASH: Method(None),
}
"""Methods of the bench by name. Above temperature 0, plain `domino` and `dflash` sample their drafts; `-argmax` takes
the most probable tokens; `-matching` samples, and accepts by the released rule. `-tree` proposes trees, chosen at any
temperature. `-confident` leaves out drafts of little probability. `dflash` takes a DFlash draft if there is one, else a
Domino draft with its head off; `domino-head-off` is always the latter."""


Run = Callable[[Contender, list[int], int, int], Generation]
"""Decodes one prompt: (contender, prompt ids, seed, max_new_tokens) to what it produced."""


class Wanted(NamedTuple):
    """A method as it was asked for."""

    name: str
    """NAME or NAME@SIZE."""
    budget: int | None
    """None if none was given with the method."""


def parse_method(text: str) -> Wanted:
    """NAME, NAME:DRAFTS, NAME@SIZE or NAME@SIZE:DRAFTS.

    Raises:
        UserError: an unknown name, or numbers that are none or below 1.
    """
    name = re.split("[:@]", text)[0]
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known methods are {', '.join(METHODS)}")
    match = re.fullmatch(r"[^:@]+(@[1-9][0-9]*)?(:[1-9][0-9]*)?", text)
    if match is None:
        raise UserError(f"method {text!r} must be NAME, NAME:DRAFTS, NAME@SIZE or NAME@SIZE:DRAFTS, such as eagle3:15")
    if match[1] and not _takes_draft(name):
        raise UserError(f"method {name} has no draft whose vocabulary could be cut: leave out {match[1]}")
    return Wanted(name + (match[1] or ""), int(match[2][1:]) if match[2] else None)


def method_of(name: str) -> Method:
    """The method of a contender's name, which may end in `@SIZE`."""
    return METHODS[name.partition("@")[0]]


def needs_draft(text: str) -> bool:
    """Whether a method takes a draft; raises as `parse_method`."""
    name = parse_method(text).name.partition("@")[0]
    return name == DFLASH or _takes_draft(name)


def _takes_draft(name: str) -> bool:
    drafting = METHODS[name].drafting
    return drafting is not None and bool(DRAFTING[drafting].kinds)


class Drafting:
    """What methods draft with.

    Args:
        target: the model served.
        drafts: loaded and bound to it; a method takes the first of the kind that it was made for.
        ranking: tokens by frequency, for methods with `@SIZE`.
        ngrams: counts of text, for method `dart`.

    Raises:
        UserError: ranking or counts belong to another tokenizer.
    """

    def __init__(
        self,
        target: Target,
        drafts: Sequence[AnyDraft] = (),
        ranking: FrequentTokens | None = None,
        ngrams: NgramModel | None = None,
    ) -> None:
        for counted in (ranking, ngrams):
            if counted is not None:
                counted.check(target)
        self.target, self.drafts, self.ranking, self.ngrams = target, list(drafts), ranking, ngrams
        self._cut: dict[tuple[int, int], AnyDraft] = {}

    def draft_for(self, name: str) -> AnyDraft | None:
        """The draft of a method, its vocabulary cut if the name says so; None if it needs none or has none.

        Raises:
            UserError: a cut without a ranking, or one that the draft does not allow.
        """
        method, size = method_of(name), name.partition("@")[2]
        if method.drafting is None:
            return choose_draft("dflash", self.drafts) if name == DFLASH else None
        kinds = [draft for draft in self.drafts if method.kind in (None, draft.kind)]
        draft = choose_draft(method.drafting, kinds)
        if draft is None or not size:
            return draft
        if self.ranking is None:
            raise UserError(
                f"method {name} needs tokens ranked by frequency: --ranking FILE, from `domino-spec vocabulary`"
            )
        key = (id(draft), int(size))
        if key not in self._cut:
            self._cut[key] = restricted(draft, self.ranking, int(size), self.target)
        return self._cut[key]

    def drafter_for(self, name: str, **options: Any) -> Drafter:
        """A drafter for one request.

        Args:
            name: of a method that runs in our loop.
            options: those of `make_drafter`.

        Raises:
            UserError: the draft is missing, or an option is out of range.
        """
        method, draft = method_of(name), self.draft_for(name)
        assert method.drafting is not None
        if method.kind is not None and draft is None:
            raise UserError(f"method {name} needs a {method.kind.capitalize()} draft: name one with --draft")
        if draft is None and DRAFTING[method.drafting].kinds and self.drafts:
            draft = self.drafts[0]  # of another kind: the refusal says so
        return make_drafter(
            method.drafting, draft, requests=1, device=self.target.device, ngrams=self.ngrams, **options
        )


def check_options(methods: Sequence[str], given: Sequence[str]) -> None:
    """Refuse options that none of the methods reads.

    Args:
        methods: as `parse_method` reads them.
        given: `num_drafts`, `candidates` or `ngrams`, if they were asked for.

    Raises:
        UserError: naming the first of them.
    """
    names = [parse_method(text).name for text in methods]
    peers = {*names} & {*PEERS}  # which have numbers of drafts too
    ours = [drafting for name in names if (drafting := method_of(name).drafting) is not None]
    check_settings(ours, [name for name in given if not (peers and name == "num_drafts")])


def check_methods(methods: Sequence[str], temperatures: Sequence[float]) -> None:
    """Refuse a list of methods that cannot be run.

    Raises:
        UserError: none at all, an unknown one, or one that exists only at temperatures that were not asked for.
    """
    if not methods:
        raise UserError(f"no method given; known methods are {', '.join(METHODS)}")
    for text in methods:
        method = method_of(parse_method(text).name)
        if method.needs_temperature and not any(temperatures):
            raise UserError(f"method {text} needs a temperature above 0; at 0 use {method.drafting}")


def contenders(
    drafting: Drafting, methods: Sequence[str], budgets: Sequence[int], temperatures: Sequence[float]
) -> list[Contender]:
    """Every method with every budget and temperature that it knows, each once, in the order given.

    Args:
        drafting: what methods draft with.
        methods: as `parse_method` reads them.
        budgets: drafts per pass, for methods without a given budget; a method that can draft fewer takes its
            most. Empty: every method's own number.
        temperatures: 0 for greedy.

    Raises:
        UserError: a budget below 1, or a method whose draft is missing or does not suit it.
    """
    if any(budget < 1 for budget in budgets):
        raise UserError(f"num_drafts must be at least 1, got {min(budgets)}; method none drafts nothing")
    found: dict[Contender, None] = {}
    for temperature in temperatures:
        SamplingSettings(temperature=temperature)  # refuses a negative one before anything is measured
        for name, own_budget in map(parse_method, methods):
            method = method_of(name)
            if method.needs_temperature and temperature == 0:
                continue
            wanted: list[int | None] = [*budgets] or [None]
            for budget in wanted if own_budget is None else [own_budget]:
                if name in PEERS:
                    most = peer_drafts(name, drafting.draft_for(name), budget)  # DFlash: always its whole block
                elif method.drafting is None:
                    most = 0
                else:
                    most = drafting.drafter_for(name, num_drafts=budget).max_drafts
                    most = most if budget is None else min(budget, most)
                found[Contender(name, most, temperature)] = None
    return list(found)


def runner(drafting: Drafting, baseline: Any, candidates: int | None, peers: Peers | None = None) -> Run:
    """How a bench decodes one prompt.

    Args:
        drafting: what methods draft with.
        baseline: the same weights as an ordinary transformers model, for the method `transformers`; else None.
        candidates: K of the head's restricted candidates, None for all.
        peers: for the methods `peers.PEERS`; else None.
    """
    target, watches = drafting.target, dict[str, DraftWatch | None]()

    def run(contender: Contender, prompt: list[int], seed: int, max_new_tokens: int) -> Generation:
        method = method_of(contender.method)
        if contender.method in PEERS:
            assert peers is not None
            return peers.generate(
                contender.method, contender.budget, prompt, contender.temperature, seed, max_new_tokens
            )
        if method.drafting is None:
            return transformers_generate(
                baseline, target.stop_token_ids, prompt, contender.temperature, seed, max_new_tokens
            )
        if contender.method not in watches:
            watches[contender.method] = watch_for(method.drafting)
        (generation,) = generate(
            target,
            drafting.draft_for(contender.method),
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
            ngrams=drafting.ngrams,
            watch=watches[contender.method],
        )
        return generation

    return run
