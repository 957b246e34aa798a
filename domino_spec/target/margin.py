"""How close the target's two best tokens are after a text: the evidence for calling a difference a near tie.

A verify pass over several tokens and a pass over one round differently (DESIGN section 5), so greedy texts may part
where the two best logits are closer than that rounding, which is measured here on the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domino_spec.target.model import Target


@dataclass(frozen=True)
class TopTwo:
    """The two best next tokens after a text, as plain decoding sees them."""

    tokens: tuple[int, int]
    """Best and second best."""
    margin: float
    """Difference of their logits."""
    rounding: float
    """Largest change of any logit when the text is read in one pass instead of token by token."""

    @property
    def near_tie(self) -> bool:
        """True where rounding can turn the order: each of the two logits may move by `rounding`."""
        return self.margin <= 2 * self.rounding


@torch.inference_mode()
def top_two(target: Target, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> TopTwo:
    """The two best next tokens after a prompt and the text so far.

    Costs as much as decoding `token_ids` plainly, since that is what it repeats.

    Args:
        target: the model.
        prompt_ids: at least one token.
        token_ids: what was generated after it, possibly nothing.
    """
    one_by_one = _next_logits(target, prompt_ids, token_ids, width=1)
    at_once = _next_logits(target, prompt_ids, token_ids, width=len(token_ids) + 1)
    best = one_by_one.topk(2)
    first, second = best.indices.tolist()
    margin = (best.values[0] - best.values[1]).item()
    return TopTwo((first, second), margin, (one_by_one - at_once).abs().max().item())


def _next_logits(target: Target, prompt_ids: Sequence[int], token_ids: Sequence[int], width: int) -> Tensor:
    """Logits [V] after prompt and text, the text read in passes of `width` tokens (the prompt's last one included)."""
    tokens = torch.tensor([[*prompt_ids, *token_ids]], device=target.device)
    cached = len(prompt_ids) - 1
    cache = target.new_cache(1, tokens.shape[1])
    target.prefill(tokens[:, :cached], torch.full((1,), cached, device=target.device), cache)
    hidden = None
    for start in range(cached, tokens.shape[1], width):
        part = tokens[:, start : start + width]
        hidden = target.forward(part, cache).hidden
        cache.lengths += part.shape[1]
    assert hidden is not None
    return target.lm_head(hidden)[0, -1].float()
