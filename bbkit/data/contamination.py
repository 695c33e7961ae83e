"""Which test rows stand in what is trained on: every training source against every test set.

Serves every accuracy claim: leakage is a live dispute in this field (UCSC-VLAA/m1 issue 4,
MedReason issue 4). `python -m bbkit.data.contamination --data-dir DIR --write` puts what it finds
into the data cards of the test sets, with examples; a test says when a card is older than its
sources.
"""

import argparse
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bbkit import InputError, exit_code
from bbkit.data import catalogue
from bbkit.machine import files
from bbkit.prompts import Example

GRAM = 13  # words, as in GPT-3's report (arXiv 2005.14165, appendix C)
KINDS = ("exact", "normalised", f"{GRAM}-gram")
BEGIN, END = "<!-- contamination: begin -->", "<!-- contamination: end -->"


@dataclass
class Overlap:
    """Test rows that stand in a training source, by the strictest kind that holds for each."""

    train_rows: int = 0
    hits: dict[str, dict[str, str]] = field(default_factory=lambda: {k: {} for k in KINDS})
    shared: dict[str, str] = field(default_factory=dict)  # test id -> the words they share


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation.

    >>> words_of("A 35-year-old man, who…")
    ['a', '35', 'year', 'old', 'man', 'who']
    """
    return re.findall(r"[^\W_]+", text.casefold())


def find(train: Iterable[Example], test: Sequence[Example]) -> Overlap:
    """Rows of `test` that `train` contains: as they are, but for case and punctuation, or in part.

    A part is 13 words in a row. `hits[kind]` maps the test row's id to the training row's.

    >>> a = Example("1", "short", "Which bone breaks first?")
    >>> b = Example("2", "short", "which bone, breaks FIRST")
    >>> find([a], [b]).hits["normalised"]
    {'2': '1'}
    """
    places: dict[tuple[str, str], list[str]] = {}
    for row in test:
        for key in _keys(row):
            places.setdefault(key, []).append(row.id)
    found = Overlap()
    best: dict[str, tuple[str, str, str]] = {}
    for row in train:
        found.train_rows += 1
        for kind, text in _keys(row):
            for test_id in places.get((kind, text), ()):
                if test_id not in best or KINDS.index(kind) < KINDS.index(best[test_id][0]):
                    best[test_id] = (kind, row.id, text)
    for test_id, (kind, train_id, text) in best.items():
        found.hits[kind][test_id] = train_id
        if kind == KINDS[2]:
            found.shared[test_id] = text
    return found


def _keys(row: Example) -> dict[tuple[str, str], None]:
    """What a row is found by: each kind and its text, once, the strictest first."""
    text = f"{row.context} {row.question}".strip()  # what is read before the options
    words = words_of(text)
    keys = [(KINDS[0], text)] + [(KINDS[1], " ".join(words))] * bool(words)
    starts = range(len(words) - GRAM + 1)
    return dict.fromkeys(keys + [(KINDS[2], " ".join(words[i : i + GRAM])) for i in starts])


def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(card, split) of every training source, and of every test set."""
    known = [
        (name, split) for name in catalogue.cards() for split in catalogue.card(name)["splits"]
    ]
    train = [pair for pair in known if catalogue.role(*pair) == "train"]
    return train, [pair for pair in known if catalogue.role(*pair) == "test"]


def said(rows: Sequence[Example], data_dir: Path | None) -> str:
    """One line on which shipped test sets that are at hand stand in rows of one's own."""
    hits, none = [], dict[str, None]()
    for name, split in pairs()[1]:
        made = name in catalogue.GENERATED
        if not made and (data_dir is None or not catalogue.there(name, split, data_dir)):
            continue
        found = find(rows, catalogue.load(name, split, data_dir, allow_changed=True)).hits
        first = next(((a, b) for kind in KINDS for a, b in found[kind].items()), None)
        told = ", ".join(f"{len(found[kind])} {kind}" for kind in KINDS if found[kind])
        if first:
            hits.append(f"{name} {split}: {told}, such as {first[0]}, your {first[1]}")
        else:
            none[name] = None
    leaked = f"in your data stand {'; '.join(hits)}; " if hits else ""
    return f"leakage: {leaked}of the shipped test sets at hand none of {', '.join(none)}"


