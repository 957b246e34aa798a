"""One step of drafting inside another engine: hidden states and anchors of a batch to drafts.

Both plug-ins call this. The functions know nothing of an engine, read no value of a tensor on the host, and so never
wait for the device: on CUDA they are captured in the engine's graph. From the same hidden states they draft what
`drafters.block` drafts.

Shapes: R requests, N drafts, H hidden, V vocabulary of the target, K candidates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.draft.checkpoint import draft_tensors
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import check_pairing
from domino_spec.ops.heads import Draw, HeadInputs, HeadOps
from domino_spec.settings import UserError
from domino_spec.target.outline import outline_target

ALLOW_OTHER_TARGET = "DOMINO_SPEC_ALLOW_OTHER_TARGET"
"""Environment variable; 1 serves a fine-tuned target of the same shape."""


@dataclass(frozen=True)
class DraftParts:
    """What drafting needs of a draft and of its target, whole on every rank."""

    head: HeadOps
    base_logits: Callable[[Tensor], Tensor]
    """Hidden states [rows, H] to base logits [rows, V or draft vocabulary]."""
    embed: Callable[[Tensor], Tensor]
    """Token ids [..] to the target's embeddings [.., H]."""
    token_ids: Tensor | None
    """[draft vocabulary], the token of each index into the logits; None if they are the same."""
    candidates: int | None
    """K, how many of the best base logits the head corrects; None for all."""

    def to_token_ids(self, choices: Tensor) -> Tensor:
        """Indices into the logits to tokens, same shape."""
        return choices if self.token_ids is None else self.token_ids[choices]


@dataclass(frozen=True)
class Drafts:
    """What a step proposes."""

    tokens: Tensor
    """[R, N] int64."""
    candidate_ids: Tensor | None = None
    """[R, N, K] int64, tokens that each draft was drawn from; None if every draft was chosen."""
    probs: Tensor | None = None
    """[R, N, K] float32, their probabilities; one-hot for requests that choose; None if every draft was chosen."""


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


def cache_as_logits(cache: Tensor, written: Tensor, rows: Tensor, drafts: Drafts, temperatures: Tensor) -> None:
    """Write the distribution that drafts were drawn from where vLLM's second runner reads it, in place.

    The runner divides what it reads by the request's temperature and takes the softmax, so log-probabilities are
    multiplied by the temperature first. Only candidates are written, and those of the step before are reset.

    Args:
        cache: [rows, N, V] float32, -inf outside the candidates; the last row is for requests that are padding.
        written: [rows, N, K] int64, the candidates whose logits are in `cache` now.
        rows: [R], the row of each request; negative for padding.
        drafts: sampled.
        temperatures: [R].
    """
    assert drafts.candidate_ids is not None and drafts.probs is not None
    num_rows, num_drafts, vocab_size = cache.shape
    rows = torch.where(rows < 0, num_rows - 1, rows)
    first = (rows[:, None] * num_drafts + torch.arange(num_drafts, device=rows.device)) * vocab_size  # [R, N]
    flat = cache.view(-1)
    flat.scatter_(0, (first[..., None] + written[rows]).flatten(), float("-inf"))
    scale = torch.where(temperatures > 0, temperatures, 1.0)[:, None, None]
    values = drafts.probs.log() * scale
    flat.scatter_(0, (first[..., None] + drafts.candidate_ids).flatten(), values.flatten())
    written.index_copy_(0, rows, drafts.candidate_ids)


# Checks before anything is loaded


def expected_shapes(config: DraftConfig) -> dict[str, torch.Size]:
    """Published names and shapes of a checkpoint's tensors, the head's without an older prefix."""
    with torch.device("meta"):
        size = config.draft_vocab_size
        draft = Draft(config, None if size is None else torch.zeros(size, dtype=torch.long))
    return {name: tensor.shape for name, tensor in draft_tensors(draft).items()}


def check_weights(config: DraftConfig, draft: str, target: str, log: logging.Logger) -> None:
    """Refuse a target whose weights are others than those that the draft says it was trained for.

    Args:
        config: of the draft.
        draft: its name.
        target: a directory or a hub id.
        log: of the engine; says when the weights cannot be compared.

    Raises:
        UserError: the fingerprints differ, and `DOMINO_SPEC_ALLOW_OTHER_TARGET` does not allow that.
    """
    if config.target_fingerprint is None:
        log.warning("draft %s does not say which weights it was trained for; only shapes were checked", draft)
        return
    try:
        outline = outline_target(target).target
    except UserError as error:
        log.warning("the weights of target %s were not compared with those of draft %s: %s", target, draft, error)
        return
    if not outline.fingerprint:
        log.warning("the weights of target %s could not be compared with those of draft %s", target, draft)
        return
    allowed = os.environ.get(ALLOW_OTHER_TARGET, "0") not in ("", "0")
    check_pairing(config, draft, outline, allowed, f"{ALLOW_OTHER_TARGET}=1 in the environment")
