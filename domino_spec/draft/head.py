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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domino_spec.config import HeadConfig


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
        input_reset, input_update, input_new = gates.chunk(3, dim=-1)
        state_reset, state_update, state_new = F.linear(state, self.weight_hh_l0).chunk(3, dim=-1)
        reset = torch.sigmoid(input_reset + state_reset)
        update = torch.sigmoid(input_update + state_update)
        new = torch.tanh(input_new + reset * state_new)
        return new + update * (state - new)

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
