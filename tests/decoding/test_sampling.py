"""The target's distribution equals transformers' own processors; draws are keyed, uniform and never impossible."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from domino_spec.decoding.sampling import (
    RandomStreams,
    SamplingSettings,
    draw,
    path_history,
)
from tests.tiny import assert_close, target_probs, warp_logits

ROWS, VOCAB = 40, 17


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def history_of(texts: list[list[int]], prompt_length: int) -> object:
    tokens = torch.tensor(texts)
    lengths = torch.full((len(texts),), tokens.shape[1])
    none = torch.zeros(len(texts), 1, 0, dtype=torch.bool)
    prompts = torch.full_like(lengths, prompt_length)
    return path_history(tokens, lengths, prompts, torch.zeros(len(texts), 0, dtype=torch.long), none, VOCAB)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.3),
        dict(temperature=0.8, top_k=5),
        dict(temperature=0.8, top_k=1),
        dict(temperature=0.8, top_k=VOCAB + 3),
        dict(temperature=0.9, top_p=0.7),
        dict(temperature=0.9, top_p=0.01),
        dict(temperature=1.3, min_p=0.1),
        dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05),
        dict(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.7),
        dict(temperature=1.0, repetition_penalty=0.6),
    ],
    ids=str,
)
def test_distribution_equals_transformers_processors(logits, settings):
    texts = torch.randint(0, VOCAB, (ROWS, 6), generator=torch.Generator().manual_seed(1)).tolist()
    processors = LogitsProcessorList()
    if penalty := settings.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(settings["temperature"]))
    if k := settings.get("top_k"):
        processors.append(TopKLogitsWarper(k))
    if p := settings.get("top_p"):
        processors.append(TopPLogitsWarper(p))
    if p := settings.get("min_p"):
        processors.append(MinPLogitsWarper(p))
    expected = processors(torch.tensor(texts), logits.clone()).softmax(-1)
    actual = target_probs(logits[:, None], SamplingSettings(**settings), history_of(texts, 4))[:, 0]
    assert torch.equal(actual > 0, expected > 0), "another set of tokens is left"
    assert_close(actual, expected)


def test_temperature_zero_is_one_hot_on_the_argmax(logits):
    probs = target_probs(logits[:, None], SamplingSettings())[:, 0]
    assert torch.equal(probs.argmax(-1), logits.argmax(-1))
    assert torch.equal(probs.sum(-1), torch.ones(ROWS)) and probs.max(-1).values.eq(1).all()


def test_penalties_and_bias_follow_their_definitions(logits):
    texts = torch.randint(0, VOCAB, (ROWS, 9), generator=torch.Generator().manual_seed(1)).tolist()
    settings = SamplingSettings(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 1.5, 7: -3.0})
    warped = warp_logits(logits[:, None], settings, history_of(texts, 4))[:, 0]
    for row, text in enumerate(texts):
        generated = text[4:]
        for token in range(VOCAB):
            count = generated.count(token)
            expected = logits[row, token] + {2: 1.5, 7: -3.0}.get(token, 0.0) - 0.25 * count - 0.5 * (count > 0)
            assert warped[row, token] == pytest.approx(expected.item(), abs=1e-5)


def test_history_of_a_row_holds_the_drafts_on_its_path_only():
    """Committed text, plus drafts 1 .. i at row i of a chain; a padded or stale token counts for nothing."""
    tokens = torch.tensor([[3, 4, 4, 9, 9], [5, 6, 7, 5, 9]])
    lengths, prompts = torch.tensor([3, 4]), torch.tensor([2, 1])
    drafts = torch.tensor([[4, 8], [7, 7]])
    on_path = torch.ones(3, 2, dtype=torch.bool).tril(-1).expand(2, -1, -1)
    history = path_history(tokens, lengths, prompts, drafts, on_path, 10)
    generated = [[[4], [4, 4], [4, 4, 8]], [[6, 7, 5], [6, 7, 5, 7], [6, 7, 5, 7, 7]]]
    prompt = [[3, 4], [5]]
    for r in range(2):
        for i in range(3):
            text = generated[r][i]
            assert history.in_text[r, i].tolist() == [text.count(t) for t in range(10)]
            assert history.seen[r, i].tolist() == [t in text + prompt[r] for t in range(10)]


def test_history_of_a_tree_follows_ancestors():
    tokens = torch.tensor([[1, 0]])
    # Drafts: 2 and 3 are siblings, 4 is a child of 3.
    on_path = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    drafts = torch.tensor([[2, 3, 4]])
    history = path_history(tokens, torch.tensor([1]), torch.tensor([1]), drafts, on_path, 6)
    assert [row.nonzero().flatten().tolist() for row in history.in_text[0]] == [[], [2], [3], [3, 4]]


def test_settings_know_when_they_read_history():
    assert not SamplingSettings(temperature=1.0, top_p=0.5).reads_history
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert SamplingSettings(**{penalty: 0.1}).reads_history
    assert SamplingSettings(repetition_penalty=1.1).reads_history


# Random numbers and draws.


def test_numbers_are_keyed_by_request_position_and_use_only():
    seeds = torch.tensor([5, 6, 7])
    positions = torch.arange(30).expand(3, -1)
    numbers = RandomStreams(seeds).uniform(positions, RandomStreams.ACCEPT)
    alone = RandomStreams(seeds[1:2]).uniform(positions[:1, 10:12], RandomStreams.ACCEPT)
    assert torch.equal(alone[0], numbers[1, 10:12])
    assert numbers.unique().numel() == numbers.numel()
    others = [RandomStreams(seeds).uniform(positions, use) for use in (RandomStreams.RESIDUAL, RandomStreams.DRAFT)]
    assert torch.stack([numbers, *others]).unique().numel() == 3 * numbers.numel()


def uniform_bins(numbers: torch.Tensor, bins: int = 64) -> float:
    """Chi-square statistic of equally likely bins, as a number of standard deviations from its mean."""
    counts = torch.histc(numbers.flatten().float(), bins, 0, 1)
    expected = numbers.numel() / bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (bins - 1)) / (2 * (bins - 1)) ** 0.5


@pytest.mark.parametrize("use", [RandomStreams.ACCEPT, RandomStreams.RESIDUAL, RandomStreams.DRAFT])
def test_numbers_are_uniform_along_positions_and_across_seeds(use):
    """Five standard deviations of an approximately normal statistic: a false alarm in about a million."""
    many_seeds = RandomStreams(torch.arange(20_000)).uniform(torch.full((20_000, 1), 7), use)
    many_positions = RandomStreams(torch.tensor([3])).uniform(torch.arange(20_000)[None], use)
    for numbers in (many_seeds, many_positions):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(uniform_bins(numbers)) < 5


def test_neighbouring_numbers_are_uncorrelated():
    """Across uses, positions and seeds; the correlation of n independent pairs has standard deviation 1 / sqrt(n)."""
    n = 20_000
    streams = RandomStreams(torch.arange(n))
    position = torch.full((n, 1), 11)
    here = streams.uniform(position, RandomStreams.ACCEPT)[:, 0]
    others = [
        streams.uniform(position, RandomStreams.RESIDUAL)[:, 0],
        streams.uniform(position, RandomStreams.DRAFT)[:, 0],
        streams.uniform(position + 1, RandomStreams.ACCEPT)[:, 0],
        here.roll(1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((here, other)))[0, 1].item()) < 5 / n**0.5


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    grid = (torch.arange(10_000).double() + 0.5) / 10_000
    drawn = draw(probs.expand(10_000, -1), grid)
    counts = drawn.bincount(minlength=6)
    assert (counts.double() / 10_000 - probs.double()).abs().max() <= 1 / 10_000


def test_the_impossible_is_never_drawn():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0, 0.0]])
    assert draw(probs, torch.tensor([0.0])).item() == 1
    assert draw(probs, torch.tensor([1 - 2.0**-53], dtype=torch.double)).item() == 3
    assert draw(probs, torch.tensor([0.25])).item() == 3, "an interval is closed on the left"


def test_unnormalised_weights_are_normalised():
    weights = torch.tensor([[2.0, 6.0]]).expand(4, -1)
    assert draw(weights, torch.tensor([0.0, 0.24, 0.26, 0.99])).tolist() == [0, 0, 1, 1]
