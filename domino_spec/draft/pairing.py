"""Does this draft fit this target? A wrong pairing decodes correctly but accepts nothing, so it is refused.

Shapes are compared always. The target's fingerprint is compared where the draft carries one; published drafts do not,
which is said once.
"""

from __future__ import annotations

import logging

from domino_spec.config import DraftConfig, SingleLayerConfig, UserError, feature_levels
from domino_spec.draft.schema import OWN_SETTINGS
from domino_spec.target.model import Target

_log = logging.getLogger(__name__)


def shape_mismatch(
    config: DraftConfig | SingleLayerConfig, hidden_size: int, vocab_size: int, num_layers: int
) -> str | None:
    """The first way in which a draft's shape does not fit a target's, as a phrase naming both sides, or None."""
    for what, draft_side, target_side in (
        (
            "hidden size",
            config.target_hidden_size if isinstance(config, SingleLayerConfig) else config.hidden_size,
            hidden_size,
        ),
        ("vocabulary", config.vocab_size, vocab_size),
        ("number of target layers", config.num_target_layers, num_layers),
    ):
        if draft_side not in (target_side, None):  # None: a published single-layer draft does not say
            return f"the draft was made for {what} {draft_side}, the target has {target_side}"
    if isinstance(config, SingleLayerConfig):
        try:
            deepest = max(config.target_layer_ids or feature_levels(num_layers))
        except UserError as error:
            return f"the draft reads three levels of the target's layers, but {error}"
        if deepest >= num_layers:
            return f"the draft reads layer {deepest}, the target's layers are 0 to {num_layers - 1}"
        if deepest == num_layers - 1 and config.published and OWN_SETTINGS not in config.published:
            return (
                f"the draft reads layer {deepest}, the target's last one, and its config.json does not say whether "
                "before the final norm or after it"
            )
    return None


def check_pairing(
    config: DraftConfig | SingleLayerConfig,
    draft_name: str,
    target: Target,
    allow_other_target: bool = False,
    how_to_allow: str = "--allow-other-target",
) -> None:
    """Refuse a draft that was not made for this target.

    Args:
        config: of the draft.
        draft_name: for the message.
        target: to pair it with.
        allow_other_target: accept a differing fingerprint (a fine-tuned target of the same shape).
        how_to_allow: the option or setting that does so, for the message.

    Raises:
        UserError: one sentence that names both sides.
    """
    mismatch = shape_mismatch(config, target.hidden_size, target.vocab_size, target.num_layers)
    if mismatch:
        raise UserError(f"draft {draft_name} does not fit target {target.name}: {mismatch}")
    if config.target_fingerprint is None:
        _log.warning("draft %s does not say which weights it was trained for; only shapes were checked", draft_name)
    elif config.target_fingerprint != target.fingerprint:
        if not allow_other_target:
            raise UserError(
                f"draft {draft_name} was trained for a target with fingerprint {config.target_fingerprint}, but "
                f"{target.name} has {target.fingerprint}; use the matching target, or allow another one "
                f"({how_to_allow}) for a fine-tuned target"
            )
        _log.warning("draft %s was trained for other weights than those of %s", draft_name, target.name)
