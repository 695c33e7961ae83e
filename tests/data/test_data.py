"""Data cards and the loader: cards as stated, real files, Hub layouts, and every malformed case."""

import csv
import hashlib
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbkit import CannotRun, InputError, data
from bbkit.data import catalogue, contamination, layouts
from bbkit.prompts import Example

CARDS = Path(__file__).parents[2] / "data_cards"
NAMES = ["constraints", "general_instructions", "ifeval", "medmcqa", "medqa", "mmlu_medical"]
NAMES += ["ontology", "ontology_chains", "open_replies", "pocket_prompts", "pubmedqa"]
SUBJECTS = {
    "anatomy": 135,
    "clinical_knowledge": 265,
    "college_biology": 144,
    "college_medicine": 173,
    "medical_genetics": 100,
    "professional_medicine": 272,
}
REQUIRED = ["name", "pretty_name", "license", "license_source", "phi", "prompt", "citation"]
REQUIRED += ["splits", "language"]

MEDQA = {
    "question": "Which drug?",
    "options": {"A": "Aspirin", "B": "Heparin", "C": "Warfarin", "D": "Statin"},
    "answer": "Heparin",
    "answer_idx": "B",
}
MEDMCQA = {
    "id": "m1",
    "question": "Which nerve?",
    "opa": "Ulnar",
    "opb": "Radial",
    "opc": "Median",
    "opd": "Axillary",
    "cop": 4,
    "exp": None,
}
PUBMEDQA = {
    "QUESTION": "Does it work?",
    "CONTEXTS": ["We tried.", "It did."],
    "LONG_ANSWER": "It works.",
    "final_decision": "yes",
}
MMLU = ["Which bone?", "Ulna", "Tibia", "Rib", "Skull\nor jaw", "D"]
IFEVAL = {
    "key": 7,
    "prompt": "Write twice. ",
    "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
    "kwargs": [{}, {"keyword": "so", "frequency": 0}],
}
GENERAL = {"instruction": "Edit.", "input": "He go.", "output": "He goes."}


def as_jsonl(rows: list) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def write(folder: Path, files: dict[str, bytes | list | dict]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".csv"):
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small folder in the known layout, one or two rows a file."""
    mmlu = {f"mmlu/{s}_test.csv": [MMLU] for s in SUBJECTS}
    other = {**MEDQA, "id": 3, "context": ["A man.", "He coughs."]}
    return write(
        tmp_path,
        mmlu
        | {
            "medqa/all_dev_good.jsonl": as_jsonl([MEDQA, other]),
            "medqa/phrases_no_exclude_test.head100.jsonl": as_jsonl([MEDQA]),
            "medqa/phrases_no_exclude_train.jsonl": as_jsonl([MEDQA]),
            "medmcqa/dev.head100.json": as_jsonl([MEDMCQA]),
            "pubmedqa/ori_pqal.json": {"11": PUBMEDQA, "12": PUBMEDQA},
            "pubmedqa/test_ground_truth.json": {"12": "yes"},
            "ifeval/input_data.jsonl": as_jsonl([IFEVAL]),
            "general/instruction-data.json": [
                {**GENERAL, "instruction": f"Edit number {i}."} for i in range(60)
            ],
            "general/seed_tasks.jsonl": as_jsonl(
                [{"instruction": "Sing.", "instances": [GENERAL]}]
            ),
        },
    )


def load(card: str, split: str, folder: Path | None) -> list:
    return data.load(card, split, folder, allow_changed=True)


def refused(call: Callable, *parts: str, error: type[Exception] = InputError) -> str:
    """The one line of the error, which has every part."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


# ---- cards


