"""How every command behaves: errors as one line, quiet libraries, a spinner while something loads, JSON on demand."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from domino_spec.settings import UserError
from domino_spec.target.embedded import check_installed

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class OneLineErrors(click.Group):
    """A group of commands whose errors are one line on standard error, whatever command they come from."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> NoReturn:
        """Run a command and exit: 0 when it did what it should, 2 on a user's mistake, 130 on Ctrl-C."""
        try:
            status: Any = super().main(*args, **{**extra, "standalone_mode": False})
        except click.Abort:  # click has ended the unfinished line already
            sys.exit(130)
        except click.ClickException as error:
            _fail(error.format_message())
        except UserError as error:
            if logging.getLogger("domino_spec").isEnabledFor(logging.INFO):  # --verbose
                traceback.print_exc()
            _fail(str(error))
        except (RuntimeError, MemoryError) as error:
            # PyTorch's own, of CUDA and of a CPU, by name: importing it here would cost seconds.
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") and NO_MEMORY not in str(error):
                raise
            _fail(f"out of memory: {error}")
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> NoReturn:
    click.echo(f"domino-spec: error: {' '.join(message.split())}", err=True)
    sys.exit(2)


class _StandardError(logging.Handler):
    """Writes this package's messages as single lines."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not click.echo, which would write past a progress bar that is on the screen.
        print(f"domino-spec: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


def prepare(verbose: bool, threads: int | None = None, target: str | None = None) -> None:
    """Set threads and logging, before anything is loaded.

    Args:
        verbose: let the libraries underneath write what they like, and this package say what it does.
        threads: CPU threads of PyTorch; None leaves its choice.
        target: what will be loaded.

    Raises:
        UserError: it is the embedded target, whose weights are not installed.
    """
    if target is not None:
        check_installed(target)
    log = logging.getLogger("domino_spec")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if not any(isinstance(handler, _StandardError) for handler in log.handlers):
        log.addHandler(_StandardError())
    if not verbose:
        # Both are read when the libraries that they silence are imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.filterwarnings("ignore", module=r"(?!domino_spec\b)")
        if logging.lastResort is not None:  # what writes for loggers that nobody has configured
            logging.lastResort.setLevel(logging.ERROR)
        import huggingface_hub.utils.logging
        import transformers

        huggingface_hub.utils.logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def say_nothing_is_drafted(reason: str, wanted: bool) -> None:
    """Say once why nothing is drafted: a warning with the remedy, or, where that is what was asked for, a word."""
    log = logging.getLogger("domino_spec")
    if wanted:
        log.info("nothing is drafted: %s", reason)
    else:
        log.warning(
            "nothing is drafted: %s; --draft names one, --method ngram needs none, --method none says it is meant",
            reason,
        )


def console(shown: bool = True) -> Console:
    """Standard output; with `shown` False, nothing that is printed to it appears."""
    from rich.console import Console

    return Console(highlight=False, quiet=not shown)


def status(message: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner on standard error while something takes time; nothing where that is no terminal."""
    from rich.console import Console

    spinner = Console(stderr=True)
    return spinner.status(f"{message} ...") if spinner.is_terminal else contextlib.nullcontext()


def print_json(value: Any) -> None:
    """Print one object on one line; null stands for numbers that are not finite, which JSON cannot hold."""
    click.echo(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comma_separated(value: str, kind: Callable[[str], T], option: str) -> list[T]:
    """The parts of an option such as `none,domino` or `0,0.7`, empty ones left out.

    Raises:
        UserError: a part is not of that kind; the message names the option.
    """
    parts = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError:
        raise UserError(f"{option} must be numbers with commas between them, got {value!r}") from None


def read_prompt(prompt: str | None) -> str:
    """The prompt of a command; "-" stands for standard input.

    Raises:
        UserError: there is none, or it is empty or not UTF-8 text.
    """
    if prompt is None:
        raise UserError('no prompt given: domino-spec generate "your prompt", or - to read standard input')
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt
