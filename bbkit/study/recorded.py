"""Recorded runs of a study in one small file: what tables, figures and notebooks are made from.

Serves every claim that a table states. Kept are a score of each held-out prompt, the reply to the
first prompt of each data set, what training logged, and the command and versions of each run. No
prompt of others is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bbkit import InputError
from bbkit.machine import files
from bbkit.runs import elsewhere, report

ITEM = ("id", "task", "entity", "source")
UNREAD = ("entropy", "unparsed", "retention/kl", "retention/cut")  # of LOGGED, in `brief`
LOGGED = ("entropy", "unparsed", *(f"{kind}/" for kind in (
    "reward", "weight", "coefficient", "cosine", "gradient_norm", "step", "retention",
)))  # fmt: skip
Rows = dict[str, list[dict[str, Any]]]  # item rows by stage


class Record(dict[str, Any]):
    """A record as read, which nobody changes: its item rows are unpacked once, for all tables."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        super().__init__(found)
        self.rows: dict[str, Rows] = {}


def pack(folders: Sequence[Path]) -> dict[str, Any]:
    """What is kept of run folders, by the folders' names; `unpack` gives the item rows back.

    A run that was forked keeps its own last stage alone. Raises InputError where two runs did not
    answer the same prompts.
    """
    items: list[list[str]] = []
    runs: dict[str, Any] = {}
    for folder in folders:
        manifest = files.read_json(folder / "run.json")
        source = manifest.get("forked_from")
        kept = report.item_rows(folder)
        if source:
            kept = {"grpo": kept["grpo"]}
        for rows in kept.values():
            asked = [[row[name] for name in ITEM] for row in rows]
            items = items or asked
            if asked != items:
                raise InputError(f"{folder}: answered other prompts than {folders[0]}")
        stage, probe = "grpo" if "grpo" in kept else "sft", folder / "probe.json"
        logged = [r for r in files.read_rows(folder / "metrics.jsonl") if r["stage"] == stage]
        names = sorted({k for row in logged for k in row if k.startswith(LOGGED)})
        count = manifest["settings"][stage]["steps"]
        spent = manifest["stages"].get(stage, {}).get("seconds", 0.0) / max(1, count)
        runs[folder.name] = {
            "command": manifest["command"].replace(f"{folder.parent}/", ""),  # nobody's paths
            "commit": manifest["git"]["commit"],
            "end": manifest["end"], "hardware": manifest["hardware"],
            "versions": manifest["versions"], "from": source,
            "grpo": manifest["settings"]["grpo"] if source else None,
            "retention": manifest["settings"].get("retention"),
            "seconds": _short(spent, 3),  # a step, of the last stage
            "scores": {stage: _columns(rows) for stage, rows in kept.items()},
            "replies": {stage: _first_replies(rows) for stage, rows in kept.items()},
            "log": {name: [_short(row.get(name), 3) for row in logged] for name in names},
            "noise": files.read_json(probe)["noise"] if probe.exists() else None,
        }  # fmt: skip
    return {"items": items, "runs": runs}


def brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the base of a seed only once, and means where prompts are many: the KL along
    replies to questions and to instructions, the losses of each kind of text elsewhere. What
    training logged has two digits, weights and coefficients three, and what no table reads is gone.

    A quarter of the size, and enough for what goes seed by seed (bbkit.study.verdicts).
    """
    texts = [item[2] for item in found["items"] if item[1] == "elsewhere"]
    items = [item for item in found["items"] if item[1] != "elsewhere"]
    kinds, runs = list(dict.fromkeys(texts)), dict(found["runs"])
    general = [item[1] == "instruction" for item in items]
    for name, run in runs.items():
        scores = dict(run["scores"])
        first = runs.get(f"sft-{name.rpartition('-')[2]}", run)
        if first is not run and "base" in scores:  # of an arm with an SFT of its own
            del scores["base"]
        for stage, columns in scores.items():
            pairs = columns.get("elsewhere", [])
            parts = {k: _whole(v)[: len(items)] for k, v in columns.items() if k != "kl"}
            scores[stage] = {k: _lead(v) for k, v in parts.items()}
            scores[stage]["kl"] = _means(columns["kl"], general)
            if pairs:
                some = ([p for p, t in zip(pairs, texts, strict=True) if t == k] for k in kinds)
                scores[stage]["elsewhere"] = [
                    [_short(fmean(values)) for values in zip(*own, strict=True)] for own in some
                ]
        log = {}
        for key, values in run.get("log", {}).items():
            if key in UNREAD:
                continue
            digits = 3 if key.startswith(("weight/", "coefficient/")) else 2
            log[key] = [_short(v, digits) for v in values]
        runs[name] = run | {"scores": scores, "log": log}
    return {"items": items + [[kind, "elsewhere", kind, kind] for kind in kinds], "runs": runs}


def _means(kl: Any, general: Sequence[bool]) -> dict[str, float | None]:
    """The mean KL of each kind of prompt, by the first prompt of that kind, in whose place it is
    read; as it is where it has been made already."""
    if isinstance(kl, dict):
        return kl
    kinds: dict[bool, list[float]] = {}
    for kind, value in zip(general, kl, strict=False):
        if value not in (None, "-"):
            kinds.setdefault(kind, []).append(float(value))
    return {str(general.index(kind)): _short(fmean(some), 3) for kind, some in kinds.items()}


def read(path: Path) -> Record:
    """A record from its file; InputError where it is none."""
    kept = files.read_json(path)
    if not isinstance(kept, dict) or not {"items", "runs"} <= set(kept):
        raise InputError(f"{path}: not a record; python -m bbkit.study --record writes one")
    return Record(kept)


def joined(kept: Mapping[str, Any], more: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The record `kept`, which is called `name`, with the runs of `more`.

    Raises InputError where the two were asked other prompts, where a run of both scored otherwise
    (on another machine a seed is another run, and its arms go with it), or where an arm of both
    keeps replies otherwise: `full` of older records is another arm.

    >>> a, b = ({"items": [], "runs": {"sft-0": {"scores": {"sft": value}}}} for value in (0, 1))
    >>> joined(a, b, "pocket.json")
    Traceback (most recent call last):
    bbkit.InputError: pocket.json: sft-0 scored otherwise there; record other seeds, or ...
    """
    if kept["items"] != more["items"]:
        raise InputError(f"{name}: its runs answered other prompts; record into another file")
    for run in kept["runs"].keys() & more["runs"].keys():
        if kept["runs"][run]["scores"] != more["runs"][run]["scores"]:
            raise InputError(
                f"{name}: {run} scored otherwise there; record other seeds, or into another file"
            )
    whole = {**kept["runs"], **more["runs"]}
    rules = {n: (run.get("retention") or {}).get("rule", "none") for n, run in whole.items()}
    first: dict[str, str] = {}
    for run, rule in rules.items():
        same = first.setdefault(run.rpartition("-")[0], run)
        if rule != rules[same]:
            raise InputError(f"{name}: {run} keeps replies otherwise than {same}; use another file")
    return {"items": kept["items"], "runs": whole}


def as_json(found: Mapping[str, Any]) -> str:
    """The file of a record: JSON, a line a run, so that git shows which one changed."""

    def tight(value: Any) -> str:
        return json.dumps(files.plain(value), separators=(",", ":"))

    runs = ",\n".join(f"{tight(k)}: {tight(v)}" for k, v in found["runs"].items())
    return f'{{"items": {tight(found["items"])},\n"runs": {{\n{runs}\n}}}}\n'


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str | list]:
    texts = [row for row in rows if row["task"] == "elsewhere"]
    names = sorted({name for row in rows for name in row["scores"]} - {*elsewhere.names(texts)})
    columns = {n: _marks([_short(row["scores"].get(n)) for row in rows]) for n in names}
    columns["kl"] = _marks([_short(row.get("kl"), 3) for row in rows])
    if texts:  # each kind has its names, which would make ten columns, nearly empty
        columns["elsewhere"] = [[_short(v) for v in row["scores"].values()] for row in texts]
    return columns


