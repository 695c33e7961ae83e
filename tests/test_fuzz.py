"""Whatever comes in: readers of replies, data, settings and runs give a value or one line.

`BBKIT_FUZZ=10 pytest -s tests/test_fuzz.py` takes ten minutes for each target. What was found once
is kept as an example.
"""

import functools
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bbkit import CannotRun, InputError, config, prompts, rewards
from bbkit.benchmarks.extraction import extract_choice
from bbkit.benchmarks.ifeval import final_answer
from bbkit.data import layouts
from bbkit.machine import files
from bbkit.prompts import TAGS, Example
from bbkit.runs import record, report

PIECES = (
    *TAGS, "A", "B)", "(C)", "D.", "The answer is ", "not ", "or ", "if ", "<think>", "</think>",
    '{"answer_choice": "', '"}', "\\boxed{", "}", "**", "\n", "\n\n", " ", ".", ",", "[", "{", "é",
    "\u0301", "\ud800", "\x00", "virus", "Malaria is caused by a parasite.", "答案是", "：", "９",
)  # fmt: skip
TEXT = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
)
ROWS = (
    Example("1", "choice", "Cause?", options=("virus", "worm"), answer="virus"),
    Example("2", "short", "Cause?", answer="virus", synonyms=("viruses",)),
    Example("3", "choice", "?", options=("A", "B", "b", "AB"), answer="b"),
    Example("4", "instruction", "Do.", constraints=({"kind": "lower"},)),
)
CASES = settings(
    deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck)
)


def fuzzed(test, how=CASES):
    """A hundred cases, or as many hundreds as fit into BBKIT_FUZZ minutes."""

    cases = how(test)

    @functools.wraps(cases)
    def repeated(**fixtures):
        until, times = time.monotonic() + 60 * float(os.environ.get("BBKIT_FUZZ", 0)), 0
        while not times or time.monotonic() < until:
            cases(**fixtures)
            times += 1
        print(f"{test.__name__}: {how.max_examples * times:,} cases")

    return repeated


def read_answers(text: str) -> None:
    prompts.split_reply(text)
    for choices in ({"A": "virus", "B": "worm"}, "ABCD", ["virus", "worm"], None):
        prompts.parse_answer(text, choices)
    assert isinstance(final_answer(text), str)


def read_choices(text: str) -> None:
    assert extract_choice(text) in (None, *"ABCD")


def read_rewards(text: str) -> None:
    for row in ROWS[:3]:
        for value in rewards.score(row, text).values():
            assert value is None or 0 <= value <= 1


READERS = (read_answers, read_choices, read_rewards)


def settle(text: str, folder: Path) -> None:
    """A configuration file, and the same text on the command line."""
    path = folder / "settings.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    for options in ({"file": path}, {"overrides": [text]}, {"overrides": [f"grpo.steps={text}"]}):
        try:
            config.load("pocket", **options)
        except InputError as error:
            assert str(error)


LAYOUTS = {
    "medqa": ("jsonl", '{"question": "Q", "options": {"A": "a", "B": "b", "C": "c", "D": "d"}, '
              '"answer_idx": "A", "answer": "a"}\n'),
    "medmcqa": ("jsonl", '{"id": "x", "question": "Q", "opa": "a", "opb": "b", "opc": "c", '
                '"opd": "d", "cop": 1, "exp": null}\n'),
    "pubmedqa": ("json", '{"1": {"QUESTION": "Q", "CONTEXTS": ["c"], "LONG_ANSWER": "l", '
                 '"final_decision": "yes"}}'),
    "mmlu_medical": ("csv", "Q,a,b,c,d,A\n"),
    "ifeval": ("jsonl", '{"key": 1, "prompt": "p", "instruction_id_list": '
               '["punctuation:no_comma"], "kwargs": [{}]}\n'),
    "general_instructions": ("jsonl", '{"instruction": "i", "input": "", "output": "o"}\n'),
}  # fmt: skip


