"""The rollout of the head inside SGLang's decoding loop: hidden states of a block's slots to drafts.

The same rollout as the local engine's (`drafters.domino`), so the same drafts; only the target's two ends are reached
through SGLang's modules, which tensor parallelism may have cut along the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import DominoHead
from domino_spec.ops.heads import Draw, EmbeddingTable, HeadInputs, HeadOps
from domino_spec.settings import UserError

SAMPLED_CANDIDATES = 2048
"""Best base logits of a slot that a sampled draft is drawn among: its distribution is kept for the verify pass, [R, N,
K], and over the whole vocabulary it would take gigabytes. Lossless for any number; greedy drafts are not bounded."""


@dataclass(frozen=True)
class Drafts:
    """What was proposed."""

    tokens: Tensor
    """[R, N] int64, token ids."""
    candidate_ids: Tensor | None = None
    """[R, N, K] int64, what each sampled draft could have been; None where all were chosen."""
    draft_probs: Tensor | None = None
    """[R, N, K] float32, how probable that was; one-hot for requests that choose."""


@dataclass(frozen=True)
class Ends:
    """What the draft borrows from its target."""

    embed: Callable[[Tensor], Tensor]
    """Token ids [...] to embeddings [..., H], in the draft's type."""
    head: HeadOps
    """The head's drafting."""
    base_logits: Callable[[Tensor], Tensor]
    """Hidden states [..., H] to base logits [..., V or draft vocabulary]."""


class Proposer(nn.Module):
    """The head of a Domino draft, its draft vocabulary, and the target's ends.

    Args:
        settings: of the draft.

    Raises:
        UserError: the draft has no head.
    """

    draft_vocab_ids: Tensor | None

    def __init__(self, settings: DraftConfig) -> None:
        super().__init__()
        if settings.head is None:
            raise UserError("the draft has no Domino head")
        self.settings = settings
        self.head = DominoHead(settings.head, settings.hidden_size, settings.logits_size)
        vocabulary = settings.draft_vocab_size
        self.register_buffer("draft_vocab_ids", None if vocabulary is None else torch.zeros(vocabulary).long())
        self.candidates: int | None = None
        """K, how many of the best base logits are corrected; None for all of them."""
        self._ends: list[Ends] = []  # a list, so that the target's modules are not registered as ours

    @property
    def num_drafts(self) -> int:
        """Drafts per cycle: SGLang verifies as many rows as the block has slots, and the first is the anchor."""
        return self.settings.block_size - 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of the head's weights."""
        return self.head.input_weight.dtype

    def bind(self, embedding: Any, lm_head: Any, tp_group: Any, embedding_scale: float, candidates: int) -> None:
        """Borrow embedding and LM head from SGLang's target model.

        Args:
            embedding: of the target, without what LoRA adds.
            lm_head: its output projection, likewise.
            tp_group: ranks that share the vocabulary.
            embedding_scale: what embeddings are multiplied by (Gemma).
            candidates: K, or 0 for the whole vocabulary.

        Raises:
            UserError: the LM head is quantised, or has rows for added tokens.
        """
        from sglang.srt.speculative.dflash_utils import is_dense_head_weight

        weight: Any = getattr(lm_head, "weight", None)
        if not is_dense_head_weight(weight):
            raise UserError("the target's LM head is quantised, which is not supported with a Domino draft")
        if getattr(lm_head, "num_added_embeddings", 0):
            raise UserError("the target's LM head has rows for added tokens, which a Domino draft was not trained with")
        self.candidates = candidates if 0 < candidates < self.settings.logits_size else None
        scale = float(torch.tensor(embedding_scale, dtype=weight.dtype))
        embed = _embedding(embedding, None, self.dtype, scale, tp_group.world_size)
        embed_choice = _embedding(embedding, self.draft_vocab_ids, self.dtype, scale, tp_group.world_size)
        self._ends = [
            Ends(
                embed,
                HeadOps(self.head.weights(embed_choice), self.head.input_weight.device, self.dtype),
                _base_logits(weight, self.settings.vocab_size, self.draft_vocab_ids, tp_group),
            )
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] to the target's embeddings [..., H], in the draft's type."""
        return self._ends[0].embed(token_ids)

    @torch.no_grad()
    def forward(self, hidden: Tensor, anchors: Tensor, temperatures: Tensor | None = None) -> Drafts:
        """A chain for every request.

        Args:
            hidden: [R, B, H], the backbone's last hidden states.
            anchors: [R], the last committed tokens.
            temperatures: [R], above 0 for requests whose drafts are sampled; None chooses all.
        """
        ends, first = self._ends[0], self.settings.first_draft_slot
        slots = hidden[:, first : first + self.num_drafts].to(self.dtype)  # [R, N, H]
        uniform, candidates = None, self.candidates
        if temperatures is not None:
            uniform = torch.rand(slots.shape[:2], dtype=torch.float64, device=slots.device)
            candidates = min(candidates or SAMPLED_CANDIDATES, self.settings.logits_size)
        rollout = ends.head.chain(
            HeadInputs(slots, ends.base_logits(slots), self.embed(anchors)),
            Draw(candidates, 0.0 if temperatures is None else temperatures, uniform),
        )
        listed = rollout.candidates
        return Drafts(self._tokens(rollout.choices), None if listed is None else self._tokens(listed), rollout.probs)

    def _tokens(self, choices: Tensor) -> Tensor:
        return choices if self.draft_vocab_ids is None else self.draft_vocab_ids[choices]


def _embedding(
    module: Any, token_ids: Tensor | None, dtype: torch.dtype, scale: float, ranks: int
) -> Callable[[Tensor], Tensor]:
    """Indices into the logits to embeddings, as a table where the module is one and lies here as a whole."""
    whole = ranks == 1 and type(module).__name__ in ("VocabParallelEmbedding", "Embedding")
    if whole and module.weight.is_contiguous() and module.weight.is_floating_point():
        return EmbeddingTable(module.weight.detach(), token_ids, dtype, scale)

    def embed(choices: Tensor) -> Tensor:
        rows = module(choices if token_ids is None else token_ids[choices])
        return (rows if scale == 1 else rows * scale).to(dtype)

    return embed


def _base_logits(
    weight: Tensor, vocab_size: int, draft_vocab_ids: Tensor | None, tp_group: Any
) -> Callable[[Tensor], Tensor]:
    """Hidden states to base logits; `weight` holds this rank's rows of the LM head, padding behind the vocabulary."""
    if tp_group.world_size == 1:
        rows = weight.detach()[:vocab_size] if draft_vocab_ids is None else weight.detach()[draft_vocab_ids]
        return lambda hidden: F.linear(hidden.to(rows.dtype), rows)

    def gathered(hidden: Tensor) -> Tensor:
        logits = tp_group.all_gather(F.linear(hidden.to(weight.dtype), weight), dim=-1)[..., :vocab_size]
        return logits.contiguous() if draft_vocab_ids is None else logits[..., draft_vocab_ids]

    return gathered