def _first_replies(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The id and reply of the first prompt of each data set, the same prompts in every run."""
    first = {row["source"]: row for row in reversed(rows) if row["task"] != "elsewhere"}
    return {name: {"id": row["id"], "reply": row["reply"]} for name, row in first.items()}


def _marks(values: list[float | int | None]) -> str | list:
    """A mark a value where all are 0, 1 or None, as `_lead` shortens them; no None at the end."""
    while values and values[-1] is None:
        values = values[:-1]
    known: dict[float | None, str] = {0: "0", 1: "1", None: "-"}
    return _lead("".join(known[v] for v in values)) if set(values) <= set(known) else values


def _lead(marks: Any) -> Any:
    """Marks with how many "-" they begin with, instead of them: of instructions, after questions.

    >>> _lead("-" * 12 + "01-"), _whole("12|01-") == "-" * 12 + "01-"
    ('12|01-', True)
    """
    known = marks.lstrip("-") if isinstance(marks, str) and "|" not in marks else marks
    return f"{len(marks) - len(known)}|{known}" if len(known) < len(marks) else marks


def _whole(marks: Any) -> Any:
    if isinstance(marks, str) and "|" in marks:
        count, _, known = marks.partition("|")
        return "-" * int(count) + known
    return marks


def _short(value: float | None, digits: int = 4) -> float | int | None:
    if value is None:
        return None
    return int(value) if value == int(value) else float(f"{value:.{digits}g}")


def unpack(found: Mapping[str, Any], name: str, known: dict[str, Rows] | None = None) -> Rows:
    """Item rows of one run by stage, those of the run that it was forked from among them.

    `known` keeps what has been unpacked for the runs that share it.

    >>> run = {"from": None, "scores": {"sft": {"domain": "1", "kl": [None, 0.5]}}}
    >>> kept = {"items": [["a", "choice", "e", "s"]] * 2, "runs": {"sft-0": run}}
    >>> [row["scores"] for row in unpack(kept, "sft-0")["sft"]]
    [{'domain': 1}, {}]
    """
    known = {} if known is None else known
    if name in known:
        return known[name]
    run, items = found["runs"][name], found["items"]
    rows = dict(unpack(found, run["from"], known)) if run["from"] else {}
    first = f"sft-{name.rpartition('-')[2]}"
    if not rows and "base" not in run["scores"] and name != first in found["runs"]:  # `brief`
        rows = {"base": unpack(found, first, known)["base"]}
    for stage, kept in run["scores"].items():
        texts, kl = iter(kept.get("elsewhere", ())), kept.get("kl", ())
        columns = {n: _values(kept[n], len(items)) for n in kept if n not in ("elsewhere", "kl")}
        if isinstance(kl, dict):  # `brief`
            kl = [kl.get(str(i)) for i in range(len(items))]
        rows[stage] = []
        for i, (item, value) in enumerate(zip(items, _values(kl, len(items)), strict=True)):
            seen = {k: v[i] for k, v in columns.items() if v[i] is not None}
            if item[1] == "elsewhere":
                seen, value = {**elsewhere.scores(item[2], *next(texts))}, None
            row = {**dict(zip(ITEM, item, strict=True)), "scores": seen}
            rows[stage].append(row if value is None else row | {"kl": value})
    known[name] = rows
    return rows


def _values(marks: str | list, count: int) -> list[float | int | None]:
    """A value for each of `count` items; None where there is none."""
    if isinstance(marks, str):
        marks = [None if mark == "-" else int(mark) for mark in _whole(marks)]
    return [*marks, *[None] * (count - len(marks))]
