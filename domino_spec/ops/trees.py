"""Trees from the head in plain PyTorch: from hidden states and base logits of a block to drafted prefixes.

Every prefix has a GRU state of its own, so its children's probabilities are those that the head gives after that text
(paper 4.1.2); without a head the slots' own probabilities are multiplied. Two orders of growth:

- `head_tree`, depth by depth: one batched step per depth extends the best prefixes of the depth before. Its cost grows
  with the depth, not with the budget. With a penalty per depth it is DARTree's *pruned* tree, with a width that
  divides the budget among the depths its *fixed* tree.
- `best_first_tree`: the most probable prefix of all is extended next, as DominoTree does and, without a head, DDTree.
  No tree of the budget's size holds more probability, and its steps follow one another.

Shapes: R requests, N drafted tokens, H hidden, V logits width, K candidates, G GRU width, L low rank, W tree width.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # kernels stand below every model; the head's type is named, never imported
    from domino_spec.draft.domino import DominoHead


@dataclass(frozen=True)
class Tree:
    """Drafted tokens as indices into the logits, parents first."""

    choices: Tensor
    """[R, N]; N is at most the budget; where improbable drafts are left out on a CPU, the largest of `num_drafts`."""
    parents: Tensor
    """[R, N], index of each draft's parent; -1 for a child of the anchor."""
    num_drafts: Tensor
    """[R], how many of them are meant."""
    log_probs: Tensor | None = None
    """[R, N] float32, natural logarithm of the probability that the draft gives to the text up to each draft; None
    where the builder does not tell."""

    @staticmethod
    def empty(requests: int, device: torch.device) -> Tree:
        """Nothing drafted."""
        nothing = torch.zeros(requests, 0, dtype=torch.long, device=device)
        return Tree(nothing, nothing, nothing.sum(1), nothing.float())


def head_tree(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
    budget: int,
    width: int | None,
    min_confidence: float = 0.0,
    depth_penalty: float = 0.0,
) -> Tree:
    """A tree grown depth by depth: of the prefixes that a beam search sees, the most probable ones.

    One batched step per depth extends the `width` most probable prefixes of the depth before; of all prefixes seen, the
    `budget` most probable are kept. A prefix is at most as probable as its parent, so what is kept is a tree.

    Args:
        head: the Domino head; None multiplies the slots' own probabilities.
        hidden: [R, depths, H], the slot that predicts each depth.
        base_logits: [R, depths, V].
        anchor_embedding: [R, H].
        embed_choice: indices into the logits [...] to target embeddings [..., H].
        candidates: K; probabilities are over the K best base logits of a slot, corrected. None for all.
        budget: N, drafts of a tree at most.
        width: W, prefixes that are extended at each depth. None keeps a share of the budget at every depth instead:
            what is left of it, divided by the depths that are left, rounded up (DARTree's *fixed* tree).
        min_confidence: prefixes less probable than this are left out.
        depth_penalty: taken off a prefix's log probability for each of its tokens when the best of all are chosen
            (DARTree's *pruned* tree has 0.2).

    Raises:
        ValueError: a negative penalty, which could rank a prefix above its parent.
    """
    if depth_penalty < 0:
        raise ValueError(f"depth_penalty must not be negative, got {depth_penalty}")
    requests, depths, hidden_width = hidden.shape
    threshold = math.log(min_confidence) if min_confidence > 0 else -math.inf
    if head is not None:
        w1_hidden, w1_state = head.input_weight.split([hidden_width, head.config.gru_hidden_dim], dim=1)
        from_hidden = F.linear(hidden, w1_hidden)  # [R, depths, L]
        states = head.step(anchor_embedding, head.initial_state(requests, like=hidden))[:, None]  # [R, W, G]
    scores = hidden.new_zeros(requests, 1, dtype=torch.float32)  # log probability of every prefix of the last depth
    first = -1  # index of that depth's first prefix
    all_choices, all_scores, all_parents = [], [], []
    widths = depth_widths(depths, min(candidates or math.inf, base_logits.shape[-1]), budget, width)
    for depth, most in enumerate(widths):
        logits, ids = _candidates(base_logits[:, depth], candidates)  # [R, K]
        logits = logits[:, None].expand(-1, scores.shape[1], -1)  # [R, W, K]
        if head is not None and depth >= head.config.pure_draft_prefix_len:
            low_rank = F.silu(from_hidden[:, depth, None] + F.linear(states, w1_state))  # [R, W, L]
            if ids is None:
                logits = logits + F.linear(low_rank, head.correction_weight)
            else:
                logits = logits + low_rank @ head.correction_weight[ids].transpose(1, 2)
        paths = (scores[..., None] + logits.float().log_softmax(-1)).flatten(1)  # [R, W * K]
        # On a CPU, prefixes that nobody would keep are not extended; elsewhere that would take a look at the device.
        scores, index = paths.topk(min(most, paths.shape[1]), dim=1)
        if hidden.device.type == "cpu" and min_confidence > 0:
            worth = int((scores >= threshold).any(0).sum())
            if worth == 0:
                break
            scores, index = scores[:, :worth], index[:, :worth]
        parents, positions = index // logits.shape[-1], index % logits.shape[-1]
        choices = positions if ids is None else ids.gather(1, positions)
        all_choices.append(choices)
        all_scores.append(scores)
        all_parents.append(parents + first if depth else torch.full_like(parents, -1))
        first = sum(part.shape[1] for part in all_choices[:-1])
        if head is not None and depth + 1 < len(widths):
            states = states.gather(1, parents[..., None].expand(-1, -1, states.shape[-1]))
            states = head.step(embed_choice(choices), states)
    if not all_choices:
        return Tree.empty(requests, hidden.device)
    choices, scores, parents = (torch.cat(part, 1) for part in (all_choices, all_scores, all_parents))
    ranks = scores
    if depth_penalty:
        ranks = torch.cat([part - depth_penalty * depth for depth, part in enumerate(all_scores, start=1)], 1)
    return _best(choices, scores, parents, ranks, budget, threshold)