def test_all_cards_are_there():
    assert data.cards() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_card_is_a_hub_card_and_complete(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    hub = DatasetCard(text)
    front = data.card(name)
    assert hub.data.to_dict()["pretty_name"] == front["pretty_name"]
    assert front["name"] == name
    assert not [key for key in REQUIRED if not front.get(key)]
    for heading in ("What it is", "How it was made", "Licence", "Limits and traps"):
        assert f"**{heading}" in hub.text, heading
    roles = {entry["role"] for entry in front["splits"].values()}
    assert roles <= {"train", "validation", "test"}
    if "test" in roles:
        assert "**Never train on" in hub.text
    for split, entry in front["splits"].items():
        assert "rows" in entry
        assert (name in catalogue.GENERATED) == ("files" not in entry)
        if name not in catalogue.GENERATED:
            assert entry["rows"] > 0
            assert entry.get("format") or front["format"] in ("jsonl", "json", "csv")
            assert name in layouts.READERS
        assert data.role(name, split) == entry["role"]
        for file in entry.get("files", []) + entry.get("sample", {}).get("files", []):
            assert file["sha256"] is None or re.fullmatch("[0-9a-f]{64}", file["sha256"])
            assert not Path(file["path"]).is_absolute() and ".." not in file["path"]
        for source in entry.get("hub", []):
            assert re.fullmatch("[0-9a-f]{40}", source["revision"]), "pin every source"
            assert ("data_files" in source) == (source["path"] == "json")


def test_readme_lists_the_cards_as_they_are():
    readme = (CARDS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        front = data.card(name)
        licence = front["license"]
        splits = "; ".join(
            f"{s}: {format(e['rows'], ',') if e['rows'] else 'by seed'} ({e['role']})"
            for s, e in front["splits"].items()
        )
        licence = licence if isinstance(licence, str) else ", ".join(licence)
        assert f"| [{name}]({name}.md) | {splits} | {licence} |" in readme
        for entry in front["splits"].values():
            for file in entry.get("files", []):
                stem = re.sub("[a-z_]+_test.csv", "<subject>_test.csv", Path(file["path"]).name)
                assert stem in readme


def test_no_eval_set_can_be_taken_for_training():
    train = {(n, s) for n in NAMES for s in data.card(n)["splits"] if data.role(n, s) == "train"}
    assert not {n for n, _ in train} & {"ifeval", "mmlu_medical"}
    sources = {}
    for name in NAMES:
        for split, entry in data.card(name)["splits"].items():
            files = entry.get("files", []) + entry.get("sample", {}).get("files", [])
            key = tuple(f["path"] for f in files), entry.get("keep_ids"), entry.get("keep_held_out")
            if files:
                assert key not in sources, f"{name}/{split} reads what {sources[key]} reads"
                sources[key] = (name, split)


def test_cards_are_found_in_a_wheel(tmp_path, monkeypatch):
    inside = write(tmp_path / "bbkit", {"data_cards/medqa.md": (CARDS / "medqa.md").read_bytes()})
    monkeypatch.setattr(catalogue, "__file__", str(inside / "data" / "catalogue.py"))
    assert data.cards() == ["medqa"]
    assert data.card("medqa")["name"] == "medqa"


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: data.load("medqq", "test"), "no data card 'medqq': did you mean 'medqa'?"),
        (lambda: data.card("../secrets"), "../secrets: not of a kind that is read"),
        (lambda: data.role("medqa", "tests"), "no split of medqa 'tests': did you mean 'test'?"),
        (lambda: data.load("ifeval", "train"), "There are test"),
        (lambda: data.load("ontology", "tset"), "did you mean 'test'?"),
    ],
)
def test_unknown_names_get_the_nearest(call, expected):
    refused(call, expected)


@pytest.mark.parametrize("path", ["../x.jsonl", "/etc/passwd", "a/../../x", "C:\\x", "a\\..\\x"])
def test_card_paths_stay_in_the_folder(monkeypatch, tmp_path, path):
    entry = {"role": "test", "rows": 1, "files": [{"path": path, "sha256": None}], "hub": []}
    monkeypatch.setattr(
        catalogue, "card", lambda name: {"format": "jsonl", "splits": {"test": entry}}
    )
    refused(lambda: data.load("medqa", "test", tmp_path), "not a path in the data folder")


def test_import_is_light():
    code = "import sys, bbkit.data; sys.exit(any(m in sys.modules for m in ('torch', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- rows of each layout


