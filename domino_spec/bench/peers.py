"""The outside baseline: `model.generate` of an ordinary transformers model, as its users run it.

Stock SDPA attention, stock cache, stock linear layers; only the clock is ours, a streamer that notes when each token
became available. What it measures beside our loop: its prefill ends with the first token, ours before it, so its
decode time belongs to one token fewer (`Row.decode_tokens` counts accordingly).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from domino_spec.decoding.request import Generation
from domino_spec.draft.checkpoint import draft_tensors, read_draft
from domino_spec.draft.config import DraftConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.load import draft_directory
from domino_spec.settings import UserError
from domino_spec.target.embedded import EMBEDDED_TARGET
from domino_spec.target.load import load_config, load_model, load_tokenizer, target_source
from domino_spec.target.model import Target


class TokenClock(BaseStreamer):
    """Notes when `generate` hands out tokens, and how many at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        """`time.perf_counter()` after every pass."""
        self.tokens: list[int] = []
        """Tokens that each pass brought; one, unless transformers drafts."""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The first call carries the prompt, every later one the tokens of a pass."""
        if self._prompt_seen:
            self.seconds.append(time.perf_counter())
            self.tokens.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


def load_baseline(target: Target) -> Any:
    """The target's weights as a stock transformers model, same dtype and device."""
    model = load_model(target_source(target.name), f"target {target.name}", target.dtype, attention="sdpa")
    return model.to(target.device).eval()


def transformers_generate(
    model: Any,
    stop_token_ids: Collection[int],
    prompt: list[int],
    temperature: float,
    seed: int,
    max_new_tokens: int,
) -> Generation:
    """One prompt through `model.generate`, timed.

    Args:
        model: from `load_baseline`.
        stop_token_ids: the same that our loop stops at.
        prompt: token ids.
        temperature: 0 is `do_sample=False`.
        seed: of PyTorch's generator, at temperature > 0.
        max_new_tokens: as everywhere.

    Returns:
        Its tokens; a pass of one token each after the first; seconds until the first token as prefill and from there
        to the last as decode.
    """
    generation, _ = timed_generate(model, stop_token_ids, prompt, temperature, seed, max_new_tokens)
    return generation


def timed_generate(
    model: Any,
    stop_token_ids: Collection[int],
    prompt: list[int],
    temperature: float,
    seed: int,
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Generation, TokenClock]:
    """`model.generate`, timed; arguments as in `transformers_generate`, and:

    Args:
        settings: more of the model's generation configuration.
        options: more arguments of `generate`.

    Returns:
        What it produced, drafts not counted; and the clock.
    """
    stop = sorted(stop_token_ids)
    # A model's own defaults (Qwen's repetition penalty, its sampling) would make the texts differ for no fault of ours.
    model.generation_config = GenerationConfig(
        eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0, **(settings or {})
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    ids = torch.tensor([prompt], device=model.device)
    clock = TokenClock()
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=clock, **sampling, **options
    )
    tokens = output[0, len(prompt) :].tolist()
    assert len(tokens) == sum(clock.tokens)
    generation = Generation(
        prompt_ids=list(prompt),
        token_ids=tokens,
        finish_reason="stop" if tokens[-1] in stop_token_ids else "length",
        acceptance_lengths=clock.tokens[1:],
        num_drafts=[0] * (len(clock.tokens) - 1),
        accepted=[i < count - 1 for count in clock.tokens for i in range(count)],
        seconds_prefill=clock.seconds[0] - started,
        seconds_decode=clock.seconds[-1] - clock.seconds[0],
    )
    return generation, clock


# Outside peers: transformers' own speculative decoding, run through `model.generate` and not through our loop.
#
# Three ways to draft: a small language model (`assistant_model`) or, without one, the target's own first layers;
# look-up in the text so far; and DFlash, with the weights of one of our drafts. They run like plain decoding above:
# stock model, stock cache, the same clock, one request at a time. A hook on the model counts the rows of every target
# pass, and the streamer counts the tokens of each, so passes, drafts and acceptance lengths are what transformers did.
# Two counts differ from ours:
#
# - The pass over the prompt also gives tokens, and accepted drafts if the peer drafts from the prompt on. It is
#   prefill: neither its tokens nor its drafts are counted among the passes.
# - transformers cuts a pass at a stop token or at the limit before it hands out the tokens, so the last acceptance
#   length may be shorter than what was accepted.


ASSISTED, LOOKUP, DFLASH = "transformers-assisted", "transformers-lookup", "transformers-dflash"
PEERS = (ASSISTED, LOOKUP, DFLASH)
DEFAULT_DRAFTS = {ASSISTED: 20, LOOKUP: 10}
"""Drafts of a pass if none are asked for: transformers' defaults."""


def peer_drafts(method: str, draft: Any, budget: int | None) -> int:
    """The most drafts of one pass.

    Args:
        method: of `PEERS`.
        draft: the draft that the bench has, or None.
        budget: what was asked for, None for the peer's own number. DFlash always drafts its whole block.

    Raises:
        UserError: `transformers-dflash` without a draft that transformers can run.
    """
    if method != DFLASH:
        return DEFAULT_DRAFTS[method] if budget is None else budget
    if draft is None or draft.kind not in ("domino", "dflash"):
        raise UserError(f"method {DFLASH} needs a draft with a DFlash backbone (DFlash or Domino)")
    check_dflash(draft.config)
    return draft.config.max_drafts


