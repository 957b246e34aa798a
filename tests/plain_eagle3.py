"""EAGLE-3 written out without a cache, a batch, a mask or a tensor of trees: what the tests compare the package with.

One pair at a time, in float64, by the formulas of arXiv 2503.01840 and its published code; trees as dictionaries of
paths. Nothing here calls the package but to take a draft's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class PlainEagle3:
    """The published forward pass over pairs of a token and a feature.

    Args:
        draft: whose weights are copied; bound, not packed.
        wrong: one of `MISREADINGS`, or none.
    """

    MISREADINGS = (
        "concatenation turned round",
        "normed residual",
        "norm left out",
        "former keys one place off",
        "no rotation",
    )

    def __init__(self, draft, wrong: str | None = None) -> None:
        self.weights = {name: p.detach().double() for name, p in draft.named_parameters()}
        own = draft.embed_tokens
        self.embedding = (draft.ends.embedding.weight if own is None else own).detach().double()
        config = draft.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.eps, self.theta, self.wrong = config.rms_norm_eps, config.rope_theta, wrong

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[f"{name}.weight"]

    def lm_head(self, x: Tensor) -> Tensor:
        return x @ self.weights["lm_head.weight"].T

    def logits(self, out: Tensor) -> Tensor:
        return self.lm_head(out if self.wrong == "norm left out" else self.norm(out, "norm"))

    def fuse(self, features: Tensor) -> Tensor:
        return self.weights["fc.weight"] @ features.double()

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """The first and the second half of a head are real and imaginary parts."""
        half = len(x) // 2
        turns = torch.tensor([position * self.theta ** (-i / half) for i in range(half)], dtype=torch.double)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((turned.real, turned.imag))

    def pair(self, token: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, and the residual."""
        parts = [
            self.norm(self.embedding[token], "midlayer.input_layernorm"),
            self.norm(feature, "midlayer.hidden_norm"),
        ]
        residual = parts[1] if self.wrong == "normed residual" else feature
        if self.wrong == "concatenation turned round":
            parts.reverse()
        return torch.cat(parts), residual

    def run(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The layer over a chain of pairs at positions 0, 1, ..: [n, H]."""
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (
            [(self.weights[f"midlayer.self_attn.{name}.weight"] @ x).view(-1, self.head_dim) for x, _ in pairs]
            for name in names
        )
        off = 1 if self.wrong == "former keys one place off" else 0
        scale = 0 if self.wrong == "no rotation" else 1
        outputs = []
        for i, (_, residual) in enumerate(pairs):
            heads = []
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                query = self.rotate(q[i][head], scale * i)
                keys = [self.rotate(k[j][group], scale * (j + (off if j < i else 0))) for j in range(i + 1)]
                weights = torch.stack([query @ key / math.sqrt(self.head_dim) for key in keys]).softmax(0)
                heads.append(sum(w * v[j][group] for j, w in enumerate(weights)))
            x = residual + self.weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
            y = self.norm(x, "midlayer.post_attention_layernorm")
            gate, up, down = (self.weights[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            gated = gate @ y
            outputs.append(x + down @ (gated * torch.sigmoid(gated) * (up @ y)))
        return torch.stack(outputs)

    def outputs(self, features: Tensor, tokens: list[int]) -> Tensor:
        """Of a text: features [n, 3H] of its positions, and the token after each."""
        return self.run([self.pair(t, self.fuse(f)) for t, f in zip(tokens, features, strict=True)])

    def continued(self, features: Tensor, tokens: list[int], path: list[int]) -> Tensor:
        """The same, then along drafted tokens, each on the output before it."""
        pairs = [self.pair(t, self.fuse(f)) for t, f in zip(tokens, features, strict=True)]
        outputs = self.run(pairs)
        for token in path:
            pairs.append(self.pair(token, outputs[-1]))
            outputs = self.run(pairs)
        return outputs


def plain_tree(
    log_probs: Callable[[tuple[int, ...]], list[float]], top_k: int, depth: int, budget: int
) -> list[tuple[int, ...]]:
    """EAGLE's dynamic tree as paths of choices, in the order of its nodes.

    Args:
        log_probs: of every choice after a path.
        top_k: children of a node, and nodes that are expanded together.
        depth: how often a level is expanded.
        budget: nodes kept.
    """

    def children(path: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        following = log_probs(path)
        best = sorted(range(len(following)), key=lambda choice: -following[choice])[:top_k]
        return [(score + following[choice], (*path, choice)) for choice in best]

    beam = children((), 0.0)
    pool = list(beam)
    for _ in range(depth):
        level = [child for score, path in beam for child in children(path, score)]
        pool += level
        beam = sorted(level, key=lambda node: -node[0])[:top_k]
    kept = sorted(range(len(pool)), key=lambda i: -pool[i][0])[:budget]
    return [pool[i][1] for i in sorted(kept)]
