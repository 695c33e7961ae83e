"""Own data by path: spreadsheets as people save them, answers as people write them, what trains."""

import csv
import io
import json
import random
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbkit import CannotRun, InputError, config, data, rewards, train
from bbkit.config import Columns
from bbkit.data import own, tables

PAGE = Path(__file__).parents[2] / "data_cards" / "README.md"
HEADER = ["nr", "Frage", "A", "B", "C", "D", "Antwort", "Grund"]
GERMAN = Columns(
    id="nr", question="Frage", answer="Antwort", options=("A", "B", "C", "D"), reasoning="Grund"
)
MADE_OF = {"flute": "reed", "harp": "gut", "drum": "hide", "bell": "bronze", "horn": "bone"}


def invented(number: int, seed: int = 0) -> list[list[str]]:
    """Rows of questions on instruments that nobody has built."""
    rng, rows = random.Random(seed), []
    for i in range(number):
        kind, gold = rng.choice([*MADE_OF.items()])
        options = [gold, *rng.sample([m for m in MADE_OF.values() if m != gold], 3)]
        rng.shuffle(options)
        ask = f"What is the {kind} of maker {i} made of?"
        said = f"Maker {i} makes every {kind} of one stuff: it is {gold}."
        rows.append([str(i), ask, *options, "ABCD"[options.index(gold)], said])
    return rows


def written(rows, header=HEADER, delimiter=",", newline="\n") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=newline).writerows([header, *rows])
    return text.getvalue().encode()


def changed(place: int, column: str, value: str) -> bytes:
    """Twenty rows, one cell of which is another; the first row stands on line 2."""
    rows = invented(20)
    rows[place][HEADER.index(column)] = value
    return written(rows)


def of(path, split="train", columns=GERMAN, **more):
    return data.load(str(path), split, columns=columns, **more)


