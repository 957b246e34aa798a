"""The vLLM plug-in: Domino drafts under vLLM's speculative method `dflash`.

    pip install .    # in a checkout of this package
    vllm serve TARGET --speculative-config '{"method": "dflash", "model": DRAFT, "num_speculative_tokens": N}'

vLLM has the DFlash backbone (its attention over context and block, its cache) but no head. The plug-in adds it:

- `served`: the draft as vLLM's configuration names it, and what is refused before anything is loaded;
- `install`: how the plug-in gets into vLLM;
- `model`: vLLM's DFlash model with the head's weights, which refuses to draft without them;
- `proposer`, `speculator`: the DFlash drafters of vLLM's two model runners, as subclasses that draft with the head.

vLLM calls `register` in every process that it starts, whether a draft is used or not, so it does next to nothing.
Everything else waits for a configuration with a Domino draft.
"""

from __future__ import annotations

ARCHITECTURES = ("DominoDraftModel", "DFlashDominoDraftModel")
"""A draft's own name, and what vLLM makes of it for the method `dflash`."""


def register() -> None:
    """Make Domino drafts known to this process's vLLM: the entry point `vllm.general_plugins`. May be called again.

    If this vLLM lacks a place that the plug-in wraps, nothing is changed, and vLLM itself refuses a Domino draft: by
    its architecture, or by the head's tensors that plain DFlash has no room for.
    """
    from vllm import ModelRegistry

    from domino_spec.engines.vllm.install import watch_configurations

    if watch_configurations():
        for name in ARCHITECTURES:
            ModelRegistry.register_model(name, "domino_spec.engines.vllm.model:DominoForCausalLM")
