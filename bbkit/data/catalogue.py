"""Data cards, and the rows behind them as one Example type.

A card (data_cards/<name>.md) states a data set's files with checksums, its Hub copy at a pinned
revision, the role of each split and the licence; what is not as it says is refused. The paper names
no data set beyond "BIOMED-MMLU": which stands for which of its claims is our choice.
"""

import difflib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from bbkit import CannotRun, InputError
from bbkit.config import Columns
from bbkit.data import corpus, instructions, own, questions, tables
from bbkit.data.layouts import fields, normal, parse
from bbkit.prompts import Example

# Cards without files or Hub copy: the kit makes the rows itself, function(split, seed) -> rows.
# Kept, since that takes a second, and the next run of a notebook asks for the same.
GENERATED: dict[str, Callable[..., list[Example]]] = {
    "ontology": cache(questions.ontology),
    "ontology_chains": cache(questions.ontology_chains),
    "constraints": cache(instructions.examples),
    "pocket_prompts": cache(corpus.prompts),
}
log = logging.getLogger(__name__)


def _folder() -> Path:
    inside = Path(__file__).parents[1] / "data_cards"  # where a wheel puts them
    return inside if inside.is_dir() else Path(__file__).parents[2] / "data_cards"


def _named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"no {what} {name!r}: {nearest}There are {', '.join(known)}")


def cards() -> list[str]:
    """Names of all data cards.

    >>> "medqa" in cards()
    True
    """
    return sorted(p.stem for p in _folder().glob("*.md") if p.stem != "README")


def path_of(name: str) -> Path:
    """Where a data card lies. InputError for an unknown name, with the nearest one."""
    return _named("data card", name, {n: _folder() / f"{n}.md" for n in cards()})


def card(name: str) -> dict:
    """The front matter of a data card, or of one's own (bbkit.data.own) by its path.

    InputError for an unknown name, with the nearest one.

    >>> card("pubmedqa")["splits"]["test"]["rows"]
    500
    """
    if own.is_own(name):
        return own.card(name)
    return yaml.safe_load(path_of(name).read_text(encoding="utf-8").split("---\n", 2)[1])


def _split(card_name: str, split: str) -> dict:
    front = card(card_name)
    return {"format": front.get("format")} | _named(f"split of {card_name}", split, front["splits"])


def role(card_name: str, split: str) -> str:
    """What a split may be used for: "train", "validation" (choosing) or "test" (reporting only).

    >>> role("pubmedqa", "train"), role("ifeval", "test")
    ('train', 'test')
    """
    return _split(card_name, split)["role"]


def _from_hub(card_name: str, source: dict, revision: str | None) -> list[tuple[str, Any]]:
    """Rows of a Hub data set, or of one file at a git commit, through `datasets`."""
    call = {k: v for k, v in source.items() if k != "ids"}
    if revision and "ids" not in source:
        call["revision"] = revision
    if call["revision"] is None:
        log.warning("%s: unpinned, the newest revision of %s is used", card_name, call["path"])
    what = " ".join(filter(None, (call["path"], call.get("name"))))
    place = f"{what} at revision {call['revision'] or 'newest'}"
    if "data_files" in call:
        place = call["data_files"].format(revision=call.pop("revision") or "HEAD")
        call["data_files"] = place
    try:
        import datasets

        rows = datasets.load_dataset(**call)
    except Exception as error:  # it fails in a dozen classes, all of which mean: not to be had here
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CannotRun(
            f"{card_name}: cannot load {place} through datasets ({why}); "
            "connect, or name a folder of the upstream files with --data-dir"
        ) from error
    if isinstance(rows, dict):  # all splits of a Hub id of one's own: a column, where several
        several = len(rows) > 1
        return [
            (f"{place} {part} row {i}", row | {"split": part} if several else row)
            for part, some in rows.items()
            for i, row in enumerate(some, 1)
        ]
    return [(f"{place} row {i}", row) for i, row in enumerate(rows, 1)]