def fingerprint(test: tuple[str, str]) -> str:
    """Changes whenever a training source or this test set does: revisions, or generated rows."""
    told = [GRAM, *(_checksums(*pair) for pair in [*pairs()[0], test])]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


_checksums = functools.cache(catalogue.checksums)  # of generated rows: seconds


def section(
    test: tuple[str, str], found: dict[tuple[str, str], Overlap | None], rows: Sequence[Example]
) -> str:
    """The part of a data card on one test set: a table of all training sources, and examples.

    None is for a source that was not read.
    """
    whole = catalogue.card(test[0])["splits"][test[1]].get("rows")
    some = f", a sample of {whole:,}," if isinstance(whole, int) and whole != len(rows) else ""
    long = sum(any(kind == KINDS[2] for kind, _ in _keys(row)) for row in rows)
    lines = [
        f"Of the {len(rows):,} rows of `{test[1]}`{some} so many stand in training sources as they",
        f"are, but for case and punctuation, or with {GRAM} words in a row in common ({long:,}",
        "are as long). Context and question are compared; each row counts once, by the",
        "strictest.",
        "",
        f"| training source | its rows | {' | '.join(KINDS)} |",
        "|---|---|---|---|---|",
    ]
    examples = []
    for (name, split), overlap in found.items():
        if overlap is None:
            lines.append(f"| {name} `{split}` | not read: not in this folder | | | |")
            continue
        counts = " | ".join(f"{len(overlap.hits[kind]):,}" for kind in KINDS)
        lines.append(f"| {name} `{split}` | {overlap.train_rows:,} | {counts} |")
        for kind in KINDS:
            for test_id, train_id in list(overlap.hits[kind].items())[:2]:
                shared = f": “{overlap.shared[test_id]}”" if kind == KINDS[2] else ""
                examples.append(
                    f"- {kind}: row {test_id} and {name} `{split}` row {train_id}{shared}"
                )
    lines += examples
    lines += ["", f"Made by `python -m bbkit.data.contamination`; sources {fingerprint(test)}."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints one line for a known error."""
    p = argparse.ArgumentParser(
        prog="python -m bbkit.data.contamination", description="Training sources against test sets."
    )
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as for bbkit.train; else the Hub")
    p.add_argument("--write", action="store_true", help="put the tables into the data cards")
    args = p.parse_args(argv)
    return exit_code(lambda: _main(args.data_dir, args.write))


def _main(folder: Path | None, write: bool) -> int:
    if folder and not folder.is_dir():
        raise InputError(f"--data-dir {folder}: no such folder")
    sources, tests = pairs()
    loaded = {
        pair: catalogue.load(*pair, folder) if catalogue.there(*pair, folder) else None
        for pair in [*sources, *tests]
    }
    parts: dict[str, list[str]] = {}
    for name, split in tests:
        rows = loaded[name, split]
        if rows is None:
            print(f"{name} {split}: not in this folder; its card stays as it is")
            continue
        read = {pair: loaded[pair] for pair in sources}
        found = {pair: find(train, rows) if train else None for pair, train in read.items()}
        parts.setdefault(name, []).append(section((name, split), found, rows))
    for name, told in parts.items():
        text = "\n\n".join(told)
        print(f"\n## {name}\n\n{text}")
        if write:
            path = catalogue.path_of(name)
            before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
            block = f"{BEGIN}\n## Contamination\n\n{text}\n{END}\n"
            after = rest.partition(END)[2].lstrip("\n")
            files.write_bytes(path, f"{before.rstrip()}\n\n{block}{after}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
