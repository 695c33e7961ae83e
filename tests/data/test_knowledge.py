"""Questions from the ontology: grounded, fair, and split by disease."""

import random
from collections import Counter

import pytest

from bbkit import InputError, data, evaluate
from bbkit.data import knowledge, questions
from bbkit.pocket import facts as recipe

SPLITS = knowledge.SPLITS


@pytest.fixture(scope="module")
def rows():
    return {split: questions.ontology(split) for split in SPLITS}


def test_every_fact_survives_the_round_trip_through_its_sentence():
    for fact in knowledge.facts():
        assert knowledge.statements(knowledge.state(fact)) == [fact]
        if fact[1] in knowledge.INVERSE:
            assert knowledge.statements(knowledge.state(fact, inverse=True)) == [fact]


def test_chains_are_stated_facts_that_lead_from_the_question_to_the_answer(rows):
    for row in (r for split in SPLITS for r in rows[split]):
        assert all(fact is not None and knowledge.is_fact(fact) for fact in row.steps)
        assert knowledge.statements(row.reasoning) == list(row.steps)
        ends = {x for fact in row.steps for x in (fact[0], fact[2])}
        assert row.answer in ends
        assert any(x in row.question for x in ends)
        for (a, _, b), (c, _, d) in zip(row.steps, row.steps[1:], strict=False):
            assert {a, b} & {c, d}, row.steps


def check_one_right_option(rows):
    """The ontology decides again, by another way than the generator's."""
    for row in rows:
        assert row.options.count(row.answer) == 1 and len(set(row.options)) == 4
        last = row.steps[-1]
        right = []
        for option in row.options:
            if row.id.split("/")[1] == "clinical":
                held = [(option, relation, other) for _, relation, other in row.steps]
            else:
                held = [(last[0], last[1], option)]
            right += [option] if all(knowledge.is_fact(f) for f in held) else []
        assert right == [row.answer], row


def test_exactly_one_option_is_right(rows):
    check_one_right_option([r for split in SPLITS for r in rows[split] if r.options])


def test_no_disease_is_asked_about_in_two_splits(rows):
    named = {s: {f[0] for r in rows[s] for f in r.steps if f[1] != "kind"} for s in SPLITS}
    agents = {s: {f[2] for r in rows[s] for f in r.steps if f[1] == "cause"} for s in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not named[a] & named[b]
        assert not agents[a] & agents[b]


def test_chain_questions_need_both_facts():
    asked = {s: questions.ontology_chains(s) for s in SPLITS}
    for row in (r for s in SPLITS for r in asked[s]):
        assert row.task == "choice" and len(row.steps) == 2
        assert row.answer.casefold() not in row.steps[0][2].casefold(), "the link gives it away"
    check_one_right_option([r for s in SPLITS for r in asked[s]])
    named = {s: {fact[0] for r in asked[s] for fact in r.steps[:1]} for s in SPLITS}
    assert not named["train"] & named["test"] and not named["validation"] & named["test"]
    assert len(asked["test"]) > 150 and len(named["test"]) > 35
    assert questions.ontology_chains("test") == asked["test"]


@pytest.mark.parametrize("make", [questions.ontology, questions.ontology_chains])
def test_always_naming_the_usual_answer_does_not_pay(make):
    found = evaluate.baselines(make("train"), make("test"), draws=10)
    assert all(found[name]["value"] < 0.34 for name in ("majority", "guess_by_name")), found


def test_splits_cover_all_diseases_in_their_shares():
    sizes = {s: len(knowledge.diseases(s)) for s in SPLITS}
    total = len({f[0] for f in knowledge.facts() if f[1] != "kind"})
    assert sum(sizes.values()) == total
    assert 0.5 < sizes["train"] / total < 0.7 and sizes["test"] / total > 0.2


def test_both_forms_one_and_two_hops_and_the_clinical_form_occur(rows):
    forms = Counter(r.id.split("/")[1] for r in rows["test"])
    assert {"cause", "symptom", "transmission", "site", "kind", "clinical"} <= set(forms)
    assert {len(r.steps) for r in rows["test"]} == {1, 2}
    assert 0.02 < sum(r.task == "short" for r in rows["test"]) / len(rows["test"]) < 0.35


@pytest.mark.parametrize("card", ["ontology", "ontology_chains"])
def test_every_question_has_an_id_of_its_own(card):
    """Before and after are paired by id."""
    for split in ("train", "validation", "test"):
        rows = data.load(card, split)
        assert len({row.id for row in rows}) == len(rows)


def test_questions_repeat_by_seed():
    assert questions.ontology("validation", 3) == questions.ontology("validation", 3)
    assert questions.ontology("validation", 3) != questions.ontology("validation", 4)
    with pytest.raises(InputError, match="no split 'dev'"):
        questions.ontology("dev")


def test_statements_reads_what_is_no_fact_without_raising():
    assert knowledge.statements("") == []
    assert knowledge.statements("It hurts. x causes y") == [None, ("y", "cause", "x")]
    noise = "".join(random.Random(0).choices(" .\n<>abc\u200b\0", k=10_000))
    assert all(s is None for s in knowledge.statements(noise))
    assert not knowledge.is_fact(("", "", ""))


def test_the_shipped_table_is_what_the_recipe_derives(data_dir):
    derived = recipe.derive(data_dir / "doid")
    shipped = [tuple(line.split("\t")) for line in knowledge.FACTS.read_text().splitlines()[1:]]
    assert derived == shipped


def test_a_missing_ontology_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"HumanDO\.tsv is missing"):
        recipe.derive(tmp_path)
