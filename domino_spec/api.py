"""The Python API: `load_draft`, and `generate` for texts, chats and token ids, with any drafting method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from domino_spec.decoding.engine import decode
from domino_spec.decoding.request import DraftWatch, Generation, Limits
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.draft import load as draft_loading
from domino_spec.draft.config import DEFAULT_CANDIDATES
from domino_spec.draft.load import AnyDraft
from domino_spec.drafters.methods import default_method, make_drafter, watch_for
from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.integrations.transformers import calling_streamer, check_same_model, generate_with
from domino_spec.settings import UserError, found, require
from domino_spec.target.check import check_target, read_reference
from domino_spec.target.model import Target
from domino_spec.target.text import Message, encode_prompt

Prompt = str | Sequence[Message] | Sequence[int] | torch.Tensor


def default_min_confidence(device: torch.device) -> float:
    """The confidence below which a draft is not worth its row of a verify pass, by measurement (docs/log.md)."""
    return 0.05 if device.type == "cpu" else 0.0


def load_draft(
    name_or_path: str | Path,
    target: Target | PreTrainedModel,
    *,
    dtype: torch.dtype | str = "auto",
    allow_other_target: bool = False,
) -> AnyDraft:
    """Load a draft for a target, ready for `generate` and for transformers' own `generate`.

    Args:
        name_or_path: the shipped draft's name, a directory, or a hub id.
        target: from `load_target`, or an ordinary transformers model, whose `generate` then takes
            `custom_generate=draft.custom_generate` (streamers included).
        dtype: "auto" takes the target's.
        allow_other_target: accept a draft trained for other weights of the same shape (a fine-tuned target).

    Raises:
        UserError: the draft does not exist, cannot be read, or was made for another target; or an ordinary model's
            outputs in this package's passes differ from those of its own (`target/check.py`).
    """
    if isinstance(target, PreTrainedModel):
        target = Target(target, None, target.name_or_path or type(target).__name__)
        check_target(target, read_reference(target))
    draft = draft_loading.load_draft(name_or_path, target, dtype=dtype, allow_other_target=allow_other_target)
    draft.custom_generate = _custom_generate(draft, target)
    return draft


def _custom_generate(draft: AnyDraft, target: Target) -> Callable[..., torch.Tensor]:
    watch = watch_for(default_method(draft))

    def custom_generate(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> torch.Tensor:
        # Naming attention_mask as a parameter would make transformers pass it twice.
        check_same_model(model, target)
        drafter = make_drafter(
            default_method(draft),
            draft,
            requests=len(input_ids),
            device=target.device,
            min_confidence=default_min_confidence(target.device),
        )
        return generate_with(
            drafter,
            target,
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            attention_mask=model_kwargs.get("attention_mask"),
            streamer=calling_streamer(),
            watch=watch,
        )

    return custom_generate


def prompt_ids(
    target: Target, prompt: Prompt, *, chat: bool = True, enable_thinking: bool = False, name: str = "the prompt"
) -> list[int]:
    """Token ids of a text, a chat or token ids; `name` is what error texts call the prompt.

    Raises:
        UserError: a prompt that is empty or of another kind, or text for a target without a tokenizer.
    """
    if isinstance(prompt, torch.Tensor):
        whole = not (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool)
        shape = f"a tensor of {prompt.dtype} and shape {tuple(prompt.shape)}"
        require(prompt.dim() == 1 and whole, f"{name}: expected a list of token ids, found {shape}")
        prompt = prompt.tolist()
    if not isinstance(prompt, str):
        kinds = "text, chat messages or token ids"
        require(isinstance(prompt, Sequence) and not isinstance(prompt, bytes), _expected(name, kinds, prompt))
        require(len(prompt) > 0, f"{name} is empty: give {kinds}")
        if not all(isinstance(part, Mapping) for part in prompt):
            return [_token_id(target, part, f"{name}[{i}]") for i, part in enumerate(prompt)]
    if target.tokenizer is None:
        raise UserError("this target has no tokenizer: give prompts as token ids")
    return encode_prompt(target.tokenizer, prompt, chat=chat, enable_thinking=enable_thinking)  # type: ignore[arg-type]


def _token_id(target: Target, value: Any, name: str) -> int:
    if not _is_number(value, Integral):
        raise UserError(_expected(name, "a token id", value))
    if not 0 <= value < target.vocab_size:
        raise UserError(_expected(name, f"a token id below the vocabulary's {target.vocab_size:,}", value))
    return int(value)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _expected(name: str, kind: str, value: object) -> str:
    return f"{name}: expected {kind}, found {found(value)}"


_NUMBERS: dict[str, tuple[str, type, bool]] = {
    "max_new_tokens": ("an integer", Integral, False),
    "top_k": ("an integer", Integral, False),
    "seed": ("an integer", Integral, False),
    "num_drafts": ("an integer", Integral, True),
    "candidates": ("an integer", Integral, True),
    "temperature": ("a number", Real, False),
    "top_p": ("a number", Real, False),
    "min_confidence": ("a number", Real, True),
}
"""Arguments of `stream` that are numbers: what is expected, its type, and whether None is allowed."""


def _check_types(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `stream` of a wrong type; their ranges are checked where they are used.

    Raises:
        UserError: naming the first of them.
    """
    for name, (kind, number, may_be_none) in _NUMBERS.items():
        value = given[name]
        if not _is_number(value, number) and not (may_be_none and value is None):
            raise UserError(_expected(name, kind, value))
    for name, kind in (("prompts", "a list of prompts"), ("stop", "a list of texts")):
        if isinstance(given[name], (str, bytes)) or not isinstance(given[name], Sequence):
            raise UserError(f"{_expected(name, kind, given[name])}; put it in a list")
    for i, text in enumerate(given["stop"]):
        if not isinstance(text, str):
            raise UserError(_expected(f"stop[{i}]", "a text", text))
    if not len(given["prompts"]):
        raise UserError("no prompt given")


