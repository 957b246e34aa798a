"""tau of any drafting methods on cached answers of the target, without a target pass: the same anchors for all of them.

    python benchmarks/simulated_tau.py --target smollm2-135m \\
        --draft smollm2-135m-domino --draft plain=runs/dflash/draft \\
        --methods domino:8,dflash@plain:8,domino-tree:16,ngram:8 --reference domino:8 \\
        --out runs/simulated --answers answers-t0.jsonl --features features-t0 \\
        --answers answers-t1.jsonl --features features-t1

`domino-spec regenerate` writes the answers; their ids name the suite, as in gsm8k/17. Their features are read from a
cache of any layers that hold the drafts' own, and captured where the directory is new. A method is drafted by the draft
that was made for it, or by the one named after @; what follows the colon is its budget, drafts per proposal. All drafts
are chosen. What is measured is kept per method and answers file, so a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections.abc import Sequence as SequenceType
from pathlib import Path
from typing import Any, NamedTuple

import torch

from domino_spec.api import load_draft
from domino_spec.bench.simulate import load_simulated, render, save_simulated, summarize
from domino_spec.decoding.cycle import Drafter
from domino_spec.draft.load import draft_directory
from domino_spec.drafters.methods import METHODS, choose_draft, make_drafter
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.files import atomic_path, read_json, read_jsonl, write_json
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from domino_spec.training.data import Sequence, load_sequences
from domino_spec.training.evaluate import Simulated, simulate
from domino_spec.training.features import FeatureCache, FeatureSource, capture_features


class Method(NamedTuple):
    """One row of the tables."""

    label: str
    """As given, such as domino-tree:16 or dflash@plain:8."""
    name: str
    """Key of `methods.METHODS`."""
    draft: str | None
    """Which draft; None takes the first of the kind that was made for it."""
    budget: int

    @staticmethod
    def parse(text: str) -> Method:
        """From a label."""
        parts = re.fullmatch(r"([^@:]+)(?:@(.+))?:(\d+)", text)
        if parts is None or int(parts[3]) < 1:
            raise UserError(f"method {text!r} must read name:budget or name@draft:budget, as in domino-tree:16")
        return Method(text, parts[1], parts[2], int(parts[3]))


class Drafting(NamedTuple):
    """A method ready to draft."""

    method: Method
    drafter: Drafter
    digest: str | None
    """Of its draft's files."""


def make(
    methods: SequenceType[Method], drafts: dict[str, str], target: Target, batch: int, ngrams: Path | None
) -> list[Drafting]:
    """Drafters of all methods.

    Raises:
        UserError: a draft cannot be loaded, or none suits a method.
    """
    loaded = {name: load_draft(path, target) for name, path in drafts.items()}
    counts = None if ngrams is None else NgramModel.load(ngrams)
    found = []
    for method in methods:
        if method.draft is not None and method.draft not in loaded:
            raise UserError(f"{method.label}: no --draft is called {method.draft}; there are {', '.join(loaded)}")
        if method.name not in METHODS:
            raise UserError(f"{method.label}: unknown method; known methods are {', '.join(METHODS)}")
        chosen = loaded[method.draft] if method.draft else choose_draft(method.name, [*loaded.values()])
        drafter = make_drafter(
            method.name,
            chosen,
            requests=batch,
            device=target.device,
            num_drafts=method.budget,
            ngrams=counts,
        )
        files = [file for name, draft in loaded.items() if draft is chosen for file in files_of(drafts[name])]
        if method.name == "dart" and ngrams is not None:
            files.append(ngrams)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        found.append(Drafting(method, drafter, digest if files else None))
    return found


def files_of(draft: str) -> list[Path]:
    """What a draft consists of: a retrained one at the same place is another."""
    directory = draft_directory(draft)
    return sorted([directory / "config.json", *directory.glob("*.safetensors")])


def open_features(
    directory: Path, target: Target, answers: list[Sequence], drafting: SequenceType[Drafting]
) -> FeatureSource:
    """The features in a directory, captured with the layers that are read if there are none yet.

    Raises:
        UserError: they are another target's or lack an answer.
    """
    if not (directory / "settings.json").exists():
        layers = sorted({layer for d in drafting for layer in d.drafter.feature_layers})
        return capture_features(target, answers, layers, directory)
    settings = read_json(directory / "settings.json")
    if settings.get("target") != target.fingerprint:
        raise UserError(f"{directory} holds features of another target than {target.name}: give another --features")
    cache = FeatureCache(directory, settings)
    if missing := [a.id for a in answers if a not in cache]:
        raise UserError(
            f"{directory} lacks features of {len(missing)} answers, such as {missing[0]}: give the directory that was "
            "captured from this file, the --max-length of then, or a new directory"
        )
    return cache


