"""Drafts from a block's base logits: chains and trees, with or without the Domino head.

The draft's backbone gives a hidden state and base logits for every slot of a block. What follows is here: per drafted
token, the best base logits as candidates, the head's low-rank correction of those candidates only, a choice, and one
GRU step (paper 4.1.2, 4.3). `head_rollout` and `head_tree` are the plain PyTorch versions. `HeadOps` is what decoding
calls: it chooses once, when a drafter is made, between them, the C loops of a CPU and the Triton kernels of a GPU.
`best_first.py` grows trees in another order.

Shapes: R requests, N drafted tokens, H hidden, V logits width, K candidates, G GRU width, L low rank, W tree width.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.ops.native import bindings

_log = logging.getLogger(__name__)

_SCALED = ("Gemma3TextScaledWordEmbedding", "Gemma4TextScaledWordEmbedding")
"""Modules of transformers that look up and multiply by `scalar_embed_scale`, and do nothing else."""


@dataclass(frozen=True)
class EmbeddingTable:
    """Indices into the logits to embeddings, as a matrix that kernels can read; callable like any other embedding."""

    weight: Tensor
    """[vocabulary, H], the target's."""
    token_ids: Tensor | None
    """[V] int64, the token of each index into the logits; None if they are the same."""
    dtype: torch.dtype
    """Type of the draft, and so of the result."""
    scale: float = 1.0
    """Factor of the embeddings (Gemma), in the target's type."""

    @staticmethod
    def of(module: nn.Module, token_ids: Tensor | None, dtype: torch.dtype) -> EmbeddingTable | None:
        """The table behind a target's embedding; None if the module does more than look up, or is unknown.

        Known are `nn.Embedding` and the scaled kind of transformers' Gemma, which keeps its factor as a number.
        """
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return None
        changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        scale: float | None = 1.0 if type(module).forward is nn.Embedding.forward else None
        if type(module).__name__ in _SCALED:
            scale = getattr(module, "scalar_embed_scale", None)
        if changed or not isinstance(scale, float) or not module.weight.is_contiguous():
            return None
        rounded = float(torch.tensor(scale, dtype=module.weight.dtype))
        return EmbeddingTable(module.weight.detach(), token_ids, dtype, rounded)

    def __call__(self, choices: Tensor) -> Tensor:
        """Indices into the logits [...] to embeddings [..., H]."""
        rows = F.embedding(choices if self.token_ids is None else self.token_ids[choices], self.weight)
        return (rows if self.scale == 1 else rows * self.scale).to(self.dtype)


def gru_cell(gates: Tensor, state: Tensor, state_gates: Tensor) -> Tensor:
    """One GRU step: input product `gates` [..., 3G] and `state` [..., G] to the next state [..., G].

    `state_gates` is W_hh [3G, G]; the order of gates is PyTorch's (reset, update, new).
    """
    input_reset, input_update, input_new = gates.chunk(3, dim=-1)
    state_reset, state_update, state_new = F.linear(state, state_gates).chunk(3, dim=-1)
    reset = torch.sigmoid(input_reset + state_reset)
    update = torch.sigmoid(input_update + state_update)
    new = torch.tanh(input_new + reset * state_new)
    return new + update * (state - new)


@dataclass(frozen=True)
class HeadWeights:
    """A Domino head as the functions here read it."""

    input_gates: Tensor
    """W_ih [3G, H]."""
    state_gates: Tensor
    """W_hh [3G, G]."""
    to_low_rank: Tensor
    """W1 [L, H + G]."""
    correction: Tensor
    """W2 [V, L]."""
    pure_draft_prefix_len: int
    """So many drafts come from the base logits alone."""
    embed_choice: Callable[[Tensor], Tensor]
    """Indices into the logits [...] to target embeddings [..., H]; kernels need an `EmbeddingTable`."""

    def step(self, embedding: Tensor, state: Tensor) -> Tensor:
        """Consume one token: embedding [..., H] and state [..., G] to the next state [..., G]."""
        return gru_cell(F.linear(embedding, self.input_gates), state, self.state_gates)

    def start(self, block: HeadInputs) -> tuple[Tensor, Tensor]:
        """The state after the anchor [R, G], and the share that the slots have in the low rank [R, N, L]."""
        empty = block.hidden.new_zeros(len(block.hidden), self.state_gates.shape[1])
        of_slots = F.linear(block.hidden, self.to_low_rank[:, : block.hidden.shape[-1]])
        return self.step(block.anchor_embedding, empty), of_slots

    def correct(self, logits: Tensor, ids: Tensor | None, of_slot: Tensor, state: Tensor) -> Tensor:
        """Base logits to final logits, each [n, K] or [n, W, K].

        Args:
            logits: of the candidates.
            ids: [n, K], rows of W2; None for all rows.
            of_slot: their slot's share in the low rank, from `start`.
            state: [n, G] or [n, W, G], after the text so far.
        """
        low_rank = F.silu(of_slot + F.linear(state, self.to_low_rank[:, -state.shape[-1] :]))
        if ids is None:
            return logits + F.linear(low_rank, self.correction)
        rows = self.correction[ids]  # [n, K, L]
        if low_rank.dim() == 2:
            return logits + (rows @ low_rank[..., None])[..., 0]
        return logits + low_rank @ rows.transpose(1, 2)