def message(call, kind=InputError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def file(tmp_path, content, name="my.csv") -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path / name


SOUND = {
    "plain": lambda: written(invented(20)),
    "byte order mark": lambda: b"\xef\xbb\xbf" + written(invented(20)),
    "CRLF": lambda: written(invented(20), newline="\r\n"),
    "semicolons": lambda: written(invented(20), delimiter=";"),
    "tabs": lambda: written(invented(20), delimiter="\t"),
    "as Excel saves it": lambda: (
        b"\xef\xbb\xbf"
        + written(invented(20), [*HEADER, "", ""], ";", "\r\n")
        + b";;;;;;;;;\r\n" * 3
    ),
    "lower-case gold": lambda: written([[*r[:6], r[6].lower(), r[7]] for r in invented(20)]),
    "gold in brackets": lambda: written([[*r[:6], f"({r[6]})", r[7]] for r in invented(20)]),
    "gold as text": lambda: written(
        [[*r[:6], r[2:6]["ABCD".index(r[6])].upper(), r[7]] for r in invented(20)]
    ),
    "gold as letter and text": lambda: written(
        [[*r[:6], f"{r[6]}) {r[2:6]['ABCD'.index(r[6])]}", r[7]] for r in invented(20)]
    ),
    "counted from 1": lambda: written(
        [[*r[:6], 1 + "ABCD".index(r[6]), r[7]] for r in invented(20)]
    ),
    "counted from 0": lambda: written([[*r[:6], "ABCD".index(r[6]), r[7]] for r in invented(20)]),
    "names in capitals": lambda: written(invented(20), [name.upper() for name in HEADER]),
    "spaces around": lambda: written([[f" {cell} " for cell in r] for r in invented(20)]),
}


@pytest.mark.parametrize("how", SOUND)
def test_a_sound_spreadsheet_just_works(how, tmp_path):
    rows = of(file(tmp_path, SOUND[how]()), whole=True)
    assert [(e.id, e.question, list(e.options), e.reasoning) for e in rows] == [
        (r[0], r[1], r[2:6], r[7]) for r in invented(20)
    ]
    assert [e.answer for e in rows] == [r[2:6]["ABCD".index(r[6])] for r in invented(20)]
    rewards.validate(rows)


BROKEN = {
    "missing column": (
        written(invented(3), ["Nr", "Frag", *HEADER[2:]]),
        "no column 'Frage'; there are Nr, Frag, A, B, C, D, Antwort, Grund: "
        "--set data.columns.question=Frag",
    ),
    "missing option column": (
        written(invented(3), [*HEADER[:5], "E", *HEADER[6:]]),
        "no column 'D'",
    ),
    "duplicate ids": (changed(7, "nr", "3"), "line 9: its id '3' is that of {file} line 5 too"),
    "empty answer": (
        changed(7, "Antwort", ""),
        "line 9: its Antwort is empty; fill it, or delete the row",
    ),
    "empty question": (changed(7, "Frage", "  "), "line 9: its Frage is empty"),
    "empty id": (changed(7, "nr", ""), "line 9: its nr is empty"),
    "gold not among the options": (
        changed(7, "Antwort", "silver"),
        "line 9: its answer 'silver' is not one of its 4 options; write the letter, the text, or",
    ),
    "a letter too far": (
        changed(7, "Antwort", "E"),
        "line 9: its answer 'E' is not one of its 4 options",
    ),
    "a number too far": (
        changed(7, "Antwort", "5"),
        "line 9: its answer 5 is not one of 4 options as the others count",
    ),
    "an option that is missing": (
        changed(7, "B", ""),
        "line 9: option 2 is empty and a later one is not",
    ),
    "two options alike": (
        changed(7, "B", invented(20)[7][2].upper() + "."),
        "line 9: two of its options are ",
    ),
    "tags in an option": (
        changed(7, "B", "<answer>"),
        "line 9: '<answer>' does not read as an answer",
    ),
    "an option of marks alone": (changed(7, "B", "?!"), "line 9: '?!' does not read as an answer"),
    "tags in the reasoning": (
        changed(7, "Grund", "</reasoning>"),
        "line 9: its reasoning has a tag of",
    ),
    "a ragged row": (
        written(invented(3)) + b"3,Who, me,a,b,c,d,A,so\n",
        "line 5: it has 9 cells, the first line 8; a text with ',' or a line break goes",
    ),
    "a short row": (
        written(invented(3)) + b"3,Who?,a\n",
        "line 5: it has 3 cells, the first line 8",
    ),
    "a quote that is not closed": (
        written(invented(3)) + b'3,"Who?,a,b,c,d,A,so\n',
        "line 5: not readable as csv (unexpected end of data)",
    ),
    "latin-1": (
        written(invented(3)) + "3,Größe?,a,b,c,d,A,so\n".encode("latin-1"),
        "line 5: not UTF-8; save it as UTF-8 (Excel: CSV UTF-8)",
    ),
    "UTF-16": (written(invented(3)).decode().encode("utf-16"), "line 1: not UTF-8"),
    "two columns of one name": (
        written(invented(3), [*HEADER[:7], "A"]),
        "line 1: two columns are called 'A'; rename one",
    ),
    "no rows": (written([]), "no rows"),
    "nothing": (b"", "no rows"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_spreadsheet_is_one_line_with_the_mend(how, tmp_path):
    content, expected = BROKEN[how]
    path = file(tmp_path, content)
    for split in ("train", "test"):  # whichever split the row is in
        said = message(lambda split=split: of(path, split))
        assert said.startswith(str(path)) and expected.format(file=path) in said, said


def test_a_broken_spreadsheet_ends_the_run_before_it_begins(tmp_path, capsys):
    path = file(tmp_path, changed(7, "Antwort", "silver"))
    words = ["--preset", "pocket", "--out", str(tmp_path / "run"), "--set", f"data.sft={path}"]
    columns = "data.columns={id: nr, question: Frage, answer: Antwort, options: [A, B, C, D]}"
    assert train.main([*words, "--set", columns]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"error: {path} line 9: ") and "\n" not in err
    assert not (tmp_path / "run").exists()


def test_five_options_or_a_number_that_differs(tmp_path):
    path = file(
        tmp_path, "question,A,B,C,D,E,answer\nQ1?,a,b,c,d,e,E\nQ2?,yes,no,,,,b\nQ3?,,,,,,six\n"
    )
    rows = of(path, columns=Columns(options=("A", "B", "C", "D", "E")), whole=True)
    assert [(e.task, len(e.options), e.answer) for e in rows] == [
        ("choice", 5, "e"), ("choice", 2, "no"), ("short", 0, "six"),
    ]  # fmt: skip
    assert [e.id for e in rows] == [f"{path} line {n}" for n in (2, 3, 4)]
    rewards.validate(rows)
    assert "4 options" in message(lambda: of(path, columns=Columns(options=("A", "B", "C", "D"))))


CELLS = st.text(st.sampled_from('AaBb1 20.)(<>answer/reasoning,;|"[]é\n?α'), max_size=12)


@given(st.lists(CELLS, min_size=3, max_size=8))
def test_whatever_is_taken_scores_full(cells):
    """A row of anything is refused in one line, or its gold scores 1 and no other option does."""
    question, answer, reasoning, *options = cells
    row = {"question": question, "answer": answer, "reasoning": reasoning, "options": options}
    try:
        read = own.examples("my.csv", [("my.csv line 2", row)], "train", Columns(), whole=True)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("my.csv")
    else:
        rewards.validate(read)


def test_a_name_with_a_line_break(tmp_path):
    path = file(tmp_path, 'Frage,"Ant\nwort"\nQ?,six\n')
    assert "there are Frage, Ant wort: --set" in message(lambda: of(path, columns=Columns()))
    columns = Columns(question="Frage", answer="Ant wort")
    assert of(path, columns=columns, whole=True)[0].answer == "six"


def test_letters_without_options_are_no_free_text(tmp_path):
    path = file(tmp_path, "question,A,B,answer\nQ1?,a,b,A\nQ2?,c,d,B\n")
    said = message(lambda: of(path, columns=Columns()))
    assert "every answer is like A" in said and "data.columns.options=[A, B]" in said


def test_numbers_without_the_options_beside_them_are_no_free_text(tmp_path):
    """As the Hub's MMLU has them: its options are in a column of another name."""
    rows = [{"question": f"Q{n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(2)]
    path = file(tmp_path, "\n".join(map(json.dumps, rows)), "my.jsonl")
    said = message(lambda: of(path, columns=Columns()))
    assert "every answer is like 0" in said and "data.columns.options=[choices]" in said
    for row in rows:
        row |= {"choices": None, "answer": 3 + row["answer"]}
    path = file(tmp_path, "\n".join(map(json.dumps, rows)), "my.jsonl")
    assert [e.answer for e in of(path, columns=Columns(), whole=True)] == ["3", "4"]


@pytest.mark.parametrize(
    ("options", "answers", "golds"),
    [
        (["3|5|7|9"] * 3, "5 9 3", "5 9 3"),  # texts: none counts to 9
        (["a|b|c|d"] * 3, "1 2 4", "a b d"),
        (["a|b|c|d"] * 3, "0 1 3", "a b d"),
        (["1|2|3|4"] * 3, "1 2 4", "1 2 4"),  # text and number say the same
        (["a|b|c|d"] * 3, "1 2 3", "line 2: its answer 1 counts from 0, or counts from 1"),
        (["2|4|1|3"] * 3, "1 2 4", "line 2: its answer 1 is an option's text, or counts from 1"),
        (["a|b|c|d"] * 3, "1 4 0", "line 4: its answer 0 is not one of 4 options as the others"),
        (["a|b|c|d"] * 3, "1 4 7", "line 4: its answer 7 is not one of 4 options as the others"),
        (["C|B|A|D"] * 3, "D D A", "line 4: its answer 'A' is the letter of one option and"),
        (["C|B|A|D"] * 3, "D D C) A", "D D A"),
        (["a"] * 3, "a a a", "line 2: it has 1 options"),
        (["[a, b]"] * 3, "a a a", "line 2: its options are no list"),
    ],
)
def test_an_answer_has_one_reading_or_is_refused(options, answers, golds, tmp_path):
    asked = re.findall(r"\w\) \w|\w", answers)
    rows = [
        f"Q{i}?,{o.replace(', ', ' ')},{a}"
        for i, (o, a) in enumerate(zip(options, asked, strict=True))
    ]
    path = file(tmp_path, "\n".join(["question,options,answer", *rows]))
    if golds.startswith("line"):
        assert f"{path} {golds}" in message(lambda: of(path, columns=Columns()))
    else:
        read = of(path, columns=Columns(), whole=True)
        assert [e.answer for e in read] == golds.split()
        rewards.validate(read)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [
        {"id": int(r[0]), "question": r[1], "options": r[2:6], "answer": r[6], "reasoning": r[7]}
        for r in invented(20)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    flat = [
        [r["id"], r["question"], "|".join(r["options"]), r["answer"], r["reasoning"]] for r in rows
    ]
    files = [
        file(tmp_path, "\ufeff" + lines.replace("\n", "\r\n"), "my.jsonl"),
        file(tmp_path, json.dumps(rows), "my.json"),
        file(tmp_path, written(flat, rows[0], "\t"), "my.tsv"),
        tmp_path / "my.parquet",
    ]
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(files[-1])
    read = [of(path, columns=Columns(), whole=True) for path in files]
    for path, found in zip(files, read, strict=True):
        assert [(e.id, e.options, e.answer) for e in found] == [
            (r[0], tuple(r[2:6]), r[2:6]["ABCD".index(r[6])]) for r in invented(20)
        ]
        assert {e.source for e in found} == {str(path)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "my.jsonl",
            '{"question": "Q?", "answer": "a"}\n{"question": ',
            "line 2: not readable as jsonl",
        ),
        (
            "my.jsonl",
            '{"question": "Q?", "answer": "a"}\n["Q?", "a"]',
            'line 2: not a row; write {"question": …',
        ),
        (
            "my.jsonl",
            '{"question": "Q?", "answer": ["a"]}',
            "line 1: \"['a']\" is a list where a text",
        ),
        (
            "my.jsonl",
            '{"question": "Q?", "answer": "a", "options": 4}',
            "line 1: its options '4' are no list",
        ),
        (
            "my.jsonl",
            '{"question": "Q?", "answer": "a", "options": {"1": "a"}}',
            "line 1: its options go by 1",
        ),
        (
            "my.jsonl",
            b'{"question": "Q?", "answer": "a"}\n{"question": "\xe4"}',
            "line 2: not UTF-8",
        ),
        (
            "my.jsonl",
            '{"question": "Q?", "answer": "a"}\n{"question": "Q?"}',
            "line 2: its answer is empty",
        ),
        ("my.parquet", "no such thing", "not readable as parquet"),
        ("my.xlsx", "PK", "not of a kind that is read; save it as .csv"),
        (
            "my.csv",
            "question,answer,split\nQ?,a,dev",
            "line 2: its split is 'dev'; use train, validation, test",
        ),
    ],
)
def test_other_files_name_the_row_too(name, content, said, tmp_path):
    path = file(tmp_path, content, name)
    assert f"{path}" in (found := message(lambda: of(path, columns=Columns()))) and said in found


def test_a_file_is_parted_by_its_questions(tmp_path):
    rows = invented(600)
    path = file(
        tmp_path, written([*rows, *([f"again {r[0]}", r[1].upper(), *r[2:]] for r in rows)])
    )
    parts = {split: of(path, split) for split in own.SPLITS}
    asked = {split: {own._key(e.question) for e in found} for split, found in parts.items()}
    assert sum(map(len, parts.values())) == 1200 and sum(map(len, asked.values())) == 600
    assert [len(found) / 12 for found in parts.values()] == pytest.approx([80, 10, 10], abs=4)
    assert of(path, "test") == parts["test"]
    # Rows that come later move none that are there.
    more = file(tmp_path, written(invented(700)), "more.csv")
    assert {own._key(e.question) for e in of(more, "test")} >= asked["test"]


def test_a_column_says_what_trains(tmp_path):
    sides = ["train", "Test", "validation", "train"]
    rows = [[*r, side] for r, side in zip(invented(4), sides, strict=True)]
    path = file(tmp_path, written(rows, [*HEADER, "split"]))
    assert [[e.id for e in of(path, s, whole=True)] for s in own.SPLITS] == [
        ["0", "3"],
        ["2"],
        ["1"],
    ]
    few = file(tmp_path, written(rows[:1], [*HEADER, "split"]), "few.csv")
    assert "none of its 1 rows is of split test, as its column says" in message(
        lambda: of(few, "test")
    )


def settings(tmp_path, *more: str):
    columns = "data.columns={id: nr, question: Frage, answer: Antwort, options: [A, B, C, D]}"
    return config.load("pocket", overrides=[columns, *more])


def test_nothing_is_evaluated_that_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, written(invented(200)))
    both = [f"data.{stage}=my.csv" for stage in ("sft", "grpo")]
    rows = train.load_rows(settings(tmp_path, *both, "data.evaluate=./my.csv"), None)
    trained = {e.question for stage in ("sft", "grpo") for e in rows[stage]}
    asked = {e.question for e in rows["held_out"]}
    assert trained and asked and not trained & asked and len(trained | asked) < 200
    validation = settings(tmp_path, *both, "data.evaluate=my.csv", "evaluation.split=validation")
    again = {e.question for e in train.load_rows(validation, None)["held_out"]}
    assert again and not again & (trained | asked) and len(trained | asked | again) == 200
    # Named for one of the two, a file is used whole.
    whole = train.load_rows(settings(tmp_path, *both), None)
    assert len(whole["sft"]) == len(whole["grpo"]) == 200
    # Another file with a question of the first.
    file(tmp_path, written([["x", *invented(1)[0][1:]], *invented(9, 1)[1:]]), "other.csv")
    said = message(
        lambda: train.load_rows(settings(tmp_path, *both, "data.evaluate=other.csv"), None)
    )
    assert said.startswith("other.csv row x is evaluated, and trained on as my.csv 0; leave it out")


def test_leakage_into_shipped_test_sets_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    leaked = data.load("ontology_chains", "test")[0]
    row = ["leak", leaked.question.upper(), *leaked.options, leaked.answer, ""]
    file(tmp_path, written([row, *invented(20)]))
    train.load_rows(settings(tmp_path, "data.sft=my.csv", "data.grpo=my.csv"), None)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(r"ontology_chains test: \d+ normalised, such as DOID:.*, your leak;", line)
    assert line.endswith("none of constraints")
    file(tmp_path, written(invented(20)))
    train.load_rows(settings(tmp_path, "data.sft=my.csv", "data.grpo=my.csv"), None)
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line.startswith("leakage: of the shipped test sets at hand none of ") and "such" not in line
    )


CARD = """---
name: mine
columns: {id: nr, question: Frage, answer: Antwort, options: [A, B, C, D]}
splits:
  train: {role: train, files: [{path: a.csv}]}
  validation: {role: validation, rows: 4, files: [{path: sub/b.csv, sha256: SUM}]}
---
What it is.
"""


def test_a_card_of_ones_own(tmp_path):
    (tmp_path / "sub").mkdir()
    file(tmp_path, written(invented(6)), "a.csv")
    file(tmp_path, written(invented(9)[5:]), "sub/b.csv")
    path = file(tmp_path, CARD, "my_card.md")
    sums = data.checksums(str(path), "train")
    assert list(sums) == ["a.csv", "sub/b.csv"]
    assert "has sha256" in message(lambda: of(path, "validation", None))
    path = file(tmp_path, CARD.replace("SUM", sums["sub/b.csv"]), "my_card.md")
    assert [e.id for e in of(path, "train", None)] == list("012345")
    assert [e.id for e in of(path, "validation", None)] == list("5678")
    assert data.role(str(path), "validation") == "validation"
    file(tmp_path, changed(3, "Antwort", "silver"), "a.csv")
    assert f"{tmp_path / 'a.csv'} line 5: its answer 'silver'" in message(
        lambda: of(path, "train", None)
    )
    (tmp_path / "a.csv").unlink()
    assert "a.csv missing" in message(lambda: of(path, "train", None))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("role: train", "role: trian"), ("files: [{path: a.csv}]", "files: []"), ("---\n", ""),
        ("question: Frage", "frage: Frage"), ("splits:", "split:"), ("path: a.csv", "name: a.csv"),
        ("[{path: a.csv}]", "a.csv"), ("a.csv", "a.xlsx"), ("name: mine", "name: ["),
    ],
)  # fmt: skip
def test_a_card_that_is_none_is_one_line(old, new, tmp_path):
    path = file(tmp_path, CARD.replace(old, new), "my_card.md")
    assert f"{path}: not a data card (" in message(lambda: of(path, "train", None))


