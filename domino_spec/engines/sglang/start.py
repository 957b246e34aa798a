"""The entry point: wrap SGLang's entrances, each of which does nothing unless the draft is a Domino draft."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from domino_spec.draft.checkpoint import CONFIG_FILE, read_published
from domino_spec.engines.hooks import check_hooks
from domino_spec.engines.sglang.settings import ARCHITECTURE, is_domino, prepare_settings, served_draft, without_head
from domino_spec.engines.sglang.table import CREATE_WORKER, DRAFT_MODEL_CONFIG, ENTRANCES, HANDLE_DFLASH, PARSE_CONFIG
from domino_spec.settings import UserError


@functools.cache
def register() -> None:
    """Called by SGLang in every process; a second call does nothing.

    Raises:
        UserError: an unknown release, or an entrance that has moved. SGLang logs it and goes on without the plug-in, so
            that it still serves everything else.
        SystemExit: the same, where the command line asks for a Domino draft.
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
    """Whether a command line of SGLang names a Domino draft, as far as it can be told without SGLang."""
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
