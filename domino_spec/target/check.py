"""The check at load: a target must give here what its own modules give in transformers.

The reference is what the model's own modules, attention, masks and cache give for a few tokens of two requests, request
by request and without padding, before anything is replaced. The same tokens then go through this package's attention,
masks, cache and replacements, in the passes that decoding makes: a ragged prefill, then a tree, a chain and a step over
the cache. If something differs by more than rounding, the target is refused, because its text would be wrong.

During the check sliding windows are shortened, here and in transformers' masks, so that a few tokens fill more than a
window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from domino_spec.settings import UserError
from domino_spec.target.cache import ATTENTION_NAME
from domino_spec.target.model import Target
from domino_spec.target.native import can_pack

_log = logging.getLogger(__name__)

_PROMPT_LENGTHS = (11, 4)
"""Tokens of each request before the passes over the cache. All texts are longer than `_WINDOW`."""
_WINDOW = 5
_PARENTS = (-1, 0, 0, 1)
"""Parent of each row of the tree: rows two and three follow the first, row four follows the second."""
_LONG_PATH, _SHORT_PATH = (0, 1, 3), (0, 2)
_REFERENCE_PASSES = ((11, 1, 2), (4, 3))
"""Tokens of each pass in which transformers reads a request's long path over its cache."""


class Misfit(UserError):
    """A target gives something else here than in transformers.

    Args:
        name: of the target.
        fault: what differs, as a clause.
    """

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"{name} is not supported: {fault}")
        self.fault = fault


@dataclass(frozen=True)
class Outputs:
    """What a model gave for n tokens."""

    hidden: Tensor
    """[n, H], after the final norm."""
    logits: Tensor
    """[n, V]."""
    layers: Tensor
    """[n, L, H], the output of every layer; of a reference without the last, [n, L - 1, H]."""

    def rows(self, first: int, *rows: int) -> Outputs:
        """Some rows, counted from `first`; all before `first` if none is named."""
        chosen = [first + row for row in rows] if rows else list(range(first))
        return Outputs(self.hidden[chosen], self.logits[chosen], self.layers[chosen])


@dataclass(frozen=True)
class Reference:
    """What the model's own modules give for the tokens of the check."""

    tokens: tuple[Tensor, ...]
    """Tokens of each request, [n + 4]: those of its prompt, then those of the tree."""
    outputs: tuple[Outputs, ...]
    """Outputs of each request, for the same tokens."""


def checked_target(load: Callable[[], Target], pack: bool) -> Target:
    """A target that has passed the check.

    If it passes with its own modules only, it is loaded again and packed without replacements, and a warning is logged.

    Args:
        load: gives the target as its files have it, every module its own.
        pack: prepare it for inference if it is on a CPU (`Target.pack`).

    Raises:
        UserError: it gives something else here than in transformers.
    """
    target = load()
    pack = pack and can_pack(target.device, target.dtype)
    reference = read_reference(target)
    try:
        if pack:
            with _naming_the_target(target, "a pass over a few tokens fails here"):
                target.pack()
        check_target(target, reference)
        return target
    except Misfit as misfit:
        if not target.replaced:
            raise
        fault = misfit.fault
    del target  # two copies of the weights may not fit
    target = load().pack(replace=False)
    check_target(target, reference)
    _log.warning(
        "%s cannot use this package's faster modules: %s; its own modules run instead, which is slower",
        target.name,
        fault,
    )
    return target


@torch.inference_mode()
def read_reference(target: Target) -> Reference:
    """What the model's own modules give, before `Target.pack`.

    Raises:
        UserError: they cannot be run on a few tokens, or give values that are not finite.
    """
    texts = _texts(target)
    read = []
    failing = "transformers' own pass over a few tokens fails"
    with _naming_the_target(target, failing), eager_attention(target), target.shorter_window(_WINDOW):
        for text, length, sizes in zip(texts, _PROMPT_LENGTHS, _REFERENCE_PASSES, strict=True):
            prompt, drafts = text[:length], text[length:]
            long = _run_reference(target, torch.cat((prompt, drafts[[*_LONG_PATH]])), sizes)
            short = _run_reference(target, torch.cat((prompt, drafts[[*_SHORT_PATH]])), (length + len(_SHORT_PATH),))
            # The tree's rows are the long path's first two, the short one's last, and the long one's last.
            read.append(_joined(long.rows(length + 2), short.rows(-1, 0), long.rows(-1, 0)))
    # A target may forbid tokens with logits of minus infinity. The largest logit is NaN if any of them is.
    if not all(o.hidden.isfinite().all() and o.logits.amax(-1).isfinite().all() for o in read):
        dtype = str(target.dtype).removeprefix("torch.")
        raise UserError(
            f"{target.name} gives values that are not finite in {dtype}: its weights are damaged, or need another dtype"
        )
    return Reference(tuple(texts), tuple(read))