def there(card_name: str, split: str, data_dir: str | Path | None = None) -> bool:
    """Whether a file of the split is in the folder, or without one, whether it has a Hub copy.

    >>> there("ontology", "test"), there("open_replies", "dolly")
    (True, False)
    """
    entry = _split(card_name, split)
    if card_name in GENERATED or data_dir is None:
        return bool(entry.get("hub", True))
    files = entry["files"] + entry.get("sample", {}).get("files", [])
    return any((Path(data_dir) / file["path"]).is_file() for file in files)


def _chosen(card_name: str, split: str, data_dir: str | Path) -> dict:
    """The split's entry on its card, narrowed to its sample where only that is in the folder."""
    folder, entry = Path(data_dir), _split(card_name, split)
    if not folder.is_dir():
        raise InputError(f"no data folder {folder}: lay one out as data_cards/README.md says")
    gone: list[str] = []
    for choice in filter(None, (entry, entry.get("sample"))):
        paths = [file["path"] for file in choice["files"]]
        for path in paths:
            inner = PurePosixPath(path)
            if inner.is_absolute() or ".." in inner.parts or set(path) & set("\\:"):
                raise InputError(f"data card {card_name}: {inner} is not a path in the data folder")
        absent = [path for path in paths if not (folder / path).is_file()]
        if not absent:
            return {**entry, **choice, "sample": choice is not entry}
        gone = gone or absent
    raise InputError(
        f"{card_name}, split {split}: {', '.join(gone)} missing in {folder}; "
        "fetch it as the data card says, or leave --data-dir out to use the Hub"
    )


def _sources(
    card_name: str, entry: dict, data_dir: str | Path | None, revision: str | None
) -> tuple[list[tuple[Any, list[tables.Row]]], list[str], list[str]]:
    """(is it a list of ids?, rows) of each file or Hub copy; what has changed, and what to note."""
    changes: list[str] = []
    notes: list[str] = []
    if data_dir is None:
        hub = entry["hub"]
        return [(s.get("ids"), _from_hub(card_name, s, revision)) for s in hub], changes, notes
    sources = []
    for file in entry["files"]:
        data = (Path(data_dir) / file["path"]).read_bytes()
        if mine := own.is_own(card_name):
            rows = tables.rows(str(Path(data_dir) / file["path"]), data)
        else:
            rows = parse(file["path"], data, entry["format"])
        sources.append((file.get("ids"), rows))
        found, stated = hashlib.sha256(data).hexdigest()[:8], (file["sha256"] or "")[:8]
        if stated and found != stated:
            changes.append(f"{file['path']} has sha256 {found}, not the card's {stated}")
        elif not stated and not mine:
            notes.append(f"{file['path']} has no checksum on the card; it has sha256 {found}")
    return sources, changes, notes


def _examples(card_name: str, entry: dict, sources: list, hub: bool) -> list[Example]:
    """Examples of (is it a list of ids?, rows) sources, cut to the part that the entry keeps."""
    listed: set[str] = set()
    examples = []
    for ids, rows in sources:
        if ids:  # the ids of the test half: one entry each, or on the Hub one column each
            listed = {key for _, row in rows for key in (row if hub else [row["pmid"]])}
            continue
        for n, (place, row) in enumerate(rows):
            try:
                made = fields(card_name, row, n, hub, as_is=entry["role"] == "test")
            except ValueError as error:
                mend = "mend the row or fetch the file again"
                raise InputError(f"{place}: {error}; {mend}") from None
            examples.append(Example(**made, source=card_name))
    if "keep_ids" in entry:
        examples = [e for e in examples if (e.id in listed) == entry["keep_ids"]]
    if "keep_held_out" in entry:  # one instruction in ten, by the hash that is its entity
        examples = [e for e in examples if (int(e.entity, 16) % 10 == 0) == entry["keep_held_out"]]
    return examples


