"""How the plug-in gets into SGLang: the entrances that are wrapped, and what is checked before the engine starts.

Each wrapped entrance does nothing unless the draft is a Domino draft. A wrong pairing, another block size or a hook
that has moved would decode correctly and slowly, so each is refused in a sentence.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from domino_spec.draft.checkpoint import CONFIG_FILE, parse_config, read_published
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.load import shape_mismatch
from domino_spec.engines.drafting import check_weights
from domino_spec.engines.hooks import Hook, check_hooks
from domino_spec.engines.sglang import cpu
from domino_spec.settings import UserError

_log = logging.getLogger(__name__)

ARCHITECTURE = "DominoDraftModel"
ENGINE_POOL_SIZE = 2048
"""SGLang's default of `--speculative-domino-candidate-pool-size`, taken for "not asked for": every token is scored."""


@functools.cache
def register() -> None:
    """Called by SGLang in every process; a second call does nothing.

    Raises:
        UserError: an unknown release, or an entrance that has moved. SGLang logs it and continues without the plug-in,
            so that it still serves everything else.
        SystemExit: the same, if the command line asks for a Domino draft.
    """
    try:
        check_hooks("SGLang", version("sglang"), ENTRANCES)
    except UserError as error:
        if asks_for_domino(sys.argv):
            raise SystemExit(f"domino-spec: {error}") from None
        raise
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for path, around in (
        (HANDLE_DFLASH, prepare_settings),
        (PARSE_CONFIG, parse_as_backbone),
        (DRAFT_MODEL_CONFIG, name_architecture),
        (CREATE_WORKER, choose_worker),
    ):
        HookRegistry.register(path.replace(":", "."), around, HookType.AROUND)


def asks_for_domino(arguments: Sequence[str]) -> bool:
    """Whether a command line of SGLang names a Domino draft, as far as that is visible without SGLang."""
    option = "--speculative-draft-model-path"
    named = [after for before, after in itertools.pairwise(arguments) if before == option]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith(option + "=")]
    return any((Path(name) / CONFIG_FILE).is_file() and is_domino(read_published(Path(name))) for name in named)


def parse_as_backbone(original: Callable[..., Any], *, draft_hf_config: Any) -> Any:
    """Around `parse_dflash_draft_config`: of a Domino draft only the backbone is SGLang's to read.

    So neither its limits (`pure_draft_prefix_len` 1) nor its own rollout apply.
    """
    return original(draft_hf_config=without_head(draft_hf_config))


def name_architecture(original: Callable[..., Any], model_config: Any) -> None:
    """Around `ModelConfig._config_draft_model`: both published names of a Domino draft stand for our class."""
    original(model_config)
    if model_config.is_draft_model and is_domino(model_config.hf_config):
        model_config.hf_config.architectures = [ARCHITECTURE]


