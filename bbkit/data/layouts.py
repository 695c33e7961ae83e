"""The layouts of upstream files and Hub copies: bytes to rows, a row to the fields of an Example.

One short function a data set; `fields` checks what it gives, bbkit.data says where a malformed row
stands. Traps are handled where they arise: MedMCQA counts its answers from 1 in the files and from
0 on the Hub, the Hub copy of IFEval is padded with nulls.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from bbkit import InputError


def parse(name: str, data: bytes, layout: str, mark: str = ",") -> list[tuple[str, Any]]:
    """(place, row) pairs of a "jsonl", "json" or "csv" file, whose cells `mark` parts.

    InputError: cut short or broken.

    >>> parse("rows.jsonl", b'{"id": 1}', "jsonl")
    [('rows.jsonl line 1', {'id': 1})]
    """
    rows: list[tuple[str, Any]] = []
    number = 1
    try:
        text = data.decode("utf-8-sig")
        if layout == "jsonl":
            for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028
                if line.strip():
                    rows.append((f"{name} line {number}", json.loads(line)))
            return rows
        if layout == "csv":
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
            subject = PurePosixPath(name).stem.removesuffix("_test")
            for cells in reader:
                if cells:
                    rows.append((f"{name} line {number}", {"subject": subject, "cells": cells}))
                number = reader.line_num + 1
            return rows
        whole = json.loads(text.strip() or "[]")
        if not isinstance(whole, dict):
            return [(f"{name} row {i}", row) for i, row in enumerate(whole, 1)]
        for key, value in whole.items():  # PubMedQA: by id, rows or labels
            rest = value if isinstance(value, dict) else {}
            rows.append((f"{name} entry {key}", {"pmid": key, **rest}))
        return rows
    except (ValueError, csv.Error, TypeError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        mend = "as if cut short; mend it or fetch it again"
        if layout == "json" and "Extra data" in str(error):
            mend = "with a row a line it is a .jsonl; rename it"
        said = f"{name} line {number}: not readable as {layout} ({error})"
        raise InputError(f"{said}, {mend}") from None


def normal(text: str) -> str:
    """Text for comparing: case, spaces and a closing full stop do not count.

    >>> normal(" Iron  deficiency.")
    'iron deficiency'
    """
    return " ".join(text.lower().split()).rstrip(".")


def _choice(options: Sequence[str], names: Sequence, gold: Any) -> dict:
    """Options that go by `names` (letters or numbers), of which `gold` is one."""
    given = dict(zip(names, options, strict=False))
    if gold not in list(names) or isinstance(gold, bool) or len(options) != len(names):
        raise ValueError(
            f"its right answer is {str(gold)[:40]!r} of {len(options)} options; "
            f"it must be one of {', '.join(map(str, names))}"
        )
    return {"task": "choice", "options": tuple(options), "answer": given[gold]}


def _joined(texts: Any, mark: str = " ") -> str:
    if not isinstance(texts, list):
        raise ValueError(f"its context must be a list of texts, not {str(texts)[:40]!r}")
    return mark.join(texts)


def _medqa(row: Any, n: int, hub: bool) -> dict:
    named = row["options"]
    made = _choice([named[letter] for letter in sorted(named)], "ABCD", row["answer_idx"])
    if made["answer"] != row["answer"]:
        raise ValueError(f"its answer is not the text of option {row['answer_idx']}")
    # The development file has the vignette apart from the question, sentence by sentence.
    return made | {"question": row["question"], "context": _joined(row.get("context", []))}


def _medmcqa(row: Any, n: int, hub: bool) -> dict:
    row = {key: "" if value is None else value for key, value in row.items()}
    options = [row[f"op{letter}"] for letter in "abcd"]
    made = _choice(options, (0, 1, 2, 3) if hub else (1, 2, 3, 4), row["cop"])
    return made | {"id": row["id"], "question": row["question"], "reasoning": row["exp"]}


def _pubmedqa(row: Any, n: int, hub: bool) -> dict:
    if hub:
        row = {**row["context"], **row}
    options = ("yes", "no", "maybe")
    return _choice(options, options, row["final_decision"]) | {
        "id": str(row["pubid" if hub else "pmid"]),
        "question": row["question" if hub else "QUESTION"],
        # by lines as lm-eval shows them; in the kit's prompt they run on
        "context": _joined(row["contexts" if hub else "CONTEXTS"], "\n"),
        "reasoning": row["long_answer" if hub else "LONG_ANSWER"],
    }


def _mmlu(row: Any, n: int, hub: bool) -> dict:
    if not hub:
        if len(row["cells"]) != 6:
            raise ValueError(f"it has {len(row['cells'])} cells, not question, A, B, C, D, answer")
        question, *choices, answer = row["cells"]
        row = {**row, "question": question, "choices": choices, "answer": answer.strip()}
    made = _choice(row["choices"], range(4) if hub else "ABCD", row["answer"])
    subject = row["subject"]
    return made | {"id": f"{subject}-{n:03d}", "question": row["question"], "entity": subject}


def _ifeval(row: Any, n: int, hub: bool) -> dict:
    kinds, given = row["instruction_id_list"], row["kwargs"]
    if not kinds or len(kinds) != len(given):
        raise ValueError(f"it has {len(kinds)} instructions, but {len(given)} sets of kwargs")
    # Nulls stand for the arguments that an instruction does not have; 0 is a value.
    some = [{k: v for k, v in one.items() if v is not None} for one in given]
    constraints = tuple({"kind": kind, **one} for kind, one in zip(kinds, some, strict=True))
    made = {"id": str(row["key"]), "task": "instruction", "question": row["prompt"]}
    return made | {"constraints": constraints}


def _general(row: Any, n: int, hub: bool) -> dict:
    task = row["instances"][0] if "instances" in row else row  # self-instruct nests one instance
    question = f"{row['instruction']}\n\n{task['input']}" if task["input"] else row["instruction"]
    # Rows of one instruction share an entity, and with it a side of the train/validation cut.
    entity = hashlib.sha256(normal(row["instruction"]).encode()).hexdigest()[:12]
    return {"task": "instruction", "question": question, "answer": task["output"], "entity": entity}


def _open_replies(row: Any, n: int, hub: bool) -> dict:
    question = row["prompt"].removeprefix(FRAME[0]).removesuffix(FRAME[1])
    return {"task": "instruction", "question": question, "answer": row["response"]}


# The frame that Alpaca put around an instruction; others' files have it on every row.
FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n",
    "\n\n### Response:\n",
)
READERS: dict[str, Callable[[Any, int, bool], dict]] = {
    "medqa": _medqa,
    "medmcqa": _medmcqa,
    "pubmedqa": _pubmedqa,
    "mmlu_medical": _mmlu,
    "ifeval": _ifeval,
    "general_instructions": _general,
    "open_replies": _open_replies,
}


def fields(card_name: str, row: Any, n: int, hub: bool, as_is: bool = False) -> dict:
    """Checked and stripped fields of an Example from the n-th row of a file or of a Hub copy.

    `as_is` leaves the spaces at the ends: a test set is asked as others ask it, and an option with
    a space behind it has another likelihood. ValueError says what is wrong with the row. The id is
    the card's own, else n; the entity the id.

    >>> cells = ["Which bone?", "Ulna", "Tibia", "Rib", "Skull", "B"]
    >>> fields("mmlu_medical", {"subject": "anatomy", "cells": cells}, 7, hub=False)["id"]
    'anatomy-007'
    """
    try:
        made = {"id": f"{n:04d}", **READERS[card_name](row, n, hub)}
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"it is not laid out as {card_name} is ({error})") from None
    made = {"entity": made["id"], **made}
    for key, value in made.items():
        texts = {"options": value, "constraints": ()}.get(key, [value])
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"its {key} must be text, not {str(value)[:40]!r}")
        if key in ("id", "question", "answer") and not value.strip():
            raise ValueError(f"its {key} is empty")
        if key != "constraints" and not as_is:
            made[key] = tuple(t.strip() for t in value) if key == "options" else value.strip()
    return made