def _texts(target: Target) -> list[Tensor]:
    """Tokens of both requests, without the special ones that the configuration names, such as an image's."""
    named = [value for key, value in vars(target.config).items() if key.endswith(("token_id", "token_index"))]
    special = [token for value in named for token in (value if isinstance(value, list) else [value])]
    ordinary = sorted({*range(target.vocab_size)} - {token for token in special if isinstance(token, int)})
    generator = torch.Generator().manual_seed(0)
    lengths = [length + len(_PARENTS) for length in _PROMPT_LENGTHS]
    drawn = (torch.randint(len(ordinary), (length,), generator=generator).tolist() for length in lengths)
    return [torch.tensor([ordinary[i] for i in indices], device=target.device) for indices in drawn]


@contextmanager
def eager_attention(target: Target) -> Iterator[None]:
    """Run the model with the attention of its own file ("eager") instead of this package's.

    That attention defines the family: transformers' shared functions drop, in some versions, arguments that they do not
    know.

    Raises:
        UserError: the model does not take its attention from transformers' table, so it cannot be exchanged.
    """
    model = target.model
    if model.config._attn_implementation != ATTENTION_NAME:  # a user's ordinary model keeps its attention
        yield
        return
    try:
        model.set_attn_implementation("eager")
        configs = {id(m.config): m.config for m in target.decoder.modules() if isinstance(m, PreTrainedModel)}
        if any(config._attn_implementation != "eager" for config in (model.config, *configs.values())):
            family = type(model).__name__
            raise UserError(
                f"{target.name} is not supported: the attention of {family} cannot be exchanged for another"
            )
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _run_reference(target: Target, tokens: Tensor, sizes: Sequence[int]) -> Outputs:
    """What transformers gives for `tokens` [n], read in passes of these sizes over its cache."""
    model: Any = target.model
    found: list[Outputs] = []
    final: list[Any] = []
    cache: dict[str, Cache] = {}
    hook = target.decoder.register_forward_hook(lambda module, arguments, output: final.append(output))
    try:
        for part in tokens.split(list(sizes)):
            output = model(input_ids=part[None], use_cache=True, output_hidden_states=True, **cache)
            cache = {name: value for name, value in output.items() if isinstance(value, Cache)}
            hidden = final[-1].last_hidden_state[0]  # [n, H]
            # The first entry is the embedding, the last one has been normed; the others are outputs of layers. Some
            # families report other things under this name.
            states = [state[0] for state in (output.hidden_states or ())[1:-1] if state[0].shape == hidden.shape]
            layers = torch.stack(states, dim=1) if states else hidden.new_empty(len(part), 0, hidden.shape[1])
            found.append(Outputs(hidden, output.logits[0], layers))
    finally:
        hook.remove()
    return _joined(*found)


def _joined(*outputs: Outputs) -> Outputs:
    """Those of several passes, one after another."""
    return Outputs(*(torch.cat([getattr(one, field.name) for one in outputs]) for field in fields(Outputs)))


@torch.inference_mode()
def check_target(target: Target, reference: Reference) -> None:
    """Compare what a target gives with its reference.

    If only the outputs of its layers differ, it decodes, but not with drafts that read them (`Target.no_features`).

    Raises:
        Misfit: hidden states or logits differ by more than rounding.
    """
    target.no_features = None
    with target.shorter_window(_WINDOW), _naming_the_target(target, "a pass over a few tokens fails here"):
        compared = list(_comparisons(target, reference))
    for when, got, expected in compared:
        for what, ours, theirs in (
            ("hidden states", got.hidden, expected.hidden),
            ("logits", got.logits, expected.logits),
        ):
            if difference := _difference(target, ours, theirs):
                raise Misfit(
                    target.name,
                    f"the {what} of {type(target.model).__name__} {when} differ from transformers' own by "
                    f"{difference}, so its text would be wrong",
                )
    for _, got, expected in compared:
        if difference := _difference(target, got.layers[:, :-1], expected.layers):
            target.no_features = f"the layers' outputs differ from transformers' hidden states by {difference}"
            return
        try:
            normed = target.final_norm(got.layers[:, -1])
        except UserError:  # a draft is refused for the same reason when it is bound
            return
        if difference := _difference(target, normed, expected.hidden):
            target.no_features = f"what follows the last layer is not its norm: results differ by {difference}"
            return


