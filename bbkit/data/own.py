"""Questions of one's own by path: a .csv, .tsv, .jsonl, .json or .parquet file, a card, a Hub id.

Gold must score full whoever's the row is: each is held to what the rewards read, and named by file
and line with its mend. What trains is said by a column, or by a hash of the question.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bbkit import InputError, prompts
from bbkit.config import Columns, Data
from bbkit.data import tables
from bbkit.data.knowledge import SPLITS
from bbkit.data.layouts import normal
from bbkit.data.tables import TABLES, Row
from bbkit.machine.files import yaml_value
from bbkit.prompts import Example


def is_own(name: str) -> bool:
    """Whether a name is a path or a Hub id, not a card of the kit's.

    >>> is_own("my.csv"), is_own("owner/name"), is_own("medqa")
    (True, True, False)
    """
    return not {*"./\\"}.isdisjoint(name)


def folder(name: str) -> Path | None:
    """Where the files behind a path lie; None for a Hub id. InputError: no such file."""
    path = Path(name)
    if path.suffix.lower() not in (*TABLES, ".md"):
        return None
    if not path.is_file():
        raise InputError(f"{name}: no such file")
    return path.parent


def card(name: str) -> dict:
    """The front matter of a card file, or what it would be for a file of rows or a Hub id.

    InputError: a card that is none, or a name of no known kind.
    """
    path = Path(name)
    front = {"name": name, "pretty_name": path.name, "license": "not stated", "homepage": name}
    if path.suffix.lower() == ".md":
        return front | _card_file(path)
    if path.suffix.lower() in TABLES:
        source = {"files": [{"path": path.name, "sha256": None}], "hub": None}
    elif name.count("/") == 1 and name[0] not in "./" and not path.exists():
        hub, _, revision = name.partition("@")
        source = {"files": [], "hub": [{"path": hub, "revision": revision or None}]}
    else:
        raise InputError(f"{name}: not of a kind that is read; save it as {', '.join(TABLES)}")
    return front | {"splits": {side: {"role": side, "rows": None, **source} for side in SPLITS}}


def _card_file(path: Path) -> dict:
    try:
        front = yaml_value(path.read_text(encoding="utf-8-sig").split("---\n", 2)[1])
        Columns(**front.get("columns", {}))
        for split, entry in front["splits"].items():
            entry = {"rows": None, "hub": None, "files": [], **entry}
            entry["files"] = [{"sha256": None, **file} for file in entry["files"]]
            kinds = {Path(file["path"]).suffix.lower() for file in entry["files"]}
            if entry["role"] not in SPLITS or not kinds or not kinds <= {*TABLES}:
                raise ValueError(f"split {split}")
            front["splits"][split] = entry
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:120]
        said = f"{path}: not a data card ({why}); each of its splits needs a role"
        raise InputError(f"{said} ({', '.join(SPLITS)}) and files") from error
    return front


def halved(name: str, cards: Data) -> bool:
    """Whether settings name a path for training and for evaluation too."""
    named = [
        {Path(n).resolve() for n in names} for names in (cards.sft + cards.grpo, cards.evaluate)
    ]
    return Path(name).resolve() in named[0] & named[1]


def side(question: str) -> str:
    """Where a question belongs in a file without a column that says so: 80/10/10 by its hash.

    Case, spaces and closing marks do not count, and it is the same in every file.

    >>> side("Which bone breaks first?") == side("which bone  breaks first")
    True
    """
    digest = hashlib.sha256(_key(question).encode()).hexdigest()
    return {0: "test", 1: "validation"}.get(int(digest, 16) % 10, "train")


def _key(question: str) -> str:
    return "".join(normal(question).split()).rstrip(".:?!")


def refuse_shared(train: Iterable[Example], held_out: Iterable[Example]) -> None:
    """InputError where a question of one's own is evaluated that is trained on, with its answer."""
    seen = {(_key(e.question), normal(e.answer)): e for e in train}
    for e in held_out:
        if is_own(e.source) and (twin := seen.get((_key(e.question), normal(e.answer)))):
            both = f"{e.source} row {e.id} is evaluated, and trained on as {twin.source} {twin.id}"
            raise InputError(f"{both}; leave it out of one, or name one file for both")


def examples(
    name: str, found: Sequence[Row], split: str, columns: Columns, whole: bool = False
) -> list[Example]:
    """The checked questions of one split of a path, "choice" where a row has options, else "short".

    `whole` takes every row where no column says what it is for. InputError: the first row at fault,
    in whichever split it stands.
    """
    if Path(name).suffix.lower() == ".md":  # its splits are files
        columns, whole = Columns(**card(name).get("columns", vars(columns)) | {"split": ""}), True
    if not found:
        raise InputError(f"{name}: no rows; its first line names the columns, the others are rows")
    named, drafts = _named(name, found, columns), []
    places: dict[str, str] = {}
    for place, row in found:
        try:
            drafts.append((place, _draft(name, place, row, named)))
            e = drafts[-1][1]
            if twin := places.get(e.id):
                raise ValueError(f"its id {e.id!r} is that of {twin} too; give each row its own")
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
        places[e.id] = place
    shape = "[A-Za-z]" if not (listed := _listed(found, named)) else r"[A-Za-z]|\d"
    if all(not e.options and re.fullmatch(shape, e.answer) for _, e in drafts):
        said = f"no options are read, and every answer is like {drafts[0][1].answer}"
        mend = f"name their columns: --set data.columns.options=[{listed or 'A, B, C, D'}]"
        raise InputError(f"{name}: {said}; {mend}")
    golds, made = _counted(drafts), []
    for place, e in drafts:
        try:
            made.append(_checked(e, golds.get(place)))
        except ValueError as error:
            raise InputError(f"{place}: {error}") from None
    free = whole and "split" not in named
    kept = [e for e in made if free or e.split == split]
    if not kept:
        how = "its column says" if "split" in named else "a hash of the question says, 80/10/10"
        mend = "add rows, or name another file for this"
        raise InputError(
            f"{name}: none of its {len(made)} rows is of split {split}, as {how}; {mend}"
        )
    return kept


