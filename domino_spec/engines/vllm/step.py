"""One step of drafting inside vLLM: hidden states and anchors of a batch to drafts, the same for both runners.

Plain functions over tensors that know nothing of vLLM, look at no value of a tensor and so wait for no device: on CUDA
they are captured in the runner's graph. What is drafted is what `drafters.domino` drafts from the same hidden states.

Shapes: R requests, N drafts, H hidden, V vocabulary of the target, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.ops.heads import Draw, HeadInputs, HeadOps


@dataclass(frozen=True)
class DraftParts:
    """What drafting takes of a draft and of its target, whole on every rank."""

    head: HeadOps
    base_logits: Callable[[Tensor], Tensor]
    """Hidden states [rows, H] to base logits [rows, V or draft vocabulary]."""
    embed: Callable[[Tensor], Tensor]
    """Token ids [..] to the target's embeddings [.., H]."""
    token_ids: Tensor | None
    """[draft vocabulary], the token of each index into the logits; None where they are the same."""
    candidates: int | None
    """K, how many of the best base logits the head corrects; None for all."""

    def to_token_ids(self, choices: Tensor) -> Tensor:
        """Indices into the logits to tokens, same shape."""
        return choices if self.token_ids is None else self.token_ids[choices]


@dataclass(frozen=True)
class Drafts:
    """What a step proposes."""

    tokens: Tensor
    """[R, N]."""
    candidate_ids: Tensor | None
    """[R, N, K] tokens that each draft was drawn from; None where every draft was chosen."""
    probs: Tensor | None
    """[R, N, K] float32, their probabilities; None where every draft was chosen."""


def draft_tokens(
    parts: DraftParts,
    hidden: Tensor,
    anchors: Tensor,
    temperatures: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Drafts:
    """Roll the head out over a block.

    Args:
        parts: of the draft.
        hidden: [R, N, H], the slot that predicts each draft.
        anchors: [R], the last committed tokens.
        temperatures: [R], with `uniform`; 0 chooses the most probable token.
        uniform: [R, N] float64 in [0, 1), one for each draft that is sampled; None chooses all of them.
    """
    base_logits = parts.base_logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).to(hidden.dtype)
    rollout = parts.head.chain(
        HeadInputs(hidden.contiguous(), base_logits, parts.embed(anchors).to(hidden.dtype)),
        Draw(parts.candidates, 0.0 if temperatures is None else temperatures, uniform),
    )
    return Drafts(
        parts.to_token_ids(rollout.choices),
        None if rollout.candidates is None else parts.to_token_ids(rollout.candidates),
        rollout.probs,
    )


def over_vocabulary(drafts: Drafts, vocab_size: int) -> Tensor:
    """The probabilities of sampled drafts over the target's vocabulary, [R, N, V]: 0 for all but the candidates."""
    assert drafts.candidate_ids is not None and drafts.probs is not None
    zeros = drafts.probs.new_zeros(*drafts.tokens.shape, vocab_size)
    return zeros.scatter_(-1, drafts.candidate_ids, drafts.probs)


def cache_as_logits(
    cache: Tensor, written: Tensor, rows: Tensor, drafts: Drafts, temperatures: Tensor, num_rows: int
) -> None:
    """Leave the distribution that drafts were drawn from where vLLM's second runner looks for it, in place.

    It divides what it finds by the request's temperature and takes the softmax, so log-probabilities are multiplied by
    the temperature first. Only candidates are written, and those of the step before are taken back.

    Args:
        cache: [rows, N, V] float32, -inf outside the candidates; the last row is for requests that are padding.
        written: [rows, N, K] int64, whose logits are in `cache` now.
        rows: [R], the row of each request; negative for padding.
        drafts: sampled.
        temperatures: [R].
        num_rows: of `cache`.
    """
    assert drafts.candidate_ids is not None and drafts.probs is not None
    rows = torch.where(rows < 0, num_rows - 1, rows)
    num_drafts, vocab_size = cache.shape[1:]
    first = (rows[:, None] * num_drafts + torch.arange(num_drafts, device=rows.device)) * vocab_size  # [R, N]
    flat = cache.view(-1)
    flat.scatter_(0, (first[..., None] + written[rows]).flatten(), float("-inf"))
    scale = torch.where(temperatures > 0, temperatures, 1.0)[:, None, None]
    values = drafts.probs.log() * scale
    flat.scatter_(0, (first[..., None] + drafts.candidate_ids).flatten(), values.flatten())
    written.index_copy_(0, rows, drafts.candidate_ids)
