"""What tests of trees share: inputs, every prefix written out one by one, and trees grown in plain Python.

The growers below know nothing of tensors: they take a function from a prefix to the log probabilities of what may
follow it. None of them looks at how `domino_spec.ops` grows them.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from domino_spec.ops.heads import HeadInputs, HeadWeights, Tree

VOCAB, DEPTHS, REQUESTS = 5, 3, 4
EVERYTHING = VOCAB + VOCAB**2 + VOCAB**3

Prefix = tuple[int, ...]
Following = Callable[[Prefix], dict[int, float]]
"""The log probability of each token that may follow a prefix; none after the last depth."""


def inputs(draft, seed: int = 0, depths: int = DEPTHS):
    """Hidden states of a scale that leaves the probabilities neither flat nor sharp."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(REQUESTS, depths, 32, generator=generator) / 4
    anchors = torch.randint(0, VOCAB, (REQUESTS,), generator=generator)
    return hidden, draft.base_logits(hidden), draft.embed(anchors)


def every_prefix(draft, given, candidates: int | None, r: int) -> dict[Prefix, float]:
    """Log probability of each prefix of request r, its whole text run through the GRU each time."""
    hidden, base, anchor = (part[r] for part in given)
    scores: dict[Prefix, float] = {(): 0.0}
    for depth in range(len(hidden)):
        allowed = base[depth].topk(min(candidates or VOCAB, VOCAB)).indices.tolist()
        for prefix in [p for p in scores if len(p) == depth]:
            logits = base[depth]
            if draft.head is not None and depth >= draft.head.config.pure_draft_prefix_len:
                consumed = torch.stack([anchor, *(draft.embed(torch.tensor(t)) for t in prefix)])
                logits = logits + draft.head.correction(hidden[depth], draft.head.block(consumed)[-1])
            for token, log_prob in zip(allowed, logits[allowed].log_softmax(-1).tolist(), strict=True):
                scores[(*prefix, token)] = scores[prefix] + log_prob
    del scores[()]
    return scores


def following(scores: dict[Prefix, float]) -> Following:
    """What may follow, read off a table of whole prefixes."""
    table: dict[Prefix, dict[int, float]] = {}
    for prefix, score in scores.items():
        table.setdefault(prefix[:-1], {})[prefix[-1]] = score - scores.get(prefix[:-1], 0.0)
    return lambda prefix: table.get(prefix, {})


def plain_best_first(after: Following, budget: int) -> list[Prefix]:
    """Pop the most probable prefix, push everything that may follow it; in the order of the pops."""
    heap = [(-log_prob, 1, (token,)) for token, log_prob in after(()).items()]
    heapq.heapify(heap)
    popped: list[Prefix] = []
    while heap and len(popped) < budget:
        cost, length, prefix = heapq.heappop(heap)
        popped.append(prefix)
        for token, log_prob in after(prefix).items():
            heapq.heappush(heap, (cost - log_prob, length + 1, (*prefix, token)))
    return popped


def plain_beam(after: Following, depths: int, width: int, budget: int, penalty: float = 0.0) -> set[Prefix]:
    """The best of each depth's prefixes get children; the best of all, less a penalty for each token, are kept."""
    beam: dict[Prefix, float] = {(): 0.0}
    seen: dict[Prefix, float] = {}
    for _ in range(depths):
        longer = {(*p, t): score + log_prob for p, score in beam.items() for t, log_prob in after(p).items()}
        beam = dict(sorted(longer.items(), key=lambda item: -item[1])[:width])
        seen |= beam
    ranked = sorted(seen, key=lambda p: (penalty * len(p) - seen[p], len(p)))
    return set(ranked[:budget])