def how_answered(path: Path) -> tuple[float, bool | None]:
    """Temperature and thinking mode of a file's answers."""
    rows = read_jsonl(path, {})
    found = {row.get("temperature") for row in rows}
    if len(found) != 1 or not isinstance(temperature := found.pop(), int | float):
        raise UserError(f"{path} must say one temperature in all of its rows, as answers written by regenerate do")
    return float(temperature), rows[0].get("thinking", False)


def measure(drafting: Drafting, answers: list[Sequence], source: FeatureSource, options: Any) -> Simulated:
    """One method on one file of answers, with a word about how fast it was."""
    started, anchors = time.perf_counter(), 0

    def count(more: int) -> None:
        nonlocal anchors
        anchors += more

    found = simulate(
        drafting.drafter,
        answers,
        source,
        num_drafts=drafting.method.budget,
        every=None if options.walk else options.every,
        horizon=options.horizon,
        batch=options.batch,
        device=options.device,
        on_progress=count,
    )
    seconds = time.perf_counter() - started
    print(
        f"{drafting.method.label}: {anchors} anchors in {seconds:.0f} s, {anchors / seconds:.0f} a second", flush=True
    )
    return found


def parse_arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", action="append", default=[], help="Name or path; NAME=PATH gives it a name for @.")
    parser.add_argument("--methods", required=True, help="name:budget or name@draft:budget, separated by commas.")
    parser.add_argument("--ngrams", type=Path, help="N-gram model of method dart.")
    parser.add_argument("--reference", help="Ratios are to this one of --methods; the first if not given.")
    parser.add_argument("--answers", type=Path, action="append", required=True, help="JSONL by regenerate; repeatable.")
    parser.add_argument("--features", type=Path, action="append", required=True, help="One for each --answers.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="Tokens from an anchor to the next.")
    parser.add_argument("--walk", action="store_true", help="Anchors where decoding would stand, for each method.")
    parser.add_argument("--horizon", type=int, default=16, help="Tokens of the answer that follow every anchor.")
    parser.add_argument("--limit", type=int, help="Only the first so many conversations of each file.")
    parser.add_argument("--max-length", type=int, help="Cut texts to so many tokens, as the features' capture did.")
    parser.add_argument("--batch", type=int, default=12, help="Answers drafted for together.")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure what is missing; write report.json and report.md."""
    options = parse_arguments()
    if len(options.features) != len(options.answers):
        raise UserError(f"{len(options.answers)} --answers need as many --features, got {len(options.features)}")
    target = load_target(options.target, device=options.device)
    methods = [Method.parse(text) for text in options.methods.split(",")]
    names = (draft.partition("=") for draft in options.draft)
    drafts = {name: path or name for name, _, path in names}
    drafting = make(methods, drafts, target, options.batch, options.ngrams)
    reference = options.reference or methods[0].label

    report, parts = {}, ["# Simulated tau"]
    for path, features in zip(options.answers, options.features, strict=True):
        length = options.max_length or target.max_length
        temperature, thinking = how_answered(path)
        answers = load_sequences(path, length, target.vocab_size, thinking, options.limit)
        source = open_features(features, target, answers, drafting)
        ids = [a.id for a in answers]
        results = {}
        for one in drafting:
            settings = {
                "target": target.fingerprint,
                "method": one.method.label,
                "draft": one.digest,
                "anchors": "walk" if options.walk else options.every,
                "horizon": options.horizon,
                "temperature": temperature,
                "answers": hashlib.sha256("".join(a.digest for a in answers).encode()).hexdigest()[:16],
            }
            name = re.sub(r"[^\w.+-]", "_", f"T{temperature:g}-{one.method.label}")
            file = options.out / "raw" / f"{name}.jsonl"
            known = load_simulated(ids, settings, file)
            if known is None:
                known = measure(one, answers, source, options)
                save_simulated(known, ids, settings, file)
            results[one.method.label] = known
        report[f"{temperature:g}"] = entries = summarize(results, ids, reference)
        parts += [f"## Temperature {temperature:g}", render(entries, reference)]
    write_json(report, options.out / "report.json")
    text = "\n\n".join(parts) + "\n"
    with atomic_path(options.out / "report.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
