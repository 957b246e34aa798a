"""The vLLM plug-in: Domino drafts under vLLM's speculative method `dflash`.

    pip install .    # in a checkout of this package
    vllm serve TARGET --speculative-config '{"method": "dflash", "model": DRAFT, "num_speculative_tokens": N}'

vLLM has the DFlash backbone (its attention over context and block, its cache) but no head. What is added to it:

- `model`: vLLM's DFlash model with the head's weights, which refuses to draft without them;
- `step`: from hidden states and anchors to drafts, a plain function over `ops.heads`;
- `v1`, `v2`: vLLM's two model runners, each with a subclass of its DFlash drafter that calls that step;
- `settings`: what is checked before anything is loaded; `table`: what is relied on inside vLLM.

vLLM calls `register` in every process that it starts, whether a draft is used or not, so it does next to nothing. All
else waits until a configuration with a Domino draft turns up.
"""

from __future__ import annotations

ARCHITECTURES = ("DominoDraftModel", "DFlashDominoDraftModel")
"""A draft's own name, and what vLLM makes of it for the method `dflash`."""
SERVED_AS = "DFlashDominoDraftModel"


def register() -> None:
    """Make Domino drafts known to this process's vLLM: the entry point `vllm.general_plugins`. May be called again.

    Where this vLLM lacks a place to hook into, nothing is changed, and a Domino draft is refused by vLLM itself: by its
    architecture, or by the head's tensors that plain DFlash has no room for.
    """
    from vllm import ModelRegistry

    from domino_spec.engines.vllm.install import watch_configurations

    if watch_configurations():
        for name in ARCHITECTURES:
            ModelRegistry.register_model(name, "domino_spec.engines.vllm.model:DominoForCausalLM")
