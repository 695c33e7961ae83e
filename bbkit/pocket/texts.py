"""Prompts and texts of the kinds that the pocket model was pretrained on, one kind at a time.

Serves the claim of no alignment tax: replies of the base to these prompts say what it was, and the
texts what it lost where nothing looks (bbkit.runs.elsewhere). The two are apart whatever the seeds:
a user turn belongs to one or the other by a hash of its words.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache

from bbkit import InputError
from bbkit.data import instructions, knowledge
from bbkit.pocket import build
from bbkit.prompts import Example

KINDS = build.FORMS[1:]  # those with a prompt: all but sentences of facts
PER_KIND = 512


def prompts(split: str, seed: int = 0, per_kind: int = PER_KIND) -> list[Example]:
    """`per_kind` different prompts of every kind in KINDS, or all that a kind has, as pretrained.

    `entity` is the kind. None names a disease of another split than "train", the only one there is,
    nor the organism behind one; no instruction is of a kind in `instructions.UNSEEN`.

    >>> [e.entity for e in prompts("train", per_kind=1)]
    ['chat', 'question', 'echo', 'instruction']
    """
    if split != "train":
        raise InputError(f"pocket_prompts: no split {split!r}; use train")

    def keep(e: Example) -> bool:
        return not unseen(e) and not _held_out().search(f"{e.question} {e.answer}".casefold())

    made = (drawn(k, f"prompts/{k}/{seed}", per_kind, keep, instructions.SEEN) for k in KINDS)
    return [e for rows in made for e in rows]


def elsewhere(kind: str, count: int) -> list[Example]:
    """`count` texts of a kind, the same at every call; no prompt is one of those of `prompts`.

    They may name any disease. Sentences of facts, without a prompt, are in other words than SFT's.

    >>> [(e.entity, e.question) for e in elsewhere("facts", 1)]
    [('facts', '')]
    """

    def keep(e: Example) -> bool:
        chain = any(fact and knowledge.is_fact(fact) for fact in knowledge.statements(e.answer))
        return not chain if kind == "facts" else unseen(e)

    return drawn(kind, f"elsewhere/{kind}", count, keep)


def drawn(
    kind: str,
    seed: str,
    count: int,
    keep: Callable[[Example], bool],
    instructed: Sequence[str] = instructions.KINDS,
) -> list[Example]:
    """`count` different documents of a kind, fewer if it has fewer, as instructions."""
    shares = [float(form == kind) for form in build.FORMS]
    rows: dict[tuple[str, str], Example] = {}
    for _, system, user, reply in build.turns(seed, 100 * count, shares=shares, kinds=instructed):
        place = f"{kind}-{len(rows):04d}"
        row = Example(place, "instruction", user, answer=reply, entity=kind, system=system)
        if keep(row):
            rows.setdefault((system, user or reply), row)
        if len(rows) == count:
            break
    return list(rows.values())


def unseen(e: Example) -> bool:
    """Whether a prompt is one of the quarter that `prompts` leaves out."""
    return int(hashlib.sha256(e.question.encode()).hexdigest()[:8], 16) % 4 == 0


@cache
def _held_out() -> re.Pattern[str]:
    """Names of the diseases held out and of their causes, in lower case."""
    held_out = {*knowledge.diseases("validation"), *knowledge.diseases("test")}
    causes = {cause for name in held_out for cause in knowledge.index()[name].get("cause", ())}
    names = "|".join(sorted(re.escape(name.casefold()) for name in held_out | causes))
    return re.compile(rf"(?<!\w)(?:{names})(?!\w)")
