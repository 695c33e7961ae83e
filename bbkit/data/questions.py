"""Knowledge-grounded questions with a checkable chain: the paper's MKGSG, our reading.

Facts of the Disease Ontology become questions of one and two hops: multiple choice with sibling
distractors, short answer, and a clinical form (finding -> cause -> disease). A question with two
right answers, or one that its wording gives away, is not generated. Splits are by disease.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from itertools import islice

from bbkit.data.knowledge import Fact, diseases, facts, having, index, state
from bbkit.prompts import Example

_ONE_HOP = {
    "cause": ("What causes {s}?", "Which organism causes {s}?"),
    "transmission": ("How is {s} transmitted?", "What transmits {s}?"),
    "symptom": ("Which symptom does {s} have?", "Which of these is a symptom of {s}?"),
    "site": ("Which part of the body does {s} affect?", "Where in the body is {s}?"),
}
_KIND = ("What kind of organism causes {s}?", "{s} is caused by what kind of organism?")
_VIA_AGENT = {
    "symptom": (
        "Which symptom can {a} lead to?",
        "A patient is infected with {a}. Which symptom fits?",
    ),
    "transmission": (
        "How does {a} reach a patient?",
        "What transmits the disease that {a} causes?",
    ),
    "site": ("Which part of the body can {a} harm?", "Where does the disease that {a} causes sit?"),
}
_CLINICAL = (
    "A patient has {f}. Tests find {a}. Which disease is it?",
    "Findings: {f}; {a} in culture. What is the diagnosis?",
)


@lru_cache(maxsize=20_000)
def _grams(text: str) -> set[str]:
    folded = re.sub(r"[^a-z]", "", text.lower())
    return {folded[i : i + 3] for i in range(len(folded) - 2)}


def likeness(a: str, b: str) -> float:
    """Share of letter trigrams that two names have in common (Jaccard), for guess-by-name.

    >>> likeness("cholera", "Vibrio cholerae") > likeness("cholera", "Lassa virus")
    True
    """
    x, y = _grams(a), _grams(b)
    return len(x & y) / max(1, len(x | y))


def guess_by_name(example: Example) -> str:
    """Baseline without knowledge: the option that looks most like the question's wording."""
    return max(example.options, key=lambda o: (likeness(o, example.question), o))


def _clash(a: str, b: str) -> bool:
    """Two options of which one contains the other are no clean alternatives."""
    x, y = a.casefold(), b.casefold()
    return x in y or y in x


def _options(
    gold: str, right: Sequence[str], pool: Sequence[str], near: str, often: Mapping[str, int],
    rng: random.Random,
) -> tuple[str, ...] | None:  # fmt: skip
    """Gold and three distractors, none right; mostly one as like the name and one as frequent.

    `pool` is ordered siblings first; None when no fair set exists (the question is dropped).
    """
    usable = [o for o in pool if not any(_clash(o, r) for r in right)]
    picked: list[str] = []
    # Guess-by-name scored 82 % on cause questions before the first of these rules (gold resembles
    # the disease), always naming the most frequent option 57 % on two hops before the second.
    like = likeness(gold, near)
    for bait, wanted in (
        (lambda o: likeness(o, near) >= like, like > 0),
        (lambda o: often.get(o, 0) >= often.get(gold, 0), often.get(gold, 0) > 1),
    ):
        if wanted and rng.random() < 0.8 and not any(map(bait, picked)):
            first = islice(filter(bait, usable), 12)
            fair = [o for o in first if not any(_clash(o, p) for p in picked)]
            if not fair:
                return None
            picked.append(rng.choice(fair))
    for o in usable[:12] if rng.random() < 0.5 else rng.sample(usable, min(12, len(usable))):
        if len(picked) == 3:
            break
        if not any(_clash(o, p) for p in picked):
            picked.append(o)
    if len(picked) < 3:
        return None
    options = [gold, *picked]
    rng.shuffle(options)
    return tuple(options)


@cache
def _counts(relation: str) -> Counter[str]:
    return Counter(o for _, r, o in sorted(facts()) if r == relation)


def _pool(relation: str, rng: random.Random) -> list[str]:
    """All objects of a relation in a random order that favours the frequent ones.

    Uniform distractors would let "always fever" win: a frequent value is more often gold.
    """
    return sorted(_counts(relation), key=lambda o: -(rng.random() ** (1 / _counts(relation)[o])))


