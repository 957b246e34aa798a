"""Methods by name: what a name may say, which draft each takes, and what is refused."""

from __future__ import annotations

import pytest

from domino_spec.bench.methods import Contender, Drafting, Wanted, contenders, parse_method, runner
from domino_spec.draft.vocabulary import count_for
from domino_spec.settings import UserError
from tests import tiny


@pytest.fixture(scope="module")
def target():
    return tiny.tiny_target()


@pytest.fixture(scope="module")
def drafts(target):
    single = [tiny.tiny_single_layer(target, method) for method in ("dart", "eagle3")]
    return [*single, tiny.tiny_draft(target), tiny.tiny_draft(target, head=False, seed=5)]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("none", Wanted("none", None)),
        ("eagle3:15", Wanted("eagle3", 15)),
        ("eagle3@2048", Wanted("eagle3@2048", None)),
        ("domino-tree@32:11", Wanted("domino-tree@32", 11)),
    ],
)
def test_a_name_may_state_a_budget_and_a_vocabulary(text, wanted):
    assert parse_method(text) == wanted


@pytest.mark.parametrize(
    "text, said",
    [
        ("eagle4", "unknown method 'eagle4'"),
        ("eagle3:", "method 'eagle3:' must be NAME, NAME:DRAFTS"),
        ("eagle3:0", "method 'eagle3:0' must be"),
        ("eagle3:15@20", "method 'eagle3:15@20' must be"),
        ("none@20", "method none has no draft whose vocabulary could be cut"),
        ("transformers@20", "method transformers has no draft"),
    ],
)
def test_what_makes_no_sense_is_refused(text, said):
    with pytest.raises(UserError) as caught:
        parse_method(text)
    assert said in str(caught.value)


def test_each_method_takes_the_draft_of_its_kind(target, drafts):
    dart, eagle3, domino, dflash = drafts
    drafting = Drafting(target, drafts)
    wanted = {
        "dart": dart,
        "eagle3": eagle3,
        "domino": domino,
        "domino-head-off": domino,
        "dflash": dflash,
        "dflash-tree": dflash,
        "transformers-dflash": dflash,
        "none": None,
        "transformers": None,
        "ngram": None,
    }
    assert {name: drafting.draft_for(name) for name in wanted} == wanted
    assert Drafting(target, [eagle3, domino]).draft_for("dflash") is domino


def test_every_method_has_a_budget_of_its_own(target, drafts):
    found = contenders(Drafting(target, drafts), ["none", "eagle3:15", "eagle3:59", "dart:60", "domino"], [3], [0.0])
    assert [(c.method, c.budget) for c in found] == [
        ("none", 0),
        ("eagle3", 15),
        ("eagle3", 59),
        ("dart", 60),
        ("domino", 3),
    ]


@pytest.mark.parametrize(
    "name, kinds, said",
    [
        ("eagle3", ["domino"], "method eagle3 needs an EAGLE-3 draft; this is a Domino draft"),
        ("eagle3", [], "method eagle3 needs a draft"),
        ("domino-head-off", ["dflash"], "method domino-head-off needs a Domino draft: name one with --draft"),
        ("domino@20", ["domino"], "method domino@20 needs tokens ranked by frequency: --ranking FILE"),
    ],
)
def test_a_missing_draft_or_ranking_is_refused(target, name, kinds, said):
    drafts = [tiny.tiny_draft(target, head=kind == "domino") for kind in kinds]
    with pytest.raises(UserError) as caught:
        contenders(Drafting(target, drafts), [name], [], [0.0])
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["domino", "domino-tree", "dflash", "eagle3", "dart"])
def test_a_cut_vocabulary_changes_what_is_drafted_and_not_what_is_written(target, drafts, name):
    texts = tiny.random_prompts([40, 40])
    ranking = count_for(target, texts, "texts")
    drafting = Drafting(target, drafts, ranking)
    frequent = set(ranking.first(8))
    cut = drafting.draft_for(f"{name}@8")
    assert set(cut.draft_vocab_ids.tolist()) == frequent
    assert cut is drafting.draft_for(f"{name}@8"), "made once"
    run = runner(drafting, None, None)
    (prompt,) = tiny.random_prompts([9])
    plain = run(Contender("none", 0, 0.0), prompt, 0, 24)
    drafted = run(Contender(f"{name}@8", 4, 0.0), prompt, 0, 24)
    assert drafted.token_ids == plain.token_ids
    accepted = [t for t, a in zip(drafted.token_ids, drafted.accepted, strict=True) if a]
    assert set(accepted) <= frequent
