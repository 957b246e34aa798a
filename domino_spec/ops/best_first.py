"""Trees grown best first: the most probable prefix of all is extended next.

So do DominoTree and, without a head, DDTree. No tree of the budget's size holds more probability than this one; its
steps follow one another, where `heads.head_tree` takes one batched step per depth.

Shapes as in `heads.py`.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.ops.heads import Draw, HeadInputs, HeadWeights, Tree, best_logits

AHEAD = 4
"""Prefixes of one request whose children are scored in one step by default."""


def best_first_tree(head: HeadWeights | None, block: HeadInputs, how: Draw, budget: int, ahead: int = AHEAD) -> Tree:
    """The `budget` most probable of all prefixes, the most probable first.

    The most probable prefix outside the tree is taken into it, its children join those to choose from, and so on. A
    prefix is at most as probable as its parent, so the first n drafts of a tree are the tree of budget n.

    A prefix's GRU state is computed when its children are first asked for. DominoTree computes those of eight children
    of each prefix that it takes, and most are never used; the trees are the same.

    The search runs on the host: each step is one batched product over all requests, whose result is then read.

    Args:
        head: None multiplies the slots' own probabilities (DDTree).
        block: its slots are the depths.
        how: candidates and least confidence; every draft of a tree is chosen.
        budget: N, drafts of a tree at most.
        ahead: how many prefixes of a request have their children scored in one step at most: the one that is needed now
            and the next best, which will probably be needed soon. It changes the number of steps, never the tree.
    """
    requests, depths, vocabulary = block.base_logits.shape
    device = block.base_logits.device
    # Deep slots are often not reached, and finding the best of V logits takes long.
    slot = functools.cache(lambda depth: best_logits(block.base_logits[:, depth], how.candidates))
    restricted = how.candidates is not None and how.candidates < vocabulary
    searches = [_Search(depths, budget, how.threshold, ahead, alike=head is None) for _ in range(requests)]
    if head is not None:
        states, of_slots = head.start(block)
    while waiting := [(r, prefix) for r, search in enumerate(searches) for prefix in search.advance()]:  # n of them
        slots = [(r, prefix.length) for r, prefix in waiting]
        logits, ids = torch.stack([slot(depth)[0][r] for r, depth in slots]), None  # [n, K]
        if restricted:
            ids = torch.stack([slot(depth)[1][r] for r, depth in slots])  # type: ignore[index]
        if head is not None:
            if waiting[0][1].parent is not None:  # all but the first time
                before = torch.stack([prefix.parent.state for _, prefix in waiting])  # type: ignore[union-attr, misc]
                choices = torch.tensor([prefix.choice for _, prefix in waiting], device=device)
                states = head.step(head.embed_choice(choices), before)  # [n, G]
            corrected = head.correct(logits, ids, torch.stack([of_slots[r, depth] for r, depth in slots]), states)
            pure = torch.tensor([depth < head.pure_draft_prefix_len for _, depth in slots], device=device)
            logits = torch.where(pure[:, None], logits, corrected)
        best = logits.float().log_softmax(-1).topk(min(budget, logits.shape[-1]), dim=-1)
        best_choices = best.indices if ids is None else ids.gather(1, best.indices)
        for i, (r, prefix) in enumerate(waiting):
            searches[r].learn(prefix, best.values[i].tolist(), best_choices[i].tolist())
            prefix.state = None if head is None else states[i]
    return _as_tree([search.tree for search in searches], device)


@dataclass(eq=False)
class _Prefix:
    """A text that begins after the anchor; the empty one is the root."""

    parent: _Prefix | None
    length: int
    choice: int
    """Its last token."""
    log_prob: float
    rank: int
    """Among its siblings, 0 for the most probable."""
    place: int = -1
    """In the tree."""
    state: Tensor | None = None
    """[G], of the GRU that has read all of it."""


class _Search:
    """One request's tree, and the prefixes that may be taken into it next.

    Of siblings only the most probable one that is not yet taken is offered; the others follow it one by one.

    Args:
        alike: what follows a prefix depends on its length alone.
    """

    def __init__(self, depths: int, budget: int, threshold: float, ahead: int, alike: bool) -> None:
        self.tree: list[_Prefix] = []
        self._depths, self._budget, self._threshold = depths, budget, threshold
        self._ahead, self._alike = 1 if alike else ahead, alike
        self._latest: _Prefix | None = _Prefix(None, 0, -1, 0.0, 0)
        self._children: dict[_Prefix | int, list[tuple[float, int]]] = {}
        self._offers: list[tuple[float, int, int, _Prefix]] = []  # a heap, the most probable first, then the shortest
        self._count = 0

    def _key(self, prefix: _Prefix) -> _Prefix | int:
        return prefix.length if self._alike else prefix

    def learn(self, prefix: _Prefix, log_probs: list[float], choices: list[int]) -> None:
        """What follows a prefix, most probable first."""
        self._children[self._key(prefix)] = list(zip(log_probs, choices, strict=True))

    def advance(self) -> list[_Prefix]:
        """Take prefixes until what follows the latest is unknown: that one and some that may be next; [] at the end."""
        while self._latest is not None:
            if self._latest.length < self._depths:
                if self._key(self._latest) not in self._children:
                    return [self._latest, *self._next()]
                self._offer(self._latest, 0)
            self._latest = self._take()
        return []

    def _next(self) -> list[_Prefix]:
        unknown = (o for o in self._offers if o[1] < self._depths and o[3] not in self._children)
        useful = self._budget - len(self.tree) - 1  # the last that is taken needs no children
        return [prefix for *_, prefix in heapq.nsmallest(min(self._ahead - 1, useful), unknown)]

    def _take(self) -> _Prefix | None:
        if not self._offers:
            return None
        prefix = heapq.heappop(self._offers)[-1]
        prefix.place = len(self.tree)
        self.tree.append(prefix)
        if len(self.tree) == self._budget:
            return None
        assert prefix.parent is not None
        self._offer(prefix.parent, prefix.rank + 1)
        return prefix

    def _offer(self, parent: _Prefix, rank: int) -> None:
        children = self._children[self._key(parent)]
        if rank == len(children):
            return
        log_prob, choice = children[rank]
        log_prob += parent.log_prob
        if log_prob >= self._threshold and log_prob > -math.inf:
            self._count += 1
            prefix = _Prefix(parent, parent.length + 1, choice, log_prob, rank)
            heapq.heappush(self._offers, (-log_prob, prefix.length, self._count, prefix))


def _as_tree(found: list[list[_Prefix]], device: torch.device) -> Tree:
    longest = max(map(len, found))
    choices = [[p.choice for p in tree] + [0] * (longest - len(tree)) for tree in found]
    parents = [[p.parent.place for p in tree if p.parent] + [-1] * (longest - len(tree)) for tree in found]
    log_probs = [[p.log_prob for p in tree] + [-math.inf] * (longest - len(tree)) for tree in found]
    return Tree(
        torch.tensor(choices, dtype=torch.long, device=device),
        torch.tensor(parents, dtype=torch.long, device=device),
        torch.tensor([len(tree) for tree in found], device=device),
        torch.tensor(log_probs, dtype=torch.float32, device=device),
    )