def test_rows_of_every_layout(folder):
    plain, parted = load("medqa", "validation", folder)
    assert (plain.answer, plain.context, plain.task) == ("Heparin", "", "choice")
    assert parted.context == "A man. He coughs."
    assert (plain.source, plain.split, plain.id) == ("medqa", "validation", "0000")
    (row,) = load("medmcqa", "validation", folder)
    assert (row.answer, row.id, row.reasoning) == ("Axillary", "m1", "")  # 4 is the fourth
    (train,) = load("pubmedqa", "train", folder)
    (test,) = load("pubmedqa", "test", folder)
    assert (train.id, test.id) == ("11", "12")
    assert (train.context, train.reasoning, train.entity) == (
        "We tried.\nIt did.",
        "It works.",
        "11",
    )
    assert train.options == ("yes", "no", "maybe")
    rows = load("mmlu_medical", "test", folder)
    assert [r.entity for r in rows] == list(SUBJECTS)
    assert (rows[0].id, rows[0].answer) == ("anatomy-000", "Skull\nor jaw")
    (row,) = load("ifeval", "test", folder)
    assert row.question == "Write twice. " and row.answer == ""
    assert row.constraints[1] == {"kind": "keywords:frequency", "keyword": "so", "frequency": 0}
    (row,) = load("general_instructions", "seed_tasks", folder)
    assert (row.question, row.answer) == ("Sing.\n\nHe go.", "He goes.")


def test_general_instructions_are_cut_by_instruction(folder):
    train, held = (load("general_instructions", s, folder) for s in ("train", "validation"))
    assert len(train) + len(held) == 60 and train and held
    assert not {e.entity for e in train} & {e.entity for e in held}
    assert [e.question for e in load("general_instructions", "train", folder)] == [
        e.question for e in train
    ]


def test_generated_cards_need_no_folder_and_take_a_seed(monkeypatch):
    made = lambda split, seed=0: [Example(f"{split}-{seed}", "short", "What?")]  # noqa: E731
    monkeypatch.setitem(catalogue.GENERATED, "ontology", made)
    (row,) = data.load("ontology", "test", data_dir="/nowhere", seed=1)
    assert (row.id, row.source, row.split) == ("test-1", "ontology", "test")
    rows = {s: data.load("constraints", s) for s in ("train", "validation", "test")}
    assert {e.source for split in rows.values() for e in split} == {"constraints"}
    sums = [data.checksums("constraints", split) for split in rows]
    assert len({value for each in sums for value in each.values()}) == 3
    assert sums[0] == data.checksums("constraints", "train")


def test_training_rows_with_two_right_answers_are_left_out_but_test_rows_kept(folder, caplog):
    twice = {**MEDQA, "options": {**MEDQA["options"], "C": "heparin."}}
    wrong_twice = {**MEDQA, "options": {**MEDQA["options"], "C": "Aspirin"}}
    rows = as_jsonl([MEDQA, twice, wrong_twice])
    write(
        folder,
        {
            "medqa/phrases_no_exclude_train.jsonl": rows,
            "medqa/phrases_no_exclude_test.jsonl": rows,
        },
    )
    assert [e.id for e in load("medqa", "train", folder)] == ["0000", "0002"]
    assert "1 rows with two right answers left out" in caplog.text
    assert len(load("medqa", "test", folder)) == 3


# ---- bad input: one clear line, with file and row


def drop(key: str) -> Callable:
    return lambda row: {k: v for k, v in row.items() if k != key}


def put(**changes) -> Callable:
    return lambda row: {**row, **changes}


