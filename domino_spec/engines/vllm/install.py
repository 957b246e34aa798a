"""How the plug-in gets into vLLM: four places of its configuration, and the two classes that draft.

The places in the configuration are watched in every process and cost one comparison each. Only a configuration with a
Domino draft has the hooks checked and the classes that draft replaced, in the process that reads it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from domino_spec.engines.hooks import check_hooks
from domino_spec.engines.vllm import SERVED_AS
from domino_spec.engines.vllm.settings import is_domino, read_settings

_MARK = "_domino_spec"
_checked: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Configurations whose draft was found to be in order: they are asked about it for every request."""


def watch_configurations() -> bool:
    """Wrap what vLLM's configurations say of their draft; False where this vLLM has no such places."""
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
    """Check what is relied on inside vLLM, and put a Domino drafter where its runner makes a DFlash one.

    Raises:
        UserError: this vLLM is another than those the plug-in was written against.
    """
    import vllm

    from domino_spec.engines.vllm import table

    if v2:
        check_hooks("vllm", vllm.__version__, table.V2)
        from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

        from domino_spec.engines.vllm.v2 import DominoSpeculator

        _construct_instead(DFlashSpeculator, DominoSpeculator)
        return
    check_hooks("vllm", vllm.__version__, table.V1)
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.dflash import DFlashProposer

    from domino_spec.engines.vllm.v1 import DominoProposer, expand_batch_to_tokens

    _construct_instead(DFlashProposer, DominoProposer)
    if current_platform.is_cpu():
        from vllm.v1.sample import rejection_sampler

        # vLLM's own hands floats to a kernel that reads integers, whose result is then lost (0.32, on CPU only): what
        # temperature and top-p were in a verify pass with drafts was left to chance.
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _construct_instead(base: Any, ours: Any) -> None:
    """Let `base(vllm_config, ..)` make one of `ours` where the draft is a Domino one.

    A subclass is what it makes, so whatever asks `isinstance(.., base)` goes on to hold.
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
