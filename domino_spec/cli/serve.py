"""The command that serves: an OpenAI-compatible endpoint on this package's engine, on vLLM or on SGLang."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import click

from domino_spec.cli.group import cli, print_json
from domino_spec.cli.options import (
    FINITE,
    SETTINGS,
    Machine,
    Pair,
    asked_for,
    candidates_option,
    collected,
    json_option,
    machine_options,
    method_option,
    pair_options,
)
from domino_spec.drafters.methods import check_settings, default_method, why_nothing_is_drafted
from domino_spec.settings import UserError, require_extra

LOCAL = "local"
MOST_SECONDS = 1_000_000


@dataclass(frozen=True)
class Endpoint:
    """What is served and where, for every engine."""

    host: str
    port: int
    served_model_name: str | None
    slots: int
    capacity: int | None
    num_drafts: int | None
    candidates: int
    api_key: str | None


@dataclass(frozen=True)
class Local:
    """Options of this package's engine alone."""

    method: str | None
    costs: Path | None
    prefix_cache: int
    graphs: bool
    max_queue: int
    timeout: float
    drain_seconds: float
    cors_origins: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """Everything that the command was given."""

    pair: Pair
    draft: str | None
    """The draft's name, the default one included; None for the target alone."""
    method: str | None
    """None for the draft's default method."""
    engine: str
    endpoint: Endpoint
    local: Local
    machine: Machine


