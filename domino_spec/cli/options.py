"""Options that several commands share, and what they mean: which target and draft, on what device, in which type."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from domino_spec.cli.group import prepare, status
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.drafters.methods import METHODS, known_method
from domino_spec.settings import UserError

if TYPE_CHECKING:
    from domino_spec.draft.load import AnyDraft
    from domino_spec.draft.vocabulary import FrequentTokens
    from domino_spec.drafters.ngram_counts import NgramModel
    from domino_spec.target.model import Target

DEFAULT_TARGET, DEFAULT_DRAFT = "smollm2-135m", "smollm2-135m-domino"

MOST_THREADS = 1024
"""More than machines have; from some number on, starting them kills the process."""

Command = Callable[..., Any]


@dataclass(frozen=True)
class Machine:
    """Where and in which type a command computes."""

    device: str
    dtype: str
    threads: int | None
    verbose: bool
    no_check: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"--device must be auto, cpu, mps, cuda or cuda:N, got {self.device!r}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise UserError(f"--threads must be at least 1 and at most {MOST_THREADS}, got {self.threads}")

    def prepare(self, target: str | None = None) -> None:
        """Set threads and logging, before anything is loaded; refuse a `target` whose weights are not installed."""
        prepare(self.verbose, self.threads, target)

    def load(self, target: str, draft: str | None, allow_other_target: bool = False) -> tuple[Target, AnyDraft | None]:
        """Load a target and, if it is named, a draft for it.

        Raises:
            UserError: one of them cannot be loaded, the draft does not fit, or there is no such device.
        """
        import torch

        from domino_spec.draft.load import load_draft
        from domino_spec.target.load import load_target

        dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        with status(f"Loading {target}"):
            loaded = load_target(target, dtype=dtype, device=self.device, check=not self.no_check)
        if draft is None:
            return loaded, None
        with status(f"Loading {draft}"):
            return loaded, load_draft(draft, loaded, allow_other_target=allow_other_target)


@dataclass(frozen=True)
class Pair:
    """Which target and which draft."""

    target: str
    draft: str | None
    allow_other_target: bool

    def draft_for(self, methods: Sequence[str | None]) -> str | None:
        """The draft that these methods need (None stands for a draft's default method); the default target has one.

        Raises:
            UserError: an unknown method, or one that needs a draft and there is none.
        """
        needing = [method for method in methods if method is None or known_method(method).kinds]
        if not needing:
            return None
        if self.draft is None and self.target != DEFAULT_TARGET and needing != [None]:
            raise UserError(f"method {needing[0]} needs a draft made for {self.target}: give --draft")
        return self.draft or (DEFAULT_DRAFT if self.target == DEFAULT_TARGET else None)


@dataclass(frozen=True)
class Rivals:
    """Which target, and which drafts compete for it: of every kind that the methods need, one."""

    target: str
    drafts: tuple[str, ...]
    allow_other_target: bool

    def drafts_for(self, needing: Sequence[str]) -> list[str]:
        """The drafts for the methods that need one, each picks that of its kind; the default target has one.

        Raises:
            UserError: there are such methods and no draft.
        """
        if not needing:
            return []
        if not self.drafts and self.target != DEFAULT_TARGET:
            raise UserError(f"method {needing[0]} needs a draft made for {self.target}: give --draft")
        return list(dict.fromkeys(self.drafts)) or [DEFAULT_DRAFT]


@dataclass(frozen=True)
class Counts:
    """Files of counts that drafts draft with."""

    ranking: Path | None
    ngrams: Path | None

    def load(self, target: Target) -> tuple[FrequentTokens | None, NgramModel | None]:
        """What the files hold.

        Raises:
            UserError: one cannot be read, or was counted for another tokenizer.
        """
        from domino_spec.draft.vocabulary import FrequentTokens
        from domino_spec.drafters.ngram_counts import NgramModel

        ranking = None if self.ranking is None else FrequentTokens.load(self.ranking)
        ngrams = None if self.ngrams is None else NgramModel.load(self.ngrams)
        for counted in (ranking, ngrams):
            if counted is not None:
                counted.check(target)
        return ranking, ngrams


SETTINGS = ("num_drafts", "candidates", "min_confidence", "sample_drafts", "ngrams")
"""Options that only some methods read (`methods.Method.settings`)."""


def asked_for(*names: str) -> list[str]:
    """Those of the running command's options that were given, on the command line or by the environment."""
    context = click.get_current_context()
    unasked = (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return [name for name in names if context.get_parameter_source(name) not in unasked]


def collected(kind: type, name: str, *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A decorator that adds options and hands them to the command together, as one `kind` named `name`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collecting(**values: Any) -> Any:
            together = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            return command(**values, **{name: together})

        decorated: Command = collecting
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


class _Finite(click.types.FloatParamType):
    """A number that is one: neither nan nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return float(number)


FINITE = _Finite()
"""Type of options that hold real numbers."""


def method_option(names: Sequence[str] = tuple(METHODS)) -> Callable[[Command], Command]:
    """--method, of these."""
    return click.option("--method", type=click.Choice(names), help="How to draft; the draft's own method by default.")


verbose_option = click.option("--verbose", is_flag=True, help="Show what the libraries underneath have to say.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one machine-readable object.")
max_new_tokens_option = functools.partial(
    click.option, "--max-new-tokens", type=int, show_default=True, help="Longest answer, in tokens."
)
candidates_option = click.option(
    "--candidates", type=int, default=DEFAULT_CANDIDATES, show_default=True, help="Logits the head corrects; 0 for all."
)
num_drafts_option = click.option(
    "--num-drafts", type=int, help="Drafts per cycle; as many as the method can make by default."
)
no_check_option = click.option(
    "--no-check", is_flag=True, help="Load the target without comparing a few passes with transformers' own."
)
machine_options = collected(
    Machine,
    "machine",
    click.option("--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="auto is float32 on a CPU, elsewhere the target's own.",
    ),
    click.option("--threads", type=int, help="CPU threads; PyTorch's choice by default."),
    verbose_option,
    no_check_option,
)
_target_option = click.option(
    "--target", default=DEFAULT_TARGET, show_default=True, help="Also a directory or a hub id."
)
_other_target_option = click.option(
    "--allow-other-target", is_flag=True, help="Accept a draft trained for other weights of this shape."
)
pair_options = collected(
    Pair,
    "pair",
    _target_option,
    click.option("--draft", help=f"A directory or a hub id; {DEFAULT_DRAFT} for the default target."),
    _other_target_option,
)
counts_options = collected(
    Counts,
    "counts",
    click.option("--ranking", type=Path, help="Tokens by frequency, from `domino-spec vocabulary` (FR-Spec)."),
    click.option("--ngrams", type=Path, help="N-gram counts for DART drafts, from `domino-spec ngrams`."),
)
rivals_options = collected(
    Rivals,
    "rivals",
    _target_option,
    click.option(
        "--draft",
        "drafts",
        multiple=True,
        metavar="DRAFT",
        help="May be repeated: methods take the draft of their kind. The default target's own where none is given.",
    ),
    _other_target_option,
)