def _candidates(logits: Tensor, candidates: int | None) -> tuple[Tensor, Tensor | None]:
    """The K best of [R, V] logits and their indices; None for the indices where all are candidates."""
    if candidates is None or candidates >= logits.shape[-1]:
        return logits, None
    best = logits.topk(candidates, dim=-1)
    return best.values, best.indices


def depth_widths(depths: int, children: float, budget: int, width: int | None) -> list[int]:
    """Prefixes that are kept at each depth, where every prefix has so many children."""
    widths, before, left = [], 1.0, budget
    for depth in range(depths):
        wanted = math.ceil(left / (depths - depth)) if width is None else width
        before = min(wanted, before * children)
        widths.append(int(before))
        left -= int(before)
    return [w for w in widths if w > 0]


def _best(choices: Tensor, scores: Tensor, parents: Tensor, ranks: Tensor, budget: int, threshold: float) -> Tree:
    """The `budget` best of M prefixes by rank, in their order, with parents renumbered."""
    total = choices.shape[1]
    # Stable: where a child is as probable as its parent, the parent, which comes first, stays first.
    ranked = ranks.where(scores >= threshold, -math.inf).sort(dim=1, descending=True, stable=True)
    kept = ranked.indices[:, :budget]
    meant = ranked.values[:, :budget] > -math.inf
    num_drafts = meant.sum(1)
    kept = torch.where(meant, kept, total).sort(dim=1).values  # in order of depth; what is not meant, last
    if choices.device.type == "cpu" and threshold > -math.inf:
        kept = kept[:, : int(num_drafts.max())]  # rows of the verify pass that no request would use
    places = torch.full((len(choices), total + 1), -1, device=choices.device)
    places.scatter_(1, kept, torch.arange(kept.shape[1], device=choices.device).expand_as(kept))
    inside = kept.clamp(max=total - 1)
    of_kept = parents.gather(1, inside)
    renumbered = torch.where(of_kept < 0, -1, places.gather(1, of_kept.clamp(min=0)))
    return Tree(choices.gather(1, inside), renumbered, num_drafts, scores.gather(1, inside))


