"""The data that flows through the decoding loop: what is committed, what is proposed, what was decided.

`State` belongs to the loop, `Proposal` comes from a drafter, `Verdict` from verification; each is made once per cycle
and handed on. A drafter keeps its own caches in a value of its own (see `drafters`).

Shapes: R requests, N drafted tokens, K candidates, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.decoding.sampling import Sampling
from domino_spec.target.cache import TargetCache


@dataclass
class State:
    """Committed text of R requests, in tensors allocated once.

    Invariant between cycles: `cache.lengths == lengths - 1`, because the last committed token is verified next time.
    """

    tokens: Tensor
    """[R, capacity] int64, prompt and committed tokens."""
    lengths: Tensor
    """[R], committed tokens, prompt included."""
    prompt_lengths: Tensor
    """[R]."""
    active: Tensor
    """[R] bool, False once a request has ended."""
    cache: TargetCache
    sampling: Sampling
    """How their tokens are drawn."""
    features: Tensor | None = None
    """[R, T, F] features of freshly read prompts without their last token; None where the drafter taps nothing."""

    @property
    def anchors(self) -> Tensor:
        """[R], the last committed token of every request: clean token in slot 0 of the next block."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]

    def view(self, start: int, stop: int, sampling: Sampling, extent: int | None = None) -> State:
        """The requests `start .. stop - 1` as a state of their own, in the same memory; for `extent` see the cache."""
        tokens, lengths, prompt_lengths, active = (
            t[start:stop] for t in (self.tokens, self.lengths, self.prompt_lengths, self.active)
        )
        return State(tokens, lengths, prompt_lengths, active, self.cache.view(start, stop, extent), sampling)

    def move(self, source: int, destination: int) -> None:
        """Put request `source` in the place of `destination`, which is lost."""
        for tensor in (self.tokens, self.lengths, self.prompt_lengths, self.active):
            tensor[destination] = tensor[source]
        self.cache.move(source, destination)


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens of one cycle."""

    tokens: Tensor
    """[R, N]; entries past a request's own `num_drafts` are ignored."""
    num_drafts: Tensor
    """[R], how many of them are proposed, 0 .. N."""
    parents: Tensor | None = None
    """[R, N], index of each token's parent, -1 for a child of the anchor, parents first; None for a chain. The tokens
    of a tree are chosen, and siblings differ."""
    candidate_ids: Tensor | None = None
    """[R, N, K] absolute ids that a *sampled* token could have been; None for chosen tokens (argmax, look-up)."""
    draft_probs: Tensor | None = None
    """[R, N, K] probability with which each candidate would have been drawn; None for chosen tokens."""
    confidence: Tensor | None = None
    """[R, N] float32, probability that the draft gives to the text up to each token; it only falls along a path."""

    @staticmethod
    def empty(requests: int, device: torch.device) -> Proposal:
        """Nothing drafted: the pass then is one step of plain decoding."""
        return Proposal(
            torch.zeros(requests, 0, dtype=torch.long, device=device),
            torch.zeros(requests, dtype=torch.long, device=device),
        )


@dataclass(frozen=True)
class Verdict:
    """What verification decided for one cycle."""

    tokens: Tensor
    """[R, N + 1], the accepted drafts followed by the bonus token; later entries are meaningless."""
    num_accepted: Tensor
    """[R], accepted drafts, without the bonus."""
    features: Tensor | None
    """[R, N + 1, F], features of the anchor and the accepted drafts in their first `num_accepted + 1` rows."""
    anchor_positions: Tensor
    """[R], position of the first feature row (the anchor's)."""
    sound: Tensor
    """[R] bool, False where the target's hidden states or logits are not finite: what was decided means nothing."""
    path: Tensor | None = None
    """[R, N + 1], rows of the pass that form the accepted path of a tree, the anchor's first; None for a chain, whose
    path is the first rows."""
    logits: Tensor | None = None
    """[R, N + 1, V], the target's own, at every row of the pass."""