@dataclass(frozen=True)
class HeadInputs:
    """What a block of slots gives to draft from."""

    hidden: Tensor
    """[R, N, H], the slot that predicts each draft."""
    base_logits: Tensor
    """[R, N, V]."""
    anchor_embedding: Tensor
    """[R, H], of the anchor, which the head's GRU consumes first."""

    def first(self, depths: int) -> HeadInputs:
        """The first slots alone."""
        return HeadInputs(self.hidden[:, :depths], self.base_logits[:, :depths], self.anchor_embedding)


@dataclass(frozen=True)
class Draw:
    """How drafts are chosen from their logits."""

    candidates: int | None = None
    """K: only the K best base logits of a slot are corrected and can be drafted; None for all. The greedy draft is that
    of the full vocabulary whenever its token is among them."""
    temperature: float | Tensor = 0.0
    """Temperature of sampled drafts, one for all requests or [R]; at 0 drafts are chosen, with one-hot probability."""
    uniform: Tensor | None = None
    """[R, N] float64 in [0, 1), one number for each sampled draft; None chooses every draft."""
    min_confidence: float = 0.0
    """On a CPU, drafting ends once no request's confidence reaches this; a tree leaves such prefixes out."""

    @property
    def threshold(self) -> float:
        """The logarithm of the least confidence; -inf for none."""
        return math.log(self.min_confidence) if self.min_confidence > 0 else -math.inf

    def temperatures(self, requests: int, device: torch.device) -> Tensor:
        """[R] float32."""
        if not isinstance(self.temperature, Tensor):  # filled on the device: a copy from the host would wait
            return torch.full((requests,), float(self.temperature), device=device)
        return self.temperature.to(device, torch.float32).expand(requests)


@dataclass(frozen=True)
class Rollout:
    """A chain of drafts for every request, as indices into the logits, and how they were drawn."""

    choices: Tensor
    """[R, N]."""
    candidates: Tensor | None
    """[R, N, K] indices into the logits; None if every draft was chosen."""
    probs: Tensor | None
    """[R, N, K] float32 probability of each candidate; None if every draft was chosen."""
    confidence: Tensor | None
    """[R, N], product of the largest probabilities up to each draft; None if none was asked for."""


@dataclass(frozen=True)
class Tree:
    """A tree of drafts for every request, as indices into the logits, parents first."""

    choices: Tensor
    """[R, N]; N is at most the budget. If improbable drafts are left out on a CPU, N is the largest of `num_drafts`."""
    parents: Tensor
    """[R, N], index of each draft's parent; -1 for a child of the anchor."""
    num_drafts: Tensor
    """[R], how many drafts are valid."""
    log_probs: Tensor | None = None
    """[R, N] float32, natural logarithm of the probability that the draft gives to the text up to each token; None if
    the builder does not know it."""

    @staticmethod
    def empty(requests: int, device: torch.device) -> Tree:
        """Nothing drafted."""
        nothing = torch.zeros(requests, 0, dtype=torch.long, device=device)
        return Tree(nothing, nothing, nothing.sum(1), nothing.float())


# The choice of an implementation.


