"""`eagle3`: a dynamic tree, grown level by level by a draft that reads its own outputs (EAGLE-3, arXiv 2503.01840).

The last committed pair gives the first level. Each further level runs the best few nodes of the level before together,
every node on its parent's output, and scores their children by the log-probability of the whole path; of everything
scored, the best become the tree. Trees grow as in EAGLE-2 (arXiv 2406.16858), expansion and re-ranking apart.

The tokens are chosen, at any temperature, and the target walks the tree along its own choices. That accepts a node's
children with the same probability as the published rule, which tries siblings one after the other.

Shapes: R requests, W nodes of a level that are expanded, k children of each, H hidden, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from domino_spec.decoding.cycle import Proposal, State, Verdict, scope
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.drafters.pairs import PairCache, Rows, advance_pairs
from domino_spec.ops.heads import Tree
from domino_spec.settings import UserError

TOTAL = 60
"""Rows of a verify pass, the anchor's included: the published default."""
DEPTH, TOP_K = 7, 10
"""The published defaults for 60, used for every total: the paper gives none for 16, and DominoTree's comparison at 16
kept them. A wide beam costs little if the total is small, because levels that cannot reach the tree are not run."""

Expand = Callable[[Tensor, Tensor], Tensor]
"""Nodes' choices [R, W], and for each the place of its parent among the nodes expanded before [R, W], to logits
[R, W, V]."""


