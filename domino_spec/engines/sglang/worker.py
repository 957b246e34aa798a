"""The draft in SGLang's decoding loop, eager and inside its CUDA graphs.

`DFlashWorkerV2` supports drafts with a candidate selector, which proposes tokens and reports how probable each was.
Our proposer takes the selector's place, for greedy and for sampled requests.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2, _is_all_greedy
from sglang.srt.speculative.dspark_components.dspark_draft import resolve_greedy_mask
from torch import Tensor

from domino_spec.draft.config import DraftConfig
from domino_spec.engines.drafting import Drafts
from domino_spec.engines.sglang import cpu
from domino_spec.engines.sglang.model import Proposer
from domino_spec.settings import UserError

_log = logging.getLogger(__name__)


def check_worker(worker: Any) -> None:
    """Refuse a platform that has another worker.

    Raises:
        UserError: names it.
    """
    if worker is not DFlashWorkerV2:
        raise UserError(f"this platform of SGLang drafts with {worker.__name__}, which knows no Domino drafts")


class DominoWorker(DFlashWorkerV2):
    """Drafts with the backbone, as SGLang does, and with our head."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        self._on_cpu = torch.device(target_worker.device).type == "cpu"
        if self._on_cpu:
            cpu.prepare_process()
        super().__init__(server_args, gpu_id, nccl_port, target_worker)
        model = target_worker.model_runner.model
        if self._on_cpu:
            cpu.prepare_backbone(self.draft_model)
        self.proposer: Proposer = self.draft_model.candidate_selector
        self.proposer.bind(
            unwrap_lora_layer(model.get_input_embeddings()),
            unwrap_lora_layer(model.lm_head),
            get_parallel().tp_group,
            self._noise_embed_scale,
            int(get_spec().speculative_domino_candidate_pool_size),
        )
        settings = self.draft_model.settings
        if settings.num_target_layers - 1 in settings.target_layer_ids:
            tap_last_layer(model, settings)
        _log.info(
            "Domino head: %s drafts a cycle, %s corrected",
            self.proposer.num_drafts,
            f"the {self.proposer.candidates} best base logits" if self.proposer.candidates else "all base logits",
        )

    def _propose_selector_block(
        self, *, draft_logits_output: Any, bs: int, lm_head: Any, anchor_token_ids: Tensor, sampling_info: Any
    ) -> Tensor:
        """Draft outside a graph: tokens [R, B - 1], and what the sampled ones were drawn from for the verify pass."""
        hidden = draft_logits_output.hidden_states.view(bs, self.block_size, -1)
        drafts = self.proposer(hidden, anchor_token_ids, draft_temperatures(bs, sampling_info))
        if drafts.probs is not None:
            self._selector_sample = (drafts.candidate_ids, drafts.probs)
        return drafts.tokens

    def _maybe_build_draft_sampler(self) -> Any:
        """What SGLang captures after the backbone, or None to draft outside the graph."""
        if self._on_cpu or envs.SGLANG_DFLASH_EAGER_DRAFT_SAMPLER.get():
            return None
        largest = max(get_exec().graph.cuda_graph_config.decode.bs)
        return GraphSampler(self.proposer, largest, self.draft_model_runner.dtype, torch.device(self.device))

    def _selector_sampling_accept(
        self,
        *,
        candidates: Tensor,
        next_token_logits: Tensor,
        candidate_ids: Tensor,
        q_rows: Tensor,
        sampling_info: Any,
        draft_input: Any,
    ) -> tuple[Tensor, Tensor]:
        """Number of accepted drafts [R] and bonus tokens [R]; on CPU, where SGLang has no kernel, by ours."""
        if self._on_cpu:
            return cpu.accept_sampled(candidates, next_token_logits, candidate_ids, q_rows, sampling_info)
        return super()._selector_sampling_accept(
            candidates=candidates,
            next_token_logits=next_token_logits,
            candidate_ids=candidate_ids,
            q_rows=q_rows,
            sampling_info=sampling_info,
            draft_input=draft_input,
        )


def draft_temperatures(requests: int, sampling_info: Any) -> Tensor | None:
    """Temperatures that drafts are sampled at [R], 0 for requests that choose; None if all of them choose."""
    if _is_all_greedy(sampling_info):
        return None
    temperatures = sampling_info.temperatures.view(-1)[:requests].float()
    greedy = resolve_greedy_mask(bs=requests, sampling_info=sampling_info, device=temperatures.device)
    return temperatures.masked_fill(greedy[:requests], 0.0)