class HeadOps:
    """Chains and trees of one head by the fastest implementation, which is chosen here, once.

    Args:
        head: None leaves the base logits as they are (DFlash).
        device: of the draft.
        dtype: of the draft.
    """

    def __init__(self, head: HeadWeights | None, device: torch.device, dtype: torch.dtype) -> None:
        self.head, self._dtype = head, dtype
        self._chain: Callable[[HeadInputs, Draw], Rollout] = functools.partial(head_rollout, head)
        self._tree: Callable[..., Tree] = functools.partial(head_tree, head)
        reason = None
        if device.type == "cuda" and head is None:
            self._chain = headless_rollout
        elif device.type == "cuda":
            assert head is not None
            reason = _why_no_kernel(head, device, dtype)
            if reason is None:
                self._chain = functools.partial(_rollout_in_triton, head)
        elif bindings.is_available(device, dtype):
            reason = _why_no_loop(head)
            if reason is None:
                in_c = None if head is None else bindings.Head(head)
                self._chain = functools.partial(_rollout_in_c, in_c)
                self._tree = functools.partial(_tree_in_c, in_c)
        if reason is not None:
            _log_once(reason)

    def chain(self, block: HeadInputs, how: Draw) -> Rollout:
        """`head_rollout`.

        On CUDA it never reads a result back, so that a graph can capture it; N then does not shrink when nobody's
        confidence reaches `min_confidence`.
        """
        return self._chain(block, how) if self._takes(block) else head_rollout(self.head, block, how)

    def tree(self, block: HeadInputs, how: Draw, budget: int, width: int | None) -> Tree:
        """`head_tree` without a depth penalty."""
        grow = self._tree if self._takes(block) else functools.partial(head_tree, self.head)
        return grow(block, how, budget, width)

    def _takes(self, block: HeadInputs) -> bool:
        """Whether a block is of the expected type, and nobody asks for its gradient."""
        given = (block.hidden, block.base_logits)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        return not wanted and all(x.dtype == self._dtype for x in given)


def _why_no_loop(head: HeadWeights | None) -> str | None:
    """What keeps the C loops from drafting with this head; None if nothing does."""
    if head is None:
        return None
    table = head.embed_choice
    if not isinstance(table, EmbeddingTable):
        return "the target's embedding is not a plain table"
    weights = (head.input_gates, head.state_gates, head.to_low_rank, head.correction, table.weight)
    floats = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in weights)
    if not floats or table.dtype != torch.float32:
        return "weights are of several types, or not contiguous"
    ids = table.token_ids
    if ids is not None and (ids.dtype != torch.int64 or ids.device.type != "cpu" or not ids.is_contiguous()):
        return "the draft vocabulary is not a list of int64 on the CPU"
    widths = (head.input_gates.shape[1], head.state_gates.shape[1], len(head.to_low_rank))
    if not all(map(bindings.fits, widths)):
        return f"its widths {widths} are not multiples of {bindings.lanes()}, this processor's vectors"
    return None


