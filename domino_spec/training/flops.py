"""Floating-point operations of a training step, counted from shapes, and the rate of products that a device reaches.

Both together say how well training uses its device: operations / seconds / rate is the achieved fraction.

What counts:

- A multiply-add is two operations. Matrix products count, attention's among them; norms, activations, softmax and the
  optimizer do not (about one operation in a hundred).
- The backward pass of a trained product is two products of its size, one for its input and one for its weight. A frozen
  weight gets no gradient (the LM head: one), nor does an input before which nothing is trained (the features, the
  head's embeddings; with `trained: head` all that the backbone puts out).
- Attention counts the keys that a slot may see: the context before its anchor, and its own block.
- Work that is done twice counts once: activation checkpointing, or a kernel that computes masked scores or scores anew,
  takes longer and achieves less.
- The target's own pass over the text is another model's and is left out; its logits, where an objective compares with
  them, are one more product with the LM head.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence as SequenceType
from dataclasses import astuple, dataclass
from typing import cast

import torch
from torch import Tensor

from domino_spec.draft.config import FEATURE_LEVELS, SINGLE_LAYER_KINDS, DraftConfig, SingleLayerConfig
from domino_spec.recipe import OptimizationRecipe
from domino_spec.training.data import Sequence
from domino_spec.training.losses import OBJECTIVES

BENCHMARK_SECONDS = 0.2
PRODUCTS = 4
"""Products that are timed together, so that starting them hardly counts."""
LARGEST_PRODUCT = 8192
"""Rows of the largest matrix that `matrix_rate` multiplies: 128 MB in bfloat16."""


@dataclass(frozen=True)
class Work:
    """How much a step goes through, summed over its sequences."""

    context: int
    """T, tokens of text whose features become context."""
    blocks: int
    """A, blocks of all sequences."""
    block_size: int
    """B."""
    pairs: int
    """Slots times the keys that each of them sees, in one head of one layer."""
    labels: int
    """Drafted tokens that have a loss."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step, forward and backward."""

    context: float
    """`fc`, and the context's keys and values."""
    layers: float
    """The layers' own products over all slots."""
    attention: float
    lm_head: float
    """Base logits, their gradient, and all further products with the LM head."""
    head: float
    """GRU, W1 and W2."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(astuple(self))


def step_work(
    config: DraftConfig | SingleLayerConfig,
    sequences: SequenceType[Sequence],
    anchors: SequenceType[Tensor],
    block_size: int,
    draft_vocab_ids: Tensor | None = None,
) -> Work:
    """Count what a step, or a micro-batch, goes through.

    Args:
        config: of the draft.
        sequences: of the step.
        anchors: positions of each sequence's blocks.
        block_size: slots per block, where training runs shorter blocks than the draft's.
        draft_vocab_ids: of the draft, on the CPU: labels outside of them have no loss.
    """
    num_drafts = block_size - config.first_draft_slot
    offsets = torch.arange(1, num_drafts + 1)
    pairs = labels = 0
    for sequence, positions in zip(sequences, anchors, strict=True):
        labelled = positions[:, None] + offsets  # [A, N]
        is_answer = torch.zeros(len(sequence.tokens), dtype=torch.bool)
        for start, end in sequence.answers:
            is_answer[start:end] = True
        last = len(sequence.tokens) - 1
        inside = is_answer[labelled.clamp(max=last)] & (labelled <= last)
        usable = inside.long().cumprod(-1).bool()
        if draft_vocab_ids is not None:
            usable &= torch.isin(sequence.tokens[labelled.clamp(max=last)], draft_vocab_ids)
        labels += int(usable.sum())
        pairs += block_size * (int(positions.sum()) + block_size * len(positions))
    context = sum(len(s.tokens) for s in sequences)
    return Work(context, sum(map(len, anchors)), block_size, pairs, labels)


def step_flops(config: DraftConfig | SingleLayerConfig, recipe: OptimizationRecipe, work: Work) -> Flops:
    """Operations of a step, by the rules above."""
    if config.kind in SINGLE_LAYER_KINDS:
        return _single_layer_flops(cast(SingleLayerConfig, config), recipe, work)
    config = cast(DraftConfig, config)
    hidden, vocabulary, num_layers = config.hidden_size, config.logits_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys_values = 2 * config.num_key_value_heads * config.head_dim
    num_drafts = work.block_size - config.first_draft_slot
    drafted = work.blocks * num_drafts
    trained = recipe.trained == "all"

    fc = _product(work.context, config.feature_size, hidden)
    projection = _product(work.context, hidden, num_layers * keys_values)
    weights = hidden * (queries + keys_values) + queries * hidden + 3 * hidden * config.intermediate_size
    layers = num_layers * _product(work.blocks * work.block_size, 1, weights)
    attention = num_layers * 2 * _product(work.pairs, 1, queries)  # scores, and their sum over values
    logits = _product(work.labels, hidden, vocabulary)
    lm_head = logits * (2 if trained else 1)
    if OBJECTIVES[recipe.objective].needs_target:
        lm_head += logits
    if recipe.position_weights == "acceptance":  # confidences come first, from logits of their own
        lm_head += logits
    if recipe.causal_encoder == "training_time_test" and config.head is not None:  # it drafts its own prefixes
        lm_head += _product(drafted, hidden, vocabulary)

    head = 0.0
    if config.head is not None:
        width, rank = config.head.gru_hidden_dim, config.head.low_rank
        gates, state = _product(drafted, hidden, 3 * width), _product(drafted, width, 3 * width)
        w1, w2 = _product(drafted, hidden + width, rank), _product(work.labels, rank, vocabulary)
        first_state = state / num_drafts  # zeros: nothing to differentiate
        head = 2 * gates + 3 * state - first_state + 3 * w1 + 3 * w2
        if recipe.position_weights == "acceptance":
            head += w2
        if recipe.causal_encoder == "training_time_test":
            corrected = work.blocks * max(0, num_drafts - config.head.pure_draft_prefix_len)
            head += gates + state + _product(drafted, hidden, rank)
            head += _product(corrected, width, rank) + _product(corrected, rank, vocabulary)
    return Flops(
        context=2 * fc + 3 * projection if trained else fc + projection,
        layers=layers * (3 if trained else 1),
        attention=attention * (3 if trained else 1),
        lm_head=lm_head,
        head=head,
    )


def _single_layer_flops(config: SingleLayerConfig, recipe: OptimizationRecipe, work: Work) -> Flops:
    hidden, vocabulary = config.hidden_size, config.logits_size
    queries = config.num_attention_heads * config.head_dim
    keys_values = 2 * config.num_key_value_heads * config.head_dim
    fc = _product(work.context, FEATURE_LEVELS * config.target_hidden_size, hidden)
    projection = _product(work.context, 2 * hidden, keys_values)
    weights = 2 * hidden * (queries + keys_values) + queries * hidden + 3 * hidden * config.intermediate_size
    lm_head = 3 * _product(work.labels, hidden, vocabulary)
    if OBJECTIVES[recipe.objective].needs_target:
        lm_head += _product(work.labels, config.target_hidden_size, vocabulary)
    return Flops(
        context=2 * fc + 2.5 * projection,  # of a pair, the embedding gets no gradient
        layers=3 * _product(work.blocks * work.block_size, 1, weights),
        attention=3 * 2 * _product(work.pairs, 1, queries),
        lm_head=lm_head,
        head=0.0,
    )


def _product(rows: int, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate at which the device multiplied large square matrices of that type, in operations per second.

    Sizes double while the next one still fits into the time; all of it takes well under a second. What else runs on the
    device lowers the result.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    size, seconds, best = 128, 0.0, 0.0
    while size < LARGEST_PRODUCT and 8 * (PRODUCTS + 1) * seconds < BENCHMARK_SECONDS:
        size *= 2
        left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        out = left @ right  # the first product of a size also chooses its kernel
        seconds = _seconds_of_a_product(left, right, out)
        best = max(best, 2.0 * size**3 / seconds)
    deadline = time.perf_counter() + BENCHMARK_SECONDS
    while time.perf_counter() < deadline:
        best = max(best, 2.0 * size**3 / _seconds_of_a_product(left, right, out))
    return best


def _seconds_of_a_product(left: Tensor, right: Tensor, out: Tensor) -> float:
    out[0, 0].item()  # waits for what the device still has to do
    started = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=out)
    out[0, 0].item()
    return (time.perf_counter() - started) / PRODUCTS


def shortened(value: float) -> str:
    """1234567 as `1.23 M`; ends in a space where there is no prefix, so that a unit may follow."""
    prefixes = iter(" kMGTPEZ")
    prefix = next(prefixes).strip()
    while abs(value) >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"