MALFORMED = {
    ("medqa", "validation", "medqa/all_dev_good.jsonl"): [
        (drop("question"), "'question' is missing"),
        (put(question=" "), "its question is empty"),
        (put(question=3), "its question must be text, not '3'"),
        (put(options=[1]), "not laid out as medqa"),
        (put(options={"A": "x"}), "1 options"),
        (put(answer_idx="E"), "'E' of 4 options; it must be one of A, B, C, D"),
        (put(answer_idx="AB"), "'AB'"),
        (put(answer="x"), "not the text of option B"),
        (put(context="x"), "must be a list of texts"),
        (lambda row: 5, "not laid out as medqa"),
        (lambda row: None, "not laid out as medqa"),
    ],
    ("medmcqa", "validation", "medmcqa/dev.head100.json"): [
        (put(cop=0), "must be one of 1, 2, 3, 4"),
        (put(cop=True), "'True'"),
        (put(opd=""), "its answer is empty"),
        (put(opa=[]), "its options must be text"),
        (drop("opb"), "'opb' is missing"),
        (put(question=None), "its question is empty"),
    ],
    ("ifeval", "test", "ifeval/input_data.jsonl"): [
        (put(kwargs=[{}]), "2 instructions, but 1 sets of kwargs"),
        (put(kwargs=[{}, 1]), "not laid out as ifeval"),
        (put(instruction_id_list=[], kwargs=[]), "0 instructions"),
        (drop("prompt"), "'prompt' is missing"),
    ],
    ("general_instructions", "seed_tasks", "general/seed_tasks.jsonl"): [
        (put(output=""), "its answer is empty"),
        (put(instances=[]), "not laid out as general_instructions"),
        (put(instruction=1), "not laid out as general_instructions"),
    ],
}
GOOD = {"medqa": MEDQA, "medmcqa": MEDMCQA, "ifeval": IFEVAL, "general_instructions": GENERAL}


@pytest.mark.parametrize(
    "at, spoil, expected", [(at, *case) for at, cases in MALFORMED.items() for case in cases]
)
def test_malformed_row_is_named_by_file_and_line(folder, at, spoil, expected):
    card, split, file = at
    good = GOOD[card]
    write(
        folder, {file: as_jsonl([good]) + b"\n" + as_jsonl([spoil(good)])}
    )  # a blank line between
    text = refused(lambda: load(card, split, folder), expected, "; mend the row or fetch the file")
    assert text.startswith(f"{file} line 3: ")


def test_malformed_rows_of_json_and_csv(folder):
    write(
        folder,
        {"pubmedqa/ori_pqal.json": {"11": PUBMEDQA, "12": PUBMEDQA | {"final_decision": "?"}}},
    )
    pubmedqa = (
        "pubmedqa/ori_pqal.json entry 12: ",
        "'?' of 3 options; it must be one of yes, no, maybe",
    )
    refused(lambda: load("pubmedqa", "train", folder), *pubmedqa)
    write(folder, {"general/instruction-data.json": [GENERAL, {"instruction": "x"}]})
    general = "general/instruction-data.json row 2: 'input' is missing"
    refused(lambda: load("general_instructions", "train", folder), general)
    for bad, expected in (
        (MMLU[:5], "it has 5 cells"),
        ([*MMLU[:5], "E"], "'E' of 4 options"),
        ([*MMLU[:5], "BC"], "'BC' of 4 options"),
        (["", *MMLU[1:]], "its question is empty"),
    ):  # the first record spans two lines, so the second begins on the third
        write(folder, {"mmlu/anatomy_test.csv": [MMLU, bad]})
        place = "mmlu/anatomy_test.csv line 3: "
        refused(lambda: load("mmlu_medical", "test", folder), place, expected)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(cut=st.integers(min_value=0, max_value=600))
def test_truncated_file_is_refused_or_gives_whole_rows(folder, cut):
    rows = as_jsonl([MEDQA, MEDQA, MEDQA])
    write(folder, {"medqa/all_dev_good.jsonl": rows[:cut]})
    try:
        loaded = load("medqa", "validation", folder)
    except InputError as error:
        assert "medqa" in str(error) and "\n" not in str(error)
    else:  # cut between two rows
        assert len(loaded) == rows[:cut].count(b"}}") + rows[:cut].count(b'"B"}')