def _why_no_kernel(head: HeadWeights, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the Triton kernels from drafting with this head; None if nothing does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    table = head.embed_choice
    if not isinstance(table, EmbeddingTable):
        return "the target's embedding is not a plain table"
    if table.weight.device.type != device.type:
        return "the target's embedding is on another device"
    if not head.to_low_rank.dtype == table.dtype == dtype:
        return "weights and logits are of several types"
    from domino_spec.ops.triton.rollout import suits

    gru, low_rank = head.state_gates.shape[1], len(head.to_low_rank)
    if not suits(gru, low_rank, dtype) or table.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels do not take {dtype} with a state of {gru}"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("the head drafts step by step in PyTorch, which is slower: %s", reason)


# Chains in PyTorch.


def head_rollout(head: HeadWeights | None, block: HeadInputs, how: Draw = Draw()) -> Rollout:
    """Choose or sample N drafts one after another; without a head, from the base logits as they are."""
    requests, num_drafts, _ = block.base_logits.shape
    device = block.base_logits.device
    if head is not None:
        state, of_slots = head.start(block)
    temperatures = how.temperatures(requests, device)[:, None]
    choices = torch.empty(requests, num_drafts, dtype=torch.long, device=device)
    all_ids, all_probs = [], []
    confidence = torch.ones(requests, num_drafts + 1, device=device)
    for i in range(num_drafts):
        logits, ids = best_logits(block.base_logits[:, i], how.candidates)  # [R, K]
        if head is not None and i >= head.pure_draft_prefix_len:
            logits = head.correct(logits, ids, of_slots[:, i], state)
        if how.min_confidence > 0:
            # The largest probability, not the drawn token's: whether a token is proposed must not depend on its value.
            confidence[:, i + 1] = confidence[:, i] * logits.float().softmax(-1).amax(-1)
            if device.type == "cpu" and not (confidence[:, i + 1] >= how.min_confidence).any():
                num_drafts = i
                break
        if how.uniform is None:
            position = logits.argmax(-1)
        else:
            probs = draft_distribution(logits, temperatures)
            position = draw(probs, how.uniform[:, i])
            all_probs.append(probs)
            all_ids.append(torch.arange(logits.shape[-1], device=device).expand_as(probs) if ids is None else ids)
        choice = position if ids is None else ids.gather(1, position[:, None])[:, 0]
        choices[:, i] = choice
        if head is not None and i + 1 < num_drafts:
            state = head.step(head.embed_choice(choice), state)
    return Rollout(
        choices=choices[:, :num_drafts],
        candidates=torch.stack(all_ids, dim=1) if all_ids else None,
        probs=torch.stack(all_probs, dim=1) if all_probs else None,
        confidence=confidence[:, 1 : num_drafts + 1] if how.min_confidence > 0 else None,
    )


def headless_rollout(block: HeadInputs, how: Draw) -> Rollout:
    """`head_rollout` without a head: slots do not wait for each other, so all are decided at once."""
    base = block.base_logits
    requests, drafts, width = base.shape
    logits, ids = best_logits(base, how.candidates)
    if ids is None:
        ids = torch.arange(width, device=base.device).expand(base.shape)
    confidence = logits.float().softmax(-1).amax(-1).cumprod(1) if how.min_confidence > 0 else None
    if how.uniform is None:
        return Rollout(ids.gather(-1, logits.argmax(-1, keepdim=True))[..., 0], None, None, confidence)
    temperatures = how.temperatures(requests, base.device)
    of_rows = temperatures.repeat_interleave(drafts, output_size=requests * drafts)[:, None]
    probs = draft_distribution(logits.flatten(0, 1), of_rows).view(logits.shape)
    return Rollout(ids.gather(-1, draw(probs, how.uniform)[..., None])[..., 0], ids, probs, confidence)


def best_logits(logits: Tensor, candidates: int | None) -> tuple[Tensor, Tensor | None]:
    """The K best of logits [..., V] and their indices; None for the indices if all are candidates."""
    if candidates is None or candidates >= logits.shape[-1]:
        return logits, None
    best = logits.topk(candidates, dim=-1)
    return best.values, best.indices


def draft_distribution(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Logits [R, K] and temperatures [R, 1] to float32 probabilities [R, K], one-hot at temperature 0."""
    logits = logits.float()
    chosen = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    greedy = temperatures == 0
    return torch.where(greedy, chosen, (logits / temperatures.masked_fill(greedy, 1.0)).softmax(-1))


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling: probabilities [..., n] and numbers [...] in [0, 1) to indices [...].

    An entry of probability zero is never drawn.
    """
    cumulative = probs.double().cumsum(-1)
    threshold = uniform * cumulative[..., -1]
    return torch.searchsorted(cumulative, threshold[..., None], right=True)[..., 0].clamp(max=probs.shape[-1] - 1)


# Trees in PyTorch.


def head_tree(
    head: HeadWeights | None,
    block: HeadInputs,
    how: Draw,
    budget: int,
    width: int | None,
    depth_penalty: float = 0.0,
) -> Tree:
    """A tree grown depth by depth: of the prefixes that a beam search sees, the most probable ones.

    One batched step per depth extends the `width` most probable prefixes of the depth before, each with a separate GRU
    state; of all prefixes seen, the `budget` most probable are kept. A prefix is at most as probable as its parent,
    so what is kept is a tree. The cost grows with the depth, not with the budget.

    Args:
        head: None multiplies the slots' own probabilities.
        block: its slots are the depths.
        how: candidates and least confidence; every draft of a tree is chosen.
        budget: N, drafts of a tree at most.
        width: W, prefixes that are extended at each depth. None keeps a share of the budget at every depth instead:
            what is left of it, divided by the depths that are left, rounded up (DARTree's *fixed* tree).
        depth_penalty: taken off a prefix's log probability for each of its tokens when the best of all are chosen
            (DARTree's *pruned* tree has 0.2).

    Raises:
        ValueError: a negative penalty, which could rank a prefix above its parent.
    """
    if depth_penalty < 0:
        raise ValueError(f"depth_penalty must not be negative, got {depth_penalty}")
    requests, depths, vocabulary = block.base_logits.shape
    device = block.base_logits.device
    if head is not None:
        state, of_slots = head.start(block)
        states = state[:, None]  # [R, W, G]
    scores = torch.zeros(requests, 1, device=device)  # log probability of every prefix of the last depth
    first = -1  # index of that depth's first prefix
    all_choices, all_scores, all_parents = [], [], []
    widths = depth_widths(depths, min(how.candidates or math.inf, vocabulary), budget, width)
    for depth, most in enumerate(widths):
        logits, ids = best_logits(block.base_logits[:, depth], how.candidates)  # [R, K]
        logits = logits[:, None].expand(-1, scores.shape[1], -1)  # [R, W, K]
        if head is not None and depth >= head.pure_draft_prefix_len:
            logits = head.correct(logits, ids, of_slots[:, depth, None], states)
        paths = (scores[..., None] + logits.float().log_softmax(-1)).flatten(1)  # [R, W * K]
        scores, index = paths.topk(min(most, paths.shape[1]), dim=1)
        # On a CPU, prefixes that nobody would keep are not extended; on a GPU this would wait for the device.
        if device.type == "cpu" and how.min_confidence > 0:
            worth = int((scores >= how.threshold).any(0).sum())
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
            states = head.step(head.embed_choice(choices), states)
    if not all_choices:
        return Tree.empty(requests, device)
    choices, scores, parents = (torch.cat(part, 1) for part in (all_choices, all_scores, all_parents))
    ranks = torch.cat([part - depth_penalty * depth for depth, part in enumerate(all_scores, start=1)], 1)
    return _best(choices, scores, parents, ranks, budget, how.threshold)


def depth_widths(depths: int, children: float, budget: int, width: int | None) -> list[int]:
    """Prefixes that are kept at each depth, if every prefix has so many children."""
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
    # Stable: if a child is as probable as its parent, the parent, which comes first, stays first.
    ranked = ranks.where(scores >= threshold, -math.inf).sort(dim=1, descending=True, stable=True)
    kept = ranked.indices[:, :budget]
    valid = ranked.values[:, :budget] > -math.inf
    num_drafts = valid.sum(1)
    kept = torch.where(valid, kept, total).sort(dim=1).values  # in order of depth; invalid ones last
    if choices.device.type == "cpu" and threshold > -math.inf:
        kept = kept[:, : int(num_drafts.max())]  # later columns would be rows of the verify pass that no request uses
    places = torch.full((len(choices), total + 1), -1, device=choices.device)
    places.scatter_(1, kept, torch.arange(kept.shape[1], device=choices.device).expand_as(kept))
    inside = kept.clamp(max=total - 1)
    of_kept = parents.gather(1, inside)
    renumbered = torch.where(of_kept < 0, -1, places.gather(1, of_kept.clamp(min=0)))
    return Tree(choices.gather(1, inside), renumbered, num_drafts, scores.gather(1, inside))


# Both in C, chains also in Triton.


def _rollout_in_c(head: bindings.Head | None, block: HeadInputs, how: Draw) -> Rollout:
    """`head_rollout` by the loops of rollout.c: a chain is a tree of width 1."""
    requests, depths, width = block.base_logits.shape
    temperatures = None if how.uniform is None else how.temperatures(requests, block.hidden.device)
    grown = bindings.head_rollout(head, block, [1] * depths, how, temperatures)
    number = grown.choices.shape[1]
    confidence = grown.scores.exp() if how.min_confidence > 0 else None
    if grown.probs is None or number == 0:
        return Rollout(grown.choices, None, None, confidence)
    ids = torch.arange(width).expand(requests, depths, width) if grown.ids is None else grown.ids
    return Rollout(grown.choices, ids[:, :number], grown.probs[:, :number], confidence)


def _tree_in_c(head: bindings.Head | None, block: HeadInputs, how: Draw, budget: int, width: int | None) -> Tree:
    """`head_tree` by the loops of rollout.c."""
    depths, vocabulary = block.base_logits.shape[1:]
    widths = depth_widths(depths, min(how.candidates or math.inf, vocabulary), budget, width)
    grown = bindings.head_rollout(head, block.first(len(widths)), widths, how, None, budget)
    longest = grown.choices.shape[1] if how.min_confidence == 0 else int(grown.num_drafts.max())
    number = min(budget, longest)
    return Tree(grown.choices[:, :number], grown.parents[:, :number], grown.num_drafts, grown.scores[:, :number])


def _rollout_in_triton(head: HeadWeights, block: HeadInputs, how: Draw) -> Rollout:
    from domino_spec.ops.triton.rollout import head_rollout_triton

    return Rollout(*head_rollout_triton(head, block, how))
