"""A Domino draft as vLLM's configuration names it, and what is refused before anything is loaded.

A draft that is paired or run in another way than it was trained decodes correctly and accepts nothing, so everything
that can be known beforehand is refused here, in one sentence.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from domino_spec.draft.config import DEFAULT_CANDIDATES, DraftConfig
from domino_spec.settings import UserError, require

CANDIDATES = "DOMINO_SPEC_CANDIDATES"

_log = logging.getLogger("vllm.domino_spec")  # a child of vLLM's logger, so that it is formatted and shown like it


@dataclass(frozen=True)
class ServedDraft:
    """A Domino draft and how vLLM is to run it."""

    name: str
    config: DraftConfig
    num_drafts: int
    """N, drafts per verify pass; the backbone runs `block_size` slots regardless."""
    candidates: int | None
    """K, how many of the best base logits the head corrects; None for all."""


def is_domino(speculative_config: Any) -> bool:
    """Whether a speculative configuration of vLLM (or None) names a draft with a Domino head."""
    draft = getattr(speculative_config, "draft_model_config", None)
    if draft is None or getattr(speculative_config, "method", None) != "dflash":
        return False
    nested = getattr(draft.hf_config, "dflash_config", None) or {}
    return nested.get("projector_type") == "domino"


def read_settings(vllm_config: Any) -> ServedDraft:
    """The draft of a configuration, if it can be served.

    Environment: `DOMINO_SPEC_CANDIDATES` is K (0 for the whole vocabulary).

    Raises:
        UserError: something would fail, or would lower acceptance unnoticed.
    """
    from domino_spec.draft.checkpoint import parse_config
    from domino_spec.draft.load import shape_mismatch

    spec, target = vllm_config.speculative_config, vllm_config.model_config
    draft = spec.draft_model_config
    published = dict(draft.hf_config.to_dict()) | {"architectures": ["DominoDraftModel"]}
    config = parse_config(published, f"draft {draft.model}")
    if config.head is None:
        raise UserError(f"draft {draft.model} has no Domino head; vLLM serves plain DFlash drafts by itself")
    if config.last_tap_normed:
        raise UserError(
            f"draft {draft.model} reads the target's last layer after its final norm, which vLLM does not hand over"
        )
    num_drafts = spec.num_speculative_tokens
    require(
        1 <= num_drafts <= config.max_drafts,
        f"num_speculative_tokens is {num_drafts}, but draft {draft.model} drafts at most {config.max_drafts} tokens "
        f"at once (its blocks have {config.block_size} slots); ask for 1 to {config.max_drafts}",
    )
    sizes = (target.get_hidden_size(), target.get_vocab_size(), target.get_total_num_hidden_layers())
    if mismatch := shape_mismatch(config, *sizes):
        raise UserError(f"draft {draft.model} does not fit target {target.model}: {mismatch}")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UserError("a Domino draft needs the target's embedding beside its LM head: no pipeline parallelism")
    for option in ("enable_adaptive_verification", "use_local_argmax_reduction", "use_heterogeneous_vocab"):
        if getattr(spec, option, False):
            raise UserError(f"{option} of the speculative configuration is not supported with a Domino draft")
    if getattr(vllm_config, "watermark_config", None) is not None:
        raise UserError("watermarking is not supported with a Domino draft")
    return ServedDraft(draft.model, config, num_drafts, _candidates())


def _candidates() -> int | None:
    text = os.environ.get(CANDIDATES, str(DEFAULT_CANDIDATES))
    if not text.isdigit():
        raise UserError(f"{CANDIDATES} must be a number of tokens, or 0 for the whole vocabulary, got {text!r}")
    return int(text) or None


def draft_to_load(vllm_config: Any) -> ServedDraft:
    """The draft of a configuration, once its target's weights are known to be those that it was trained for.

    Environment: `DOMINO_SPEC_ALLOW_OTHER_TARGET=1` accepts others (a fine-tuned target).

    Raises:
        UserError: as `read_settings`, or the fingerprints differ.
    """
    from domino_spec.engines.drafting import check_weights

    draft = read_settings(vllm_config)
    check_weights(draft.config, draft.name, vllm_config.model_config.model, _log)
    _log.info(
        "Domino draft %s: blocks of %d slots, %d drafts per pass, the head corrects %s",
        draft.name,
        draft.config.block_size,
        draft.num_drafts,
        "all tokens" if draft.candidates is None else f"the {draft.candidates} best tokens of every slot",
    )
    return draft
