"""Drafting methods by name: which draft each takes, what it can be told, and how its drafter is made.

This is the only list of them: the command line, the bench, the demo and the server read it. PyTorch and the drafters
are imported when a drafter is made, because `domino-spec --help` needs neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.settings import UserError

if TYPE_CHECKING:
    import torch

    from domino_spec.decoding.cycle import Drafter
    from domino_spec.decoding.request import DraftWatch
    from domino_spec.draft.load import AnyDraft
    from domino_spec.drafters.ngram_counts import NgramModel

_log = logging.getLogger(__name__)

TREE_BUDGET = 11
"""Drafts of a tree by default: with the anchor, as many rows as one tile of the native products holds with AVX-512."""
LARGEST_TREE = 512
"""Drafts of a tree at most, whatever the user asks for: caches make room for all of them."""
SMALLEST_TREE = 2
"""Drafts of a tree if many requests share a CPU's rows."""


@dataclass(frozen=True)
class Ingredients:
    """What drafters are made of."""

    draft: Any
    """Of a kind that the method takes; None if it takes none."""
    candidates: int | None
    samples: bool
    draft_temperature: float | None
    min_confidence: float
    tree_budget: int
    ngrams: NgramModel | None = None


@dataclass(frozen=True)
class Method:
    """A way to draft."""

    make: Callable[[Ingredients], Drafter]
    title: str
    """What a race calls the target with this method."""
    kinds: tuple[str, ...] = ()
    """Kinds of draft that serve it (`draft.kind`), the one it was made for first; none if it needs no draft."""
    settings: tuple[str, ...] = ()
    """Arguments of `make_drafter` that it reads; it ignores the others."""
    samples: bool = False
    """Whether it can sample its drafts above temperature 0; the others choose them at any temperature."""


def _plain(given: Ingredients) -> Drafter:
    from domino_spec.drafters.lookup import PlainDecoding

    return PlainDecoding()


def _lookup(given: Ingredients) -> Drafter:
    from domino_spec.drafters.lookup import PromptLookup

    return PromptLookup()


def _block(given: Ingredients, use_head: bool = True, tree: str | None = None) -> Drafter:
    """A chain, or a tree that grows in the order `tree` (of `block.BUILDERS`)."""
    from domino_spec.drafters.block import BlockDrafter, TreeShape

    return BlockDrafter(
        given.draft,
        use_head=use_head,
        candidates=given.candidates,
        samples=given.samples and tree is None,
        temperature=given.draft_temperature,
        min_confidence=given.min_confidence,
        tree=None if tree is None else TreeShape(given.tree_budget, builder=tree),
    )


def _lookup_first(given: Ingredients, inner: Drafter) -> Drafter:
    from domino_spec.drafters.lookup import LookupFirst

    return LookupFirst(inner)


def _eagle3(given: Ingredients) -> Drafter:
    from domino_spec.drafters.eagle3 import Eagle3Drafter

    return Eagle3Drafter(given.draft, total=given.tree_budget + 1)


def _dart(given: Ingredients) -> Drafter:
    from domino_spec.drafters.dart import DartDrafter

    stop = given.draft.stop_token_ids
    return DartDrafter(given.draft, given.ngrams, total=given.tree_budget, stop_token_ids=stop)


_BLOCK = ("num_drafts", "candidates", "min_confidence")
_SAMPLED = (*_BLOCK, "sample_drafts")

METHODS: dict[str, Method] = {
    "none": Method(_plain, "the target alone"),
    "ngram": Method(_lookup, "with prompt look-up", (), ("num_drafts",)),
    "dflash": Method(
        lambda given: _block(given, use_head=False), "with its draft, head off", ("dflash", "domino"), _SAMPLED, True
    ),
    "domino": Method(_block, "with its Domino draft", ("domino",), _SAMPLED, True),
    "domino+ngram": Method(
        lambda given: _lookup_first(given, _block(given)),
        "with its Domino draft and prompt look-up",
        ("domino",),
        _BLOCK,
    ),
    "dflash-tree": Method(
        lambda given: _block(given, use_head=False, tree="depth"),
        "with its draft, head off, a tree of drafts",
        ("dflash", "domino"),
        _BLOCK,
    ),
    "domino-tree": Method(
        lambda given: _block(given, tree="depth"), "with its Domino draft, a tree of drafts", ("domino",), _BLOCK
    ),
    "domino-best-first": Method(
        lambda given: _block(given, tree="best-first"),
        "with its Domino draft, a tree of drafts, best first",
        ("domino",),
        _BLOCK,
    ),
    "domino-tree+ngram": Method(
        lambda given: _lookup_first(given, _block(given, tree="depth")),
        "with its Domino draft, a tree of drafts, and prompt look-up",
        ("domino",),
        _BLOCK,
    ),
    "eagle3": Method(_eagle3, "with its EAGLE-3 draft", ("eagle3",), ("num_drafts",)),
    "dart": Method(_dart, "with its DART draft", ("dart",), ("num_drafts", "ngrams")),
}
"""Drafting methods by name."""

KIND_NAMES = {"domino": "a Domino", "dflash": "a DFlash", "eagle3": "an EAGLE-3", "dart": "a DART"}


