"""The command that times the stages of a cycle: profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from domino_spec.cli.group import cli, comma_separated, print_json, status
from domino_spec.cli.options import (
    DEFAULT_TARGET,
    Machine,
    Pair,
    asked_for,
    candidates_option,
    json_option,
    machine_options,
    pair_options,
)
from domino_spec.drafters.methods import check_settings
from domino_spec.settings import UserError, require_extra

if TYPE_CHECKING:
    from domino_spec.draft.load import AnyDraft
    from domino_spec.target.model import Target


@cli.command()
@pair_options
@click.option("--shape", metavar="NAME|FILE", help="Random weights of qwen3-8b, smollm2-135m, tiny or a config.json.")
@click.option("--draft-vocab-size", type=int, help="Tokens that the draft of --shape can propose.")
@click.option(
    "--method", "methods", help="Comma-separated; a Domino draft's chain with its head off and on by default."
)
@click.option("--num-drafts", help="Drafts per cycle, comma-separated; as many as the method can make by default.")
@click.option("--context", type=int, default=512, show_default=True, help="Committed tokens of each request.")
@click.option("--batch", type=int, default=1, show_default=True, help="Requests that are decoded together.")
@click.option("--rows", help="Time verify passes of so many rows too, comma-separated: 1,2,4,8,12,16,24,32,64.")
@candidates_option
@click.option("--repeats", type=int, default=20, show_default=True, help="Medians are over so many.")
@click.option("--out", type=Path, required=True, help="Directory of profile.json, profile.md and the plot.")
@machine_options
@json_option
def profile(
    pair: Pair,
    shape: str | None,
    draft_vocab_size: int | None,
    methods: str | None,
    num_drafts: str | None,
    context: int,
    batch: int,
    rows: str | None,
    candidates: int,
    repeats: int,
    out: Path,
    machine: Machine,
    as_json: bool,
) -> None:
    """Show where one cycle's time goes, stage by stage.

    Beside each stage stand the bytes that it must move, and how long that takes here at least. A shape needs no
    download.

    \b
    domino-spec profile --out profile
    domino-spec profile --method domino,domino-tree --num-drafts 4,8 --rows 1,2,4,8,16 --out profile
    domino-spec profile --shape qwen3-8b --context 1024 --device cuda --out profile
    """
    names = comma_separated(methods or "", str, "--method")
    counts = comma_separated(num_drafts or "", int, "--num-drafts")
    sizes = comma_separated(rows or "", int, "--rows")
    _check_source(pair, shape, draft_vocab_size)
    require_extra("bench", "profile")
    machine.prepare(pair.target if shape is None else None)
    from rich.console import Console

    from domino_spec.bench.profile import check_numbers, default_methods, profile_cycles, profile_record
    from domino_spec.bench.profile_report import check_writable, write_profile
    from domino_spec.cli.show import ProgressView

    check_numbers(batch=[batch], repeats=[repeats], rows=sizes, num_drafts=counts)
    check_writable(out)
    made_of: dict[str, Any] = {"shape": shape}
    if shape is None:
        draft_name = pair.draft_for(names or [None])
        target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
        made_of = {"shape": None, "target": pair.target, "draft": draft_name}
    else:
        made_of["draft_vocab_size"] = draft_vocab_size
        target, draft = _made(shape, draft_vocab_size, names, batch, context, machine)
    check_settings(names or default_methods(draft), asked_for("num_drafts", "candidates"))
    asked: list[int | None] = [*counts] or [None]
    wanted = [(name, count) for name in names or default_methods(draft) for count in asked]
    with ProgressView(Console(stderr=True), shown=not as_json) as view:
        found = profile_cycles(
            target,
            draft,
            wanted,
            context=context,
            batch=batch,
            candidates=candidates or None,
            repeats=repeats,
            rows=sizes,
            show=view.show,
        )
    record = profile_record(found, target, made_of)
    text = write_profile(record, out)
    if as_json:
        print_json(record)
    else:
        click.echo(f"{text}\n\nwrote {out / 'profile.md'}, {out / 'profile.json'} and {out / 'profile.png'}")


def _check_source(pair: Pair, shape: str | None, draft_vocab_size: int | None) -> None:
    """A pair or a shape, not both."""
    if shape is not None and (pair.draft is not None or pair.target != DEFAULT_TARGET):
        raise UserError("--shape makes a target and a draft of its own: leave out --target and --draft")
    if shape is None and draft_vocab_size is not None:
        raise UserError("--draft-vocab-size is for the draft that --shape makes")


def _made(
    shape: str, draft_vocab_size: int | None, methods: list[str], batch: int, context: int, machine: Machine
) -> tuple[Target, AnyDraft]:
    """The pair of a shape, refused before anything is allocated if it cannot be measured."""
    import torch

    from domino_spec.bench.profile import check_context
    from domino_spec.bench.roofline import cache_bytes
    from domino_spec.bench.shapes import check_memory, find_shape, make_pair, plan_pair
    from domino_spec.drafters.methods import check_draft

    dtype = "auto" if machine.dtype == "auto" else getattr(torch, machine.dtype)
    plan = plan_pair(find_shape(shape, draft_vocab_size), dtype, machine.device)
    for method in methods:
        check_draft(method, plan.draft)
    check_context(context, 1, plan.text_config.max_position_embeddings, shape)
    caches = cache_bytes(plan.text_config, [plan.draft.config], plan.dtype, batch * context)
    what = f"shape {shape} in {str(plan.dtype).removeprefix('torch.')} with a cache of {batch} x {context} tokens"
    check_memory(plan.weights + caches, plan.device, what)
    with status(f"Making {shape}"):
        return make_pair(plan)
