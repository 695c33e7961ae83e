"""The grammar: what is shown, what is gold, and that a reply is read one way or not at all."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbkit import prompts
from bbkit.prompts import SYSTEM, TAGS, Example, parse_answer, parse_reasoning, split_reply

CHOICE = Example(
    id="1",
    task="choice",
    question="What causes cholera?",
    context="A traveller has watery stools.",
    options=("Vibrio cholerae", "Ebola virus", "vitamin D", "hepatitis B"),
    answer="Vibrio cholerae",
    reasoning="cholera is caused by Vibrio cholerae.",
)
LETTERS = prompts.letters(CHOICE)

texts = st.text(max_size=60)
# Replies made of the pieces that matter, so that valid and nearly valid ones are frequent.
replies = st.lists(
    st.one_of(
        st.sampled_from(
            [*TAGS, *LETTERS, *LETTERS.values(), "(B)", "B.", " ", "\n", "\0", "\u200b"]
        ),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)
plain = texts.filter(lambda text: not any(tag in text for tag in TAGS))


def reply(answer: str, reasoning: str = "so") -> str:
    return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


def test_system_is_one_short_sentence_that_shows_every_tag():
    assert len(SYSTEM.split()) <= 25 and SYSTEM.count(". ") == 0
    assert all(SYSTEM.count(tag) == 1 for tag in TAGS)


def test_messages_of_each_task():
    system, user = prompts.messages(CHOICE)
    assert system == {"role": "system", "content": SYSTEM}
    assert user["role"] == "user"
    assert user["content"] == (
        "A traveller has watery stools.\n\nWhat causes cholera?\n"
        "A) Vibrio cholerae\nB) Ebola virus\nC) vitamin D\nD) hepatitis B"
    )
    short = Example("2", "short", "What causes cholera?")
    assert prompts.messages(short)[1]["content"] == "What causes cholera?"
    plain_chat = Example("3", "instruction", "Count to 3.", answer="1 2 3")
    assert prompts.messages(plain_chat) == [{"role": "user", "content": "Count to 3."}]
    assert prompts.completion(plain_chat) == "1 2 3"


@given(plain, plain)
def test_split_takes_apart_what_the_grammar_put_together(reasoning, answer):
    assert split_reply(reply(answer, reasoning)) == (reasoning.strip(), answer.strip(), "")
    assert split_reply(f"\n <answer>{answer}</answer> ") == (None, answer.strip(), "")


@given(replies)
def test_anchored_rule_against_a_plain_reading(text):
    """The tags alone, in order, decide; an independent scan must agree."""
    seen, at = [], 0
    while at < len(text):
        tag = next((tag for tag in TAGS if text.startswith(tag, at)), None)
        seen += [tag] if tag else []
        at += len(tag) if tag else 1
    allowed = (list(TAGS), list(TAGS[:2]), list(TAGS[2:]))
    assert (split_reply(text) is not None) == (seen in allowed)


@given(replies)
def test_an_answer_is_always_one_of_the_choices(text):
    assert parse_answer(text, LETTERS) in {None, *LETTERS}
    assert parse_answer(text, "ABCD") in {None, *"ABCD"}
    assert parse_answer(text, list(LETTERS.values())) in {None, *LETTERS.values()}
    assert parse_answer(text, "") is parse_answer(text, {}) is parse_answer(text, []) is None
    free, why = parse_answer(text), parse_reasoning(text)
    assert free is None or (free == free.strip() != "" and free in text)
    assert why is None or (why == why.strip() != "" and why in text)


@given(replies)
def test_a_second_answer_tag_is_never_read(text):
    assert parse_answer(f"{text}<answer>A</answer><answer>B</answer>") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "The answer is B.",
        "<answer></answer>",
        "<answer> \n </answer>",
        "<answer>B",
        "B</answer>",
        "</answer>B<answer>",
        "<answer>B</answer><answer>B</answer>",
        "<answer><answer>B</answer></answer>",
        "<answer>B</answer></answer>",
        "<answer>A<answer>B</answer>",
        "<reasoning><answer>B</answer></reasoning>",
        "<reasoning>so<answer>B</answer>",
        "<answer>B</answer><reasoning>so</reasoning>",
        "<reasoning>a</reasoning><reasoning>b</reasoning><answer>B</answer>",
        "<reasoning>so</reasoning><answer>B",
        "<answer><reasoning>so</reasoning>B</answer>",
        "<ANSWER>B</ANSWER>",
        "<answer >B</answer>",
    ],
)
def test_absent_or_ambiguous_is_none(text):
    assert parse_answer(text) is None
    assert parse_answer(text, "ABCD") is None
    assert parse_answer(text, LETTERS) is None


@pytest.mark.parametrize("around", ["{}", " {}\n", "Well, {}", "{} or perhaps C.", "\0{}\ufeff"])
def test_text_outside_does_not_hide_the_answer(around):
    assert parse_answer(around.format(reply("B")), LETTERS) == "B"
    assert parse_reasoning(around.format(reply("B"))) == "so"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("B):", "B"),
        ("\uff22", "B"),  # full-width B
        ("Ebola virus", "B"),
        ("ebola  VIRUS.", "B"),
        ("B) Ebola virus", "B"),
        ("(b) Ebola virus.", "B"),
        ("B: Ebola virus", "B"),
        ("B. Ebola virus", "B"),
        ("vitamin D", "C"),
        ("hepatitis B", "D"),
        ("B) Vibrio cholerae", None),
        ("B) hepatitis B and C", None),
        ("A or B", None),
        ("A, B", None),
        ("AB", None),
        ("E", None),
        ("B Ebola virus", None),
        ("the answer is B", None),
        ("Ebola virus, Vibrio cholerae", None),
        ("virus", None),
        ("\u0412", None),  # Cyrillic
        ("B\u200b", None),
        (".", None),
        ("()", None),
    ],
)
def test_what_names_a_choice(answer, letter):
    assert parse_answer(reply(answer), LETTERS) == letter
    text = LETTERS[letter] if letter else None
    assert parse_answer(reply(answer), list(LETTERS.values())) == text


def test_bare_letters_know_no_option_text():
    assert parse_answer(reply("(c)"), "ABCD") == "C"
    assert parse_answer(reply("c"), ["A", "B", "C"]) == "C"
    assert parse_answer(reply("C) Ebola virus"), "ABCD") is None
    assert parse_answer(reply("C"), "AB") is None
    assert parse_answer(reply("2"), "12") == "2" and parse_answer(reply("A"), "12") is None


short_texts = st.sampled_from(
    ["A", "B", "C.", "(D)", "AB", "5'", "3'", "no", "No.", "+", "é", "e\u0301"]
)
option_lists = st.lists(
    st.one_of(short_texts, plain.map(str.strip).filter(bool)), min_size=2, max_size=5, unique=True
)


@given(option_lists, st.data())
def test_gold_of_any_options_reads_back_as_itself_and_as_no_other(options, data):
    """Also where options are letters, equal up to case, or contain each other's labels."""
    answer = data.draw(st.sampled_from(options))
    row = replace(CHOICE, options=tuple(options), answer=answer)
    letter = parse_answer(prompts.completion(row), prompts.letters(row))
    assert letter is not None and prompts.letters(row)[letter] == answer