@pytest.mark.parametrize(
    "card, split, file, content, expected",
    [
        (
            "medqa",
            "validation",
            "medqa/all_dev_good.jsonl",
            as_jsonl([MEDQA])[:-9],
            "line 1: not readable",
        ),
        ("medqa", "validation", "medqa/all_dev_good.jsonl", b"\xff\xfe", "not readable as jsonl"),
        (
            "pubmedqa",
            "test",
            "pubmedqa/ori_pqal.json",
            b'{"1":\n {"QUES',
            "line 2: not readable as json",
        ),
        (
            "general_instructions",
            "train",
            "general/instruction-data.json",
            b"5",
            "not readable as json",
        ),
        ("mmlu_medical", "test", "mmlu/anatomy_test.csv", b'a,"b', "line 1: not readable as csv"),
    ],
)
def test_broken_files(folder, card, split, file, content, expected):
    (folder / file).write_bytes(content)
    text = refused(
        lambda: load(card, split, folder), expected, "as if cut short; mend it or fetch it again"
    )
    assert text.startswith(file)


def test_missing_folder_file_and_subject(folder):
    nowhere = f"no data folder {folder / 'nowhere'}: lay one out as data_cards/README.md says"
    refused(lambda: load("medqa", "test", folder / "nowhere"), nowhere)
    train = "medmcqa, split train: medmcqa/train.json missing in"
    refused(lambda: load("medmcqa", "train", folder), train, "leave --data-dir out")
    (folder / "mmlu/college_biology_test.csv").unlink()
    subject = "mmlu_medical, split test: mmlu/college_biology_test.csv missing in"
    refused(lambda: load("mmlu_medical", "test", folder), subject)
    (
        folder / "pubmedqa/test_ground_truth.json"
    ).unlink()  # never the whole file for want of the ids
    refused(lambda: load("pubmedqa", "train", folder), "pubmedqa/test_ground_truth.json missing")
    refused(lambda: data.load("general_instructions", "seed_tasks"), "no Hub copy", "--data-dir")
    refused(lambda: data.verify("medqa", folder / "mmlu"), "medqa: none of its files")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_split(folder, content):
    for card, split, file in (
        ("ifeval", "test", "ifeval/input_data.jsonl"),
        ("general_instructions", "train", "general/instruction-data.json"),
        ("mmlu_medical", "test", "mmlu/anatomy_test.csv"),
    ):
        for other in (folder / file).parent.iterdir():
            other.write_bytes(content)
        refused(lambda: load(card, split, folder), f"{card}, split {split}: no rows")  # noqa: B023
    write(folder, {"pubmedqa/test_ground_truth.json": {}})
    refused(lambda: load("pubmedqa", "test", folder), "pubmedqa, split test: no rows")


def test_changed_file_is_refused_unless_allowed(folder, caplog):
    file = folder / "ifeval/input_data.jsonl"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    stated = data.card("ifeval")["splits"]["test"]["files"][0]["sha256"]
    sums = f"ifeval/input_data.jsonl has sha256 {found[:8]}, not the card's {stated[:8]}"
    rows, mend = "1 rows, not the card's 541", "accept the change: --set data.allow_changed=true"
    refused(lambda: data.load("ifeval", "test", folder), sums, rows, mend)
    refused(lambda: data.verify("ifeval", folder), sums)
    assert len(load("ifeval", "test", folder)) == 1
    assert sums in caplog.text
    assert data.checksums("ifeval", "test", folder) == {"ifeval/input_data.jsonl": found}


def test_sample_and_unpinned_files_are_reported(folder, caplog):
    load("medqa", "test", folder)
    assert "only a sample of 1 rows" in caplog.text
    caplog.clear()
    write(folder, {"medqa/phrases_no_exclude_test.jsonl": as_jsonl([MEDQA, MEDQA])})
    assert len(load("medqa", "test", folder)) == 2  # the whole file goes first
    assert "sample" not in caplog.text
    write(folder, {"medmcqa/train.json": as_jsonl([MEDMCQA])})
    load("medmcqa", "train", folder)
    assert "medmcqa/train.json has no checksum on the card; it has sha256" in caplog.text


