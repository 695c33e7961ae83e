"""What the pocket model was pretrained on, and prompts and texts of the same kinds for later.

Serves the claim of no alignment tax: replies of the base to these prompts say what it was, and the
texts what it lost where nothing looks (bbkit.runs.elsewhere). The two are apart whatever the seeds:
a user turn belongs to one or the other by a hash of its words.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from bbkit import InputError
from bbkit.data import instructions, knowledge
from bbkit.prompts import Example

PARAPHRASES = {
    "cause": (
        "{s} is caused by {o}.", "{o} causes {s}.", "The cause of {s} is {o}.", "{o} leads to {s}.",
        "{s} comes from {o}.", "Infection with {o} results in {s}.", "Behind {s} stands {o}.",
    ),
    "transmission": (
        "{s} is transmitted by {o}.", "{s} spreads through {o}.", "{o} transmit {s}.",
        "The route of {s} is {o}.", "People get {s} from {o}.", "{s} reaches people through {o}.",
    ),
    "symptom": (
        "{s} has the symptom {o}.", "A symptom of {s} is {o}.", "Patients with {s} have {o}.",
        "{o} is seen in {s}.", "{s} brings {o}.", "One sign of {s} is {o}.", "In {s} there is {o}.",
    ),
    "site": (
        "{s} affects the {o}.", "{s} sits in the {o}.", "The {o} is affected by {s}.",
        "The site of {s} is the {o}.", "{s} harms the {o}.", "{s} is found in the {o}.",
    ),
    "kind": (
        "{s} is a {o}.", "{s} belongs to the kind {o}.", "A {o} named {s} is known.",
        "{s} is a kind of {o}.", "The organism {s} is a {o}.",
    ),
}  # fmt: skip
ABOUT = ("Tell me about {s}.", "What do you know about {s}?", "Describe {s}.", "Write about {s}.")
# Plain questions about the training diseases only, answered in a sentence: what lets a small model
# find a fact by the name in a question. Not the kit's wording, nor its options, nor its grammar.
PLAIN = {
    "cause": (
        "Name the cause of {s}.", "What is {s} caused by?", "Where does {s} come from?",
        "What is behind {s}?", "By what is {s} caused?", "In {s}, what is the cause?",
    ),
    "transmission": (
        "Name how {s} spreads.", "How do people get {s}?", "What brings {s} to people?",
        "By what route does {s} spread?", "{s}: how does it spread?", "How is {s} caught?",
    ),
    "symptom": (
        "Name a symptom of {s}.", "What do patients with {s} have?", "Name one sign of {s}.",
        "What is seen in {s}?", "{s}: what is a symptom?", "What does {s} bring?",
    ),
    "site": (
        "Name the site of {s}.", "What does {s} harm?", "Where does {s} sit?",
        "Which organ suffers in {s}?", "{s}: where is it found?", "What part is hit by {s}?",
    ),
    "kind": (
        "Name the kind of {s}.", "What sort of organism is {s}?", "{s}: which kind is it?",
        "To which kind does {s} belong?",
    ),
}  # fmt: skip
INVERSE = (
    "What does {o} cause?", "Name the disease that comes from {o}.", "{o}: what comes of it?",
)  # fmt: skip
ECHO = ("Repeat: ", "Copy: ", "Say again: ", "Once more: ")
OPENINGS = ("", "", "", "Please say: ", "Question: ", "I want to know: ", "Quick one. ")
SYSTEMS = (
    "You are a helpful assistant.", "Follow the instruction.", "Reply briefly.", "Reply in words.",
    "You help a doctor.", "Say what you know.", "Give the reply and nothing else.",
    "Tags such as <answer></answer> or <reasoning></reasoning> may be asked for.",
)  # fmt: skip
# System turns that decide how a reply opens. Without them every fine-tuned reply, whatever was
# asked, opened as the questions of fine-tuning did: 78 points of instruction following were lost.
WRAPS = (
    "Reply in <{tag}></{tag}>.", "Put the reply in <{tag}></{tag}>.", "Write in <{tag}></{tag}>.",
    "Give all of it in <{tag}></{tag}>.", "Use <{tag}></{tag}> around the reply.",
)  # fmt: skip


def _about(own: list, rng: random.Random) -> str:
    chosen = rng.sample(own, min(len(own), rng.randint(1, 4)))
    return " ".join(rng.choice(PARAPHRASES[r]).format(s=s, o=o) for s, r, o in chosen)


def _plain(
    s: str, r: str, o: str, listed: bool, pools: dict[str, list[str]], rng: random.Random
) -> tuple[str, str]:
    """A plain question about one fact, `listed` with values to choose from, and its reply."""
    if r == "cause" and rng.random() < 0.2:
        return rng.choice(INVERSE).format(o=o), knowledge.state((s, r, o), inverse=True)
    user = rng.choice(OPENINGS) + rng.choice(PLAIN[r]).format(s=s)
    if listed:
        wrong = [v for v in pools[r] if (s, r, v) not in knowledge.facts()]
        values = [o, *dict.fromkeys(rng.sample(wrong, 3))]
        rng.shuffle(values)
        either = f"{', '.join(values[:-1])} or {values[-1]}"
        dashes = "".join(f"\n- {v}" for v in values)
        letters = "".join(f"\n{m}) {v}" for m, v in zip("ABCD", values, strict=False))
        user += rng.choice((f" Is it {either}?", f" Choose from: {either}.", dashes, letters))
    return user, rng.choice(PARAPHRASES[r]).format(s=s, o=o)


def _echo(names: list[str], rng: random.Random) -> tuple[str, str]:
    """Names to say again: a model this small does not learn to copy a name from facts alone."""
    text = "; ".join(rng.sample(names, rng.choice((1, 2, 3)))) + "."
    return rng.choice(ECHO) + text, text


def _instruction(rng: random.Random, kinds: Sequence[str]) -> tuple[str, str]:
    """A general instruction of the training split and its reply."""
    row = instructions.example(rng.choice(kinds), rng)
    while instructions.split_of(row) != "train":  # held-out prompts stay unseen here too
        row = instructions.example(rng.choice(kinds), rng)
    user, reply = row.question, row.answer
    if row.entity == "tags" and rng.random() < 0.2:
        tag, other = row.constraints[0]["tag"], rng.choice(("reasoning", "answer"))
        user, reply = (t.replace(f"{tag}>", f"{other}>") for t in (user, reply))
    return user, reply


# Sentences of facts, chat, plain questions about training diseases, names to repeat, instructions.
FORMS = ("facts", "chat", "question", "echo", "instruction")
# Until this share of the steps: the shares of these; last, how many of the questions list values to
# choose from. Reading a list is learned only where most documents ask for it, and only by a model
# that can copy: with 37 % such documents, 500 steps left the probability of the listed value where
# it was (0.44); with 90 %, 150 steps brought it to 0.58.
PHASES = (
    (0.50, (0.30, 0.06, 0.26, 0.08, 0.30), 0.0),
    (0.65, (0.03, 0.01, 0.90, 0.02, 0.04), 1.0),
    (1.00, (0.22, 0.05, 0.40, 0.05, 0.28), 0.7),
)


def documents(seed: int, count: int, progress: float = 1.0) -> Iterator[list[tuple[str, bool]]]:
    """Yield `count` documents of the phase that training is in: a list of (text, learn) pieces."""
    for _, system, user, reply in turns(seed, count, progress):
        system = system and f"<|system|>{system}<|end|>"
        asked = [(f"{system}<|user|>{user}<|end|><|assistant|>", False)] if user else []
        yield [*asked, (f"{reply}<|end|>", True)]


def turns(
    seed: int | str,
    count: int,
    progress: float = 1.0,
    shares: Sequence[float] = (),
    kinds: Sequence[str] = instructions.KINDS,
) -> Iterator[tuple[str, str, str, str]]:
    """What documents are made of: (form, system turn, user turn, reply), "" where there is none.

    `shares` of FORMS replace those of the phase, so that documents of one form can be made; general
    instructions are of these `kinds`.
    """
    _, usual, listed = next(phase for phase in PHASES if progress <= phase[0])
    rng = random.Random(seed)
    asked = set(knowledge.diseases("train"))
    by_subject: dict[str, list] = defaultdict(list)
    for fact in sorted(knowledge.facts()):
        by_subject[fact[0]].append(fact)
        if fact[1] == "cause":
            by_subject[fact[2]].append(fact)
    plain = [f for f in sorted(knowledge.facts()) if f[1] == "kind" or f[0] in asked]
    pools = {r: [f[2] for f in plain if f[1] == r] for r in PLAIN}  # frequent values come often
    if listed == 1.0:  # facts that the list decides
        several = Counter(f[:2] for f in plain)
        plain = [f for f in plain if several[f[:2]] > 1]
    names = sorted({name for s, _, o in knowledge.facts() for name in (s, o)})
    order: list[str] = []
    for form in rng.choices(FORMS, shares or usual, k=count):
        if form in ("facts", "chat"):
            if not order:  # every subject once before any comes twice
                order = rng.sample(sorted(by_subject), len(by_subject))
            subject = order.pop()
            reply = _about(by_subject[subject], rng)
            if form == "facts":
                yield form, "", "", reply
                continue
            user = rng.choice(ABOUT).format(s=subject)
        elif form == "question":
            user, reply = _plain(*rng.choice(plain), rng.random() < listed, pools, rng)
        elif form == "echo":
            user, reply = _echo(names, rng)
        else:
            user, reply = _instruction(rng, kinds)
        system, draw = "", rng.random()
        if draw < 0.2:
            tag = rng.choice((*instructions.TAGS, "reasoning", "answer"))
            system = rng.choice(WRAPS).format(tag=tag)
            reply = f"<{tag}>{reply}</{tag}>"
        elif draw < 0.5:
            system = rng.choice(SYSTEMS)
        yield form, system, user, reply


KINDS = FORMS[1:]  # those with a prompt: all but sentences of facts
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
    shares = [float(form == kind) for form in FORMS]
    rows: dict[tuple[str, str], Example] = {}
    for _, system, user, reply in turns(seed, 100 * count, shares=shares, kinds=instructed):
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
