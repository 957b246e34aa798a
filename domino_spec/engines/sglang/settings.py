"""What is checked and set before the engine starts, so that a draft that nobody would accept is refused in a sentence.

A wrong pairing, another block size or a table of hooks that no longer holds would decode correctly and slowly.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from domino_spec.draft.checkpoint import parse_config
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.load import check_pairing, shape_mismatch
from domino_spec.engines.hooks import check_hooks
from domino_spec.engines.sglang import cpu
from domino_spec.engines.sglang.table import TABLE
from domino_spec.settings import UserError
from domino_spec.target.outline import outline_target

_log = logging.getLogger(__name__)

ARCHITECTURE = "DominoDraftModel"
ENGINE_POOL_SIZE = 2048
"""SGLang's default of `--speculative-domino-candidate-pool-size`, taken for "not asked for": every token is scored."""
ALLOW_OTHER_TARGET = "DOMINO_SPEC_ALLOW_OTHER_TARGET"
"""Environment variable; 1 serves a fine-tuned target of the same shape."""


def check_engine() -> None:
    """Refuse an SGLang whose internals are not those that the plug-in was written against.

    Raises:
        UserError: names the first that differs.
    """
    check_hooks("SGLang", version("sglang"), TABLE)


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
    """The draft's settings where it is a Domino draft, None where it is of another kind or there is none.

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

    Shapes are compared always; the fingerprint of the weights where the draft carries one and they can be read.

    Raises:
        UserError: names both sides.
    """
    draft, name = asked.speculative_draft_model_path, asked.model_path
    shape = _configuration(asked, name, asked.revision).get_text_config()
    mismatch = shape_mismatch(config, shape.hidden_size, shape.vocab_size, shape.num_hidden_layers)
    if mismatch:
        raise UserError(f"draft {draft} does not fit target {name}: {mismatch}")
    try:
        target = outline_target(name).target
    except UserError as error:
        _log.warning("the weights of target %s were not compared with those of the draft: %s", name, error)
        return
    if not target.fingerprint:
        _log.warning("the weights of target %s were not compared with those of the draft", name)
        return
    allowed = os.environ.get(ALLOW_OTHER_TARGET) == "1"
    check_pairing(config, draft, target, allowed, f"{ALLOW_OTHER_TARGET}=1")