endpoint_options = collected(
    Endpoint,
    "endpoint",
    click.option("--host", default="127.0.0.1", show_default=True, help="Other than loopback needs an API key."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
    click.option("--served-model-name", help="The model's name in requests; the target's by default."),
    click.option("--slots", type=int, default=8, show_default=True, help="Requests that are decoded together."),
    click.option("--capacity", type=int, help="Tokens of prompt and answer per slot; the target's, 4096 at most."),
    click.option("--num-drafts", type=int, help="Drafts per cycle, always; by default what pays, chosen every cycle."),
    candidates_option,
    click.option("--api-key", envvar="DOMINO_SPEC_API_KEY", help="Clients must send it; DOMINO_SPEC_API_KEY is safer."),
)
local_options = collected(
    Local,
    "local",
    method_option(),
    click.option("--costs", type=Path, help="Where the measured costs of passes are kept between starts (JSON)."),
    click.option(
        "--prefix-cache",
        type=click.IntRange(0),
        default=1024,
        show_default=True,
        help="MiB for earlier turns; 0 for none.",
    ),
    click.option("--graphs", is_flag=True, help="Capture whole cycles as CUDA graphs (new: no GPU has run it yet)."),
    click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Requests that may wait."),
    click.option("--timeout", type=FINITE, default=600.0, show_default=True, help="Seconds per request; 0 for any."),
    click.option(
        "--drain-seconds", type=FINITE, default=30.0, show_default=True, help="For running requests at the end."
    ),
    click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Web pages that may ask."),
)


@cli.command()
@pair_options
@click.option(
    "--engine",
    type=click.Choice([LOCAL, "vllm", "sglang"]),
    default=LOCAL,
    show_default=True,
    help="What decodes: this package, or an engine installed beside it.",
)
@click.option("--check", "only_check", is_flag=True, help="Say whether it will work, from headers alone, and end.")
@click.option("--print", "only_print", is_flag=True, help="Print the engine's command line, and end.")
@endpoint_options
@local_options
@machine_options
@json_option
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def serve(
    context: click.Context,
    pair: Pair,
    engine: str,
    only_check: bool,
    only_print: bool,
    endpoint: Endpoint,
    local: Local,
    machine: Machine,
    as_json: bool,
    engine_arguments: tuple[str, ...],
) -> None:
    """Answer OpenAI's API until Ctrl-C, many requests at once.

    The routes are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. `--draft none` serves the
    target alone. Arguments behind `--` go to vLLM or SGLang as they are.

    \b
    domino-spec serve
    domino-spec serve --target Qwen/Qwen3-4B --draft my-draft --slots 16 --port 8080
    domino-spec serve --target Qwen/Qwen3-4B --draft my-draft --check
    domino-spec serve --engine vllm --target Qwen/Qwen3-4B --draft my-draft -- --gpu-memory-utilization 0.8
    """
    _check_options(context, engine, engine_arguments, only_print=only_print, as_json=as_json, only_check=only_check)
    # `--draft none` means method none, for which the default target's draft is not looked up.
    method = "none" if local.method is None and pair.draft == "none" else local.method
    asked = Asked(pair, pair.draft_for((method,)), method, engine, endpoint, local, machine)
    if engine == LOCAL:
        require_extra("serve", "serve")
    machine.prepare(pair.target)
    drafting_off = _check_values(asked)
    if only_check:
        _check(asked, as_json)
    elif engine == LOCAL:
        _serve_here(asked, drafting_off)
    else:
        _serve_elsewhere(asked, engine_arguments, only_print)


def _check_options(
    context: click.Context,
    engine: str,
    engine_arguments: tuple[str, ...],
    *,
    only_print: bool,
    only_check: bool,
    as_json: bool,
) -> None:
    """Refuse what would be ignored."""
    if engine == LOCAL:
        if engine_arguments:
            raise UserError(
                f"unexpected argument {engine_arguments[0]}; arguments behind -- are for --engine vllm|sglang"
            )
        if only_print:
            raise UserError("--print shows the command line of another engine: give --engine vllm or sglang")
    else:
        for field in fields(Local):
            if asked_for(field.name) and not (field.name == "method" and context.params.get("method") == "none"):
                option = "--" + {"cors_origins": "cors-origin"}.get(field.name, field.name.replace("_", "-"))
                raise UserError(f"{option} is for this package's engine, not for --engine {engine}")
    if as_json and not only_check:
        raise UserError("--json goes with --check")
    if only_print and only_check:
        raise UserError("--print and --check are two things: give one")


def _check_values(asked: Asked) -> str | None:
    """Refuse values that cannot be served, before anything is loaded; returns why nothing is drafted, or None."""
    from domino_spec.devices import choose_device
    from domino_spec.serve.preflight import bind, check_api_key, check_host, check_slots
    from domino_spec.target.text import check_characters

    endpoint, local, method = asked.endpoint, asked.local, asked.method
    texts = [("host", endpoint.host), ("served-model-name", endpoint.served_model_name), ("api-key", endpoint.api_key)]
    for name, text in (*texts, *(("cors-origin", origin) for origin in local.cors_origins)):
        check_characters(text or "", f"--{name}")
    check_host(endpoint.host)
    check_api_key(endpoint.host, endpoint.api_key)
    if endpoint.num_drafts is not None and endpoint.num_drafts < 0:
        raise UserError(f"num_drafts must not be negative, got {endpoint.num_drafts}")
    if asked.engine == LOCAL or endpoint.slots < 1:  # another engine may take more
        check_slots(endpoint.slots)
    if asked.engine != LOCAL:
        return None
    for option, seconds in (("--timeout", local.timeout), ("--drain-seconds", local.drain_seconds)):
        if not 0 <= seconds <= MOST_SECONDS:
            raise UserError(f"{option} must be between 0 and {MOST_SECONDS:,} seconds, got {seconds:g}")
    bind(endpoint.host, 0, endpoint.api_key).close()  # the port itself may be another server's until this one starts
    if local.graphs and choose_device(asked.machine.device).type != "cuda":
        raise UserError("--graphs captures CUDA graphs, and this is no CUDA device")
    if method is None and asked.draft is None:
        method = "none"
    if method is not None:  # else it is the draft's default
        check_settings([method], asked_for(*SETTINGS))
    drafting_off = why_nothing_is_drafted(method or "", asked=local.method is not None, num_drafts=endpoint.num_drafts)
    if local.costs is None:
        return drafting_off
    if drafting_off is not None:
        raise UserError("--costs keeps what drafting costs, and nothing is drafted: leave it out")
    if endpoint.num_drafts is not None:
        raise UserError("--costs is for choosing the number of drafts, which --num-drafts fixes: leave one of them out")
    from domino_spec.serve.server import read_costs

    read_costs(local.costs)
    return drafting_off


def _check(asked: Asked, as_json: bool) -> None:
    """Print what is found part by part; what stands in the way is the error."""
    from domino_spec.serve.preflight import Plan, preflight

    endpoint, machine = asked.endpoint, asked.machine
    every_candidate = asked.engine == "sglang" and not asked_for("candidates")
    findings = preflight(
        Plan(
            engine=asked.engine,
            target=asked.pair.target,
            draft=asked.draft,
            method=asked.method,
            device=machine.device,
            dtype=machine.dtype,
            slots=endpoint.slots,
            capacity=endpoint.capacity,
            candidates=None if every_candidate else endpoint.candidates or None,
            num_drafts=endpoint.num_drafts,
            prefix_bytes=asked.local.prefix_cache * 2**20,
            allow_other_target=asked.pair.allow_other_target,
            settings=tuple(asked_for(*SETTINGS)),
        )
    )
    faults = [finding for finding in findings if not finding.works]
    if as_json:
        parts = [{"part": f.part, "works": f.works, "sentence": f.sentence} for f in findings]
        print_json({"works": not faults, "findings": parts})
    else:
        for finding in findings:
            click.echo(f"{finding.part:<8} {finding.sentence}")
    if faults:
        raise UserError(f"it will not work: {faults[0].sentence}")
    if not as_json:
        click.echo("It will work.")


def _serve_elsewhere(asked: Asked, engine_arguments: tuple[str, ...], only_print: bool) -> None:
    """Print another engine's command line and, unless that was all, become it."""
    from domino_spec.draft.load import draft_directory, read_any_draft
    from domino_spec.engines import launch
    from domino_spec.target.load import target_source

    pair, engine, endpoint, machine = asked.pair, asked.engine, asked.endpoint, asked.machine
    directory = None if asked.draft is None else draft_directory(asked.draft)
    draft = None if directory is None else read_any_draft(directory, outline=True)
    settings = launch.Settings(
        host=endpoint.host,
        port=endpoint.port,
        model_name=endpoint.served_model_name or pair.target,
        slots=endpoint.slots if asked_for("slots") else None,
        capacity=endpoint.capacity,
        dtype=machine.dtype,
        candidates=endpoint.candidates if asked_for("candidates") else None,
        allow_other_target=pair.allow_other_target,
        api_key=endpoint.api_key or None,
        device=machine.device,
        threads=machine.threads,
        extra=engine_arguments,
    )
    if draft is None and asked_for("num_drafts", "candidates"):
        raise UserError("--num-drafts and --candidates are for a draft, and there is none: leave them out")
    num_drafts = launch.check_served(engine, draft, endpoint.num_drafts)
    command = launch.launch(engine, target_source(pair.target), directory, num_drafts, settings)
    if not only_print:
        launch.installed_version(engine)
    if pair.draft is None and draft is None:
        _report("nothing is drafted: no draft was given (--draft none says that it is meant)")
    click.echo(command.line)
    if not only_print:
        command.run()


def _serve_here(asked: Asked, drafting_off: str | None) -> None:
    """Serve on this package's engine until a signal ends it."""
    from domino_spec.serve.app import Service, Settings
    from domino_spec.serve.preflight import bind, url
    from domino_spec.serve.server import Server, make_engine

    pair, endpoint, local = asked.pair, asked.endpoint, asked.local
    bound = bind(endpoint.host, endpoint.port, endpoint.api_key)  # before anything is loaded: a port may be taken
    target, draft = asked.machine.load(pair.target, asked.draft, pair.allow_other_target)
    method = local.method or default_method(draft)
    check_settings([method], asked_for(*SETTINGS))
    if drafting_off is not None:
        _report(f"nothing is drafted: {drafting_off}")
    engine = make_engine(
        target,
        draft,
        slots=endpoint.slots,
        capacity=endpoint.capacity,
        method=method,
        num_drafts=endpoint.num_drafts,
        candidates=endpoint.candidates or None,
        costs_file=local.costs,
        prefix_bytes=local.prefix_cache * 2**20,
        static=local.graphs,
        report=_report,
    )
    settings = Settings(
        model=endpoint.served_model_name or pair.target,
        max_queue=local.max_queue,
        timeout=local.timeout or None,
        api_key=endpoint.api_key or None,
        cors_origins=local.cors_origins,
        method=method,
        drafting_off=drafting_off,
    )

    def say_where() -> None:
        click.echo(f"{settings.model} is served at {url(bound)}/v1 (Ctrl-C ends it)")

    Server(Service(engine, settings), drain_seconds=local.drain_seconds, on_ready=say_where).serve_forever(bound)


def _report(line: str) -> None:
    click.echo(f"domino-spec: {line}", err=True)
