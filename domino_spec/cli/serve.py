"""The command that serves: an OpenAI-compatible endpoint on this package's engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from domino_spec.cli.group import cli
from domino_spec.config import UserError
from domino_spec.demo.options import METHODS, Machine, Pair, candidates_option, machine_options, pair_options

NEEDED = ("starlette", "uvicorn", "prometheus_client")


@cli.command()
@pair_options
@click.option("--method", type=click.Choice(METHODS), help="How to draft; the draft's own method by default.")
@click.option("--num-drafts", type=int, help="Drafts per cycle, always; by default what pays, chosen every cycle.")
@candidates_option
@click.option("--costs", type=Path, help="Where the measured costs of passes are kept between starts (JSON).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Other than loopback needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--served-model-name", help="The model's name in requests; the target's by default.")
@click.option("--slots", type=int, default=8, show_default=True, help="Requests that are decoded together.")
@click.option("--capacity", type=int, help="Tokens of prompt and answer per slot; the target's, 4096 at most.")
@click.option(
    "--prefix-cache", type=click.IntRange(0), default=1024, show_default=True, help="MiB for earlier turns; 0 for none."
)
@click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds per request; 0 for any.")
@click.option("--drain-seconds", type=float, default=30.0, show_default=True, help="For running requests at the end.")
@click.option("--api-key", envvar="DOMINO_SPEC_API_KEY", help="Clients must send it; DOMINO_SPEC_API_KEY is safer.")
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Web pages that may ask.")
@machine_options
def serve(
    pair: Pair,
    method: str | None,
    num_drafts: int | None,
    candidates: int,
    costs: Path | None,
    host: str,
    port: int,
    served_model_name: str | None,
    slots: int,
    capacity: int | None,
    prefix_cache: int,
    max_queue: int,
    timeout: float,
    drain_seconds: float,
    api_key: str | None,
    cors_origins: tuple[str, ...],
    machine: Machine,
) -> None:
    """Answer OpenAI's API until Ctrl-C, many requests at once.

    The routes are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. `--draft none` serves the
    target alone.

    \b
    domino-spec serve
    domino-spec serve --target Qwen/Qwen3-4B --draft my-draft --slots 16 --port 8080
    """
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        raise UserError(f"serve needs three more packages: pip install {' '.join(NEEDED)}")
    if timeout < 0 or drain_seconds < 0:
        raise UserError("--timeout and --drain-seconds must not be negative")
    if method is None and pair.draft == "none":
        method = "none"
    draft_name = pair.draft_for((method,))
    machine.prepare()
    from domino_spec.serving.app import Service, Settings
    from domino_spec.serving.server import Server, bind, make_engine, url

    bound = bind(host, port, api_key)  # before anything is loaded: a port may be taken
    target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
    engine = make_engine(
        target,
        draft,
        slots=slots,
        capacity=capacity,
        method=method,
        num_drafts=num_drafts,
        candidates=candidates or None,
        costs_file=costs,
        prefix_bytes=prefix_cache * 2**20,
        report=_report,
    )
    settings = Settings(
        model=served_model_name or pair.target,
        max_queue=max_queue,
        timeout=timeout or None,
        api_key=api_key or None,
        cors_origins=cors_origins,
    )

    def say_where() -> None:
        click.echo(f"{settings.model} is served at {url(bound)}/v1 (Ctrl-C ends it)")

    Server(Service(engine, settings), drain_seconds=drain_seconds, on_ready=say_where).serve_forever(bound)


def _report(line: str) -> None:
    click.echo(f"domino-spec: {line}", err=True)