def _listed(found: Sequence[Row], named: Mapping[str, list[str]]) -> str:
    """Columns that look like options, of those that nothing names: a list, or a column each."""
    used = {column for columns in named.values() for column in columns}
    left = {k: v for k, v in found[0][1].items() if k not in used}
    lists = [k for k, v in left.items() if isinstance(v, list | dict) and len(v) > 1]
    apart = [k for k in left if re.fullmatch(r"(?i)(?:op\w*?)?[a-e1-5]", k)]
    return ", ".join(lists[:1] or (apart if apart[1:] else []))


def _named(name: str, found: Sequence[Row], columns: Columns) -> dict[str, list[str]]:
    """The columns of each field that there is, by what they are called, case aside where unique."""
    known = list(dict.fromkeys(key for _, row in found for key in row))
    named = {}
    for field, wanted in vars(columns).items():
        asked, cells = [wanted] if isinstance(wanted, str) else list(wanted), []
        for column in filter(None, asked):
            alike = [k for k in known if k.casefold() == column.casefold()]
            if column in known or len(alike) == 1:
                cells.append(column if column in known else alike[0])
            elif field in ("question", "answer") or wanted != getattr(Columns(), field):
                near = difflib.get_close_matches(column, known, n=1) or ["…"]
                said = f"no column {column!r}; there are {', '.join(known)[:200] or 'no rows'}"
                raise InputError(f"{name}: {said}: --set data.columns.{field}={near[0]}")
        if cells:
            named[field] = cells
    return named


def _draft(name: str, place: str, row: Mapping, named: Mapping[str, list[str]]) -> Example:
    """A row as it stands, its answer as written."""
    one = {k: tables.text(row.get(cells[0])) for k, cells in named.items() if k != "options"}
    for field in ("question", "answer", "id"):
        if not one.get(field, place):
            raise ValueError(f"its {named[field][0]} is empty; fill it, or delete the row")
    part = one["split"].lower() if "split" in one else side(one["question"])
    if part not in SPLITS:
        raise ValueError(f"its split is {part!r}; use {', '.join(SPLITS)}")
    options = tables.options(row, named["options"]) if "options" in named else ()
    return Example(
        id=one.get("id", place), task="choice" if options else "short", question=one["question"],
        options=options, answer=one["answer"], reasoning=one.get("reasoning", ""),
        entity=one.get("id", place), source=name, split=part,
    )  # fmt: skip


def _option(e: Example, answer: str) -> str | None:
    """The option that an answer names by letter, by text, or by both: one, or None."""
    options = prompts.letters(e)
    return options.get(prompts.parse_answer(f"<answer>{answer}</answer>", options) or "")


def _counted(drafts: Sequence[tuple[str, Example]]) -> dict[str, str]:
    """The option that each answer in figures names, by place: one reading for the whole file.

    They may be texts of options, or count from 0, or from 1, whichever fits every row. InputError
    where none does, or two do and differ.
    """
    asked = [(p, e) for p, e in drafts if e.options and e.answer.isdecimal() and len(e.answer) < 9]

    def at(e: Example, first: int) -> str | None:
        place = int(e.answer) - first
        return e.options[place] if 0 <= place < len(e.options) else None

    readings = {
        "is an option's text": [_option(e, e.answer) for _, e in asked],
        "counts from 0": [at(e, 0) for _, e in asked],
        "counts from 1": [at(e, 1) for _, e in asked],
    }
    fit = {how: golds for how, golds in readings.items() if None not in golds}
    mend = "write letters, or options as they stand"
    if not fit:  # a row that none fits, else one that counts from 0 where others count from 1
        found = zip(asked, *readings.values(), strict=True)
        (place, e), *_ = min(found, key=lambda row: (any(row[1:]), bool(row[3])))
        said = f"its answer {e.answer} is not one of {len(e.options)} options as the others count"
        raise InputError(f"{place}: {said}; {mend}")
    for (place, e), *golds in zip(asked, *fit.values(), strict=True):
        if len({*golds}) > 1:
            raise InputError(f"{place}: its answer {e.answer} {', or '.join(fit)}; {mend}")
    return {place: golds[0] for (place, _), *golds in zip(asked, *fit.values(), strict=True)}


def _checked(e: Example, gold: str | None) -> Example:
    """The row with its answer as an option's text, after each option was held to the parser."""
    if e.options:
        gold = gold or _option(e, e.answer)
        if gold is None:
            said = f"its answer {e.answer[:40]!r} is not one of its {len(e.options)} options"
            if e.answer in e.options:
                said = f"its answer {e.answer!r} is the letter of one option and another's text"
            mend = 'write the letter, the text, or "B) text", and name the columns of all options'
            raise ValueError(f"{said}; {mend}")
        e = replace(e, answer=gold)
    if any(tag in e.reasoning for tag in prompts.TAGS):
        raise ValueError("its reasoning has a tag of the reply's in it; take it out")
    for text in e.options or (e.answer,):
        given = prompts.parse_answer(prompts.completion(replace(e, answer=text)))
        read = _option(e, given or "") if e.options else given
        if read is None or not prompts.same(read, text, article=False):
            raise ValueError(f"{text[:40]!r} does not read as an answer; it is a tag, or no word")
    return e