# ---- the Hub: same rows as the files, through datasets' own types


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset answers from a table (path, name) -> Dataset; calls are recorded."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    text, calls = datasets.Value("string"), []
    nested = {"contexts": [text], "labels": [text], "meshes": [text]}
    padded = {"keyword": None, "frequency": None, "num_words": None}
    mmlu = datasets.Features(
        {
            "question": text,
            "subject": text,
            "choices": datasets.Sequence(text),
            "answer": datasets.ClassLabel(names=list("ABCD")),
        }
    )
    made = datasets.Dataset.from_list
    table = {
        "GBaker/MedQA-USMLE-4-options": made([MEDQA]),
        "openlifescienceai/medmcqa": made([{**MEDMCQA, "cop": 3}]),
        "qiaojin/PubMedQA": made(
            [
                {
                    "pubid": pmid,
                    "question": PUBMEDQA["QUESTION"],
                    "context": {
                        "contexts": PUBMEDQA["CONTEXTS"],
                        "labels": ["A", "B"],
                        "meshes": [],
                    },
                    "long_answer": PUBMEDQA["LONG_ANSWER"],
                    "final_decision": "yes",
                }
                for pmid in (11, 12)
            ],
            features=datasets.Features(
                {
                    "pubid": datasets.Value("int32"),
                    "question": text,
                    "context": nested,
                    "long_answer": text,
                    "final_decision": text,
                }
            ),
        ),
        "google/IFEval": made(
            [{**IFEVAL, "kwargs": [padded, {**padded, "keyword": "so", "frequency": 0}]}]
        ),
        "test_ground_truth.json": made([{"12": "yes"}]),
        "all_dev_good.jsonl": made([{**MEDQA, "id": 3, "context": ["A man.", "He coughs."]}]),
        "instruction-data.json": made(
            [{**GENERAL, "instruction": f"Edit number {i}."} for i in range(60)]
        ),
    }
    for subject in SUBJECTS:
        row = {"question": MMLU[0], "subject": subject, "choices": MMLU[1:5], "answer": 3}
        table[subject] = made([row], features=mmlu)

    def load_dataset(path, name=None, **rest):
        calls.append({"path": path, "name": name, **rest})
        key = rest.get("data_files", path if path in table else name).rsplit("/", 1)
        return table[path] if path in table else table[key[-1]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    "card, split",
    [
        ("medqa", "train"),
        ("medmcqa", "validation"),
        ("pubmedqa", "train"),
        ("pubmedqa", "test"),
        ("mmlu_medical", "test"),
        ("ifeval", "test"),
        ("general_instructions", "train"),
        ("general_instructions", "validation"),
    ],
)
def test_hub_rows_equal_the_files_rows(hub, folder, card, split):
    assert load(card, split, None) == load(card, split, folder)
    for call in hub:
        pinned = call.get("revision") or call["data_files"]
        assert re.search("[0-9a-f]{40}", pinned) and "{" not in pinned
        assert call["split"] in ("train", "validation", "test")


def test_hub_development_split_comes_from_the_file_at_a_commit(hub):
    (row,) = load("medqa", "validation", None)
    assert row.context == "A man. He coughs."
    (call,) = hub
    assert call["path"] == "json" and "revision" not in call


def test_hub_revision_can_be_replaced_but_not_that_of_the_test_ids(hub):
    data.load("pubmedqa", "test", revision="abc", allow_changed=True)
    rows, ids = hub
    assert rows["revision"] == "abc"
    assert "abc" not in ids["data_files"]
    sums = data.checksums("pubmedqa", "test")
    assert sums[ids["data_files"]] in ids["data_files"] and len(sums) == 2
    assert "{" not in "".join(sums)


def test_hub_rows_that_are_not_as_the_card_says(hub, monkeypatch):
    count = "ifeval, split test: 1 rows, not the card's 541"
    refused(lambda: data.load("ifeval", "test"), count)
    import datasets

    row = {**MEDMCQA, "cop": 4}  # counted from 1, as in the files
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [row])
    expected = "openlifescienceai/medmcqa", " row 1: ", "must be one of 0, 1, 2, 3"
    refused(lambda: load("medmcqa", "validation", None), *expected)


