"""One family on trial: its text here, in every way to draft, against the text that transformers writes.

The outcome is `equal` or `refused`; anything else is a failure. A comparison that could not see a fault is one too: a
text of one repeated token says nothing about masks, so random weights are drawn until the text shows what was read.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from domino_spec.drafters.block import BlockDrafter
from domino_spec.drafters.lookup import PlainDecoding, PromptLookup
from domino_spec.settings import UserError
from domino_spec.target.load import load_target
from domino_spec.target.model import Target
from tests import tiny
from tests.sweep import families
from tests.tiny import tree_of

COUNT = 24
SEEDS = 8
PROMPTS = tiny.random_prompts([7, 12])


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    family: str
    kind: str
    """equal, refused, or not tried; or a failure: wrong text, traceback, abort, timeout, blind, not built."""
    detail: str = ""
    """The refusal's line, or the reason of what it is."""
    drafts: str = ""
    """Why a target that decodes refused a Domino draft; empty if it did not."""

    @property
    def passed(self) -> bool:
        return self.kind in ("equal", "refused", "not tried")


def on_cpu(directory: Path) -> Target:
    """A target as users load it."""
    return load_target(directory, device="cpu")


def judge(family: str, load: Callable[[Path], Target] = on_cpu) -> Outcome:
    """Build, save, load and decode one family.

    Args:
        family: one of `families.families()`.
        load: gives the target of a directory.
    """
    blind = ""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that messages name the family, not a directory that is another one each time
        directory = Path(family)
        for weights, seed in itertools.product(families.WEIGHTS, range(SEEDS)):
            try:
                families.tiny_model(family, seed, weights).save_pretrained(directory)
                # Composite models of which only the text part was made are loaded by the name of the whole.
                families.tiny_config(family).save_pretrained(directory)
                tiny.word_tokenizer().save_pretrained(directory)
            except Exception:
                if family in families.NOT_TRIED:
                    return Outcome(family, "not tried", families.NOT_TRIED[family])
                return Outcome(family, "not built", last_lines(traceback.format_exc()))
            try:
                target = load(directory)
            except UserError as error:
                return refusal(family, error)
            except Exception:
                return Outcome(family, "traceback", last_lines(traceback.format_exc()))
            try:
                theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
                texts = [greedy_text(theirs, prompt) for prompt in PROMPTS]
                blind = blindness(theirs, texts)
            except Exception:
                return Outcome(
                    family, "not built", f"transformers writes no text: {last_lines(traceback.format_exc())}"
                )
            if not blind:
                return compare(family, target, theirs, texts)
    return Outcome(family, "blind", blind)


def compare(family: str, target: Target, theirs: PreTrainedModel, texts: list[list[int]]) -> Outcome:
    """Decode with every drafter and compare."""
    whole = [prompt + text + [0] * 8 for prompt, text in zip(PROMPTS, texts, strict=True)]
    drafters: dict[str, Callable] = {
        "plain": PlainDecoding,
        "ngram": PromptLookup,
        "known text": lambda: tiny.Oracle(whole, 5),
        "known text in a tree": lambda: tiny.TreeOracle(whole, 9),
    }
    try:
        if difference := logits_difference(target, theirs):
            return Outcome(family, "wrong text", f"logits differ by {difference:.1e} of the largest")
        drafts = ""
        try:
            draft = tiny.tiny_draft(target)
        except UserError as error:
            drafts = one_line(family, error)
        else:
            drafters["domino"] = lambda: BlockDrafter(draft)
            drafters["domino-tree"] = lambda: tree_of(BlockDrafter(draft), 11)
        for name, make in drafters.items():
            try:
                generations = tiny.run(target, make(), PROMPTS, COUNT)
            except UserError as error:
                if name != "plain":
                    raise
                return refusal(family, error)  # not the target, but texts of this length
            for request, (generation, text) in enumerate(zip(generations, texts, strict=True)):
                if generation.token_ids != text:
                    at = next(i for i in range(COUNT + 1) if generation.token_ids[: i + 1] != text[: i + 1])
                    return Outcome(family, "wrong text", f"{name}: request {request} differs from token {at} on")
    except UserError as error:
        return Outcome(family, "traceback", f"refused after plain decoding: {error}")
    except Exception:
        return Outcome(family, "traceback", last_lines(traceback.format_exc()))
    return Outcome(family, "equal", drafts=drafts)


@torch.inference_mode()
def logits_difference(target: Target, theirs: PreTrainedModel) -> float:
    """By how much logits differ, relative to the largest; 0 if by rounding.

    Greedy texts do not show a cap or a factor of logits; sampling and the server's probabilities do.
    """
    tokens = torch.tensor(PROMPTS[1:])
    ours = target.lm_head(target.forward(tokens, target.new_cache(1, tokens.shape[1])).hidden)
    expected = theirs(tokens).logits
    difference = ((ours - expected).abs().max() / expected.abs().max()).item()
    return 0.0 if difference < 1e-3 else difference


def refusal(family: str, error: UserError) -> Outcome:
    """A refusal, which must be one line."""
    if "\n" in str(error):
        return Outcome(family, "traceback", f"a refusal of several lines: {error}")
    return Outcome(family, "refused", one_line(family, error))


def one_line(family: str, error: UserError) -> str:
    """What an error says without the name of the target."""
    return str(error).removeprefix(f"{family}: ").removeprefix(f"{family} is not supported: ")


@torch.inference_mode()
def greedy_text(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """What transformers writes after one prompt with its own attention."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT)
    return out[0, len(prompt) :].tolist()


def blindness(model: PreTrainedModel, texts: list[list[int]]) -> str:
    """Why a comparison of these texts would see nothing; empty if it sees."""
    for prompt, text in zip(PROMPTS, texts, strict=True):
        if len(text) != COUNT:
            return f"the text ends after {len(text)} tokens"
        if len(set(text)) < 4:
            return f"the text has only {len(set(text))} different tokens"
        half = len(prompt) // 2
        changed = [(token + 1) % (tiny.VOCAB - 2) for token in prompt[:half]] + prompt[half:]
        if greedy_text(model, changed) == text:
            return "the text does not depend on the first half of the prompt"
    return ""


def last_lines(trace: str) -> str:
    """The error and the innermost places of a traceback, on one line."""
    lines = [line.strip() for line in trace.splitlines() if line.strip(" ^~")]
    places = [line.split('"')[1:] for line in lines if line.startswith('File "')][-3:]
    named = [f"{file.rpartition('site-packages/')[2]}{rest.rpartition(', in')[0]}" for file, rest in places]
    errors = [line for line in lines if not line.startswith('File "')]
    return f"{errors[-1][:300]} [{' < '.join(reversed(named))}]"
