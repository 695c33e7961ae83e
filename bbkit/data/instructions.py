"""General instructions that a program can check: the kit's measure of instruction following.

Serves the claim on the alignment tax: what a model follows before and after biomedical training.
None of the 20 kinds is one of IFEval's 25, which stay for evaluation only. `SEEN` kinds take part
in GRPO; `UNSEEN` kinds are known to the pocket base model and never trained on afterwards, since
recovering what GRPO itself rewards proves little.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from bbkit import InputError
from bbkit.prompts import Example

WORDS = (
    "apple bread cloud river stone tiger horse table chair window garden silver golden purple "
    "yellow orange green black white brown winter summer spring autumn monday friday sunday "
    "london paris berlin madrid tokyo piano guitar violin drum doctor teacher farmer baker pilot "
    "sailor coffee butter cheese honey lemon cherry carrot potato tomato onion pepper rabbit "
    "monkey lion eagle shark whale snake mouse sheep goat camel forest island desert valley "
    "mountain ocean bridge castle tower market school church station engine rocket planet comet "
    "pencil paper letter basket bottle candle mirror pillow blanket jacket button ribbon hammer "
    "ladder bucket shovel needle thread wagon anchor lantern compass feather marble copper iron"
).split()
TAGS = ("note", "reply", "list", "title", "quote", "item")
LABELS = ("Result", "Words", "Output", "Summary", "Notes", "Final")
OPENERS = ("Indeed", "Surely", "Well", "Today", "Hello", "Friends")
JOINERS = {
    "plus signs": "+", "slashes": "/", "arrows": "->", "semicolons": ";", "equals signs": "=",
}  # fmt: skip
SPLITS = ("train", "validation", "test")


# What is asked, in two wordings; `_arguments` draws what they name.
ASKED = {
    "repeat": ("Write the word {one} {times} times.", "Say {one} {times} times."),
    "join": ("Join these words with {joiner_name}: {text}", "Put {joiner_name} between: {text}"),
    "tags": ("Put these words inside <{tag}> tags: {text}", "Wrap in <{tag}> tags: {text}"),
    "open_with": (
        "Begin your reply with {opener}, then write: {text}",
        "Start with {opener}. Write: {text}",
    ),
    "number": ("Number these words: {text}", "Write as a numbered list: {text}"),
    "reverse": ("Write these words in reverse order: {text}", "Reverse the order: {text}"),
    "drop": ("Leave out {one}: {text}", "Write these words without {one}: {text}"),
    "replace": ("Replace {one} by {other}: {text}", "Write {other} in place of {one}: {text}"),
    "round_brackets": ("Write in round brackets: {text}", "Put round brackets around: {text}"),
    "first": ("Give only the first word: {text}", "Which word comes first: {text}"),
    "label": (
        "Label these words as {label}: {text}",
        "Write the label {label} and a colon before: {text}",
    ),
    "count": ("Count from {low} to {high}.", "Write the numbers from {low} to {high}."),
    "last": ("Give only the last word: {text}", "Which word comes last: {text}"),
    "double": ("Write every word twice: {text}", "Double each word: {text}"),
    "stars": ("Put a star before and after: {text}", "Write between two stars: {text}"),
    "second": ("Give only the second word: {text}", "Which word comes second: {text}"),
    "and_between": ("Put and between these words: {text}", "Connect with and: {text}"),
    "append": ("Add {other} at the end: {text}", "Write {other} after these words: {text}"),
    "square_brackets": ("Write in square brackets: {text}", "Put square brackets around: {text}"),
    "count_down": (
        "Count down from {high} to {low}.",
        "Write the numbers from {high} down to {low}.",
    ),
}
# The reply: what stands around the words, or what is made of the arguments.
REPLIES: dict[str, str | Callable[[Mapping], str]] = {
    "repeat": lambda c: " ".join([c["one"]] * c["times"]),
    "join": lambda c: f" {c['joiner']} ".join(c["words"]),
    "tags": "<{tag}>{text}</{tag}>",
    "open_with": "{opener} {text}",
    "number": lambda c: " ".join(f"{i}. {w}" for i, w in enumerate(c["words"], 1)),
    "reverse": lambda c: " ".join(reversed(c["words"])),
    "drop": lambda c: " ".join(w for w in c["words"] if w != c["one"]),
    "replace": lambda c: " ".join(c["other"] if w == c["one"] else w for w in c["words"]),
    "round_brackets": "({text})",
    "first": lambda c: c["words"][0],
    "label": "{label}: {text}",
    "count": lambda c: " ".join(str(i) for i in range(c["low"], c["high"] + 1)),
    "last": lambda c: c["words"][-1],
    "double": lambda c: " ".join(f"{w} {w}" for w in c["words"]),
    "stars": "* {text} *",
    "second": lambda c: c["words"][1],
    "and_between": lambda c: " and ".join(c["words"]),
    "append": lambda c: f"{c['text']} {c['other']}",
    "square_brackets": "[{text}]",
    "count_down": lambda c: " ".join(str(i) for i in range(c["high"], c["low"] - 1, -1)),
}
KINDS = tuple(ASKED)
SEEN, UNSEEN = KINDS[:12], KINDS[12:]
# Kinds that any free-form reply can obey, put behind real instructions: sentence per kind.
WRAPPERS = {
    "tags": "Put your whole reply inside <{tag}> tags.",
    "open_with": "Begin your reply with the word {opener}.",
    "round_brackets": "Write your whole reply in round brackets.",
    "label": "Begin your reply with {label} and a colon.",
    "stars": "Put a star before and after your whole reply.",
    "square_brackets": "Write your whole reply in square brackets.",
}


def check(constraint: Mapping, reply: str) -> bool:
    """Whether a reply obeys one constraint. Pure, linear in the reply, never raises on a reply.

    >>> check({"kind": "reverse", "words": ["tiger", "apple"]}, " apple tiger ")
    True
    >>> check({"kind": "round_brackets", "words": None}, "(any text) and more")
    False

    Raises `InputError` for a kind that does not exist.
    """
    kind = constraint.get("kind")
    if kind not in KINDS:
        raise InputError(f"unknown constraint kind {kind!r}: use one of {', '.join(KINDS)}")
    wanted, reply = REPLIES[kind], reply.strip()
    if not isinstance(wanted, str):
        return reply.split() == wanted(constraint).split()
    left, right = (mark.strip().format(**constraint) for mark in wanted.split("{text}"))
    if len(reply) < len(left + right) or not (reply.startswith(left) and reply.endswith(right)):
        return False
    inner = reply[len(left) : len(reply) - len(right)].split()
    return bool(inner) and inner == list(constraint.get("words") or inner)


def _arguments(kind: str, rng: random.Random) -> dict:
    words = rng.sample(WORDS, rng.randint(2, 4) if kind not in ("drop", "replace") else 3)
    low = rng.randint(1, 20)
    joiner = rng.choice(sorted(JOINERS))
    c = {
        "words": words,
        "text": " ".join(words),
        "one": rng.choice(words),
        "other": rng.choice([w for w in WORDS if w not in words]),
        "times": rng.randint(2, 5),
        "joiner_name": joiner,
        "joiner": JOINERS[joiner],
        "tag": rng.choice(TAGS),
        "label": rng.choice(LABELS),
        "opener": rng.choice(OPENERS),
        "low": low,
        "high": low + rng.randint(2, 5),
    }
    used = set(re.findall(r"{(\w+)}", " ".join(ASKED[kind])))
    for shown, meant in (("text", "words"), ("joiner_name", "joiner")):
        used |= {meant} if shown in used else set()
    return {"kind": kind, **{k: v for k, v in c.items() if k in used}}


def example(kind: str, rng: random.Random, split: str = "") -> Example:
    """One instruction of a kind with its constraint and a reference reply.

    >>> example("count", random.Random(0)).constraints[0]["kind"]
    'count'
    """
    c = _arguments(kind, rng)
    question, reply = rng.choice(ASKED[kind]).format(**c), REPLIES[kind]
    return Example(
        id=question,
        task="instruction",
        question=question,
        answer=reply.format(**c) if isinstance(reply, str) else reply(c),
        entity=kind,
        constraints=(c,),
        source="constraints",
        split=split,
    )


def split_of(e: Example) -> str:
    """The split of a prompt: by its content, so that it is the same whoever draws it."""
    bucket = sum(ord(ch) * (i % 97 + 1) for i, ch in enumerate(e.question)) % 10
    return "train" if bucket < 6 else "validation" if bucket < 8 else "test"


def examples(
    split: str, seed: int = 0, per_kind: int = 20, kinds: Sequence[str] = KINDS
) -> list[Example]:
    """`per_kind` different prompts of every kind; no prompt is in two splits.

    >>> {e.entity for e in examples("test")} == set(KINDS)
    True
    """
    if split not in SPLITS:
        raise InputError(f"constraints: no split {split!r}; use one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    rows: dict[str, Example] = {}
    for kind in kinds:
        drawn = (example(kind, rng, split) for _ in range(per_kind * 50))
        new = (e for e in drawn if split_of(e) == split and e.id not in rows)
        for e in islice(new, per_kind):
            rows[e.id] = e
    return list(rows.values())


def constrain(rows: Sequence[Example], seed: int = 0, kinds: Sequence[str] = SEEN) -> list[Example]:
    """Real instructions, each with one wrapper constraint put behind it (see `WRAPPERS`).

    >>> row = Example(id="1", task="instruction", question="Name a fruit.")
    >>> constrain([row], kinds=["round_brackets"])[0].question
    'Name a fruit. Write your whole reply in round brackets.'
    """
    rng = random.Random(f"constrain/{seed}")
    usable = [k for k in kinds if k in WRAPPERS]
    out = []
    for row in rows:
        kind = rng.choice(usable)
        c = {k: v for k, v in _arguments(kind, rng).items() if k not in ("words", "text")}
        question = f"{row.question} {WRAPPERS[kind].format(**c)}"
        made = replace(row, id=f"{row.id}/{kind}", question=question, answer="", entity=kind)
        out.append(replace(made, constraints=(c,)))
    return out
