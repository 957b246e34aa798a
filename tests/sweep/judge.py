"""One family on trial: its text here, in every way to draft, against the text that transformers writes."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from domino_spec.config import UserError
from domino_spec.drafters.domino import BlockDrafter
from domino_spec.drafters.domino_tree import TreeDrafter
from domino_spec.drafters.ngram import PromptLookup
from domino_spec.drafters.plain import PlainDecoding
from domino_spec.target.load import load_target
from tests import tiny
from tests.sweep import families

COUNT = 24
SEEDS = 8
"""Random models of each kind to try until one's text shows what it has read."""
PROMPTS = tiny.random_prompts([7, 12])

PASSING = ("equal", "refused")


@dataclass(frozen=True)
class Outcome:
    """What became of one family."""

    family: str
    kind: str
    """equal, refused; or a failure: wrong text, traceback, abort, timeout, not built, blind."""
    detail: str = ""
    """The refusal's line, or what went wrong."""
    drafts: str = ""
    """Why a Domino draft was refused for a target that decodes without one; empty where none was."""

    @property
    def passed(self) -> bool:
        return self.kind in PASSING


def judge(family: str) -> Outcome:
    """Build, save, load and decode one family."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        try:
            for sharp, seed in itertools.product((False, True), range(SEEDS)):
                families.tiny_model(family, seed, sharp).save_pretrained(directory)
                theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
                texts = [greedy_text(theirs, prompt) for prompt in PROMPTS]
                if not (blind := blindness(theirs, texts)):
                    break
            tiny.word_tokenizer().save_pretrained(directory)
        except Exception:
            return Outcome(family, "not built", last_lines(traceback.format_exc()))
        if blind:
            return Outcome(family, "blind", blind)
        try:
            return compare(family, directory, texts)
        except Exception:
            return Outcome(family, "traceback", last_lines(traceback.format_exc()))


def compare(family: str, directory: Path, texts: list[list[int]]) -> Outcome:
    """Decode with every drafter and compare."""
    try:
        target = load_target(directory, device="cpu")
    except UserError as error:
        return refusal(family, error)
    whole = [prompt + text + [0] * 8 for prompt, text in zip(PROMPTS, texts, strict=True)]
    drafters = {
        "plain": lambda: PlainDecoding(),
        "ngram": lambda: PromptLookup(),
        "known text": lambda: tiny.Oracle(whole, 5),
        "known text in a tree": lambda: tiny.TreeOracle(whole, 9),
    }
    refused = ""
    try:
        draft = tiny.tiny_draft(target)
    except UserError as error:
        refused = str(error)
    else:
        drafters["domino"] = lambda: BlockDrafter(draft)
        drafters["domino-tree"] = lambda: TreeDrafter(BlockDrafter(draft), 11)
    for name, make in drafters.items():
        try:
            got = [g.token_ids for g in tiny.run(target, make(), PROMPTS, COUNT)]
        except UserError as error:
            if name == "plain":
                return refusal(family, error)
            return Outcome(family, "traceback", f"{name}: UserError after plain decoding worked: {error}")
        except Exception:
            return Outcome(family, "traceback", f"{name}: {last_lines(traceback.format_exc())}")
        for r, (ours, text) in enumerate(zip(got, texts, strict=True)):
            if ours != text:
                at = next((i for i, (a, b) in enumerate(zip(ours, text, strict=False)) if a != b), len(ours))
                return Outcome(family, "wrong text", f"{name}: request {r} differs from token {at} on")
    return Outcome(family, "equal", drafts=refused)


def refusal(family: str, error: UserError) -> Outcome:
    """A refusal counts if it is one line."""
    text = str(error)
    if "\n" in text.strip():
        return Outcome(family, "traceback", f"a refusal of several lines: {text}")
    return Outcome(family, "refused", text)


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
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip() and set(line.strip()) - set("^~ ")]
    places = [line for line in lines if line.startswith("File ")][-3:]
    places = [line.replace('File "', "").replace('"', "").split("site-packages/")[-1] for line in places]
    errors = [line for line in lines if not line.startswith("File ")]
    return f"{errors[-1][:300]}  [{' < '.join(reversed(places))}]"
