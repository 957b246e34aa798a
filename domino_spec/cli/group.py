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
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from domino_spec import __version__
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
    """Say once why nothing is drafted: a warning with the remedy, or information, if that was wanted."""
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
    """A spinner on standard error while something takes time; nothing if that is no terminal."""
    from rich.console import Console

    spinner = Console(stderr=True)
    return spinner.status(f"{message} ...") if spinner.is_terminal else contextlib.nullcontext()


def print_json(value: Any) -> None:
    """Print one object on one line; numbers that are not finite become null, since JSON has none."""
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


@click.group(cls=OneLineErrors, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="domino-spec")
@click.pass_context
def cli(context: click.Context) -> None:
    """Make a language model write faster without changing what it writes.

    A small draft proposes the next tokens, the target checks them in one pass, and what it agrees with is kept.

    \b
    domino-spec demo
    domino-spec generate "Why is the sky blue?" --show-drafts
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# Threads
#
# PyTorch's Linux wheels carry GNU's OpenMP, whose threads spin for some milliseconds between two products. If another
# process takes a part of a core, all threads spin for the one that does not run, and decoding falls to a fraction of
# its speed. With a spin count of 1000, the value that GNU's OpenMP itself uses when there are more threads than cores,
# a thread sleeps instead. On a quiet machine that costs nothing; OMP_WAIT_POLICY=passive, which never spins, costs a
# fifth to a quarter (docs/log.md). Only the command line sets it: a library does not change its process's environment.

SPIN_COUNT = 1000
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which a user may have said how threads wait."""


def settle_threads(environment: MutableMapping[str, str] | None = None) -> None:
    """Set what the user has left open; nothing if PyTorch is loaded, which reads them only at its start."""
    if "torch" in sys.modules:
        return
    environment = os.environ if environment is None else environment
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    environment.setdefault("OMP_NUM_THREADS", str(available_cores()))


def available_cores(system: Path = Path("/")) -> int:
    """Physical cores that this process may use: by its affinity, and by the quota of its control group.

    Args:
        system: where `proc` and `sys` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    processors = affinity(0) if affinity is not None else range(os.cpu_count() or 1)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    # Of two threads of a core only one counts: they share what computes.
    cores = len({_read(system / topology.format(cpu)) or str(cpu) for cpu in processors})
    return max(1, min(cores, int(_quota(system) or cores)))


def _quota(system: Path) -> float | None:
    """Processors' worth of time that control groups grant, the tightest on the way up; None for any."""
    found = []
    for line in (_read(system / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for directory in (root / group.strip("/"), *(root / group.strip("/")).parents):
            if not directory.is_relative_to(root):
                break
            limit = _read(directory / "cpu.max")
            if limit is None:
                limit = f"{_read(directory / 'cpu.cfs_quota_us') or 'max'} {_read(directory / 'cpu.cfs_period_us')}"
            quota, _, period = limit.partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(int(quota) / int(period))
    return min(found, default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