def early_exit(target: Target) -> int:
    """Layers after which the target drafts for itself in `transformers-assisted` without an assistant: a quarter."""
    return max(1, target.num_layers // 4)


def assisted_by(target: Target, assistant: str | None) -> str:
    """What drafts in `transformers-assisted`, for the report."""
    if assistant is not None:
        return assistant
    return f"the target itself, leaving after {early_exit(target)} of its {target.num_layers} layers"


@dataclass(frozen=True)
class Peers:
    """What the peers of a bench run with."""

    model: Any
    """The target's weights as a stock transformers model (`load_baseline`)."""
    stop_token_ids: Collection[int]
    assistant: Any = None
    """A small language model with the target's tokenizer."""
    exit_layer: int | None = None
    """Where there is no assistant: after how many layers the target leaves."""
    dflash: Any = None
    """transformers' DFlash model with the weights of a draft."""
    dflash_head: nn.Module | None = None
    """LM head of a draft with a draft vocabulary; None if the target's own serves."""

    def generate(
        self, method: str, budget: int, prompt: list[int], temperature: float, seed: int, max_new_tokens: int
    ) -> Generation:
        """One prompt, timed, with the passes after the first counted.

        Args:
            method: of `PEERS`.
            budget: drafts of a pass; DFlash drafts its block in any case.
            prompt: token ids.
            temperature: 0 is `do_sample=False`.
            seed: of PyTorch's generator.
            max_new_tokens: as everywhere.
        """
        model = self.model
        settings: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if method == LOOKUP:
            options = {"prompt_lookup_num_tokens": budget}
        elif method == DFLASH:
            options = {"assistant_model": self.dflash, "speculation_type": "dflash"}
        else:
            # The number is the bench's, not one that adapts from prompt to prompt; what else decides is transformers'.
            settings = {"num_assistant_tokens": budget, "num_assistant_tokens_schedule": "constant"}
            if self.assistant is None:
                options = {"assistant_early_exit": self.exit_layer}
            else:
                self.assistant.generation_config = transformers.GenerationConfig(**settings)
                options, settings = {"assistant_model": self.assistant}, {}
        with _counted_rows(model) as rows, _output_head(model, self.dflash_head if method == DFLASH else None):
            generation, clock = timed_generate(
                model, self.stop_token_ids, prompt, temperature, seed, max_new_tokens, settings, **options
            )
        assert len(rows) == len(clock.tokens), "every target pass hands out its tokens once"
        generation.num_drafts = [count - 1 for count in rows[1:]]
        return generation


def load_peers(
    model: Any, target: Target, methods: Sequence[str], draft: str | Path | None = None, assistant: str | None = None
) -> Peers:
    """Prepare the peers among `methods`.

    Args:
        model: from `load_baseline`.
        target: the model served.
        methods: of the bench; those that are no peers are passed over.
        draft: name, directory or hub id of the draft for `transformers-dflash`; read again, since decoding packs it.
        assistant: name, directory or hub id of a small language model for `transformers-assisted`; None for the
            target's own first layers.

    Raises:
        UserError: an assistant or draft that cannot be read, does not suit the target, or that this transformers cannot
            run.
    """
    stop = sorted(target.stop_token_ids)
    helper, layers, dflash, head = None, None, None, None
    if ASSISTED in methods:
        if assistant is not None:
            helper = load_assistant(assistant, target)
        else:
            layers = early_exit(target)
            if not exits_early(model):
                raise UserError(
                    f"{type(model).__name__} of transformers {transformers.__version__} cannot leave after its first "
                    f"layers, so {ASSISTED} needs a small language model: give --assistant"
                )
    if DFLASH in methods:
        if draft is None:
            raise UserError(f"method {DFLASH} needs a draft with a DFlash backbone (DFlash or Domino)")
        weights = read_draft(draft_directory(draft)).to(target.device, target.dtype).bind(target)
        dflash, head = dflash_assistant(weights), dflash_head(weights)
    return Peers(model, stop, helper, layers, dflash, head)


# Assisted generation.


def load_assistant(name: str, target: Target) -> Any:
    """A small language model with the target's tokenizer, as a stock transformers model.

    Raises:
        UserError: it cannot be loaded, cannot write without a target, or has other tokens than the target.
    """
    path = Path(name)
    if name != EMBEDDED_TARGET and not path.is_dir() and (path.exists() or path.is_absolute() or name.count("/") != 1):
        raise UserError(f"assistant {name} does not exist: give a model directory or a hub id such as owner/name")
    source, what = target_source(name), f"assistant {name}"
    config = load_config(source, what)
    if getattr(config, "dflash_config", None) is not None:
        raise UserError(f"{what} is a draft, which cannot write by itself: give a small language model")
    size = config.get_text_config().vocab_size
    if size != target.config.vocab_size:
        raise UserError(
            f"{what} has a vocabulary of {size}, target {target.name} of {target.config.vocab_size}: "
            "give a model with the target's tokenizer"
        )
    model = load_model(source, what, target.dtype, attention="sdpa")
    tokenizer = None if target.tokenizer is None else load_tokenizer(source, what)
    if tokenizer is not None and target.tokenizer is not None and tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise UserError(f"assistant {name} and target {target.name} have different tokenizers: give one with the same")
    return model.to(target.device).eval()


@torch.no_grad()
def exits_early(model: Any) -> bool:
    """Whether `assistant_early_exit` works for a model, tried on two tokens.

    It relies on a model that runs fewer layers when its configuration says so, and on a cache that can then take tokens
    back: that of transformers 5.17 fails where layers are named by kind (Qwen, Gemma), that of 5.23 does not.
    """
    config, ran = model.base_model.config, []
    depth = config.num_hidden_layers
    hook = model.get_decoder().layers[-1].register_forward_hook(lambda *_: ran.append(True))
    try:
        config.num_hidden_layers = 1
        cache = DynamicCache(config=config)
        cache.activate_past_recording()
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
        cache.crop(-1)
    except (TypeError, AttributeError):
        return False
    finally:
        config.num_hidden_layers = depth
        hook.remove()
    return not ran


# DFlash.


def check_dflash(config: DraftConfig) -> None:
    """Refuse a draft that transformers' DFlash cannot run as it was trained.

    Raises:
        UserError: one sentence.
    """
    if config.last_layer_tap == "before_norm":
        raise UserError(
            f"method {DFLASH} cannot run this draft: it reads the target's last layer (target_layer_ids) before its "
            "final norm, and transformers hands it over only after that"
        )
    _dflash_classes()


def dflash_assistant(draft: Draft) -> Any:
    """transformers' DFlash model with the backbone of `draft`; a Domino head has no place in it.

    transformers reads slots 1 to B - 1 of a block. A draft with shifted labels predicts from slot 0 on, so its slots
    are handed over one place later, all B of them.

    Args:
        draft: not packed.

    Raises:
        UserError: `check_dflash` refuses it.
    """
    config = draft.config
    check_dflash(config)
    config_class, model_class = _dflash_classes()
    rope = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    assistant = model_class(
        config_class(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            max_position_embeddings=config.max_position_embeddings,
            layer_types=["full_attention"] * config.num_hidden_layers,
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            target_layer_ids=list(config.target_layer_ids),
        )
    )
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    held = draft_tensors(draft)
    wanted = {renamed.get(n, n) for n in draft.backbone.state_dict() if not n.startswith("rotary_emb.")}
    tensors = {renamed.get(name, name): tensor for name, tensor in held.items()}
    assistant.load_state_dict({name: tensors[name] for name in wanted})
    if config.shift_label:
        assistant.register_forward_hook(_one_slot_later)
    return assistant.to(draft.device, draft.dtype).eval()


def dflash_head(draft: Draft) -> nn.Module | None:
    """What gives a draft with a draft vocabulary its logits in transformers; None for the whole vocabulary."""
    if draft.draft_vocab_ids is None:
        return None
    return _SubsetHead(draft.ends.lm_head, draft.draft_vocab_ids, draft.config.vocab_size)


class _SubsetHead(nn.Module):
    """An LM head over a draft vocabulary, as wide as the whole one: no probability on the other tokens."""

    def __init__(self, weight: Tensor, token_ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.weight, self.token_ids, self.vocab_size = nn.Parameter(weight, requires_grad=False), token_ids, vocab_size

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        return whole.index_copy_(-1, self.token_ids, logits)


def _one_slot_later(module: nn.Module, arguments: Any, output: Any) -> Any:
    hidden = output.last_hidden_state
    output.last_hidden_state = torch.cat((hidden[:, :1], hidden), dim=1)
    return output


def _dflash_classes() -> tuple[Any, Any]:
    try:
        from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator  # noqa: F401
        from transformers.models.muse_glimmer_assistant.configuration_muse_glimmer_assistant import (
            MuseGlimmerAssistantConfig,
        )
        from transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant import MuseGlimmerAssistantModel
    except ImportError:
        raise UserError(
            f"method {DFLASH} needs a transformers with DFlash (5.17 has it); {transformers.__version__} has none"
        ) from None
    return MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel


# What the target does.


@contextmanager
def _counted_rows(model: Any) -> Iterator[list[int]]:
    """Tokens that each whole pass of `model` reads. Passes that leave early are drafting, and not counted."""
    rows: list[int] = []
    config = model.base_model.config
    layers = config.num_hidden_layers

    def count(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if config.num_hidden_layers == layers:
            rows.append(keywords["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def _output_head(model: Any, head: nn.Module | None) -> Iterator[None]:
    """Let `generate` find `head` where it asks for the model's LM head to draft with; the model keeps its own."""
    if head is None:
        yield
        return
    model.get_output_embeddings = lambda: head
    try:
        yield
    finally:
        del model.get_output_embeddings