def chains(disease: str, short: bool, rng: random.Random) -> list[tuple[str, str, str, list[Fact]]]:
    """(form, question, gold, chain) of every question that the facts allow."""
    own = index()[disease]
    out = []
    for relation, templates in _ONE_HOP.items():
        for gold in own.get(relation, ()):
            # "Which of these" needs options to point at.
            template = templates[0] if short else rng.choice(templates)
            out.append((relation, template.format(s=disease), gold, [(disease, relation, gold)]))
    for agent in own.get("cause", ()):
        cause = (disease, "cause", agent)
        for kind in index()[agent].get("kind", ()):
            question = rng.choice(_KIND).format(s=disease)
            out.append(("kind", question, kind, [cause, (agent, "kind", kind)]))
        if len(having()["cause", agent]) > 1:
            continue  # the organism must point at one disease
        for relation, templates in _VIA_AGENT.items():
            for gold in own.get(relation, ()):
                question = rng.choice(templates).format(a=agent)
                chain = [cause, (disease, relation, gold)]
                out.append((f"agent_{relation}", question, gold, chain))
        for finding in own.get("symptom", ()):
            question = rng.choice(_CLINICAL).format(f=finding, a=agent)
            out.append(("clinical", question, disease, [cause, (disease, "symptom", finding)]))
    return out


def _example(
    disease: str, drawn: tuple, short: bool, split: str, rng: random.Random
) -> Example | None:
    form, question, gold, chain = drawn
    relation, often = chain[-1][1], _counts(chain[-1][1])
    if form == "clinical":
        right, often = [disease], Counter()
        pool = [s for s in index() if "cause" in index()[s] and s != disease]
        rng.shuffle(pool)
        pool.sort(key=lambda s: chain[1][2] not in index()[s].get("symptom", ()))
    elif form == "kind":
        right = [k for a in index()[disease]["cause"] for k in index()[a].get("kind", ())]
        pool = _pool("kind", rng)
        if set(right) != {gold}:
            return None
    else:
        # The ontology has "lujo" and "Lujo hemorrhagic fever" as two terms: what is true of either.
        name = disease.casefold()
        same = [s for s in index() if s.casefold() == name]
        right = [o for s in same for o in index()[s].get(relation, ())]
        # Siblings first: what diseases have that share another fact with this one.
        own = [(r, o) for r, os in index()[disease].items() for o in os if r != relation]
        kin = {other for pair in own for other in having()[pair]}
        near = {o for other in kin for o in index()[other].get(relation, ())}
        pool = sorted(_pool(relation, rng), key=lambda o: o not in near)
    options = () if short else _options(gold, right, pool, question, often, rng)
    if options is None:
        return None
    from_agent = form == "clinical" or form.startswith("agent_")
    # Some differ in the gold alone, or in the way that leads there.
    key = f"{question}|{'|'.join(options)}|{gold}|{chain}"
    return Example(
        id=f"{facts()[chain[0]]}/{form}/{hashlib.sha256(key.encode()).hexdigest()[:8]}",
        task="short" if short else "choice",
        question=question,
        options=options,
        answer=gold,
        synonyms=tuple(r for r in right if r != gold) if short else (),
        reasoning=" ".join([state(chain[0], from_agent), *map(state, chain[1:])]),
        steps=tuple(chain),
        entity=facts()[chain[0]],
        source="ontology",
        split=split,
    )


def ontology(split: str, seed: int = 0) -> list[Example]:
    """Questions about the diseases of one split, by seed: at most 12 of each, 4 out of training.

    One disease in ten is asked in short-answer form. No disease of one split is asked about in
    another.

    >>> row = ontology("validation")[0]
    >>> row.answer in row.options or row.task == "short"
    True
    """
    rng = random.Random(f"{split}/{seed}")
    out = []
    for disease in diseases(split):
        short = rng.random() < 0.1
        drawn = chains(disease, short, rng)
        out += _drawn(disease, drawn, short, split, 12 if split == "train" else 4, rng)
    return out


def ontology_chains(split: str, seed: int = 0) -> list[Example]:
    """Multiple-choice questions of two hops, by seed: at most 12 of a disease, 8 out of training.

    Left out are those whose linking organism names the answer ("What kind of organism causes West
    Nile fever?").

    >>> {(row.task, len(row.steps)) for row in ontology_chains("validation")}
    {('choice', 2)}
    """
    rng = random.Random(f"{split}/{seed}/chains")
    out = []
    for disease in diseases(split):
        two = [d for d in chains(disease, False, rng) if len(d[3]) == 2]
        drawn = [d for d in two if d[2].casefold() not in d[3][0][2].casefold()]
        out += _drawn(disease, drawn, False, split, 12 if split == "train" else 8, rng)
    return out


def _drawn(
    disease: str, drawn: list, short: bool, split: str, most: int, rng: random.Random
) -> list[Example]:
    """At most `most` of a disease's questions; each form in turn, or symptoms would outweigh."""
    # Rare values first: else "fever" is gold so often that always naming it wins.
    drawn.sort(key=lambda d: -(rng.random() ** _counts(d[3][-1][1])[d[3][-1][2]]))
    forms: Counter[str] = Counter()
    ranked = []
    for d in drawn:
        forms[d[0]] += 1
        ranked.append((forms[d[0]], d))
    ranked.sort(key=lambda x: x[0])
    rows = (_example(disease, d, short, split, rng) for _, d in ranked)
    return list(islice((row for row in rows if row is not None), most))
