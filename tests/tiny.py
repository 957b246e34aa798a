"""Tiny random models that the tests share: targets of several architectures, drafts, a tokenizer, oracle drafters.

Everything is made from fixed seeds, on CPU, in float32, without the network.
"""

from __future__ import annotations

import copy
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from domino_spec.decoding.cycle import Proposal, State, Verdict, cycle_room
from domino_spec.decoding.engine import decode
from domino_spec.decoding.request import Generation, Limits
from domino_spec.decoding.sampling import History, Sampling, SamplingSettings
from domino_spec.draft.config import SINGLE_LAYER_KINDS, DraftConfig, HeadConfig, SingleLayerConfig
from domino_spec.draft.domino import Draft
from domino_spec.draft.single_layer import SingleLayerDraft
from domino_spec.drafters.block import BlockDrafter, TreeShape
from domino_spec.drafters.lookup import NoCache
from domino_spec.drafters.methods import METHODS
from domino_spec.recipe import OptimizationRecipe
from domino_spec.target.cache import ATTENTION_NAME
from domino_spec.target.model import Target
from domino_spec.training.data import Batch, Sequence, pack_batch
from domino_spec.training.features import compute_features
from domino_spec.training.step import StepResult, Trainer, tapped_layers

VOCAB = 60
MASK, EOS = 59, 58

_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    # Wide enough that logits differ clearly and random texts do not fall into a short loop at once.
    initializer_range=0.25,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-mixed": (
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=6, layer_types=_ALTERNATING, initializer_range=0.4),
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "mistral": (MistralConfig, dict(sliding_window=6)),
    "gemma3": (
        Gemma3TextConfig,
        dict(head_dim=8, sliding_window=5, layer_types=_ALTERNATING, query_pre_attn_scalar=8, initializer_range=0.1),
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny_model(kind: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random causal LM in float32 with transformers' own attention: the outside truth."""
    config_class, specific = _CONFIGS[kind]
    torch.manual_seed(seed)
    config = config_class(**{**_SHAPE, **specific, **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def as_target(model: PreTrainedModel, tokenizer=None, name: str = "tiny") -> Target:
    """The same weights behind this package's engine."""
    config = copy.deepcopy(model.config)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=model.dtype)
    ours.load_state_dict(model.state_dict())
    ours.generation_config = copy.deepcopy(model.generation_config)
    return Target(ours.requires_grad_(False), tokenizer, name)


def tiny_target(kind: str = "llama", seed: int = 0, tokenizer=None, **overrides) -> Target:
    """`as_target(tiny_model(...))`."""
    return as_target(tiny_model(kind, seed, **overrides), tokenizer)


def tiny_draft(
    target: Target,
    *,
    head: bool = True,
    shift_label: bool = True,
    block_size: int = 5,
    layers: int = 2,
    prefix: int = 1,
    draft_vocab_ids: Tensor | None = None,
    taps: tuple[int, ...] = (0, 3),
    last_tap_normed: bool = False,
    seed: int = 1,
    std: float = 0.3,
    head_sizes: tuple[int, int] = (12, 6),
    intermediate_size: int = 40,
) -> Draft:
    """A random draft bound to `target`, every weight of it (W2 included) far from its neutral start."""
    config = DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=target.vocab_size,
        num_target_layers=target.num_layers,
        target_layer_ids=taps,
        last_tap_normed=last_tap_normed,
        mask_token_id=min(MASK, target.vocab_size - 1),
        block_size=block_size,
        shift_label=shift_label,
        head=HeadConfig(*head_sizes, pure_draft_prefix_len=prefix) if head else None,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
        target_fingerprint=target.fingerprint,
    )
    generator = torch.Generator().manual_seed(seed)
    draft = Draft(config, draft_vocab_ids)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name else noise)
    return draft.requires_grad_(False).eval().bind(target)


def tiny_single_layer(
    target: Target,
    method: str = "eagle3",
    *,
    block_size: int = 4,
    draft_vocab_ids: Tensor | None = None,
    taps: tuple[int, int, int] = (0, 1, 3),
    seed: int = 1,
    std: float = 0.3,
) -> SingleLayerDraft:
    """A random EAGLE-3 or DART draft bound to `target`, every weight far from its neutral start."""
    config = SingleLayerConfig(
        kind=method,
        hidden_size=target.hidden_size,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        block_size=block_size,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
        target_fingerprint=target.fingerprint,
    )
    generator = torch.Generator().manual_seed(seed)
    draft = SingleLayerDraft(config, draft_vocab_ids)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name else noise)
    return draft.requires_grad_(False).eval().bind(target)


