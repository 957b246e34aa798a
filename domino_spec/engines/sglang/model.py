"""The draft inside SGLang: its DFlash backbone with our head beside it, and the rollout of that head.

The head is rolled out as in the local engine (`drafting`), so the drafts are the same; only the target's embedding and
LM head are reached through SGLang's modules, which tensor parallelism may have sharded over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.models.dflash import DFlashDraftModel
from torch import Tensor, nn

from domino_spec.draft.checkpoint import check_vocabulary, parse_config
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import DominoHead
from domino_spec.engines.drafting import DraftParts, Drafts, draft_tokens, expected_shapes
from domino_spec.ops.heads import EmbeddingTable, HeadOps
from domino_spec.settings import UserError

SAMPLED_CANDIDATES = 2048
"""Best base logits of a slot that a sampled draft is drawn among: its distribution is kept for the verify pass, [R, N,
K], and over the whole vocabulary it would take gigabytes. Lossless for any number; greedy drafts are not bounded."""


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
        self._parts: list[DraftParts] = []  # a list, so that the target's modules are not registered as ours

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
        scale = float(torch.tensor(embedding_scale, dtype=weight.dtype))
        vocabulary, ranks = self.draft_vocab_ids, tp_group.world_size
        head = self.head.weights(_embedding(embedding, vocabulary, self.dtype, scale, ranks))
        self._parts = [
            DraftParts(
                head=HeadOps(head, self.head.input_weight.device, self.dtype),
                base_logits=_base_logits(weight, self.settings.vocab_size, vocabulary, tp_group),
                embed=_embedding(embedding, None, self.dtype, scale, ranks),
                token_ids=vocabulary,
                candidates=candidates if 0 < candidates < self.settings.logits_size else None,
            )
        ]

    @property
    def candidates(self) -> int | None:
        """K, how many of the best base logits are corrected; None for all of them."""
        return self._parts[0].candidates

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] to the target's embeddings [..., H], in the draft's type."""
        return self._parts[0].embed(token_ids)

    @torch.no_grad()
    def forward(self, hidden: Tensor, anchors: Tensor, temperatures: Tensor | None = None) -> Drafts:
        """A chain for every request.

        Args:
            hidden: [R, B, H], the backbone's last hidden states.
            anchors: [R], the last committed tokens.
            temperatures: [R], above 0 for requests whose drafts are sampled; None chooses all.
        """
        parts, first, uniform = self._parts[0], self.settings.first_draft_slot, None
        slots = hidden[:, first : first + self.num_drafts].to(self.dtype)  # [R, N, H]
        if temperatures is not None:
            uniform = torch.rand(slots.shape[:2], dtype=torch.float64, device=slots.device)
            parts = replace(parts, candidates=min(parts.candidates or SAMPLED_CANDIDATES, self.settings.logits_size))
        return draft_tokens(parts, slots, anchors, temperatures, uniform)


def _embedding(
    module: Any, token_ids: Tensor | None, dtype: torch.dtype, scale: float, ranks: int
) -> Callable[[Tensor], Tensor]:
    """Indices into the logits to embeddings, as a table if the module is one and is not sharded."""
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
    """Hidden states to base logits; `weight` holds this rank's rows of the LM head, padding after the vocabulary."""
    if tp_group.world_size == 1:
        rows = weight.detach()[:vocab_size] if draft_vocab_ids is None else weight.detach()[draft_vocab_ids]
        return lambda hidden: F.linear(hidden.to(rows.dtype), rows)

    def gathered(hidden: Tensor) -> Tensor:
        logits = tp_group.all_gather(F.linear(hidden.to(weight.dtype), weight), dim=-1)[..., :vocab_size]
        return logits.contiguous() if draft_vocab_ids is None else logits[..., draft_vocab_ids]

    return gathered


class DominoDraftModel(DFlashDraftModel):
    """A Domino draft in the released layout or in ours; its name is the architecture's in `config.json`."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        self.settings = parse_config(config.to_dict(), "draft")
        self.candidate_selector = Proposer(self.settings)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The backbone over blocks of token ids [R * B], which are embedded here unless the draft is in bfloat16.

        SGLang rounds the embeddings that it hands over to bfloat16.
        """
        if self.candidate_selector.dtype != torch.bfloat16:
            input_embeds = self.candidate_selector.embed(input_ids)
        return super().forward(input_ids, positions, forward_batch, input_embeds, **options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load every tensor of the checkpoint.

        Raises:
            UserError: one is missing, unexpected, or one of the head's has another shape; SGLang itself would go on.
        """
        found: set[str] = set()
        super().load_weights(self._without_head(weights, found))
        check_names(found, self.settings)

    def _without_head(self, weights: Iterable[tuple[str, Tensor]], found: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Pass on what belongs to the backbone, load the head's tensors, and note all published names."""
        head = {name.removeprefix("head."): t for name, t in self.candidate_selector.state_dict(keep_vars=True).items()}
        for name, tensor in weights:
            published = name.removeprefix("model.").removeprefix("logit_head.")
            found.add(published)
            if published not in head:
                yield name, tensor
            elif head[published].shape != tensor.shape:
                raise UserError(
                    f"the draft's weights: tensor {published} has shape {tuple(tensor.shape)}, but config.json means "
                    f"{tuple(head[published].shape)}"
                )
            else:
                if published == "draft_vocab_ids":
                    check_vocabulary(tensor, self.settings, Path("the draft's weights"))
                head[published].data.copy_(tensor)


def check_names(found: Set[str], settings: DraftConfig) -> None:
    """Compare the tensors of a checkpoint, by their published names, with those that its configuration means.

    Raises:
        UserError: one is missing or unexpected.
    """
    expected = set(expected_shapes(settings))
    if missing := sorted(expected - found):
        raise UserError(f"the draft's weights: tensor {missing[0]} is missing")
    if unknown := sorted(found - expected):
        raise UserError(f"the draft's weights: unexpected tensor {unknown[0]}")
