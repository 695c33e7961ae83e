"""IFEval: verdicts equal to the public consensus, deterministic, offline, and never an accident."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bbkit import CannotRun, InputError
from bbkit.benchmarks import ifeval
from bbkit.benchmarks.ifeval import final_answer, score_ifeval

pytest.importorskip("lm_eval", reason="IFEval needs pip install -e '.[eval]'")

ENGLISH = "The quick brown fox jumps over the lazy dog while the children watch from the garden"
AT_LEAST = {"relation": "at least"}
# Every instruction: its arguments, a reply that follows it and one that does not.
KINDS = {
    "keywords:existence": ({"keywords": ["fox", "dog"]}, "A Fox and a dog", "A fox"),
    "keywords:frequency": ({"keyword": "fox", "frequency": 2} | AT_LEAST, "fox fox", "fox"),
    "keywords:forbidden_words": ({"forbidden_words": ["fox"]}, "foxes", "a fox"),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "Zoo",
        "zz",
    ),
    "language:response_language": ({"language": "de"}, "Das ist ein schöner Tag", ENGLISH),
    "length_constraints:number_sentences": (
        {"num_sentences": 2} | AT_LEAST,
        "Dr. Who left. He ran.",
        "Dr. Who left at 5 p.m. today.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    "length_constraints:number_words": ({"num_words": 3} | AT_LEAST, "one two 3", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "fox"},
        "a\n\nFox, b",
        "fox\n\nb",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b]", "[a"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "a\nP.P.S. b", "a\nP.S. b"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n\n- b", "* a\n* b\n* c"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 1}, "*a* b", "* a b"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "<<A title>>\nb", "<< >>\nb"),
    "combination:two_responses": ({}, "a\n******\nb", "a\n******\na"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say (a"}, "say (a b", "b say (a"),
    "startend:end_checker": ({"end_phrase": "The end."}, "a. the end.", "The end. a"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "ONE TWO three",
        "ONE two",
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), ENGLISH),
    "punctuation:no_comma": ({}, "a", "a, b"),
    "startend:quotation": ({}, '"a"', "'a'"),
}


def row(kind: str, **arguments) -> dict:
    return {"key": 7, "prompt": "?", "instruction_id_list": [kind], "kwargs": [arguments]}


def verdict(kind: str, reply: str, **arguments) -> bool:
    return score_ifeval([row(kind, **arguments)], [reply])[0]["strict"][0]


EVERY = {
    "key": "all",
    "prompt": "?",
    "instruction_id_list": list(KINDS),
    "kwargs": [arguments for arguments, _, _ in KINDS.values()],
}


@pytest.fixture(scope="module")
def official(data_dir) -> tuple[list[dict], list[str], dict]:
    def read(name: str) -> list[dict]:
        lines = (data_dir / "ifeval" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    given = read("input_response_data_gpt4_20231107_145030.jsonl")
    replies = {one["prompt"]: one["response"] for one in given}
    consensus = {one["key"]: one for one in read("consensus_verdicts_gpt4.jsonl")}
    rows = read("input_data.jsonl")
    return rows, [replies.get(one["prompt"], "") for one in rows], consensus


@pytest.fixture(scope="module")
def scored(official) -> list[dict]:
    return score_ifeval(*official[:2])


def test_every_verdict_of_the_consensus(official, scored):
    consensus, compared = official[2], 0
    for score in scored:
        for rule in ("strict", "loose"):
            agreed = consensus.get(score["key"], {rule: [None] * len(score[rule])})[rule]
            pairs = list(zip(score[rule], agreed, strict=True))
            assert all(mine == theirs for mine, theirs in pairs if theirs is not None), score
            compared += sum(theirs is not None for _, theirs in pairs)
    assert (len(scored), len(consensus), compared) == (541, 540, 2 * (832 - 2))


def test_the_published_totals_where_all_checkers_agree(official, scored):
    agreed = {key for key, one in official[2].items() if None not in one["strict"]}
    for rule, prompts, instructions in (("strict", 415, 693), ("loose", 429, 709)):
        verdicts = [score[rule] for score in scored if score["key"] in agreed]
        assert (len(verdicts), sum(map(all, verdicts))) == (538, prompts)
        assert (sum(map(len, verdicts)), sum(map(sum, verdicts))) == (828, instructions)


def test_runs_agree_whatever_the_state_of_random(official, scored):
    some = slice(0, 541, 9)
    random.seed(1)
    state = random.getstate()
    assert score_ifeval(official[0][some], official[1][some]) == scored[some]
    assert random.getstate() == state


FRESH = """
import json, random, socket, sys, time
def refuse(*_): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from bbkit.benchmarks import ifeval
assert not {"torch", "lm_eval", "nltk", "langdetect"} & set(sys.modules), "lazy imports"
rows, replies = json.load(sys.stdin)
random.seed(int(sys.argv[1]))
first = ifeval.score_ifeval(rows[:1], replies[:1])
start = time.process_time()
runs = [ifeval.score_ifeval(rows, replies) for _ in range(int(sys.argv[2]))]
print(json.dumps([runs, (time.process_time() - start) / len(runs)]))
"""


def fresh(rows, replies, seed: int, runs: int, home: Path) -> tuple[list, float]:
    """Runs of a new process without network or NLTK data; and the seconds of one."""
    hidden = {"HOME": str(home), "PYTHONHASHSEED": str(seed)}
    env = {k: v for k, v in os.environ.items() if k != "NLTK_DATA"} | hidden
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(seed), str(runs)],
        input=json.dumps([rows, replies]),
        env=env,
        cwd=Path(ifeval.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def test_offline_in_a_new_process(tmp_path):
    replies = [reply for _, reply, _ in KINDS.values()]
    rows = [EVERY] * len(replies)
    runs, _ = fresh(rows, replies, seed=1, runs=1, home=tmp_path)
    assert runs == [score_ifeval(rows, replies)]


@pytest.mark.slow
def test_twenty_runs_and_hash_seeds(official, scored, tmp_path):
    for seed, count in ((0, 20), (1, 1), (12345, 1)):
        runs, seconds = fresh(*official[:2], seed=seed, runs=count, home=tmp_path)
        assert all(run == scored for run in runs)
        assert seconds < 10, f"{seconds:.1f} s for 541 prompts"


@pytest.mark.parametrize("kind", KINDS)
def test_each_instruction_can_pass_and_fail(kind):
    arguments, good, bad = KINDS[kind]
    assert verdict(kind, good, **arguments)
    assert not verdict(kind, bad, **arguments)
    assert not verdict(kind, " \n", **arguments)
    assert verdict(kind, good, **arguments, unused=None), "the Hub's copy fills up with None"


def test_the_table_covers_every_instruction():
    assert set(KINDS) == set(ifeval._registry())


def test_loose_tries_eight_variants():
    want = row("detectable_format:json_format")
    for reply in ("Sure:\n{}", "{}\nBye", "Sure:\n{}\nBye", "**{}**", "*Sure:*\n*{}*\nBye"):
        assert score_ifeval([want], [reply]) == [{"key": 7, "strict": [False], "loose": [True]}]
    for reply in ("Sure: {}", "a\nb\n{}", "{}\na\nb", ""):
        assert score_ifeval([want], [reply])[0]["loose"] == [False]


@pytest.mark.parametrize(("sign", "enough"), [("#", "# ## #"), ("!", "!!! a!"), ("é", "Éé éé")])
def test_signs_are_counted_literally(sign, enough):
    want = {"letter": sign, "let_frequency": 4, "let_relation": "at least"}
    for _ in range(9):  # a drawn letter would agree now and then
        assert verdict("keywords:letter_frequency", enough, **want)
        assert not verdict("keywords:letter_frequency", enough[:-1] + ENGLISH * 9, **want)


def test_an_argument_of_zero_counts():
    for kind, (arguments, _, bad) in KINDS.items():
        zero = {name: 0 if type(value) is int else value for name, value in arguments.items()}
        if zero == arguments or "nth" in kind:
            continue
        zero = {name: "at least" if "relation" in name else v for name, v in zero.items()}
        exact = kind.endswith(("bullet_lists", "number_paragraphs"))
        assert verdict(kind, bad, **zero) != exact, kind
        if exact:
            assert verdict(kind, "***" if "paragraphs" in kind else "a", **zero), kind


def test_a_lacking_argument_is_an_error_not_drawn():
    for kind, (arguments, good, _) in KINDS.items():
        for name in arguments:
            rest = {key: value for key, value in arguments.items() if key != name}
            for short in (rest, rest | {name: None}):
                state = random.getstate()
                with pytest.raises(InputError, match=rf"key 7: {kind}"):
                    verdict(kind, good, **short)
                assert random.getstate() == state


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kwargs": None}, "key 7: needs"),
        ({"kwargs": []}, "key 7: needs"),
        ({"kwargs": [{}, {}]}, "key 7: needs"),
        ({"kwargs": [None]}, "key 7: punctuation:no_comma"),
        ({"kwargs": [{"num_words": 3}]}, "key 7: punctuation:no_comma .*num_words"),
        ({"instruction_id_list": ["punctuation:no_coma"]}, "key 7: unknown .*no_coma"),
        ({"instruction_id_list": []}, "key 7: needs"),
        ({"key": None}, "row 1, key None: needs"),
    ],
)
def test_malformed_rows_are_named(change, line):
    with pytest.raises(InputError, match=line):
        score_ifeval([row("punctuation:no_comma") | change], ["a"])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("keywords:existence", {"keywords": ["a", "(b"]}),
        ("keywords:letter_frequency", {"letter": "ab"}),
        ("keywords:letter_frequency", {"letter": 5}),
        ("language:response_language", {"language": "xx"}),
        ("length_constraints:number_words", {"relation": "exactly"}),
        ("length_constraints:number_words", {"num_words": "3"}),
        ("length_constraints:number_words", {"num_words": -1}),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 0}),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 3}),
        ("change_case:capital_word_frequency", {"capital_frequency": "2"}),
        ("startend:end_checker", {"end_phrase": 5}),
    ],
)
def test_arguments_that_no_checker_can_take(kind, change):
    arguments, good, _ = KINDS[kind]
    for _ in range(5):
        with pytest.raises(InputError, match=rf"key 7: {kind}"):
            verdict(kind, good, **arguments | change)


def test_rows_and_replies_go_together():
    with pytest.raises(InputError, match="2 rows but 1"):
        score_ifeval([EVERY, EVERY], ["a"])
    with pytest.raises(InputError, match="key all: the reply is None"):
        score_ifeval([EVERY], [None])
    assert score_ifeval([], []) == []


def test_langdetect_is_seeded():
    unsure = ["no la de", "si no me", "an de in", "o que la casa", "je de la no", "on i det"]
    rows = [row("language:response_language", language="es")] * len(unsure)
    first = score_ifeval(rows, unsure)
    assert all(score_ifeval(rows, unsure) == first for _ in range(9))


def test_json_nested_too_deep_is_no_json():
    assert not verdict("detectable_format:json_format", "[" * 10**5 + "]" * 10**5)


@settings(max_examples=50, deadline=None)
@given(st.text() | st.text("*-#[]<>\"'.,!? \n\t\r\0aPpS1{}:é病\ud800"))
def test_no_reply_is_an_accident(reply):
    score = score_ifeval([EVERY], [reply])
    assert all(
        loose >= strict for strict, loose in zip(score[0]["strict"], score[0]["loose"], strict=True)
    )
    assert reply.strip() or not any(score[0]["loose"])


MEGABYTE = ["[", " ", "\0", "word ", "病"]
LONG = [
    "\n",
    "<",
    "a<<",
    "a\n",
    " \n",
    "*",
    "[a",
    "#",
    "a. ",
    "\ud800",
    "\n*",
    "\n-",
]  # half a minute each


@pytest.mark.parametrize("unit", MEGABYTE + [pytest.param(u, marks=pytest.mark.slow) for u in LONG])
def test_a_reply_of_a_megabyte(unit):
    reply = "a" + unit * (2**20 // len(unit)) + "b"
    score = score_ifeval([EVERY], [reply])[0]
    assert score["strict"][list(KINDS).index("punctuation:no_comma")] is True


PIECES = {  # what the checker looks for, and what stands between
    "detectable_content:number_placeholders": ["[", "]", "\n", "a"],
    "detectable_format:title": ["<", ">", "\n", " ", "a"],
    "detectable_content:postscript": ["p.", "P.S", "s", " ", "\n"],
    "detectable_format:number_bullet_lists": ["*", "-", "\n", " ", "a"],
}


@pytest.mark.parametrize("kind", ifeval.CUTS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_cuts_leave_verdicts_as_they_are(kind, data):
    reply = "".join(data.draw(st.lists(st.sampled_from(PIECES[kind]), max_size=14)))
    arguments, cut = KINDS[kind][0], re.sub(*ifeval.CUTS[kind], reply)
    for count in range(5):
        checker = ifeval._registry()[kind](kind)
        numbers = {name: count for name, value in arguments.items() if type(value) is int}
        checker.build_description(**arguments | numbers)
        assert checker.check_following(cut) == checker.check_following(reply)


def test_the_process_is_left_as_it_was():
    import langdetect
    import nltk

    before = langdetect.DetectorFactory.seed, nltk.redos.DEFAULT_TIMEOUT, list(nltk.data.path)
    environ = dict(os.environ)
    ifeval._registry.cache_clear()
    score_ifeval([EVERY], ["a"])
    with pytest.raises(InputError):
        score_ifeval([EVERY], [None])
    after = langdetect.DetectorFactory.seed, nltk.redos.DEFAULT_TIMEOUT, list(nltk.data.path)
    assert (before, environ) == (after, dict(os.environ))


@pytest.mark.parametrize("package", ["nltk", "punkt.data", "lm_eval.tasks.ifeval"])
def test_a_missing_package_is_named(package, monkeypatch):
    ifeval._registry.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CannotRun, match=rf"{package}.*pip install -e '\.\[eval\]'"):
        score_ifeval([EVERY], ["a"])


def test_final_answer_reads_the_grammar():
    assert final_answer("<reasoning>a, b</reasoning>\n<answer> No comma </answer>") == "No comma"
    assert final_answer("<answer></answer>") == ""
    for raw in (
        "",
        "plain",
        "<answer>a",
        "<answer>a</answer><answer>b</answer>",
        "<reasoning>a</reasoning>b",
    ):
        assert final_answer(raw) == raw
