"""What the plug-in calls, overrides or replaces inside vLLM, by release. Checked before a Domino draft is served."""

from __future__ import annotations

from domino_spec.engines.hooks import Hook

_MODEL = "vllm.model_executor.models.qwen3_dflash:DFlashQwen3ForCausalLM"
_BOTH_0_32 = (
    Hook("vllm.config.speculative:SpeculativeConfig.update_arch_", ("self",)),
    Hook("vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting"),
    Hook("vllm.config:VllmConfig.num_lookahead_tokens"),
    Hook("vllm.config:VllmConfig.use_v2_model_runner"),
    Hook("vllm.config:ModelConfig.get_hidden_size", ("self",)),
    Hook("vllm.config:ModelConfig.get_vocab_size", ("self",)),
    Hook("vllm.config:ModelConfig.get_total_num_hidden_layers", ("self",)),
    Hook("vllm.distributed:get_tensor_model_parallel_world_size", ()),
    Hook("vllm.distributed:tensor_model_parallel_all_reduce", ("input_",)),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices"),
    Hook(_MODEL, ("vllm_config", "prefix")),
    Hook("vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model._normalize_context_k", ("self", "all_k")),
    Hook(f"{_MODEL}.load_weights", ("self", "weights")),
    Hook(f"{_MODEL}.compute_logits", ("self", "hidden_states")),
    Hook(f"{_MODEL}.combine_hidden_states", ("self", "hidden_states")),
)

_V1 = "vllm.v1.spec_decode.dflash:DFlashProposer"
V1 = {
    "0.32": (
        *_BOTH_0_32,
        Hook(f"{_V1}.__init__", ("self", "vllm_config", "device", "runner")),
        Hook(
            f"{_V1}.set_inputs_first_pass",
            (
                "self",
                "target_token_ids",
                "next_token_ids",
                "target_positions",
                "target_hidden_states",
                "token_indices_to_sample",
                "cad",
                "num_rejected_tokens_gpu",
            ),
        ),
        Hook(f"{_V1}._sample_draft_tokens", ("self", "hidden_states", "sampling_metadata")),
        Hook(f"{_V1}.load_model", ("self", "target_model")),
        Hook(f"{_V1}.take_last_draft_probs", ("self",)),
        Hook("vllm.v1.worker.gpu_model_runner:DFlashProposer"),
        Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter", ("self", "common_attn_metadata")),
        Hook(
            "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
            ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        ),
    ),
}
"""Of the first model runner, which is the one on CPU."""

_V2 = "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator"
_PROPOSE = (
    "self",
    "input_batch",
    "attn_metadata",
    "slot_mappings",
    "last_hidden_states",
    "aux_hidden_states",
    "num_sampled",
    "num_rejected",
    "last_sampled",
    "next_prefill_tokens",
    "temperature",
    "seeds",
    "dp_sync_state",
    "dummy_run",
    "skip_attn_for_dummy_run",
    "mm_inputs",
    "is_profile",
    "num_speculative_tokens",
)
_GENERATE = (
    "self",
    "num_reqs",
    "num_tokens_padded",
    "attn_metadata",
    "slot_mappings",
    "num_tokens_across_dp",
    "cudagraph_runtime_mode",
)
V2 = {
    "0.32": (
        *_BOTH_0_32,
        Hook(f"{_V2}.__init__", ("self", "vllm_config", "device")),
        Hook(f"{_V2}.load_draft_model", ("self", "target_model", "target_attn_layer_names")),
        Hook(f"{_V2}.draft_logits_spec", ("self", "vllm_config")),
        Hook(f"{_V2}.propose", _PROPOSE),
        Hook(f"{_V2}._generate_draft", _GENERATE),
        Hook(
            f"{_V2}._run_model",
            (
                "self",
                "num_tokens",
                "attn_metadata",
                "slot_mappings",
                "num_tokens_across_dp",
                "cudagraph_runtime_mode",
            ),
        ),
        Hook("vllm.v1.worker.gpu.spec_decode:init_speculator", ("vllm_config", "device", "req_states")),
    ),
}
"""Of the second model runner, which needs Triton and is the one on GPUs."""
