"""Which prompts the base's replies of a run are to: broad by construction, and none of a test.

Serves the claim of no alignment tax: what is kept is what is asked for and a little beyond, so that
prompts come in equal shares of many kinds (`retention.prompts`: data cards, a file, or the base's
own). Instruction replies alone kept instruction following and lost most of the rest.
"""

from collections.abc import Sequence
from pathlib import Path

from bbkit import InputError, prompts
from bbkit.config import Settings
from bbkit.data import catalogue, instructions, layouts, replies
from bbkit.data.replies import Reply
from bbkit.machine import files, processes
from bbkit.prompts import Example


def of_run(
    path: Path, model, tokenizer, settings: Settings, held_out: Sequence[Example],
    data_dir: Path | None,
) -> list[Reply]:  # fmt: skip
    """The base's replies of a run, from the file in its folder or made now and kept there.

    The prompts are those of `retention.prompts`, in equal shares of their kinds. Raises InputError
    where one is not of a split to train on, or is among `held_out`, the texts of the evaluation.
    """
    if processes.is_first() and not path.is_file():
        section, seed = settings.retention, settings.run.seed
        tests = [t for e in held_out for t in (e.question, prompts.messages(e)[-1]["content"]) if t]
        rows: list[dict] = []
        for name in section.prompts:
            if name == "self":
                own = replies.own_turns(model, tokenizer, section.replies, seed, held_out=tests)
                rows += [{"prompt": turns, "kind": "self"} for turns in own]
            elif name.endswith(".jsonl"):
                rows += _of_file(Path(name))
            else:
                rows += _of_card(name, settings, data_dir, {layouts.normal(text) for text in tests})
        given = replies.from_rows(tokenizer, rows, section.replies, seed)
        replies.refuse_held_out(given.prompts, tests)
        made = given.replies or replies.answered(
            model, tokenizer, given.prompts, section.max_new_tokens,
            settings.evaluation.batch_tokens, given.kinds,
        )  # fmt: skip
        replies.write(path, made)
        print(f"retention: {len(made)} replies of the base to {', '.join(section.prompts)}")
    processes.wait()
    return replies.read(path)


def _of_file(path: Path) -> list[dict]:
    if not (rows := layouts.parse(str(path), files.read(path), "jsonl")):
        raise InputError(f"retention.prompts {path}: no rows")
    return [row for _, row in rows]


def _of_card(name: str, settings: Settings, data_dir: Path | None, tests: set[str]) -> list[dict]:
    """Prompts of a data card: of "card", or "card/part", a split to train on or a kind of rows.

    Without those that are asked in `tests`: generated instructions are few enough to meet.
    """
    card, _, part = name.partition("/")
    split = part if part in catalogue.card(card)["splits"] else "train"
    if catalogue.role(card, split) != "train":
        raise InputError(f"retention.prompts {name}: not a split to train on; its card says why")
    rows: list[dict] = []
    changed = settings.data.allow_changed
    for e in catalogue.load(card, split, data_dir, allow_changed=changed, seed=settings.run.seed):
        unseen = any(c["kind"] in instructions.UNSEEN for c in e.constraints)
        if not unseen and layouts.normal(e.question) not in tests:
            kind = e.entity if card in catalogue.GENERATED and e.task == "instruction" else card
            rows.append({"prompt": prompts.messages(e), "kind": kind})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if part and split != part:
        if part not in kinds:
            raise InputError(f"retention.prompts {name}: no kind {part}; of {', '.join(kinds)}")
        kinds = [part]
    return [row for kind in kinds for row in rows if row["kind"] == kind]