def load_rows(card: str, data: bytes) -> None:
    """A data file, row by row."""
    try:
        rows = layouts.parse("file", data, LAYOUTS[card][0])
    except InputError as error:
        assert "file line" in str(error)
        return
    for n, (_, row) in enumerate(rows):
        try:
            Example(**layouts.fields(card, row, n, hub=False))
        except ValueError as error:
            assert str(error)


def changed(draw, data: bytes) -> bytes:
    """`data` with some pieces cut out, doubled, or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        put = draw(st.one_of(st.binary(max_size=8), st.sampled_from(ODD)))
        data = data[:at] + put + data[at + draw(st.integers(0, 12)) :]
    return data


ODD = (
    b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null", b"true", b"[]", b"{}", b'""', b"NaN",
    b"1e999", b"-1", b'"\\ud800"', b"\xff", b"\x00", b"\n", b",", b'"', b"../../etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("read", READERS)
@fuzzed
@given(text=TEXT)
def test_replies(read, text):
    read(text)


@fuzzed
@given(text=TEXT.filter(bool))
@example(text="if ")
@example(text="The answer is not ")
@example(text="<answer>")
@example(text="\u0301")
@example(text="{")
def test_long_replies_take_linear_time(text):
    """CPU seconds for 200 kB of any repeated text; a quadratic reader takes minutes."""
    long = (text * (200_000 // len(text)))[:200_000]
    began = time.process_time()
    for read in READERS:
        read(long + "\nx")
    assert time.process_time() - began < 5


@fuzzed
@given(text=TEXT)
@example(text="[" * 5000)
@example(text="grpo: &a {weights: *a}")
@example(text="a: &a [*a]")
@example(text="grpo: {steps: " + "9" * 5000 + "}")
@example(text="? [1]\n: 2")
def test_settings(tmp_path_factory, text):
    settle(text, tmp_path_factory.getbasetemp())


@fuzzed
@given(data=st.data(), card=st.sampled_from(sorted(LAYOUTS)))
def test_data_files(data, card):
    load_rows(card, changed(data.draw, LAYOUTS[card][1].encode() * 2))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A small finished run folder, without weights."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    plain = config.to_dict(config.load("pocket"))
    with record.Run(folder, plain, ["python"]) as run:
        for step in (1, 2):
            run.log("grpo", step, {"loss": 0.1, "reward/domain": 0.5, "weight/domain": 1.0})
        run.sample("grpo", 2, {"prompt": "p", "reply": "r", "rewards": {"domain": 1.0}})
        measure = {"value": 0.5, "interval": [0.4, 0.6], "n": 4}
        run.evaluation({"base": {"domain": measure, "instruction": measure}})
        run.done("grpo")
        (folder / "grpo" / "checkpoint-2").mkdir(parents=True)
        (folder / "grpo" / "checkpoint-2" / "weights").write_bytes(b"x")
        files.mark_complete(folder / "grpo" / "checkpoint-2")
    return folder


def go_on(folder: Path) -> None:
    with record.Run(folder, config.to_dict(config.load("pocket")), ["python"], folder) as run:
        run.truncate("grpo", 1)


@functools.partial(fuzzed, how=settings(CASES, max_examples=30))  # each draws a report's figures
@given(data=st.data())
def test_run_folders(run_folder, tmp_path_factory, data):
    """A damaged or hostile run folder is refused, or read; nothing outside it is touched."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_folder, folder)
    names = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl"))
    path = data.draw(st.sampled_from(names))
    path.write_bytes(changed(data.draw, path.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        if path.name in ("samples.jsonl", files.MARKER):  # no figure reads these
            patch.setattr(report, "draw", lambda folder: {})
        for step in (
            lambda: files.latest_checkpoint(folder / "grpo"),
            lambda: report.write(folder),
            lambda: go_on(folder),
        ):
            try:
                step()
            except (InputError, CannotRun) as error:
                assert str(error)