def plain_quotas(after: Following, depths: int, budget: int) -> list[set[Prefix]]:
    """Every depth keeps its share of what is left of the budget; the kept prefixes of each depth."""
    beam: dict[Prefix, float] = {(): 0.0}
    kept: list[set[Prefix]] = []
    for left in range(depths, 0, -1):
        quota = -(-(budget - sum(map(len, kept))) // left)
        longer = {(*p, t): score + log_prob for p, score in beam.items() for t, log_prob in after(p).items()}
        beam = dict(sorted(longer.items(), key=lambda item: -item[1])[:quota])
        kept.append(set(beam))
    return kept


def no_near_ties(scores: dict[Prefix, float]) -> None:
    """Rounding must not decide between two prefixes, unless a certain child and its parent are as probable."""
    ranked = sorted(scores, key=lambda p: (-scores[p], len(p)))
    for first, second in itertools.pairwise(ranked):
        certain = second[:-1] == first and scores[first] == scores[second]
        assert certain or scores[first] - scores[second] > 2e-6, "choose another seed"


def prefixes(tree: Tree, r: int) -> list[Prefix]:
    """The texts of request r's drafts, read along their parents, in the order of the drafts."""
    found: list[Prefix] = []
    choices, parents = tree.choices[r].tolist(), tree.parents[r].tolist()
    for j in range(int(tree.num_drafts[r])):
        assert -1 <= parents[j] < j, "parents come first"
        found.append((*(found[parents[j]] if parents[j] >= 0 else ()), choices[j]))
    assert len(set(found)) == len(found), "siblings differ"
    return found


def mass(tree: Tree) -> list[float]:
    """Sum of the kept prefixes' probabilities: the drafts that would be accepted if the draft were right."""
    valid = torch.arange(tree.choices.shape[1]) < tree.num_drafts[:, None]
    return (tree.log_probs.exp() * valid).sum(1).tolist()


# Worked examples (a, b, .. are tokens 0, 1, ..).

LETTERS = "abcdef"
CONDITIONAL = {
    "": {"a": 0.6, "b": 0.4},
    "a": {"c": 0.7, "d": 0.3},
    "b": {"c": 0.9, "d": 0.1},
    "ac": {"e": 0.98, "f": 0.02},
    "bc": {"e": 0.9, "f": 0.1},
}
MARGINAL = [{"a": 0.6, "b": 0.4}, {"c": 0.7, "d": 0.3}, {"e": 0.6, "f": 0.4}]
UNKNOWN = {"e": 0.5, "f": 0.5}
"""After prefixes of two letters that are not in the table."""


def texts(tree: Tree) -> list[str]:
    """The only request's drafts as texts."""
    return ["".join(LETTERS[t] for t in prefix) for prefix in prefixes(tree, 0)]


def table_logits(probs: dict[str, float]) -> torch.Tensor:
    """[6], log probabilities; letters that are not named are all but impossible."""
    return torch.tensor([math.log(probs.get(letter, 1e-9)) for letter in LETTERS])


def marginal_inputs(slots: list[dict[str, float]] = MARGINAL):
    """What a draft without a head drafts from."""
    base = torch.stack([table_logits(slot) for slot in slots])[None]
    return HeadInputs(torch.zeros(1, len(slots), 1), base, torch.zeros(1, 1))


class TableHead(HeadWeights):
    """A head that looks its logits up by the whole prefix.

    Its state is one-hot in the prefix, W1 hands it on, and a column of W2 holds the logits after that prefix. The
    embedding of a token is its id, the anchor's is -1.
    """

    ANCHOR = -1.0

    def __init__(self, table: dict[str, dict[str, float]] = CONDITIONAL) -> None:
        known = ["".join(p) for n in range(3) for p in itertools.product(LETTERS, repeat=n)]
        size, nothing = len(known), torch.zeros(0, 1)
        rows = [table_logits(table.get(prefix, UNKNOWN)) for prefix in known]
        super().__init__(
            input_gates=nothing,
            state_gates=torch.zeros(0, size),
            to_low_rank=torch.cat((torch.zeros(size, 1), torch.eye(size)), dim=1),
            correction=torch.stack(rows, dim=1) / F.silu(torch.ones(())),
            pure_draft_prefix_len=0,
            embed_choice=lambda ids: ids[..., None].float(),
        )
        object.__setattr__(self, "known", known)
        object.__setattr__(self, "read", [])  # every prefix whose state was computed

    def step(self, embedding: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        after = torch.zeros_like(state)
        flat = after.view(-1, len(self.known))
        for row, token, before in zip(flat, embedding.flatten().tolist(), state.view(flat.shape), strict=True):
            text = "" if token == self.ANCHOR else self.known[int(before.argmax())] + LETTERS[int(token)]
            row[self.known.index(text)] = 1
            self.read.append(text)
        return after

    def inputs(self) -> HeadInputs:
        """What leaves every choice to the table."""
        return HeadInputs(torch.zeros(1, 3, 1), torch.zeros(1, 3, 6), torch.full((1, 1), self.ANCHOR))