def test_a_hub_id_with_columns_named(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [dict(zip(HEADER, row, strict=True)) for row in invented(40)]
    made = {"train": datasets.Dataset.from_list(rows)}
    calls = []

    def stored(**call):
        calls.append(call)
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", stored)
    name = "owner/name@0123"
    assert sum(len(of(name, split)) for split in own.SPLITS) == 40  # one split: by the hash
    assert calls[0] == {"path": "owner/name", "revision": "0123"}
    made["test"] = datasets.Dataset.from_list([{**row, "nr": f"t{row['nr']}"} for row in rows[:3]])
    assert [e.id for e in of(name, "test")] == ["t0", "t1", "t2"] and len(of(name)) == 40
    assert data.checksums(name, "train") == {"owner/name": "0123"}
    made["train"] = datasets.Dataset.from_list([{**rows[0], "Antwort": "silver"}])
    assert "owner/name at revision 0123 train row 1: its answer 'silver'" in message(
        lambda: of(name)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: 1 / 0)
    assert "cannot load owner/name" in message(lambda: of(name), CannotRun)


def test_names_that_are_no_file():
    assert "nowhere.csv: no such file" in message(lambda: of("nowhere.csv"))
    assert "nowhere.md: cannot read" in message(lambda: of("nowhere.md"))
    assert "no data card 'mycsv'" in message(lambda: of("mycsv"))


def test_from_a_spreadsheet_to_a_report_by_the_page_alone(tmp_path, monkeypatch, capsys):
    block = (
        PAGE.read_text()
        .split("<!-- command: own -->\n```bash\n")[1]
        .split("```")[0]
        .replace("\\\n", " ")
    )
    words = shlex.split(block)
    assert words[:3] == ["python", "-m", "bbkit.train"]
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "\ufeff" + written(invented(200), newline="\r\n").decode())
    few = [
        "sft.steps=2", "grpo.steps=2", "grpo.prompts=2", "grpo.generations=2",
        "grpo.micro_batch_size=4", "sft.batch_size=4", "sft.micro_batch_size=4",
        "retention.rule=none", "evaluation.elsewhere=2", "grpo.max_completion_length=4",
        "evaluation.max_new_tokens=4", "evaluation.bootstrap=50",
    ]  # fmt: skip
    small = [word for setting in few for word in ("--set", setting)]
    assert train.main([*words[3:], *small, "--offline"]) == 0
    run = tmp_path / "runs" / "mine"
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["data"] == {"my.csv": data.checksums("my.csv", "train")}
    results = json.loads((run / "evaluation.json").read_text())
    n = {stage: results[stage]["domain"]["n"] for stage in ("base", "sft", "grpo")}
    assert n == dict.fromkeys(n, len(of("my.csv", "test")))
    assert "my.csv" in (run / "report.md").read_text()
    file(tmp_path, written(invented(201)))
    capsys.readouterr()
    assert train.main([*words[3:], *small, "--offline"]) == 2
    assert "cannot resume, data.my.csv" in capsys.readouterr().err


def test_cells():
    assert [tables.text(v) for v in (True, 2.5, float("nan"), 0)] == ["True", "2.5", "", "0"]
