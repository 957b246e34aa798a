"""FR-Spec (arXiv 2502.14856): a draft vocabulary of frequent tokens, counted in data, for a finished draft.

A few tokens make up most of any text, and the LM head is much of what a draft costs; so the draft chooses among the
most frequent tokens only, by the same rows of the same weights. Nothing is retrained, and verification, which sees the
whole vocabulary, stays as lossless as it was. The published method serves an EAGLE-2 draft; here it serves every draft
that has logits.

Training counts in the same way when a recipe asks for a draft vocabulary (`training.data.frequent_tokens`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from domino_spec.draft.backbone import sharing_copy
from domino_spec.draft.load import AnyDraft
from domino_spec.files import atomic_path, read_json
from domino_spec.settings import Settings, UserError, parse_settings
from domino_spec.target.model import Target


def count_tokens(texts: Iterable[Iterable[int]]) -> Counter[int]:
    """How often each token occurs in texts of token ids."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.tolist() if isinstance(text, Tensor) else text)
    return counts


def rank_tokens(counts: Mapping[int, int], always: Iterable[int] = (), size: int | None = None) -> list[int]:
    """Absolute token ids, the most frequent first, the lower id first if two are equally frequent.

    Args:
        counts: of `count_tokens`.
        always: tokens that must be in, such as stop tokens; see `keep_first`.
        size: how many at most; None for all that occur.

    Returns:
        Counts {2: 9, 0: 5, 3: 4, 1: 1} with token 4 required give [2, 0, 4] for size 3.

    Raises:
        UserError: more tokens are required than `size`.
    """
    ranked = sorted((token for token, n in counts.items() if n > 0), key=lambda token: (-counts[token], token))
    return keep_first(ranked, always, size)


def keep_first(ranked: Sequence[int], always: Iterable[int], size: int | None) -> list[int]:
    """The `size` first of `ranked`, with the tokens of `always` forced in.

    A required token occurs once: at its rank, or, if that is too far behind, at the end, which costs the last of
    the others. (The published script appends its stop token even if it is there already.)

    Raises:
        UserError: more tokens are required than `size`.
    """
    required = dict.fromkeys(always)
    if size is not None and size < max(1, len(required)):
        raise UserError(
            f"a draft vocabulary must hold at least 1 token, got {size}"
            if size < 1
            else f"a draft vocabulary of {size} tokens is too small for the {len(required)} stop tokens it must hold"
        )
    room = len(ranked) if size is None else size - len(required)
    chosen: dict[int, None] = {}
    for token in ranked:
        if token in required:
            chosen[token] = None
        elif room > 0:
            chosen[token] = None
            room -= 1
    return [*chosen, *(token for token in required if token not in chosen)]


def fill_up(token_ids: Collection[int], size: int) -> list[int]:
    """`token_ids` and, if they are fewer than `size`, the lowest unused ids; ascending."""
    chosen = set(token_ids)
    filler = 0
    while len(chosen) < size:
        chosen.add(filler)
        filler += 1
    return sorted(chosen)


