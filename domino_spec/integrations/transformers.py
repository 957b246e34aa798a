"""`custom_generate`: our loop behind an ordinary transformers model's own `generate`.

    model.generate(**inputs, custom_generate=draft.custom_generate, max_new_tokens=100)

transformers prepares inputs and settings as usual and passes them on. This module reads the settings that change the
text, and refuses by name those that our loop would ignore.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from domino_spec.decoding.cycle import Drafter
from domino_spec.decoding.engine import decode
from domino_spec.decoding.request import DraftWatch, Limits
from domino_spec.decoding.sampling import SamplingSettings
from domino_spec.settings import UserError
from domino_spec.target.model import Target

_HONOURED = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.RepetitionPenaltyLogitsProcessor,
)


def sampling_settings(config: GenerationConfig, processors: LogitsProcessorList) -> SamplingSettings:
    """The settings of a prepared generation call as ours; the seed comes from PyTorch's global generator.

    Raises:
        UserError: a logits processor that our loop does not know.
    """
    for processor in processors:
        if not isinstance(processor, _HONOURED):
            raise UserError(f"custom_generate does not support the logits processor {type(processor).__name__}")
    repetition_penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return SamplingSettings(repetition_penalty=repetition_penalty)
    return SamplingSettings(
        temperature=config.temperature if config.temperature is not None else 1.0,
        top_k=config.top_k or 0,
        top_p=config.top_p if config.top_p is not None else 1.0,
        min_p=config.min_p or 0.0,
        repetition_penalty=repetition_penalty,
        seed=int(torch.randint(2**31, ())),
    )


def generate_with(
    drafter: Drafter,
    target: Target,
    input_ids: Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    attention_mask: Tensor | None = None,
    streamer: BaseStreamer | None = None,
    watch: DraftWatch | None = None,
) -> Tensor:
    """Decode `input_ids` [R, T] (left-padded where `attention_mask` is 0) with a drafter: [R, T + longest answer].

    `watch` as for `Engine`.

    Raises:
        UserError: a setting that our loop would ignore.
    """
    for criterion in stopping_criteria:
        if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
            raise UserError(f"custom_generate does not support the stopping criterion {type(criterion).__name__}")
    if generation_config.num_beams not in (None, 1):
        raise UserError("custom_generate does not support beam search")
    if generation_config.return_dict_in_generate:
        raise UserError("custom_generate returns token ids only; leave return_dict_in_generate off")
    if streamer is not None and len(input_ids) > 1:
        raise UserError("a streamer shows one request: give a batch of one")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    eos = generation_config.eos_token_id
    stop_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
    shown = 0
    generations = []
    for generations in decode(
        target,
        drafter,
        prompts,
        settings=sampling_settings(generation_config, logits_processor),
        limits=Limits(generation_config.max_length - input_ids.shape[1], stop_token_ids=stop_ids),
        watch=watch,
    ):
        if streamer is not None:
            streamer.put(torch.tensor(generations[0].token_ids[shown:]))
            shown = generations[0].num_tokens
    if streamer is not None:
        streamer.end()
    answers = [torch.tensor(g.token_ids, device=input_ids.device) for g in generations]
    pad = generation_config.pad_token_id
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=0 if pad is None else pad)
    return torch.cat((input_ids, padded), dim=1)


def calling_streamer() -> BaseStreamer | None:
    """The `streamer` argument of the `generate` call that is two frames up.

    transformers 5.17 to 5.23 drops the streamer if `custom_generate` is a function (it keeps only arguments that
    `_sample` lacks), so only the calling frame still has it.
    """
    frame: Any = sys._getframe(2)
    streamer = frame.f_locals.get("streamer")
    return streamer if isinstance(streamer, BaseStreamer) else None


def check_same_model(model: PreTrainedModel, target: Target) -> None:
    """Refuse a model other than the one the draft is bound to.

    Raises:
        UserError: another model.
    """
    if model is not target.model:
        raise UserError("this draft is bound to another model: load_draft(name, model) with the model that generates")
