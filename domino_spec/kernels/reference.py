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
    from domino_spec.draft.head import DominoHead


@dataclass(frozen=True)
class Rollout:
    """Drafted tokens as indices into the logits, and how they were drawn."""

    choices: Tensor
    """[R, N]."""
    candidates: Tensor | None
    """[R, N, K] indices into the logits; None for greedy drafts."""
    probs: Tensor | None
    """[R, N, K] probability of each candidate; None for greedy drafts."""
    confidence: Tensor | None
    """[R, N], product of the largest probabilities up to each draft; None where none was asked for."""


def head_rollout(
    head: DominoHead | None,
    hidden: Tensor,
    base_logits: Tensor,
    anchor_embedding: Tensor,
    embed_choice: Callable[[Tensor], Tensor],
    candidates: int | None = None,
    temperature: float = 0.0,
    draw: Callable[[Tensor, int], Tensor] | None = None,
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
        temperature: of the draft; 0 chooses the argmax.
        draw: for temperature > 0: probabilities [R, K] and draft index to drawn positions [R].
        min_confidence: on CPU the rollout ends early once no request's confidence reaches this; N is then smaller.
    """
    num_drafts = hidden.shape[1]
    if head is not None:
        hidden_width = hidden.shape[-1]
        w1_hidden, w1_state = head.input_weight.split([hidden_width, head.config.gru_hidden_dim], dim=1)
        from_hidden = F.linear(hidden, w1_hidden)  # [R, N, L]: the slots' share of W1 in one product
        state = head.step(anchor_embedding, head.initial_state(len(hidden), like=hidden))
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
        if temperature == 0:
            position = logits.argmax(-1)
        else:
            assert draw is not None
            probs = (logits.float() / temperature).softmax(-1)
            position = draw(probs, i)
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
