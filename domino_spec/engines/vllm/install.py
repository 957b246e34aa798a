"""How the plug-in gets into vLLM: four places of its configuration, and the two classes that draft.

The places in the configuration are wrapped in every process and cost one comparison each. Only when a configuration
names a Domino draft are vLLM's internals and the draft checked and the classes that draft replaced, in the process that
reads it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

from domino_spec.engines.hooks import Hook, check_hooks
from domino_spec.engines.vllm.served import is_domino, read_settings

SERVED_AS = "DFlashDominoDraftModel"
"""What vLLM makes of a Domino draft's architecture for the method `dflash`."""
_MARK = "_domino_spec"
_checked: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Configurations whose draft was found to be in order: vLLM asks about it for every request."""
_log = logging.getLogger("vllm.domino_spec")  # a child of vLLM's logger, so that it is formatted and shown like it


def watch_configurations() -> bool:
    """Wrap what vLLM's configurations say of their draft; False if this vLLM has no such places."""
    try:
        from vllm.config import VllmConfig
        from vllm.config.speculative import SpeculativeConfig

        rename = SpeculativeConfig.update_arch_
        new_slots = _getter(SpeculativeConfig, "max_num_new_slots_for_drafting")
        lookahead = _getter(VllmConfig, "num_lookahead_tokens")
        chooses_v2 = _getter(VllmConfig, "use_v2_model_runner")
    except (ImportError, AttributeError):
        return False
    if hasattr(rename, _MARK):
        return True

    def update_arch_(self: Any) -> None:
        # Released Domino drafts call themselves DFlashDraftModel; the projector alone tells.
        if is_domino(self):
            self.draft_model_config.hf_config.architectures = [SERVED_AS]
        rename(self)

    def max_num_new_slots_for_drafting(self: Any) -> int:
        # Slots of the block beyond the anchor's: the block is always whole, however few of it are drafts.
        return max(new_slots(self), _block_size(self) - 1) if is_domino(self) else new_slots(self)

    def num_lookahead_tokens(self: Any) -> int:
        spec = self.speculative_config
        return max(lookahead(self), _block_size(spec)) if is_domino(spec) else lookahead(self)

    def use_v2_model_runner(self: Any) -> bool:
        # Asked while a configuration is checked, and by every worker before it makes its runner.
        v2 = chooses_v2(self)
        if is_domino(self.speculative_config):
            if _checked.get(id(self)) is not self:
                read_settings(self)
                _checked[id(self)] = self
            install(v2)
        return v2

    setattr(update_arch_, _MARK, True)
    patched: Any = SpeculativeConfig
    patched.update_arch_ = update_arch_
    patched.max_num_new_slots_for_drafting = property(max_num_new_slots_for_drafting)
    patched = VllmConfig
    patched.num_lookahead_tokens = property(num_lookahead_tokens)
    patched.use_v2_model_runner = property(use_v2_model_runner)
    return True


