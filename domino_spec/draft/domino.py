"""The Domino head: a causal correction of the backbone's base logits.

Second half of a draft. A GRU runs over the tokens drafted so far, and a low-rank layer turns its state and the
slot's hidden state into an addition to the base logits (paper 4.1.2):

    S_j          = GRU(E(x_j), S_{j-1}),  S_{-1} = 0
    correction_i = W2 silu(W1 [h_slot ; S_{i-1}])

There is one recurrence with two drivers: `step` while drafting and `block` while training; they agree exactly.

Shapes: G GRU width, L low rank, H hidden, V logits width (the draft vocabulary where there is one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.draft.backbone import Backbone
from domino_spec.draft.config import DraftConfig, HeadConfig
from domino_spec.ops.heads import EmbeddingTable, HeadOps, HeadWeights, gru_cell
from domino_spec.target.native import PackedLinear

if TYPE_CHECKING:
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


# ----------------------------------------------------------------------
# A draft: backbone and head together, joined to the frozen embedding and LM head of its target.
#
# The draft owns only what is trained and published; the target's two end matrices are borrowed through `TargetEnds`
# and never appear in a checkpoint.


@dataclass(frozen=True)
class TargetEnds:
    """What a draft borrows from its target, frozen."""

    embedding: nn.Module
    """Token ids [...] to embeddings [..., H]; the model's own module, which may scale (Gemma)."""
    lm_head: Tensor
    """[V, H]: rows of the output projection for the tokens this draft can propose."""
    final_norm: nn.Module
    """The target's last norm, which turns the output of its last layer into what the LM head reads."""


class Draft(nn.Module):
    """Proposes blocks of tokens from the target's features (paper section 4.1).

    Args:
        config: shape and label convention.
        draft_vocab_ids: [draft_vocab_size], absolute token ids that the draft can propose, ascending; required
            exactly where the configuration has a draft vocabulary.
    """

    draft_vocab_ids: Tensor | None

    def __init__(self, config: DraftConfig, draft_vocab_ids: Tensor | None = None) -> None:
        super().__init__()
        if (draft_vocab_ids is None) != (config.draft_vocab_size is None):
            raise ValueError("draft_vocab_ids must be given exactly when draft_vocab_size is set")
        self.config = config
        self.backbone = Backbone(config)
        self.head = DominoHead(config.head, config.hidden_size, config.logits_size) if config.head else None
        self.register_buffer("draft_vocab_ids", draft_vocab_ids)
        self._packed_lm_head: PackedLinear | None = None
        self._head_ops: HeadOps | None = None
        self.nested_head_names = False
        """True where the checkpoint kept the head under `logit_head.` (older layout), so that saving keeps it there."""
        self.custom_generate: Callable[..., Tensor] | None = None
        """What `model.generate(custom_generate=...)` of transformers takes; set by `domino_spec.load_draft`."""
        # A list, so that the borrowed modules are not registered as ours (state_dict, optimizer, .to()).
        self._ends: list[TargetEnds] = []

    def bind(self, target: Target) -> Draft:
        """Borrow embedding and LM head from `target` (checked by `pairing.check_pairing`); returns self.

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

    def read_features(self, features: Tensor) -> Tensor:
        """The target's raw outputs at the taps [..., F] as this draft reads them: the last layer's may be normed."""
        if not self.config.last_tap_normed:
            return features
        taps = zip(self.config.target_layer_ids, features.split(self.config.hidden_size, dim=-1), strict=True)
        last, norm = self.config.num_target_layers - 1, self.ends.final_norm
        return torch.cat([norm(part.contiguous()) if layer == last else part for layer, part in taps], dim=-1)

    @property
    def feature_scale(self) -> Tensor | None:
        """What training multiplies features with, [F] (`Backbone.scale_features`)."""
        return self.backbone.feature_scale

    def scale_features(self, scale: Tensor, trained: bool = False) -> None:
        """See `Backbone.scale_features`."""
        self.backbone.scale_features(scale, trained)

    @property
    def packed(self) -> bool:
        """True once `pack` was called."""
        return self._packed_lm_head is not None

    @property
    def device(self) -> torch.device:
        """Where the draft's parameters are."""
        return self.backbone.hidden_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the draft's parameters."""
        return self.backbone.hidden_norm.weight.dtype

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] to the target's embeddings [..., H], in the draft's dtype."""
        return self.ends.embedding(token_ids).to(self.dtype)

    def embed_choices(self, choices: Tensor) -> Tensor:
        """Indices into the logits [...] to the target's embeddings [..., H]."""
        return self.embed(self.to_token_ids(choices))

    @property
    def choice_embedding(self) -> Callable[[Tensor], Tensor]:
        """`embed_choices` as a table that kernels can read, where the target's embedding is one."""
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
        """Hidden states [..., H] to base logits [..., V or draft vocabulary]."""
        if self._packed_lm_head is not None:
            return self._packed_lm_head(hidden)
        return F.linear(hidden, self.ends.lm_head.to(hidden.dtype))

    def pack(self) -> Draft:
        """Pack backbone and LM head for decoding on CPU; the draft can no longer be saved. Returns self."""
        self.backbone.pack()
        self._packed_lm_head = PackedLinear(self.ends.lm_head.to(self.dtype))
        self._head_ops = HeadOps(self.head_weights, self.device, self.dtype)
        return self

    def to_token_ids(self, choices: Tensor) -> Tensor:
        """Indices into the logits to absolute token ids, same shape."""
        return choices if self.draft_vocab_ids is None else self.draft_vocab_ids[choices]

    def to_choices(self, token_ids: Tensor) -> Tensor:
        """Absolute token ids to indices into the logits, same shape; -1 for tokens the draft cannot propose."""
        if self.draft_vocab_ids is None:
            return token_ids
        index = torch.searchsorted(self.draft_vocab_ids, token_ids).clamp(max=len(self.draft_vocab_ids) - 1)
        return torch.where(self.draft_vocab_ids[index] == token_ids, index, -1)
