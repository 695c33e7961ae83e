"""Files of one's own: bytes to rows by column, cells to texts and options.

Files come as spreadsheets write them, with a byte order mark, semicolons, CRLF, or empty cells at
the ends; what is broken is named by line, with the mend.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from bbkit import InputError
from bbkit.data.layouts import normal, parse

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Row = tuple[str, Mapping[str, Any]]  # where it stands, and its cells by column


def rows(name: str, data: bytes) -> list[Row]:
    """The rows of a file by its ending, each with its place. InputError names line and mend.

    >>> rows("my.csv", b"Frage;Antwort\\nWie viele Beine?;6\\n")
    [('my.csv line 2', {'Frage': 'Wie viele Beine?', 'Antwort': '6'})]
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            found = parquet.read_table(io.BytesIO(data)).to_pylist()
        except (ArrowException, OSError) as error:
            raise InputError(f"{name}: not readable as parquet ({error}); save it again") from None
        return [(f"{name} row {i}", row) for i, row in enumerate(found, 1)]
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line, mend = data.count(b"\n", 0, error.start) + 1, "save it as UTF-8 (Excel: CSV UTF-8)"
        raise InputError(f"{name} line {line}: not UTF-8; {mend}") from None
    if suffix in (".csv", ".tsv"):  # parted by what the first line has most of
        first, _, rest = data.partition(b"\n")
        mark = max(",;\t", key=first.decode(errors="replace").count)
        if suffix == ".tsv" and b"\t" in first:  # whose names may have commas
            mark = "\t"
        if sheet := re.fullmatch(rb"(?:\xef\xbb\xbf)?sep=(.)\s*", first):  # as Excel begins some
            mark, data = sheet[1].decode(), b"\n" + rest
        return _table(parse(name, data, "csv", mark), mark)
    found = parse(name, data, suffix[1:])
    keys = [{*row} if isinstance(row, dict) else set() for _, row in found]
    if suffix == ".json" and keys and all(some == {"pmid"} for some in keys):
        raise InputError(f'{name}: no list of rows; write [{{"question": …, "answer": …}}, …]')
    if bad := [place for place, row in found if not isinstance(row, dict)]:
        raise InputError(f'{bad[0]}: not a row; write {{"question": …, "answer": …}}')
    return found


def _table(lines: Sequence[tuple[str, Any]], mark: str) -> list[Row]:
    """Rows by the columns of the first line."""
    found: list[Row] = []
    header: list[str] = []
    for place, row in lines:
        cells = [cell.strip() for cell in row["cells"]]
        if not header:
            header = [" ".join(cell.split()) for cell in cells]  # some have line breaks
            while header and not header[-1]:
                header.pop()
            if twice := {cell for cell in header if cell and header.count(cell) > 1}:
                raise InputError(f"{place}: two columns are called {min(twice)!r}; rename one")
        elif any(cells):
            if len(cells) < len(header) or any(cells[len(header) :]):
                of = f"{len(cells)} cells, the first line {len(header)}"
                mend = f'a text with {mark!r} or a line break goes into "…"'
                raise InputError(f"{place}: it has {of}; {mend}")
            found.append((place, dict(zip(header, cells, strict=False))))
    return found


def text(value: Any) -> str:
    """A cell as text, stripped; "" for an empty one. ValueError for a list, or bytes not in UTF-8.

    >>> text(3.0), text(None), text(" Tibia "), text(b"Rib")
    ('3', '', 'Tibia', 'Rib')
    """
    if isinstance(value, list | dict):
        raise ValueError(f"{str(value)[:40]!r} is a list where a text should be")
    if value is None or value != value:  # not a number: an empty cell of a table library
        return ""
    if isinstance(value, bytes):
        return value.decode().strip()
    if isinstance(value, float) and value == (half := np.float32(value)):  # 0.1, not 0.10000000149
        value = int(value) if value.is_integer() else half
    return str(value).strip()


def options(row: Mapping, columns: Sequence[str]) -> tuple[str, ...]:
    """Of a column each, or of one with a list: JSON, or texts parted by |. Empty: free text.

    >>> options({"options": "rib | tibia"}, ["options"])
    ('rib', 'tibia')
    """
    cells: Any = [row.get(column) for column in columns]
    if len(cells) == 1:
        cells = cells[0]
        if isinstance(cells, str):
            try:
                cells = json.loads(cells) if cells[:1] in {"[", "{"} else cells.split("|")
            except (ValueError, RecursionError):
                raise ValueError('its options are no list; write ["a", "b"], or a | b') from None
        if isinstance(cells, Mapping):  # by letter, as MedQA has them
            if sorted(cells) != [*ascii_uppercase[: len(cells)]]:
                raise ValueError(f"its options go by {', '.join(cells)[:40]}; use A, B, C, …")
            cells = [cells[letter] for letter in sorted(cells)]
    if not isinstance(cells, list | None):
        raise ValueError(f"its options {str(cells)[:40]!r} are no list")
    texts = [text(cell) for cell in cells or ()]
    while texts and not texts[-1]:
        texts.pop()
    if "" in texts:
        raise ValueError(
            f"option {texts.index('') + 1} is empty and a later one is not; move it up"
        )
    if len(texts) == 1 or len(texts) > len(ascii_uppercase):
        raise ValueError(f"it has {len(texts)} options; use 2 to 26, or none for free text")
    folded = [normal(text) for text in texts]
    if twice := [text for text, fold in zip(texts, folded, strict=True) if folded.count(fold) > 1]:
        raise ValueError(f"two of its options are {twice[0]!r}; change one")
    return tuple(texts)
