"""vLLM's DFlash model with a Domino head beside it.

Backbone, attention and cache are vLLM's own. The head is `draft.domino.DominoHead`, whole on every rank: its parameters
are small, and a sharded one would have ranks wait for each other at every drafted token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM
from vllm.platforms import current_platform

from domino_spec.draft.checkpoint import check_tensors, check_vocabulary
from domino_spec.draft.domino import DominoHead
from domino_spec.engines.drafting import DraftParts, Drafts, draft_tokens, expected_shapes
from domino_spec.engines.vllm.served import is_domino, read_settings
from domino_spec.ops.heads import EmbeddingTable, HeadOps
from domino_spec.settings import UserError

_HEAD = ("prefix_gru.", "embed_proj.")
_OLD_HEAD_PREFIX = "logit_head."
_VOCABULARY = "draft_vocab_ids"


class DominoForCausalLM(DFlashQwen3ForCausalLM):
    """A Domino draft as vLLM loads it; `bind` joins it to its target, `draft` rolls the head out.

    Nothing may sample from its base logits: `compute_logits`, which vLLM's drafters would call to run it as a plain
    DFlash draft, refuses.
    """

    head_token_ids: Tensor | None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if not is_domino(vllm_config.speculative_config):
            raise UserError('a Domino draft is served by the speculative method "dflash" only')
        served = read_settings(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = served.config
        assert config.head is not None
        self.settings = served
        self.head = DominoHead(config.head, config.hidden_size, config.logits_size).requires_grad_(False)
        ids = None if config.draft_vocab_size is None else torch.zeros(config.draft_vocab_size, dtype=torch.long)
        self.register_buffer("head_token_ids", ids, persistent=False)
        self._parts: DraftParts | None = None
        if current_platform.is_cpu():
            # vLLM's kernel norms the context keys of all layers at once, each with its layer's weights; on CPU (0.32)
            # it takes the first layer's for all, and acceptance falls.
            self.model._normalize_context_k = functools.partial(norm_by_layer, self.model)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill backbone and head from a checkpoint in a published layout or ours.

        Raises:
            UserError: a tensor is missing, has another shape, or is not expected. vLLM leaves what is missing as it is
                in memory.
        """
        tensors = {name.removeprefix(_OLD_HEAD_PREFIX): tensor for name, tensor in weights}
        check_tensors(tensors, expected_shapes(self.settings.config), Path(self.settings.name))
        head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_HEAD)}
        self.head.load_state_dict(head)
        if self.head_token_ids is not None:
            token_ids = tensors.pop(_VOCABULARY)
            check_vocabulary(token_ids, self.settings.config, Path(self.settings.name))
            self.head_token_ids.copy_(token_ids)
        super().load_weights(tensors.items())

    def bind(self, target_model: nn.Module) -> None:
        """Borrow embedding and LM head of the target that vLLM has loaded and shared with this model.

        Raises:
            UserError: vLLM did not share them, or they are such that the draft would see other embeddings or logits
                than it was trained with.
        """
        modules = set(target_model.modules())
        embedding, lm_head = self.model.embed_tokens, self.lm_head
        if embedding not in modules or lm_head not in modules:
            raise UserError("vLLM did not share the target's embedding and LM head with the Domino draft")
        target: Any = target_model
        language_model = target.get_language_model() if hasattr(target, "get_language_model") else target
        _refuse_changed_embeddings(language_model, embedding)
        token_ids = self.head_token_ids
        base_logits: Callable[[Tensor], Tensor]
        if token_ids is None:
            base_logits = self._gathered_logits
        else:
            if getattr(lm_head, "bias", None) is not None:
                raise UserError("a draft vocabulary is not supported with an LM head that has a bias")
            rows = whole_rows(lm_head, token_ids, "LM head")

            def base_logits(hidden: Tensor) -> Tensor:
                return F.linear(hidden, rows)

        weight = self.head.input_weight
        head = self.head.weights(_choice_embedding(embedding, token_ids, weight.dtype))
        self._parts = DraftParts(
            head=HeadOps(head, weight.device, weight.dtype),
            base_logits=base_logits,
            embed=embedding,
            token_ids=token_ids,
            candidates=self.settings.candidates,
        )

    def draft(
        self, hidden: Tensor, anchors: Tensor, temperatures: Tensor | None = None, uniform: Tensor | None = None
    ) -> Drafts:
        """`drafting.draft_tokens` with this draft, which is bound."""
        assert self._parts is not None, "the draft is not bound to a target"
        return draft_tokens(self._parts, hidden, anchors, temperatures, uniform)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Refuses: what is drafted from base logits alone is not this draft's."""
        raise UserError(
            "vLLM asked a Domino draft for logits without its head: its drafter is not that of domino-spec, which must "
            "be installed, and enabled where VLLM_PLUGINS is set"
        )

    def _gathered_logits(self, hidden: Tensor) -> Tensor:
        """Base logits over the target's vocabulary, [rows, V], on every rank."""
        logits = super().compute_logits(hidden)
        if logits is None:
            raise UserError("a Domino draft needs the logits on every rank, and this platform gathers them on one")
        return logits


def norm_by_layer(model: Any, keys: Tensor) -> Tensor:
    """Context keys [layers, T, kv_heads, D] after every layer's own RMS norm."""
    layers = zip(keys, model._k_norm_weights, strict=True)
    return torch.stack([F.rms_norm(k, k.shape[-1:], weight, model._rms_norm_eps) for k, weight in layers])


def whole_rows(layer: VocabParallelEmbedding, token_ids: Tensor, what: str) -> Tensor:
    """Rows of a matrix that is sharded over the vocabulary, [n, H], the same on every rank.

    Every row is on one rank; the others add zeros, which is exact.

    Raises:
        UserError: the matrix is quantised.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"a draft vocabulary needs the target's {what} as a plain matrix, and it is quantised")
    first, stop = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    here = (token_ids >= first) & (token_ids < stop)
    rows = weight.detach()[(token_ids - first).clamp(0, max(stop - first - 1, 0))]
    rows = torch.where(here[:, None], rows, 0)
    return rows if get_tensor_model_parallel_world_size() == 1 else tensor_model_parallel_all_reduce(rows)


def _choice_embedding(
    embedding: VocabParallelEmbedding, token_ids: Tensor | None, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The target's embedding by index into the logits, as a table that kernels can read, if it can be one."""
    weight: Any = getattr(embedding, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
    if plain and get_tensor_model_parallel_world_size() == 1:
        return EmbeddingTable(weight.detach(), token_ids, dtype)
    if plain and token_ids is not None:
        return EmbeddingTable(whole_rows(embedding, token_ids, "embedding"), None, dtype)
    # Sharded over the whole vocabulary: one reduction over the ranks for every draft.
    return lambda choices: embedding(choices if token_ids is None else token_ids[choices]).to(dtype)


def _refuse_changed_embeddings(language_model: Any, embedding: nn.Module) -> None:
    """Refuse a target that scales its embeddings (Gemma): vLLM hands the table alone to a DFlash draft."""
    if not hasattr(language_model, "embed_input_ids"):
        return
    ids = torch.arange(1, 9, device=next(embedding.parameters()).device)
    if not torch.equal(language_model.embed_input_ids(ids), embedding(ids)):
        raise UserError(
            f"{type(language_model).__name__} changes its embeddings after looking them up, and vLLM does not show "
            "that to a draft: this target is served with Domino by domino-spec's own engine only"
        )
