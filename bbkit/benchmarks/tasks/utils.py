"""What the task files beside this one call, as `!function utils.NAME`.

Serves the claims on BIOMED-MMLU, MedQA and IFEval: generated answers, step by step, on the test
splits, which lm-eval 0.4.13 lacks. Rows come from the data cards, at their pins and checksums.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby, islice
from typing import Any

from bbkit import data, prompts
from bbkit.benchmarks.extraction import extract_choice
from bbkit.benchmarks.ifeval import final_answer, score_ifeval
from bbkit.prompts import Example

LETTERS = "ABCDEFGHIJ"
FIELDS = ("id", "question", "context", "options", "entity", "source")


def rows(
    card: str,
    split: str = "test",
    data_dir: str | None = None,
    shuffle: int | None = None,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The `custom_dataset` of a task: {"test": rows of a card}, from `data_dir` or the Hub.

    `shuffle` draws another order of the options of each question by that seed; `subjects` keeps
    some of MMLU; `limit` keeps the first rows, of MMLU those of each subject.
    """
    from datasets import Dataset

    examples = data.load(card, split, data_dir)
    if subjects:
        examples = [e for e in examples if e.entity in subjects]
    if limit:
        groups = groupby(examples, lambda e: e.entity if card == "mmlu_medical" else "")
        examples = [e for _, some in groups for e in islice(some, limit)]
    if shuffle is not None:
        examples = [_shuffled(e, shuffle) for e in examples]
    return {"test": Dataset.from_list([_row(e) for e in examples])}


def _shuffled(example: Example, seed: int) -> Example:
    options = list(example.options)
    random.Random(f"{seed} {example.id}").shuffle(options)
    return replace(example, options=tuple(options))


def _row(asked: Example) -> dict[str, Any]:
    """A row for the kit's tasks, and under their own names for lm-eval's of the same data."""
    row = {key: value for key, value in asdict(asked).items() if key in FIELDS}
    if asked.task == "instruction":
        given = [{k: v for k, v in c.items() if k != "kind"} for c in asked.constraints]
        kinds = [c["kind"] for c in asked.constraints]
        # As JSON: a column of the table has one type, arguments have many.
        return row | {"instruction_id_list": kinds, "kwargs": json.dumps(given)}
    options = list(asked.options)
    gold = options.index(asked.answer)
    row |= {"options": options, "letter": LETTERS[gold]}
    row |= {"choices": options, "answer": gold}  # mmlu
    row |= {"sent1": asked.question, "label": gold}  # medqa_4options
    row |= {f"ending{i}": text for i, text in enumerate(options)}
    row |= {f"op{'abcd'[i]}": text for i, text in enumerate(options[:4])} | {"cop": gold}  # medmcqa
    row |= {"QUESTION": asked.question, "CONTEXTS": [asked.context]}  # pubmedqa
    return row | {"final_decision": asked.answer}


def example(doc: Mapping[str, Any]) -> Example:
    """The question of a row, to be asked in the kit's prompt."""
    options = tuple(doc.get("options") or ())
    task = "choice" if options else "instruction"
    return Example(doc["id"], task, doc["question"], doc["context"], options)


def kit(doc: Mapping[str, Any]) -> str:
    """The user's turn of the prompt that the kit trains on; its system turn is `description`."""
    return prompts.messages(example(doc))[-1]["content"]


def neutral(doc: Mapping[str, Any]) -> str:
    """A prompt in nobody's grammar, for models that were not trained on the kit's."""
    return f'{kit(doc)}\n\nThink step by step, then end with "The answer is (X)".'


def read_choice(asked: Example, reply: str) -> str | None:
    """The letter that a reply commits to: by its answer tag, without one by `extract_choice`.

    In the tag that reads "**C**" too, but nothing where letter and text disagree, as in "B) " with
    the text of A.
    """
    known = prompts.letters(asked)
    if letter := prompts.parse_answer(reply, known):
        return letter
    given, letters = prompts.parse_answer(reply) or "", "".join(known)
    letter = extract_choice(reply, letters) or extract_choice(given, letters)
    said = given.casefold()
    named = {other for other, text in known.items() if text.casefold() in said}
    return letter if letter in named or not named else None


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Measures of one reply: right, and read at all."""
    letter = read_choice(example(doc), results[0])
    return {"acc": float(letter == doc["letter"]), "parsed": float(letter is not None)}


def score_instructions(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Verdicts of IFEval on one reply, whole and by its final answer; see benchmarks.ifeval."""
    row = {"key": doc["id"], "instruction_id_list": doc["instruction_id_list"]}
    row["kwargs"] = json.loads(doc["kwargs"])
    whole, answer = score_ifeval([row, row], [results[0], final_answer(results[0])])
    return {
        "prompt_strict": float(all(whole["strict"])),
        "prompt_loose": float(all(whole["loose"])),
        "instruction_strict": whole["strict"],
        "instruction_loose": whole["loose"],
        "answer_strict": float(all(answer["strict"])),
    }


def over_instructions(verdicts: Sequence[Sequence[bool]]) -> float:
    """Share of instructions followed."""
    every = [verdict for prompt in verdicts for verdict in prompt]
    return sum(every) / len(every)
