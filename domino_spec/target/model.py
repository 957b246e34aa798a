"""The target: a frozen transformers causal LM with the few operations that decoding and training need.

Everything above this file sees tokens, hidden states, logits and features; everything below is transformers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from domino_spec.config import UserError
from domino_spec.kernels import cpu
from domino_spec.kernels.layers_cpu import DecoderLayers
from domino_spec.target.attention import pass_mask
from domino_spec.target.cache import TargetCache
from domino_spec.target.fusing import FusedAttention, fuse, fused_layers, near
from domino_spec.target.packing import pack_linears

_log = logging.getLogger(__name__)

PREFILL_CHUNK = 512
"""Tokens per request in one prefill pass: bounds the memory of activations and masks on long prompts."""


@dataclass(frozen=True)
class TargetPass:
    """What one forward pass over N tokens of R requests gave."""

    hidden: Tensor
    """[R, N, H], after the final norm: `Target.lm_head` of it gives logits."""
    features: Tensor | None
    """[R, N, layers * H], hidden states of the tapped layers side by side; None where none was asked for."""


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
    """A frozen causal language model (DESIGN: `target/`).

    Args:
        model: a transformers causal LM of the ordinary decoder shape, in evaluation mode.
        tokenizer: its tokenizer, or None where only token ids are used.
        name: what messages call it.
        fingerprint: of its weights (`weights_fingerprint`), where they are not there to be read; None reads them.
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
        self.packed = False
        layers = getattr(self.decoder, "layers", None)
        if layers is None or self._lm_head is None:
            raise UserError(f"{name}: {type(model).__name__} is not an ordinary decoder-only language model")
        for scale in ("logits_scaling", "logit_scale", "logits_scale", "lm_head_multiplier"):
            if getattr(self.config, scale, None) not in (None, 1.0):
                raise UserError(f"{name}: its logits are scaled ({scale}), which is not supported yet")
        self.layers: Sequence[nn.Module] = layers
        self.lm_head_weight: Tensor = self._lm_head.weight
        """[V, H], the frozen output projection."""
        self.fingerprint = weights_fingerprint(self.decoder.named_parameters()) if fingerprint is None else fingerprint
        self._taps = FeatureTaps(layers)
        self._in_one_step: DecoderLayers | None = None
        self._windows = _attention_windows(self.config)
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
    def hidden_size(self) -> int:
        """H."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding table (tokenizers may use fewer)."""
        return self._embedding_weight.shape[0]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def max_length(self) -> int:
        """Longest text the model's positions allow, in tokens."""
        return self.config.max_position_embeddings

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the generation configuration and of the tokenizer."""
        generation = getattr(self.model, "generation_config", None)
        return stop_token_ids(generation, self.config, self.tokenizer)

    def pack(self) -> Target:
        """Prepare for inference on CPU: weights laid out for few rows, small steps joined. Returns self.

        Hooks on what was joined are not called any more, on decoder layers neither where all of them are one step.
        """
        if cpu.is_available(self.device, self.dtype):
            fuse(self.decoder)
        pack_linears(self.model)
        self._lm_head = self.model.get_output_embeddings()
        self.packed = True
        if cpu.is_available(self.device, self.dtype):
            self._join_layers()
        return self

    @torch.inference_mode()
    def _join_layers(self) -> None:
        """Run all layers in one native step, where that gives what the model's own forward gives."""
        kinds = getattr(self.config, "layer_types", None) if len(self._windows) > 1 else None
        joined = fused_layers(self.layers, kinds or [next(iter(self._windows))] * self.num_layers)
        if joined is None:
            return
        expected, got = self._sample_passes(), []
        self._in_one_step = joined
        try:
            got = self._sample_passes()
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            _log.debug("layers run one after another: %r", error)
        if not got or not all(map(near, expected, got)):
            self._in_one_step = None

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
        """Refuse if a token's logits may depend on how many tokens a pass holds (DESIGN section 5).

        Raises:
            UserError: they may, because some product or attention of the target is not done by the native loops.
        """
        native = cpu.is_available(self.device, self.dtype) and self.packed
        attention_fused = all(isinstance(getattr(layer, "self_attn", None), FusedAttention) for layer in self.layers)
        if not native or not attention_fused or any(isinstance(m, nn.Linear) for m in self.model.modules()):
            dtype = str(self.dtype).removeprefix("torch.")
            raise UserError(
                f"exact decoding needs float32 on a CPU and a C compiler; {self.name} is {dtype} on {self.device}"
                if not native
                else f"exact decoding needs attention that this package can take over; {self.name} has another kind"
            )

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
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return TargetCache(
            num_layers=self.num_layers,
            requests=requests,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            capacity=capacity,
            head_dim=head_dim,
            dtype=self.dtype,
            device=self.device,
        )

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
            ancestors: [R, N, N] for a tree of tokens, see `attention.pass_mask`; None for a chain.
        """
        num_tokens = tokens.shape[1]
        extent = cache.begin_pass(num_tokens)
        lengths = cache.lengths
        if ancestors is None:
            depth = torch.arange(num_tokens, device=tokens.device)[None]
        else:
            depth = ancestors.sum(-1) - 1
        masks = {
            kind: pass_mask(lengths, num_tokens, extent, ancestors, window) for kind, window in self._windows.items()
        }
        if self._in_one_step is not None:
            x = self.embedding(tokens)
            cos, sin = self.decoder.rotary_emb(x, lengths[:, None] + depth)
            hidden, features = self._in_one_step(
                x, cos, sin, cache.keys, cache.values, cache.rows, masks, feature_layers
            )
            return TargetPass(self.decoder.norm(hidden), features)
        self._taps.arm(feature_layers)
        output = self.decoder(
            input_ids=tokens,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=lengths[:, None] + depth,
            past_key_values=cache,
            use_cache=True,
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
        """
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


def _attention_windows(config: Any) -> dict[str, int | None]:
    """Which masks a pass must build: one per kind of attention layer, with its window."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"layers of type {', '.join(sorted(unknown))} are not supported")
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