def _comparisons(target: Target, reference: Reference) -> Iterator[tuple[str, Outputs, Outputs]]:
    """Names of passes, what they give here, and what they must give."""
    lengths = torch.tensor(_PROMPT_LENGTHS, device=target.device)
    longest = max(_PROMPT_LENGTHS)
    prompts = [text[:length] for text, length in zip(reference.tokens, _PROMPT_LENGTHS, strict=True)]
    tree = torch.stack([text[-len(_PARENTS) :] for text in reference.tokens])  # [R, 4]
    cache = target.new_cache(len(prompts), longest + len(_PARENTS))

    expected = [outputs.rows(length) for outputs, length in zip(reference.outputs, _PROMPT_LENGTHS, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    for request, outputs in enumerate(_outputs(target, padded, cache)):
        yield "in a first pass", outputs.rows(_PROMPT_LENGTHS[request]), expected[request]
    cache.lengths.copy_(lengths)

    for when, rows, ancestors in (
        ("in a tree over the cache", range(len(_PARENTS)), _ancestors(target.device)),
        ("in a chain over the cache", _LONG_PATH, None),
        ("in a step over the cache", (0,), None),
    ):
        given = _outputs(target, tree[:, [*rows]], cache, ancestors)
        for request, outputs in enumerate(given):
            yield when, outputs, reference.outputs[request].rows(_PROMPT_LENGTHS[request], *rows)


def _ancestors(device: torch.device) -> Tensor:
    """[R, 4, 4], True where a row of the tree descends from another or is it."""
    seen = torch.eye(len(_PARENTS), dtype=torch.bool)
    for row, parent in enumerate(_PARENTS[1:], 1):
        seen[row] |= seen[parent]
    return seen.expand(len(_PROMPT_LENGTHS), -1, -1).to(device)


def _outputs(target: Target, tokens: Tensor, cache: Any, ancestors: Tensor | None = None) -> list[Outputs]:
    """What a pass here gives for `tokens` [R, N], of each request."""
    found = target.forward(tokens, cache, range(target.num_layers), ancestors)
    assert found.features is not None
    layers = found.features.unflatten(-1, (target.num_layers, -1))
    return list(map(Outputs, found.hidden, target.lm_head(found.hidden), layers))


def _difference(target: Target, ours: Tensor, theirs: Tensor) -> str:
    """The largest difference of a row, relative to the row's length, as a phrase; empty if rounding explains it."""
    if ours.shape != theirs.shape:
        return f"their shape, {list(ours.shape)} instead of {list(theirs.shape)}"
    ours, theirs = ours.float(), theirs.float()
    equal = ours == theirs  # infinite logits too, of tokens that a model never gives
    lengths = theirs.masked_fill(theirs.isinf(), 0).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    relative, rounding = (ours - theirs).masked_fill(equal, 0).norm(dim=-1) / lengths, _rounding(target)
    if (relative <= rounding).all():  # true without rows; false with NaN
        return ""
    return f"{relative.max():.2g} of their size (rounding: {rounding:.2g})"


def _rounding(target: Target) -> float:
    """The change of a row that rounding may cause, relative to the row's length.

    A layer adds to its input twice, and each sum is rounded to the target's type by up to eps / 2. The errors of 2 L
    sums are independent, so together they grow like the square root of 2 L; 4 times that leaves room for what happens
    between the sums. Models of few layers need more room: their own attention rounds scores before the softmax, where
    an error of eps / 2 in a score of 30 changes a weight by 15 eps. Float32 has a floor, because another order of
    summation changes more than the last bit; another formula changes far more than the floor.
    """
    eps = torch.finfo(target.dtype).eps
    if target.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        eps = 2**-10  # products of TF32
    return max(1e-4, eps * max(16, 2 * (2 * target.num_layers) ** 0.5))


@contextmanager
def _naming_the_target(target: Target, what: str) -> Iterator[None]:
    """Turn any error of a family's code into one line, since any family may be loaded."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _log.debug("%s: %s", target.name, what, exc_info=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        family = type(target.model).__name__
        raise Misfit(target.name, f"{family}, {what}: {reason}") from error