AHEAD = 4
"""Prefixes of one request whose children `best_first_tree` scores in one step by default."""


def best_first_tree(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None,
    budget: int,
    min_confidence: float = 0.0,
    ahead: int = AHEAD,
) -> Tree:
    """The `budget` most probable of all prefixes, the most probable first.

    The most probable prefix outside the tree is taken into it, its children join those to choose from, and so on. A
    prefix is at most as probable as its parent, so the first n drafts of a tree are the tree of budget n.

    A prefix's GRU state is computed when its children are first asked for. DominoTree computes those of eight children
    of each prefix that it takes, most of them in vain; the trees are the same.

    The search runs on the host: each step is one batched product over all requests, then a look at its result.

    Args:
        head: the Domino head; None multiplies the slots' own probabilities (DDTree).
        hidden: [R, depths, H], the slot that predicts each depth.
        base_logits: [R, depths, V].
        anchor_embedding: [R, H].
        embed_choice: indices into the logits [...] to target embeddings [..., H].
        candidates: K; probabilities are over the K best base logits of a slot, corrected. None for all.
        budget: N, drafts of a tree at most.
        min_confidence: prefixes less probable than this are left out.
        ahead: at most so many prefixes of a request have their children scored in one step: the one that is needed now
            and the next best, which will probably be needed soon. It changes the number of steps, never the tree.
    """
    requests, depths, hidden_width = hidden.shape
    threshold = math.log(min_confidence) if min_confidence > 0 else -math.inf
    # Deep slots are often not reached, and finding the best of V logits takes long.
    slot = functools.cache(lambda depth: _candidates(base_logits[:, depth], candidates))
    restricted = candidates is not None and candidates < base_logits.shape[-1]
    searches = [_Search(depths, budget, threshold, ahead, alike=head is None) for _ in range(requests)]
    if head is not None:
        w1_hidden, w1_state = head.input_weight.split([hidden_width, head.config.gru_hidden_dim], dim=1)
        from_hidden = F.linear(hidden, w1_hidden)  # [R, depths, L]
        states = head.step(anchor_embedding, head.initial_state(requests, like=hidden))
    while waiting := [(r, prefix) for r, search in enumerate(searches) for prefix in search.advance()]:  # n of them
        slots = [(r, prefix.length) for r, prefix in waiting]
        logits, ids = torch.stack([slot(depth)[0][r] for r, depth in slots]), None  # [n, K]
        if restricted:
            ids = torch.stack([slot(depth)[1][r] for r, depth in slots])  # type: ignore[index]
        if head is not None:
            if waiting[0][1].parent is not None:  # all but the first time
                before = torch.stack([prefix.parent.state for _, prefix in waiting])  # type: ignore[union-attr, misc]
                choices = torch.tensor([prefix.choice for _, prefix in waiting], device=hidden.device)
                states = head.step(embed_choice(choices), before)  # [n, G]
            of_slot = torch.stack([from_hidden[r, depth] for r, depth in slots])
            low_rank = F.silu(of_slot + F.linear(states, w1_state))  # [n, L]
            pure = torch.tensor([depth < head.config.pure_draft_prefix_len for _, depth in slots])
            low_rank = low_rank.masked_fill(pure.to(low_rank.device)[:, None], 0)
            if ids is None:
                logits = logits + F.linear(low_rank, head.correction_weight)
            else:
                logits = logits + (head.correction_weight[ids] @ low_rank[..., None])[..., 0]
        best = logits.float().log_softmax(-1).topk(min(budget, logits.shape[-1]), dim=-1)
        best_choices = best.indices if ids is None else ids.gather(1, best.indices)
        for i, (r, prefix) in enumerate(waiting):
            searches[r].learn(prefix, best.values[i].tolist(), best_choices[i].tolist())
            prefix.state = None if head is None else states[i]
    return _as_tree([search.tree for search in searches], hidden.device)


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

    Of siblings only the most probable one that is not yet taken is on offer: the others can wait behind it.

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
