"""Rewards: gold scores full, wrong nothing, partial credit cannot be farmed, no reply is slow."""

import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbkit import InputError, prompts, rewards
from bbkit.data import instructions, knowledge, questions
from bbkit.prompts import Example
from bbkit.study import workshop

CHOLERA = ("cholera", "cause", "Vibrio cholerae")
VIBRIO = ("Vibrio cholerae", "kind", "bacterium")
DIARRHEA = ("cholera", "symptom", "diarrhea")
FACTS = {
    CHOLERA,
    VIBRIO,
    DIARRHEA,
    ("cholera", "symptom", "vomiting"),
    ("cholera", "transmission", "contaminated water"),
    ("loiasis", "cause", "Loa loa"),
    ("Loa loa", "kind", "worm"),
    ("loiasis", "symptom", "itching"),
    ("twinpox", "cause", "Pox one"),
    ("twinpox", "cause", "Pox two"),
    ("Pox one", "kind", "virus"),
    ("Pox two", "kind", "virus"),
}


IS_FACT = knowledge.is_fact


@pytest.fixture(autouse=True, scope="module")
def world():
    """A dozen facts in place of the ontology, in the ontology's own sentences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge, "is_fact", FACTS.__contains__)
        yield


def tell(*facts: tuple[str, str, str]) -> str:
    return " ".join(knowledge.state(fact) for fact in facts)


def grounded(question: str, options: str, answer: str, *steps: tuple[str, str, str]) -> Example:
    return Example(
        id=answer,
        task="choice" if options else "short",
        question=question,
        options=tuple(options.split("|")) if options else (),
        answer=answer,
        reasoning=tell(*steps),
        steps=steps,
    )


KINDS = "bacterium|worm|virus|fungus"
ONE = grounded("What causes cholera?", "Loa loa|Vibrio cholerae|Ebola virus", CHOLERA[2], CHOLERA)
TWO = grounded("What kind of organism causes cholera?", KINDS, "bacterium", CHOLERA, VIBRIO)
VIA = grounded(
    "What can Vibrio cholerae lead to?", "itching|diarrhea|fever", "diarrhea", CHOLERA, DIARRHEA
)
CLINICAL = grounded(
    "Findings: diarrhea; Vibrio cholerae. Disease?", "cholera|loiasis", "cholera", CHOLERA, DIARRHEA
)
SHORT = grounded("What causes cholera?", "", "Vibrio cholerae", CHOLERA)
PROSE = Example(
    id="prose",
    task="choice",
    question="A 40-year-old farmer has jaundice, anuria and conjunctival suffusion. "
    "What would this patient have?",
    options=("leptospirosis", "brucellosis", "hepatitis B", "Q fever"),
    answer="leptospirosis",
    reasoning="Jaundice with anuria and conjunctival suffusion after contact with rat urine point "
    "to Weil disease. The diagnosis is leptospirosis.",
)
PUBMED = Example(
    id="pubmed",
    task="choice",
    question="Does zinc shorten colds?",
    context="In a trial, zinc lozenges shortened colds by two days in adults.",
    options=("yes", "no", "maybe"),
    answer="yes",
    reasoning="Adults given lozenges recovered sooner than the placebo group, so that zinc did "
    "help against colds: yes.",
)
UNEXPLAINED = replace(PROSE, reasoning="")
OPEN = replace(PROSE, task="short", options=(), synonyms=("Weil disease",))
LETTERED = replace(ONE, options=("O", "A", "B", "AB"), answer="A", steps=(), question="Group?")
EXAMPLES = [ONE, TWO, VIA, CLINICAL, SHORT, PROSE, PUBMED, UNEXPLAINED, OPEN, LETTERED]
INSTRUCTION = Example(
    id="count",
    task="instruction",
    question="Count from 1 to 3.",
    answer="1 2 3",
    constraints=({"kind": "count", "low": 1, "high": 3}, {"kind": "first", "words": ["1"]}),
)
names = {"ids": lambda value: f"{value.id}-{value.task}" if isinstance(value, Example) else None}


def reply(reasoning: str, answer: str) -> str:
    return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


def reasoning(example: Example, why: str, answer: str | None = None) -> float:
    value = rewards.reasoning(example, reply(why, example.answer if answer is None else answer))
    assert value is not None
    return value


# --- the gallery ---------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [*EXAMPLES, INSTRUCTION], **names)
@pytest.mark.parametrize("size", [2000, 50_000])
def test_hack_gallery_scores_what_it_must(example, size):
    gallery = workshop.hack_gallery(example, size)
    assert len({name for name, _, _ in gallery}) == len(gallery) >= 2
    for name, text, expected in gallery:
        got = rewards.score(example, text)
        most = expected.pop("reasoning"), got.pop("reasoning")
        assert got == expected, name
        assert most == (None, None) or 0 <= most[1] <= most[0], name


def test_gallery_holds_the_kinds_that_the_brief_names():
    listed = " / ".join(name for name, _, _ in workshop.hack_gallery(ONE))
    for kind in (
        "empty reasoning",
        "two answers",
        "every option answered",
        "tag stuffing",
        "question copied",
        "filler",
        "gold hidden in prose",
        "NULs",
        "zero-width",
        "right-to-left",
        "less-than",
        "nested",
        "closing tags",
        "broken tags",
    ):
        assert kind in listed


@pytest.mark.parametrize("example", [TWO, OPEN], **names)
def test_time_grows_linearly_with_the_reply(example):
    """16 times the text in at most 64 times the time: quadratic would be 256 times."""

    def seconds(text: str) -> float:
        best = float("inf")
        for _ in range(3):
            prompts.split_reply.cache_clear()
            start = time.process_time()  # not the wall clock: the machine may be busy
            rewards.score(example, text)
            best = min(best, time.process_time() - start)
        return best

    large = workshop.hack_gallery(example, 1_000_000)
    for (name, small, _), (_, text, _) in zip(
        workshop.hack_gallery(example, 62_500), large, strict=True
    ):
        assert seconds(text) < 64 * seconds(small) + 0.02, name


@pytest.mark.parametrize("example", [TWO, OPEN, PROSE], **names)
def test_no_step_but_the_cut_at_the_tags_sees_a_long_reply(example, monkeypatch):
    seen = []
    for module, name in ((rewards, "_words"), (knowledge, "statements"), (prompts, "_fold")):
        old = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda text, *rest, old=old: seen.append(len(text)) or old(text, *rest)
        )
    for _, text, _ in workshop.hack_gallery(example, 100_000):
        rewards.score(example, text)
    assert 0 < max(seen) <= rewards.MAX_REASONING


anything = st.text(st.characters(), max_size=80)  # lone surrogates too
pieces = st.lists(
    st.one_of(st.sampled_from([*prompts.TAGS, tell(CHOLERA), "A", "bacterium", "\n"]), anything),
    max_size=8,
).map("".join)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(anything, pieces, anything.map(lambda text: reply(text, text))))
def test_no_reply_raises_or_leaves_the_unit_interval(text):
    for example in (*EXAMPLES, INSTRUCTION):
        for value in rewards.score(example, text).values():
            assert value is None or (isinstance(value, float) and 0 <= value <= 1)


# --- domain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, **names)
def test_gold_is_1_and_every_wrong_option_0(example):
    assert rewards.domain(example, prompts.completion(example)) == 1
    for wrong in set(example.options) - {example.answer}:
        text = prompts.completion(replace(example, answer=wrong))
        assert rewards.answer_given(example, text) == wrong
        assert rewards.domain(example, text) == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("leptospirosis", 1),
        ("Leptospirosis.", 1),
        (" the  Weil disease ", 1),
        ("WEIL\u00a0DISEASE", 1),
        ("leptospirosis or brucellosis", 0),
        ("not leptospirosis", 0),
        ("leptospirosi", 0),
        ("", 0),
    ],
)
def test_short_answers_match_gold_or_synonym(answer, right):
    assert rewards.domain(OPEN, reply("so", answer)) == right


# --- reasoning with a chain ----------------------------------------------------------------------


@pytest.mark.parametrize("example", [ONE, TWO, VIA, CLINICAL, SHORT], **names)
def test_gold_chain_is_1_in_any_order_and_case(example):
    backwards = tell(*reversed(example.steps))
    assert reasoning(example, example.reasoning) == reasoning(example, backwards) == 1
    assert reasoning(example, example.reasoning.replace(". ", ".\n")) == 1


@pytest.mark.parametrize(
    ("example", "why", "answer", "expected"),
    [
        # n gold steps, m stated, s sentences, c: m/n * m/s * c
        (ONE, tell(CHOLERA), "Loa loa", 1 * 1 * 0.5),  # true, and not the answer given
        (ONE, tell(CHOLERA), "Loa loa, Vibrio cholerae", 0.5),  # no answer given
        (ONE, tell(("cholera", "cause", "Loa loa")), "Loa loa", 0),  # false fact
        (ONE, tell(("loiasis", "cause", "Loa loa")), "Loa loa", 0),  # true, of another entity
        (ONE, tell(DIARRHEA), "Vibrio cholerae", 0),  # true, another relation
        (ONE, "Vibrio cholerae causes cholera.", "Vibrio cholerae", 1),  # the inverse sentence
        (ONE, "It must be Vibrio cholerae.", "Vibrio cholerae", 0),
        (TWO, tell(CHOLERA), "bacterium", 1 / 2 * 1 * 0.5),
        (TWO, tell(VIBRIO), "bacterium", 0),  # not from the question's entity on
        (TWO, tell(CHOLERA, ("Loa loa", "kind", "worm")), "worm", 1 / 2 * 1 / 2 * 0.5),  # no link
        (TWO, tell(("loiasis", "cause", "Loa loa"), ("Loa loa", "kind", "worm")), "worm", 0),
        (TWO, tell(CHOLERA, VIBRIO), "worm", 0.5),
        (VIA, tell(CHOLERA, ("cholera", "symptom", "vomiting")), "diarrhea", 0.5),
        (
            VIA,
            tell(("loiasis", "cause", "Loa loa"), ("loiasis", "symptom", "itching")),
            "itching",
            0,
        ),
        (
            CLINICAL,
            tell(("loiasis", "cause", "Loa loa"), ("loiasis", "symptom", "itching")),
            "loiasis",
            0,
        ),
        (SHORT, tell(CHOLERA), "the Vibrio cholerae.", 1),
    ],
)
def test_chain_formula_by_hand(example, why, answer, expected):
    assert reasoning(example, why, answer) == pytest.approx(expected)


def test_a_link_may_be_any_that_holds_unless_the_question_names_it():
    one, two = ("twinpox", "cause", "Pox one"), ("twinpox", "cause", "Pox two")
    kinds = ("Pox one", "kind", "virus"), ("Pox two", "kind", "virus")
    row = grounded("What kind of organism causes twinpox?", KINDS, "virus", one, kinds[0])
    assert reasoning(row, tell(two, kinds[1])) == 1
    assert reasoning(row, tell(two, kinds[0])) == 1 / 2 * 1 / 2 * 0.5  # two different links
    named = replace(row, question="Twinpox comes from Pox one: what kind is it?")
    assert reasoning(named, tell(two, kinds[1])) == 0
    assert reasoning(named, tell(one, kinds[0])) == 1


def test_a_link_inside_the_name_of_the_entity_is_not_named(monkeypatch):
    one, two = ("Pox one fever", "cause", "Pox one"), ("Pox one fever", "cause", "Pox two")
    kinds = ("Pox one", "kind", "virus"), ("Pox two", "kind", "virus")
    monkeypatch.setattr(knowledge, "is_fact", {one, two, *kinds}.__contains__)
    row = grounded("What kind of organism causes Pox one fever?", KINDS, "virus", one, kinds[0])
    assert reasoning(row, tell(two, kinds[1])) == reasoning(row, row.reasoning) == 1


def test_one_closing_sentence_is_free_when_it_ends_in_the_answer_given():
    assert reasoning(TWO, f"{TWO.reasoning} So the answer: bacterium.") == 1
    assert reasoning(TWO, f"{TWO.reasoning} So: bacterium. So: bacterium.") == pytest.approx(2 / 3)
    assert reasoning(TWO, f"{TWO.reasoning} So the answer: worm.") == pytest.approx(2 / 3)
    assert reasoning(TWO, "The answer: bacterium.") == 0


GOLD = [knowledge.state(step) for step in TWO.steps]
OTHERS = [
    knowledge.state(DIARRHEA),  # true, of the entity, beside the point
    knowledge.state(("Loa loa", "kind", "worm")),
    knowledge.state(("cholera", "cause", "Loa loa")),  # false
    knowledge.state(("cholera", "kind", "bacterium")),  # false shortcut
    "cholera is bad.",
    "Vibrio cholerae causes loiasis.",
]


@given(
    st.lists(st.sampled_from(GOLD + OTHERS), max_size=8), st.sampled_from(GOLD + OTHERS), st.data()
)
def test_only_a_missing_step_can_raise_the_score(told, extra, data):
    before = reasoning(TWO, " ".join(told))
    at = data.draw(st.integers(0, len(told)))
    after = reasoning(TWO, " ".join([*told[:at], extra, *told[at:]]))
    if extra in OTHERS or extra in told:
        assert after < before or after == before == 0
    assert (before == 1) == (sorted(told) == sorted(GOLD))
    assert before in (0, 1) or before <= 2 / 3


def test_farming_one_fact_pays_less_with_every_repeat():
    scores = [reasoning(ONE, " ".join([tell(CHOLERA)] * n)) for n in range(1, 14)]
    assert scores[:10] == pytest.approx([1 / n for n in range(1, 11)])
    assert scores[10:] == [0, 0, 0]


# --- reasoning without a chain -------------------------------------------------------------------


def test_prose_gold_and_its_spoilings():
    assert reasoning(PROSE, PROSE.reasoning) == 1
    assert reasoning(PUBMED, PUBMED.reasoning) == 1
    assert reasoning(PROSE, PROSE.reasoning, "brucellosis") == 0.5  # concludes in another answer
    assert reasoning(PROSE, PROSE.reasoning, "leptospirosis, brucellosis") == 0.5
    assert reasoning(PROSE, f"{PROSE.reasoning} Or brucellosis or leptospirosis.") == 0.5
    assert reasoning(PROSE, PROSE.question) == 0
    assert reasoning(PROSE, prompts.messages(PROSE)[1]["content"]) == 0
    words = len(PROSE.reasoning.split())
    twice = reasoning(PROSE, f"{PROSE.reasoning} {PROSE.reasoning}")
    assert twice == pytest.approx(words / (2 * words - 4))  # half of the five-word runs are old


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("", 0),
        ("?!", 0),
        ("Leptospirosis.", 0),  # takes up no finding
        ("One should weigh all that is known with care and then choose leptospirosis.", 0),
        ("Jaundice: leptospirosis.", 2 / 12 * 1 / 4),
        ("What has been known of this with some such patient would bring leptospirosis.", 0),
        ("Jaundice and anuria together bring to my mind first of all leptospirosis.", 2 / 4),
        ("Jaundice and anuria together bring to my mind first of all this.", 2 / 4 * 0.5),
    ],
)
def test_prose_formula_by_hand(why, expected):
    assert reasoning(PROSE, why) == pytest.approx(expected)


def test_prose_beyond_a_useful_length_pays_less_and_then_nothing():
    def filler(count: int) -> str:
        return " ".join(f"w{i}" for i in range(count))

    fits, long, vast = (f"{filler(n)}. {PROSE.reasoning}" for n in (200, 600, 2000))
    assert reasoning(PROSE, fits) == 1
    assert reasoning(PROSE, long) == pytest.approx(300 / (600 + len(PROSE.reasoning.split())))
    assert len(vast) > rewards.MAX_REASONING and reasoning(PROSE, vast) == 0


def test_a_shorter_option_inside_the_answer_is_no_rival():
    row = replace(PROSE, options=("hepatitis", "hepatitis B"), answer="hepatitis B")
    why = (
        "Jaundice with anuria, conjunctival suffusion and a positive surface antigen: hepatitis B."
    )
    assert reasoning(row, why) == 1
    assert reasoning(row, why, "hepatitis") == 0.5


# --- format --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (reply("so", "B"), 1),
        (f"\n{reply('so', 'B')}\n".replace("><", "> \n <"), 1),
        (reply("", ""), 1),
        ("Sure. " + reply("so", "B"), 0.5),
        (reply("so", "B") + "\0", 0.5),
        (reply("so", "B").replace("><", "> x <"), 0.5),
        ("<answer>B</answer>", 0),
        ("<reasoning>so</reasoning>", 0),
        (reply("so", "B") * 2, 0),
        ("", 0),
    ],
)
def test_format_of_questions(text, expected):
    assert rewards.format_(ONE, text) == expected


def test_instructions_earn_the_share_of_constraints_that_hold(monkeypatch):
    assert rewards.score(INSTRUCTION, "1 2 3") == {"domain": None, "reasoning": None, "format": 0.5}
    assert rewards.format_(INSTRUCTION, "1") == 0.5
    assert rewards.format_(INSTRUCTION, "none of it") == 0
    monkeypatch.setattr(instructions, "check", lambda constraint, text: True)
    assert rewards.format_(INSTRUCTION, "any") == 1
    assert rewards.format_(INSTRUCTION, " \n") == 0  # a blank reply obeys nothing
    assert rewards.format_(replace(INSTRUCTION, constraints=()), "any") == 1


# --- validate ------------------------------------------------------------------------------------


def test_validate_accepts_what_is_sound():
    assert rewards.validate([]) is None
    assert rewards.validate([*EXAMPLES, replace(INSTRUCTION, answer="")]) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(ONE, task="essay"), "no task 'essay'"),
        (replace(ONE, answer="cholera"), "the gold answer 'cholera' is not an option"),
        (replace(ONE, options=(), answer=""), "is not an option"),
        (replace(SHORT, answer=""), "gold reply scores domain 0.00"),
        (replace(SHORT, answer="<answer>"), "gold reply scores domain 0.00"),
        (replace(ONE, reasoning="It is <reasoning>."), "gold reply scores domain 0.00"),
        (replace(PROSE, reasoning="</answer>"), "gold reply scores domain 0.00"),
        (replace(TWO, reasoning=tell(CHOLERA)), "gold reply scores reasoning 0.25"),
        (replace(TWO, steps=(CHOLERA,)), "gold reply scores reasoning 0.25"),
        (replace(ONE, steps=(("cholera", "cause", "Loa loa"),)), "gold reply scores reasoning"),
        (INSTRUCTION, "gold reply scores format 0.50"),
    ],
)
def test_validate_names_the_row_and_the_fault(bad, message):
    bad = replace(bad, source="card", id="q7")
    with pytest.raises(InputError) as error:
        rewards.validate([ONE, PROSE, bad])
    assert str(error.value).startswith("card row 3 (id q7): ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_validate_catches_a_reward_that_pays_for_wrong_answers(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "domain", lambda example, text: 1.0)
    monkeypatch.setattr(rewards, "domain", lambda example, text: 1.0)
    with pytest.raises(InputError, match="wrong option 'brucellosis' scores domain 1"):
        rewards.validate([PROSE])


def test_validate_catches_a_chain_that_carries_any_answer(monkeypatch):
    monkeypatch.setattr(rewards, "_chain", lambda *_: 1.0)
    with pytest.raises(InputError, match="keeps reasoning 1 under the gold chain"):
        rewards.validate([ONE])


# --- own rewards, by path -------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """An entry of `grpo.rewards`: a function `mine` of this text, in a file."""

    def write(text: str, name: str = "mine") -> str:
        (tmp_path / "own.py").write_text(text)
        return f"{tmp_path / 'own.py'}:{name}"

    return write


def test_an_own_reward_stands_beside_the_kits(own):
    entry = own("def mine(example, reply):\n    return len(reply) == 3 or None\n")
    found = rewards.chosen(["format", entry])
    assert list(found) == ["format", "mine"] and found["format"] is rewards.REWARDS["format"]
    assert rewards.score(ONE, "abc", found) == {"format": 0.0, "mine": 1.0}
    assert rewards.score(ONE, "ab", found)["mine"] is None
    assert rewards.chosen(list(rewards.REWARDS)) == rewards.REWARDS


def test_an_edited_file_is_read_again_and_one_file_is_run_once(own):
    first = own("def mine(e, r):\n    return 0.5\n")
    assert rewards.chosen([first])["mine"](ONE, "") == 0.5
    own("def mine(e, r):\n    return 0.6\n")  # as long, within the same second
    assert rewards.chosen([first])["mine"](ONE, "") == 0.6
    own("n = []\ndef mine(e, r):\n    n.append(1)\ndef other(e, r):\n    return len(n) / 10\n")
    both = rewards.chosen([first, first.replace(":mine", ":other")])
    both["mine"](ONE, "")
    assert both["other"](ONE, "") == 0.1
    data = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\n"
    own(f"{data}def mine(e, r):\n    return float(A().x)\n")
    assert rewards.chosen([first])["mine"](ONE, "") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def nine(e, r):\n    return 1", "own.py: no function 'mine'; did you mean nine?"),
        ("mine = 3", "own.py: no function 'mine'; there is none."),
        ("def mine(reply):\n    return 1", "write def mine(example, reply):"),
        ("def mine(e, r, *, k):\n    return 1", "missing a required argument: 'k'"),
        ("x = 1\ndef mine(:", "own.py cannot be run, line 2: SyntaxError"),
        ("import no_such_module", "cannot be run, line 1: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "cannot be run, line 1: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_serve_is_one_line(own, text, said):
    with pytest.raises(InputError) as error:
        rewards.chosen([own(text)])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_or_is_called_as_a_measure_is_one_line(own):
    for name in ("unparsed", "elsewhere_x", "domain"):
        with pytest.raises(InputError, match=f"{name} is a measure of the kit; rename"):
            rewards.chosen([own(f"def {name}(e, r):\n    return 1", name)])
    with pytest.raises(InputError, match=r"nowhere\.py: cannot be read"):
        rewards.chosen(["nowhere.py:mine"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.5", "own.py:mine gave 1.5 for row q1; give a number in [0, 1]"),
        ("return -0.1", "gave -0.1"),
        ("return float('nan')", "gave nan"),
        ("return '1'", "gave '1'"),
        ("return [1.0]", "gave [1.0]"),
        ("return 1 / 0", "failed on row q1, line 2: ZeroDivisionError: division by zero"),
        ("import random; return random.random()", "two calls gave"),
        ("return 0", "is 0 for every gold reply"),
        ("return None", "is None for every row"),
        ("pass", "is None for every row"),
    ],
)
def test_an_own_reward_is_checked_on_gold_before_any_training(own, body, said):
    entry = own(f"def mine(example, reply):\n    {body}\n")
    with pytest.raises(InputError) as error:
        rewards.validate_own(["domain", entry], [replace(ONE, id="q1"), TWO])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_own_rewards_that_are_sound_pass(own):
    entry = own("def mine(e, r):\n    return None if e.task == 'instruction' else len(r) > 9\n")
    rewards.validate_own([entry], [ONE, INSTRUCTION])
    # without a reference reply there is no gold to score
    rewards.validate_own(
        [own("def mine(e, r):\n    return float(bool(r)) if e.constraints else None\n")],
        [ONE, replace(INSTRUCTION, answer="")],
    )
    rewards.validate_own(["domain"], [])


def test_what_the_kit_generates_is_valid(monkeypatch):
    monkeypatch.setattr(knowledge, "is_fact", IS_FACT)
    rows = questions.ontology("validation")
    rewards.validate([*rows, *instructions.examples("validation", per_kind=3)])
    assert {row.task for row in rows} == {"choice", "short"}


def test_an_abbreviation_ends_no_sentence():
    e = Example("1", "choice", "Which?", options=("E. coli", "S. aureus"), answer="E. coli")
    text = "The rods are straight and stain red, as none of the cocci would, hence it is {}."
    found = [
        rewards.reasoning(e, f"<reasoning>{text.format(n)}</reasoning><answer>A</answer>")
        for n in ("E. coli", "S. aureus")
    ]
    assert found == [1.0, 0.5]
