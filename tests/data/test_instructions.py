"""The checkable instructions: every reference reply passes, and near misses do not."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbkit import InputError
from bbkit.data import instructions
from bbkit.data.instructions import KINDS, SEEN, UNSEEN, check, constrain, example, examples
from bbkit.prompts import Example

# The 25 of IFEval (google-research), by the part of their id behind the colon.
IFEVAL = """existence frequency forbidden_words letter_frequency response_language number_sentences
number_paragraphs number_words nth_paragraph_first_word number_placeholders postscript
number_bullet_lists constrained_response number_highlighted_sections multiple_sections json_format
title two_responses repeat_prompt end_checker capital_word_frequency english_capital
english_lowercase no_comma quotation""".split()


def test_kinds_are_apart_from_each_other_and_from_ifeval():
    assert not set(SEEN) & set(UNSEEN)
    assert set(SEEN) | set(UNSEEN) == set(KINDS)
    assert not set(KINDS) & set(IFEVAL)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000))
def test_the_reference_passes_and_damage_does_not(kind, seed):
    row = example(kind, random.Random(seed))
    (constraint,) = row.constraints
    assert check(constraint, row.answer)
    assert check(constraint, f"  {row.answer}\n")
    for damaged in ("", row.question, row.answer + " extra", "extra " + row.answer):
        assert not check(constraint, damaged)


@pytest.mark.parametrize("kind", KINDS)
@given(reply=st.text())
def test_no_reply_raises(kind, reply):
    assert check(example(kind, random.Random(0)).constraints[0], reply) in (True, False)


def test_splits_share_no_prompt_and_hold_every_kind():
    splits = {s: {e.question for e in examples(s, per_kind=30)} for s in instructions.SPLITS}
    assert not splits["train"] & splits["validation"]
    assert not splits["train"] & splits["test"]
    assert not splits["validation"] & splits["test"]
    for split in instructions.SPLITS:
        assert {e.entity for e in examples(split, per_kind=3)} == set(KINDS)


def test_examples_are_the_same_for_the_same_seed_only():
    assert examples("train", 1) == examples("train", 1)
    assert examples("train", 1) != examples("train", 2)


def test_wrapped_real_instructions_are_checked_on_free_text():
    rows = [Example(id=str(i), task="instruction", question="Name a fruit.") for i in range(40)]
    for row in constrain(rows, seed=3, kinds=KINDS):
        (constraint,) = row.constraints
        assert not check(constraint, "an apple")
        left = {"open_with": "{opener} ", "label": "{label}: ", "tags": "<{tag}>", "stars": "* "}
        right = {"tags": "</{tag}>", "stars": " *", "round_brackets": ")", "square_brackets": "]"}
        left |= {"round_brackets": "(", "square_brackets": "["}
        kind = constraint["kind"]
        reply = (
            left[kind].format(**constraint) + "an apple" + right.get(kind, "").format(**constraint)
        )
        assert check(constraint, reply), (kind, reply)


def test_unknown_kind_and_split_are_named():
    with pytest.raises(InputError, match="unknown constraint kind 'sing'"):
        check({"kind": "sing"}, "la")
    with pytest.raises(InputError, match="no split 'dev'"):
        examples("dev")