@functools.cache
def install(v2: bool) -> None:
    """Check what is relied on inside vLLM, and let its runner make a Domino drafter in place of a DFlash one.

    Raises:
        UserError: this vLLM is another than those the plug-in was written against.
    """
    import vllm

    if v2:
        check_hooks("vllm", vllm.__version__, HOOKS_V2)
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

        from domino_spec.engines.vllm.speculator import DominoSpeculator

        _construct_instead(DFlashSpeculator, DominoSpeculator)
        return
    check_hooks("vllm", vllm.__version__, HOOKS_V1)
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.dflash import DFlashProposer

    from domino_spec.engines.vllm.proposer import DominoProposer, expand_batch_to_tokens

    _construct_instead(DFlashProposer, DominoProposer)
    if current_platform.is_cpu():
        from vllm.v1.sample import rejection_sampler

        # vLLM's own hands floats to a kernel that reads integers, whose result is then lost (0.32, on CPU only): what
        # temperature and top-p were in a verify pass with drafts was left to chance.
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _construct_instead(base: Any, ours: Any) -> None:
    """Let `base(vllm_config, ..)` make one of `ours` if the draft is a Domino one.

    It makes a subclass of `base`, so `isinstance(.., base)` still holds.
    """
    if hasattr(base.__new__, _MARK):
        return

    def __new__(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        domino = cls is base and is_domino(vllm_config.speculative_config)
        return object.__new__(ours if domino else cls)

    setattr(__new__, _MARK, True)
    base.__new__ = __new__


def _getter(cls: Any, name: str) -> Callable[[Any], Any]:
    """The function behind a property."""
    return vars(cls)[name].fget if name in vars(cls) else getattr(cls, name).fget


def _block_size(speculative_config: Any) -> int:
    """B, of a Domino draft."""
    return int(speculative_config.draft_model_config.hf_config.block_size)


# What the plug-in calls, overrides or replaces inside vLLM, by release

_MODEL = "vllm.model_executor.models.qwen3_dflash:DFlashQwen3ForCausalLM"
_BOTH_0_32 = (
    Hook("vllm.config.speculative:SpeculativeConfig.update_arch_", "self"),
    Hook("vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting"),
    Hook("vllm.config:VllmConfig.num_lookahead_tokens"),
    Hook("vllm.config:VllmConfig.use_v2_model_runner"),
    Hook("vllm.config:ModelConfig.get_hidden_size", "self"),
    Hook("vllm.config:ModelConfig.get_vocab_size", "self"),
    Hook("vllm.config:ModelConfig.get_total_num_hidden_layers", "self"),
    Hook("vllm.distributed:get_tensor_model_parallel_world_size", ""),
    Hook("vllm.distributed:tensor_model_parallel_all_reduce", "input_"),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices"),
    Hook(_MODEL, "vllm_config, prefix"),
    Hook("vllm.model_executor.models.qwen3_dflash:DFlashQwen3Model._normalize_context_k", "self, all_k"),
    Hook(f"{_MODEL}.load_weights", "self, weights"),
    Hook(f"{_MODEL}.compute_logits", "self, hidden_states"),
    Hook(f"{_MODEL}.combine_hidden_states", "self, hidden_states"),
)

_V1 = "vllm.v1.spec_decode.dflash:DFlashProposer"
HOOKS_V1 = {
    "0.32": (
        *_BOTH_0_32,
        Hook(f"{_V1}.__init__", "self, vllm_config, device, runner"),
        Hook(
            f"{_V1}.set_inputs_first_pass",
            "self, target_token_ids, next_token_ids, target_positions, target_hidden_states, "
            "token_indices_to_sample, cad, num_rejected_tokens_gpu",
        ),
        Hook(f"{_V1}._sample_draft_tokens", "self, hidden_states, sampling_metadata"),
        Hook(f"{_V1}.load_model", "self, target_model"),
        Hook(f"{_V1}.take_last_draft_probs", "self"),
        Hook("vllm.v1.worker.gpu_model_runner:DFlashProposer"),
        Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter", "self, common_attn_metadata"),
        Hook(
            "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
            "x, cu_num_tokens, num_tokens, replace_from, replace_to",
        ),
    ),
}
"""Of the first model runner, which is the one on CPU."""

_V2 = "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator"
_PROPOSE = (
    "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, "
    "num_rejected, last_sampled, next_prefill_tokens, temperature, seeds, dp_sync_state, dummy_run, "
    "skip_attn_for_dummy_run, mm_inputs, is_profile, num_speculative_tokens"
)
_GENERATE = (
    "self, num_reqs, num_tokens_padded, attn_metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode"
)
HOOKS_V2 = {
    "0.32": (
        *_BOTH_0_32,
        Hook(f"{_V2}.__init__", "self, vllm_config, device"),
        Hook(f"{_V2}.load_draft_model", "self, target_model, target_attn_layer_names"),
        Hook(f"{_V2}.draft_logits_spec", "self, vllm_config"),
        Hook(f"{_V2}.propose", _PROPOSE),
        Hook(f"{_V2}._generate_draft", _GENERATE),
        Hook(
            f"{_V2}._run_model",
            "self, num_tokens, attn_metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode",
        ),
        Hook("vllm.v1.worker.gpu.spec_decode:init_speculator", "vllm_config, device, req_states"),
    ),
}
"""Of the second model runner, which needs Triton and is the one on GPUs."""
