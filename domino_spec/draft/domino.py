"""The Domino draft: the DFlash backbone, and the head that corrects its logits token by token.

A draft holds what is trained and published. It borrows embedding and LM head from its target (`TargetEnds`), and they
never appear in a checkpoint. `BaseDraft` is what all kinds of draft share.

The head is a GRU over the tokens drafted so far, and a low-rank layer that turns its state and the slot's hidden state
into an addition to the base logits (paper 4.1.2):

    S_j          = GRU(E(x_j), S_{j-1}),  S_{-1} = 0
    correction_i = W2 silu(W1 [h_slot ; S_{i-1}])

There is one recurrence with two drivers: `step` while drafting and `block` while training; they agree exactly.

Shapes: F features (tapped layers times hidden size), G GRU width, L low rank, H hidden, V logits width (the size of the
draft vocabulary if there is one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.draft.backbone import Backbone, output_rows, sharing_copy
from domino_spec.draft.config import AnyConfig, DraftConfig, HeadConfig
from domino_spec.ops.heads import EmbeddingTable, HeadOps, HeadWeights, gru_cell
from domino_spec.ops.native.bindings import PackedLinear

if TYPE_CHECKING:
    from typing_extensions import Self

    from domino_spec.target.model import Target


class PrefixGRU(nn.Module):
    """One bias-free GRU layer with PyTorch's gate order (reset, update, new) and parameter names."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        for weight in (self.weight_ih_l0, self.weight_hh_l0):
            nn.init.uniform_(weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def cell(self, gates: Tensor, state: Tensor) -> Tensor:
        """One update: input product `gates` [..., 3G] and `state` [..., G] give the next state [..., G]."""
        return gru_cell(gates, state, self.weight_hh_l0)

    def input_gates(self, embeddings: Tensor) -> Tensor:
        """The input product W_ih E(x), [..., H] to [..., 3G]; independent of the state, so it can be batched."""
        return F.linear(embeddings, self.weight_ih_l0)


class DominoHead(nn.Module):
    """Prefix encoder and low-rank correction, with the parameter names of published checkpoints."""

    def __init__(self, config: HeadConfig, hidden_size: int, logits_size: int) -> None:
        super().__init__()
        self.config = config
        self.prefix_gru = PrefixGRU(hidden_size, config.gru_hidden_dim)
        self.embed_proj = nn.Sequential(
            nn.Linear(hidden_size + config.gru_hidden_dim, config.low_rank, bias=False),
            nn.SiLU(),
            nn.Linear(config.low_rank, logits_size, bias=False),
        )
        # The correction starts at zero, so training starts from the base logits.
        nn.init.zeros_(self.correction_weight)

    @property
    def input_weight(self) -> Tensor:
        """W1 [L, H + G]."""
        return self.embed_proj[0].weight  # type: ignore[return-value]

    @property
    def correction_weight(self) -> Tensor:
        """W2 [V, L]."""
        return self.embed_proj[2].weight  # type: ignore[return-value]

    def weights(self, embed_choice: Callable[[Tensor], Tensor]) -> HeadWeights:
        """The head as drafting reads it; `embed_choice` takes indices into the logits to embeddings."""
        gru, prefix = self.prefix_gru, self.config.pure_draft_prefix_len
        matrices = (gru.weight_ih_l0, gru.weight_hh_l0, self.input_weight, self.correction_weight)
        return HeadWeights(*matrices, prefix, embed_choice)

    def initial_state(self, *shape: int, like: Tensor) -> Tensor:
        """The empty prefix S_{-1}: zeros [*shape, G] with the dtype and device of `like`."""
        return like.new_zeros(*shape, self.config.gru_hidden_dim)

    def step(self, embedding: Tensor, state: Tensor) -> Tensor:
        """Consume one token: embedding [..., H] and state [..., G] to the next state [..., G]."""
        return self.prefix_gru.cell(self.prefix_gru.input_gates(embedding), state)

    def block(self, embeddings: Tensor) -> Tensor:
        """States after each token of known prefixes: [..., n, H] to [..., n, G], from the zero state."""
        gates = self.prefix_gru.input_gates(embeddings)
        state = self.initial_state(*embeddings.shape[:-2], like=gates)
        states = []
        for position in range(embeddings.shape[-2]):
            state = self.prefix_gru.cell(gates[..., position, :], state)
            states.append(state)
        return torch.stack(states, dim=-2)

    def low_rank(self, hidden: Tensor, state: Tensor) -> Tensor:
        """silu(W1 [h ; S]): hidden [..., H] and state [..., G] to [..., L]."""
        return F.silu(self.embed_proj[0](torch.cat((hidden, state.to(hidden.dtype)), dim=-1)))

    def correction(self, hidden: Tensor, state: Tensor) -> Tensor:
        """The addition to the base logits over the whole logits width: [..., V]."""
        return F.linear(self.low_rank(hidden, state), self.correction_weight)


@dataclass(frozen=True)
class TargetEnds:
    """What a draft borrows from its target, frozen."""

    embedding: nn.Module
    """Token ids [...] to embeddings [..., H]; the model's own module, which may scale (Gemma)."""
    lm_head: Tensor
    """[V, H]: rows of the output projection for the tokens this draft can propose."""
    final_norm: nn.Module
    """The target's last norm, which turns the output of its last layer into what the LM head reads."""


class BaseDraft(nn.Module):
    """A draft of any kind: `Draft` (domino, dflash) or `SingleLayerDraft` (eagle3, dart).

    Args:
        config: its shape.
        draft_vocab_ids: [draft_vocab_size], absolute token ids that it can propose, all different; given if the
            configuration has a draft vocabulary, and only then.
    """

    config: Any
    draft_vocab_ids: Tensor | None
    feature_scale: Tensor | None
    """[F], what training multiplies features with; None elsewhere (see `scale_features`)."""
    borrows_lm_head: ClassVar[bool]
    """Whether its logits come from the target's LM head; else its checkpoint holds one."""
    layout: Any
    """Names and types of tensors in the checkpoint file, if they differ from this class; saving keeps them."""
    fc: nn.Linear
    device: torch.device
    """Where the draft's parameters are."""
    dtype: torch.dtype
    """Type of the draft's parameters."""

    def __init__(self, config: AnyConfig, draft_vocab_ids: Tensor | None = None) -> None:
        super().__init__()
        if (draft_vocab_ids is None) != (config.draft_vocab_size is None):
            raise ValueError("draft_vocab_ids must be given exactly when draft_vocab_size is set")
        self.config = config
        self.register_buffer("draft_vocab_ids", draft_vocab_ids)
        self.register_buffer("feature_scale", None, persistent=False)
        self.packed = False
        """True once `pack` was called."""
        self.custom_generate: Callable[..., Tensor] | None = None
        """What `model.generate(custom_generate=...)` of transformers takes; set by `domino_spec.load_draft`."""
        # A list, so that the borrowed modules are not registered as ours (state_dict, optimizer, .to()).
        self._ends: list[TargetEnds] = []

    @property
    def kind(self) -> str:
        """domino, dflash, eagle3 or dart."""
        return str(self.config.kind)

    def bind(self, target: Target) -> Self:
        """Borrow embedding and LM head from `target` (checked by `load.check_pairing`); returns self.

        Raises:
            UserError: the target does not show its layers or its last norm (`Target.final_norm`).
        """
        weight = target.lm_head_weight
        if self.draft_vocab_ids is not None:
            weight = weight[self.draft_vocab_ids.to(weight.device)]
        self._ends = [TargetEnds(target.embedding, weight, target.final_norm)]
        return self

    @property
    def ends(self) -> TargetEnds:
        """The borrowed ends; `bind` comes first."""
        assert self._ends, "the draft is not bound to a target"
        return self._ends[0]

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Decoder layers of the target that it reads; `bind` comes first."""
        layers: tuple[int, ...] | None = self.config.target_layer_ids
        assert layers is not None, "the draft is not bound to a target"
        return layers

    @torch.no_grad()
    def scale_features(self, scale: Tensor, trained: bool = False) -> None:
        """Train `fc` on features times `scale` [F]; checkpoints hold `fc` for the features as they are.

        A few dimensions of a target's hidden states are a hundred times larger than the rest and carry half of their
        energy. Brought to one scale, the optimizer's steps reach all dimensions alike.

        Args:
            scale: [F], positive.
            trained: `fc` comes from a checkpoint, so what it computes must not change. The scale is then rounded to
                powers of two, which move into `fc` and back without rounding.
        """
        if trained:
            scale = torch.exp2(scale.log2().round())
            self.fc.weight /= scale
        self.feature_scale = scale

    @property
    def fc_weight(self) -> Tensor:
        """`fc.weight` for features as they are, [H, F]: what checkpoints hold."""
        return self.fc.weight if self.feature_scale is None else self.fc.weight * self.feature_scale

    def read_features(self, features: Tensor) -> Tensor:
        """The target's raw outputs at the taps [..., F] as `fc` reads them: the last layer's may be normed."""
        if self.config.last_tap_normed:
            taps = zip(self.feature_layers, features.split(self.config.hidden_size, dim=-1), strict=True)
            last, norm = self.config.num_target_layers - 1, self.ends.final_norm
            features = torch.cat([norm(part.contiguous()) if layer == last else part for layer, part in taps], dim=-1)
        return features if self.feature_scale is None else features * self.feature_scale

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] to the target's embeddings [..., H], in the draft's dtype."""
        return self.ends.embedding(token_ids).to(self.dtype)

    def to_token_ids(self, choices: Tensor) -> Tensor:
        """Indices into the logits to absolute token ids, same shape."""
        return choices if self.draft_vocab_ids is None else self.draft_vocab_ids[choices]

    def to_choices(self, token_ids: Tensor) -> Tensor:
        """Absolute token ids to indices into the logits, same shape; -1 for tokens the draft cannot propose."""
        if self.draft_vocab_ids is None:
            return token_ids
        order = self.draft_vocab_ids.argsort()
        place = torch.searchsorted(self.draft_vocab_ids, token_ids, sorter=order).clamp(max=len(order) - 1)
        index = order[place]
        return torch.where(self.draft_vocab_ids[index] == token_ids, index, -1)

    def empty_copy(self) -> Self:
        """A draft of the same shape, layout and scale of features; its weights are to be filled in."""
        copy = type(self)(self.config, self.draft_vocab_ids)
        copy.layout, copy.feature_scale = self.layout, self.feature_scale
        return copy

    def prepare_training(self, trained: str, recompute_layers: bool = False) -> None:
        """Choose what is trained; a recipe asks nothing special of a draft with a single layer.

        Args:
            trained: all, or head, which freezes the backbone.
            recompute_layers: compute the layers anew in the backward pass instead of keeping their activations.
        """
        assert trained == "all" and not recompute_layers


class Draft(BaseDraft):
    """Proposes blocks of tokens from the target's features (paper section 4.1).

    Args:
        config: shape and label convention.
        draft_vocab_ids: as in `BaseDraft`; ascending.
    """

    config: DraftConfig
    borrows_lm_head = True

    def __init__(self, config: DraftConfig, draft_vocab_ids: Tensor | None = None) -> None:
        super().__init__(config, draft_vocab_ids)
        self.backbone = Backbone(config)
        self.head = DominoHead(config.head, config.hidden_size, config.logits_size) if config.head else None
        self.layout = ""
        """Prefix of the head's tensors in the checkpoint: `logit_head.` in an older layout."""
        self._packed_lm_head: PackedLinear | None = None
        self._choice_embedding: Callable[[Tensor], Tensor] | None = None
        self._head_ops: HeadOps | None = None

    @property
    def fc(self) -> nn.Linear:  # type: ignore[override]
        """The projection of features."""
        return self.backbone.fc

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the draft's parameters are."""
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Type of the draft's parameters."""
        return self.backbone.norm.weight.dtype

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H], the target's, frozen."""
        return self.ends.lm_head.detach()

    def bind(self, target: Target) -> Self:
        """As of any draft; a packed one packs the LM head."""
        super().bind(target)
        if self.packed:
            self._pack_ends()
        return self

    def pack(self) -> Self:
        """Pack backbone and LM head for decoding on CPU; the draft can no longer be saved. Returns self."""
        self.backbone.pack()
        self._pack_ends()
        self.packed = True
        return self

    def _pack_ends(self) -> None:
        self._packed_lm_head = PackedLinear(self.ends.lm_head.to(self.dtype))
        self._choice_embedding = self._embedding_of_choices()
        self._head_ops = HeadOps(self.head_weights, self.device, self.dtype)

    def prepare_training(self, trained: str, recompute_layers: bool = False) -> None:
        """See `BaseDraft.prepare_training`."""
        self.backbone.requires_grad_(trained != "head")
        self.backbone.recompute_layers = recompute_layers

    def embed_choices(self, choices: Tensor) -> Tensor:
        """Indices into the logits [...] to the target's embeddings [..., H]."""
        return self.embed(self.to_token_ids(choices))

    @property
    def choice_embedding(self) -> Callable[[Tensor], Tensor]:
        """`embed_choices`, as a table that native code can read if the target's embedding is one."""
        return self._choice_embedding or self._embedding_of_choices()

    def _embedding_of_choices(self) -> Callable[[Tensor], Tensor]:
        return EmbeddingTable.of(self.ends.embedding, self.draft_vocab_ids, self.dtype) or self.embed_choices

    @property
    def head_weights(self) -> HeadWeights | None:
        """The head as drafting reads it; None without one."""
        return None if self.head is None else self.head.weights(self.choice_embedding)

    @property
    def head_ops(self) -> HeadOps:
        """Drafting with the head; a packed draft has it ready."""
        return self._head_ops or HeadOps(self.head_weights, self.device, self.dtype)

    def block_embeddings(self, anchors: Tensor, block_size: int | None = None) -> Tensor:
        """Anchor ids [...] to block inputs [..., B, H]: the anchor in slot 0, masks elsewhere."""
        slots = self.config.block_size if block_size is None else block_size
        block = torch.full((*anchors.shape, slots), self.config.mask_token_id, device=anchors.device)
        block[..., 0] = anchors
        return self.embed(block)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to base logits [..., V]."""
        if self._packed_lm_head is not None:
            return self._packed_lm_head(hidden)
        return F.linear(hidden, self.ends.lm_head.to(hidden.dtype))

    def trial_logits(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Logits [1, B, V] of a block after tokens [1, n] with features [1, n, F], to see whether they are finite."""
        count, block_size = tokens.shape[1], self.config.block_size
        positions = torch.arange(count + block_size, device=tokens.device)[None]
        read = self.read_features(features).to(self.dtype)
        context = self.backbone.project_context(read, positions[:, :count])
        seen = torch.ones(1, 1, block_size, count + block_size, dtype=torch.bool, device=tokens.device)
        block = self.block_embeddings(tokens[:, -1])
        return self.base_logits(self.backbone(block, positions[:, count:], context, seen))

    def keep_outputs(self, choices: Tensor) -> None:
        """Keep only these outputs [n], in a new head that shares all other weights; call `bind` next."""
        if self.head is not None:
            down, activation, up = self.head.embed_proj
            self.head = sharing_copy(self.head)
            self.head.embed_proj = nn.Sequential(down, activation, output_rows(up, choices))

    def count_parameters(self) -> dict[str, int]:
        """Parameters of backbone, gru, w1 and w2; the last three only with a head."""
        parts: dict[str, nn.Module] = {"backbone": self.backbone}
        if self.head is not None:
            down, _, up = self.head.embed_proj
            parts |= {"gru": self.head.prefix_gru, "w1": down, "w2": up}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