def test_the_exact_text_goes_before_the_folded_one():
    genotypes = replace(CHOICE, options=("TT", "Tt", "tt"), answer="Tt")
    assert prompts.completion(genotypes).endswith("<answer>Tt</answer>")
    assert parse_answer(reply("Tt"), genotypes.options) == "Tt"
    assert parse_answer(reply("Tt."), genotypes.options) is None


def test_ambiguous_gold_is_written_with_its_letter():
    blood = replace(CHOICE, options=("O", "A", "B", "AB"), answer="A")
    assert prompts.completion(blood).endswith("<answer>B) A</answer>")
    assert prompts.completion(replace(blood, answer="O")).endswith("<answer>O</answer>")
    assert parse_answer(reply("A"), prompts.letters(blood)) is None


@given(plain.filter(lambda text: len(text) < 20))
def test_same_is_reflexive_up_to_case_and_spaces(text):
    visible = prompts.same(text, text)
    assert prompts.same(f"  {text}\n", text) == visible
    assert not prompts.same(text, f"{text}x") and not prompts.same(text, "")


@pytest.mark.parametrize(
    ("left", "right", "article"),
    [
        ("TNF-\u03b1", "TNF\u2010alpha", True),
        ("\u03bb phage", "lambda phage", True),
        ("5 \u00b5g", "5 \u03bcg", True),
        ("Crohn\u2019s disease", "Crohn's disease", True),
        ("the liver", "liver", False),
        ("An abscess.", "abscess", False),
    ],
)
def test_typographic_variants_agree(left, right, article):
    assert prompts.same(left, right, article)
    assert prompts.same(right, left, article)


def test_articles_count_unless_told():
    assert not prompts.same("the liver", "liver")
    assert prompts.same("a", "a", article=False) and not prompts.same("the", "a", article=False)


@pytest.mark.parametrize("change", ["SYSTEM", "messages", "completion"])
def test_hash_follows_what_shapes_a_prompt(monkeypatch, change):
    before = prompts.prompt_hash()
    assert before == prompts.prompt_hash() and len(before) == 12
    old = getattr(prompts, change)
    monkeypatch.setattr(
        prompts, change, f"{old} " if change == "SYSTEM" else lambda row: [str(old(row)), "x"]
    )
    assert prompts.prompt_hash() != before
