"""The N-gram model of DART's search, against counts in a plain dictionary and worked conversations."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

from domino_spec.drafters.ngram_counts import NgramModel
from domino_spec.files import load_tensors, save_tensors
from domino_spec.recipe import DataRecipe, DraftRecipe, OptimizationRecipe, Recipe
from domino_spec.settings import UserError
from domino_spec.training import counts as ngrams
from domino_spec.training.counts import write_ngrams
from domino_spec.training.data import load_sequences, split_held_out
from domino_spec.training.datasets import load_training_data
from tests.tiny import VOCAB, tiny_target, word_tokenizer

A, B, C, D, R, X, END = range(7)
CONVERSATIONS = [[R, A, C], *[[R, A, D]] * 3, *[[R, B, C]] * 2]


def dictionary_probability(texts: list[list[int]], order: int, context: list[int], child: int) -> float:
    """The published rule over a dictionary of all windows."""
    counts: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        for start in range(len(text)):
            for end in range(start + 1, min(start + order, len(text)) + 1):
                counts[tuple(text[start:end])] += 1
    for length in range(min(order - 1, len(context)), 0, -1):
        seen = tuple(context[-length:])
        if counts[(*seen, child)]:
            return counts[(*seen, child)] / counts[seen]
    return 0.0


def ask(model: NgramModel, context: list[int], *children: int) -> list[float]:
    return model.probabilities(np.array(context), np.array(children)).tolist()


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_equal_counts_in_a_dictionary(order):
    random_ = random.Random(order)
    texts = [[random_.choice([0, 0, 1, 2, 5, 6]) for _ in range(random_.randint(0, 9))] for _ in range(25)]
    model = NgramModel.build(texts, order, eos=7, vocab_size=9)
    with_end = [[*text, 7] for text in texts]
    contexts = [[random_.randrange(9) for _ in range(6)] for _ in range(40)]
    children = np.arange(9) + np.zeros((40, 1), dtype=int)
    found = model.probabilities(np.array(contexts), children)
    expected = [[dictionary_probability(with_end, order, c, child) for child in range(9)] for c in contexts]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(np.unique(found)) > 10 and (found == 0).any(), "the texts are too poor to show much"


def test_shapes_of_a_batch_are_kept():
    model = NgramModel.build(CONVERSATIONS, eos=END)
    contexts, children = np.array([[[R, A], [R, B]], [[X, A], [A, X]]]), np.array([C, D])
    found = model.probabilities(contexts, np.broadcast_to(children, (2, 2, 2)))
    np.testing.assert_allclose(found, [[[0.25, 0.75], [1, 0]], [[0.25, 0.75], [0, 0]]])


def test_worked_conversations():
    model = NgramModel.build(CONVERSATIONS, eos=END)
    assert model.order == 3 and model.about.num_tokens == 24
    assert ask(model, [R, A], C, D, B) == [0.25, 0.75, 0]
    assert ask(model, [R, B], C, D) == [1, 0]
    assert ask(model, [X, A], D) == [0.75], "x a never occurred: a alone is asked"
    assert ask(model, [X, R], A, B) == pytest.approx([4 / 6, 2 / 6])
    assert ask(model, [A, C], END) == [1] and ask(model, [B, C], END) == [1]
    assert ask(model, [A, END], R) == [0], "no window reaches from one text into the next"
    assert ask(model, [A, X], C) == [0], "without a context that occurred there is no unigram to fall back on"


def test_each_child_falls_back_on_its_own():
    """p after o n is known, q only after n: q is not unseen, although the longer context is known."""
    o, n, p, q = 0, 1, 2, 3
    model = NgramModel.build([[o, n, p], [n, q]])
    assert ask(model, [o, n], p, q) == [1, 0.5]


def test_a_context_at_the_end_of_a_text_counts():
    """Half of the times nothing followed, and that is part of how often the context occurred."""
    assert ask(NgramModel.build([[1, 2], [1]]), [1], 2) == [0.5]


@pytest.mark.parametrize("context", [[], [-1, A], [-1, -1], [99, A]])
def test_tokens_that_are_missing_or_unknown_are_no_context(context):
    model = NgramModel.build(CONVERSATIONS, eos=END)
    expected = [0.25, 0.75] if context[-1:] == [A] else [0, 0]
    assert ask(model, context, C, D) == expected


def test_ids_outside_the_vocabulary_are_no_children():
    """They must not be taken for a token behind another context: keys are numbers."""
    model = NgramModel.build(CONVERSATIONS, vocab_size=7)
    assert ask(model, [R], -1, 7, 7 + C, 10**9) == [0] * 4


def test_texts_shorter_than_the_order(tmp_path):
    model = NgramModel.build([[3], [4]], order=4)
    model.save(tmp_path / "m.safetensors")
    assert ask(NgramModel.load(tmp_path / "m.safetensors"), [3], 4) == [0]


def test_what_was_saved_is_read_back(tmp_path):
    model = NgramModel.build(
        CONVERSATIONS, eos=END, vocab_size=12, source="toy", tokenizer="abc", target_fingerprint="def"
    )
    path = tmp_path / "deep" / "ngrams.safetensors"
    model.save(path)
    again = NgramModel.load(path)
    assert again.about == model.about and again.about.source == "toy"
    for ours, theirs in zip((*model.keys, *model.counts), (*again.keys, *again.counts), strict=True):
        assert ours.dtype == theirs.dtype and (ours == theirs).all()
    assert ask(again, [R, A], C, D) == [0.25, 0.75]


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "holds no tokens"),
        ([[]], {}, "holds no tokens"),
        ([[1, 2]], {"order": 1}, "order of at least 2, got 1"),
        ([[1, 9]], {"vocab_size": 9}, "outside the vocabulary of 9"),
        ([[1, -1]], {}, "outside the vocabulary"),
    ],
)
def test_what_cannot_be_counted_is_refused(texts, options, message):
    with pytest.raises(UserError, match=message):
        NgramModel.build(texts, **options)


def spoil(path, change):
    """Rewrite a saved model after `change` of its tensors and its description."""
    tensors, metadata = load_tensors(path)
    about = json.loads(metadata["ngrams"])
    change(tensors, about)
    save_tensors(tensors, path, {"ngrams": json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: about.update(order=4),
        lambda tensors, about: about.update(order="many"),
        lambda tensors, about: about.update(vocab_size=3),
        lambda tensors, about: about.pop("source"),
        lambda tensors, about: tensors.pop("counts.2"),
        lambda tensors, about: tensors.update({"counts.2": tensors["counts.2"].float()}),
        lambda tensors, about: tensors.update({"counts.2": tensors["counts.2"][1:]}),
        lambda tensors, about: tensors.update({"counts.3": tensors["counts.3"] - 3}),
        lambda tensors, about: tensors.update({"keys.3": tensors["keys.3"].flip(0)}),
        lambda tensors, about: tensors.update({"keys.3": tensors["keys.3"] + 10**6}),
        lambda tensors, about: tensors.update({"keys.1": tensors["keys.1"][:, None]}),
    ],
)
def test_a_spoiled_file_is_one_line(tmp_path, change):
    path = tmp_path / "ngrams.safetensors"
    NgramModel.build(CONVERSATIONS, eos=END).save(path)
    spoil(path, change)
    with pytest.raises(UserError) as caught:
        NgramModel.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_files_are_one_line(tmp_path):
    path = tmp_path / "ngrams.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        NgramModel.load(path)
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        NgramModel.load(path)
    save_tensors({"norm.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="not an N-gram model"):
        NgramModel.load(path)


def test_a_model_for_another_tokenizer_is_refused(tmp_path):
    target = tiny_target(tokenizer=word_tokenizer())
    model = NgramModel.build([[1, 2]], vocab_size=VOCAB, tokenizer="another")
    with pytest.raises(UserError, match="counted with tokenizer another"):
        model.check(target)
    with pytest.raises(UserError, match="vocabulary of 3, that of tiny has 60"):
        NgramModel.build([[1, 2]]).check(target)
    dataclasses.replace(model, about=dataclasses.replace(model.about, tokenizer=None)).check(target)


def write_answers(path, answers: list[tuple[list[int], list[int]]]):
    rows = [json.dumps({"id": f"s{i}", "prompt_ids": p, "response_ids": r}) for i, (p, r) in enumerate(answers)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def count(monkeypatch, target, answers, out, **data) -> NgramModel:
    monkeypatch.setattr(ngrams, "load_target", lambda *args, **kwargs: target)
    settings = DataRecipe(responses=str(answers), max_length=50, **data)
    recipe = Recipe(target="tiny", draft=DraftRecipe(), data=settings, training=OptimizationRecipe(steps=1))
    write_ngrams(recipe, out)
    return NgramModel.load(out)


def test_answers_on_disk_are_counted_without_their_prompts(tmp_path, monkeypatch):
    target = tiny_target(tokenizer=word_tokenizer())
    answers = [([1, 2], [3, 4, 58]), ([1, 2], [3, 5]), ([7, 3], [3, 4]), ([9], [9, 9])]
    path = write_answers(tmp_path / "a.jsonl", answers)
    held_out = split_held_out(load_sequences(path, 50, VOCAB), 1)[1]
    assert held_out[0].id == "s3", "choose other ids: the counts below are those of the first three"
    model = count(monkeypatch, target, path, tmp_path / "n.safetensors", held_out=1)
    assert ask(model, [2, 3], 4, 5) == pytest.approx([2 / 3, 1 / 3])
    assert ask(model, [1], 2) == ask(model, [2], 3) == [0], "prompts are not counted"
    assert ask(model, [4], 58) == [0.5], "the target ended one of the two"
    assert model.about.num_tokens == 7 and "a.jsonl" in model.about.source
    model.check(target)


def test_held_out_answers_are_not_counted(tmp_path, monkeypatch):
    target = tiny_target(tokenizer=word_tokenizer())
    answers = write_answers(tmp_path / "a.jsonl", [([1], [2 * i, 2 * i + 1]) for i in range(20)])
    model = count(monkeypatch, target, answers, tmp_path / "n.safetensors", held_out=5)
    data = DataRecipe(responses=str(answers), held_out=5, max_length=50)
    training, held_out = split_held_out(load_training_data(data, target), 5)
    assert len(held_out) == 5
    for sequences, expected in ((training, 1), (held_out, 0)):
        for sequence in sequences:
            first, second = sequence.tokens[-2:].tolist()
            assert ask(model, [first], second) == [expected]