def stream(
    target: Target,
    draft: AnyDraft | None,
    prompts: Sequence[Prompt],
    *,
    method: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    num_drafts: int | None = None,
    candidates: int | None = DEFAULT_CANDIDATES,
    sample_drafts: bool | None = None,
    min_confidence: float | None = None,
    matching_rule: bool = False,
    exact: bool = False,
    ngrams: NgramModel | None = None,
    settings: SamplingSettings | None = None,
    chat: bool = True,
    enable_thinking: bool = False,
    generations: list[Generation] | None = None,
    watch: DraftWatch | None = None,
) -> Iterator[list[Generation]]:
    """As `generate`, yielding the growing generations after every cycle (the same list each time).

    Args:
        method: a key of `methods.METHODS`; None is `default_method`'s choice.
        num_drafts: drafts per cycle at most; None is a chain as long as the draft allows, or see `make_drafter`.
        sample_drafts: see `make_drafter`.
        min_confidence: see `BlockDrafter`; None takes the device's default.
        matching_rule: see `verify`.
        exact: refuse a target whose verify pass may round differently from its plain step (`Target.check_exact`).
        ngrams: of method dart, see `make_drafter`.
        generations: filled in place, so that partial text survives an interrupt.
        watch: counts what is accepted over several calls, and warns if drafting is of no use; None counts this call
            alone.
    """
    _check_types(locals())
    settings = settings or SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    limits = Limits(max_new_tokens, tuple(stop))
    if num_drafts is not None and num_drafts < 0:
        raise UserError(f"num_drafts must not be negative, got {num_drafts}")
    if exact:
        target.check_exact()
    options = dict(chat=chat, enable_thinking=enable_thinking)
    ids = [prompt_ids(target, prompt, name=f"prompts[{i}]", **options) for i, prompt in enumerate(prompts)]
    method = default_method(draft, sample_drafts) if method is None else method
    drafter = make_drafter(
        method,
        draft,
        requests=len(ids),
        device=target.device,
        candidates=candidates,
        sample_drafts=sample_drafts,
        min_confidence=default_min_confidence(target.device) if min_confidence is None else min_confidence,
        num_drafts=num_drafts,
        ngrams=ngrams,
    )
    yield from decode(
        target,
        drafter,
        ids,
        settings=settings,
        limits=limits,
        num_drafts=num_drafts,
        matching_rule=matching_rule,
        generations=generations,
        watch=watch_for(method) if watch is None else watch,
    )


def generate(target: Target, draft: AnyDraft | None, prompts: Sequence[Prompt], **options) -> list[Generation]:
    """Decode prompts together, losslessly, and return one `Generation` each.

    Args:
        target: from `load_target`.
        draft: from `load_draft`; None decodes plainly with the same engine.
        prompts: texts (wrapped in the chat template), chats, or token ids; lengths may differ.
        options: those of `stream`: `method`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `stop`,
            `num_drafts`, `candidates`, `sample_drafts`, `min_confidence`, `matching_rule`, `exact`, `ngrams`,
            `settings` (all warpers), `chat`, `enable_thinking`, `watch`.

    Raises:
        UserError: a prompt or an option that cannot be used.
    """
    generations: list[Generation] = []
    for _ in stream(target, draft, prompts, generations=generations, **options):
        pass
    return generations
