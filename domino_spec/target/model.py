"""The target: a frozen transformers causal LM with the few operations that decoding and training need.

Everything above this file sees tokens, hidden states, logits and features; everything below is transformers.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from domino_spec.ops.native import bindings as cpu
from domino_spec.ops.native.bindings import DecoderLayers
from domino_spec.settings import UserError
from domino_spec.target.cache import TargetCache, pass_mask
from domino_spec.target.native import FusedAttention, attention_calls, fuse, fused_layers, near, pack_linears

_log = logging.getLogger(__name__)

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Keys in which configurations say how long a text may be."""
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "embedding_norm", "ln_f")
"""Names that decoders give the norm after their last layer."""
PREFILL_CHUNK = 512
"""Tokens per request in one prefill pass: bounds the memory of activations and masks on long prompts."""


@dataclass(frozen=True)
class TargetPass:
    """What one forward pass over N tokens of R requests gave."""

    hidden: Tensor
    """[R, N, H], after the final norm: `Target.lm_head` of it gives logits."""
    features: Tensor | None
    """[R, N, layers * H], hidden states of the tapped layers side by side; None if none was asked for."""


class FeatureTaps:
    """Captures the outputs of chosen decoder layers during a pass, and of no others."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._wanted: frozenset[int] = frozenset()
        self._captured: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._hook(index))

    def _hook(self, index: int):
        def capture(module: nn.Module, arguments: Any, output: Any) -> None:
            if index in self._wanted:
                self._captured[index] = output[0] if isinstance(output, tuple) else output

        return capture

    def arm(self, layer_ids: Sequence[int]) -> None:
        """Capture these layers in the next pass."""
        self._wanted, self._captured = frozenset(layer_ids), {}

    def take(self, layer_ids: Sequence[int]) -> Tensor | None:
        """The captured outputs side by side in the order asked for, [R, N, layers * H]."""
        captured, self._wanted, self._captured = self._captured, frozenset(), {}
        return torch.cat([captured[i] for i in layer_ids], dim=-1) if layer_ids else None


class Target:
    """A frozen causal language model.

    Args:
        model: a transformers causal LM of the ordinary decoder shape, in evaluation mode.
        tokenizer: its tokenizer; None if only token ids are used.
        name: what messages call it.
        fingerprint: of its weights (`weights_fingerprint`); None computes it, for which the weights must be loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        fingerprint: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.embedding: nn.Module = model.get_input_embeddings()
        self._lm_head = model.get_output_embeddings()
        layers = getattr(self.decoder, "layers", None)
        lm_head_weight = getattr(self._lm_head, "weight", None)
        cache_argument = _cache_argument(self.decoder)
        if not isinstance(layers, nn.ModuleList) or not isinstance(lm_head_weight, Tensor) or cache_argument is None:
            raise UserError(f"{name}: {type(model).__name__} is not an ordinary decoder-only language model")
        for scale in ("logits_scaling", "logit_scale", "logits_scale", "lm_head_multiplier"):
            if getattr(self.config, scale, None) not in (None, 1.0):
                raise UserError(f"{name}: its logits are scaled ({scale}), which is not supported yet")
        self.layers: Sequence[nn.Module] = layers  # type: ignore[assignment]
        self.num_layers = len(layers)
        heads = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", None) or heads
        self.head_dim: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.hidden_size: int = self.config.hidden_size
        """H."""
        self.vocab_size = self._embedding_weight.shape[0]
        """V, rows of the embedding table (tokenizers may use fewer)."""
        self.lm_head_weight: Tensor = lm_head_weight
        """[V, H], the frozen output projection."""
        self.fingerprint = weights_fingerprint(self.decoder.named_parameters()) if fingerprint is None else fingerprint
        self.stop_token_ids = stop_token_ids(getattr(model, "generation_config", None), self.config, tokenizer)
        """Tokens that end an answer: those of the generation configuration and of the tokenizer."""
        self.no_features: str | None = None
        """Why drafts cannot read the layers' outputs, if the check at load found a reason (`check.py`)."""
        self.packed = False
        self.replaced = False
        """Whether modules of the model were replaced (`pack`)."""
        self.joined_layers: DecoderLayers | None = None
        """All layers as one native step, if `pack` found that this gives the same; else they run one after another."""
        self._taps = FeatureTaps(self.layers)
        self._windows = _attention_windows(self.config, name)
        """Kinds of attention, and the window of each."""
        self._cache_argument = cache_argument
        self.max_length = longest_text(self.config, name)
        """Longest text that can be decoded, in tokens."""
        self.rope_limit = _constant_rope_length(self.config, self.max_length)
        """Tokens up to which the angles of RoPE do not depend on the length of the text; None if they never do."""
        if self.rope_limit is not None and self.rope_limit < self.max_length:
            _log.warning(
                "%s: its RoPE changes all angles in texts longer than %d tokens, so it is used up to that length, "
                "not to its %d",
                name,
                self.rope_limit,
                self.max_length,
            )
            self.max_length = self.rope_limit
        self._softcap = getattr(self.config, "final_logit_softcapping", None)

    @property
    def _embedding_weight(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self._embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return self._embedding_weight.dtype

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the LM head.

        Raises:
            UserError: the decoder has none that is known, or it is not what stands there.
        """
        norms = (getattr(self.decoder, name, None) for name in _FINAL_NORMS)
        norm = next((module for module in norms if isinstance(module, nn.Module)), None)
        if norm is None or self.no_features is not None:
            reason = self.no_features or "no final norm is known"
            raise UserError(f"{self.name} ({type(self.model).__name__}) decodes without a draft only: {reason}")
        return norm

    def pack(self, replace: bool = True) -> Target:
        """Prepare for inference on CPU: weights laid out for few rows, small steps joined. Returns self.

        Hooks on replaced modules are no longer called, nor hooks on decoder layers if all of them run as one step. The
        model can no longer be saved.

        Args:
            replace: False keeps the model's own modules, of which only the linear layers are packed.
        """
        replace = replace and cpu.is_available(self.device, self.dtype)
        expected: list[Tensor] = []
        if replace:
            with attention_calls(self.decoder) as calls:
                expected = self._sample_passes()
            self.replaced = fuse(self.decoder, calls) > 0
        pack_linears(self.model)
        self._lm_head = self.model.get_output_embeddings()
        self.packed = True
        self.model.save_pretrained = self._refuse_saving  # type: ignore[method-assign,assignment]
        if self.replaced:
            self._join_layers(expected)
        return self

    def _refuse_saving(self, *arguments: Any, **options: Any) -> NoReturn:
        """Replaces `save_pretrained`, which would write a model without the packed weights."""
        raise UserError(
            f"{self.name} is packed for decoding and cannot be saved; load it with load_target(..., pack=False)"
        )

    def _join_layers(self, expected: list[Tensor]) -> None:
        """Run all layers in one native step, if that gives what the model's own modules gave."""
        kinds = getattr(self.config, "layer_types", None) if len(self._windows) > 1 else None
        joined = fused_layers(self.layers, kinds or [next(iter(self._windows))] * self.num_layers)
        if joined is None:
            return
        got: list[Tensor] = []
        self.joined_layers = joined
        try:
            got = self._sample_passes()
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            _log.debug("layers run one after another: %r", error)
        if not got or not all(map(near, expected, got)):
            self.joined_layers = None

    @torch.no_grad()
    def _sample_passes(self) -> list[Tensor]:
        """Results of two passes over random tokens: from the start, and after texts of unequal length."""
        tokens = torch.randint(self.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
        cache, results = self.new_cache(2, 7), []
        for some, lengths in ((tokens[:, :4], (0, 0)), (tokens[:, 4:], (4, 2))):
            cache.lengths.copy_(torch.tensor(lengths))
            found = self.forward(some, cache, range(self.num_layers))
            assert found.features is not None
            results += [found.hidden, *found.features.split(self.hidden_size, dim=-1)]
        return results

    def check_exact(self) -> None:
        """Refuse if a token's logits may depend on how many tokens a pass holds (docs/design.md, section 5).

        Raises:
            UserError: they may, because the native loops do not run some product or attention of the target.
        """
        native = cpu.is_available(self.device, self.dtype) and self.packed
        if not native:
            dtype = str(self.dtype).removeprefix("torch.")
            raise UserError(
                f"exact decoding needs float32 on a CPU and a C compiler; {self.name} is {dtype} on {self.device}"
            )
        if not all(isinstance(getattr(layer, "self_attn", None), FusedAttention) for layer in self.layers):
            raise UserError(
                f"exact decoding needs attention that this package can take over; {self.name} has another kind"
            )
        others = (m for m in self.model.modules() if not isinstance(m, nn.Embedding))
        if any(weight.dim() > 1 for module in others for weight in module.parameters(recurse=False)):
            raise UserError(
                f"exact decoding needs products that the native loops do; {self.name} has others (experts, say)"
            )

    @contextmanager
    def shorter_window(self, window: int) -> Iterator[None]:
        """Limit sliding windows to `window` tokens, in passes here and in the masks of transformers.

        A few tokens then show whether windows are right (`check.py`).
        """
        ours, theirs = self._windows, getattr(self.config, "sliding_window", None)
        if theirs is None or all(size is None for size in ours.values()):
            yield
            return
        window = min(window, theirs)
        try:
            self._windows = {kind: None if size is None else window for kind, size in ours.items()}
            self.config.sliding_window = window
            yield
        finally:
            self._windows, self.config.sliding_window = ours, theirs

    def embed(self, token_ids: Tensor) -> Tensor:
        """[...] to [..., H] through the model's own module, which may scale (Gemma)."""
        return self.embedding(token_ids)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[..., H] to logits [..., V]."""
        logits = self._lm_head(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def new_cache(self, requests: int, capacity: int) -> TargetCache:
        """An empty cache of `capacity` rows for each of `requests` requests."""
        shape = self.num_layers, requests, self.kv_heads, capacity, self.head_dim
        return TargetCache(shape, self.dtype, self.device)

    def forward(
        self,
        tokens: Tensor,
        cache: TargetCache,
        feature_layers: Sequence[int] = (),
        ancestors: Tensor | None = None,
    ) -> TargetPass:
        """Run N tokens per request after the cached rows; writes their rows but leaves `cache.lengths` alone.

        Args:
            tokens: [R, N].
            cache: rows of the committed text; the caller commits by raising `cache.lengths`.
            feature_layers: decoder layers to tap, counted from 0.
            ancestors: [R, N, N] for a tree of tokens, see `cache.pass_mask`; None for a chain.

        Raises:
            UserError: layers are tapped whose outputs cannot be used (`no_features`).
        """
        if feature_layers and self.no_features is not None:
            raise UserError(f"{self.name} ({type(self.model).__name__}) gives no features: {self.no_features}")
        num_tokens, lengths = tokens.shape[1], cache.lengths
        extent = cache.begin_pass(num_tokens)
        depth = torch.arange(num_tokens, device=tokens.device) if ancestors is None else ancestors.sum(-1) - 1
        positions = lengths[:, None] + depth  # [R, N]
        if self.rope_limit is not None:
            # Rows past the longest text are never committed; their positions must not change the angles of the others.
            positions = positions.clamp(max=self.rope_limit - 1)
        windows = self._windows.items()
        masks = {kind: pass_mask(lengths, num_tokens, extent, ancestors, window) for kind, window in windows}
        if self.joined_layers is None:
            return self._run_modules(tokens, positions, masks, cache, feature_layers)
        x = self.embedding(tokens)
        cos, sin = self.decoder.rotary_emb(x, positions)
        kept = cache.keys, cache.values, cache.rows
        hidden, features = self.joined_layers(x, cos, sin, *kept, masks, feature_layers)
        return TargetPass(self.decoder.norm(hidden), features)

    def _run_modules(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: dict[str, Tensor],
        cache: TargetCache,
        feature_layers: Sequence[int],
    ) -> TargetPass:
        """A pass through the model's modules, one after another; those that were not replaced are transformers'."""
        self._taps.arm(feature_layers)
        output = self.decoder(
            input_ids=tokens,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
            use_cache=True,
            **{self._cache_argument: cache},
        )
        return TargetPass(output.last_hidden_state, self._taps.take(feature_layers))

    def prefill(
        self, tokens: Tensor, lengths: Tensor, cache: TargetCache, feature_layers: Sequence[int] = ()
    ) -> Tensor | None:
        """Fill an empty cache with right-padded texts, in chunks; sets `cache.lengths` to `lengths`.

        Args:
            tokens: [R, T], padded on the right with any token.
            lengths: [R], real tokens of each request.

        Returns:
            Features [R, T, layers * H] (rows past a request's length are meaningless), or None.

        Raises:
            UserError: a text is longer than the angles of RoPE stay the same (`rope_limit`).
        """
        if self.rope_limit is not None and tokens.shape[1] > self.rope_limit:
            raise UserError(
                f"{self.name} cannot read a text of {tokens.shape[1]} tokens: its RoPE changes all angles in texts "
                f"longer than {self.rope_limit}"
            )
        chunks = []
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            # Padded rows of shorter requests are written too, but every row is overwritten before it can be seen.
            cache.lengths.fill_(start)
            chunks.append(self.forward(tokens[:, start : start + PREFILL_CHUNK], cache, feature_layers).features)
        cache.lengths.copy_(lengths)
        features = [chunk for chunk in chunks if chunk is not None]
        return torch.cat(features, dim=1) if features else None


def stop_token_ids(generation: Any, config: Any, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Tokens that end an answer: those of a generation configuration (or None), a text configuration, a tokenizer."""
    ids: set[int] = set()
    for source in (getattr(generation, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        ids.update([source] if isinstance(source, int) else source or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _cache_argument(decoder: nn.Module) -> str | None:
    """The name under which a decoder takes its cache, by its type: versions of transformers differ in it."""
    parameters = inspect.signature(decoder.forward).parameters
    return next((name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation)), None)


def longest_text(config: Any, name: str) -> int:
    """Longest text that a configuration allows, in tokens.

    Raises:
        UserError: it does not say.
    """
    for key in _LENGTHS:
        if isinstance(length := getattr(config, key, None), int):
            return length
    raise UserError(f"{name}: its configuration does not say how long a text may be (max_position_embeddings)")


def _constant_rope_length(config: Any, max_length: int) -> int | None:
    """Tokens up to which transformers computes the same angles for a position, whatever the length; None if always.

    `longrope` has two sets of frequencies and `dynamic` a base that grows: transformers takes those of the longest
    position in a pass, so a draft, or a neighbour in the batch, would change them for everyone.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in [parameters, *nested]:
        kind = rope.get("rope_type") or ""
        if "dynamic" in kind:
            limits.append(max_length)
        elif kind == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or max_length)
    return min(limits, default=None)


def _attention_windows(config: Any, name: str) -> dict[str, int | None]:
    """Which masks a pass must build: one per kind of attention layer, with its window."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"{name}: layers of type {', '.join(sorted(map(str, unknown)))} are not supported")
    if kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
    if window is not None and getattr(config, "use_sliding_window", True):
        return {"sliding_attention": window}
    return {"full_attention": None}


def weights_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A short name for the exact weights of a target, the same in every precision it may be loaded in.

    Up to 64 evenly spaced values of every parameter, rounded to bfloat16, are hashed: a fine-tuned model of the same
    shapes differs, a copy loaded in another precision does not.

    Args:
        parameters: of the target's decoder, with their names in it.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=itemgetter(0)):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
