"""What the plug-in relies on inside SGLang, release by release.

`ENTRANCES` are wrapped when SGLang starts; everything else is looked at once a Domino draft is to be served.
"""

from __future__ import annotations

from domino_spec.engines.hooks import Hook

_SPEC = "sglang.srt.speculative"
_WORKER = f"{_SPEC}.dflash_worker_v2"

HANDLE_DFLASH = "sglang.srt.arg_groups.speculative_hook:_handle_dflash"
PARSE_CONFIG = f"{_SPEC}.dflash_utils:parse_dflash_draft_config"
CREATE_WORKER = f"{_SPEC}.spec_info:SpeculativeAlgorithm.create_worker"
DRAFT_MODEL_CONFIG = "sglang.srt.configs.model_config:ModelConfig._config_draft_model"

ENTRANCES = {
    "0.5.23": (
        Hook(HANDLE_DFLASH, ("server_args",)),
        Hook(PARSE_CONFIG, ("draft_hf_config",)),
        Hook(CREATE_WORKER, ("self", "server_args")),
        Hook(DRAFT_MODEL_CONFIG, ("self",)),
        Hook("sglang.srt.plugins.hook_registry:HookRegistry.register", ("target", "hook", "hook_type", "source")),
        Hook("sglang.srt.plugins.hook_registry:HookType.AROUND"),
    ),
}

TABLE = {
    "0.5.23": (
        *ENTRANCES["0.5.23"],
        Hook("sglang.srt.arg_groups.overrides:declare_resolution", ("server_args", "source", "fields")),
        Hook("sglang.srt.arg_groups.overrides:resolving_view", ("server_args",)),
        Hook("sglang.srt.arg_groups.speculative_hook:current_platform"),
        Hook("sglang.srt.arg_groups.choices:add_draft_attention_backend_choices"),
        Hook("sglang.srt.models.registry:ModelRegistry.models"),
        Hook("sglang.srt.models.dflash:DFlashDraftModel", ("config", "quant_config", "prefix")),
        Hook(
            "sglang.srt.models.dflash:DFlashDraftModel.forward",
            (
                "self",
                "input_ids",
                "positions",
                "forward_batch",
                "input_embeds",
                "get_embedding",
                "pp_proxy_tensors",
            ),
        ),
        Hook("sglang.srt.models.dflash:DFlashDraftModel.load_weights", ("self", "weights")),
        Hook(_WORKER + ":DFlashWorkerV2", ("server_args", "gpu_id", "nccl_port", "target_worker")),
        Hook(
            _WORKER + ":DFlashWorkerV2._propose_selector_block",
            ("self", "draft_logits_output", "bs", "lm_head", "anchor_token_ids", "sampling_info"),
        ),
        Hook(
            _WORKER + ":DFlashWorkerV2._selector_sampling_accept",
            (
                "self",
                "candidates",
                "next_token_logits",
                "candidate_ids",
                "q_rows",
                "sampling_info",
                "draft_input",
            ),
        ),
        Hook(_WORKER + ":DFlashWorkerV2._maybe_build_draft_sampler", ("self",)),
        Hook(_WORKER + ":_is_all_greedy", ("sampling_info",)),
        Hook(_WORKER + ":make_draft_sampler_capture_hook", ("draft_sampler",)),
        Hook(f"{_SPEC}.dflash_utils:is_dense_head_weight", ("weight",)),
        Hook(f"{_SPEC}.dspark_components.dspark_draft:resolve_greedy_mask", ("bs", "sampling_info", "device")),
        Hook("sglang.srt.environ:envs.SGLANG_DFLASH_EAGER_DRAFT_SAMPLER"),
        Hook("sglang.srt.lora.layers:unwrap_lora_layer", ("module",)),
        Hook("sglang.srt.runtime_context:get_parallel", ()),
        Hook("sglang.srt.runtime_context:get_spec", ()),
        Hook("sglang.srt.runtime_context:get_exec", ()),
        Hook(
            "sglang.srt.layers.layer_boundary.residual.batch:final_norm",
            ("hidden_states", "forward_batch", "layernorm", "capture", "finalize_norm", "skip_empty", "read_kwargs"),
        ),
        Hook("sglang.srt.layers.aux_hidden_states:AuxHiddenStateList.capture", ("self", "hidden", "owned")),
        Hook(
            "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
            ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        ),
        Hook("sglang.srt.utils.hf_transformers_utils:get_config"),
    ),
}