def draft_for(method: str, target: Target, **options) -> Draft | SingleLayerDraft | None:
    """A random draft of the kind that a method is made for; None where it needs none."""
    kinds = METHODS[method].kinds
    if not kinds:
        return None
    if kinds[0] in SINGLE_LAYER_KINDS:
        return tiny_single_layer(target, kinds[0], **options)
    return tiny_draft(target, head=kinds[0] == "domino", **options)


def random_prompts(lengths: list[int], vocab: int = VOCAB - 2, seed: int = 3) -> list[list[int]]:
    """Token ids below `vocab`, so that mask and stop token do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


_greedy_texts: dict[tuple[int, tuple[int, ...]], tuple[PreTrainedModel, list[int]]] = {}


@torch.inference_mode()
def plain_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers' own greedy generation writes after `prompt` (kept, as many tests ask for the same)."""
    key = (id(model), tuple(prompt))
    _, known = _greedy_texts.get(key, (model, []))
    if len(known) < count:
        ids = torch.tensor([prompt])
        options = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count)
        known = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        _greedy_texts[key] = (model, known)
    return known[:count]


def run(target: Target, drafter, prompts: list[list[int]], count: int, **options) -> list[Generation]:
    """Decode to the end with any drafter; `temperature`, `seed`, .. may be given for `SamplingSettings`."""
    settings = options.pop("settings", SamplingSettings())
    limits = options.pop("limits", Limits(count, stop_token_ids=frozenset()))
    generations: list[Generation] = []
    for _ in decode(target, drafter, prompts, settings=settings, limits=limits, generations=generations, **options):
        pass
    return generations


class MemoryCache:
    """A feature cache without a disk."""

    def __init__(self, target: Target, sequences: list[Sequence], layers: tuple[int, ...]) -> None:
        self.layers = tuple(layers)
        self._features = dict(zip((s.id for s in sequences), compute_features(target, sequences, layers), strict=True))

    def read(self, sequence: Sequence) -> Tensor:
        return self._features[sequence.id]

    def batch(self, sequences: list[Sequence]) -> Batch:
        return pack_batch(sequences, [self.read(s) for s in sequences])


def as_sequences(prompts: list[list[int]], answers: list[list[int]]) -> list[Sequence]:
    """Training sequences from prompts and answers."""
    pairs = enumerate(zip(prompts, answers, strict=True))
    return [conversation(f"s{i}", [pair]) for i, pair in pairs]


def conversation(id_: str, turns: list[tuple[list[int], list[int]]]) -> Sequence:
    """A training sequence of several turns, each a prompt and an answer."""
    tokens: list[int] = []
    answers = []
    for prompt, answer in turns:
        tokens += prompt
        answers.append((len(tokens), len(tokens) + len(answer)))
        tokens += answer
    return Sequence(id_, torch.tensor(tokens), tuple(answers))


def block_rows(anchors: list[Tensor]) -> list[tuple[int, int]]:
    """Sequence and position of every block of a pack, in the order of its rows."""
    return [(s, anchor) for s, positions in enumerate(anchors) for anchor in positions.tolist()]


def make_trainer(target: Target, sequences: list[Sequence], recipe: dict, source=None, **draft_options) -> Trainer:
    """A trainer of a random draft in float32 that reads features from memory, or from `source`."""
    draft = tiny_draft(target, **draft_options).train().requires_grad_(True)
    options = dict(
        steps=10, batch_size=8, micro_batch_size=8, anchors=6, precision="float32", clip_norm=1e9, position_decay=3.0
    )
    settings = OptimizationRecipe(**{**options, **recipe})
    source = source or MemoryCache(target, sequences, tapped_layers(draft, settings))
    return Trainer(draft, settings, sequences, source)


def step_gradients(trainer: Trainer) -> tuple[dict[str, Tensor], StepResult]:
    """The gradients that one step hands to the optimizer, and its result."""
    seen: dict[str, Tensor] = {}
    original = trainer.optimizer.step

    def record(*args, **kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.draft.named_parameters() if p.grad is not None})
        return original(*args, **kwargs)

    trainer.optimizer.step = record
    return seen, trainer.train_step()


