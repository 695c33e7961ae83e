"""Leaks are found and named; the cards' tables are as new as their sources."""

import re

import pytest

from bbkit import data
from bbkit.data import catalogue, contamination
from bbkit.prompts import Example

LONG = (
    "A 35-year-old man comes to the physician because of a 2-week history of cough, fever and "
    "night sweats. Which of the following organisms is the most likely cause?"
)
TEST = [
    Example("t1", "choice", "Which bone breaks first in a fall?"),
    Example("t2", "choice", LONG),
    Example("t3", "choice", "Short one?"),
    Example("t4", "choice", "?"),
]


def test_every_kind_of_leak_is_found_and_named():
    train = [
        Example("a", "choice", "Nothing of the sort."),
        Example("b", "choice", "WHICH BONE BREAKS FIRST, in a fall"),  # reworded in case and marks
        Example("c", "choice", f"Said elsewhere: {LONG[:-40]} and so on."),  # 13 words and more
        Example("d", "choice", "Short one?"),
        Example("e", "choice", "…"),
    ]
    found = contamination.find(train, TEST)
    assert found.train_rows == 5
    assert found.hits == {
        "exact": {"t3": "d"}, "normalised": {"t1": "b"}, "13-gram": {"t2": "c"},
    }  # fmt: skip
    assert found.shared["t2"].split()[:3] == ["a", "35", "year"]
    assert len(found.shared["t2"].split()) == 13
    text = contamination.section(("medqa", "test"), {("medqa", "train"): found}, TEST)
    assert "| medqa `train` | 5 | 1 | 1 | 1 |" in text
    assert (
        "the 4 rows of `test`, a sample of 1,273, so many" in text and "in common (1\nare" in text
    )
    assert "13-gram: row t2 and medqa `train` row c: “a 35 year old man" in text


def test_the_strictest_kind_counts_and_twelve_words_do_not():
    twelve = " ".join(LONG.split()[:11])  # "35-year-old" is three words: 13 in all
    again = [Example("x", "choice", LONG.upper()), Example("y", "choice", LONG)]
    assert contamination.find(again, TEST).hits["exact"] == {"t2": "y"}
    assert contamination.find(again, TEST).hits["normalised"] == {}
    assert contamination.find([Example("z", "choice", twelve)], TEST).hits["13-gram"]
    fewer = " ".join(LONG.split()[:10])
    assert not contamination.find([Example("z", "choice", fewer)], TEST).hits["13-gram"]


@pytest.mark.parametrize("pair", contamination.pairs()[1], ids="/".join)
def test_no_card_is_older_than_its_sources(pair):
    card = catalogue.path_of(pair[0]).read_text()
    told = re.findall(r"`python -m bbkit.data.contamination`; sources (\w+)\.", card)
    mend = "stale: python -m bbkit.data.contamination --data-dir DIR --write"
    assert contamination.fingerprint(pair) in told, mend


def test_command_writes_the_card_once_and_refuses_broken_files(tmp_path, monkeypatch, capsys):
    card = tmp_path / "constraints.md"
    card.write_text(catalogue.path_of("constraints").read_text())
    monkeypatch.setattr(catalogue, "path_of", lambda name: card)
    sources = [("ontology_chains", "train")]
    monkeypatch.setattr(contamination, "pairs", lambda: (sources, [("constraints", "test")]))
    words = ["--write", "--data-dir", str(tmp_path)]
    texts = []
    for _ in range(2):
        assert contamination.main(words) == 0
        texts.append(card.read_text())
    assert texts[0] == texts[1] and texts[0].count("## Contamination") == 1
    assert "| ontology_chains `train` | 449 | 0 | 0 | 0 |" in texts[0]
    assert data.card("constraints")["splits"]  # the front matter is as it was
    monkeypatch.undo()
    assert contamination.main(["--data-dir", str(tmp_path / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "pubmedqa").mkdir()
    (tmp_path / "pubmedqa" / "ori_pqal.json").write_text("{")
    assert contamination.main(["--data-dir", str(tmp_path)]) == 2
    assert "pubmedqa" in capsys.readouterr().err  # broken, not absent
