"""Drafting methods by name: which draft each takes, and how its drafter is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from domino_spec.config import DEFAULT_CANDIDATES, UserError
from domino_spec.decoding.drafter import Drafter
from domino_spec.draft.load import AnyDraft
from domino_spec.draft.model import Draft
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.drafters.dart import DartDrafter
from domino_spec.drafters.domino import BlockDrafter
from domino_spec.drafters.domino_tree import TreeDrafter
from domino_spec.drafters.eagle3 import Eagle3Drafter
from domino_spec.drafters.lookup_first import LookupFirst
from domino_spec.drafters.ngram import PromptLookup
from domino_spec.drafters.ngram_model import NgramModel
from domino_spec.drafters.plain import PlainDecoding

TREE_BUDGET = 11
"""Drafts of a tree by default: with the anchor, as many rows as one tile of the native products holds with AVX-512."""
LARGEST_TREE = 512
"""Drafts of a tree at most, whatever is asked for: caches make room for all of them."""
SMALLEST_TREE = 2
"""Drafts of a tree where many requests share a CPU's rows."""


@dataclass(frozen=True)
class Ingredients:
    """What drafters are made of."""

    draft: AnyDraft | None
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
    kinds: tuple[str, ...] = ()
    """Kinds of draft that serve it (`kind_of`), the one it was made for first; none where it needs no draft."""
    samples: bool = False
    """Whether it can sample its drafts above temperature 0; the others choose them at any temperature."""


def kind_of(draft: AnyDraft) -> str:
    """What a draft is: domino, dflash, eagle3 or dart."""
    if isinstance(draft, SingleLayerDraft):
        return draft.config.method
    return "dflash" if draft.head is None else "domino"


def _chain(given: Ingredients, use_head: bool = True) -> BlockDrafter:
    assert isinstance(given.draft, Draft)
    return BlockDrafter(
        given.draft,
        use_head=use_head,
        candidates=given.candidates,
        samples=given.samples,
        temperature=given.draft_temperature,
        min_confidence=given.min_confidence,
    )


def _tree(given: Ingredients, use_head: bool = True, builder: str = "depth") -> TreeDrafter:
    return TreeDrafter(_chain(given, use_head), given.tree_budget, builder=builder)


def _eagle3(given: Ingredients) -> Eagle3Drafter:
    assert isinstance(given.draft, SingleLayerDraft)
    return Eagle3Drafter(given.draft, total=given.tree_budget + 1)


def _dart(given: Ingredients) -> DartDrafter:
    assert isinstance(given.draft, SingleLayerDraft)
    stop = given.draft.stop_token_ids
    return DartDrafter(given.draft, given.ngrams, total=given.tree_budget, stop_token_ids=stop)


METHODS: dict[str, Method] = {
    "none": Method(lambda given: PlainDecoding()),
    "ngram": Method(lambda given: PromptLookup()),
    "dflash": Method(lambda given: _chain(given, use_head=False), ("dflash", "domino"), samples=True),
    "domino": Method(_chain, ("domino",), samples=True),
    "domino+ngram": Method(lambda given: LookupFirst(_chain(given)), ("domino",)),
    "dflash-tree": Method(lambda given: _tree(given, use_head=False), ("dflash", "domino")),
    "domino-tree": Method(_tree, ("domino",)),
    "domino-best-first": Method(lambda given: _tree(given, builder="best-first"), ("domino",)),
    "domino-tree+ngram": Method(lambda given: LookupFirst(_tree(given)), ("domino",)),
    "eagle3": Method(_eagle3, ("eagle3",)),
    "dart": Method(_dart, ("dart",)),
}
"""Drafting methods by name."""

KIND_NAMES = {"domino": "a Domino", "dflash": "a DFlash", "eagle3": "an EAGLE-3", "dart": "a DART"}


def choose_draft(method: str, drafts: Sequence[AnyDraft]) -> AnyDraft | None:
    """The first draft of the kind that a method was made for, or else of another kind that serves it; None for none."""
    for kind in METHODS[method].kinds:
        for draft in drafts:
            if kind_of(draft) == kind:
                return draft
    return None


def check_draft(method: str, draft: AnyDraft | None) -> None:
    """Refuse a draft that does not serve a method.

    Raises:
        UserError: an unknown method, one whose draft is missing, or one that needs another kind of draft.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; known methods are {', '.join(METHODS)}")
    kinds = METHODS[method].kinds
    if kinds and draft is None:
        raise UserError(f"method {method} needs a draft")
    if draft is not None and kinds and kind_of(draft) not in kinds:
        suited = [name for name, known in METHODS.items() if kind_of(draft) in known.kinds]
        raise UserError(
            f"method {method} needs {KIND_NAMES[kinds[0]]} draft; this is {KIND_NAMES[kind_of(draft)]} draft "
            f"(use {suited[0]})"
        )


def default_method(draft: AnyDraft | None, sample_drafts: bool | None = None) -> str:
    """A tree of what the draft is, or a chain where drafts are to be sampled; `none` without a draft.

    The choice does not look at the number of requests: at temperature > 0 it decides which text a seed gives.
    """
    if draft is None:
        return "none"
    kind = kind_of(draft)
    return kind if sample_drafts or kind not in ("domino", "dflash") else f"{kind}-tree"


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
        num_drafts: of a tree, 512 at most; None is what pays: 11 for one request, fewer where several share a CPU's
            rows. A chain is as long as its draft allows.
        ngrams: of method dart, which goes without where there are none.

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
    return METHODS[method].make(
        Ingredients(draft, candidates, samples, draft_temperature, min_confidence, budget, ngrams)
    )