def fit(target: Target, draft: Draft, sequences: list[Sequence], steps: int, **recipe) -> Trainer:
    """Train `draft` in place on `sequences` for a few steps in float32; returns the trainer."""
    options = dict(batch_size=8, micro_batch_size=8, anchors=8, learning_rate=1e-2, precision="float32", clip_norm=1e3)
    settings = OptimizationRecipe(steps=steps, **{**options, **recipe})
    source = MemoryCache(target, sequences, tapped_layers(draft, settings))
    trainer = Trainer(draft.train().requires_grad_(True), settings, sequences, source)
    for _ in range(steps):
        trainer.train_step()
    draft.eval().requires_grad_(False)
    return trainer


def whose(state: State, texts: list[list[int]]) -> list[int]:
    """Which text each request of a state is at: requests change places as others end."""
    left, found = list(range(len(texts))), []
    for row in state.tokens.tolist():
        found.append(max(left, key=lambda i, row=row: _common(texts[i], row)))
        left.remove(found[-1])
    return found


def _common(ours: list[int], theirs: list[int]) -> int:
    """Tokens that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def tree_of(block: BlockDrafter, budget: int, width: int | None = None, builder: str = "depth") -> BlockDrafter:
    """A drafter of trees with the settings of a drafter of chains."""
    return BlockDrafter(
        block.draft,
        use_head=block.head is not None,
        candidates=block.candidates,
        min_confidence=block.min_confidence,
        tree=TreeShape(budget, width, builder),
    )


def prefill(
    target: Target, prompts: list[list[int]], drafter, max_new_tokens: int, settings: SamplingSettings | None = None
) -> State:
    """Committed prompts, their cache (all but the last token, which the first pass verifies) and features."""
    lengths = torch.tensor([len(p) for p in prompts])
    capacity, longest = int(lengths.max()) + max_new_tokens + cycle_room(drafter), int(lengths.max()) - 1
    tokens = torch.zeros(len(prompts), capacity, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = target.new_cache(len(prompts), capacity)
    features = target.prefill(tokens[:, :longest], lengths - 1, cache, drafter.feature_layers)
    sampling = Sampling.alike(settings or SamplingSettings(), len(prompts))
    return State(tokens, lengths, lengths.clone(), torch.ones_like(lengths).bool(), cache, sampling, features)


def warp_logits(logits: Tensor, settings: SamplingSettings, history: History | None = None) -> Tensor:
    """`Sampling.warp` of logits [R, n, V], the same settings for all."""
    return Sampling([settings] * len(logits)).warp(logits, history)


def target_probs(logits: Tensor, settings: SamplingSettings, history: History | None = None) -> Tensor:
    """`Sampling.probs` of logits [R, n, V], the same settings for all."""
    return Sampling([settings] * len(logits)).probs(logits, history)


class KeepsNothing:
    """What the loop asks of a drafter without caches."""

    feature_layers: tuple[int, ...] = ()
    samples = False

    def allocate(self, requests: int, capacity: int) -> NoCache:
        return NoCache(requests)

    def read(self, cache: NoCache, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        pass

    def advance(self, cache: NoCache, verdict: Verdict) -> None:
        pass


class Beside:
    """Runs a drafter beside an oracle, whose drafts are verified; what the drafter proposes is for the test.

    Args:
        drafter: under test.
        oracle: knows the texts.
    """

    samples = False

    def __init__(self, drafter, oracle: Oracle | TreeOracle) -> None:
        self.drafter, self.oracle = drafter, oracle
        self.feature_layers, self.max_drafts = drafter.feature_layers, oracle.max_drafts
        self.proposals: list[tuple[list[list[int]], Proposal]] = []
        """Per cycle, the texts that were committed before it, and what the drafter proposed."""

    def allocate(self, requests: int, capacity: int):
        return self.drafter.allocate(requests, capacity)

    def read(self, own, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        self.drafter.read(own, tokens, features, counts)

    def propose(self, state: State, own, num_drafts: int) -> Proposal:
        proposal = self.drafter.propose(state, own, self.drafter.max_drafts)
        texts = [row[:n] for row, n in zip(state.tokens.tolist(), state.lengths.tolist(), strict=True)]
        self.proposals.append((texts, proposal))
        return self.oracle.propose(state, None, num_drafts)

    def advance(self, own, verdict: Verdict) -> None:
        self.drafter.advance(own, verdict)


class Oracle(KeepsNothing):
    """Drafts the known continuation, spoiled at one place per cycle so that every acceptance length comes up.

    Args:
        texts: prompt and continuation of every request, longer than what will be decoded.
        max_drafts: N.
        vocab: V.
    """

    def __init__(self, texts: list[list[int]], max_drafts: int, vocab: int = VOCAB) -> None:
        self.texts, self.max_drafts, self.vocab, self._cycle = texts, max_drafts, vocab, 0

    def propose(self, state: State, own, num_drafts: int) -> Proposal:
        drafts = torch.zeros(len(state.lengths), num_drafts, dtype=torch.long)
        for r, (whose_text, length) in enumerate(zip(whose(state, self.texts), state.lengths.tolist(), strict=True)):
            right = self.texts[whose_text][length : length + num_drafts]
            right += [0] * (num_drafts - len(right))
            spoiled = (self._cycle + r) % (num_drafts + 1)  # num_drafts: none
            drafts[r] = torch.tensor([(t + (i == spoiled)) % self.vocab for i, t in enumerate(right)])
        self._cycle += 1
        return Proposal(drafts, torch.full_like(state.lengths, num_drafts))


class TreeOracle(KeepsNothing):
    """Hides part of the known continuation in a random tree of wrong tokens, at random places of it.

    How much is hidden, and how many drafts are proposed, differs from request to request and from cycle to cycle. What
    follows below a wrong token, and what is written past a request's own drafts, would often be right if only it hung
    elsewhere or were proposed.

    Args:
        texts: prompt and continuation of every request, longer than what will be decoded.
        max_drafts: N.
        vocab: V.
        seed: of everything random.
    """

    def __init__(self, texts: list[list[int]], max_drafts: int, vocab: int = VOCAB, seed: int = 0) -> None:
        self.texts, self.max_drafts, self.vocab, self._random = texts, max_drafts, vocab, random.Random(seed)
        self.hidden: list[list[int]] = [[] for _ in texts]
        """Per request and cycle, how many tokens of the continuation the tree holds: all of them must be accepted."""
        self.proposed: list[list[int]] = [[] for _ in texts]
        """Per request and cycle, how many drafts were proposed."""

    def propose(self, state: State, own, num_drafts: int) -> Proposal:
        trees, self.order = [], whose(state, self.texts)
        for r, length in zip(self.order, state.lengths.tolist(), strict=True):
            text = self.texts[r]
            count = self._random.randint(0, num_drafts)
            hidden = self._random.randint(0, min(count, 4))
            following = (text[length:] + [0] * (num_drafts + 1))[: num_drafts + 1]
            trees.append(self._tree(following, hidden, count, num_drafts))
            self.hidden[r].append(hidden)
            self.proposed[r].append(count)
        tokens, parents = (torch.tensor(part, dtype=torch.long) for part in zip(*trees, strict=True))
        return Proposal(tokens, torch.tensor([self.proposed[r][-1] for r in self.order]), parents)

    def _tree(self, following: list[int], hidden: int, count: int, size: int) -> tuple[list[int], list[int]]:
        """Tokens and parents: `count` drafts, `hidden` of them the continuation, then more of it that is not meant."""
        tokens: list[int] = []
        parents: list[int] = []
        right = [-1]  # rows of the continuation, the anchor's first
        places = set(self._random.sample(range(count), hidden))
        for j in range(size):
            if j in places or j >= count:
                parents.append(right[-1])
                tokens.append(following[min(len(right) - 1, size - 1)])
                right.append(j)
                continue
            parent = self._random.choice([right[-1], -1, self._random.randint(-1, j - 1)])
            taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
            if parent in right:
                taken.add(following[right.index(parent)])
            depth, above = 0, parent
            while above >= 0:
                depth, above = depth + 1, parents[above]
            tempting = following[depth] not in taken and self._random.random() < 0.5
            token = following[depth] if tempting else self._random.choice(sorted(set(range(self.vocab)) - taken))
            parents.append(parent)
            tokens.append(token)
        return tokens, parents

    def advance(self, own: None, verdict: Verdict) -> None:
        pass


def word_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One word per token: w0 .. w57, then <eos> and <mask>; a chat template that marks the user's turn with w1, w2."""
    vocab = {f"w{i}": i for i in range(VOCAB - 2)} | {"<eos>": EOS, "<mask>": MASK}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>", pad_token="<eos>"
    )
    if chat:
        fast.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    return fast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One byte per token, so that characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def assert_close(actual: Tensor, expected: Tensor, units: float = 400) -> None:
    """Equal up to float32 rounding: `units` machine epsilons of the largest value.

    Sums of a few dozen products in another order differ by tens of epsilons, and four layers add up a few of those.
    """
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    difference = (actual - expected).abs().max().item()
    allowed = units * torch.finfo(torch.float32).eps * scale
    assert difference <= allowed, f"differs by {difference:.2e}, allowed is {allowed:.2e}"