class GraphSampler:
    """Greedy drafts inside the draft's CUDA graph; sampled ones right after it, from the same hidden states.

    A captured graph serves every batch of its size, and what is sampled must be drawn anew and kept, [R, N, K]: too
    much to do for batches that only choose. SGLang calls it at capture, stages each batch's sampling before the replay,
    and reads `out`, `candidate_out` and `q_out` after it.

    Args:
        proposer: bound to its target.
        requests: of the largest graph.
        dtype: of hidden states.
        device: of the draft.
    """

    def __init__(self, proposer: Proposer, requests: int, dtype: torch.dtype, device: torch.device) -> None:
        self.proposer = proposer
        settings = proposer.settings
        self._hidden = torch.zeros(
            (requests, settings.block_size, settings.hidden_size), dtype=dtype, device=device
        )  # [R, B, H]
        self._anchors = torch.zeros(requests, dtype=torch.long, device=device)
        self._tokens = torch.zeros(requests * proposer.num_drafts, dtype=torch.long, device=device)
        self._requests = 0
        self._temperatures: Tensor | None = None
        self._sampled: Drafts | None = None

    def __call__(self, hidden_states: Tensor, input_ids: Tensor) -> None:
        """Captured: hidden states [R * B, H] and the block's token ids [R * B] to greedy drafts."""
        block = self.proposer.settings.block_size
        requests = hidden_states.shape[0] // block
        self._hidden[:requests].copy_(hidden_states.view(requests, block, -1))
        self._anchors[:requests].copy_(input_ids.view(requests, block)[:, 0])
        drafts = self.proposer(self._hidden[:requests], self._anchors[:requests])
        self._tokens[: drafts.tokens.numel()].copy_(drafts.tokens.flatten())

    def stage_sampling_params(self, *, bs: int, sampling_info: Any) -> None:
        """Before a replay: how many requests there are, and the temperatures of those that sample."""
        self._requests, self._sampled = bs, None
        self._temperatures = draft_temperatures(bs, sampling_info)

    @property
    def out(self) -> Tensor:
        """Token ids, [R * (B - 1)] and more."""
        sampled = self._sample()
        return self._tokens if sampled is None else sampled.tokens.flatten()

    @property
    def candidate_out(self) -> Tensor:
        """What sampled drafts could have been, [R, B - 1, K]."""
        sampled = self._sample()
        assert sampled is not None and sampled.candidate_ids is not None
        return sampled.candidate_ids

    @property
    def q_out(self) -> Tensor:
        """How probable that was, [R, B - 1, K]."""
        sampled = self._sample()
        assert sampled is not None and sampled.probs is not None
        return sampled.probs

    def _sample(self) -> Drafts | None:
        if self._temperatures is not None and self._sampled is None:
            requests = self._requests
            self._sampled = self.proposer(self._hidden[:requests], self._anchors[:requests], self._temperatures)
        return self._sampled


def tap_last_layer(model: Any, settings: DraftConfig) -> None:
    """Append the last layer's output to the features of every forward pass, for drafts that read it.

    SGLang captures features before the layer that follows, and no layer follows the last one. Its final norm takes a
    callback that is given the residual stream, which is that output.

    Args:
        model: SGLang's target model.
        settings: of the draft; the last layer is the last of `target_layer_ids`.

    Raises:
        UserError: the target is built in a way in which it cannot be tapped.
    """
    from sglang.srt.layers.layer_boundary.residual import batch

    decoder: Any = getattr(model, "model", None)
    norm = getattr(decoder, "norm", None)
    name = type(model).__name__
    if norm is None or not hasattr(decoder, "layers_to_capture"):
        raise UserError(f"this draft reads the target's last layer, which SGLang's {name} does not show")
    if len(settings.target_layer_ids) == 1 or max(settings.target_layer_ids) != settings.target_layer_ids[-1]:
        raise UserError("a draft that reads the target's last layer must name it behind others in target_layer_ids")
    captured: list[Tensor] = []
    final_norm = batch.final_norm

    def norm_and_capture(
        hidden_states: Any, forward_batch: Any, layernorm: Any, capture: Any = None, **rest: Any
    ) -> Any:
        if layernorm is norm and capture is None:
            captured.clear()

            def capture(residual: Tensor) -> None:
                captured.append(residual.clone())

        return final_norm(hidden_states, forward_batch, layernorm, capture, **rest)

    def append(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or not isinstance(output[1], list):
            return output
        if not captured:
            raise RuntimeError(f"the last layer of SGLang's {name} could not be tapped, which this draft needs")
        output[1].append(captured.pop())
        return output

    batch.final_norm = norm_and_capture
    decoder.register_forward_hook(append)