class Eagle3Drafter:
    """Grows EAGLE-3's dynamic trees.

    Args:
        draft: bound to its target.
        total: rows of a verify pass, the anchor's included: a nominal 16 proposes 15 drafts, 60 proposes 59.
        depth: how often a level is expanded; the longest path has `depth + 1` drafts.
        top_k: children of a node, and nodes of a level that are expanded. 1 makes a chain.
        prune: do not expand nodes whose descendants cannot reach the tree: scores only fall along a path. The
            result is the same. None prunes on a CPU alone: elsewhere the host would wait for the device at every level.

    Raises:
        UserError: the draft is another method's.
        ValueError: sizes out of range.
    """

    samples = False

    def __init__(
        self,
        draft: SingleLayerDraft,
        *,
        total: int = TOTAL,
        depth: int = DEPTH,
        top_k: int = TOP_K,
        prune: bool | None = None,
    ) -> None:
        if draft.kind != "eagle3":
            raise UserError(f"method eagle3 needs an EAGLE-3 draft; this one is made for {draft.kind}")
        if total < 2 or depth < 0 or top_k < 1:
            raise ValueError(
                f"a tree needs a total of at least 2, a depth of at least 0 and a top_k of at least 1, got {total}, "
                f"{depth} and {top_k}"
            )
        self.draft, self.depth = draft, depth
        self.top_k = min(top_k, draft.config.logits_size)
        self.prune = draft.device.type == "cpu" if prune is None else prune
        self.feature_layers = draft.feature_layers
        self.max_drafts = min(total - 1, self.top_k + depth * self.top_k**2)

    def allocate(self, requests: int, capacity: int) -> PairCache:
        """Memory for pairs, and after them for the nodes of a tree that are expanded."""
        return PairCache(self.draft, requests, capacity, self.depth * self.top_k)

    def read(self, cache: PairCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """Add the pairs of known text."""
        assert features is not None
        cache.append(self.draft, features, tokens, counts)

    def propose(self, state: State, cache: PairCache, num_drafts: int) -> Proposal:
        """A tree for every request; requests whose text has one token, and so no feature yet, get none."""
        ready = cache.lengths > 0
        if num_drafts == 0 or not ready.any():
            return Proposal.empty(len(ready), ready.device)
        branches = Branches(self.draft, cache)
        with scope("lm_head"):
            first = self.draft.logits(branches.out)[:, 0]
        with scope("head"):
            tree = grow_tree(first, branches.expand, num_drafts, self.depth, self.top_k, self.prune)
        return Proposal(self.draft.to_token_ids(tree.choices), tree.num_drafts * ready, tree.parents)

    def advance(self, cache: PairCache, verdict: Verdict) -> None:
        """Pairs of what was committed; what drafting wrote after the committed pairs is dropped."""
        advance_pairs(self.draft, cache, verdict)


class Branches:
    """The draft's layer over a growing tree, after the committed pairs of a cache.

    Every node that is expanded becomes a pair: its token, and its parent's output in the feature's place. It sees the
    committed pairs, the nodes it descends from, and itself, and its position is its parent's plus one.
    """

    def __init__(self, draft: SingleLayerDraft, cache: PairCache) -> None:
        self._draft, self._cache = draft, cache
        root = Rows(cache, (cache.lengths - 1).clamp(min=0))
        seen = torch.ones(len(cache.lengths), 1, 1, dtype=torch.bool, device=cache.lengths.device)
        writer, mask = root.writer(0), root.mask(seen)
        with scope("backbone"):
            self.out = draft.extend(cache.last, cache.last_feature, root.first[:, None], writer, mask)
        """[R, W, H], the layer's output at the nodes expanded last; at first, at the last committed pair."""
        self._rows = Rows(cache, cache.lengths)
        self._seen = seen[..., :0]  # [R, W, nodes expanded so far], which of those each node of `out` descends from
        self._level = 0

    def expand(self, choices: Tensor, parents: Tensor) -> Tensor:
        """Logits of what follows each node, [R, W, V]; see `Expand`."""
        count, (_, width) = self._seen.shape[2], choices.shape
        features = self.out.gather(1, parents[..., None].expand(-1, -1, self.out.shape[-1]))
        above = self._seen.gather(1, parents[..., None].expand(-1, -1, count))
        itself = torch.eye(width, dtype=torch.bool, device=choices.device).expand(len(choices), -1, -1)
        self._seen = torch.cat((above, itself), dim=2)
        positions = (self._cache.lengths + self._level)[:, None].expand(-1, width)
        pairs = self._draft.pair(self._draft.to_token_ids(choices), features)
        mask = self._rows.mask(self._seen)
        with scope("backbone"):
            self.out = self._draft.extend(pairs, features, positions, self._rows.writer(count), mask)
        self._level += 1
        with scope("lm_head"):
            return self._draft.logits(self.out)


def grow_tree(first: Tensor, expand: Expand, budget: int, depth: int, top_k: int, prune: bool) -> Tree:
    """EAGLE's dynamic tree: expansion, then re-ranking.

    Args:
        first: [R, V], logits of the first level.
        expand: gives the logits of what follows each node of a level.
        budget: drafts of the tree at most.
        depth: how often a level is expanded.
        top_k: k, children of a node and nodes of a level that are expanded; at most V.
        prune: see `Eagle3Drafter`.

    Returns:
        The `budget` best of the k + depth * k^2 nodes scored, level by level, and in a level in the order in which they
        were scored.
    """
    scores, choices = (part[:, 0] for part in _children(first[:, None], top_k))  # [R, k]
    places = torch.arange(top_k, device=first.device).expand_as(choices)  # of the beam's nodes among all scored
    pool = [(choices, scores, torch.full_like(choices, -1))]
    size, origins = top_k, torch.zeros_like(choices)
    for _ in range(depth):
        if prune and size >= budget:
            enough = torch.cat([part[1] for part in pool], dim=1).topk(budget).values[:, -1:]
            # If a descendant can only be as good as a node that is there, the node that is there comes first.
            worth = int((scores > enough).sum(1).max())
            if worth == 0:
                break
            scores, choices, places, origins = (t[:, :worth] for t in (scores, choices, places, origins))
        child_scores, child_choices = _children(expand(choices, origins), top_k)  # [R, W, k]
        child_scores = (child_scores + scores[..., None]).flatten(1)
        child_choices = child_choices.flatten(1)
        pool.append((child_choices, child_scores, places.repeat_interleave(top_k, dim=1)))
        scores, best = child_scores.topk(top_k)
        choices, origins, places = child_choices.gather(1, best), best // top_k, best + size
        size += child_choices.shape[1]
    all_choices, all_scores, all_parents = (torch.cat(parts, dim=1) for parts in zip(*pool, strict=True))
    return _rerank(all_choices, all_scores, all_parents, budget)


def _children(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and choices of the k most probable children, each [R, W, k], best first."""
    best = logits.topk(top_k)
    return best.values.float() - logits.float().logsumexp(-1, keepdim=True), best.indices


def _rerank(choices: Tensor, scores: Tensor, parents: Tensor, budget: int) -> Tree:
    """The `budget` best nodes in their order, with parents renumbered; each [R, M], parents before children."""
    # Stable: a parent is never worse than its child, and comes first if both are equal, so parents are kept too.
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :budget].sort(dim=1).values
    above = parents.gather(1, kept)
    renumbered = torch.where(above < 0, -1, torch.searchsorted(kept, above))
    counts = torch.full((len(kept),), kept.shape[1], device=kept.device)
    return Tree(choices.gather(1, kept), renumbered, counts)