def choose_worker(original: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    """Around `SpeculativeAlgorithm.create_worker`: our worker for a Domino draft."""
    worker = original(algorithm, server_args)
    if not algorithm.is_dflash() or served_draft(server_args) is None:
        return worker
    from sglang.srt.models.registry import ModelRegistry

    from domino_spec.engines.sglang.model import DominoDraftModel
    from domino_spec.engines.sglang.worker import DominoWorker, check_worker

    check_worker(worker)
    ModelRegistry.models[ARCHITECTURE] = DominoDraftModel
    return DominoWorker


# Checks before the engine starts


def check_engine() -> None:
    """Refuse an SGLang whose internals are not those that the plug-in was written against.

    Raises:
        UserError: names the first that differs.
    """
    check_hooks("SGLang", version("sglang"), HOOKS)


def is_domino(published: Any) -> bool:
    """Whether a draft's configuration, as SGLang holds it, is that of a Domino draft."""
    return _nested(published).get("projector_type") == "domino"


def without_head(published: Any) -> Any:
    """The configuration of a Domino draft's backbone, a DFlash draft; others as they are."""
    if not is_domino(published):
        return published
    nested = {**_nested(published), "projector_type": None}
    if isinstance(published, Mapping):
        return {**published, "dflash_config": nested}
    backbone = copy.copy(published)
    backbone.dflash_config = nested
    return backbone


def _nested(published: Any) -> Mapping[str, Any]:
    get = published.get if isinstance(published, Mapping) else lambda key: getattr(published, key, None)
    nested = get("dflash_config")
    return nested if isinstance(nested, Mapping) else {}


def prepare_settings(original: Callable[..., Any], server_args: Any) -> None:
    """Around `_handle_dflash`, which settles the arguments of DFlash: check ours, and set what was left open.

    Raises:
        UserError: SGLang would serve this draft wrongly or not at all.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = served_draft(server_args)
    if config is None:
        return original(server_args)
    check_engine()
    asked = resolving_view(server_args)
    check_settings(asked, config)
    check_target(asked, config)
    if asked.speculative_domino_candidate_pool_size == ENGINE_POOL_SIZE:
        declare_resolution(server_args, "domino-spec", speculative_domino_candidate_pool_size=0)
    with cpu.admitted(asked):
        return original(server_args)


def served_draft(server_args: Any) -> DraftConfig | None:
    """The draft's settings if it is a Domino draft; None if it is of another kind or there is none.

    Raises:
        UserError: a Domino draft with settings that are not supported.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    asked = resolving_view(server_args)
    path = asked.speculative_draft_model_path
    if path is None:
        return None
    published = _configuration(asked, path, asked.speculative_draft_model_revision)
    return parse_config(published.to_dict(), f"draft {path}") if is_domino(published) else None


def _configuration(asked: Any, path: str, revision: str | None) -> Any:
    """A model's configuration as SGLang reads it, changes by `--json-model-override-args` included."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    changes = json.loads(asked.json_model_override_args)
    return get_config(path, trust_remote_code=asked.trust_remote_code, revision=revision, model_override_args=changes)


def check_settings(asked: Any, config: DraftConfig) -> None:
    """Refuse what cannot be served as trained.

    Args:
        asked: SGLang's arguments.
        config: of the draft.

    Raises:
        UserError: names the option.
    """
    if config.last_tap_normed:
        raise UserError(
            "the draft reads the target's last layer after its final norm, which SGLang does not hand over to drafts"
        )
    for option in ("speculative_num_draft_tokens", "speculative_dflash_block_size"):
        value = getattr(asked, option)
        if value not in (None, config.block_size):
            raise UserError(
                f"--{option.replace('_', '-')} {value}: SGLang verifies as many tokens as the draft has slots, "
                f"and this draft was trained with {config.block_size}; leave the option out"
            )
    if asked.speculative_domino_candidate_pool_size < 0:
        raise UserError(
            "--speculative-domino-candidate-pool-size must be 0, for every token, or the number of best base logits "
            f"that are scored, got {asked.speculative_domino_candidate_pool_size}"
        )
    if asked.attn_dp_size > 1:
        raise UserError(
            f"--attn-dp-size {asked.attn_dp_size}: attention in data parallel is not supported with a Domino draft; "
            "use --tp-size"
        )


def check_target(asked: Any, config: DraftConfig) -> None:
    """Refuse a draft that was not made for this target.

    Shapes are compared always; the fingerprint of the weights if the draft carries one and they can be read.

    Raises:
        UserError: names both sides.
    """
    draft, name = asked.speculative_draft_model_path, asked.model_path
    shape = _configuration(asked, name, asked.revision).get_text_config()
    mismatch = shape_mismatch(config, shape.hidden_size, shape.vocab_size, shape.num_hidden_layers)
    if mismatch:
        raise UserError(f"draft {draft} does not fit target {name}: {mismatch}")
    check_weights(config, draft, name, _log)


# What the plug-in relies on inside SGLang, by release

_SPEC = "sglang.srt.speculative"
_WORKER = f"{_SPEC}.dflash_worker_v2"

HANDLE_DFLASH = "sglang.srt.arg_groups.speculative_hook:_handle_dflash"
PARSE_CONFIG = f"{_SPEC}.dflash_utils:parse_dflash_draft_config"
CREATE_WORKER = f"{_SPEC}.spec_info:SpeculativeAlgorithm.create_worker"
DRAFT_MODEL_CONFIG = "sglang.srt.configs.model_config:ModelConfig._config_draft_model"

ENTRANCES = {
    "0.5.23": (
        Hook(HANDLE_DFLASH, "server_args"),
        Hook(PARSE_CONFIG, "draft_hf_config"),
        Hook(CREATE_WORKER, "self, server_args"),
        Hook(DRAFT_MODEL_CONFIG, "self"),
        Hook("sglang.srt.plugins.hook_registry:HookRegistry.register", "target, hook, hook_type, source"),
        Hook("sglang.srt.plugins.hook_registry:HookType.AROUND"),
    ),
}

HOOKS = {
    "0.5.23": (
        *ENTRANCES["0.5.23"],
        Hook("sglang.srt.arg_groups.overrides:declare_resolution", "server_args, source, fields"),
        Hook("sglang.srt.arg_groups.overrides:resolving_view", "server_args"),
        Hook("sglang.srt.arg_groups.speculative_hook:current_platform"),
        Hook("sglang.srt.arg_groups.choices:add_draft_attention_backend_choices"),
        Hook("sglang.srt.models.registry:ModelRegistry.models"),
        Hook("sglang.srt.models.dflash:DFlashDraftModel", "config, quant_config, prefix"),
        Hook(
            "sglang.srt.models.dflash:DFlashDraftModel.forward",
            "self, input_ids, positions, forward_batch, input_embeds, get_embedding, pp_proxy_tensors",
        ),
        Hook("sglang.srt.models.dflash:DFlashDraftModel.load_weights", "self, weights"),
        Hook(_WORKER + ":DFlashWorkerV2", "server_args, gpu_id, nccl_port, target_worker"),
        Hook(
            _WORKER + ":DFlashWorkerV2._propose_selector_block",
            "self, draft_logits_output, bs, lm_head, anchor_token_ids, sampling_info",
        ),
        Hook(
            _WORKER + ":DFlashWorkerV2._selector_sampling_accept",
            "self, candidates, next_token_logits, candidate_ids, q_rows, sampling_info, draft_input",
        ),
        Hook(_WORKER + ":DFlashWorkerV2._maybe_build_draft_sampler", "self"),
        Hook(_WORKER + ":_is_all_greedy", "sampling_info"),
        Hook(_WORKER + ":make_draft_sampler_capture_hook", "draft_sampler"),
        Hook(f"{_SPEC}.dflash_utils:is_dense_head_weight", "weight"),
        Hook(f"{_SPEC}.dspark_components.dspark_draft:resolve_greedy_mask", "bs, sampling_info, device"),
        Hook("sglang.srt.environ:envs.SGLANG_DFLASH_EAGER_DRAFT_SAMPLER"),
        Hook("sglang.srt.lora.layers:unwrap_lora_layer", "module"),
        Hook("sglang.srt.runtime_context:get_parallel", ""),
        Hook("sglang.srt.runtime_context:get_spec", ""),
        Hook("sglang.srt.runtime_context:get_exec", ""),
        Hook(
            "sglang.srt.layers.layer_boundary.residual.batch:final_norm",
            "hidden_states, forward_batch, layernorm, capture, finalize_norm, skip_empty, read_kwargs",
        ),
        Hook("sglang.srt.layers.aux_hidden_states:AuxHiddenStateList.capture", "self, hidden, owned"),
        Hook(
            "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
            "self, q, k, v, layer, forward_batch, save_kv_cache",
        ),
        Hook("sglang.srt.utils.hf_transformers_utils:get_config"),
    ),
}
