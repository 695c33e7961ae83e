"""The kit's three rewards, domain, reasoning, format, and a user's own. Functions into [0, 1].

Serves the paper's capability-specific rewards. It prints no formula; these are ours, rule-based.
None means that a capability does not apply. No reply raises, and each takes time linear in its
length: it is cut at its tags, and a part too long to be of use is not looked into.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real

from bbkit import InputError, prompts
from bbkit.data import instructions, knowledge
from bbkit.machine import functions
from bbkit.prompts import Example

Reward = Callable[[Example, str], float | None]

MAX_REASONING = 6000  # characters; longer is no use to a reader and scores 0


def answer_given(example: Example, reply: str) -> str | None:
    """The answer that a reply commits to (for choices the option's text), None when unparsed.

    >>> row = Example("1", "choice", "Cause?", options=("virus", "worm"))
    >>> answer_given(row, "<answer>B</answer>")
    'worm'
    """
    if example.task != "choice":
        return prompts.parse_answer(reply)
    options = prompts.letters(example)
    return options.get(prompts.parse_answer(reply, options) or "")


def domain(example: Example, reply: str) -> float | None:
    """1 if the answer given is the gold, else 0; None for instructions.

    Short answers match the gold text or a synonym, articles, case, spaces and marks aside.

    >>> domain(Example("1", "short", "Cause?", answer="virus"), "<answer>A virus.</answer>")
    1.0
    """
    if example.task == "instruction":
        return None
    given = answer_given(example, reply)
    if given is None or example.task == "choice":
        return float(given == example.answer)
    accepted = (example.answer, *example.synonyms)
    return float(any(prompts.same(given, text, article=False) for text in accepted))


def reasoning(example: Example, reply: str) -> float | None:
    """How far the reasoning part carries the answer given, right or wrong; None for instructions.

    With a checkable chain (`steps`): m/n * m/s * c, where n is the number of gold steps, s of
    sentences written, m of gold steps, from the first on, that the sentences state as facts of
    the ontology (the answer, and what only links two steps, may be any name, but the same in
    all), and c is 1 if the whole chain is there and concludes in the answer given, else 1/2.
    Repeats, true asides and false facts raise s alone. One last sentence that states nothing but
    ends in the answer given is not counted. Over ten sentences a step: 0.
    Otherwise: length * findings * own * c, where length is the words over 12 or 300 over the
    words, at most 1; findings the question's content words taken up, of 4; own the share of
    five-word runs that are neither repeated nor copied from the prompt; c is 1 if the last
    sentence names the answer given and no other option, else 1/2.

    >>> row = Example("1", "short", "Cause?", answer="virus", steps=(("flu", "kind", "virus"),))
    >>> reasoning(row, "<reasoning>Flu is bad.</reasoning><answer>virus</answer>")
    0.0
    """
    if example.task == "instruction":
        return None
    text = prompts.parse_reasoning(reply)
    if text is None or len(text) > MAX_REASONING:
        return 0.0
    given = answer_given(example, reply) or ""
    judge = _chain if example.steps else _explanation
    return judge(example, text, given if len(given) <= MAX_REASONING else "")


def format_(example: Example, reply: str) -> float | None:
    """Obedience to the shape that was asked for.

    Questions: 1 for the four tags once each, in order, with nothing outside; 1/2 with text
    outside; else 0. Instructions: the share of constraints that hold; 0 for a blank reply.

    >>> format_(Example("1", "short", "Cause?"), "Well: <reasoning></reasoning><answer></answer>")
    0.5
    """
    if example.task == "instruction":
        held = [instructions.check(constraint, reply) for constraint in example.constraints]
        return sum(held or [True]) / max(1, len(held)) if reply.strip() else 0.0
    parts = prompts.split_reply(reply)
    if parts is None or None in parts:
        return 0.0
    return 0.5 if parts[2] else 1.0


REWARDS: dict[str, Reward] = {"domain": domain, "reasoning": reasoning, "format": format_}
MEASURES = (  # of held-out replies; an own reward, which is another, takes none of these names
    "domain domain_lenient reasoning format instruction instruction_unseen unparsed "
    "ifeval_strict ifeval_loose ifeval_answer_strict"
).split()


def score(
    example: Example, reply: str, rewards: Mapping[str, Reward] = REWARDS
) -> dict[str, float | None]:
    """Every reward of a reply, in [0, 1], None where a capability does not apply.

    >>> score(Example("1", "short", "Cause?", answer="virus"), "virus")
    {'domain': 0.0, 'reasoning': 0.0, 'format': 0.0}
    """
    return {name: reward(example, reply) for name, reward in rewards.items()}


def chosen(entries: Sequence[str]) -> dict[str, Reward]:
    """The rewards that `grpo.rewards` names, in its order: the kit's, or FILE.py:FUNCTION.

    What an own function gives is checked at each call: a number in [0, 1], or None. Raises
    InputError where its file, its name or what it takes is wrong (bbkit.machine.functions).

    >>> list(chosen(["format", "domain"]))
    ['format', 'domain']
    """
    own = functions.load(entries, ("example", "reply"))
    for name in own:
        if name in MEASURES or name.startswith("elsewhere"):
            raise InputError(f"grpo.rewards: {name} is a measure of the kit; rename the function")
    named = zip(functions.names(entries), entries, strict=True)
    return {n: _checked(entry, own[n]) if n in own else REWARDS[n] for n, entry in named}


def _checked(entry: str, function: Callable) -> Reward:
    def reward(example: Example, reply: str) -> float | None:
        try:
            value = function(example, reply)
        except Exception as error:
            said = functions.told(error, entry.rpartition(":")[0])
            raise InputError(f"{entry} failed on row {example.id}, {said}") from error
        if value is None:
            return None
        if isinstance(value, Real) and 0 <= (number := float(value)) <= 1:
            return number
        mend = "give a number in [0, 1], or None where it does not apply"
        raise InputError(f"{entry} gave {value!r:.40} for row {example.id}; {mend}")

    return reward


def validate_own(entries: Sequence[str], examples: Sequence[Example]) -> None:
    """Check own rewards, before any model is loaded, on the gold replies of what is trained on.

    Each is to give the same at two calls, to be above 0 for some gold reply, and to apply to some
    row. Where an instruction has no reference reply it is asked about "", and may say 0.
    """
    own = {n: f for n, f in chosen(entries).items() if n not in REWARDS}
    for name, reward in own.items():
        seen = []
        for example in examples:
            gold = prompts.completion(example)
            value, again = reward(example, gold), reward(example, gold)
            if value != again:
                said = f"{value} and {again} for the gold reply of row {example.id}"
                raise InputError(f"reward {name}: two calls gave {said}; leave out what is random")
            seen += [] if value is None else [value or not gold]
        if examples and not any(seen):
            what = (
                "0 for every gold reply: a good reply must earn" if seen else "None for every row"
            )
            raise InputError(f"reward {name} is {what}; mend it or leave it out of grpo.rewards")


def validate(examples: Iterable[Example]) -> None:
    """Check, before any training, that gold scores full and every wrong choice nothing.

    Gold prose without a checkable chain may score less reasoning; an instruction without a
    reference reply is not checked. Raises InputError that names the row, counted from 1.

    >>> validate([Example("q1", "choice", "Cause?", options=("virus", "worm"), answer="fungus")])
    Traceback (most recent call last):
    bbkit.InputError: examples row 1 (id q1): the gold answer 'fungus' is not an option; ...
    """
    for row, example in enumerate(examples, 1):
        if fault := _fault(example):
            where = f"{example.source or 'examples'} row {row} (id {example.id})"
            raise InputError(f"{where}: {fault}; mend or leave out the row")


def _fault(example: Example) -> str | None:
    if example.task not in ("choice", "short", "instruction"):
        return f"no task {example.task!r}, use choice, short or instruction"
    if example.task == "choice" and example.answer not in example.options:
        return f"the gold answer {example.answer!r} is not an option"
    if example.task == "instruction" and not example.answer:
        return None
    got = score(example, prompts.completion(example))
    if not example.steps:
        del got["reasoning"]
    for name, value in got.items():
        if value is not None and value < 1:
            return f"the gold reply scores {name} {value:.2f} instead of 1"
    for wrong in (option for option in example.options if option != example.answer):
        reply = prompts.completion(replace(example, answer=wrong))
        if domain(example, reply):
            return f"the wrong option {wrong!r} scores domain 1 instead of 0"
        if example.steps and reasoning(example, reply) == 1:
            return f"the wrong option {wrong!r} keeps reasoning 1 under the gold chain"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _names(words: list[str], text: str) -> bool:
    """Whether the words of a text stand in a row among `words`."""
    return f" {' '.join(_words(text))} " in f" {' '.join(words)} "


def _chain(example: Example, text: str, given: str) -> float:
    """The chain's formula; see `reasoning`."""
    steps, stated = example.steps, knowledge.statements(text)
    answer = _words(given)
    if stated and stated[-1] is None and _words(text)[-len(answer) :] == answer:
        stated = stated[:-1]
    if not 0 < len(stated) <= 10 * len(steps):
        return 0.0
    true = {fact for fact in stated if fact is not None and knowledge.is_fact(fact)}
    nodes = [node for subject, _, object_ in steps for node in (subject, object_)]
    fixed = {node for node in nodes if nodes.count(node) == 1}
    # A link that the question names is fixed too; "Lassa fever", itself fixed, names no "Lassa".
    asked = f"{example.context} {example.question}"
    for node in sorted(fixed, key=len, reverse=True):
        asked = asked.replace(node, " ")
    fixed |= {node for node in nodes if _names(_words(asked), node)}

    def longest(at: int, bound: dict[str, str]) -> tuple[int, bool]:
        """Steps stated from `at` on, counted from the first, and whether they reach the answer."""
        if at == len(steps):
            return at, prompts.same(given, bound.get(example.answer, ""), article=False)
        best = (at, False)
        for fact in true:
            if fact[1] == steps[at][1]:
                ends = ((steps[at][0], fact[0]), (steps[at][2], fact[2]))
                if all(prompts.same(name, bound.get(node, name)) for node, name in ends):
                    best = max(best, longest(at + 1, dict(ends) | bound))
        return best

    matched, concluded = longest(0, {node: node for node in fixed - {example.answer}})
    return matched / len(steps) * matched / len(stated) * (1.0 if concluded else 0.5)


COMMON = (  # words of four letters and more that are no finding
    "about after also because been being both caused causes could does following from have having "
    "into likely more most next other patient patients present presents shows some such than that "
    "their then there these they this those were what when where which while will with would year"
)


def _explanation(example: Example, text: str, given: str) -> float:
    """The formula for prose without a checkable chain; see `reasoning`."""
    words = _words(text)
    if not words:
        return 0.0
    length = min(1.0, len(words) / 12, 300 / len(words))
    asked = _words(f"{example.context} {example.question}")
    findings = {word for word in asked if len(word) > 3} - set(COMMON.split())
    wanted = min(4, len(findings))
    taken_up = min(1.0, len(findings & set(words)) / wanted) if wanted else 1.0
    shown = _words(prompts.messages(example)[-1]["content"])
    run = min(5, len(words))
    runs = list(zip(*(words[i:] for i in range(run)), strict=False))
    copied = zip(*(shown[i:] for i in range(run)), strict=False)
    own = len(set(runs).difference(copied)) / len(runs)
    for name in filter(None, (given, *example.options)):  # "E. coli" ends no sentence
        text = re.sub(re.escape(name), " ".join(_words(name)), text, flags=re.IGNORECASE)
    last = _words(re.split(r"[.!?]\s+|\n", text.rstrip(" .!?\n"))[-1])
    named = [o for o in example.options if _names(last, o) and not _names(_words(given), o)]
    return length * taken_up * own * (1.0 if _names(last, given) and not named else 0.5)