def choose_draft(method: str, drafts: Sequence[AnyDraft]) -> AnyDraft | None:
    """The first draft of the kind that a method was made for, or else of another kind that serves it; None for none."""
    for kind in METHODS[method].kinds:
        for draft in drafts:
            if draft.kind == kind:
                return draft
    return None


def known_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; known methods are {', '.join(METHODS)}")
    return METHODS[name]


def check_settings(methods: Sequence[str], given: Iterable[str]) -> None:
    """Refuse settings that none of some methods reads.

    Args:
        methods: keys of `METHODS`.
        given: arguments of `make_drafter` that the user gave.

    Raises:
        UserError: naming the first of them, and the methods that read it.
    """
    for setting in given:
        if not any(setting in known_method(method).settings for method in methods):
            readers = [name for name, method in METHODS.items() if setting in method.settings]
            option = "--" + setting.replace("_", "-")
            asked = f"method {', '.join(methods)}" if methods else "the methods asked for"
            raise UserError(f"{option} means nothing to {asked}: leave it out (it is for {', '.join(readers)})")


def why_nothing_is_drafted(method: str, asked: bool, num_drafts: int | None = None) -> str | None:
    """The reason why nothing will be drafted, as a clause; None if something will.

    Args:
        method: a key of `METHODS`.
        asked: whether the user asked for this method; else `default_method` chose it without a draft.
        num_drafts: see `make_drafter`.
    """
    if method == "none":
        return "method none was asked for" if asked else "no draft was given"
    return "num_drafts is 0" if num_drafts == 0 else None


def check_draft(method: str, draft: AnyDraft | None) -> None:
    """Refuse a draft that does not serve a method.

    Raises:
        UserError: an unknown method, one whose draft is missing, or one that needs another kind of draft.
    """
    kinds = known_method(method).kinds
    if kinds and draft is None:
        raise UserError(f"method {method} needs a draft")
    if draft is not None and kinds and draft.kind not in kinds:
        kind = draft.kind  # a method's name, too
        raise UserError(
            f"method {method} needs {KIND_NAMES[kinds[0]]} draft; this is {KIND_NAMES[kind]} draft (use {kind})"
        )


def default_method(draft: AnyDraft | None, sample_drafts: bool | None = None) -> str:
    """The tree method of the draft's kind, or its chain method if drafts are to be sampled; `none` without a draft.

    The choice does not depend on the number of requests: at temperature > 0 it decides which text a seed gives.
    """
    if draft is None:
        return "none"
    kind = draft.kind
    return kind if sample_drafts or kind not in ("domino", "dflash") else f"{kind}-tree"


def watch_for(method: str) -> DraftWatch | None:
    """Counts how often a draft is accepted; None for a method without one: a look-up that finds nothing is no fault."""
    from domino_spec.decoding.request import DraftWatch

    return DraftWatch(method) if known_method(method).kinds else None


def make_drafter(
    method: str,
    draft: AnyDraft | None,
    *,
    requests: int,
    device: torch.device,
    candidates: int | None = DEFAULT_CANDIDATES,
    sample_drafts: bool | None = None,
    draft_temperature: float | None = None,
    min_confidence: float = 0.0,
    num_drafts: int | None = None,
    ngrams: NgramModel | None = None,
) -> Drafter:
    """A drafter by its method's name.

    Args:
        method: a key of `METHODS`.
        draft: bound to the target, of a kind that serves the method; None for those that need none.
        requests: R, how many requests are decoded together.
        device: of the target.
        candidates: K, or None for the whole draft vocabulary.
        sample_drafts: at temperature > 0, True samples drafts and False takes the most probable tokens. None is what
            the method does best: `domino` and `dflash` sample (docs/benchmarks.md), the others cannot. At temperature 0
            nothing is sampled.
        draft_temperature: of sampled drafts; None for each request's own.
        min_confidence: see `BlockDrafter`.
        num_drafts: of a tree, 512 at most; None is what pays: 11 for one request, fewer if several share a CPU's
            rows. A chain is as long as its draft allows. If fewer can be drafted, a warning says so.
        ngrams: for method dart; None drafts without them.

    Raises:
        UserError: an unknown method, one whose draft is missing or of another kind, or a setting out of range.
    """
    check_draft(method, draft)
    if not 0 <= min_confidence < 1:
        raise UserError(f"min_confidence must be at least 0 and less than 1, got {min_confidence}")
    if candidates is not None and candidates < 1:
        raise UserError(f"candidates must be at least 1, got {candidates}")
    samples = METHODS[method].samples
    if sample_drafts and METHODS[method].kinds and not samples:
        raise UserError(f"method {method} chooses its drafts; sample_drafts is for domino and dflash")
    budget = min(num_drafts or TREE_BUDGET, LARGEST_TREE)
    if num_drafts is None and device.type == "cpu":
        budget = max(SMALLEST_TREE, (TREE_BUDGET + 1) // requests - 1)
    samples = samples if sample_drafts is None else sample_drafts
    drafter = METHODS[method].make(
        Ingredients(draft, candidates, samples, draft_temperature, min_confidence, budget, ngrams)
    )
    if num_drafts is not None and 0 < drafter.max_drafts < num_drafts:
        _log.warning("method %s makes %d drafts a cycle at most, not %d", method, drafter.max_drafts, num_drafts)
    return drafter
