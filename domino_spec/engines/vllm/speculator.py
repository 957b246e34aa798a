"""vLLM's second model runner: its DFlash speculator, with blocks as they were trained and the head's rollout.

The whole step, backbone, candidates and rollout, is inside the graph that the runner captures: all buffers are made
once, and the host reads no value. The runner needs Triton and a GPU. Tests call the methods here on small tensors; the
runner as a whole has not been started with them yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from domino_spec.decoding.sampling import RandomStreams
from domino_spec.engines.drafting import cache_as_logits
from domino_spec.engines.vllm.served import draft_to_load


class DominoSpeculator(DFlashSpeculator):
    """What `DFlashSpeculator(vllm_config, device)` makes for a Domino draft (`install`)."""

    _speculator_name = "Domino"
    draft_logits: Tensor | None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self.draft = draft_to_load(vllm_config)
        super().__init__(vllm_config, device)
        self._make_buffers()

    def _make_buffers(self) -> None:
        """Everything a captured step reads or writes beyond vLLM's own buffers."""
        config, device = self.draft.config, self.device
        self.num_query_per_req = config.block_size
        requests, drafts = self.max_num_reqs, self.draft.num_drafts
        # vLLM's kernel notes a row to sample for every mask, also for those that are not drafts here. What it notes is
        # not read, but it must find the room: for the last request, a block beyond the others' drafts.
        room = requests * drafts + config.block_size
        self.sample_indices = torch.zeros(room, dtype=torch.int64, device=device)
        self.sample_pos = torch.zeros(room, dtype=torch.int64, device=device)
        self.sample_idx_mapping = torch.full((room,), -1, dtype=torch.int64, device=device)
        self._anchor_rows = torch.arange(requests, device=device) * config.block_size
        slots = config.first_draft_slot + torch.arange(drafts, device=device)
        self._slot_rows = self._anchor_rows[:, None] + slots  # [requests, N]
        self._steps = torch.arange(1, drafts + 1, device=device)
        self._request_rows = torch.full((requests,), -1, dtype=torch.int64, device=device)
        if self.draft_logits is not None:
            width = min(self.draft.candidates or config.logits_size, config.logits_size)
            # One row more: padding writes there.
            shape = (requests + 1, drafts, self.draft_logits.shape[-1])
            self.draft_logits = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)
            self._written = torch.zeros(requests + 1, drafts, width, dtype=torch.int64, device=device)

    def draft_logits_spec(self, vllm_config: Any) -> tuple[torch.dtype, float]:
        """float32, so that what was drawn from is what is verified against; -inf outside the candidates."""
        return torch.float32, float("-inf")

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Load the draft and join it to its target."""
        model: Any = super().load_draft_model(target_model, target_attn_layer_names)
        model.bind(target_model)
        return model

    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[Tensor], Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """As vLLM's, after noting which request each row of the batch is, where a graph can read it."""
        self._request_rows.fill_(-1)
        if not dummy_run:
            self._request_rows[: input_batch.num_reqs].copy_(input_batch.idx_mapping[: input_batch.num_reqs])
        return super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            last_sampled,
            next_prefill_tokens,
            temperature,
            seeds,
            dp_sync_state,
            dummy_run,
            skip_attn_for_dummy_run,
            mm_inputs,
            is_profile,
            num_speculative_tokens,
        )

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        num_tokens_across_dp: Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    ) -> None:
        """One step for `num_reqs` requests, padding included: `draft_tokens` and, if sampled, `draft_logits`."""
        states = self._run_model(
            num_tokens_padded, attn_metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode
        )
        # While memory is measured there may be fewer rows than the blocks of all requests take.
        hidden = states[self._slot_rows[:num_reqs].clamp(max=len(states) - 1)]  # [R, N, H]
        inputs = self.input_buffers
        anchor_rows = self._anchor_rows[:num_reqs].clamp(max=len(inputs.input_ids) - 1)
        anchors = inputs.input_ids[anchor_rows].long()
        model: Any = self.model
        if self.draft_logits is None:
            self.draft_tokens[:num_reqs] = model.draft(hidden, anchors).tokens
            return
        rows = self._request_rows[:num_reqs]
        requests = rows.clamp(min=0)
        temperatures = self.temperature[requests]
        positions = inputs.positions[anchor_rows][:, None] + self._steps  # of the drafts
        uniform = RandomStreams(self.seeds[requests]).uniform(positions, RandomStreams.DRAFT)
        drafts = model.draft(hidden, anchors, temperatures, uniform)
        self.draft_tokens[:num_reqs] = drafts.tokens
        cache_as_logits(self.draft_logits, self._written, rows, drafts, temperatures)
