"""vLLM's first model runner: its DFlash drafter, with blocks as they were trained and the head's rollout.

vLLM sends 1 + N slots and reads the N masks. A Domino draft's block has `block_size` slots however many of them are
drafts (attention inside it is bidirectional), and with shifted labels the anchor's slot predicts too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.spec_decode.dflash import DFlashProposer

from domino_spec.engines.drafting import over_vocabulary
from domino_spec.engines.vllm.model import DominoForCausalLM
from domino_spec.engines.vllm.served import draft_to_load
from domino_spec.settings import UserError


class DominoProposer(DFlashProposer):
    """What `DFlashProposer(vllm_config, device, runner)` makes for a Domino draft (`install`)."""

    max_positions: int
    max_query_tokens: int
    max_padded_query_tokens: int
    num_speculative_tokens: int
    positions: Tensor
    arange: Tensor
    _slot_mapping_buffer: Tensor

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        self.draft = draft_to_load(vllm_config)
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self._anchors = torch.empty(0, dtype=torch.long, device=device)
        self._room_for_blocks(self.draft.config.block_size)

    def _room_for_blocks(self, block_size: int) -> None:
        """Enlarge the buffers that are sized for 1 + N slots per request, where blocks have more."""
        needed = self.max_batch_size * block_size
        if needed <= self.max_query_tokens:
            return
        self.max_positions += max(0, needed - self.max_padded_query_tokens)
        self.max_query_tokens = needed
        self.max_padded_query_tokens = max(needed, self.max_padded_query_tokens)
        self.positions = self.positions.new_zeros(self.max_padded_query_tokens)
        self._slot_mapping_buffer = self._slot_mapping_buffer.new_zeros(self.max_padded_query_tokens)
        self.arange = torch.arange(self.max_positions + 1, dtype=self.arange.dtype, device=self.arange.device)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the draft and join it to its target."""
        super().load_model(target_model)
        self._domino.bind(target_model)
        # The runner drafts where 1 + N more tokens fit into the longest text; the block's last slots must fit, too.
        beyond = self.draft.config.block_size - 1 - self.draft.num_drafts
        if beyond > 0:
            if not hasattr(self.runner, "effective_drafter_max_model_len"):
                raise UserError("this vLLM's runner does not say how long a draft's text may be; use another release")
            self.runner.effective_drafter_max_model_len -= beyond

    @property
    def _domino(self) -> DominoForCausalLM:
        model = self.model
        return model.unwrap() if hasattr(model, "unwrap") else model

    def set_inputs_first_pass(
        self,
        target_token_ids: Tensor,
        next_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        token_indices_to_sample: Tensor | None,
        cad: Any,
        num_rejected_tokens_gpu: Tensor | None,
    ) -> tuple[int, Tensor, Any]:
        """A whole block for every request, and the rows of the N slots that predict drafts, request by request."""
        num_drafts, config = self.num_speculative_tokens, self.draft.config
        self.num_speculative_tokens = config.block_size - 1  # the masks that vLLM puts after the anchor
        try:
            num_tokens, _, block_metadata = super().set_inputs_first_pass(
                target_token_ids,
                next_token_ids,
                target_positions,
                target_hidden_states,
                token_indices_to_sample,
                cad,
                num_rejected_tokens_gpu,
            )
        finally:
            self.num_speculative_tokens = num_drafts
        self._anchors = next_token_ids.long()
        first = torch.arange(0, num_tokens, config.block_size, device=self.device)[:, None] + config.first_draft_slot
        slots = torch.arange(num_drafts, device=self.device)
        return num_tokens, (first + slots).flatten(), block_metadata

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        """Hidden states [R * N, H], request by request, to tokens [R * N] and, if sampled, probabilities [.., V]."""
        hidden = hidden_states.unflatten(0, (len(self._anchors), -1))
        if not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
            return self._domino.draft(hidden, self._anchors).tokens.flatten(), None
        uniform = torch.rand(hidden.shape[:2], dtype=torch.float64, device=hidden.device)
        for request, generator in sampling_metadata.generators.items():  # requests with a seed
            uniform[request].uniform_(generator=generator)
        drafts = self._domino.draft(hidden, self._anchors, sampling_metadata.temperature, uniform)
        return drafts.tokens.flatten(), over_vocabulary(drafts, self.draft.config.vocab_size).flatten(0, 1)


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """A value per request [R] to one per token [num_tokens], one value replaced by another; keeps the type."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(replaced, counts, output_size=num_tokens)
