"""The target's embedding as a kernel can read it: a matrix, a choice of its rows, and a constant factor."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCALED = ("Gemma3TextScaledWordEmbedding", "Gemma4TextScaledWordEmbedding")
"""Modules of transformers that look up and multiply with `scalar_embed_scale`, and do nothing else."""


@dataclass(frozen=True)
class EmbeddingTable:
    """Indices into the logits to embeddings, in the draft's type; a function that kernels can look into."""

    weight: Tensor
    """[vocabulary, H], the target's own."""
    token_ids: Tensor | None
    """[V] int64, the token of each index into the logits; None where they are the same."""
    dtype: torch.dtype
    """Of the draft."""
    scale: float = 1.0
    """What embeddings are multiplied by (Gemma), in the target's type."""

    @staticmethod
    def of(module: nn.Module, token_ids: Tensor | None, dtype: torch.dtype) -> EmbeddingTable | None:
        """The table behind a target's embedding; None where the module does more than look up, or it is not known.

        Known are `nn.Embedding` and the scaled kind of transformers' Gemma, which keeps its factor as a number.
        """
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return None
        changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        scale: float | None = 1.0 if type(module).forward is nn.Embedding.forward else None
        if type(module).__name__ in _SCALED:
            scale = getattr(module, "scalar_embed_scale", None)
        if changed or not isinstance(scale, float) or not module.weight.is_contiguous():
            return None
        return EmbeddingTable(module.weight.detach(), token_ids, dtype, _rounded(scale, module.weight.dtype))

    def __call__(self, choices: Tensor) -> Tensor:
        """Indices into the logits [...] to embeddings [..., H]."""
        rows = F.embedding(choices if self.token_ids is None else self.token_ids[choices], self.weight)
        return (rows if self.scale == 1 else rows * self.scale).to(self.dtype)


def _rounded(number: float, dtype: torch.dtype) -> float:
    """`float(torch.tensor(number, dtype=dtype))` without a tensor: a table is asked for in every cycle."""
    if dtype == torch.bfloat16:  # the upper half of a float32, to the nearest, ties to even
        (bits,) = struct.unpack("<I", struct.pack("<f", number))
        return struct.unpack("<f", struct.pack("<I", bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000))[0]
    for kind in {torch.float16: "fe", torch.float32: "f"}.get(dtype, ""):  # PyTorch goes by way of float32
        (number,) = struct.unpack(kind, struct.pack(kind, number))
    return number