def test_hub_unpinned_source_is_reported(hub, monkeypatch, caplog):
    front = data.card("ifeval")
    front["splits"]["test"]["hub"][0]["revision"] = None
    monkeypatch.setattr(catalogue, "card", lambda name: front)
    load("ifeval", "test", None)
    assert hub[0]["revision"] is None
    assert "unpinned" in caplog.text
    assert data.checksums("ifeval", "test") == {"google/IFEval": "unpinned"}


def test_hub_out_of_reach_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def fail(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    expected = "mmlu_medical", "cais/mmlu anatomy", "ConnectionError: no route", "--data-dir"
    refused(lambda: data.load("mmlu_medical", "test"), *expected, error=CannotRun)


# ---- the real files


@pytest.mark.parametrize("name", [n for n in NAMES if n not in catalogue.GENERATED])
def test_real_files_are_as_their_card_says(data_dir, name):
    if not any(data.there(name, split, data_dir) for split in data.card(name)["splits"]):
        pytest.skip(f"{name}: none of its files in {data_dir}; see data_cards/{name}.md")
    for split, count in data.verify(name, data_dir).items():
        rows = data.load(name, split, data_dir)
        assert len(rows) == count and len({e.id for e in rows}) == count
        for e in rows:
            assert e.source == name and e.split == split and e.question.strip() and e.entity
            if e.task == "choice":
                assert len(e.options) in (3, 4) and e.options.count(e.answer) == 1
        sums = data.checksums(name, split, data_dir)
        entry = data.card(name)["splits"][split]
        stated = {
            f["path"]: f["sha256"]
            for e in (entry, entry.get("sample", {}))
            for f in e.get("files", [])
        }
        assert sums.items() <= stated.items()


def real(data_dir: Path, name: str, split: str) -> list:
    if not data.there(name, split, data_dir):  # a file that is there and broken is no reason
        pytest.skip(f"{name}, {split}: no file in {data_dir}; see data_cards/{name}.md")
    return data.load(name, split, data_dir)


def test_real_pubmedqa_halves(data_dir):
    train, test = (real(data_dir, "pubmedqa", s) for s in ("train", "test"))
    assert not {e.id for e in train} & {e.id for e in test}
    for half in (train, test):
        assert Counter(e.answer for e in half) == {"yes": 276, "no": 169, "maybe": 55}
    assert not contamination.find(train, test).hits["normalised"]


def test_real_mmlu_subjects_and_its_repeated_questions(data_dir):
    rows = real(data_dir, "mmlu_medical", "test")
    assert Counter(e.entity for e in rows) == SUBJECTS
    assert len({(e.question, e.options) for e in rows}) == 1011  # 78 stand in two subjects
    spaced = [e.id for e in rows if any(o != o.strip() for o in e.options)]
    assert spaced == ["college_medicine-141"]  # as published, and as lm-eval scores it


def test_real_ifeval_instructions(data_dir):
    rows = real(data_dir, "ifeval", "test")
    kinds = Counter(c["kind"] for e in rows for c in e.constraints)
    assert (sum(kinds.values()), len(kinds)) == (834, 25)
    assert all(v is not None for e in rows for c in e.constraints for v in c.values())


def test_real_splits_share_no_question_across_roles(data_dir):
    found: dict[str, list] = {"train": [], "validation": [], "test": []}
    for name in (n for n in NAMES if n not in catalogue.GENERATED):
        for split, entry in data.card(name)["splits"].items():
            try:
                found[entry["role"]] += data.load(name, split, data_dir)
            except InputError:
                continue  # not in this folder; the test above checks what is
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        hits = contamination.find(found[first], found[second]).hits
        assert hits["exact"] == {}
        # Two general instructions differ from training ones by a mark alone; their card says so.
        known = second == "validation" and data.there("general_instructions", second, data_dir)
        assert len(hits["normalised"]) == 2 * known


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING, logger="bbkit.data.catalogue")
