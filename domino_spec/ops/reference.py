"""The head rollout in plain PyTorch: from hidden states and base logits of a block to drafted tokens.

The truth that faster twins are tested against. Per drafted token: candidates from the base logits, the low-rank
correction evaluated on those rows of W2 only, a choice, and one GRU step (paper 4.1.2, 4.3; DESIGN section 7).
Here are chains; `kernels.trees` grows trees in the same way.

Shapes: R requests, N drafted tokens, H hidden, V logits width, K candidates, G GRU width, L low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # kernels stand below every model; the head's type is named, never imported
    from domino_spec.draft.domino import DominoHead


@dataclass(frozen=True)
class Rollout:
    """Drafted tokens as indices into the logits, and how they were drawn."""

    choices: Tensor
    """[R, N]."""
    candidates: Tensor | None
    """[R, N, K] indices into the logits; None where every draft was chosen."""
    probs: Tensor | None
    """[R, N, K] float32 probability of each candidate; None where every draft was chosen."""
    confidence: Tensor | None
    """[R, N], product of the largest probabilities up to each draft; None where none was asked for."""


def head_rollout(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None = None,
    temperature: float | Tensor = 0.0,
    uniform: Tensor | None = None,
    min_confidence: float = 0.0,
) -> Rollout:
    """Choose or sample N drafts one after another.

    Args:
        head: the Domino head; None leaves the base logits as they are (DFlash).
        hidden: [R, N, H], the slot that predicts each draft.
        base_logits: [R, N, V].
        anchor_embedding: [R, H], embedding of the anchor, which the causal encoder consumes first.
        embed_choice: indices into the logits [R] to target embeddings [R, H].
        candidates: K, correct only the K best base logits of each slot; None corrects all of them. A greedy draft is
            that of the full vocabulary whenever the corrected argmax is among them.
        temperature: of the draft, for all requests or [R] for each; 0 chooses the argmax. Where one request samples,
            those that choose report one-hot probabilities.
        uniform: for sampled drafts, [R, N] float64 numbers in [0, 1), one for each.
        min_confidence: on CPU the rollout ends early once no request's confidence reaches this; N is then smaller.
    """
    num_drafts = hidden.shape[1]
    if head is not None:
        hidden_width = hidden.shape[-1]
        w1_hidden, w1_state = head.input_weight.split([hidden_width, head.config.gru_hidden_dim], dim=1)
        from_hidden = F.linear(hidden, w1_hidden)  # [R, N, L]: the slots' share of W1 in one product
        state = head.step(anchor_embedding, head.initial_state(len(hidden), like=hidden))
    if not isinstance(temperature, Tensor):
        temperature = torch.full((len(hidden),), float(temperature), device=hidden.device)  # no copy from the host
    temperatures = temperature.to(hidden.device, torch.float32).expand(len(hidden))[:, None]
    choices = torch.empty(len(hidden), num_drafts, dtype=torch.long, device=hidden.device)
    all_ids, all_probs = [], []
    confidence = hidden.new_ones(len(hidden), num_drafts + 1, dtype=torch.float32)
    for i in range(num_drafts):
        logits, ids = base_logits[:, i], None
        if candidates is not None and candidates < base_logits.shape[-1]:
            logits, ids = logits.topk(candidates, dim=-1)  # [R, K]
        if head is not None and i >= head.config.pure_draft_prefix_len:
            low_rank = F.silu(from_hidden[:, i] + F.linear(state, w1_state))  # [R, L]
            if ids is None:
                logits = logits + F.linear(low_rank, head.correction_weight)
            else:
                rows = head.correction_weight[ids]  # [R, K, L]
                logits = logits + torch.einsum("rkl,rl->rk", rows, low_rank)
        if min_confidence > 0:
            # The largest probability, not the drawn token's: whether a token is proposed must not depend on its value.
            confidence[:, i + 1] = confidence[:, i] * logits.float().softmax(-1).amax(-1)
            if hidden.device.type == "cpu" and not (confidence[:, i + 1] >= min_confidence).any():
                num_drafts = i
                break
        if uniform is None:
            position = logits.argmax(-1)
        else:
            probs = draft_distribution(logits, temperatures)
            position = draw(probs, uniform[:, i])
            all_probs.append(probs)
            all_ids.append(
                torch.arange(logits.shape[-1], device=logits.device).expand_as(probs) if ids is None else ids
            )
        choice = position if ids is None else ids.gather(1, position[:, None])[:, 0]
        choices[:, i] = choice
        if head is not None and i + 1 < num_drafts:
            state = head.step(embed_choice(choice), state)
    return Rollout(
        choices=choices[:, :num_drafts],
        candidates=torch.stack(all_ids, dim=1) if all_ids else None,
        probs=torch.stack(all_probs, dim=1) if all_probs else None,
        confidence=confidence[:, 1 : num_drafts + 1] if min_confidence > 0 else None,
    )


def draft_distribution(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Logits [R, K] and temperatures [R, 1] to float32 probabilities [R, K], one-hot where the temperature is 0."""
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