@dataclass(frozen=True)
class FrequentTokens(Settings):
    """A ranking of tokens, and what it was counted in; the fields are the keys of its JSON file."""

    token_ids: tuple[int, ...]
    """Absolute ids, the most frequent first, with the tokens of `always` among them."""
    counts: tuple[int, ...]
    """How often each occurred."""
    always: tuple[int, ...]
    """Tokens that every draft vocabulary holds: the target's stop tokens."""
    vocab_size: int
    """V of the target."""
    tokenizer: str | None
    """Fingerprint of the tokenizer; None if the target has none."""
    target_fingerprint: str
    """The target that the counted texts were made for; another one with the same tokenizer may use them too."""
    source: str
    """What was counted."""

    def __post_init__(self) -> None:
        known = set(self.token_ids)
        for wrong, reason in (
            (not self.token_ids, "it holds no tokens"),
            (len(known) < len(self.token_ids), "a token occurs twice"),
            (len(self.counts) != len(self.token_ids), "token_ids and counts differ in length"),
            (min(self.counts, default=0) < 0, "a count is negative"),
            (any(not 0 <= t < self.vocab_size for t in known), f"a token lies outside 0 to {self.vocab_size - 1}"),
            (not known.issuperset(self.always), "a token of always is not in token_ids"),
        ):
            if wrong:
                raise UserError(f"not a usable ranking of tokens: {reason}")

    @property
    def size(self) -> int:
        """How many tokens are ranked."""
        return len(self.token_ids)

    def first(self, size: int | None = None) -> list[int]:
        """The `size` most frequent tokens with the required ones among them; None for all.

        Raises:
            UserError: more than there are, or fewer than are required.
        """
        if size is not None and size > self.size:
            raise UserError(f"the ranking holds {self.size} tokens, fewer than the {size} asked for")
        return keep_first(self.token_ids, self.always, size)

    def coverage(self, size: int | None = None) -> float:
        """The share of the counted text that the `size` first tokens make up."""
        counts = dict(zip(self.token_ids, self.counts, strict=True))
        return sum(counts[token] for token in self.first(size)) / max(1, sum(self.counts))

    def check(self, target: Target) -> None:
        """Refuse a target with another tokenizer.

        Raises:
            UserError: one sentence that names both sides.
        """
        check_tokenizer("this ranking of tokens", self.vocab_size, self.tokenizer, target)

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically.

        Raises:
            UserError: it could not be written.
        """
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(self).items()]
        with atomic_path(path) as scratch:
            scratch.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> FrequentTokens:
        """What `save` wrote.

        Raises:
            UserError: it cannot be read, or is not a ranking of tokens.
        """
        return parse_settings(cls, read_json(path), str(path))


def count_for(target: Target, texts: Iterable[Iterable[int]], source: str, size: int | None = None) -> FrequentTokens:
    """A ranking for `target`.

    Args:
        target: whose vocabulary it is, and whose stop tokens must be in.
        texts: token ids.
        source: what they are, for the file.
        size: how many tokens to keep; None for all that occur.

    Raises:
        UserError: no tokens, ids outside the vocabulary, or a size that cannot hold the stop tokens.
    """
    counts = count_tokens(texts)
    if not counts:
        raise UserError(f"{source} holds no tokens to count")
    ranked = rank_tokens(counts, sorted(target.stop_token_ids), size)
    return FrequentTokens(
        token_ids=tuple(ranked),
        counts=tuple(counts[token] for token in ranked),
        always=tuple(sorted(target.stop_token_ids)),
        vocab_size=target.vocab_size,
        tokenizer=tokenizer_fingerprint(target.tokenizer),
        target_fingerprint=target.fingerprint,
        source=source,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A short name for which id stands for which token; None without a tokenizer."""
    if tokenizer is None:
        return None
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def check_tokenizer(counted: str, vocab_size: int, tokenizer: str | None, target: Target) -> None:
    """Refuse counts of text for a target with another tokenizer.

    Args:
        counted: what they are, for the message.
        vocab_size: V that they were counted for.
        tokenizer: fingerprint of theirs, None if it is not known.
        target: to be used with.

    Raises:
        UserError: one sentence that names both sides.
    """
    if vocab_size != target.vocab_size:
        raise UserError(
            f"{counted} was counted for a vocabulary of {vocab_size}, that of {target.name} has "
            f"{target.vocab_size}: build one for this target"
        )
    theirs = tokenizer_fingerprint(target.tokenizer)
    if None not in (theirs, tokenizer) and theirs != tokenizer:
        raise UserError(
            f"{counted} was counted with tokenizer {tokenizer}, that of {target.name} is {theirs}: "
            "build one for this target"
        )


def restricted(draft: AnyDraft, ranking: FrequentTokens | Path | str, size: int | None, target: Target) -> AnyDraft:
    """`draft` with the most frequent tokens as its draft vocabulary.

    Args:
        draft: bound to `target`; packed or not.
        ranking: or the file that holds it.
        size: how many of its tokens; None for all.
        target: the model it drafts for.

    Raises:
        UserError: the file cannot be used, it belongs to another tokenizer, or leaves no token.
    """
    ranking = ranking if isinstance(ranking, FrequentTokens) else FrequentTokens.load(Path(ranking))
    ranking.check(target)
    return restrict(draft, ranking.first(size), target)


@torch.no_grad()
def restrict(draft: AnyDraft, token_ids: Iterable[int], target: Target) -> AnyDraft:
    """A draft that can propose only `token_ids`, by the same weights: their logits are what they were.

    Args:
        draft: with or without a draft vocabulary; tokens that it could not propose before stay excluded. It is not
            changed, and its layers are shared.
        token_ids: absolute, in any order.
        target: what the new draft is bound to.

    Returns:
        A bound draft with `draft_vocab_ids` ascending; `draft` itself if nothing is left out.

    Raises:
        UserError: ids outside the vocabulary, or none of them is one that `draft` can propose.
    """
    wanted = torch.tensor(sorted(set(token_ids)), dtype=torch.long)
    if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < target.vocab_size:
        raise UserError(f"a draft vocabulary holds token ids outside the vocabulary of {target.vocab_size}")
    choices = draft.to_choices(wanted.to(draft.device))
    choices = choices[choices >= 0]
    if len(choices) == 0:
        raise UserError("this draft can propose none of the tokens of the draft vocabulary asked for")
    if len(choices) == draft.config.logits_size:
        return draft
    fewer = sharing_copy(draft)
    fewer.draft_vocab_ids = draft.to_token_ids(choices)
    fewer.config = replace(
        draft.config, draft_vocab_size=len(choices), published=_published(draft.config.published, len(choices))
    )
    fewer.custom_generate = None  # it would use the other draft
    fewer.keep_outputs(choices)
    return fewer.bind(target)


def _published(published: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A published configuration with the size of the draft vocabulary; empty if none was read from a file."""
    changed = dict(published)
    if isinstance(nested := changed.get("dflash_config"), Mapping):
        changed["dflash_config"] = {**nested, "draft_vocab_size": size}
    elif changed:
        changed["draft_vocab_size"] = size
    return changed
