"""The internals of another engine that a plug-in uses, by name and signature, checked before they are used.

An engine's internals change between releases. A plug-in that finds them changed must stop the engine with a sentence:
if it went on, it would serve a draft whose tokens are never accepted.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domino_spec.settings import UserError


@dataclass(frozen=True)
class Hook:
    """A function, method, class or constant of an engine that a plug-in calls, overrides or replaces."""

    path: str
    """`module:name` or `module:Class.name`."""
    parameters: str | None = None
    """Names of its parameters in order, separated by commas; None if only its existence matters."""


def check_hooks(engine: str, version: str, tables: Mapping[str, Sequence[Hook]]) -> None:
    """Refuse an engine whose internals differ from those that the plug-in was written for.

    Args:
        engine: its name, for the messages.
        version: of the engine that is installed.
        tables: release, such as ``0.32`` or ``0.5.23``, to the hooks that hold in it and in its patch releases.

    Raises:
        UserError: an unknown release, or the first hook that is missing or has other parameters.
    """
    release = known_release(version, tables)
    if release is None:
        raise UserError(
            f"{engine} {version} is not supported: domino-spec was written against {engine} {', '.join(tables)}"
        )
    for hook in tables[release]:
        mismatch = check_hook(hook)
        if mismatch:
            raise UserError(
                f"{engine} {version} is not as domino-spec expects: {mismatch}; use another {engine} of "
                f"release {release}, or a newer domino-spec"
            )


def known_release(version: str, releases: Iterable[str]) -> str | None:
    """The release that a version belongs to: ``0.32.1.post1`` belongs to ``0.32``. None if it is none of these."""
    return next((name for name in releases if version == name or version.startswith((name + ".", name + "+"))), None)


def check_hook(hook: Hook) -> str | None:
    """How a hook differs from what is installed, as a phrase; None if it does not."""
    try:
        found = resolve(hook.path)
    except (ImportError, AttributeError):
        return f"{hook.path.replace(':', '.')} is missing"
    if hook.parameters is None:
        return None
    try:
        parameters = ", ".join(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return f"{hook.path.replace(':', '.')} can no longer be called"
    if parameters != hook.parameters:
        return f"{hook.path.replace(':', '.')} takes ({parameters}), not ({hook.parameters})"
    return None


def resolve(path: str) -> Any:
    """What `module:name` or `module:Class.name` stands for.

    Raises:
        ImportError, AttributeError: it is not there.
    """
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