def load(
    card_name: str,
    split: str,
    data_dir: str | Path | None = None,
    revision: str | None = None,
    allow_changed: bool = False,
    seed: int = 0,
    columns: Columns | None = None,
    whole: bool = False,
) -> list[Example]:
    """The rows of a split: from the folder `data_dir`, else from the Hub at the card's revision.

    `revision` replaces the card's. `allow_changed` warns of other checksums and row counts than the
    card's. `seed` is for generated cards. Training rows with two right answers are left out, with a
    warning; other splits keep all rows, since their n is published. For a path, `columns` and
    `whole` are as in `own.examples`. InputError names file and row; CannotRun: the Hub copy is not
    to be had.

    >>> load("constraints", "validation")[0].task
    'instruction'
    """
    entry, place = _split(card_name, split), f"{card_name}, split {split}"
    if card_name in GENERATED:
        made = GENERATED[card_name](split, seed=seed)
        return [replace(e, source=card_name, split=split) for e in made]
    if mine := own.is_own(card_name):
        data_dir = own.folder(card_name)
    if data_dir is not None:
        entry = _chosen(card_name, split, data_dir)
    elif not entry["hub"]:
        raise InputError(f"{place}: has no Hub copy; name its folder: --data-dir")
    sources, changes, notes = _sources(card_name, entry, data_dir, revision)
    if mine:
        found = [row for _, rows in sources for row in rows]
        examples = own.examples(card_name, found, split, columns or Columns(), whole)
    else:
        examples = _examples(card_name, entry, sources, hub=data_dir is None)
    if not examples:
        raise InputError(f"{place}: no rows; its files are empty, fetch them again")
    if entry["rows"] and len(examples) != entry["rows"]:
        changes.append(f"{len(examples)} rows, not the card's {entry['rows']}")
    if changes and not allow_changed:
        mend = "fetch the data again, or accept the change: --set data.allow_changed=true"
        raise InputError(f"{place}: {'; '.join(changes)}; {mend}")
    if data_dir is not None and entry["sample"]:
        notes.append(f"only a sample of {len(examples)} rows is in {data_dir}")
    if entry["role"] == "train":
        sound = [e for e in examples if [normal(o) for o in e.options].count(normal(e.answer)) < 2]
        if lost := len(examples) - len(sound):
            notes.append(f"{lost} rows with two right answers left out")
        examples = sound
    for note in changes + notes:
        log.warning("%s: %s", place, note)
    return [replace(e, split=split) for e in examples]


def checksums(card_name: str, split: str, data_dir: str | Path | None = None) -> dict[str, str]:
    """What `load` reads, for a run's manifest: sha256 by file, or revision by Hub source.

    A generated split has the sha256 of its rows at seed 0.

    >>> checksums("medmcqa", "validation")["openlifescienceai/medmcqa"][:8]
    '91c6572c'
    """
    if card_name in GENERATED:
        rows = repr(load(card_name, split))
        return {f"{card_name}/{split}": hashlib.sha256(rows.encode()).hexdigest()}
    splits = [split]
    if own.is_own(card_name):  # all that is there: any of it may be trained on or evaluated
        data_dir = own.folder(card_name)
        splits = [part for part in card(card_name)["splits"] if there(card_name, part, data_dir)]
    if data_dir is None:
        hub = [s for part in splits for s in _split(card_name, part)["hub"]]
        pins = {s.get("data_files", s["path"]): s["revision"] for s in hub}
        return {s.format(revision=pin or "HEAD"): pin or "unpinned" for s, pin in pins.items()}
    chosen = (_chosen(card_name, part, data_dir)["files"] for part in splits)
    files = dict.fromkeys(file["path"] for some in chosen for file in some)
    return {f: hashlib.sha256((Path(data_dir) / f).read_bytes()).hexdigest() for f in files}


def verify(card_name: str, data_dir: str | Path | None = None) -> dict[str, int]:
    """Rows of every split that has a file in the folder (or of all, on the Hub), fully checked.

    InputError: the first file or row count that is not as the card says, or no file at all.

    >>> verify("constraints")["test"] > 0
    True
    """
    splits = [split for split in card(card_name)["splits"] if there(card_name, split, data_dir)]
    if not splits:
        raise InputError(
            f"{card_name}: none of its files is in {data_dir}; see data_cards/README.md"
        )
    return {split: len(load(card_name, split, data_dir)) for split in splits}
