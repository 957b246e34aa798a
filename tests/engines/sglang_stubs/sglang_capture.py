"""A plug-in of SGLang that writes down what was drafted, where the tests ask for it by an environment variable."""

from __future__ import annotations

import json
import os


def register():
    """Called by SGLang in every process."""
    if "DOMINO_SPEC_TEST_CAPTURE" in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("domino_spec.engines.sglang.model.Proposer.forward", note, HookType.AFTER)


def note(drafts, proposer, hidden, anchors, temperatures=None):
    """One line for every request of a cycle."""
    with open(os.environ["DOMINO_SPEC_TEST_CAPTURE"], "a", encoding="utf-8") as file:
        for anchor, tokens in zip(anchors.tolist(), drafts.tokens.tolist(), strict=True):
            line = {"anchor": anchor, "drafts": tokens, "sampled": drafts.probs is not None}
            file.write(json.dumps(line) + "\n")
