"""The fact table of the Disease Ontology, facts as sentences, and the split by disease.

What the kit's questions are made from and their chains are checked against: the paper names
"ontology validation" without saying how. A sentence of a chain is true here when the shipped table,
derived from the ontology (CC0), states it.
"""

import hashlib
from collections import defaultdict
from functools import cache
from pathlib import Path

from bbkit import InputError

FACTS = Path(__file__).parents[1] / "pocket" / "facts.tsv"
SPLITS = ("train", "validation", "test")
Fact = tuple[str, str, str]  # subject, relation, object

# The canonical sentence of a relation, between subject and object: what a chain is written in.
VERBS = {
    "cause": " is caused by ",
    "transmission": " is transmitted by ",
    "symptom": " has the symptom ",
    "site": " affects the ",
    "kind": " is a ",
}
INVERSE = {"cause": " causes "}  # between object and subject, in chains that start from an organism
_READ = (*VERBS.items(), *INVERSE.items())


def state(fact: Fact, inverse: bool = False) -> str:
    """A fact as the canonical sentence.

    >>> state(("cholera", "cause", "Vibrio cholerae"), inverse=True)
    'Vibrio cholerae causes cholera.'
    """
    subject, relation, object_ = fact
    if inverse:
        return f"{object_}{INVERSE[relation]}{subject}."
    return f"{subject}{VERBS[relation]}{object_}."


def statements(text: str) -> list[Fact | None]:
    """Read a chain back: one entry per sentence, None where a sentence states no relation.

    Linear in the text's length. The inverse form of `cause` is read as the same fact.

    >>> statements("Vibrio cholerae causes cholera. So it is.")
    [('cholera', 'cause', 'Vibrio cholerae'), None]
    """
    found: list[Fact | None] = []
    for sentence in text.replace(". ", ".\n").splitlines():
        sentence = sentence.strip().rstrip(".")
        hits = [(sentence.find(verb), verb, relation) for relation, verb in _READ]
        hits = [hit for hit in hits if hit[0] > 0]
        if hits:
            _, verb, relation = min(hits)
            left, right = (part.strip() for part in sentence.split(verb, 1))
            inverse = verb in INVERSE.values()
            found.append((right, relation, left) if inverse else (left, relation, right))
        elif sentence:
            found.append(None)
    return found


@cache
def facts() -> dict[Fact, str]:
    """The shipped fact table: fact -> DOID of its disease (of one disease, for `kind` facts)."""
    rows = [line.split("\t") for line in FACTS.read_text(encoding="utf-8").splitlines()[1:]]
    return {(subject, relation, object_): doid for doid, subject, relation, object_ in rows}


def is_fact(fact: Fact) -> bool:
    """Whether the ontology states it (case and outer spaces aside).

    >>> is_fact(("cholera", "kind", "virus"))
    False
    """
    return tuple(x.strip().casefold() for x in fact) in _folded()


@cache
def _folded() -> frozenset:
    return frozenset(tuple(x.casefold() for x in f) for f in facts())


@cache
def index() -> dict[str, dict[str, list[str]]]:
    """subject -> relation -> objects."""
    index: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for s, r, o in facts():
        index[s][r].append(o)
    return index


@cache
def having() -> dict[tuple[str, str], list[str]]:
    """(relation, object) -> the subjects of which the ontology states it."""
    inverse: dict[tuple[str, str], list[str]] = defaultdict(list)
    for s, r, o in facts():
        inverse[r, o].append(s)
    return inverse


def diseases(split: str) -> list[str]:
    """The diseases of a split, 60 / 15 / 25 per cent by a hash of the DOID, so that it never moves.

    Diseases that share an organism stay together: the chain of one would give the other away.
    """
    if split not in SPLITS:
        raise InputError(f"ontology: no split {split!r}; use one of {', '.join(SPLITS)}")
    group = {s: s for s, r, _ in sorted(facts()) if r != "kind"}
    for (relation, _), members in having().items():
        if relation == "cause" and len(members) > 1:
            joined = {group[s] for s in members}
            group = {s: min(joined) if g in joined else g for s, g in group.items()}

    def drawn(s: str) -> str:
        share = int(hashlib.sha256(group[s].encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
        return "train" if share < 0.60 else "validation" if share < 0.75 else "test"

    return [s for s in sorted(group) if drawn(s) == split]
