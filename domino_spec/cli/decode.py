"""Commands that decode: generate, demo."""

from __future__ import annotations

from typing import Any

import click

from domino_spec.cli.group import cli, console, print_json, read_prompt, say_nothing_is_drafted, status
from domino_spec.cli.options import (
    FINITE,
    SETTINGS,
    Counts,
    Machine,
    Pair,
    asked_for,
    candidates_option,
    counts_options,
    json_option,
    machine_options,
    max_new_tokens_option,
    method_option,
    num_drafts_option,
    pair_options,
)
from domino_spec.drafters.methods import METHODS, check_settings, default_method, why_nothing_is_drafted
from domino_spec.settings import UserError


@cli.command()
@click.argument("prompt", required=False)
@pair_options
@method_option()
@max_new_tokens_option(default=256)
@click.option("--temperature", type=FINITE, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=FINITE, default=1.0, help="Keep the likeliest tokens that together reach this.")
@click.option("--top-k", type=int, default=0, help="Keep this many of the likeliest tokens; 0 keeps all.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@num_drafts_option
@candidates_option
@counts_options
@click.option("--draft-vocab-size", type=int, help="Draft only the so many most frequent tokens of --ranking.")
@click.option("--min-confidence", type=FINITE, help="End a draft where its token is less probable; measured default.")
@click.option("--sample-drafts/--argmax-drafts", default=None, help="Above temperature 0, sample drafts, or not.")
@click.option("--exact", is_flag=True, help="Refuse a target whose verify pass may round otherwise than plain steps.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--show-drafts", is_flag=True, help="Set drafted and accepted text apart from what the target supplied.")
@machine_options
@json_option
def generate(
    prompt: str | None,
    pair: Pair,
    method: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    num_drafts: int | None,
    candidates: int,
    counts: Counts,
    draft_vocab_size: int | None,
    min_confidence: float | None,
    sample_drafts: bool | None,
    exact: bool,
    raw: bool,
    show_drafts: bool,
    machine: Machine,
    as_json: bool,
) -> None:
    """Answer PROMPT ("-" is standard input), printed as it is written.

    \b
    domino-spec generate "Why is the sky blue?" --show-drafts
    domino-spec generate - --method ngram --json < question.txt
    """
    prompt = read_prompt(prompt)
    machine.prepare(pair.target)
    from domino_spec.api import stream
    from domino_spec.cli.show import AnswerWriter, MarkedText, generation_record
    from domino_spec.decoding.request import Generation, Limits
    from domino_spec.decoding.sampling import SamplingSettings
    from domino_spec.draft.vocabulary import restricted
    from domino_spec.target.text import check_characters

    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_characters(prompt, "the prompt")
    Limits(max_new_tokens, stop)  # what is wrong with these is said before a model is loaded
    draft_name = pair.draft_for((method,))
    target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
    ranking, ngrams = counts.load(target)
    if ranking is None and draft_vocab_size is not None:
        raise UserError("--draft-vocab-size needs tokens ranked by frequency: --ranking FILE")
    if ranking is not None:
        if draft is None:
            raise UserError("--ranking cuts a draft's vocabulary, and there is no draft: leave it out, or give --draft")
        draft = restricted(draft, ranking, draft_vocab_size, target)
    asked, method = method is not None, method or default_method(draft, sample_drafts=sample_drafts)
    check_settings([method], asked_for(*SETTINGS))
    drafting_off = why_nothing_is_drafted(method, asked, num_drafts)
    generations: list[Generation] = []
    cycles = stream(
        target,
        draft,
        [prompt],
        method=method,
        settings=settings,
        max_new_tokens=max_new_tokens,
        stop=stop,
        num_drafts=num_drafts,
        candidates=candidates or None,
        min_confidence=min_confidence,
        sample_drafts=sample_drafts,
        exact=exact,
        ngrams=ngrams,
        chat=not raw,
        generations=generations,
    )
    text, writer = MarkedText(target, stop), None
    for cycle, _ in enumerate(cycles):
        if cycle == 0 and drafting_off is not None:  # once it is known that there is no error to be said instead
            say_nothing_is_drafted(drafting_off, asked or num_drafts == 0)
        if not as_json:
            writer = writer or AnswerWriter(console(), show_drafts)
            writer.write(text.advance(generations[0]))
    if writer is not None:
        writer.finish(generations[0])
    else:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        print_json({**generation_record(generations[0], target, draft_name, method, drafting_off), **sampling})


@cli.command()
@pair_options
@method_option([name for name in METHODS if name != "none"])
@click.option("--prompt", multiple=True, help="Ask this instead of the demo's own prompts; may be repeated.")
@max_new_tokens_option(default=96)
@num_drafts_option
@machine_options
@json_option
def demo(
    pair: Pair,
    method: str | None,
    prompt: tuple[str, ...],
    max_new_tokens: int,
    num_drafts: int | None,
    machine: Machine,
    as_json: bool,
) -> None:
    """Race the target alone against the target with a draft.

    Both answer the same prompts, side by side, with live counters; the last line gives the speed-up.

    \b
    domino-spec demo
    domino-spec demo --prompt "Tell me about the moon." --max-new-tokens 200
    """
    machine.prepare(pair.target)
    from domino_spec.cli.race import PROMPTS, race, warm_up
    from domino_spec.cli.show import RaceView, races_record, summary
    from domino_spec.decoding.request import Limits
    from domino_spec.target.text import check_characters

    Limits(max_new_tokens)
    for text in prompt:
        check_characters(text, "--prompt")
    draft_name = pair.draft_for((method,))
    target, draft = machine.load(pair.target, draft_name, pair.allow_other_target)
    options: dict[str, Any] = {"method": method, "num_drafts": num_drafts}
    with status("Warming up"):
        warm_up(target, draft, **options)
    terminal, results = console(shown=not as_json), []
    for text in prompt or PROMPTS:
        with RaceView(terminal, text, max_new_tokens) as view:
            results.append(race(target, draft, text, max_new_tokens=max_new_tokens, on_cycle=view.update, **options))
        view.report(target, results[-1])
    if as_json:
        print_json(races_record(results, target, draft_name))
    elif len(results) > 1:
        terminal.print(summary(results))
