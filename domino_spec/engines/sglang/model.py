"""The draft's weights inside SGLang: its DFlash backbone, and our head beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from sglang.srt.models.dflash import DFlashDraftModel
from torch import Tensor

from domino_spec.draft.checkpoint import check_vocabulary, draft_tensors, parse_config
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import Draft
from domino_spec.engines.sglang.proposer import Proposer
from domino_spec.settings import UserError


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
        """Hand on what belongs to the backbone, load the rest, and note all published names."""
        own = {name.removeprefix("head."): t for name, t in self.candidate_selector.state_dict(keep_vars=True).items()}
        for name, tensor in weights:
            published = name.removeprefix("model.").removeprefix("logit_head.")
            found.add(published)
            if published not in own:
                yield name, tensor
            elif own[published].shape != tensor.shape:
                raise UserError(
                    f"the draft's weights: tensor {published} has shape {tuple(tensor.shape)}, but config.json means "
                    f"{tuple(own[published].shape)}"
                )
            else:
                if published == "draft_vocab_ids":
                    check_vocabulary(tensor, self.settings, Path("the draft's weights"))
                own[published].data.copy_(tensor)


def check_names(found: Set[str], settings: DraftConfig) -> None:
    """Compare the tensors of a checkpoint, by their published names, with those that its configuration means.

    Raises:
        UserError: one is missing or unexpected.
    """
    with torch.device("meta"):
        vocabulary = torch.empty(settings.draft_vocab_size) if settings.draft_vocab_size else None
        expected = set(draft_tensors(Draft(settings, vocabulary)))
    if missing := sorted(expected - found):
        raise UserError(f"the draft's weights: tensor {missing[0]} is missing")
    if unknown := sorted(found - expected):
        raise UserError(f"the draft's weights: unexpected tensor {unknown[0]}")
